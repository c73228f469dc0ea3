# SPDX-License-Identifier: Apache-2.0
"""Before a dump: the kernel forgets what nobody uses, and the daemon hears of it.

A restored kernel knows only what is in use. What the daemon remembers besides would never be forgotten: its table grows with
each restore, and one that goes by the inode numbers of its backing takes them for ever for those of the files before (ADR 0004).
"""

from __future__ import annotations

import logging
import time

from ..fuse import connection
from ..linux.fd import Fd
from ..linux.pidfd import pidfd_getfd, pidfd_open
from ..linux.zygote import JobError, JobTimeout, Zygote
from . import jobs
from .scan import Scan
from .survive import root_mount

log = logging.getLogger(__name__)

TRIM_SECONDS = 8.0
# FORGETs have no answer: how long the daemon may take to read them. What it does not read it keeps for good, as without this.
READ_SECONDS = 1.0
_POLL = 0.001


def trim(zygote: Zygote, seen: Scan, number: int, device: tuple[int, int]) -> None:
    """Drop what is cached of a connection and not in use, and wait until its daemon has read that.

    A mount that does not let it happen is as before: a daemon that remembers more than it needs is no reason not to dump.

    :param device: (pid, fd) of one of the daemon's descriptors
    :raises JobTimeout: the daemon does not take the dirty pages that the kernel writes back first
    """
    root = root_mount(seen, number)
    if root is None:
        raise LookupError(f"connection {number} has no root mount")
    where = {"pid": seen.init, "mountpoint": root.mountpoint, "mount_id": root.id}
    try:
        with pidfd_open(seen.init) as pidfd:
            zygote.run(f"{jobs.__name__}:trim_job", where, [pidfd.fileno()], deadline=TRIM_SECONDS, on=connection.label(number))
        with pidfd_open(device[0]) as pidfd, pidfd_getfd(pidfd, device[1]) as copy:
            read = _wait_read(copy)
    except JobTimeout:
        raise
    except (JobError, OSError) as error:
        log.info("connection %d: unused nodes are not forgotten: %s", number, error)
    else:
        if not read:
            log.info("connection %d: its daemon did not read all FORGETs within %g s", number, READ_SECONDS)


def _wait_read(device: Fd) -> bool:
    deadline = time.monotonic() + READ_SECONDS
    while connection.unread(device):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True
