# SPDX-License-Identifier: Apache-2.0
"""The target's gate when parts of what is decided fail."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from incus_fusecr.agent import gate as gates
from incus_fusecr.agent.gate import Expected, MigrationGate
from incus_fusecr.checkpoint.journal import Journal
from incus_fusecr.errors import FusecrError
from incus_fusecr.linux.pidfd import pidfd_open


class FullJournal(Journal):
    full = False

    def write(self, kind: str, name: str, entry: dict[str, Any]) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(kind, name, entry)


class Session:
    """A restored tree; its hand-over fails so many times."""

    def __init__(self, failures: int = 0) -> None:
        self.process = subprocess.Popen(["sleep", "600"])
        self.init = self.process.pid
        self.undo = ExitStack()
        self.initfd = self.undo.enter_context(pidfd_open(self.init))
        self.manifest = SimpleNamespace(migration="m1")
        self.name = "c1"
        self.failures = failures
        self.handed_over = self.dropped = 0

    def hand_over(self) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        self.handed_over += 1

    def drop(self) -> None:
        self.dropped += 1


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session()
    yield made
    made.process.kill()
    made.process.wait()
    made.undo.close()


@pytest.fixture
def gate(tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch) -> MigrationGate:
    monkeypatch.setattr(gates, "HAND_OVER_PAUSE", 0.0)
    monkeypatch.setattr(gates, "AGAIN_SECONDS", 3600.0)
    monkeypatch.setattr(gates, "KILL_SECONDS", 2.0)
    made = MigrationGate(None, FullJournal(str(tmp_path)), lambda e: changes.append(e.phase))  # type: ignore[arg-type]
    changes: list[str] = []
    made.changes = changes  # type: ignore[attr-defined]
    made.expect(Expected("m1", "default", "c1", 60.0))
    return made


def journal(gate: MigrationGate) -> FullJournal:
    found = gate._journal
    assert isinstance(found, FullJournal)
    return found


def journalled(gate: MigrationGate) -> list[str]:
    return [e["phase"] for e in journal(gate).entries(gates.KIND)]


def arrive(gate: MigrationGate, session: Session) -> None:
    gate.arrived(session)  # type: ignore[arg-type]


def test_go_that_is_not_journalled_did_not_happen(
    gate: MigrationGate, session: Session, expect_log: Callable[[str], None]
) -> None:
    expect_log("migration aborted: taken back")
    arrive(gate, session)
    journal(gate).full = True
    with pytest.raises(FusecrError, match="No space left"):
        gate.go("m1")
    assert journalled(gate) == ["prepared"] and not session.handed_over
    journal(gate).full = False
    assert gate.abort("m1", "taken back") is True
    assert session.dropped == 1 and session.process.wait(5) == -9


def test_go_finishes_and_never_reads_as_a_refusal(
    gate: MigrationGate, session: Session, expect_log: Callable[[str], None]
) -> None:
    for _ in range(gates.HAND_OVER_ATTEMPTS + 1):
        expect_log("letting it run")
    arrive(gate, session)
    session.failures = gates.HAND_OVER_ATTEMPTS + 1
    assert gate.go("m1").phase == "running"
    assert not session.handed_over and journalled(gate) == ["running"]
    # A second one does what the first could not.
    assert gate.go("m1").phase == "running"
    assert session.handed_over == 1
    gate.go("m1")
    assert session.handed_over == 1 and gate.abort("m1", "too late") is False
    assert gate.changes.count("running") == 3  # type: ignore[attr-defined]


def test_a_door_that_does_not_open_does_not_keep_it_from_running(
    gate: MigrationGate, session: Session, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("letting it run")
    arrive(gate, session)
    expected = gate.get("m1")
    assert expected is not None

    def fails() -> None:
        raise OSError(errno.ENOBUFS, "No buffer space available")

    monkeypatch.setattr(expected.fence, "open", fails)
    gate.go("m1")
    assert session.handed_over == 1


def test_an_arrival_that_is_not_journalled_does_not_stay(
    gate: MigrationGate, session: Session, expect_log: Callable[[str], None]
) -> None:
    expect_log("No space left")
    journal(gate).full = True
    arrive(gate, session)
    expected = gate.get("m1")
    assert expected is not None and expected.phase == "failed" and session.dropped == 1
    assert session.process.wait(5) == -9
    with pytest.raises(FusecrError, match="is failed"):
        gate.go("m1")


def test_abort_is_repeated_until_the_copy_is_dead(
    gate: MigrationGate, session: Session, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("migration aborted: why")
    arrive(gate, session)
    with monkeypatch.context() as patched:
        patched.setattr(gates, "wait_exit", lambda _pidfd, _seconds: False)
        patched.setattr(gates, "send_signal", lambda _pidfd, _signal: True)
        with pytest.raises(FusecrError, match="does not die"):
            gate.abort("m1", "why")
    assert journalled(gate) == ["aborted"] and not session.dropped
    with pytest.raises(FusecrError, match="is aborted"):
        gate.go("m1")
    assert gate.abort("m1", "again") is True
    assert session.dropped == 1 and session.process.wait(5) == -9


def test_an_abort_of_what_died_kills_no_other_process(
    gate: MigrationGate, session: Session, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("migration aborted")
    arrive(gate, session)
    session.process.kill()
    session.process.wait()
    session.init = os.getpid()  # its number is another process's now
    looked: list[int] = []
    monkeypatch.setattr(gates.scan, "payload_cgroup", looked.append)
    gate.abort("m1", "why")
    assert not looked and session.dropped == 1


def test_one_bad_entry_does_not_keep_the_others(
    gate: MigrationGate, session: Session, expect_log: Callable[[str], None]
) -> None:
    expect_log("gate m0 cannot be taken over; it is set aside")
    arrive(gate, session)
    journal(gate).write(gates.KIND, "m0", {"migration": "m0", "phase": "running", "fence": 3})
    (entry,) = (e for e in journal(gate).entries(gates.KIND) if e["name"] == "m1")
    journal(gate).write(gates.KIND, "m1", {**entry, "phase": "running"})
    again = MigrationGate(None, journal(gate), lambda _e: None)  # type: ignore[arg-type]
    assert again.recover([session]) == []  # type: ignore[list-item]
    assert session.handed_over == 1 and journalled(gate) == ["running"]
