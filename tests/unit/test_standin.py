# SPDX-License-Identifier: Apache-2.0
"""Stand-ins leave: each by itself, in bounded time, and no descriptor is closed under a thread that uses it."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from test_answers import connection

from incus_fusecr.checkpoint import restore as restoring
from incus_fusecr.checkpoint import standin as standins
from incus_fusecr.checkpoint.answers import Answers
from incus_fusecr.checkpoint.dump import Dump, _let_go_on
from incus_fusecr.checkpoint.restore import Restore
from incus_fusecr.checkpoint.standin import StandIn, leave
from incus_fusecr.fuse import wire
from incus_fusecr.linux.fd import Fd
from incus_fusecr.linux.zygote import JobTimeout


class Device:
    """Stands for /dev/fuse: requests from here, replies to here."""

    def __init__(self, reply: bytes = b"") -> None:
        self.kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.settimeout(5)
        self.standin = StandIn(Fd(device.detach(), "device"), Answers(connection(), reply))
        self.standin.start()

    def ask(self, opcode: int, body: bytes = b"", nodeid: int = 1) -> int:
        """The errno of the answer."""
        self.kernel.send(struct.pack("<IIQQIIIHH", 40 + len(body), opcode, 4, nodeid, 0, 0, 9, 0, 0) + body)
        return -int(wire.OUT_HEADER.unpack_from(self.kernel.recv(65536))[1])


    def close(self) -> None:
        self.kernel.close()
        leave([self.standin])


@pytest.fixture
def device() -> Iterator[Callable[..., Device]]:
    with ExitStack() as undo:

        def make(reply: bytes = b"") -> Device:
            made = Device(reply)
            undo.callback(made.close)
            return made

        yield make


class Zygote:
    """Does what a test says in place of the farewell's child."""

    def __init__(self, deed: Callable[[], Any]) -> None:
        self.deed = deed
        self.notes: list[list[str]] = []

    def run(self, job: str, args: dict[str, Any], fds: list[int], *, deadline: float) -> tuple[Any, list[Fd]]:
        assert job.endswith(":farewell_job") and len(fds) == len(args["notes"]) and 0 < deadline <= standins.FAREWELL_SECONDS
        self.notes += args["notes"]
        self.deed()
        return [], []


def test_it_answers_while_answers_are_expired_and_gives_out_no_more(device: Callable[..., Device]) -> None:
    placeholder = device(b"x")
    assert placeholder.ask(wire.FUSE_LOOKUP, b"a\xff\0") == 0
    seen: list[int] = []

    def deed() -> None:
        seen.append(placeholder.ask(wire.FUSE_LOOKUP, b"a\xff\0"))
        seen.append(placeholder.ask(wire.FUSE_GETATTR))

    zygote = Zygote(deed)
    leave([placeholder.standin], zygote)  # type: ignore[arg-type]
    assert seen == [errno.ENOMEM, 0] and len(zygote.notes[0]) == 3
    assert placeholder.standin.device.closed and not placeholder.standin.is_alive()


def test_a_farewell_that_hangs_keeps_nobody(device: Callable[..., Device], expect_log: Callable[[str], None]) -> None:
    expect_log("may not have been expired")

    def hangs() -> None:
        raise JobTimeout("farewell_job did not finish in time", True)

    devices = [device(b"x"), device(b"x")]
    leave([d.standin for d in devices], Zygote(hangs))  # type: ignore[arg-type]
    assert all(d.standin.device.closed for d in devices)


def test_no_descriptor_is_closed_under_a_thread(
    device: Callable[..., Device], monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("does not end; its descriptor stays open")
    monkeypatch.setattr(standins, "LEAVE_SECONDS", 0.2)
    blocked, other = device(), device()
    inside, go_on = threading.Event(), threading.Event()

    def blocks() -> bool:
        inside.set()
        return not go_on.wait(20)

    monkeypatch.setattr(blocked.standin, "_serve_one", blocks)
    blocked.kernel.send(b"x")
    assert inside.wait(5)
    leave([blocked.standin, other.standin])
    assert other.standin.device.closed
    assert not blocked.standin.device.closed and os.fstat(blocked.standin.device.fileno())
    go_on.set()
    blocked.standin.join(5)
    assert blocked.standin.device.closed


def test_one_that_cannot_leave_keeps_no_other(
    device: Callable[..., Device], monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("stand-in of connection")

    def fails(_seconds: float) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    first, second = device(), device()
    monkeypatch.setattr(first.standin, "part", fails)
    leave([first.standin, second.standin])
    assert second.standin.device.closed
    first.standin.join(5)
    monkeypatch.undo()
    leave([first.standin])
    assert first.standin.device.closed


def raises(*_args: object) -> None:
    raise MemoryError


def test_tasks_go_on_whatever_becomes_of_the_placeholders(monkeypatch: pytest.MonkeyPatch) -> None:
    went_on: list[int] = []
    monkeypatch.setattr(restoring, "leave", raises)
    monkeypatch.setattr(restoring, "resume", lambda _pids, _what: went_on.append(1))
    monkeypatch.setattr(restoring, "tasks_by_ns_pid", lambda _init: {})
    session = Restore(None, None, SimpleNamespace(connections=[]), 1)  # type: ignore[arg-type]
    with pytest.raises(MemoryError):
        session.hand_over(0)
    assert went_on == [1] and not session.done
    monkeypatch.setattr(restoring, "leave", lambda *_: None)
    session.hand_over(0)
    assert session.done


@pytest.mark.parametrize("stopped", [True, False])
def test_positions_of_tasks_that_go_on_are_left_alone(monkeypatch: pytest.MonkeyPatch, stopped: bool) -> None:
    settled: list[int] = []
    for name, what in (("leave", lambda *_: None), ("resume", lambda *_: None), ("tasks_by_ns_pid", lambda _init: {1: 7})):
        monkeypatch.setattr(restoring, name, what)
    monkeypatch.setattr(restoring.directories, "settle", lambda _zygote, pids: settled.extend(pids))
    session = Restore(None, None, SimpleNamespace(connections=[]), 1)  # type: ignore[arg-type]
    monkeypatch.setattr(session, "wait_stopped", lambda _seconds: stopped)
    session.hand_over(0)
    assert settled == ([7] if stopped else [])


def test_a_dumps_tasks_go_on_whatever_becomes_of_the_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("incus_fusecr.checkpoint.dump.leave", raises)
    dump = Dump(None, "c1", 1)  # type: ignore[arg-type]
    went_on: list[int] = []
    monkeypatch.setattr(dump.stopper, "resume", lambda: went_on.append(1))
    with pytest.raises(MemoryError):
        _let_go_on(dump)
    assert went_on == [1]


def test_a_task_that_cannot_be_told_keeps_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    def pidfd_open(pid: int) -> Fd:
        if pid == 7:
            raise OSError(errno.EMFILE, "Too many open files")
        told.append(pid)
        return Fd(os.open("/dev/null", os.O_RDONLY))

    monkeypatch.setattr(restoring, "pidfd_open", pidfd_open)
    monkeypatch.setattr(restoring, "send_signal", lambda _pidfd, _signal: True)
    what = SimpleNamespace(stopped=[3], tasks=[1, 2, 3], first=[7])
    with pytest.raises(OSError, match="Too many"):
        restoring.resume({7: 7, 1: 1, 2: 2, 3: 3}, what)  # type: ignore[arg-type]
    assert told == [1, 2]


