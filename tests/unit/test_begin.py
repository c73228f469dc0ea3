# SPDX-License-Identifier: Apache-2.0
"""When a dump is tried again, and when not: each attempt keeps the container's clients still."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_decisions import mount, scan

from incus_fusecr.checkpoint import dump as dumping
from incus_fusecr.checkpoint import inits, quiesce
from incus_fusecr.checkpoint import restore as restoring
from incus_fusecr.checkpoint.dump import Dump, Tools
from incus_fusecr.checkpoint.journal import Journal
from incus_fusecr.checkpoint.knob import Knob
from incus_fusecr.checkpoint.quiesce import NotQuiet, Stopper
from incus_fusecr.errors import FusecrError, Refused
from incus_fusecr.fuse import connection
from incus_fusecr.linux import proc
from incus_fusecr.linux.fd import Fd
from incus_fusecr.linux.pidfd import pidfd_open
from incus_fusecr.linux.zygote import JobError, JobTimeout


class Zygote:
    def __init__(self) -> None:
        self.hanging: set[str] = set()

    def hangs(self, on: str) -> bool:
        return on in self.hanging


class Setup:
    """A container whose recording raises what a test says; ``stopped`` counts how often its clients were."""

    def __init__(self, tmp_path: Path) -> None:
        self.zygote = Zygote()
        self.tools = Tools(self.zygote, Journal(str(tmp_path / "j")), None, lambda _pid: b"x")  # type: ignore[arg-type]
        self.stopped = 0
        self.error: Exception = OSError()

    def record(self, *_args: Any, **_more: Any) -> Any:
        raise self.error

    def stop(self, *_args: Any) -> None:
        self.stopped += 1

    def begin(self) -> Dump | None:
        return dumping.begin(self.tools, "c1", os.getpid(), None)


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    made = Setup(tmp_path)
    seen = scan([mount()], [])
    monkeypatch.setattr(dumping, "look", lambda _tools, _init, adopting=False: (seen, []))
    monkeypatch.setattr(dumping.scan, "scan", lambda _zygote, _init: seen)
    monkeypatch.setattr(dumping.scan, "payload_cgroup", lambda _init: None)
    monkeypatch.setattr(dumping.peers, "helpers", lambda *_: [])
    monkeypatch.setattr(dumping.record, "record", made.record)
    monkeypatch.setattr(quiesce, "stop_all", made.stop)
    monkeypatch.setattr(dumping.time, "sleep", lambda _seconds: None)
    return made


def test_a_daemon_that_never_answers_is_asked_once(setup: Setup) -> None:
    setup.error = JobTimeout("record_job did not finish in time", True)
    with pytest.raises(FusecrError, match=r"does not answer: record_job.*connections/57/abort") as caught:
        setup.begin()
    # It was found when the container had come to rest: not "nothing was touched".
    assert setup.stopped == 1 and not isinstance(caught.value, Refused)


def test_while_a_former_request_waits_no_client_is_stopped(setup: Setup) -> None:
    setup.zygote.hanging.add(connection.label(57))
    with pytest.raises(FusecrError, match="a former request still waits for an answer"):
        setup.begin()
    assert setup.stopped == 0


def test_what_comes_and_goes_is_tried_again(setup: Setup) -> None:
    setup.error = JobError("/mnt/f: Stale file handle", errno.ESTALE)
    with pytest.raises(Refused, match="Stale file handle"):
        setup.begin()
    assert setup.stopped == dumping.ATTEMPTS


def test_a_shortage_is_a_failure_with_a_name(setup: Setup) -> None:
    setup.error = OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(FusecrError, match="stopping c1: Too many open files"):
        setup.begin()
    assert not setup.tools.journal.entries("dump")


def test_a_container_does_not_take_all_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiesce, "MAX_TASKS", 10)
    monkeypatch.setattr(quiesce, "pidfd_open", lambda _pid: Fd(os.open("/dev/null", os.O_RDONLY)))
    monkeypatch.setattr(quiesce, "send_signal", lambda _pidfd, _number: True)
    monkeypatch.setattr(proc, "start_time", lambda pid: pid)
    stopper = Stopper()
    with pytest.raises(NotQuiet, match="more than 10"):
        stopper.stop(range(100, 200))
    assert len(stopper.pids) == 10
    stopper.resume()


def entry(setup: Setup, init: int, **changes: Any) -> None:
    good = {
        "init": init,
        "start": proc.start_time(init),
        "container": f"c{init}",
        "criu": 0,
        "was_stopped": [],
        "phase": "quiet",
        "stopped": [],
        "devices": {},
        "manifest": "{}",
    }
    setup.tools.journal.write("dump", str(init), {**good, **changes})


def test_one_bad_entry_is_undone_and_the_others_taken_over(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("dump .* cannot be taken over")
    went_on: list[str] = []
    monkeypatch.setattr(dumping, "_let_go_on", lambda dump: went_on.append(dump.name))
    empty = SimpleNamespace(connections=[])

    def parse(text: bytes) -> Any:
        if text == b"bad":
            raise dumping.manifest.ManifestError("manifest", "bad")
        return empty

    monkeypatch.setattr(dumping.manifest, "parse", parse)
    entry(setup, os.getppid(), manifest="bad")
    entry(setup, os.getpid())
    found = dumping.recover(setup.tools)
    assert [dump.name for dump, _ in found] == [f"c{os.getpid()}"] and went_on == [f"c{os.getppid()}"]
    found[0][0].undo.close()


def test_a_tree_whose_init_was_reaped_is_gone_whoever_has_its_number(setup: Setup) -> None:
    process = subprocess.Popen(["true"])
    dump = Dump(setup.tools, "c1", process.pid)
    dump.initfd = pidfd_open(process.pid)
    dump.undo.callback(dump.initfd.close)
    process.wait()
    dump.init = os.getpid()
    assert dump.finish() is False


def test_a_restore_that_cannot_be_taken_over_stays_stopped_and_keeps_no_other(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("restore .* cannot be taken over")
    journal, me = setup.tools.journal, os.getpid()
    empty = SimpleNamespace(connections=[], migration="")

    def parse(text: bytes) -> Any:
        if text == b"bad":
            raise dumping.manifest.ManifestError("manifest", "bad")
        return empty

    monkeypatch.setattr(restoring.manifest, "parse", parse)
    monkeypatch.setattr(restoring, "tasks_by_ns_pid", lambda _init: {})
    monkeypatch.setattr(restoring, "resume", lambda *_: pytest.fail("nobody knows whether it may run"))
    good = {"init": me, "start": proc.start_time(me), "criu": 1, "container": "c1", "manifest": "{}"}
    journal.write("restore", "1", {**good, "manifest": "bad"})
    journal.write("restore", "2", {"init": me})
    journal.write("restore", str(me), good)
    found = restoring.recover(None, journal)  # type: ignore[arg-type]
    assert [restore.init for restore, _ in found] == [me]
    found[0][0].drop()
    assert not journal.entries("restore")


def test_what_cannot_be_undone_does_not_keep_the_agent_from_starting(
    setup: Setup, tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("could not be set back")
    expect_log("init 5 cannot be taken over")
    journal = setup.tools.journal
    journal.write("knob", "fuse", {"nonsense": 1})
    Knob(journal, str(tmp_path / "none")).recover()
    journal.write("init", "5", {"nonsense": 1})
    inits.forget_the_dead(journal)
    assert inits.recall(journal, 5) is None and not journal.entries("init")
