# SPDX-License-Identifier: Apache-2.0
"""A held dump when parts of what is decided fail: what is decided gets done, and nobody waits for ever."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from incus_fusecr.agent import hold as holding
from incus_fusecr.agent import takeover
from incus_fusecr.agent.hold import Hold
from incus_fusecr.checkpoint.cgroup import Cgroup
from incus_fusecr.checkpoint.dump import Dump, Tools
from incus_fusecr.checkpoint.journal import Journal
from incus_fusecr.errors import FusecrError
from incus_fusecr.linux.pidfd import pidfd_open


class FullJournal(Journal):
    """Its file system is full while ``full``."""

    full = False

    def write(self, kind: str, name: str, entry: dict[str, Any]) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(kind, name, entry)


class Setup:
    """A hold on a process that stands for the tree's init."""

    def __init__(self, tmp_path: Path) -> None:
        self.process = subprocess.Popen(["sleep", "600"])
        self.journal = FullJournal(str(tmp_path / "journal"))
        self.tools = Tools(None, self.journal, None, lambda _pid: b"")  # type: ignore[arg-type]
        self.group = tmp_path / "lxc.payload.c1"
        self.group.mkdir()
        for name in ("cgroup.freeze", "cgroup.kill"):
            (self.group / name).write_text("-")
        self.released: list[str] = []
        self.hold = self.make(Dump(self.tools, "c1", self.process.pid))
        self.hold.phase = "held"
        self.hold.write_journal()

    def make(self, dump: Dump) -> Hold:
        dump.initfd = pidfd_open(dump.init)
        dump.undo.callback(dump.initfd.close)
        cgroup = Cgroup(str(self.group)).identify()
        return Hold(self.tools, "c1", "m1", dump.init, dump, cgroup=cgroup, released=lambda h: self.released.append(h.phase))

    def journalled(self) -> str:
        (entry,) = self.journal.entries(holding.KIND)
        return str(entry["phase"])

    def wrote(self, name: str) -> str:
        return (self.group / name).read_text()


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    monkeypatch.setattr(holding, "AGAIN_SECONDS", 3600.0)
    monkeypatch.setattr(holding, "KILL_SECONDS", 0.2)
    monkeypatch.setattr(holding, "undo_network_lock", lambda _zygote, _init: None)
    made = Setup(tmp_path)
    yield made
    made.process.kill()
    made.process.wait()
    if made.hold.dump.initfd is not None:
        made.hold.dump.initfd.close()


def test_abort_frees_the_source_without_a_journal(setup: Setup, expect_log: Callable[[str], None]) -> None:
    expect_log("cannot be written: No space left on device.*the source goes on all the same")
    setup.journal.full = True
    setup.hold.abort()
    assert setup.hold.verdict.is_set() and not setup.hold.commit_wanted
    assert setup.wrote("cgroup.freeze").startswith("0") and setup.released == ["aborted"]


