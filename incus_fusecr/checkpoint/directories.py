# SPDX-License-Identifier: Apache-2.0
"""Restored directory descriptors of ext4 that CRIU has put at a position.

ext4 keeps in an open directory where its last getdents(2) ended, and looks anew at the hash to begin with only if the position is
another one (fs/ext4/dir.c, ext4_dx_readdir(): ``info->last_pos != ctx->pos``). In a new descriptor that was put at the end, a
getdents there sets the hash to the end and leaves ``last_pos`` 0, so that after lseek(2) to 0 the directory reads as empty, for
ever. A daemon's or a client's listing in which it stood still would be that: rewinddir(3) is its next step. One getdents from
the beginning, here, makes ``last_pos`` what it should be.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from ..linux.fd import Fd
from ..linux.libc import check, libc
from ..linux.mount import mountinfo
from ..linux.pidfd import pidfd_getfd, pidfd_open
from ..linux.proc import read_text
from ..linux.zygote import JobError, Zygote

log = logging.getLogger(__name__)

SECONDS = 5.0
MAX_DIRECTORIES = 10_000
SYS_getdents64 = {"x86_64": 217}.get(os.uname().machine, 61)  # 61 in the generic table (asm-generic/unistd.h)
_BUFFER = 32 << 10


def settle(zygote: Zygote, pids: Collection[int]) -> None:
    """Of these processes, all of which are stopped. One that cannot be settled is no reason not to go on.

    :param pids: as the agent numbers them
    """
    if not pids:
        return
    try:
        count, _ = zygote.run(f"{__name__}:job_settle", {"pids": sorted(pids)}, deadline=SECONDS)
        if count:
            log.debug("%d open directories of ext4 were put at their positions once more", count)
    except (JobError, OSError) as error:
        log.warning("open directories of ext4 may read as empty: %s", error)


def job_settle(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """In a child: how many."""
    buffer = ctypes.create_string_buffer(_BUFFER)
    count = 0
    for pid in args["pids"]:
        with suppress(OSError):  # it has ended
            for number, position in _directories(pid):
                if count >= MAX_DIRECTORIES:
                    return count, []
                with suppress(OSError), pidfd_open(pid) as pidfd, pidfd_getfd(pidfd, number) as fd:
                    if os.fstat(fd.fileno()).st_nlink:  # one that was removed is empty, and takes no position any more
                        _read_from_the_beginning(fd, position, buffer)
                        count += 1
    return count, []


def _read_from_the_beginning(fd: Fd, position: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
    """It is the same open file as in the process, so it has one position: put back whatever happens."""
    try:
        os.lseek(fd.fileno(), 0, os.SEEK_SET)
        check(int(libc.syscall(SYS_getdents64, fd.fileno(), buffer, _BUFFER)), "getdents64")
    finally:
        os.lseek(fd.fileno(), position, os.SEEK_SET)


def _directories(pid: int) -> list[tuple[int, int]]:
    """(descriptor, position) of the open directories of ext4 that are not at their beginning; asks procfs alone."""
    found: list[tuple[int, int, int]] = []
    try:
        numbers = os.listdir(f"/proc/{pid}/fdinfo")
    except FileNotFoundError:
        return []
    for number in numbers:
        try:
            lines = dict(line.split(":", 1) for line in read_text(f"/proc/{pid}/fdinfo/{number}").splitlines()[:4] if ":" in line)
        except FileNotFoundError:
            continue
        flags, position = int(lines.get("flags", "0"), 8), int(lines.get("pos", "0"))
        if flags & os.O_DIRECTORY and position > 0:
            found.append((int(number), position, int(lines.get("mnt_id", "0"))))
    if not found:
        return []
    ext4 = {mount.id for mount in mountinfo(pid) if mount.fstype == "ext4"}
    return [(number, position) for number, position, mount in found if mount in ext4]
