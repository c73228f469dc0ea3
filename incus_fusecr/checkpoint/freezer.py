# SPDX-License-Identifier: Apache-2.0
"""The freezer deadlock: a client waits in D for a daemon that is frozen already, so freezing never completes.

Incus freezes containers (before it copies files, and for ``incus pause``) without knowing about FUSE. The guard looks for
cgroups that somebody wants frozen and that do not get there: it thaws them, brings them to rest in the right order, freezes
again, and lets everything go on when they are thawed. What it stops is in the journal before, for the next agent.

A write to ``cgroup.freeze`` wakes it, by inotify(7); what it was not told of it sees a second later.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..fuse import connection
from ..linux import proc
from ..linux.inotify import IN_CREATE, IN_DELETE, IN_MODIFY, IN_ONLYDIR, Inotify
from ..linux.proc import read_text
from ..linux.zygote import Zygote
from . import peers, quiesce, scan
from .cgroup import PAYLOADS, Cgroup
from .guarded import guarded
from .journal import Journal
from .quiesce import Stopper

log = logging.getLogger(__name__)

KIND = "guard"
INTERVAL = 0.1  # seconds between looks while somebody freezes
IDLE = 1.0  # seconds between looks when nothing is known to happen
PATIENCE = 0.1
FREEZE_SECONDS = 5.0
# Each attempt lets the container run for up to FREEZE_SECONDS, though somebody wants it frozen.
ATTEMPTS = 3
RETRY_SECONDS = 1.0
LONGEST_PAUSE = 5.0
CLOSE_SECONDS = 20.0


@dataclass
class Freezing:
    """A cgroup that is wanted frozen, and is not.

    :ivar due: when it is looked at next (``time.monotonic()``)
    """

    due: float
    pause: float
    failures: int = 0


class Changes:
    """Waits until something may have happened to a container's freezer."""

    def __init__(self) -> None:
        self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._inotify: Inotify | None = None
        try:
            self._inotify = Inotify()
        except OSError as error:
            self._missing(error)

    @staticmethod
    def _missing(error: OSError) -> None:
        log.warning("freeze guard: %s: it looks ten times a second instead (raise fs.inotify.max_user_instances, _watches)", error)

    def watch(self, root: str, payloads: list[str]) -> None:
        """Be woken by what happens in ``root`` and to these cgroups in it, and no more to others."""
        if self._inotify is None:
            return
        files = {f"{path}/{name}" for path in payloads for name in ("cgroup.freeze", "cgroup.events")}
        for gone in set(self._inotify.watched) - files - {root}:
            self._inotify.forget(gone)
        try:
            self._inotify.watch(root, IN_CREATE | IN_DELETE | IN_ONLYDIR)
            for file in files:
                with suppress(FileNotFoundError):
                    self._inotify.watch(file, IN_MODIFY)
        except OSError as error:
            self._missing(error)
            self._inotify.close()
            self._inotify = None

    def wait(self, seconds: float) -> None:
        """Until something changes, :meth:`wake`, or so many seconds."""
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if self._inotify is not None:
            poll.register(self._inotify, select.POLLIN)
        poll.poll((seconds if self._inotify is not None else min(seconds, INTERVAL)) * 1e3)
        if self._inotify is not None:
            self._inotify.drain()

    def wake(self) -> None:
        """End the present :meth:`wait`, and all later ones."""
        os.eventfd_write(self._woken, 1)


