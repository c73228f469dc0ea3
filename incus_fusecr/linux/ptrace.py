# SPDX-License-Identifier: Apache-2.0
"""ptrace(2), for two purposes: the seccomp filters of another process, and one system call made by it.

Only for a single-threaded process: a tracer is a thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .libc import libc, oserror

PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_GETREGSET = 0x4204
PTRACE_SETREGSET = 0x4205
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_SECCOMP_GET_FILTER = 0x420C
PTRACE_O_TRACESYSGOOD = 1
NT_PRSTATUS = 1
WALL = 0x40000000  # __WALL of wait4(2)

MAX_FILTERS = 256
SOCK_FILTER_SIZE = 8

libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, address: int = 0, data: ctypes.Array[ctypes.c_char] | int = 0) -> int:
    pointer = ctypes.c_void_p(data) if isinstance(data, int) else data
    result = int(libc.ptrace(ctypes.c_long(request), ctypes.c_long(pid), ctypes.c_void_p(address), pointer))
    if result < 0:
        raise oserror(f"ptrace {request:#x} of process {pid}")
    return result


def seccomp_filters(pid: int, seconds: float) -> list[bytes]:
    """The seccomp filters of a process's first thread (arrays of struct sock_filter), the oldest first.

    The process is stopped for well under a millisecond; a system call in which it sleeps is restarted, or returns EINTR
    where signal(7) says so, as after any stop. Needs CAP_SYS_ADMIN and a caller without a seccomp filter of its own
    (kernel/seccomp.c seccomp_get_filter()).

    :param seconds: until it must have stopped
    :raises OSError: EPERM if it is traced already, EACCES if the caller is filtered itself, ETIMEDOUT if it does not stop
    """
    with _stopped(pid, time.monotonic() + seconds):
        found: list[bytes] = []
        while len(found) < MAX_FILTERS:
            try:
                found.append(_filter(pid, len(found)))
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                return found[::-1]
        raise OSError(errno.E2BIG, f"more than {MAX_FILTERS} seccomp filters", f"process {pid}")


@contextmanager
def _stopped(pid: int, end: float, options: int = 0) -> Iterator[None]:
    """The process's first thread is stopped, and goes on as it was.

    :param end: ``time.monotonic()`` until when it must have stopped
    """
    _ptrace(PTRACE_SEIZE, pid, data=options)
    try:
        _ptrace(PTRACE_INTERRUPT, pid)
        _wait_stop(pid, end)
        yield
    finally:
        try:
            _ptrace(PTRACE_DETACH, pid)
        except OSError:
            pass  # it died, or never stopped: the kernel detaches when this process ends


def _wait_stop(pid: int, end: float) -> int:
    """The wait status of its next stop."""
    while True:
        waited, status = os.waitpid(pid, os.WNOHANG | WALL)
        if waited == pid and os.WIFSTOPPED(status):
            return status
        if waited == pid:
            raise OSError(errno.ESRCH, os.strerror(errno.ESRCH), f"process {pid}")
        if time.monotonic() >= end:
            raise OSError(errno.ETIMEDOUT, "does not stop", f"process {pid}")
        time.sleep(0.0005)


def _filter(pid: int, index: int) -> bytes:
    count = _ptrace(PTRACE_SECCOMP_GET_FILTER, pid, index)
    buf = ctypes.create_string_buffer(max(count, 1) * SOCK_FILTER_SIZE)
    got = _ptrace(PTRACE_SECCOMP_GET_FILTER, pid, index, buf)
    return buf.raw[: got * SOCK_FILTER_SIZE]


# struct user_regs_struct of x86_64 (arch/x86/include/asm/user_64.h): 27 words, by index.
_WORDS = struct.Struct("27Q")
_R10, _R9, _R8, _RAX, _RDX, _RSI, _RDI, _ORIG_RAX, _RIP = 7, 8, 9, 10, 12, 13, 14, 15, 16
_SYSCALL = b"\x0f\x05"
_NO_SYSCALL = (1 << 64) - 1
_RESTART_SYSCALL = 219
# include/linux/errno.h, as the register shows them
_ERESTARTSYS, _ERESTARTNOINTR, _ERESTARTNOHAND, _ERESTART_RESTARTBLOCK = ((1 << 64) - n for n in (512, 513, 514, 516))
NR_SETSID = 112
_ALL_SIGNALS = b"\xff" * 8
MAX_VDSO = 64 << 10


def can_make_calls() -> bool:
    """Whether :func:`call` knows this machine's registers."""
    return platform.machine() == "x86_64"


