# SPDX-License-Identifier: Apache-2.0
"""Processes by pidfd: no signal or fd ever goes to a process that took over a number."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct

from . import proc
from .fd import Fd
from .libc import SYS_pidfd_getfd, syscall

PIDFD_INFO_EXIT = 1 << 3  # Linux 6.15
_INFO = struct.Struct("=QQ11Ii")  # struct pidfd_info, its first version (PIDFD_INFO_SIZE_VER0)
PIDFD_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11  # _IOWR(PIDFS_IOCTL_MAGIC, 11, struct pidfd_info)


def pidfd_open(pid: int) -> Fd:
    """pidfd_open(2); raises ProcessLookupError if the process is gone."""
    return Fd(os.pidfd_open(pid), f"pidfd of {pid}")


def pidfd_getfd(pidfd: Fd, fd: int) -> Fd:
    """A copy of descriptor ``fd`` of that process (pidfd_getfd(2), needs PTRACE_MODE_ATTACH)."""
    return Fd(syscall(SYS_pidfd_getfd, pidfd.fileno(), fd, 0, what=f"fd {fd} of {pidfd.name}"), f"copy of fd {fd}")


def send_signal(pidfd: Fd, signum: int) -> bool:
    """pidfd_send_signal(2); False if the process is gone."""
    try:
        signal.pidfd_send_signal(pidfd.fileno(), signum)
    except ProcessLookupError:
        return False
    return True


def wait_exit(pidfd: Fd, seconds: float) -> bool:
    """Wait until the process has exited (a pidfd becomes readable, pidfd_open(2)); False at the deadline."""
    poll = select.poll()
    poll.register(pidfd.fileno(), select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def exit_status(pidfd: Fd, pid: int) -> int | None:
    """How a process ended that is nobody's child of ours: its wait status; None where that is not known.

    :param pid: for the moment until its parent has waited for it, when the kernel does not tell it by the pidfd
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        state, *fields = proc.read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
        if state == "Z" and send_signal(pidfd, 0):  # not waited for yet: the number is still its own
            return int(fields[48])  # the 52nd of all, proc_pid_stat(5)
    info = bytearray(_INFO.pack(PIDFD_INFO_EXIT, *[0] * 13))
    with contextlib.suppress(OSError):
        fcntl.ioctl(pidfd.fileno(), PIDFD_GET_INFO, info)
        mask, *_, status = _INFO.unpack(info)
        if mask & PIDFD_INFO_EXIT:
            return int(status)
    return None