@dataclass
class FreezeGuard:
    """Watches ``lxc.payload.*`` below ``root``; one thread."""

    zygote: Zygote
    journal: Journal
    root: str = PAYLOADS
    freezing: dict[str, Freezing] = field(default_factory=dict)
    held: dict[str, Stopper] = field(default_factory=dict)
    ended: threading.Event = field(default_factory=threading.Event)
    changes: Changes = field(default_factory=Changes)
    running: bool = False
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Until :meth:`close`."""
        self.running = True
        try:
            self.recover()
            while not self.ended.is_set():
                self.changes.wait(INTERVAL if self.freezing else IDLE)
                if not self.ended.is_set():
                    with guarded(log, "freeze guard"):
                        self.look()
        finally:
            for path in list(self.held):
                with guarded(log, f"freeze guard: {path}"):
                    self._release(path)
            self.over.set()

    def close(self) -> None:
        """Let go of what is stopped here, and end."""
        self.ended.set()
        self.changes.wake()
        if self.running and not self.over.wait(CLOSE_SECONDS):
            log.error("freeze guard: does not end")

    def recover(self) -> None:
        """Take over what a former agent's guard had stopped."""

        def take(entry: dict[str, Any]) -> None:
            stopper, path = Stopper(), str(entry["path"])
            stopper.adopt_marks((int(pid), int(start)) for pid, start in entry["stopped"])
            if entry["phase"] == "held":
                self.held[path] = stopper
                return
            # It died between its thaw and its freeze.
            stopper.resume()
            Cgroup(path).write("cgroup.freeze", "1")
            self.journal.remove(KIND, entry["name"])

        self.journal.each(KIND, take)

    def look(self) -> None:
        """One round over all containers; what fails with one is not the others' business."""
        payloads = [entry for entry in os.scandir(self.root) if entry.name.startswith("lxc.payload.")]
        self.changes.watch(self.root, [entry.path for entry in payloads])  # before they are looked at
        for entry in payloads:
            with guarded(log, f"freeze guard: {entry.name}"), suppress(FileNotFoundError):
                self._look_at(entry.path, entry.name)
        for path in [p for p in self.held if not os.path.isdir(p)]:
            self.held.pop(path).forget()
            self.journal.remove(KIND, os.path.basename(path))
        for path in [p for p in self.freezing if not os.path.isdir(p)]:
            del self.freezing[path]

    def _look_at(self, path: str, name: str) -> None:
        group = Cgroup(path)
        if not group.frozen_wanted:
            self.freezing.pop(path, None)
            if path in self.held:
                self._release(path)
                log.info("freeze guard: %s was thawed and goes on", name)
            if self._stuck(group):
                group.write_freeze(True)
                group.write_freeze(False)
                log.warning("freeze guard: %s stayed frozen after it was thawed", name)
            return
        if group.frozen or path in self.held:
            self.freezing.pop(path, None)
            return
        state = self.freezing.setdefault(path, Freezing(time.monotonic() + PATIENCE, PATIENCE))
        if state.failures >= ATTEMPTS or time.monotonic() < state.due:
            return
        try:
            self._free(group, name)
        except FileNotFoundError:
            raise
        except Exception as error:
            state.failures += 1
            state.pause = max(state.pause, RETRY_SECONDS)
            if state.failures < ATTEMPTS:
                raise
            # Whoever wants it frozen has it so, but for the tasks that cannot be.
            log.error("freeze guard: %s is left as it is, half frozen, after %d attempts: %s", name, ATTEMPTS, error)
        finally:
            state.due = time.monotonic() + state.pause
            state.pause = min(2 * state.pause, LONGEST_PAUSE)

    def _stuck(self, group: Cgroup) -> bool:
        """Thawed, with no process left, and still counted as frozen: Incus would wait for it for ever."""
        events = read_text(f"{group.path}/cgroup.events")
        return "frozen 1" in events and "populated 0" in events

    def _release(self, path: str) -> None:
        self.held.pop(path).resume()
        self.journal.remove(KIND, os.path.basename(path))

    def _free(self, group: Cgroup, name: str) -> None:
        pids = group.pids()
        if not pids:
            return
        began = time.monotonic()
        init = scan.init_of(pids)
        if init is None:
            return
        seen = scan.scan(self.zygote, init)
        served = seen.connections
        if not any(connection.alive(n) and connection.waiting(n) for n in served):
            return
        daemons = {pid for pids in served.values() for pid in pids}
        clients_of = {n: {r.pid for r in seen.refs if r.connection == n} for n in served}
        order = quiesce.stacking_order(served, clients_of)
        spared = (set(peers.helpers(self.zygote, daemons, group.pids())) - set().union(*clients_of.values())) | daemons
        already = {p.pid for p in seen.processes if set(p.states) <= proc.STOPPED_OR_GONE}

        def every() -> list[int]:
            return [p for p in group.pids() if p not in already]

        def note(marks: list[tuple[int, int]], phase: str = "stopping") -> None:
            self.journal.write(KIND, name, {"path": group.path, "phase": phase, "stopped": marks})

        stopper = Stopper(note)
        try:
            note([])
            group.write_freeze(False)
            deadline = time.monotonic() + FREEZE_SECONDS
            quiesce.stop_all(stopper, lambda: [p for p in every() if p not in spared], deadline)
            quiesce.stop_daemons(stopper, order, every, deadline)
            note(stopper.marks, "held")
        except BaseException:
            stopper.resume()
            group.write_freeze(True)
            self.journal.remove(KIND, name)
            raise
        group.write_freeze(True)
        self.held[group.path] = stopper
        done = group.wait_frozen(FREEZE_SECONDS)
        log.info(
            "freeze guard: %s hung while freezing; at rest and %s after %.1f ms",
            name,
            "frozen" if done else "NOT frozen",
            1e3 * (time.monotonic() - began),
        )
