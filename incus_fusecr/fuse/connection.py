# SPDX-License-Identifier: Apache-2.0
"""FUSE connections as the kernel shows them: fusectl, and fdinfo of /dev/fuse descriptors."""

from __future__ import annotations

import errno
import os
import select
from dataclasses import dataclass

from ..linux import proc
from ..linux.fd import Fd

# In fdinfo of /dev/fuse descriptors (fs/fuse/dev.c fuse_dev_show_fdinfo(), Linux 6.16).
CONNECTION_KEY = "fuse_connection"
FUSECTL = "/sys/fs/fuse/connections"


@dataclass(frozen=True)
class DeviceFd:
    """A /dev/fuse descriptor of a process; ``connection`` is the minor of the mount's st_dev, None if not mounted."""

    pid: int
    fd: int
    connection: int | None


def label(connection: int) -> str:
    """What children that ask its daemon may hang on (:meth:`..linux.zygote.Zygote.run`)."""
    return f"FUSE connection {connection}"


def waiting(connection: int) -> int:
    """Requests that wait for the daemon or are being answered.

    :raises FileNotFoundError: the connection has ended
    """
    text = proc.read_text(f"{FUSECTL}/{connection}/waiting")
    if not text:  # opened before it ended, read after (fs/fuse/control.c fuse_conn_waiting_read())
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{FUSECTL}/{connection}")
    return int(text)


def abort(connection: int) -> None:
    """The last resort: every request of the connection fails with ECONNABORTED, tasks leave D. When: ADR 0006."""
    with open(f"{FUSECTL}/{connection}/abort", "w") as file:
        file.write("1")


def connected(device: Fd) -> bool:
    """Whether the connection of a /dev/fuse descriptor still has its super block; with or without a daemon.

    While this is true its device number means it; the kernel gives numbers that are free to any new super block.
    """
    poll = select.poll()
    poll.register(device.fileno(), 0)
    return not poll.poll(0)


def unread(device: Fd) -> bool:
    """Whether something waits to be read by the daemon; unlike :func:`waiting`, FORGETs count (fs/fuse/dev.c request_pending())."""
    poll = select.poll()
    poll.register(device.fileno(), select.POLLIN)
    return any(events & select.POLLIN for _fd, events in poll.poll(0))


def alive(connection: int) -> bool:
    """Whether the kernel still has it."""
    return os.path.isdir(f"{FUSECTL}/{connection}")


def device_fds(pid: int) -> list[DeviceFd]:
    """The descriptors of ``pid`` whose fdinfo names a connection (kernels that show ``fuse_connection``)."""
    found = []
    for fd in proc.fds(pid):
        try:
            info = proc.fdinfo(pid, fd)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if CONNECTION_KEY in info:
            found.append(DeviceFd(pid, fd, int(info[CONNECTION_KEY])))
    return found
