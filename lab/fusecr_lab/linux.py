# SPDX-License-Identifier: Apache-2.0
"""Thin wrappers of the system calls that Python 3.11 lacks; OSError carries errno and the path."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
HOST_NAMESPACES = (CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET)

PR_SET_PDEATHSIG = 1

LOOP_CONFIGURE = 0x4C0A
LOOP_CLR_FD = 0x4C01
LOOP_GET_STATUS64 = 0x4C05
LOOP_CTL_GET_FREE = 0x4C82
LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
_LOOP_INFO64_SIZE = 232
_LOOP_CONFIG_SIZE = 4 + 4 + _LOOP_INFO64_SIZE + 64

_libc = ctypes.CDLL(None, use_errno=True)


def _check(rc: int, path: str | None = None) -> int:
    if rc < 0:
        err = ctypes.get_errno()
        raise OSError(err, os.strerror(err), path)
    return rc


def mount(source: str, target: str, fstype: str | None, flags: int = 0, data: str | None = None) -> None:
    """mount(2)."""
    _check(_libc.mount(source.encode(), target.encode(), fstype.encode() if fstype else None,
                       ctypes.c_ulong(flags), data.encode() if data else None), target)


def umount2(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(target.encode(), flags), target)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2); a chroot instead would forbid user namespaces below it."""
    nr = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine)
    if nr is None:
        raise OSError(38, "pivot_root: unknown system call number on " + os.uname().machine)
    _check(_libc.syscall(nr, new_root.encode(), put_old.encode()), new_root)


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(flags))


def setns(fd: int, flags: int) -> None:
    """setns(2); with a pidfd (kernel 5.8) flags may name several namespaces at once."""
    _check(_libc.setns(fd, flags))


def set_pdeathsig(sig: int) -> None:
    """prctl(PR_SET_PDEATHSIG): the signal that the kernel sends us when our parent dies."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(sig), 0, 0, 0))


def attach_loop(path: str) -> tuple[int, str]:
    """Attach a file read-only to a free loop device that detaches itself after its last user.

    Returns the open device fd (keeps the device attached until it is mounted) and the device's path.
    """
    backing = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(64):
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            device = f"/dev/loop{number}"
            fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
            config = bytearray(_LOOP_CONFIG_SIZE)
            struct.pack_into("=I", config, 0, backing)
            # lo_flags: after lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit (u64 each), lo_number,
            # lo_encrypt_type, lo_encrypt_key_size (u32 each)
            struct.pack_into("=I", config, 8 + 5 * 8 + 3 * 4, LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR)
            try:
                fcntl.ioctl(fd, LOOP_CONFIGURE, config)
            except OSError as err:
                os.close(fd)
                if err.errno == 16:  # EBUSY: somebody else took this free number first
                    continue
                raise OSError(err.errno, err.strerror, device) from None
            return fd, device
        raise OSError(16, "no free loop device after 64 tries", "/dev/loop-control")
    finally:
        os.close(control)
        os.close(backing)


def loop_backing(device: str) -> tuple[int, int] | None:
    """Return (st_dev, st_ino) of the file behind a loop device, None if it is not attached."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        info = bytearray(_LOOP_INFO64_SIZE)
        fcntl.ioctl(fd, LOOP_GET_STATUS64, info)
        dev, ino = struct.unpack_from("=QQ", info)
        return dev, ino
    except OSError:
        return None
    finally:
        os.close(fd)


def detach_loop(device: str) -> None:
    """Detach a loop device (LOOP_CLR_FD)."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, LOOP_CLR_FD)
    finally:
        os.close(fd)
