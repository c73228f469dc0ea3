# SPDX-License-Identifier: Apache-2.0
"""From a line of mountinfo to a descriptor of exactly that mount, in a namespace whose root is not to be trusted.

The way is walked from mount to mount. At each the id is compared: what was moved, covered or replaced meanwhile is noticed
and never acted on. A file system that might not answer (a container's own FUSE daemon) is never asked.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection

from ..linux.fd import Fd
from ..linux.mount import Mount
from ..linux.mountapi import RESOLVE_CACHED, open_beneath
from ..linux.statx import mount_id
from .opener import Opener
from .plan import Device, View, device

# Their look-ups wait for nobody. Of all others only what is cached is taken.
LOCAL = frozenset(
    ("bcachefs", "bpf", "btrfs", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs", "erofs", "exfat")
    + ("ext2", "ext3", "ext4", "f2fs", "fusectl", "hugetlbfs", "iso9660", "mqueue", "proc", "pstore", "ramfs", "rootfs")
    + ("securityfs", "squashfs", "sysfs", "tmpfs", "tracefs", "vfat", "xfs", "zfs")
)
MOVED = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
TRIES = 5  # a cached walk is also refused when something was renamed or mounted meanwhile


class Changed(OSError):
    """The mount is not (any more) what its path leads to."""


class Paths:
    """Descriptors of the mounts of one namespace; to be used in a thread that is there, and closed soon.

    :param root: O_PATH descriptor of the namespace's root; owned from here on
    :param opener: for what has to be looked up in ``ours``, the connections that we answer for
    """

    def __init__(self, view: View, root: Fd, opener: Opener, ours: Collection[Device]) -> None:
        self._view, self._root, self._opener, self._ours = view, root, opener, ours
        self._bases: dict[int, Fd] = {}

    def open(self, mount: Mount) -> Fd:
        """O_PATH descriptor of the root of ``mount``, the topmost at its place; the caller closes it.

        :raises Changed: something else is there
        :raises OSError: EAGAIN if a foreign file system on the way would have to be asked
        """
        anchor = self._view.parent(mount)
        while anchor is not None and anchor.mountpoint == mount.mountpoint:
            anchor = self._view.parent(anchor)
        if anchor is None:
            raise Changed(errno.ESTALE, "nothing it could hang on", mount.mountpoint)
        relative = mount.mountpoint[len(anchor.mountpoint) :].strip("/")
        try:
            fd = self._walk(self._base(anchor), anchor, relative)
        except OSError as error:
            if error.errno in MOVED:
                raise Changed(errno.ESTALE, "its path is another one now", mount.mountpoint) from None
            raise
        try:
            if mount_id(fd.fileno()) != mount.id:
                raise Changed(errno.ESTALE, "another mount is there now", mount.mountpoint)
        except OSError:
            fd.close()
            raise
        return fd

    def _base(self, mount: Mount) -> Fd:
        found = self._bases.get(mount.id)
        if found is None:
            if mount.mountpoint == "/":
                found = self._root.dup()
                if mount_id(found.fileno()) != mount.id:
                    found.close()
                    raise Changed(errno.ESTALE, "another root is there now", "/")
            else:
                found = self.open(mount)
            self._bases[mount.id] = found
        return found

    def _walk(self, base: Fd, through: Mount, path: str) -> Fd:
        if through.fstype in LOCAL:
            return open_beneath(base, path)
        for _ in range(TRIES):
            try:
                return open_beneath(base, path, RESOLVE_CACHED)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise
        if device(through) in self._ours:
            (found,) = self._opener(base, [path])
            if isinstance(found, OSError):
                raise found
            return found
        raise OSError(errno.EAGAIN, f"{through.fstype} would have to be asked", os.path.join(through.mountpoint, path))

    def close(self) -> None:
        """A descriptor that stays open would keep an old connection for ever."""
        for fd in [self._root, *self._bases.values()]:
            fd.close()
        self._bases.clear()
