# SPDX-License-Identifier: Apache-2.0
"""Mounts whose root only seems to be deleted.

When a name is looked up anew after a death (FUSE_NOTIFY_INC_EPOCH, or a daemon that gives it another node id), the dentry
that a mount has as its root leaves the hash of names, and mountinfo says ``//deleted`` of a file that is there. st_nlink
tells: the kernel sets it to 0 when the file itself goes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Sequence
from dataclasses import replace

from ..linux.fd import Fd
from ..linux.mount import Mount
from ..linux.statx import links
from .namespaces import Traveller
from .paths import Paths
from .plan import DELETED, Device, View, device


def named(traveller: Traveller, view: View, ours: Collection[Device]) -> View:
    """``view`` with the real root of such mounts of ``ours``; in the namespace that the thread is in, asking no daemon."""
    doubtful = [m for m in view.by_id.values() if m.root.endswith(DELETED) and device(m) in ours]
    if not doubtful:
        return view
    real = {m.id: m.root.removesuffix(DELETED) for m in doubtful if covered(view, m, ours)}
    paths = Paths(view, traveller.root(), _nobody, ours)
    try:
        for mount in doubtful:
            if mount.id not in real and view.over(mount) is None and _linked(paths, mount):
                real[mount.id] = mount.root.removesuffix(DELETED)
    finally:
        paths.close()
    return View(replace(m, root=real[m.id]) if m.id in real else m for m in view.by_id.values())


def covered(view: View, mount: Mount, ours: Collection[Device]) -> bool:
    """Whether the same part of another connection of ours lies over it: it was put there for this one."""
    top = view.over(mount)
    return top is not None and device(top) not in (device(mount),) and top.root + DELETED == mount.root and device(top) in ours


def _linked(paths: Paths, mount: Mount) -> bool:
    try:
        with paths.open(mount) as root:
            return links(root.fileno()) > 0
    except OSError:
        return False


def _nobody(base: Fd, names: Sequence[str]) -> list[Fd | OSError]:
    return [OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), name) for name in names]
