# SPDX-License-Identifier: Apache-2.0
"""What has to happen to the mounts of one mount namespace so that they show a fresh connection: no system call here.

Nested mounts come first: an old mount with another one that is still to be swapped somewhere below it becomes a
:class:`Later`, and is taken up when the namespace is read again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..linux.mount import Mount

Device = tuple[int, int]  # major, minor: (0, N) for FUSE connection N

DELETED = "//deleted"  # what mountinfo shows behind the root of a mount whose file is gone


@dataclass(frozen=True)
class Step:
    """Something to do, or to leave, about one mount of an old connection."""

    mount: Mount

    @property
    def where(self) -> str:
        return f"{self.mount.mountpoint} (mount {self.mount.id} of {self.mount.major}:{self.mount.minor}, root {self.mount.root})"

    def describe(self) -> str:
        """One line, as --dry-run and the debug log show it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Attach(Step):
    """A step that attaches a fresh mount.

    :param children: foreign mounts on the old one, which have to be on the fresh one as well
    :param shared_parent: the kernel will make what is attached there shared
    """

    children: tuple[Mount, ...] = ()
    shared_parent: bool = False

    @property
    def _with(self) -> str:
        return f" with {len(self.children)} mounts that are on it" if self.children else ""


@dataclass(frozen=True)
class Beneath(Attach):
    """The fresh mount goes below the old one, which then is detached: at no moment is there none."""

    def describe(self) -> str:
        return f"swap {self.where}{self._with}"


@dataclass(frozen=True)
class StackOnTop(Attach):
    """The fresh mount goes on top: detaching the old one would spoil getcwd(3) of its users, or is refused."""

    why: str = ""

    def describe(self) -> str:
        return f"stack on {self.where}{self._with}: {self.why}"


@dataclass(frozen=True)
class UmountOnly(Step):
    """The fresh mount is below already: an earlier run was cut short, or mount propagation brought it."""

    shared_parent: bool = False

    def describe(self) -> str:
        return f"detach {self.where}: a fresh one is below"


@dataclass(frozen=True)
class Collect(Attach):
    """A fresh mount was stacked on top because of users that are gone: put things in order."""

    top: Mount | None = None

    def describe(self) -> str:
        return f"collect {self.where}: nobody uses it any more"


@dataclass(frozen=True)
class Later(Step):
    """Not before the one nested in it."""

    nested: Mount | None = None

    def describe(self) -> str:
        return f"later {self.where}: first {self.nested.mountpoint if self.nested else '?'}"


@dataclass(frozen=True)
class Leave(Step):
    """Nothing to do. ``done``: it is covered by a fresh mount, as it should be."""

    why: str = ""
    done: bool = False

    def describe(self) -> str:
        return f"leave {self.where}: {self.why}"


class View:
    """The mounts of one namespace as a tree.

    :param mounts: of its mountinfo, in any order; parents outside of it are fine
    """

    def __init__(self, mounts: Iterable[Mount]) -> None:
        self.by_id = {mount.id: mount for mount in mounts}
        self.on: dict[int, list[Mount]] = {}
        for mount in self.by_id.values():
            if mount.parent != mount.id:
                self.on.setdefault(mount.parent, []).append(mount)

    def parent(self, mount: Mount) -> Mount | None:
        return None if mount.parent == mount.id else self.by_id.get(mount.parent)

    def over(self, mount: Mount) -> Mount | None:
        """What is mounted on the root of a mount."""
        return next((m for m in self.on.get(mount.id, ()) if m.mountpoint == mount.mountpoint), None)

    def nested(self, mount: Mount) -> list[Mount]:
        """What is mounted directly on a mount, below its root."""
        return [m for m in self.on.get(mount.id, ()) if m.mountpoint != mount.mountpoint]

    def hidden(self, mount: Mount) -> Mount | None:
        """What lies over the way to a mount, so that no path leads to it."""
        anchor = self.parent(mount)
        while anchor is not None and anchor.mountpoint == mount.mountpoint:
            anchor = self.parent(anchor)
        if anchor is None:
            return None
        between = (m for m in self.nested(anchor) if mount.mountpoint.startswith(m.mountpoint + "/"))
        return self.over(anchor) or next(between, None) or self.hidden(anchor)

    def below(self, mount: Mount) -> list[Mount]:
        """Everything that hangs on a mount and would be detached with it."""
        found, todo = [], [mount.id]
        while todo:
            children = self.on.get(todo.pop(), [])
            found += children
            todo += [child.id for child in children]
        return found


