# SPDX-License-Identifier: Apache-2.0
"""The one libc handle, and how its errors become OSError."""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)

# Numbers for x86_64 and aarch64 are the same from 424 on (the unified syscall table).
SYS_pidfd_getfd = 438
SYS_openat2 = 437
SYS_close_range = 436

AT_FDCWD = -100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000
AT_HANDLE_FID = 0x200


def oserror(what: str | bytes | None = None) -> OSError:
    """The OSError of the call that just failed, from errno; ``what`` becomes its file name."""
    num = ctypes.get_errno()
    return OSError(num, os.strerror(num), os.fsdecode(what) if what is not None else None)


def check(ret: int, what: str | bytes | None = None) -> int:
    """``ret`` unless it is negative; then :func:`oserror`."""
    if ret < 0:
        raise oserror(what)
    return ret


def syscall(num: int, *args: object, what: str | bytes | None = None) -> int:
    """A raw system call; integers are passed as C longs so that flags keep their upper half."""
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return check(int(libc.syscall(ctypes.c_long(num), *wide)), what)


PR_SET_DUMPABLE = 4
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15


def prctl(option: int, arg2: int = 0) -> int:
    """prctl(2)."""
    return check(int(libc.prctl(option, ctypes.c_ulong(arg2), 0, 0, 0)), "prctl")
