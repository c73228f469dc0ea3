# SPDX-License-Identifier: Apache-2.0
"""The freeze guard: what it stops it lets go on, or its successor does; and it does not thaw for ever."""

from __future__ import annotations

import errno
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from incus_fusecr.checkpoint import freezer, quiesce
from incus_fusecr.checkpoint.freezer import KIND, FreezeGuard
from incus_fusecr.checkpoint.journal import Journal
from incus_fusecr.checkpoint.quiesce import NotQuiet, Stopper
from incus_fusecr.linux import proc

PAYLOAD = "lxc.payload.c1"


class Container:
    """A directory that stands for a cgroup, with one process in it."""

    def __init__(self, root: Path, name: str = PAYLOAD) -> None:
        self.path = root / name
        self.path.mkdir()
        self.process = subprocess.Popen(["sleep", "600"])
        self.events("frozen 0\npopulated 1\n")
        (self.path / "cgroup.freeze").write_text("1\n")
        (self.path / "cgroup.procs").write_text(f"{self.process.pid}\n")

    def events(self, text: str) -> None:
        (self.path / "cgroup.events").write_text(text)

    def freeze(self, value: str) -> None:
        (self.path / "cgroup.freeze").write_text(f"{value}\n")

    @property
    def wanted(self) -> str:
        return (self.path / "cgroup.freeze").read_text().strip()

    def state(self, wanted: str) -> str:
        """Its state; waits a little for the one that is expected."""
        deadline = time.monotonic() + 5
        while (found := "".join(proc.thread_states(self.process.pid))) != wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    found = tmp_path / "cgroup"
    found.mkdir()
    return found


@pytest.fixture
def container(root: Path) -> Iterator[Container]:
    made = Container(root)
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(str(tmp_path / "journal"))


@pytest.fixture
def guard(root: Path, journal: Journal, container: Container, monkeypatch: pytest.MonkeyPatch) -> FreezeGuard:
    """Of a container in which a client waits for a daemon on connection 57; the daemon is some other process."""
    seen = SimpleNamespace(connections={57: [1]}, refs=[], processes=[])
    for name, value in (("PATIENCE", 0.0), ("RETRY_SECONDS", 0.0), ("LONGEST_PAUSE", 0.0), ("FREEZE_SECONDS", 0.2)):
        monkeypatch.setattr(freezer, name, value)
    monkeypatch.setattr(freezer.scan, "init_of", lambda pids: pids[0])
    monkeypatch.setattr(freezer.scan, "scan", lambda _zygote, _init: seen)
    monkeypatch.setattr(freezer.connection, "alive", lambda _number: True)
    monkeypatch.setattr(freezer.connection, "waiting", lambda _number: 1)
    monkeypatch.setattr(freezer.peers, "helpers", lambda *_: [])
    monkeypatch.setattr(quiesce, "stop_daemons", lambda *_: None)
    return FreezeGuard(None, journal, str(root))  # type: ignore[arg-type]


