# SPDX-License-Identifier: Apache-2.0
"""A fresh daemon of a container mounts on the root of the dead one's mount, where it is in nobody's way.

What is mounted on a mount goes to all of its peers, and then there are more of them than before: after ten deaths a mount with
one peer would have been there a thousand times. So the dead one's mount leaves its peer group meanwhile. A detached copy of it
stays in the group, and tells it when it comes back. The fresh mount is taken off again: the swap puts it where it belongs.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from ..linux import mountapi
from ..linux.fd import Fd
from ..linux.mount import MS_PRIVATE, parse_mountinfo
from ..linux.ns import CLONE_NEWNS, setns
from ..linux.statx import device, mount_id
from ..linux.zygote import Zygote
from .plan import peer_group

SECONDS = 5.0


def peer(zygote: Zygote, namespace: Fd, mountpoint: str, connection: int) -> Fd | None:
    """A detached copy in the peer group of the mount that is topmost there; None if it has none.

    :raises JobError: another mount is there by now
    """
    _, fds = zygote.run(f"{__name__}:job_peer", _args(mountpoint, connection), [namespace.fileno()], deadline=SECONDS)
    return fds[0] if fds else None


def part(zygote: Zygote, namespace: Fd, mountpoint: str, connection: int) -> None:
    """That mount leaves its peer group. :raises JobError: another mount is there by now"""
    zygote.run(f"{__name__}:job_part", _args(mountpoint, connection), [namespace.fileno()], deadline=SECONDS)


def join(zygote: Zygote, namespace: Fd, mountpoint: str, connection: int, copy: Fd) -> None:
    """It comes back. :raises JobError: another mount is there by now"""
    zygote.run(f"{__name__}:job_join", _args(mountpoint, connection), [namespace.fileno(), copy.fileno()], deadline=SECONDS)


def uncover(zygote: Zygote, namespace: Fd, mountpoint: str, connection: int) -> Fd:
    """Take off what is topmost there. :returns: a detached copy of it. :raises JobError: another mount is there by now"""
    _, (tree,) = zygote.run(f"{__name__}:job_uncover", _args(mountpoint, connection), [namespace.fileno()], deadline=SECONDS)
    return tree


def _args(mountpoint: str, connection: int) -> dict[str, Any]:
    return {"mountpoint": mountpoint, "connection": connection}


def _open(args: dict[str, Any], fds: list[int]) -> tuple[Fd, Fd]:
    """(procfs of the host, O_PATH descriptor of the topmost mount's root), in the namespace of ``fds[0]``."""
    proc = Fd(os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), "/proc")
    setns(fds[0], CLONE_NEWNS)
    os.close(fds[0])
    place = str(args["mountpoint"])
    found = Fd(os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC), place)
    if device(found.fileno()) != (0, int(args["connection"])):
        raise OSError(errno.EAGAIN, "another mount has come meanwhile", place)
    return proc, found


def job_peer(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """The job."""
    proc, place = _open(args, fds)
    with open("self/mountinfo", "rb", opener=lambda path, flags: os.open(path, flags, dir_fd=proc.fileno())) as file:
        mounts = {mount.id: mount for mount in parse_mountinfo(file.read())}
    if not peer_group(mounts.get(mount_id(place.fileno()))):
        return None, []
    return None, [mountapi.open_tree(place, mountapi.OPEN_TREE_CLONE).release()]


def job_part(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """The job."""
    mountapi.mount_setattr(_open(args, fds)[1], propagation=MS_PRIVATE)
    return None, []


def job_join(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """The job; ``fds[1]`` is the copy."""
    _, place = _open(args, fds)
    mountapi.mount_setattr(place, propagation=MS_PRIVATE)  # what is shared anew by itself cannot join
    mountapi.move_mount(Fd(fds[1], "copy"), place, mountapi.MOVE_MOUNT_SET_GROUP)
    return None, []


def job_uncover(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """The job."""
    proc, place = _open(args, fds)
    tree = mountapi.open_tree(place, mountapi.OPEN_TREE_CLONE)
    os.fchdir(proc.fileno())
    mountapi.detach(place)
    return None, [tree.release()]
