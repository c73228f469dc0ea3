# SPDX-License-Identifier: Apache-2.0
"""Copies of the fresh file system with the root, flags and propagation of the old mounts that they replace.

A detached tree can only be cloned in the mount namespace in which it was made (``seq_origin`` in fs/namespace.c), before
Linux 6.15 not at all: then :attr:`Fresh.tree` has to be attached there. So everything here happens in that namespace.

Peer groups: old mounts of one group become mounts of one new group, and what received from a group receives from the new
one. Each group that matters has a template, a detached member that is cloned. The template of the group of the host's own
mount is the tree itself, so that it lasts from one run to the next.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..linux import mountapi
from ..linux.fd import Fd
from ..linux.mount import MS_PRIVATE, MS_SHARED, MS_SLAVE, MS_UNBINDABLE, Mount
from .locked import ROOM, Locker
from .namespaces import Traveller
from .opener import Opener, cached_first
from .plan import DELETED, Device, peer_group

ATTR_OF_OPTION = {
    "ro": mountapi.MOUNT_ATTR_RDONLY,
    "nosuid": mountapi.MOUNT_ATTR_NOSUID,
    "nodev": mountapi.MOUNT_ATTR_NODEV,
    "noexec": mountapi.MOUNT_ATTR_NOEXEC,
    "noatime": mountapi.MOUNT_ATTR_NOATIME,
    "nodiratime": mountapi.MOUNT_ATTR_NODIRATIME,
    "nosymfollow": mountapi.MOUNT_ATTR_NOSYMFOLLOW,
}
ALL_ATTRS = sum(ATTR_OF_OPTION.values()) | mountapi.MOUNT_ATTR__ATIME
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


Recipe = tuple[str, str, int, int]  # root, options, peer group that it is in, and that it receives from


@dataclass(frozen=True)
class Fresh:
    """The fresh connection.

    :param tree: of its root: a detached clone, or an O_PATH descriptor of an attached mount (needed before Linux 6.15)
    :param namespace: the mount namespace in which ``tree`` was made or is attached
    :param device: of its super block
    """

    tree: Fd
    namespace: Fd
    device: Device


def attrs(options: str) -> int:
    """MOUNT_ATTR_* of the per-mount options of mountinfo."""
    words = options.split(",")
    found = sum(attr for option, attr in ATTR_OF_OPTION.items() if option in words)
    if not {"noatime", "relatime"} & set(words):
        found |= mountapi.MOUNT_ATTR_STRICTATIME  # the one that mountinfo shows by silence
    return found


class Trees:
    """Makes the copies. Thread-safe; :meth:`close` gives up all descriptors."""

    def __init__(self, fresh: Fresh, opener: Opener, locker: Locker) -> None:
        self.fresh = fresh
        self.missing: set[str] = set()
        self._opener, self._locker = opener, locker
        self._lock = threading.Lock()
        self._roots: dict[str, Fd | OSError] = {"/": fresh.tree}
        self._host_groups: frozenset[int] = frozenset()
        self._template_root: dict[int, str] = {}
        self._master_of: dict[int, int] = {}
        self._templates: dict[int, Fd] = {}
        self._prepared: dict[Recipe, Fd] = {}
        self._locked: dict[Recipe, tuple[Fd, Fd]] = {}
        self._members: dict[Recipe, Fd] = {}
        self._rooms: list[Fd] = []
        self._cannot_lock: OSError | None = None
        self._opened: dict[tuple[int, str], Fd] = {}

    def learn(self, mounts: Collection[Mount], host_groups: Iterable[int]) -> None:
        """Look at all old mounts of all namespaces, before the first is detached: a group dissolves with its last member.

        :param host_groups: the peer groups of the host's own mount. In this namespace of the tree if there are any.
        """
        roots = sorted({m.root for m in mounts if not m.root.endswith(DELETED)} - self._known() - self.missing)
        opened = cached_first(self._opener, self.fresh.tree, [root.lstrip("/") for root in roots])
        for root, fd in zip(roots, opened, strict=True):
            if isinstance(fd, OSError) and fd.errno in ABSENT:
                self.missing.add(root)
            else:
                self._roots[root] = fd
        members = Counter(peer_group(m) for m in mounts)
        followed = {peer_group(m, "master") for m in mounts}
        for mount in mounts:
            group = peer_group(mount)
            if group and (members[group] > 1 or group in followed):
                known = self._template_root.get(group, mount.root)
                self._template_root[group] = min(known, mount.root, key=len)
                self._master_of[group] = peer_group(mount, "master")
        self._host_groups |= {group for group in host_groups if group}

    def _known(self) -> set[str]:
        return {root for root, fd in self._roots.items() if isinstance(fd, Fd)}

    def share(self) -> None:
        """Make the tree itself the template of the host's groups. To be called in the tree's namespace."""
        if self._host_groups:
            mountapi.mount_setattr(self.fresh.tree, propagation=MS_SHARED)

    def lock(self, traveller: Traveller, mounts: Iterable[Mount]) -> None:
        """Make ready what :meth:`clone` gives for mounts in namespaces of less privileged users."""
        wanted = [recipe for recipe in dict.fromkeys(self._recipe(m) for m in mounts) if recipe not in self._locked]
        traveller.go(self.fresh.namespace)
        for start in range(0, len(wanted), ROOM):
            recipes, copies = [], []
            with contextlib.ExitStack() as undo:
                for recipe in wanted[start : start + ROOM]:
                    with contextlib.suppress(OSError):  # clone() says why
                        copies.append(undo.enter_context(self._prepare(*recipe)))
                        recipes.append(recipe)
                if not copies:
                    continue
                try:
                    namespace, places = self._locker(copies)
                except OSError as error:  # a mount whose flags can be taken away is worse than an old one
                    self._cannot_lock = error
                    return
            self._rooms.append(namespace)
            for recipe, place in zip(recipes, places, strict=True):
                self._locked[recipe] = namespace, place

    def clone(self, traveller: Traveller, mount: Mount, lock: bool = False) -> Fd:
        """A detached replacement.

        :param lock: with flags that cannot be taken away: for a namespace of a less privileged user namespace
        :raises OSError: why the root of the mount could not be opened in the fresh file system
        """
        recipe = self._recipe(mount)
        group = peer_group(mount)
        if lock and recipe not in self._locked:
            self._base(mount.root)
            raise self._cannot_lock or OSError(errno.EPERM, "its flags could not be locked", mount.mountpoint)
        namespace, source = self._locked[recipe] if lock else (self.fresh.namespace, self._prepared.get(recipe))
        traveller.go(namespace)
        if source is None or (lock and recipe[2]):
            with self._lock:
                source = self._make(recipe, source)
        try:
            copy = mountapi.open_tree(source, mountapi.OPEN_TREE_CLONE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            with self._lock:  # before Linux 6.15 what is detached cannot be cloned
                copy = self._prepare(*recipe)
        if group and not recipe[2]:  # a group of its own
            mountapi.mount_setattr(copy, propagation=MS_SHARED)
        return copy

    def _make(self, recipe: Recipe, locked: Fd | None) -> Fd:
        """What is cloned, made by the first thread that needs it."""
        known = self._prepared if locked is None else self._members
        if recipe not in known:
            known[recipe] = self._prepare(*recipe) if locked is None else mountapi.open_tree(locked, mountapi.OPEN_TREE_CLONE)
            if locked is not None:  # what came from a group into another user namespace only receives from it
                mountapi.mount_setattr(known[recipe], propagation=MS_SHARED)
        return known[recipe]

    def _recipe(self, mount: Mount) -> Recipe:
        group = peer_group(mount)
        joins = group in self._host_groups or group in self._template_root
        return mount.root, mount.options, group if joins else 0, peer_group(mount, "master")

    def _prepare(self, root: str, options: str, group: int, master: int) -> Fd:
        """One for all that are alike: hundreds of containers then cost one call each."""
        source = self._at(group, root)
        leader = None if source else self._at(master, root)
        try:
            copy = mountapi.open_tree(source or leader or self._base(root), mountapi.OPEN_TREE_CLONE)
        except OSError as error:
            if error.errno != errno.EINVAL or not (source or leader):
                raise
            source = leader = None  # before Linux 6.15: the peer group is lost
            copy = mountapi.open_tree(self._base(root), mountapi.OPEN_TREE_CLONE)
        try:
            mountapi.mount_setattr(copy, attrs(options), ALL_ATTRS, 0 if source else MS_SLAVE if leader else MS_PRIVATE)
        except OSError:
            copy.close()
            raise
        return copy

    def _base(self, root: str) -> Fd:
        found = self._roots.get(root) or OSError(errno.ENOENT, os.strerror(errno.ENOENT), root)
        if isinstance(found, OSError):
            raise found
        return found

    def _at(self, group: int, root: str) -> Fd | None:
        """``root`` in a member of the new group for ``group``; None if the group does not matter or does not reach there."""
        if group in self._host_groups:
            return self._base(root)
        if group not in self._template_root:
            return None
        key = group, root
        if key not in self._opened:
            template, top = self._template(group), self._template_root[group]
            if root == top:
                return template
            if not root.startswith(top.rstrip("/") + "/"):
                return None
            (found,) = cached_first(self._opener, template, [root[len(top) :].lstrip("/")])
            if isinstance(found, OSError):
                raise found
            self._opened[key] = found
        return self._opened[key]

    def _template(self, group: int) -> Fd:
        if group not in self._templates:
            root = self._template_root[group]
            leader = self._at(self._master_of[group], root)
            template = mountapi.open_tree(leader or self._base(root), mountapi.OPEN_TREE_CLONE)
            self._templates[group] = template
            mountapi.mount_setattr(template, propagation=MS_SLAVE if leader else MS_PRIVATE)
            mountapi.mount_setattr(template, propagation=MS_SHARED)
        return self._templates[group]

    def close(self) -> None:
        """Everything but the tree itself: a descriptor that is forgotten would keep the connection for ever."""
        kept = [*self._roots.values(), *self._templates.values(), *self._opened.values(), *self._prepared.values()]
        for fd in [*kept, *self._members.values(), *(place for _, place in self._locked.values()), *self._rooms]:
            if isinstance(fd, Fd) and fd is not self.fresh.tree:
                fd.close()


def settle(copy: Fd, mount: Mount, shared_parent: bool) -> None:
    """After it was attached: a shared parent makes it shared, and nothing unbindable can be attached to one."""
    if "unbindable" in mount.propagation:
        mountapi.mount_setattr(copy, propagation=MS_UNBINDABLE)
    elif shared_parent and not peer_group(mount):
        mountapi.mount_setattr(copy, propagation=MS_SLAVE if peer_group(mount, "master") else MS_PRIVATE)
