# SPDX-License-Identifier: Apache-2.0
"""What the agent does by itself: leases that end, sources in doubt, and what dead clients leave behind."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ..checkpoint.guarded import guarded
from ..checkpoint.journal import Journal
from ..errors import FusecrError
from ..incus.config import Config
from .bindings import ASKED, Binding, Bindings
from .gate import KIND as GATE
from .gate import MigrationGate
from .hold import Hold
from .holds import COMMITTED, Holds
from .resolve import ask_target

log = logging.getLogger(__name__)

LEASE_SECONDS = 10.0
IDLE_SECONDS = 15.0
TICK = 0.5
RETRY_SECONDS = 10.0
ASK_AGAIN_SECONDS = 1.0


class Upkeep:
    """Two threads: one watches leases, one cleans up, which may take its time.

    :param load: reads the remotes of this host, which an administrator may add at any time
    """

    def __init__(
        self,
        holds: Holds,
        gate: MigrationGate,
        bindings: Bindings,
        journal: Journal,
        stopping: threading.Event,
        load: Callable[[], Config],
    ) -> None:
        self.holds = holds
        self.gate = gate
        self.bindings = bindings
        self.journal = journal
        self.stopping = stopping
        self._load = load
        self._began = time.monotonic()
        self._threads: dict[str, threading.Thread] = {}
        self._retry: dict[str, tuple[float, float]] = {}

    def watch(self) -> None:
        """Thread: leases. It only looks; what has to be done, and may take its time, is done in a thread for each."""
        while not self.stopping.wait(TICK):
            with guarded(log, "leases"):
                now = time.monotonic()
                for hold in self.holds.all():
                    if now - max(self.bindings.last(hold.migration) or 0.0, hold.began) > LEASE_SECONDS:
                        self._apart(f"lease-{hold.name}", lambda hold=hold: self._lapsed(hold))  # type: ignore[misc]
                for expected in self.gate.overdue(now, lambda e: self.bindings.last(e.migration) or 0.0):
                    who = expected.migration
                    self._apart(f"lease-{who}", lambda who=who: self.gate.abort(who, "no sign of the client"))  # type: ignore[misc]

    def _apart(self, name: str, do: Callable[[], object]) -> None:
        """In a thread of its own, one at a time for each name."""

        def run() -> None:
            with guarded(log, name):
                do()

        running = self._threads.get(name)
        if running is None or not running.is_alive():
            self._threads = {n: t for n, t in self._threads.items() if t.is_alive()}
            self._threads[name] = threading.Thread(target=run, daemon=True, name=name)
            self._threads[name].start()

    def tidy(self) -> None:
        """Thread: what is left over."""
        while not self.stopping.wait(TICK):
            with guarded(log, "journal"):
                for entry in self.journal.entries(COMMITTED):
                    with guarded(log, str(entry["name"])):
                        self._forget_committed(str(entry["migration"]))
                for entry in self.journal.entries(GATE):
                    with guarded(log, str(entry["name"])):
                        self._forget_expected(str(entry["migration"]))
            idle = self.bindings.idle(IDLE_SECONDS)
            self._retry = {b.migration: self._retry[b.migration] for b in idle if b.migration in self._retry}
            for binding in idle:
                due, pause = self._retry.get(binding.migration, (0.0, TICK))
                if time.monotonic() >= due:
                    # Doubled until it is done, so that one that cannot be cleaned does not keep Incus busy.
                    self._retry[binding.migration] = (time.monotonic() + pause, min(2 * pause, RETRY_SECONDS))
                    with guarded(log, binding.instance):
                        self._clean(binding)

    def _lapsed(self, hold: Hold) -> None:
        """The client of a hold has not been heard of for longer than its lease."""
        if hold.phase == "held" and not self._source_busy(hold):
            log.warning("%s: the client of migration %s is gone; the source goes on", hold.name, hold.migration)
            hold.abort()
        elif hold.phase == "going" and not hold.resolving:
            self.resolve_later(hold)

    def _source_busy(self, hold: Hold) -> bool:
        """While a pass runs the client's keys may be late; that it runs is a sign of life."""
        here = Binding(
            hold.migration, "source", hold.target.get("project_here", "default"), hold.target.get("instance_here", "")
        )
        try:
            return self.bindings.busy(here)
        except FusecrError as error:
            log.warning("operations of %s: %s", hold.name, error)
            return False

    def _forget_committed(self, migration: str) -> None:
        """A committed source whose instance is gone needs no entry; the events tell this agent that it is.

        One that runs again has to stop.
        """
        binding = self.bindings.get(migration)
        if binding is None and time.monotonic() - self._began < IDLE_SECONDS:
            return  # this agent has just begun: the instances have not been listed yet
        if binding is None or not self.bindings.exists(binding):
            self.journal.remove(COMMITTED, migration)
            self.bindings.forget(migration)
        else:
            self.bindings.end_second_life(binding)

    def _forget_expected(self, migration: str) -> None:
        """One that is over, whose client had taken its keys away before this agent began: no binding will end it."""
        expected = self.gate.get(migration)
        if time.monotonic() - self._began < IDLE_SECONDS or self.bindings.get(migration) is not None:
            return
        if expected is None or not expected.live:
            self.gate.forget(migration)

    def _clean(self, binding: Binding) -> None:
        """A client has gone: nothing of its migration stays here, but a container that was let run."""
        if self.bindings.contended(binding, IDLE_SECONDS) or self.bindings.busy(binding):
            return
        if time.monotonic() - binding.touched < IDLE_SECONDS:
            return
        if binding.role == ASKED:
            self.bindings.take_question(binding)
            return
        if binding.role == "source":
            if self.holds.of(binding.migration) is None and not self.holds.is_starting(binding.migration):
                committed = self.journal.read(COMMITTED, binding.migration)
                self.bindings.clean(binding, delete=committed is not None and not committed["keep_source"])
                self.journal.remove(COMMITTED, binding.migration)
            return
        expected = self.gate.get(binding.migration)
        if expected is not None and expected.live and expected.phase != "expecting":
            return
        if expected is not None and time.monotonic() - binding.touched < expected.go_seconds:
            return  # its source is being dumped, which takes as long as it takes
        if expected is None:
            # Nothing is known of it (the agent was restarted): only what was never started may go.
            delete = self.bindings.never_started(binding)
        else:
            delete = self.gate.abort(binding.migration, "no sign of the client")
        self.bindings.clean(binding, delete=delete)

    def resolve_later(self, hold: Hold) -> None:
        """Ask the target of a source in doubt, in a thread of its own."""
        hold.resolving = True
        threading.Thread(target=self.resolve, args=(hold,), daemon=True, name=f"resolve-{hold.name}").start()

    def resolve(self, hold: Hold) -> None:
        """A source that was told that the target is about to go, and then nothing: ask the target, until it answers."""
        while hold.phase == "going" and not self.stopping.is_set():
            with guarded(log, hold.name):
                # Read each time: the missing remote is added while the source waits for it.
                decision = ask_target(self._load(), hold.target, hold.migration)
                if decision == "running":
                    log.warning("%s: the target runs; the source ends", hold.name)
                    hold.commit()
                elif decision == "aborted":
                    log.warning("%s: the target does not run; the source goes on", hold.name)
                    hold.abort(even_going=True)
            if hold.phase == "going":
                self.stopping.wait(ASK_AGAIN_SECONDS)