def call(pid: int, number: int, seconds: float, *arguments: int) -> int:
    """Have a process make one system call; what it was doing goes on as if nothing had been.

    The instruction is found in its vDSO, so that nothing in it is changed. A system call in which it sleeps is begun
    again with the time that was left (restart_syscall(2)).

    :param number: of the system call
    :param seconds: until it must have stopped and made the call
    :returns: the result, negative for -errno
    :raises OSError: EPERM if it is traced already, ETIMEDOUT if it does not stop (state D)
    """
    if not can_make_calls():
        raise OSError(errno.ENOSYS, "system calls in other processes are not known here", platform.machine())
    end = time.monotonic() + seconds
    with _stopped(pid, end, PTRACE_O_TRACESYSGOOD):
        before = list(_WORDS.unpack(_registers(pid)))
        mask = _signal_mask(pid)
        try:
            # A handler would run on our registers, and its system calls would be taken for ours.
            _signal_mask(pid, _ALL_SIGNALS)
            there = before.copy()
            there[_RIP] = _vdso_syscall(pid)
            # orig_rax of -1: the kernel takes the process for being in no system call, and restarts none.
            there[_RAX], there[_ORIG_RAX] = number, _NO_SYSCALL
            for place, value in zip((_RDI, _RSI, _RDX, _R10, _R8, _R9), arguments, strict=False):
                there[place] = value
            _set_registers(pid, there)
            for _entry_and_exit in range(2):
                _ptrace(PTRACE_SYSCALL, pid)
                _wait_syscall(pid, end)
            result = _WORDS.unpack(_registers(pid))[_RAX]
        finally:
            _set_registers(pid, _restarting(before))
            _signal_mask(pid, mask)
    return int(result) - (1 << 64) if result >> 63 else int(result)


def _registers(pid: int, words: bytes = bytes(27 * 8), request: int = PTRACE_GETREGSET) -> bytes:
    buf = ctypes.create_string_buffer(words, len(words))
    iovec = struct.pack("PN", ctypes.addressof(buf), len(words))
    _ptrace(request, pid, NT_PRSTATUS, ctypes.create_string_buffer(iovec, len(iovec)))
    return buf.raw


def _signal_mask(pid: int, mask: bytes | None = None) -> bytes:
    """Read, or with ``mask`` set, which signals its first thread blocks (a sigset_t of the kernel's size)."""
    buf = ctypes.create_string_buffer(mask or b"", len(_ALL_SIGNALS))
    _ptrace(PTRACE_SETSIGMASK if mask is not None else PTRACE_GETSIGMASK, pid, len(_ALL_SIGNALS), buf)
    return buf.raw


def _set_registers(pid: int, words: list[int]) -> None:
    _registers(pid, _WORDS.pack(*words), PTRACE_SETREGSET)


def _restarting(words: list[int]) -> list[int]:
    """As the kernel would on its way to user mode (arch/x86/kernel/signal.c arch_do_signal_or_restart()), which it does not
    pass a second time."""
    words = words.copy()
    if words[_ORIG_RAX] == _NO_SYSCALL:
        return words
    if words[_RAX] in (_ERESTARTSYS, _ERESTARTNOINTR, _ERESTARTNOHAND):
        words[_RAX], words[_RIP] = words[_ORIG_RAX], words[_RIP] - len(_SYSCALL)
    elif words[_RAX] == _ERESTART_RESTARTBLOCK:
        words[_RAX], words[_RIP] = _RESTART_SYSCALL, words[_RIP] - len(_SYSCALL)
    words[_ORIG_RAX] = _NO_SYSCALL
    return words


def _vdso_syscall(pid: int) -> int:
    """The address of a SYSCALL instruction in the vDSO."""
    with open(f"/proc/{pid}/maps", "rb") as maps:
        for line in maps:
            if line.endswith(b"[vdso]\n"):
                start, end = (int(part, 16) for part in line.split()[0].split(b"-"))
                with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                    memory.seek(start)
                    found = memory.read(min(end - start, MAX_VDSO)).find(_SYSCALL)
                if found >= 0:
                    return start + found
    raise OSError(errno.ENOSYS, "no vDSO with a system call", f"process {pid}")


def _wait_syscall(pid: int, end: float) -> None:
    """The next stop at a system call's entry or exit. Signals are blocked; what stops it besides is job control."""
    while os.WSTOPSIG(_wait_stop(pid, end)) != signal.SIGTRAP | 0x80:
        _ptrace(PTRACE_SYSCALL, pid)
