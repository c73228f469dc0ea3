# SPDX-License-Identifier: Apache-2.0
"""All held dumps of this host: those that are being made, those that are there, and what became of the last ones."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..checkpoint.dump import Dump
from ..checkpoint.guarded import guarded
from ..checkpoint.journal import Journal
from ..errors import FusecrError
from .hold import Hold

log = logging.getLogger(__name__)

COMMITTED = "committed"
MAX_ENDED = 200
# For a CRIU that was just started to ask for its verdict.
KNOWN_SECONDS = 5.0

Outcome = tuple[str, dict[str, Any]]


class Holds:
    """Who holds what.

    :ivar by_criu: by CRIU's pid
    :ivar held: what the plugin server answers the plugin of their CRIU from, by init pid
    :ivar stopping: the agent ends: no further one begins, and those that are being made give up
    """

    def __init__(self, journal: Journal, held: dict[int, Dump]) -> None:
        self._journal = journal
        self.held = held
        self.by_criu: dict[int, Hold] = {}
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._starting: set[str] = set()
        self._ended: dict[str, Outcome] = {}

    def adopt(self, hold: Hold) -> None:
        """One that a former agent held."""
        self.by_criu[hold.criu] = hold
        self.held[hold.init] = hold.dump

    def all(self) -> list[Hold]:
        return list(self.by_criu.values())

    def on(self, init: int) -> Hold | None:
        return next((h for h in self.all() if h.init == init), None)

    def of(self, migration: str) -> Hold | None:
        return next((h for h in self.all() if h.migration == migration), None)

    def ended(self, migration: str) -> Outcome | None:
        """(phase, data) of one that is over."""
        return self._ended.get(migration)

    def has(self, migration: str) -> bool:
        """Whether a migration holds something here, or is about to, or has left something to do."""
        if self.of(migration) is not None or self.is_starting(migration):
            return True
        return self._journal.read(COMMITTED, migration) is not None

    @contextmanager
    def starting(self, migration: str, name: str) -> Iterator[None]:
        """While one is being made.

        :raises FusecrError: the agent ends
        """
        with self._lock:
            if self.stopping.is_set():
                raise FusecrError(f"hold of {name}", "the agent is being stopped", "try again when it runs")
            self._starting.add(migration)
        try:
            yield
        finally:
            with self._lock:
                self._starting.discard(migration)

    def is_starting(self, migration: str) -> bool:
        with self._lock:
            return migration in self._starting

    def released(self, hold: Hold) -> None:
        """One has ended."""
        if hold.phase == "committed":
            # Kept until the instance is gone: if the client dies first, this agent deletes it, as the client would have.
            entry = {"migration": hold.migration, "keep_source": hold.target.get("keep_source") == "True"}
            self._journal.write(COMMITTED, hold.migration, entry)
        with self._lock:
            self._ended[hold.migration] = (hold.phase, {})
            while len(self._ended) > MAX_ENDED:
                self._ended.pop(next(iter(self._ended)))
            self.by_criu.pop(hold.criu, None)
            self.held.pop(hold.init, None)

    def post_dump(self, criu: int) -> bool:
        """The action helper asks for the verdict on CRIU's dump; blocks until it is known."""
        deadline = time.monotonic() + KNOWN_SECONDS
        while time.monotonic() < deadline:
            hold = self.by_criu.get(criu)
            if hold is not None:
                return hold.wait_verdict()
            time.sleep(0.01)
        log.error("CRIU %d asks for a verdict on a dump that nobody holds: it goes on", criu)
        return False

    def close(self, seconds: float) -> bool:
        """The agent ends, perhaps for long: every source that may goes on. One that is ``going`` stays as it is, for only
        the next agent can find out from its target. The plugin's socket must be served meanwhile.

        :returns: whether all is done
        """
        with self._lock:
            self.stopping.set()
        end = time.monotonic() + seconds
        begun: dict[int, threading.Thread] = {}
        while True:
            open_ones = [h for h in self.all() if h.phase != "going"]
            for hold in open_ones:
                if hold.phase == "held" and hold.criu not in begun and not self.is_starting(hold.migration):
                    begun[hold.criu] = threading.Thread(
                        target=self._give_up, args=(hold,), daemon=True, name=f"stop-{hold.name}"
                    )
                    begun[hold.criu].start()
            with self._lock:
                starting = len(self._starting)
            if not open_ones and not starting:
                for thread in begun.values():
                    thread.join(max(0.0, end - time.monotonic()))
                return True
            if time.monotonic() > end:
                names = [h.name for h in open_ones]
                log.error("%d dumps are not over, nor these holds: %s; the next agent ends them", starting, names)
                return False
            time.sleep(0.01)

    @staticmethod
    def _give_up(hold: Hold) -> None:
        with guarded(log, hold.name):
            log.warning("%s: the agent is being stopped; the source goes on", hold.name)
            hold.abort()
            hold.tell(hold.phase)
