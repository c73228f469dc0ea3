# SPDX-License-Identifier: Apache-2.0
"""The host's own mount of a protected daemon: looked at by level, as events come in any order.

``ExecStopPost=fusermount -u`` of a unit removes whatever is at the mountpoint, also a fresh mount that is already there.
"""

from __future__ import annotations

import enum
import errno
import os
from dataclasses import dataclass

from ..linux import mountapi
from ..linux.fd import Fd
from ..linux.mount import MS_SHARED, Mount, parse_mountinfo, raw_mountinfo
from ..linux.mountapi import RESOLVE_CACHED, open_beneath
from ..linux.statx import mount_id
from .namespaces import Traveller, each, open_proc
from .plan import Device, View, device
from .swap import Host
from .trees import ALL_ATTRS, Fresh, attrs

OPTIONS = "rw,nosuid,nodev,relatime"  # as fusermount3 mounts


class State(enum.Enum):
    """What is at the mountpoint."""

    PRESENT = "present"  # the wanted connection, on top
    ABSENT = "absent"  # nothing
    OTHER = "other"  # another FUSE connection: an old one, or one that somebody else started meanwhile
    FOREIGN = "foreign"  # a mount of another kind


@dataclass(frozen=True)
class HostMount:
    """:param device: of the topmost mount there; None if there is none"""

    state: State
    device: Device | None = None


def look(mountpoint: str, wanted: Device, pid: int | str = 1) -> HostMount:
    """What is mounted on ``mountpoint`` for process ``pid``; reads one mountinfo and asks no file system."""
    top = _topmost(seen(pid), mountpoint)
    if top is None:
        return HostMount(State.ABSENT)
    if device(top) == wanted:
        return HostMount(State.PRESENT, wanted)
    return HostMount(State.OTHER if top.is_fuse else State.FOREIGN, device(top))


_last: tuple[bytes, View] = (b"", View(()))


def seen(pid: int | str) -> View:
    """The mounts of a process. Parsed only if they have changed: hundreds of daemons look, one after another."""
    global _last
    raw, last = raw_mountinfo(pid), _last  # another thread may be here, too
    if raw != last[0]:
        _last = last = raw, View(parse_mountinfo(raw))
    return last[1]


def _topmost(view: View, mountpoint: str) -> Mount | None:
    there = [m for m in view.by_id.values() if m.mountpoint == mountpoint]
    return next((m for m in there if view.over(m) is None), None)


def buried(mountpoint: str, pid: int | str = 1) -> list[Device]:
    """Other FUSE connections that are mounted there, below what is on top.

    Who mounts in the moment between the look and the mount of :func:`attach` ends there.
    """
    view = seen(pid)
    top = _topmost(view, mountpoint)
    there = [m for m in view.by_id.values() if m.mountpoint == mountpoint]
    return [device(m) for m in there if m.is_fuse and top is not None and device(m) != device(top)]


def attach(fresh: Fresh, host: Host, options: str = OPTIONS) -> bool:
    """Mount ``fresh`` on the host's mountpoint if nothing is mounted there.

    :param options: per-mount options as in mountinfo
    :returns: False if something is mounted there by now: it is left alone
    :raises OSError: the mountpoint cannot be used; ELOOP if a symbolic link is in its path
    """
    result: list[bool] = []

    def work(traveller: Traveller, where: Host) -> None:
        traveller.go(fresh.namespace)
        # shared, as it was the template of the group that containers received from, see trees.py
        mountapi.mount_setattr(fresh.tree, propagation=MS_SHARED)
        with mountapi.open_tree(fresh.tree, mountapi.OPEN_TREE_CLONE) as copy:
            mountapi.mount_setattr(copy, attrs(options), ALL_ATTRS)
            traveller.go(where.namespace)
            with traveller.root() as root, _open(root, where.mountpoint) as place:
                view = View(traveller.mounts())
                top = _topmost(view, where.mountpoint)
                if top is not None or mount_id(place.fileno()) not in view.by_id:
                    result.append(False)
                    return
                mountapi.move_mount(copy, place)
        result.append(True)

    with open_proc() as proc:
        each([host], work, proc, 1)
    return result[0]


def _open(root: Fd, path: str) -> Fd:
    """Without asking where that can be avoided."""
    try:
        return open_beneath(root, path.lstrip("/"), RESOLVE_CACHED)
    except OSError as error:
        if error.errno != errno.EAGAIN:
            raise
    return open_beneath(root, os.path.normpath(path).lstrip("/"))
