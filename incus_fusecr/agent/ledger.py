# SPDX-License-Identifier: Apache-2.0
"""What became of each migration whose target this host was, kept when everything else of it is gone.

A source in doubt may ask after hours, when the target was renamed, deleted, or has moved on, and after this host was
started anew. That nothing is there any more says nothing: only a record does. So there is one from ``expect`` on, before
anything could be let run; it is decided once, on disk before the deed, and an undecided one is decided by who asks.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..checkpoint.journal import Journal
from ..errors import FusecrError, Refused
from .gate import KIND as GATE

log = logging.getLogger(__name__)

STATE = "/var/lib/incus-fusecr"
RUNNING = "running"
ABORTED = "aborted"
DECISION_OF_PHASE = {"running": RUNNING, "aborted": ABORTED, "failed": ABORTED}
# Whoever may migrate into one project displaces none but its records.
MAX_PER_PROJECT = 1000
KEEP_SECONDS = 90 * 86400.0


@dataclass
class Record:
    """One migration.

    :ivar decision: ``running``, ``aborted``, or empty: neither yet
    :ivar time: of the last change, ``time.time()``
    """

    migration: str
    project: str
    instance: str
    decision: str = ""
    time: float = 0.0


class Ledger:
    """All records of this host.

    :param live: whether a migration is under way; such a record is not displaced
    """

    def __init__(self, directory: str = f"{STATE}/decisions", live: Callable[[str], bool] = lambda _migration: False) -> None:
        self._directory = directory
        self._live = live
        self._lock = threading.Lock()
        self._all: dict[str, Record] = {}
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._load()

    def get(self, migration: str) -> Record | None:
        with self._lock:
            return self._all.get(migration)

    def place_of(self, migration: str) -> tuple[str, str] | None:
        """(project, instance) of one that is known."""
        found = self.get(migration)
        return (found.project, found.instance) if found else None

    def open(self, migration: str, project: str, instance: str) -> None:
        """It is expected: from now on it may be let run.

        :raises Refused: it is decided already, or is another instance's
        :raises OSError: it could not be kept
        """
        with self._lock:
            known = self._all.get(migration)
            if known is not None and (known.decision or (known.project, known.instance) != (project, instance)):
                raise Refused(f"migration {migration} to {instance}", f"it is {known.decision or 'expected elsewhere'}")
            if known is None:
                self._keep(Record(migration, project, instance))
        self._trim(project)

    def decide(self, migration: str, decision: str) -> str:
        """``running`` or ``aborted``; the first one counts.

        :returns: what counts
        :raises FusecrError: there is no record of it
        :raises OSError: it could not be kept, so it must not be acted upon
        """
        with self._lock:
            known = self._all.get(migration)
            if known is None:
                raise FusecrError(f"migration {migration}", "nothing is known of it here")
            if not known.decision:
                self._keep(Record(migration, known.project, known.instance, decision))
            return self._all[migration].decision

    def _keep(self, record: Record) -> None:
        record.time = time.time()
        path = os.path.join(self._directory, f"{record.migration}.json")
        with open(path + ".new", "w") as file:
            json.dump(asdict(record), file)
            file.flush()
            if record.decision:
                os.fsync(file.fileno())
        os.rename(path + ".new", path)
        self._all[record.migration] = record

    def _drop(self, migration: str) -> None:
        self._all.pop(migration, None)
        try:
            os.unlink(os.path.join(self._directory, f"{migration}.json"))
        except FileNotFoundError:
            pass

    def _trim(self, project: str) -> None:
        with self._lock:
            same = [r for r in self._all.values() if r.project == project]
        over = len(same) - MAX_PER_PROJECT
        if over > 0:
            # Those that were let run last: a source that is told nothing waits, one that was told wrong would run twice.
            same.sort(key=lambda r: (r.decision == RUNNING, r.time))
            victims = [r.migration for r in same if not self._live(r.migration)][:over]
            with self._lock:
                for migration in victims:
                    self._drop(migration)

    def _load(self) -> None:
        for name in sorted(os.listdir(self._directory)):
            path = os.path.join(self._directory, name)
            try:
                with open(path) as file:
                    record = Record(**json.load(file))
            except (OSError, ValueError, TypeError) as error:
                log.warning("%s: %s", path, error)  # a write that the end of the machine cut off
                continue
            if time.time() - record.time > KEEP_SECONDS:
                self._drop(record.migration)
            else:
                self._all[record.migration] = record


class GateJournal(Journal):
    """The journal of the gate: each decision is in the ledger before it is in the journal, and so before it takes effect."""

    def __init__(self, journal: Journal, ledger: Ledger) -> None:
        self.directory = journal.directory
        self._count = journal._count  # of one directory: no name of a half-written entry is used twice
        self._ledger = ledger

    def write(self, kind: str, name: str, entry: dict[str, Any]) -> None:
        decision = DECISION_OF_PHASE.get(str(entry.get("phase"))) if kind == GATE else None
        if decision and self._ledger.get(name) is not None and self._ledger.decide(name, decision) != decision:
            raise FusecrError(f"migration {name}", "it was decided otherwise")
        super().write(kind, name, entry)
