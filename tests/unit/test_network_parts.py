# SPDX-License-Identifier: Apache-2.0
"""Network images, announcements and verdicts on network devices: what can be told without a network."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from incus_fusecr.agent import announce, network, nics
from incus_fusecr.agent.network import Fence, inner_links
from incus_fusecr.checkpoint import netimages, pressure
from incus_fusecr.errors import FusecrError
from incus_fusecr.linux import rtnetlink

MAC = bytes.fromhex("10666a8f48db")
V6 = socket.inet_pton(socket.AF_INET6, "fd00::50")
NEWADDR, NEWROUTE = rtnetlink.RTM_NEWADDR, rtnetlink.RTM_NEWROUTE


def message(kind: int, body: bytes) -> bytes:
    return rtnetlink.HEADER.pack(rtnetlink.HEADER.size + len(body), kind, 0, 0, 0) + body + bytes(-len(body) % 4)


def attribute(kind: int, value: bytes) -> bytes:
    return rtnetlink.ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def address(family: int, flags: int = 0x80) -> bytes:
    head = rtnetlink.IFADDRMSG.pack(family, 64, flags, 0, 2)
    value = V6 if family == socket.AF_INET6 else bytes(4)
    flags_attribute = attribute(rtnetlink.IFA_FLAGS, struct.pack("=I", flags | 0x300))
    return message(NEWADDR, head + attribute(rtnetlink.IFA_ADDRESS, value) + flags_attribute)


def route(flags: int) -> bytes:
    return message(NEWROUTE, struct.pack("=BBBBBBBBI", socket.AF_INET, 24, 0, 0, 254, 2, 253, 1, flags))


def image(magic: str, *parts: bytes) -> bytearray:
    return bytearray(struct.pack("=I", netimages.MAGIC[magic]) + b"".join(parts))


def test_ipv6_addresses_come_back_without_duplicate_address_detection() -> None:
    data = image("ifaddr", address(socket.AF_INET), address(socket.AF_INET6), address(socket.AF_INET6))
    assert netimages.patched(data, netimages.MAGIC["ifaddr"]) == 2
    wanted = image("ifaddr", address(socket.AF_INET), *[address(socket.AF_INET6, 0x82)] * 2)
    assert data == wanted


def test_routes_lose_what_the_kernel_refuses() -> None:
    data = image("route", route(16), route(0), route(1 | 4))
    assert netimages.patched(data, netimages.MAGIC["route"]) == 2
    assert data == image("route", route(0), route(0), route(4))


@pytest.mark.parametrize("cut", range(0, 130, 7))
def test_a_torn_image_is_patched_as_far_as_it_is_whole(cut: int) -> None:
    whole = image("ifaddr", address(socket.AF_INET6), address(socket.AF_INET6))
    data = whole[: len(whole) - cut]
    size = len(data)
    netimages.patched(data, netimages.MAGIC["ifaddr"])
    assert len(data) == size


@pytest.mark.parametrize("size", [0, 1, 15, 0xFFFFFFFF])
def test_lengths_that_lie_end_the_patch(size: int) -> None:
    data = image("ifaddr", struct.pack("=IHHII", size, NEWADDR, 0, 0, 0), address(socket.AF_INET6))
    before = bytes(data)
    assert netimages.patched(data, netimages.MAGIC["ifaddr"]) == 0 and data == before


def test_an_attribute_that_lies_ends_the_attributes() -> None:
    body = rtnetlink.IFADDRMSG.pack(socket.AF_INET6, 64, 0, 0, 2) + struct.pack("=HH", 0, rtnetlink.IFA_FLAGS) + bytes(8)
    data = image("ifaddr", message(NEWADDR, body))
    assert netimages.patched(data, netimages.MAGIC["ifaddr"]) == 1
    assert data[4 + 16 + 8 :] == body[8:]


def test_only_plain_files_of_a_directory_are_patched(tmp_path: Path, expect_log: Callable[[str], None]) -> None:
    expect_log("ifaddr-2.img is not a plain file")
    expect_log("ifaddr-3.img is not a plain file")
    content = bytes(image("ifaddr", address(socket.AF_INET6)))
    (tmp_path / "outside").write_bytes(content)
    images = tmp_path / "images"
    images.mkdir()
    (images / "ifaddr-1.img").write_bytes(content)
    os.link(tmp_path / "outside", images / "ifaddr-2.img")
    os.mkfifo(images / "ifaddr-3.img")
    (images / "ifaddr-x.img").write_bytes(content)
    (images / "route-1.img").write_bytes(content)
    fd = os.open(images, os.O_RDONLY)
    try:
        assert netimages.patch(fd) == 1
        assert (images / "ifaddr-1.img").read_bytes() != content
        for name in ("ifaddr-2.img", "ifaddr-x.img", "route-1.img"):
            assert (images / name).read_bytes() == content
        (images / "ifaddr-4.img").symlink_to(tmp_path / "outside")
        with pytest.raises(OSError, match="ifaddr-4"):
            netimages.patch(fd)
    finally:
        os.close(fd)
    assert (tmp_path / "outside").read_bytes() == content


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_an_advertisement_has_a_right_checksum_and_names_the_address() -> None:
    frame = announce.advertisement(MAC, V6)
    assert frame[:6] == bytes.fromhex("333300000001") and frame[6:12] == MAC
    packet, body = frame[14:], frame[54:]
    assert packet[7] == 255 and packet[8:24] == V6 and body[8:24] == V6 and body[26:32] == MAC
    assert checksum(packet[8:40] + struct.pack("!II", len(body), 58) + body) == 0xFFFF


def test_arp_frames() -> None:
    own = socket.inet_aton("10.0.0.5")
    frame = announce.arp(MAC, own)
    assert (frame[:6], frame[12:14], frame[20:22]) == (b"\xff" * 6, b"\x08\x06", b"\0\x01")
    assert frame[22:28] == MAC and frame[28:32] == own and frame[38:42] == own and len(frame) == 60
    assert announce.rarp(MAC)[12:14] == b"\x80\x35"


def instance(device: dict[str, str], **volatile: str) -> dict[str, Any]:
    config = {f"volatile.eth0.{key}": value for key, value in volatile.items()}
    return {"name": "c1", "config": config, "expanded_devices": {"eth0": {"type": "nic", **device}, "root": {"type": "disk"}}}


@pytest.mark.parametrize(
    ("device", "inside", "words"),
    [
        ({"nictype": "bridged"}, "eth0", ""),
        ({"network": "managed"}, "eth0", ""),
        ({"nictype": "bridged", "name": "lan0"}, "lan0", ""),
        ({"nictype": "bridged"}, "wan0", "is called wan0 inside and not eth0"),
        ({"nictype": "macvlan"}, "eth0", "of the kind macvlan"),
        ({"network": "an-ovn"}, "eth0", "of the kind ovn"),
        ({"type": "infiniband", "nictype": "sriov"}, "eth0", "of the kind infiniband"),
    ],
)
def test_verdicts(device: dict[str, str], inside: str, words: str) -> None:
    types = {"managed": "bridge", "an-ovn": "ovn"}
    seen = nics.verdicts(instance(device, host_name="veth1"), types.__getitem__, {"veth1": 7}.__getitem__, {7: inside, 1: "lo"})
    assert [words in v.why for v in seen] == ([True] if words else [])


def test_a_device_that_is_not_there_is_refused() -> None:
    def gone(_name: str) -> int:
        raise FileNotFoundError

    for host in ({}, {"host_name": "veth1"}):
        (verdict,) = nics.verdicts(instance({"nictype": "bridged"}, **host), str, gone, {})
        assert "is not in the container" in verdict.why


def test_only_names_of_nics_that_the_instance_has() -> None:
    seen = instance({"nictype": "bridged"}, host_name="veth1")
    seen["config"].update({"volatile.eth7.host_name": "vethOTHER", "volatile.root.host_name": "eth0", "volatile.x.host_name": "x"})
    assert nics.host_names(seen) == ["veth1"]
    assert nics.host_names({}) == []


@pytest.mark.parametrize("name", ["../../../etc", "a/b", "", ".", "..", "sixteen-bytes-it", "a b", "eth0:1", "a\n"])
def test_what_is_no_name_of_a_device(name: str) -> None:
    assert not rtnetlink.is_name(name) and rtnetlink.is_name("veth0a1b2c3d")


def test_a_name_that_leads_elsewhere_ends_the_plan(monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]) -> None:
    expect_log("network device gone: No such device")

    def peer_in(name: str, _netns: int) -> int:
        if name == "gone":
            raise OSError(errno.ENODEV, "No such device")
        return {"vethOURS": 7}.get(name, 0)

    monkeypatch.setattr(rtnetlink, "peer_in", peer_in)
    monkeypatch.setattr(rtnetlink, "port_state", lambda _name: 3)
    monkeypatch.setattr(network, "flags_of", lambda _name: rtnetlink.IFF_UP)
    fence = Fence()
    fence.plan_source(["gone", "vethOURS"], os.getpid())
    assert fence.doors == {"vethOURS": ("port", 3)}
    for name in ("vethOTHER", "../eth0", "eth0.100"):
        with pytest.raises(FusecrError, match="is not the other end of one in the container"):
            Fence().plan_source([name], os.getpid())


def test_only_tables_of_criu_are_named_to_nft() -> None:
    listed = "table inet CRIU-12\ntable ip CRIU-1; flush ruleset\ntable inet CRIU-1x\ntable x CRIU-5\ntable inet filter\n"
    listed += "table inet CRIU-\n table ip CRIU-7\ntable ip CRIU-8\rtable ip CRIU-9\ntable ip \ufffd\ntable ip6 CRIU-3\n"
    assert network.criu_tables(listed) == [("inet", "CRIU-12"), ("ip6", "CRIU-3")]


def test_undoing_the_network_lock_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    """A table called ff in the container: what nft prints is no UTF-8."""
    expect_log("network lock of pid")
    (tmp_path / "nsenter").write_text("#!/bin/sh\nprintf 'table inet \\377\\ntable inet CRIU-4\\n'\necho $* >>$LOG\n")
    for name in ("nft", "iptables-restore", "ip6tables-restore"):
        (tmp_path / name).write_text("#!/bin/sh\n")
    for program in tmp_path.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    repaired: list[int] = []
    monkeypatch.setattr(network.sockets, "repair_off", lambda _zygote, init: repaired.append(init))
    network.undo_network_lock(None, os.getpid())  # type: ignore[arg-type]
    assert (tmp_path / "log").read_text().splitlines()[-1].endswith("nft delete table inet CRIU-4")

    def wrong(*_args: object) -> None:
        raise ValueError("gone wrong")

    monkeypatch.setattr(network, "_in_netns", wrong)
    network.undo_network_lock(None, os.getpid())  # type: ignore[arg-type]
    assert repaired == [os.getpid()] * 2


def test_links_of_a_container(tmp_path: Path) -> None:
    (tmp_path / "c1").mkdir()
    lines = "lxc.net.0.type = phys\nlxc.net.0.link = veth1\nlxc.net.1.link=veth2\nlxc.net.1.name = veth3\n#lxc.net.2.link = x\n"
    (tmp_path / "c1" / "lxc.conf").write_text(lines)
    assert inner_links("c1", str(tmp_path)) == ["veth1", "veth2"]


def test_a_fence_survives_its_agent() -> None:
    fence = Fence({"veth1": ("port", 3), "veth2": ("link", 0)})
    assert Fence.from_dict(fence.to_dict()) == fence


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        ("/sys/fs/cgroup/init.scope/memory.pressure", True),
        ("/proc/pressure/io", True),
        ("/memory.pressure", True),
        ("/proc/pressure/ion", False),
        ("/tmp/memory.pressure (deleted)", False),
        ("socket:[5]", False),
    ],
)
def test_names_of_pressure_files(path: str, is_one: bool) -> None:
    assert bool(pressure.PRESSURE.fullmatch(path)) is is_one
