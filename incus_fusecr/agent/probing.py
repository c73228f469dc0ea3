# SPDX-License-Identifier: Apache-2.0
"""INIT replies of running daemons, each learnt once, by a probe copy."""

from __future__ import annotations

import threading
import time

from ..checkpoint import inits
from ..checkpoint.journal import Journal
from ..errors import FusecrError
from ..fuse.initprobe import probe_init
from ..linux import proc

PROBE_SECONDS = 15.0
AT_ONCE = 4
# A daemon that cannot be probed is not asked again by each who wants to know.
FAILED_SECONDS = 5.0
MAX_FAILED = 1000


class InitProbes:
    """Callable: daemon pid -> raw reply."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._each: dict[int, threading.Lock] = {}
        self._failed: dict[tuple[int, int], tuple[float, FusecrError]] = {}
        self._at_once = threading.BoundedSemaphore(AT_ONCE)
        inits.forget_the_dead(journal)

    def __call__(self, daemon: int) -> bytes:
        """:raises FusecrError: it could not be learnt"""
        with self._lock:
            if len(self._each) > MAX_FAILED:
                self._each = {pid: lock for pid, lock in self._each.items() if lock.locked()}
            mine = self._each.setdefault(daemon, threading.Lock())
        with mine:
            known = inits.recall(self._journal, daemon)
            if known is None:
                inits.forget_the_dead(self._journal)
                known = self._probe(daemon)
                inits.remember(self._journal, daemon, known)
            return known

    def _probe(self, daemon: int) -> bytes:
        try:
            who = (daemon, proc.start_time(daemon))
        except (FileNotFoundError, ProcessLookupError):
            who = (daemon, 0)
        when, error = self._failed.get(who, (-FAILED_SECONDS, None))
        if error is not None and time.monotonic() - when < FAILED_SECONDS:
            raise error
        try:
            with self._at_once:
                return probe_init(daemon, deadline=PROBE_SECONDS).raw
        except FusecrError as failure:
            with self._lock:
                self._failed[who] = (time.monotonic(), failure)
                while len(self._failed) > MAX_FAILED:
                    self._failed.pop(next(iter(self._failed)))
            raise