@pytest.mark.parametrize("phase", ["held", "going"])
def test_abort_gives_the_verdict_whatever_fails(
    setup: Setup, phase: str, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("letting it go on")
    expect_log("the source is aborted, and that failed")

    def fails(_zygote: object, _init: int) -> None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a table's name")

    monkeypatch.setattr(holding, "undo_network_lock", fails)
    opened: list[int] = []
    monkeypatch.setattr(setup.hold.fence, "open", open_door := lambda: opened.append(1))
    open_door.__name__ = "open"
    setup.hold.phase = phase
    with pytest.raises(FusecrError, match="tries again"):
        setup.hold.abort(even_going=True)
    assert setup.hold.verdict.is_set() and opened == [1]
    assert setup.wrote("cgroup.freeze").startswith("0")
    assert not setup.hold.ended.is_set() and setup.journalled() == "aborted"
    monkeypatch.setattr(holding, "undo_network_lock", lambda _zygote, _init: None)
    setup.hold.abort()
    assert setup.hold.ended.is_set() and setup.released == ["aborted"] and opened == [1]
    setup.hold.abort()
    assert setup.released == ["aborted"]


def test_going_is_journalled_or_not_gone(setup: Setup) -> None:
    setup.journal.full = True
    with pytest.raises(FusecrError, match="No space left"):
        setup.hold.going()
    assert setup.hold.phase == "held" == setup.journalled()
    setup.journal.full = False
    setup.hold.going()
    assert setup.journalled() == "going"
    with pytest.raises(FusecrError, match="is going"):
        setup.hold.abort()


def test_commit_of_a_held_source_is_journalled_or_not_done(setup: Setup) -> None:
    setup.journal.full = True
    with pytest.raises(FusecrError, match="No space left"):
        setup.hold.commit()
    assert setup.hold.phase == "held" and not setup.hold.verdict.is_set()
    assert setup.wrote("cgroup.kill") == "-"


def test_commit_is_done_again_until_the_source_is_dead(setup: Setup, expect_log: Callable[[str], None]) -> None:
    expect_log("killing what CRIU left")
    expect_log("the source is committed, and that failed")
    finished: list[int] = []
    setup.hold.dump.undo.callback(finished.append, 1)
    setup.hold.going()
    with pytest.raises(FusecrError, match="does not die"):
        setup.hold.commit()
    assert setup.wrote("cgroup.kill").startswith("1")
    # Nothing of a source that was committed may go on.
    assert not finished and not setup.released and setup.journalled() == "committed"
    setup.process.kill()
    setup.process.wait()
    setup.hold.commit()
    assert finished and setup.released == ["committed"] and not setup.journal.entries(holding.KIND)


def test_a_later_cgroup_of_the_same_name_is_not_touched(setup: Setup, tmp_path: Path) -> None:
    os.rename(setup.group, tmp_path / "former")
    setup.group.mkdir()
    (setup.group / "cgroup.freeze").write_text("-")
    setup.hold.abort()
    assert setup.wrote("cgroup.freeze") == "-" and setup.hold.ended.is_set()


@pytest.mark.parametrize("end", ["committed", "aborted"])
def test_a_pid_that_another_process_has_by_now_is_none_of_the_holds(
    setup: Setup, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Init was reaped, its number is this test's own process: neither its cgroup is killed nor its network touched."""
    touched: list[int] = []
    monkeypatch.setattr(holding, "undo_network_lock", lambda _zygote, init: touched.append(init))
    setup.process.kill()
    setup.process.wait()
    setup.hold.init = setup.hold.dump.init = os.getpid()
    setup.hold.commit() if end == "committed" else setup.hold.abort()
    assert setup.wrote("cgroup.kill") == "-" and not touched
    assert setup.hold.ended.is_set() and setup.released == [end]


def test_two_writers_of_one_entry_do_not_meet(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "j"))
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(200):
                journal.write("hold", "1", {"n": number, "long": "x" * 5000})
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(list((tmp_path / "j").iterdir())) == 1
    (entry,) = journal.entries("hold")
    assert entry["long"] == "x" * 5000


def taken_over(setup: Setup, **changes: Any) -> list[Hold]:
    entry = setup.journal.entries(holding.KIND)[-1]
    setup.journal.write(holding.KIND, entry["name"], {**entry, **changes})
    dump = Dump(setup.tools, "c1", setup.process.pid)
    dump.initfd = pidfd_open(dump.init)
    dump.undo.callback(dump.initfd.close)
    setup.hold.dump.undo.callback(dump.undo.close)
    return takeover.recover(setup.tools, [(dump, {})], lambda h: setup.released.append(h.phase))


@pytest.mark.parametrize(("phase", "end"), [("held", "aborted"), ("dumping", "aborted"), ("aborted", "aborted")])
def test_the_next_agent_does_what_was_decided(
    setup: Setup, phase: str, end: str, expect_log: Callable[[str], None]
) -> None:
    expect_log(f"took over a hold in phase {phase}")
    (hold,) = taken_over(setup, phase=phase)
    hold.settle()
    assert setup.released == [end] and setup.wrote("cgroup.freeze").startswith("0")
    setup.hold.dump.undo.close()


def test_an_entry_that_makes_no_hold_frees_its_source_and_no_other_is_lost(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("hold .* cannot be taken over; it is set aside")
    expect_log("took over a hold in phase held")
    expect_log("its network devices may be shut")
    monkeypatch.setattr("incus_fusecr.agent.takeover.scan.payload_cgroup", lambda _init: str(setup.group))
    (entry,) = setup.journal.entries(holding.KIND)
    # Read before the good one.
    setup.journal.write(holding.KIND, "0", {**entry, "fence": {"veth1": "nonsense"}, "target": None})
    found = taken_over(setup)
    assert len(found) == 1
    assert setup.wrote("cgroup.freeze").startswith("0")
    assert [e["name"] for e in setup.journal.entries(holding.KIND)] == [str(setup.process.pid)]
    setup.hold.dump.undo.close()


def test_a_bad_entry_whose_target_may_run_keeps_its_source_frozen(
    setup: Setup, expect_log: Callable[[str], None]
) -> None:
    expect_log("its target may run: the source stays frozen")
    expect_log("is set aside")
    assert taken_over(setup, phase="going", fence=None) == []
    assert setup.wrote("cgroup.freeze") == "-"
    setup.hold.dump.undo.close()


def test_a_file_that_is_no_entry_is_set_aside(tmp_path: Path, expect_log: Callable[[str], None]) -> None:
    expect_log("cannot be read")
    expect_log("cannot be read")
    journal = Journal(str(tmp_path))
    journal.write("dump", "2", {"a": 1})
    (tmp_path / "dump-1.json").write_text('{"a":')
    (tmp_path / "dump-3.json").write_text("[]")
    (tmp_path / ".1-1.new").write_text("half")
    assert [e["a"] for e in journal.entries("dump")] == [1]
    assert [e["a"] for e in Journal(str(tmp_path)).entries("dump")] == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dump-1.json.bad", "dump-2.json", "dump-3.json.bad"]