def test_what_is_stopped_is_in_the_journal_before(
    guard: FreezeGuard, container: Container, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[Any] = []
    send_signal = quiesce.send_signal

    def send(pidfd: Any, number: int) -> bool:
        known.extend(entry["stopped"] for entry in journal.entries(KIND))
        return send_signal(pidfd, number)

    monkeypatch.setattr(quiesce, "send_signal", send)
    guard.look()
    assert known == [[[container.process.pid, proc.start_time(container.process.pid)]]]
    assert container.state("T") == "T" and container.wanted == "1"
    container.freeze("0")
    guard.look()
    assert container.state("S") == "S" and not journal.entries(KIND)


def test_the_next_agent_lets_go_on_what_a_dead_one_had_stopped(
    guard: FreezeGuard, container: Container, journal: Journal, root: Path
) -> None:
    guard.look()
    assert container.state("T") == "T"
    guard.held[str(container.path)].forget()  # it dies
    following = FreezeGuard(None, journal, str(root))  # type: ignore[arg-type]
    following.recover()
    container.events("frozen 1\npopulated 1\n")
    following.look()
    assert container.state("T") == "T"
    container.freeze("0")
    following.look()
    assert container.state("S") == "S" and not journal.entries(KIND)


def test_an_agent_that_dies_between_thaw_and_freeze(
    guard: FreezeGuard, container: Container, journal: Journal, root: Path
) -> None:
    guard.look()
    (entry,) = journal.entries(KIND)
    journal.write(KIND, entry["name"], {**entry, "phase": "stopping"})
    guard.held[str(container.path)].forget()
    container.freeze("0")
    FreezeGuard(None, journal, str(root)).recover()  # type: ignore[arg-type]
    assert container.state("S") == "S" and container.wanted == "1" and not journal.entries(KIND)


def test_a_pid_of_another_process_is_not_adopted(container: Container) -> None:
    stopper = Stopper()
    pid = container.process.pid
    stopper.adopt_marks([(pid, proc.start_time(pid) + 1), (1 << 22, 5)])
    assert stopper.pids == []
    stopper.adopt_marks([(pid, proc.start_time(pid))])
    assert stopper.marks == [(pid, proc.start_time(pid))]
    stopper.forget()


def test_a_guard_that_ends_has_let_go_when_close_returns(
    guard: FreezeGuard, container: Container, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = guard._release

    def slowly(path: str) -> None:
        time.sleep(0.3)
        release(path)

    monkeypatch.setattr(guard, "_release", slowly)
    thread = threading.Thread(target=guard.run)
    thread.start()
    assert container.state("T") == "T"
    guard.close()
    assert not guard.held and not journal.entries(KIND) and container.state("S") == "S"
    thread.join()


def test_a_daemon_that_never_answers_does_not_thaw_its_container_for_ever(
    guard: FreezeGuard, container: Container, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("requests are not answered")
    expect_log("is left as it is, half frozen, after 3 attempts")
    thawed: list[int] = []

    def never(*_args: object) -> None:
        thawed.append(1)
        assert container.wanted == "0"
        raise NotQuiet("FUSE connection 57", "1 requests are not answered")

    monkeypatch.setattr(quiesce, "stop_daemons", never)
    for _ in range(20):
        guard.look()
    assert len(thawed) == freezer.ATTEMPTS
    assert container.wanted == "1" and container.state("S") == "S"
    # The next freeze is another one.
    container.freeze("0")
    guard.look()
    container.freeze("1")
    guard.look()
    assert len(thawed) == freezer.ATTEMPTS + 1


def test_looks_that_find_nothing_become_rare(guard: FreezeGuard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezer.connection, "waiting", lambda _number: 0)
    monkeypatch.setattr(freezer, "LONGEST_PAUSE", 60.0)
    monkeypatch.setattr(freezer, "PATIENCE", 0.01)
    looks: list[int] = []
    monkeypatch.setattr(freezer.scan, "init_of", lambda pids: looks.append(1))
    for _ in range(100):
        guard.look()
        time.sleep(0.005)
    assert 1 < len(looks) < 10


def test_one_containers_failure_is_not_the_others(
    guard: FreezeGuard, container: Container, root: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("c0: .*Input/output error")
    bad = root / "lxc.payload.c0"
    bad.mkdir()
    look_at = guard._look_at

    def look(path: str, name: str) -> None:
        if name == "lxc.payload.c0":
            raise OSError(errno.EIO, "Input/output error")
        look_at(path, name)

    monkeypatch.setattr(guard, "_look_at", look)
    guard.look()
    assert container.state("T") == "T"
    guard.close()
    guard.held[str(container.path)].resume()


def wait_for(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def started(guard: FreezeGuard) -> threading.Thread:
    thread = threading.Thread(target=guard.run)
    thread.start()
    return thread


def test_a_write_to_cgroup_freeze_wakes_it(
    guard: FreezeGuard, container: Container, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freezer, "IDLE", 600.0)
    container.freeze("0")
    guard.look()
    thread = started(guard)
    container.freeze("1")
    assert container.state("T") == "T"
    wait_for(lambda: guard.held)  # it has written to the file, too
    container.freeze("0")
    assert container.state("S") == "S"
    # one that came later; a real cgroup has its files from its first moment on
    later = Container(root, "lxc.payload.c2")
    (root / "lxc.monitor.c2").mkdir()
    try:
        assert later.state("T") == "T"
    finally:
        guard.close()
        thread.join()
        later.process.kill()
        later.process.wait()


def test_it_looks_seldom_while_nothing_happens(
    guard: FreezeGuard, container: Container, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freezer, "IDLE", 600.0)
    container.freeze("0")
    guard.look()
    looks: list[int] = []
    monkeypatch.setattr(guard, "look", lambda: looks.append(1))
    thread = started(guard)
    time.sleep(0.5)
    guard.close()
    thread.join()
    assert not looks


def test_without_inotify_it_looks_all_the_time(
    guard: FreezeGuard, container: Container, root: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("ten times a second instead")

    def none() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(freezer, "Inotify", none)
    monkeypatch.setattr(freezer, "IDLE", 600.0)
    container.freeze("0")
    blind = FreezeGuard(None, guard.journal, str(root))  # type: ignore[arg-type]
    thread = started(blind)
    container.freeze("1")
    assert container.state("T") == "T"
    blind.close()
    thread.join()
    assert container.state("S") == "S"


def test_what_is_gone_is_watched_no_more(guard: FreezeGuard, container: Container, root: Path) -> None:
    """kernfs would keep the watches of all containers that ever were."""
    container.freeze("0")
    assert guard.changes._inotify is not None
    for number in range(3):
        one = root / f"lxc.payload.t{number}"
        one.mkdir()
        (one / "cgroup.freeze").write_text("0\n")
        (one / "cgroup.events").write_text("frozen 0\npopulated 1\n")
        guard.look()
        assert f"{one}/cgroup.freeze" in guard.changes._inotify.watched
        for file in one.iterdir():
            file.unlink()
        one.rmdir()
    guard.look()
    assert len(guard.changes._inotify.watched) == 3