def device(mount: Mount) -> Device:
    return mount.major, mount.minor


def peer_group(mount: Mount | None, kind: str = "shared") -> int:
    """The number behind ``shared`` or ``master`` of a mount's optional fields; 0 if there is none."""
    for word in mount.propagation if mount else ():
        name, _, number = word.partition(":")
        if name == kind:
            return int(number)
    return 0


def plan(
    view: View,
    old: Collection[Device],
    new: Device,
    *,
    busy: Collection[int] = (),
    locked: Collection[int] = (),
    missing: Collection[str] = (),
    collect: bool = False,
) -> list[Step]:
    """What to do about each mount of the old connections.

    :param old: devices whose mounts are to go; without ``new``
    :param new: device of the fresh connection
    :param busy: ids of the mounts that are some process's working directory or root
    :param locked: ids of the mounts that the kernel refuses to detach, or to go below of
    :param missing: roots that the fresh file system does not have
    :param collect: also take back what was stacked on top, where nobody needs it any more
    :returns: one step for each mount, the most deeply nested first
    """
    planner = _Planner(view, old, new, busy, locked, missing, collect)
    todo = [mount for mount in view.by_id.values() if device(mount) in old]
    todo.sort(key=lambda m: (-m.mountpoint.count("/"), m.mountpoint, m.id))
    steps = [planner.step(mount) for mount in todo]
    changing = {step.mount.id for step in steps if not isinstance(step, Leave)}
    result: list[Step] = []
    for step in steps:
        first = next((m for m in view.below(step.mount) if m.id in changing), None)
        result.append(step if first is None or isinstance(step, Leave) else Later(step.mount, first))
    return result


class _Planner:
    def __init__(
        self,
        view: View,
        old: Collection[Device],
        new: Device,
        busy: Collection[int],
        locked: Collection[int],
        missing: Collection[str],
        collect: bool,
    ) -> None:
        self.view, self.old, self.new = view, old, new
        self.busy, self.locked, self.missing, self.collect = busy, locked, missing, collect

    def step(self, mount: Mount) -> Step:
        top = self.view.over(mount)
        if top is not None:
            return self._covered(mount, top)
        reason = self._cannot(mount)
        if reason:
            return Leave(mount, reason)
        parent, children = self.view.parent(mount), tuple(self.view.nested(mount))
        shared = bool(peer_group(parent))
        if mount.id in self.locked:
            return StackOnTop(mount, children, shared, why="it is locked")
        if self._in_use(mount):
            return StackOnTop(mount, children, shared, why="it is somebody's working directory or root")
        if parent is not None and self._is_fresh_below(parent, mount, children):
            return UmountOnly(mount, shared)
        return Beneath(mount, children, shared)

    def _cannot(self, mount: Mount) -> str:
        if mount.root.endswith(DELETED) or mount.root in self.missing:
            return f"the fresh file system has no {mount.root}"
        if "idmapped" in mount.options.split(","):
            return "it is idmapped, and nothing tells with which user namespace"
        if self.view.parent(mount) is None:
            return "it is the root of its namespace"
        if (above := self.view.hidden(mount)) is not None:
            return f"a {above.fstype} hides it"
        return ""

    def _covered(self, mount: Mount, top: Mount) -> Step:
        if device(top) in self.old:
            return Leave(mount, f"covered by mount {top.id}, which is taken care of")
        if device(top) != self.new:
            return Leave(mount, f"covered by a foreign {top.fstype}")
        idle = not self._in_use(mount) and not self.view.below(top)
        if self.collect and idle and mount.id not in self.locked and not self._cannot(mount):
            return Collect(mount, (), bool(peer_group(self.view.parent(mount))), top)
        return Leave(mount, "covered by a fresh one", done=True)

    def _in_use(self, mount: Mount) -> bool:
        return mount.id in self.busy or any(m.id in self.busy for m in self.view.below(mount))

    def _is_fresh_below(self, parent: Mount, mount: Mount, children: tuple[Mount, ...]) -> bool:
        """The same part of the fresh file system, and nothing that is on the old mount is missing on it."""
        same = device(parent) == self.new and (parent.mountpoint, parent.root) == (mount.mountpoint, mount.root)
        return same and {m.mountpoint for m in children} <= {m.mountpoint for m in self.view.nested(parent)}
