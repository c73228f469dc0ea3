# SPDX-License-Identifier: Apache-2.0
"""Does the steps of a plan in one mount namespace.

All copies are made first, in the namespace of the tree; then one setns(2); then each step acts on a descriptor whose mount
id was compared, so that nothing that a container's root does meanwhile can lead it elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from ..linux import mountapi
from ..linux.fd import Fd
from ..linux.mount import Mount
from .namespaces import Traveller
from .opener import Opener, cached_first
from .paths import Changed, Paths
from .plan import Attach, Collect, Device, Leave, StackOnTop, Step, UmountOnly, View
from .trees import Trees, settle


@dataclass
class Tally:
    """What one thread did; added up at the end.

    :param seconds: spent in each phase, of this thread
    :param locked: ids of the mounts that turned out to be locked
    :param changed: steps that met something else than planned; taken up again when the namespace is read again
    """

    done: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    seconds: Counter[str] = field(default_factory=Counter)
    locked: set[int] = field(default_factory=set)
    changed: int = 0

    def add(self, other: Tally) -> None:
        self.done.update(other.done)
        self.left.update(other.left)
        self.errors += other.errors
        self.seconds.update(other.seconds)
        self.locked |= other.locked
        self.changed += other.changed

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of a block, in seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start  # type: ignore[assignment]


Before = Callable[[Step], None]


class Executor:
    """One namespace, one reading of its mountinfo, one thread.

    :param lock: the namespace belongs to a less privileged user namespace
    """

    def __init__(
        self,
        traveller: Traveller,
        namespace: Fd,
        view: View,
        trees: Trees,
        opener: Opener,
        ours: Collection[Device],
        tally: Tally,
        lock: bool = False,
    ) -> None:
        self._traveller, self._namespace, self._view = traveller, namespace, view
        self._trees, self._opener, self._ours, self._tally = trees, opener, ours, tally
        self._lock = lock

    def run(self, steps: Sequence[Step], detach: bool, before: Before | None = None) -> None:
        """Do the steps.

        :param detach: False to stop when the fresh mounts are below the old ones
        :param before: called before each step, in the thread; must not open files
        """
        self._tally.left.update(step.why for step in steps if isinstance(step, Leave) and not step.done)
        with contextlib.ExitStack() as undo:
            with self._tally.timed("clone"):
                copies = self._copies(steps, undo)
            self._traveller.go(self._namespace)
            paths = Paths(self._view, self._traveller.root(), self._opener, self._ours)
            undo.callback(paths.close)
            with self._tally.timed("swap"):
                for step in steps:
                    if isinstance(step, Attach) and not isinstance(step, Collect) and step.mount.id not in copies:
                        continue
                    try:
                        self._step(step, copies.get(step.mount.id), paths, detach, before)
                    except Changed:
                        self._tally.changed += 1
                    except OSError as error:
                        self._failed(step, error)

    def _copies(self, steps: Sequence[Step], undo: contextlib.ExitStack) -> dict[int, Fd]:
        found: dict[int, Fd] = {}
        for step in steps:
            if isinstance(step, Attach) and not isinstance(step, Collect):
                try:
                    found[step.mount.id] = undo.enter_context(self._trees.clone(self._traveller, step.mount, self._lock))
                except OSError as error:
                    self._failed(step, error)
        return found

    def _failed(self, step: Step, error: OSError) -> None:
        if error.errno == errno.EAGAIN and not isinstance(error, Changed):
            self._tally.left[error.strerror or "EAGAIN"] += 1
        else:
            self._tally.errors.append(f"{step.describe()}: {error.strerror}" + (f" ({error.filename})" if error.filename else ""))

    def _step(self, step: Step, copy: Fd | None, paths: Paths, detach: bool, before: Before | None) -> None:
        if isinstance(step, UmountOnly):
            if detach:
                with paths.open(step.mount) as target:
                    self._call(before, step)
                    self._detach(target, step)
        elif isinstance(step, Attach):
            with contextlib.ExitStack() as late:
                if isinstance(step, Collect) and step.top is not None:
                    self._call(before, step)
                    # Not another copy of the tree: what the old mount received from is gone, the one on top has its successor.
                    with paths.open(step.top) as top:
                        copy = late.enter_context(mountapi.open_tree(top, mountapi.OPEN_TREE_CLONE))
                        mountapi.detach(top)
                assert copy is not None
                children = self._carry(step.children, step.mount, copy, paths, late)
                with paths.open(step.mount) as target:
                    self._call(before, step)
                    if isinstance(step, StackOnTop):
                        self._attach(step, copy, target, children, 0)
                        self._tally.done["stacked"] += 1
                    else:
                        self._beneath(step, copy, target, children, detach, paths)

    def _beneath(
        self, step: Attach, copy: Fd, target: Fd, children: Sequence[tuple[Fd, Fd]], detach: bool, paths: Paths
    ) -> None:
        try:
            self._attach(step, copy, target, children, mountapi.MOVE_MOUNT_BENEATH)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
            with paths.open(step.mount) as still:  # neither covered nor gone: it is locked, or the kernel is before 6.5
                self._attach(step, copy, still, children, 0)
            self._tally.locked.add(step.mount.id)
            self._tally.done["stacked"] += 1
            return
        if detach:
            self._detach(target, step)

    def _attach(self, step: Attach, copy: Fd, target: Fd, children: Sequence[tuple[Fd, Fd]], flags: int) -> None:
        mountapi.move_mount(copy, target, flags)
        settle(copy, step.mount, step.shared_parent)
        for child, place in children:
            mountapi.move_mount(child, place)

    def _detach(self, target: Fd, step: Step) -> None:
        try:
            mountapi.detach(target)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._tally.locked.add(step.mount.id)
            self._tally.changed += 1
            return
        self._tally.done[{Collect: "collected", UmountOnly: "detached"}.get(type(step), "swapped")] += 1

    def _carry(
        self, children: Sequence[Mount], mount: Mount, copy: Fd, paths: Paths, undo: contextlib.ExitStack
    ) -> list[tuple[Fd, Fd]]:
        """Copies of the mounts on the old one go onto the detached copy: it is complete before anybody sees it.

        :returns: what could not be attached to a detached tree (before Linux 6.15), and where it belongs
        :raises OSError: one of them cannot be copied (it is unbindable, has locked mounts on it), or its place is not there
        """
        if not children:
            return []
        places = cached_first(self._opener, copy, [m.mountpoint[len(mount.mountpoint) :].strip("/") for m in children])
        for place in places:
            if isinstance(place, Fd):
                undo.enter_context(place)
        pairs = []
        for child, place in zip(children, places, strict=True):
            if isinstance(place, OSError):
                raise place
            with paths.open(child) as old:
                pairs.append((undo.enter_context(mountapi.open_tree(old, mountapi.OPEN_TREE_CLONE | mountapi.AT_RECURSIVE)), place))
        self._traveller.go(self._trees.fresh.namespace)
        try:
            while pairs:
                mountapi.move_mount(*pairs[0])
                pairs.pop(0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        finally:
            self._traveller.go(self._namespace)
        return pairs

    @staticmethod
    def _call(before: Before | None, step: Step) -> None:
        if before is not None:
            before(step)
