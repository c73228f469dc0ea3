# SPDX-License-Identifier: Apache-2.0
"""The agent does not outlive its recovery: when that fails for good, it ends, and the next one takes over."""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from incus_fusecr.agent import main as agent
from incus_fusecr.agent import recovering
from incus_fusecr.errors import FusecrError
from incus_fusecr.linux.zygote import Zygote
from incus_fusecr.recovery import supervisor as supervisors
from incus_fusecr.recovery.config import Config
from incus_fusecr.recovery.supervisor import FAILURES, Supervisor


class PaperSupervisor(Supervisor):
    """Turns that fail, from a number on or for a while."""

    fail: Callable[[int], bool]

    def __init__(self, *_: object) -> None:
        self._stopping = self._failed = False
        self._requests = queue.SimpleQueue()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.ready = threading.Event()
        self.turns = 0
        self.stopped: list[bool] = []

    def _load(self) -> None:
        pass

    def _turn(self) -> None:
        self.turns += 1
        if type(self).fail(self.turns):
            raise OSError(errno.EBADF, "Bad file descriptor")
        self._answer_requests(0.01)

    def stop(self, hand_back: bool, seconds: float = 20.0) -> list[str]:
        self.stopped.append(hand_back)
        self.call(lambda: setattr(self, "_stopping", True), 5)
        return []


class PaperServer:
    ended: threading.Event
    error: BaseException | None

    def __init__(self, *_: object, more: object = ()) -> None:
        self.ended, self.error = threading.Event(), PaperServer.error

    def run(self) -> None:
        if self.error is not None:
            raise self.error
        self.ended.wait(20)

    def close(self) -> None:
        self.ended.set()


class PaperEvents:
    def close(self) -> None:
        pass


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, list[str], Callable[[], recovering.Recovering]]]:
    """(set when the agent is to end, why, what starts recovery)"""
    monkeypatch.setattr(supervisors, "RETRY", 0.0)
    monkeypatch.setattr(recovering, "EventLog", PaperEvents)
    monkeypatch.setattr(recovering, "Supervisor", PaperSupervisor)
    monkeypatch.setattr(recovering.control, "Server", PaperServer)
    monkeypatch.setattr(recovering, "restarts", lambda: False)
    zygote, ended, hook = Zygote(), threading.Event(), threading.excepthook
    made: list[Any] = []

    def start() -> recovering.Recovering:
        made.append(recovering.Recovering(zygote, Config(())))
        return made[0]  # type: ignore[no-any-return]

    try:
        yield ended, agent.watch(zygote, ended), start
    finally:
        ended.set()
        threading.excepthook = hook
        for one in made:
            os.close(one.supervisor._wake_r)
            os.close(one.supervisor._wake_w)
        zygote.close()


def test_a_turn_that_fails_now_and_then_is_no_end(watched: Any, expect_log: Callable[[str], None]) -> None:
    expect_log("recovery")
    ended, failed, start = watched
    PaperSupervisor.fail = lambda turn: turn < 100 and turn % FAILURES != 0
    PaperServer.error = None
    made = start()
    while made.supervisor.turns < 120:
        assert made.supervisor.call(lambda: 7, 5) == 7
    assert not ended.is_set() and failed == []
    made.close()
    assert made.supervisor.stopped == [True]


def test_turns_that_only_fail_end_the_agent(watched: Any, expect_log: Callable[[str], None]) -> None:
    expect_log("recovery")
    expect_log("the agent ends")
    ended, failed, start = watched
    PaperSupervisor.fail = lambda turn: True
    PaperServer.error = None
    made = start()
    assert ended.wait(10) and "recovery" in failed[0]
    assert made.supervisor.turns == FAILURES
    with pytest.raises(FusecrError, match="its thread has failed"):  # at once, not after its deadline
        made.supervisor.call(lambda: 7, 60)
    made.close(failed=True)
    assert made.supervisor.stopped == [False]  # the next agent takes over what is protected


def test_a_control_socket_of_no_use_ends_the_agent(watched: Any, expect_log: Callable[[str], None]) -> None:
    expect_log("the agent ends")
    expect_log("thread control failed")
    ended, failed, start = watched
    PaperSupervisor.fail = lambda turn: False
    PaperServer.error = OSError(errno.EBADF, "Bad file descriptor")
    made = start()
    assert ended.wait(10) and "control" in failed[0]
    made.close(failed=True)
    assert made.supervisor.stopped == [False]


def test_an_entry_of_the_holder_that_nobody_understands(expect_log: Callable[[str], None]) -> None:
    expect_log("entry conn-7 is not understood: KeyError")

    def load() -> Any:
        return {}["pid"]

    assert Supervisor._load_entry("conn-7", load) is None
