# SPDX-License-Identifier: Apache-2.0
"""Every mount of old FUSE connections, in every mount namespace of the host, becomes one of the fresh connection.

It can be repeated at any time, by whoever comes after a process that was killed in the middle: what is done is seen from
mountinfo alone. Order: the fresh mount goes below the host's own old one, so that others can receive from it; then all
other namespaces, in threads; the host's old mount is detached last, as long as it is there it tells which mounts received
from it. Then everything is read again until nothing is left.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ..fuse.connection import connected
from ..linux.fd import Fd
from ..linux.mount import Mount
from .execute import Before, Executor, Tally
from .families import Visit, families
from .locked import Locker, owner
from .namespaces import Namespace, Traveller, discover, each, number_of, open_proc, relevant
from .opener import Opener
from .plan import Device, Leave, Step, View, device, peer_group, plan
from .trees import Fresh, Trees
from .unhashed import named

log = logging.getLogger(__name__)

THREADS = 16  # at most; one works as long as nothing holds it up
PASSES = 8

Record = Callable[[Device, dict[int, str]], None]
Known = tuple[int, int, Device, str]  # mount namespace, mount id, device, mountpoint: the kernel uses each of them again


@dataclass(frozen=True)
class Host:
    """Where the daemon's own mount belongs.

    :param namespace: the host's mount namespace
    :param mountpoint: in it
    """

    namespace: Fd
    mountpoint: str


@dataclass
class Report:
    """What a swap did.

    :param namespaces: how many had a mount of an old connection
    :param passes: how often all was read; the last one found nothing to do, unless ``finished`` is False
    :param done: ``swapped``, ``stacked``, ``detached`` (a fresh one was below), ``collected``
    :param left: reasons why mounts stay as they are, and how many; of the last pass
    :param errors: one line each, of the last pass
    :param changed: steps that met something else than what was read; the next pass saw to it
    :param remaining: mounts of old connections that are still there, stacked ones included
    :param seconds: wall time of the whole and of ``scan``; ``clone``, ``swap``, ``plan`` are the sum of all threads
    """

    namespaces: int = 0
    passes: int = 0
    finished: bool = False
    done: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    changed: int = 0
    remaining: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Swapper:
    """Keeps what is learnt from one swap to the next: which mounts are locked.

    :param opener: for look-ups that the fresh daemon (or who serves the old connection) has to answer
    :param locker: for copies that go to less privileged user namespaces
    :param record: called with an old device and ``{mount id: root}`` before any of these mounts is detached
    :param before: called before each step (tests)
    """

    def __init__(
        self, opener: Opener, locker: Locker, record: Record | None = None, threads: int = THREADS, before: Before | None = None
    ) -> None:
        self._opener, self._locker, self._record = opener, locker, record
        self._threads, self._before = threads, before
        self._locked: set[Known] = set()

    def plan(self, old: Mapping[Device, Fd], new: Device, *, collect: bool = False) -> list[tuple[int, Step]]:
        """What :meth:`swap` would do now: (number of a mount namespace, step). Roots that are missing are not known here."""
        with open_proc() as proc:
            visits = self._scan(proc, old, new, Tally())
            try:
                return [(v.namespace.number, step) for v in visits for step in self._steps(proc, v, new, (), collect)]
            finally:
                for v in visits:
                    v.fd.close()

    def swap(self, old: Mapping[Device, Fd], fresh: Fresh, host: Host, *, collect: bool = False) -> Report:
        """Swap all mounts of ``old`` to ``fresh``.

        :param old: each with a /dev/fuse descriptor of its connection, and without ``fresh.device``. What was read of a
            namespace counts only if the connection is there after that: its number may be another file system's by now
        :param collect: also put in order what was stacked on top of mounts that nobody uses any more
        :returns: counts, reasons and errors; it is complete if ``finished`` and no ``errors``
        :raises TimeoutError: a thread hangs (see namespaces.each): what it holds stays open until this process ends
        :raises OSError: namespaces cannot be entered at all
        """
        run = _Run(self, old, fresh, host, collect)
        start = time.perf_counter()
        try:
            run.all()
        except TimeoutError:
            raise  # a thread still uses what close() would close
        except BaseException:
            run.close()
            raise
        run.close()
        run.report.seconds["total"] = time.perf_counter() - start
        return run.report

    # -- for _Run

    def _scan(self, proc: Fd, old: Mapping[Device, Fd], new: Device, tally: Tally) -> list[Visit]:
        found: list[Visit] = []
        with tally.timed("scan"):
            namespaces = discover(proc)

            def read(traveller: Traveller, namespace: Namespace) -> None:
                fd = namespace.open(proc)
                if fd is None:
                    return
                traveller.go(fd)
                visit = Visit(namespace, fd, *_read(traveller, old, new))
                if visit.old:
                    found.append(visit)
                else:
                    fd.close()

            each(list(namespaces.values()), read, proc, self._threads)
        self._locked &= {_known(visit, mount) for visit in found for mount in visit.old}
        return sorted(found, key=lambda v: v.namespace.number)

    def _steps(self, proc: Fd, visit: Visit, new: Device, missing: Collection[str], collect: bool) -> list[Step]:
        busy = visit.namespace.busy(proc)
        locked = {mount.id for mount in visit.old if _known(visit, mount) in self._locked}
        return plan(visit.view, visit.devices, new, busy=busy, locked=locked, missing=missing, collect=collect)


def _known(visit: Visit, mount: Mount) -> Known:
    return visit.namespace.number, mount.id, device(mount), mount.mountpoint


def _read(traveller: Traveller, old: Mapping[Device, Fd], new: Device) -> tuple[View, list[Mount]]:
    """Of the namespace that the thread is in."""
    mounts = relevant(traveller.mountinfo(), old)
    living = {which for which, fd in old.items() if connected(fd)} if mounts else set()
    view = named(traveller, View(mounts), {*living, new})
    return view, [m for m in view.by_id.values() if device(m) in living]


class _Run:
    """One call of :meth:`Swapper.swap`."""

    def __init__(self, swapper: Swapper, old: Mapping[Device, Fd], fresh: Fresh, host: Host, collect: bool) -> None:
        self.swapper, self.old, self.fresh, self.host, self.collect = swapper, old, fresh, host, collect
        self.report = Report()
        self.proc = open_proc()
        self.trees = Trees(fresh, swapper._opener, swapper._locker)
        self._host_number = number_of(host.namespace)
        self._owner = owner(fresh.namespace)
        self._lock = threading.Lock()
        self._tally = Tally()
        self._recorded: set[int] = set()
        self._seen: set[int] = set()

    def close(self) -> None:
        self.trees.close()
        self.proc.close()

    def all(self) -> None:
        report = self.report
        for _ in range(PASSES):
            report.passes += 1
            visits = self.swapper._scan(self.proc, self.old, self.fresh.device, self._tally)
            self._tally.left.clear()
            self._tally.errors.clear()
            before = self._tally.done.total()
            try:
                acted = self._pass(visits)
            finally:
                for visit in visits:
                    visit.fd.close()
            report.remaining = sum(len(visit.old) for visit in visits)
            if not acted:
                report.finished = True
                break
            if self._tally.done.total() == before and not self._tally.changed:
                break  # errors only: the same again would not help
            report.changed, self._tally.changed = report.changed + self._tally.changed, 0
        report.namespaces = len(self._seen)
        report.done, report.left = dict(self._tally.done), dict(self._tally.left)
        report.errors, report.seconds = list(self._tally.errors), {key: float(s) for key, s in self._tally.seconds.items()}

    def _pass(self, visits: list[Visit]) -> bool:
        """Returns whether there was something to do."""
        self._seen |= {visit.namespace.number for visit in visits}
        own = [v for v in visits if v.namespace.number == self._host_number]
        everyone = [m for v in visits for m in v.old]
        groups = {peer_group(m) for v in own for m in v.old if m.mountpoint == self.host.mountpoint}
        # A group that is received from has a member: if that is nowhere to be seen it is the tree of a mount that the host has
        # no more. Somebody unmounted it before us (ExecStopPost, a daemon that starts), or another's is there by now.
        groups |= {peer_group(m, "master") for m in everyone} - {peer_group(m) for m in everyone}
        self.trees.learn(everyone, groups)
        self._note(visits)
        related = families(visits, self._host_number)
        first = [family for family in related if any(v in own for v in family)]
        acted: list[bool] = []

        def work(traveller: Traveller, family: list[Visit], detach_host: bool = False) -> None:
            tally = Tally()
            for number, visit in enumerate(family):
                is_host = visit.namespace.number == self._host_number
                if number or detach_host:  # what was done in its relatives may have come here by propagation
                    self._read_again(traveller, visit)
                acted.append(self._visit(traveller, visit, tally, not is_host or detach_host))
            with self._lock:
                self._tally.add(tally)
                self.swapper._locked |= {_known(v, m) for v in family for m in v.old if m.id in tally.locked}

        def ready(traveller: Traveller, namespace: Fd) -> None:
            traveller.go(namespace)
            self.trees.share()
            lower = [m for v in visits if self._lower(v) for m in v.old]
            if lower:
                with self._tally.timed("lock"):
                    self.trees.lock(traveller, lower)

        each([self.fresh.namespace], ready, self.proc, 1)
        each(first, work, self.proc, 1)
        each([family for family in related if family not in first], work, self.proc, self.swapper._threads)
        each([own] if own else [], lambda traveller, family: work(traveller, family, True), self.proc, 1)
        return any(acted)

    def _lower(self, visit: Visit) -> bool:
        return owner(visit.fd) != self._owner

    def _visit(self, traveller: Traveller, visit: Visit, tally: Tally, detach: bool) -> bool:
        if not visit.old:
            return False
        with tally.timed("plan"):
            steps = self.swapper._steps(self.proc, visit, self.fresh.device, self.trees.missing, self.collect)
        if log.isEnabledFor(logging.DEBUG):
            for step in steps:
                log.debug("namespace %d: %s", visit.namespace.number, step.describe())
        ours = visit.devices | {self.fresh.device}
        executor = Executor(traveller, visit.fd, visit.view, self.trees, self.swapper._opener, ours, tally, self._lower(visit))
        executor.run(steps, detach, self.swapper._before)
        return any(not isinstance(step, Leave) for step in steps)

    def _read_again(self, traveller: Traveller, visit: Visit) -> None:
        traveller.go(visit.fd)
        visit.view, visit.old = _read(traveller, self.old, self.fresh.device)
        self._note([visit])

    def _note(self, visits: Iterable[Visit]) -> None:
        if self.swapper._record is None:
            return
        with self._lock:
            roots: dict[Device, dict[int, str]] = {}
            for mount in (m for visit in visits for m in visit.old if m.id not in self._recorded):
                roots.setdefault(device(mount), {})[mount.id] = mount.root
                self._recorded.add(mount.id)
            for which, found in roots.items():
                self.swapper._record(which, found)
