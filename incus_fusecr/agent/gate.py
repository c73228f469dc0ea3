# SPDX-License-Identifier: Apache-2.0
"""The target's side: a migrated container is restored and verified, and its first instruction waits for ``go``.

Here ``go`` and ``abort`` meet: the first one wins and is in the journal before it takes effect. What is decided and what is
done of it are two things: a call that finds the decision made does what is still missing.
Phases: ``expecting`` -> ``prepared`` -> ``running``, or ``aborted`` / ``failed``.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint import scan, sockets
from ..checkpoint.cgroup import Cgroup
from ..checkpoint.journal import RUN, Journal
from ..checkpoint.restore import Restore
from ..errors import FusecrError
from ..incus.names import lxc_name
from ..linux import proc
from ..linux.pidfd import send_signal, wait_exit
from ..linux.zygote import Zygote
from .announce import announce
from .network import Fence
from .plugin import Gate

log = logging.getLogger(__name__)

KIND = "gate"
KILL_SECONDS = 10.0
HAND_OVER_ATTEMPTS = 3
HAND_OVER_PAUSE = 0.3
AGAIN_SECONDS = 5.0


@dataclass
class Expected:
    """A migration that is expected here.

    :ivar phase: what is decided: in the journal first, then here
    :ivar done: what was decided is done, too; under the lock ``deed``
    :ivar marked: the instance itself says that it was let run
    :ivar source: liblxc's name of the container on its source, if the client said it
    """

    migration: str
    project: str
    instance: str
    go_seconds: float
    source: str = ""
    phase: str = "expecting"
    session: Restore | None = None
    init: int = 0
    fence: Fence = field(default_factory=Fence)
    error: FusecrError | None = None
    marked: bool = False
    prepared_at: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    deed: threading.Lock = field(default_factory=threading.Lock)
    done: bool = False

    @property
    def live(self) -> bool:
        """Whether it may yet become something, or its instance does not say yet what it has become."""
        return self.phase in ("expecting", "prepared") or (self.phase == "running" and not self.marked)


class MigrationGate(Gate):
    """All migrations that this host is the target of.

    :param changed: called, without the lock, after each change of phase
    """

    def __init__(self, zygote: Zygote, journal: Journal, changed: Callable[[Expected], None]) -> None:
        self._zygote = zygote
        self._journal = journal
        self._changed = changed
        self._lock = threading.RLock()
        self._expected: dict[str, Expected] = {}

    def expect(self, wanted: Expected) -> Expected:
        """Let a restore of this migration in; the same one again changes nothing. One instance is expected once: a new
        migration to it ends the waiting for another, whose client has died."""
        with self._lock:
            known = self._expected.setdefault(wanted.migration, wanted)
            here = (known.project, known.instance)
            others = [e for e in self._expected.values() if e is not known and (e.project, e.instance) == here]
            for other in others:
                if other.phase == "expecting":
                    self.abort(other.migration, f"migration {known.migration} takes its place")
            return known

    def get(self, migration: str) -> Expected | None:
        with self._lock:
            return self._expected.get(migration)

    def forget(self, migration: str) -> None:
        """It is over and reported."""
        with self._lock:
            self._expected.pop(migration, None)
        self._journal.remove(KIND, migration)

    # From the plugin server

    def enter(self, migration: str) -> tuple[str, bool]:
        with self._lock:
            expected = self._expected.get(migration)
            if expected is None or expected.phase != "expecting":
                state = "not expected on this host" if expected is None else expected.phase
                raise FusecrError("restore of a migrated container", f"migration {migration} is {state}")
        # Before CRIU does anything; when it does not run in the end, they are Incus' to remove.
        name = lxc_name(expected.project, expected.instance)
        expected.fence.plan_target(name)
        expected.fence.close()
        return name, bool(expected.source) and expected.source != name

    def verified(self, session: Restore) -> None:
        expected = self._of(session)
        expected.init = session.init
        expected.parts["restore"] = time.monotonic() - session.began

    def arrived(self, session: Restore) -> None:
        expected = self._of(session)
        with self._lock:
            gone = expected.phase != "expecting"
            if not gone:
                try:
                    self._decide(expected, "prepared")
                    expected.session = session
                    expected.prepared_at = time.monotonic()
                except FusecrError as error:
                    gone, expected.phase, expected.error = True, "failed", error
                    log.error("%s", error)
        if gone:
            self._end(session)
        self._changed(expected)

    def lost(self, session: Restore) -> None:
        expected = self._of(session)
        with self._lock:
            if expected.phase == "expecting":
                expected.phase = "failed"
                expected.error = FusecrError(
                    f"restore of {expected.instance}", "CRIU gave up", "see restore.log of the instance on the target"
                )
                try:
                    self._write(expected, "failed")
                except (OSError, FusecrError) as error:
                    log.error("%s: journal: %s", expected.instance, error)  # the next agent has never expected it
        self._changed(expected)

    def _of(self, session: Restore) -> Expected:
        expected = self.get(session.manifest.migration)
        if expected is None:
            raise FusecrError("restore of a migrated container", "its migration is no longer expected")
        return expected

    # From requests

    def go(self, migration: str) -> Expected:
        """The container starts to live here. Again: what is still to be done of it.

        From the moment that it is in the journal this does not fail: an error would read as a refusal.

        :raises FusecrError: it is not prepared (any more), or the journal cannot be written
        """
        expected = self.get(migration)
        if expected is None:
            raise FusecrError("go", f"migration {migration} is not known here")
        with self._lock:
            if expected.phase != "running":
                if expected.phase != "prepared" or expected.session is None:
                    raise FusecrError(f"go of {expected.instance}", f"it is {expected.phase}, not prepared")
                self._decide(expected, "running")
        try:
            with expected.deed:
                if not expected.done:
                    expected.done = expected.session is None or self._let_run(expected, expected.session)
                    expected.parts["gate"] = time.monotonic() - expected.prepared_at
                    if not expected.done:
                        self._later(lambda: self.go(migration))
        finally:
            self._changed(expected)
        return expected

    def _let_run(self, expected: Expected, session: Restore) -> bool:
        """Open the network, hand over. Nothing of it keeps the rest from being done.

        :returns: whether it runs now
        """

        def announced() -> None:
            announce(self._zygote, session.init, hosts)
            if session.wait_stopped():
                sockets.probe(self._zygote, session.init)

        hosts = list(expected.fence.doors)
        _attempt(expected, expected.fence.open)
        if hosts:
            _attempt(expected, announced)
        for _ in range(HAND_OVER_ATTEMPTS):
            if _attempt(expected, session.hand_over):
                return True
            if proc.dying(session.init):
                log.error("%s: died when it was let run", expected.instance)
                return True
            time.sleep(HAND_OVER_PAUSE)
        return False

    @staticmethod
    def _later(again: Callable[[], object]) -> None:
        timer = threading.Timer(AGAIN_SECONDS, again)
        timer.daemon = True
        timer.start()

    def abort(self, migration: str, why: str) -> bool:
        """It does not start to live here. Again: what is still to be done of it.

        :returns: False if it lives already
        :raises FusecrError: the journal cannot be written, so nothing is decided; or the restored copy does not die
        """
        expected = self.get(migration)
        if expected is None:
            return True
        with self._lock:
            if expected.phase == "running":
                return False
            if expected.phase != "aborted":
                self._decide(expected, "aborted")
                log.warning("%s: migration aborted: %s", expected.instance, why)
        with expected.deed:
            if not expected.done:
                if expected.session is not None:
                    self._end(expected.session)
                expected.done = True
        self._changed(expected)
        return True

    def overdue(self, now: float, last: Callable[[Expected], float]) -> list[Expected]:
        """Those that were prepared, and then heard nothing from their client for longer than they may wait.

        :param now: ``time.monotonic()``
        :param last: when the client of one was last heard of
        """
        with self._lock:
            return [
                e
                for e in self._expected.values()
                if e.phase == "prepared" and now - max(e.prepared_at, last(e)) > e.go_seconds
            ]

    def recover(self, sessions: list[Restore]) -> list[Restore]:
        """After a former agent's death: finish what was decided, wait for what was not.

        :returns: sessions that belong to no migration
        """
        by_migration = {s.manifest.migration: s for s in sessions if s.manifest.migration}

        def take(entry: dict[str, Any]) -> None:
            session = by_migration.get(entry["migration"])
            if session is None and entry["phase"] not in ("aborted", "failed", "running"):
                self._journal.remove(KIND, entry["migration"])
                return
            expected = Expected(
                entry["migration"],
                entry["project"],
                entry["instance"],
                entry["go_seconds"],
                phase=entry["phase"],
                session=session,
                init=session.init if session is not None else 0,
                fence=Fence.from_dict(entry["fence"]),
                prepared_at=time.monotonic(),
            )
            self._expected[expected.migration] = expected
            by_migration.pop(expected.migration, None)
            try:
                if expected.phase == "running":
                    self.go(expected.migration)
                elif expected.phase == "aborted":
                    self.abort(expected.migration, "decided before the agent's death")
            except FusecrError as error:
                log.error("%s: %s", expected.instance, error)

        self._journal.each(KIND, take)
        for session in by_migration.values():
            # Verified, but the agent died before CRIU let go: nobody was told that it is prepared.
            try:
                self._end(session)
            except FusecrError as error:
                log.error("%s: %s", session.name, error)
        return [s for s in sessions if not s.manifest.migration]

    def _decide(self, expected: Expected, phase: str) -> None:
        """:raises FusecrError: it is not in the journal, so it is not decided"""
        try:
            self._write(expected, phase)
        except OSError as error:
            raise FusecrError(
                f"journal of the migration of {expected.instance}", f"cannot be written: {error.strerror}", f"make room on {RUN}"
            ) from None
        expected.phase = phase

    def _write(self, expected: Expected, phase: str) -> None:
        self._journal.write(
            KIND,
            expected.migration,
            {
                "migration": expected.migration,
                "project": expected.project,
                "instance": expected.instance,
                "go_seconds": expected.go_seconds,
                "phase": phase,
                "fence": expected.fence.to_dict(),
            },
        )

    @staticmethod
    def _end(session: Restore) -> None:
        """Kill the restored tree, by its cgroup: its tasks are stopped and know no better. Then nothing of it stays.

        :raises FusecrError: it does not die
        """
        initfd = session.initfd
        if initfd is not None and not initfd.closed and not wait_exit(initfd, 0):
            path = scan.payload_cgroup(session.init) if not proc.dying(session.init) else None
            group = Cgroup(path).identify() if path is not None and os.path.isdir(path) else None
            # As long as this one lives its pid is no other's, and so was the path that was found by it.
            if not wait_exit(initfd, 0) and (group is None or not group.write("cgroup.kill", "1")):
                send_signal(initfd, signal.SIGKILL)
            if not wait_exit(initfd, KILL_SECONDS):
                raise FusecrError(f"aborted restore, pid {session.init}", "does not die", "look at its tasks' states")
        session.drop()


def _attempt(expected: Expected, step: Callable[[], object]) -> bool:
    try:
        step()
    except Exception:
        log.exception("%s: letting it run", expected.instance)
        return False
    return True
