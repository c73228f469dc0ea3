# SPDX-License-Identifier: Apache-2.0
"""FUSE_INIT structs: replies as daemons send them, hostile ones, and what another kernel can be given."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incus_fusecr.errors import FusecrError
from incus_fusecr.fuse import init
from incus_fusecr.fuse.init import (
    InitError,
    InitReply,
    InitRequest,
    compare,
    flag_names,
    parse_init_out,
    parse_reply,
    parse_request,
)
from incus_fusecr.linux import seccomp

# What a 6.18 kernel sends (7.45), and what sshfs 3.7.3, bindfs 1.14.7 (libfuse2) and ceph-fuse 18.2 answer.
KERNEL = bytes.fromhex(
    "680000001a0000000200000000000000000000000000000000000000000000000000000000000000"
    "070000002d00000000000200fbffff73fd050000" + "00" * 44
)
SSHFS = bytes.fromhex("070000001f0000000000020039f04040000000000000100000ca9a3b00010000" + "00" * 32)
BINDFS = bytes.fromhex("070000001300000000000200110000000000000000000200")


def request(minor: int = 45, flags: int = 0x5FD73FFFFFB) -> InitRequest:
    body = struct.pack("<IIIII11I", 7, minor, 131072, flags & 0xFFFFFFFF, flags >> 32, *[0] * 11)
    return parse_request(struct.pack("<IIQQIIIHH", 40 + len(body), 26, 2, 0, 0, 0, 0, 0, 0) + body)


def reply(minor: int = 31, flags: int = 0, **fields: int) -> InitReply:
    order = ("max_background", "congestion_threshold", "max_write", "time_gran", "max_pages", "map_alignment")
    values = [fields.get(name, 0) for name in order]
    return parse_init_out(
        struct.pack("<IIIIHHIIHHIIH22x", 7, minor, 65536, flags & 0xFFFFFFFF, *values, flags >> 32,
                    fields.get("max_stack_depth", 0), fields.get("request_timeout", 0))
    )  # fmt: skip


def message(body: bytes, *, unique: int = 2, error: int = 0, length: int | None = None) -> bytes:
    return struct.pack("<IiQ", 16 + len(body) if length is None else length, error, unique) + body


def test_the_kernels_request() -> None:
    parsed = parse_request(KERNEL)
    assert (parsed.major, parsed.minor, parsed.max_readahead, parsed.unique) == (7, 45, 131072, 2)
    assert parsed.flags == 0x5FD73FFFFFB
    assert "FUSE_OVER_IO_URING" not in flag_names(parsed.flags)
    assert flag_names(parsed.flags)[-1] == "FUSE_REQUEST_TIMEOUT"
    assert parsed.raw == KERNEL


def test_an_old_kernels_request_has_no_second_flags() -> None:
    body = struct.pack("<IIII", 7, 31, 131072, 0x3FFFFFB)
    parsed = parse_request(struct.pack("<IIQQIIIHH", 56, 26, 1, 0, 0, 0, 0, 0, 0) + body)
    assert (parsed.minor, parsed.flags) == (31, 0x3FFFFFB)


@pytest.mark.parametrize("raw", [b"", KERNEL[:55], KERNEL[:-1], KERNEL.replace(b"\x1a", b"\x01", 1)])
def test_not_a_request(raw: bytes) -> None:
    with pytest.raises(InitError):
        parse_request(raw)


def test_replies_of_real_daemons() -> None:
    sshfs = parse_reply(message(SSHFS), 2)
    assert (sshfs.minor, sshfs.max_write, sshfs.time_gran, sshfs.max_pages) == (31, 1 << 20, 10**9, 256)
    assert sshfs.flags == 0x4040F039
    assert sshfs.raw == SSHFS
    bindfs = parse_reply(message(BINDFS), 2)
    assert (bindfs.minor, bindfs.flags, bindfs.max_write, bindfs.max_pages) == (19, 0x11, 131072, 0)
    assert bindfs.raw == BINDFS
    assert compare(sshfs, request()) == compare(bindfs, request()) == []


def test_second_flags_count_only_with_init_ext() -> None:
    with_ext = reply(flags=init.FUSE_INIT_EXT | init.FUSE_PASSTHROUGH, max_stack_depth=1, request_timeout=30)
    assert with_ext.flag_names() == ["FUSE_INIT_EXT", "FUSE_PASSTHROUGH"]
    assert (with_ext.max_stack_depth, with_ext.request_timeout) == (1, 30)
    assert reply(flags=init.FUSE_PASSTHROUGH).flags == 0


@pytest.mark.parametrize("size", [8, 24, 64])
def test_lengths_that_exist(size: int) -> None:
    parsed = parse_init_out(SSHFS[:size])
    assert parsed.raw == SSHFS[:size]
    assert parsed.max_pages == (256 if size == 64 else 0)


@given(st.integers(0, 200).filter(lambda size: size not in (8, 24, 64)))
def test_other_lengths_are_refused(size: int) -> None:
    with pytest.raises(InitError):
        parse_init_out(SSHFS.ljust(200, b"\0")[:size])


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "shorter than a header"),
        (message(SSHFS)[:15], "shorter than a header"),
        (message(SSHFS, length=79), "its header says 79 bytes, it has 80"),
        (message(SSHFS, length=0xFFFFFFFF), "its header says"),
        (message(SSHFS, unique=4), "answers request 4, asked was 2"),
        (message(b"", error=-errno.EPROTO), "error -71"),
        (message(SSHFS, error=-5), "error -5"),
        (message(SSHFS + b"\0"), "65 bytes"),
        (message(b"\x08" + SSHFS[1:]), "protocol 8.31"),
        (message(b"\x06" + SSHFS[1:]), "protocol 6.31"),
    ],
)
def test_hostile_replies(raw: bytes, why: str) -> None:
    with pytest.raises(InitError) as caught:
        parse_reply(raw, 2)
    assert why in str(caught.value)
    assert isinstance(caught.value, FusecrError)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_reply_or_an_error(raw: bytes) -> None:
    try:
        parsed = parse_reply(raw, 2)
    except InitError as error:
        assert str(error).isprintable()
    else:
        assert parsed.major == 7
        assert parsed.raw == raw[16:]


def test_a_flag_that_the_other_kernel_lacks() -> None:
    older = request(minor=31, flags=0x3FFFFFB)
    wanted = init.FUSE_INIT_EXT | init.FUSE_PASSTHROUGH | init.FUSE_ASYNC_READ | 1 << 60
    assert compare(reply(minor=40, flags=wanted), older) == [
        "the kernel does not offer FUSE_INIT_EXT",
        "the kernel does not offer FUSE_PASSTHROUGH",
        "the kernel does not offer bit 60",
    ]
    assert compare(reply(minor=40, flags=init.FUSE_INIT_EXT | init.FUSE_PASSTHROUGH), request()) == []


def test_a_newer_daemon_on_an_older_kernel_is_no_reason_by_itself() -> None:
    assert compare(reply(minor=45, flags=1), request(minor=31, flags=1)) == []


def test_an_older_layout_is_a_reason() -> None:
    reasons = compare(reply(minor=31, flags=1), request(minor=22, flags=1))
    assert reasons == ["messages of FUSE 7.31 have another layout than the kernel's 7.22"]
    assert compare(reply(minor=19, flags=1), request(minor=22, flags=1)) == []


def test_flags_that_no_kernel_offers_but_daemons_set() -> None:
    assert compare(reply(flags=1 << 2 | 1 << 5), request(flags=1)) == []


def run_filter(program: bytes, arch: int, number: int, argument: int = 0) -> int:
    """A BPF machine for what build_filter() uses."""
    steps = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    at, value = 0, 0
    while True:
        code, yes, no, k = steps[at]
        at += 1
        if code == 0x20:
            value = {0: number, 4: arch, 24: argument}[k]
        elif code == 0x15:
            at += yes if value == k else no
        elif code == 0x35:
            at += yes if value >= k else no
        elif code == 0x06:
            return int(k)
        else:
            raise AssertionError(f"instruction {code:#x}")


def test_seccomp_filter() -> None:
    actions = {"umount2": seccomp.ret_errno(22), "mount": seccomp.SECCOMP_RET_USER_NOTIF}
    program = seccomp.build_filter(actions, {5: seccomp.ret_errno(1), 6: seccomp.ret_errno(2)})
    machine = seccomp.machine()
    arch, calls = seccomp.AUDIT_ARCH[machine], seccomp.SYSCALLS[machine]
    assert run_filter(program, arch, calls["umount2"]) == seccomp.SECCOMP_RET_ERRNO | 22
    assert run_filter(program, arch, calls["mount"]) == seccomp.SECCOMP_RET_USER_NOTIF
    for number in set(range(600)) - {calls["umount2"], calls["mount"]}:
        assert run_filter(program, arch, number) == seccomp.SECCOMP_RET_ALLOW
    ioctls = [run_filter(program, arch, calls["ioctl"], request) for request in (4, 5, 6, 7)]
    assert ioctls == [seccomp.SECCOMP_RET_ALLOW, seccomp.ret_errno(1), seccomp.ret_errno(2), seccomp.SECCOMP_RET_ALLOW]
    assert run_filter(program, arch, calls["mount"], 5) == seccomp.SECCOMP_RET_USER_NOTIF
    foreign = seccomp.SECCOMP_RET_ERRNO | errno.ENOSYS
    assert run_filter(program, 0x40000003, 21) == foreign  # i386: umount2 is another number there
    if machine == "x86_64":
        assert run_filter(program, arch, 0x40000000 | calls["umount2"]) == foreign  # x32
