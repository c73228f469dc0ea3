# SPDX-License-Identifier: Apache-2.0
"""Seccomp filters with user notification (seccomp(2), seccomp_unotify(2)): build, install, answer."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from .fd import Fd
from .libc import syscall

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_NEW_LISTENER = 8

SECCOMP_RET_ERRNO = 0x00050000
SECCOMP_RET_USER_NOTIF = 0x7FC00000
SECCOMP_RET_ALLOW = 0x7FFF0000

SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1
SECCOMP_ADDFD_FLAG_SETFD = 1
SECCOMP_ADDFD_FLAG_SEND = 2

SECCOMP_IOCTL_NOTIF_RECV = 0xC0502100
SECCOMP_IOCTL_NOTIF_SEND = 0xC0182101
SECCOMP_IOCTL_NOTIF_ID_VALID = 0x40082102
SECCOMP_IOCTL_NOTIF_ADDFD = 0x40182103

_NOTIF = struct.Struct("<QIIiIQ6Q")  # struct seccomp_notif
_NOTIF_RESP = struct.Struct("<QqiI")
_NOTIF_ADDFD = struct.Struct("<QIIII")
_SOCK_FILTER = struct.Struct("<HBBI")

_BPF_LD_W_ABS = 0x20
_BPF_JEQ_K = 0x15
_BPF_JGE_K = 0x35
_BPF_RET_K = 0x06
_DATA_NR, _DATA_ARCH, _DATA_ARG1 = 0, 4, 24  # offsets in struct seccomp_data; both architectures are little-endian
_X32_SYSCALL_BIT = 0x40000000

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# asm/unistd_64.h and asm-generic/unistd.h; equal from 424 on.
_UNIFIED = {
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "openat2": 437,
    "mount_setattr": 442,
    "open_tree_attr": 467,
}
_X86_64 = {
    "open": 2,
    "ioctl": 16,
    "pivot_root": 155,
    "mount": 165,
    "umount2": 166,
    "init_module": 175,
    "delete_module": 176,
    "kexec_load": 246,
    "openat": 257,
    "open_by_handle_at": 304,
    "finit_module": 313,
    "seccomp": 317,
    "kexec_file_load": 320,
    "execveat": 322,
    "keyctl": 250,
}
_AARCH64 = {
    "ioctl": 29,
    "umount2": 39,
    "mount": 40,
    "pivot_root": 41,
    "openat": 56,
    "kexec_load": 104,
    "init_module": 105,
    "delete_module": 106,
    "keyctl": 219,
    "open_by_handle_at": 265,
    "finit_module": 273,
    "seccomp": 277,
    "execveat": 281,
    "kexec_file_load": 294,
}
SYSCALLS = {"x86_64": _X86_64 | _UNIFIED, "aarch64": _AARCH64 | _UNIFIED}


def machine() -> str:
    """The architecture as uname(2) names it.

    :raises OSError: ENOSYS for one whose system call numbers are not known here
    """
    name = platform.machine()
    if name not in SYSCALLS:
        raise OSError(errno.ENOSYS, f"no system call table for {name}")
    return name


def number(name: str) -> int | None:
    """The number of system call ``name`` here; None where the architecture has no such call (open on
    aarch64).
    """
    return SYSCALLS[machine()].get(name)


def ret_errno(num: int) -> int:
    """The filter value that makes a call fail with errno ``num``."""
    return SECCOMP_RET_ERRNO | num


def build_filter(actions: Mapping[str, int], ioctls: Mapping[int, int] | None = None) -> bytes:
    """A classic BPF program (array of struct sock_filter).

    :param actions: system call name -> filter value; everything else is allowed. Calls of a foreign ABI
        (i386, x32) fail with ENOSYS: their numbers mean other calls.
    :param ioctls: ioctl request -> filter value
    """
    arch = AUDIT_ARCH[machine()]
    foreign = ret_errno(errno.ENOSYS)
    program = [
        (_BPF_LD_W_ABS, 0, 0, _DATA_ARCH),
        (_BPF_JEQ_K, 1, 0, arch),
        (_BPF_RET_K, 0, 0, foreign),
        (_BPF_LD_W_ABS, 0, 0, _DATA_NR),
    ]
    if machine() == "x86_64":
        program += [(_BPF_JGE_K, 0, 1, _X32_SYSCALL_BIT), (_BPF_RET_K, 0, 0, foreign)]
    for name, value in actions.items():
        num = number(name)
        if num is not None:
            program += [(_BPF_JEQ_K, 0, 1, num), (_BPF_RET_K, 0, 0, value)]
    if ioctls:
        calls = SYSCALLS[machine()]["ioctl"]
        program += [(_BPF_JEQ_K, 0, 1 + 2 * len(ioctls), calls), (_BPF_LD_W_ABS, 0, 0, _DATA_ARG1)]
        for request, value in ioctls.items():
            program += [(_BPF_JEQ_K, 0, 1, request), (_BPF_RET_K, 0, 0, value)]
    program.append((_BPF_RET_K, 0, 0, SECCOMP_RET_ALLOW))
    return b"".join(_SOCK_FILTER.pack(*step) for step in program)


def install(program: bytes, *, listener: bool) -> int:
    """Put a filter on the calling thread; needs no_new_privs or CAP_SYS_ADMIN in its user namespace.

    :param listener: ask for the notification descriptor (one filter of a process may have one, else EBUSY)
    :returns: that descriptor (CLOEXEC), or 0
    """
    code = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("<HxxxxxxQ", len(program) // _SOCK_FILTER.size, ctypes.addressof(code))
    flags = SECCOMP_FILTER_FLAG_NEW_LISTENER if listener else 0
    seccomp = SYSCALLS[machine()]["seccomp"]
    return syscall(seccomp, SECCOMP_SET_MODE_FILTER, flags, ctypes.c_char_p(fprog), what="seccomp filter")


@dataclass(frozen=True)
class Notification:
    """One call that waits for an answer; ``pid`` is a thread id in the reader's pid namespace, 0 if not
    visible.
    """

    id: int
    pid: int
    nr: int
    args: tuple[int, ...]


class Listener:
    """Owner of a notification descriptor. Not for use by two threads."""

    def __init__(self, fd: int) -> None:
        self._fd = Fd(fd, "seccomp listener")

    def fileno(self) -> int:
        return self._fd.fileno()

    def close(self) -> None:
        """From here on a notified call fails with ENOSYS."""
        self._fd.close()

    def receive(self) -> Notification | None:
        """The next notification; None if its task was killed meanwhile (ENOENT)."""
        buf = bytearray(_NOTIF.size)
        try:
            fcntl.ioctl(self.fileno(), SECCOMP_IOCTL_NOTIF_RECV, buf, True)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return None
            raise
        ident, pid, _flags, nr, _arch, _ip, *args = _NOTIF.unpack(buf)
        return Notification(ident, pid, nr, tuple(args))

    def valid(self, note: Notification) -> bool:
        """Whether the task still waits: what was read through its pid before belongs to it."""
        try:
            fcntl.ioctl(self.fileno(), SECCOMP_IOCTL_NOTIF_ID_VALID, struct.pack("<Q", note.id))
        except OSError:
            return False
        return True

    def _send(self, note: Notification, value: int, num: int, flags: int) -> None:
        answer = bytearray(_NOTIF_RESP.pack(note.id, value, -num, flags))
        try:
            fcntl.ioctl(self.fileno(), SECCOMP_IOCTL_NOTIF_SEND, answer, True)
        except OSError as error:
            if error.errno != errno.ENOENT:  # killed meanwhile
                raise

    def succeed(self, note: Notification, value: int = 0) -> None:
        """The call returns ``value``; the kernel does not run it."""
        self._send(note, value, 0, 0)

    def fail(self, note: Notification, num: int) -> None:
        """The call fails with errno ``num``; the kernel does not run it."""
        self._send(note, 0, num, 0)

    def let(self, note: Notification) -> None:
        """The kernel runs the call. Its arguments may have changed since they were read: no security
        check.
        """
        self._send(note, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE)

    def replace_fd(self, note: Notification, source: int, target: int) -> None:
        """Make descriptor ``target`` of the waiting task a copy of our ``source``
        (SECCOMP_ADDFD_FLAG_SETFD).
        """
        message = _NOTIF_ADDFD.pack(note.id, SECCOMP_ADDFD_FLAG_SETFD, source, target, 0)
        fcntl.ioctl(self.fileno(), SECCOMP_IOCTL_NOTIF_ADDFD, message)

    def succeed_with_fd(self, note: Notification, source: int, *, cloexec: bool) -> None:
        """The call returns a new descriptor, a copy of our ``source`` (SECCOMP_ADDFD_FLAG_SEND, 5.14)."""
        flags = os.O_CLOEXEC if cloexec else 0
        message = _NOTIF_ADDFD.pack(note.id, SECCOMP_ADDFD_FLAG_SEND, source, 0, flags)
        fcntl.ioctl(self.fileno(), SECCOMP_IOCTL_NOTIF_ADDFD, message)


def read_string(pid: int, address: int, limit: int = 4096) -> bytes:
    """A string in the memory of a process, up to its NUL or ``limit`` bytes.

    Page by page: the page after the string need not be mapped. The read may wait (a page backed by FUSE or by
    userfaultfd), so only for disposable processes.
    """
    if not address:
        return b""
    out = b""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        while len(out) < limit:
            memory.seek(address + len(out))
            chunk = memory.read(4096 - (address + len(out)) % 4096)
            if not chunk:
                break
            out += chunk
            if b"\0" in chunk:
                break
    return out.partition(b"\0")[0][:limit]
