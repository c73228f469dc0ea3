# SPDX-License-Identifier: Apache-2.0
"""Tell the network that a container's addresses are here now: switches learn the port, neighbours keep their entries."""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from typing import Any

from ..linux import ns, rtnetlink
from ..linux.pidfd import pidfd_open
from ..linux.rtnetlink import BR_STATE_FORWARDING
from ..linux.zygote import JobError, Zygote

log = logging.getLogger(__name__)

JOB_SECONDS = 2.0
PORT_SECONDS = 0.2
# Again, in case that a switch was not ready or a frame got lost.
REPEATS = (0.2, 1.0)
MAX_FRAMES = 1024
BROADCAST = b"\xff" * 6
ALL_NODES = socket.inet_pton(socket.AF_INET6, "ff02::1")
ETH_ARP = 0x0806
ETH_RARP = 0x8035
ETH_IPV6 = 0x86DD
ARP_REQUEST = 1
RARP_REQUEST = 3
ICMPV6 = 58
NA = 136
NA_OVERRIDE = 0x20000000  # RFC 4861 4.4
OPTION_TARGET_ADDRESS = 2


def announce(zygote: Zygote, init: int, hosts: list[str]) -> None:
    """Announce a container once, and in the background :data:`REPEATS` times more.

    :param init: a process of its network namespace
    :param hosts: the host's ends of its network devices, open again
    """
    indexes = []
    for name in hosts:
        try:
            indexes.append(rtnetlink.peer_index(name))
        except OSError as error:
            log.warning("network device %s: %s", name, error.strerror)
    if indexes:
        _wait_forwarding(hosts)
        _once(zygote, init, indexes)
        threading.Thread(target=_again, args=(zygote, init, indexes), daemon=True, name=f"announce-{init}").start()


def _wait_forwarding(names: list[str]) -> None:
    """A bridge enables a port when it hears of the carrier, which is after the device was set up."""
    end = time.monotonic() + PORT_SECONDS
    while time.monotonic() < end and any(rtnetlink.port_state(n) not in (None, BR_STATE_FORWARDING) for n in names):
        time.sleep(0.001)


def _again(zygote: Zygote, init: int, indexes: list[int]) -> None:
    for seconds in REPEATS:
        time.sleep(seconds)
        if not _once(zygote, init, indexes):
            return


def _once(zygote: Zygote, init: int, indexes: list[int]) -> bool:
    try:
        with pidfd_open(init) as pidfd:
            zygote.run(f"{__name__}:announce_job", {"indexes": indexes}, [pidfd.fileno()], deadline=JOB_SECONDS)
    except ProcessLookupError:
        return False
    except JobError as error:
        log.warning("addresses of the container of pid %d were not announced: %s", init, error)
    return True


def announce_job(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """args: indexes of network devices; fds[0]: pidfd of a process of their namespace; the result is the number of frames"""
    ns.setns(fds[0], ns.CLONE_NEWNET)
    wanted = rtnetlink.IFF_UP | rtnetlink.IFF_BROADCAST
    links = [x for x in rtnetlink.links() if x.index in args["indexes"] and x.flags & wanted == wanted and len(x.address) == 6]
    addresses = rtnetlink.addresses()
    count = 0
    for link in links:
        own = [a for a in addresses if a.index == link.index]
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
            sock.bind((link.name, 0))
            for frame in [rarp(link.address), *(frame_of(link.address, a) for a in own)]:
                if count < MAX_FRAMES:
                    sock.send(frame)
                    count += 1
    return count, []


def frame_of(mac: bytes, address: rtnetlink.Address) -> bytes:
    """Gratuitous ARP or unsolicited neighbour advertisement."""
    return arp(mac, address.address) if address.family == socket.AF_INET else advertisement(mac, address.address)


def _arp(kind: int, operation: int, mac: bytes, address: bytes, target: bytes) -> bytes:
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + mac + address + target + address
    return BROADCAST + mac + struct.pack("!H", kind) + body + bytes(18)


def arp(mac: bytes, address: bytes) -> bytes:
    """An ARP request for one's own address (RFC 5227 3), to all."""
    return _arp(ETH_ARP, ARP_REQUEST, mac, address, BROADCAST)


def rarp(mac: bytes) -> bytes:
    """What hypervisors send after a migration: it needs no address, and switches learn from it."""
    return _arp(ETH_RARP, RARP_REQUEST, mac, bytes(4), mac)


def advertisement(mac: bytes, address: bytes) -> bytes:
    """An unsolicited neighbour advertisement (RFC 4861 7.2.6), to all nodes."""
    head = struct.pack("!BBHI", NA, 0, 0, NA_OVERRIDE)
    body = address + struct.pack("!BB", OPTION_TARGET_ADDRESS, 1) + mac
    length = len(head) + len(body)
    checked = address + ALL_NODES + struct.pack("!II", length, ICMPV6) + head + body
    total = sum(struct.unpack(f"!{len(checked) // 2}H", checked))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    head = head[:2] + struct.pack("!H", ~total & 0xFFFF) + head[4:]
    ip = struct.pack("!IHBB", 6 << 28, length, ICMPV6, 255) + address + ALL_NODES
    return b"\x33\x33" + ALL_NODES[-4:] + mac + struct.pack("!H", ETH_IPV6) + ip + head + body
