# SPDX-License-Identifier: Apache-2.0
"""Disposable children when the machine is short of something, and when one of them does not die."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from incus_fusecr.agent import main as agent
from incus_fusecr.agent.loop import Loop
from incus_fusecr.linux import zygote as zygotes
from incus_fusecr.linux.zygote import JobError, JobTimeout, Zygote

ECHO = f"{__name__}:echo_job"
SLEEP = f"{__name__}:sleep_job"


def echo_job(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    return args, []


def sleep_job(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    time.sleep(60)
    return None, []


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


def test_a_fork_that_fails_is_one_jobs_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    forks: list[int] = []
    fork = os.fork

    def sometimes() -> int:
        forks.append(1)
        if len(forks) in (2, 3):  # the zygote is the first
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", sometimes)
    zygote = Zygote()
    try:
        for _ in range(2):
            with pytest.raises(JobError, match="could not be begun: Resource temporarily") as caught:
                zygote.run(ECHO, {}, deadline=5)
            assert caught.value.errno == errno.EAGAIN
        assert zygote.run(ECHO, {"a": 1}, deadline=5) == ({"a": 1}, [])
    finally:
        zygote.close()


def test_a_job_for_which_the_agent_has_no_descriptor_is_one_jobs_failure(
    zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_args: object) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(zygotes.socket, "socketpair", none)
        with pytest.raises(JobError, match="Too many open files"):
            zygote.run(ECHO, {}, deadline=5)
    assert zygote.run(ECHO, {}, deadline=5) == ({}, [])


def test_without_a_zygote_jobs_fail_and_the_agent_ends(expect_log: Callable[[str], None]) -> None:
    expect_log("its zygote is gone; the agent ends")
    zygote = Zygote()
    ended = threading.Event()
    hook = threading.excepthook
    try:
        failed = agent.watch(zygote, ended)
        os.kill(zygote.pid, signal.SIGKILL)
        assert ended.wait(5) and failed == ["its zygote is gone"]
        with pytest.raises(JobError):
            zygote.run(ECHO, {}, deadline=5)
    finally:
        threading.excepthook = hook
        zygote.close()


@pytest.mark.parametrize(("kind", "ends"), [(Loop, True), (threading.Thread, False)])
def test_the_agent_ends_with_a_thread_that_it_cannot_do_without(
    kind: type[threading.Thread], ends: bool, zygote: Zygote, expect_log: Callable[[str], None]
) -> None:
    expect_log("thread plugin failed")
    if ends:
        expect_log("the agent ends")
    ended = threading.Event()
    hook = threading.excepthook

    def fails() -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    try:
        failed = agent.watch(zygote, ended)
        thread = kind(target=fails, name="plugin")
        thread.start()
        thread.join()
        assert ended.is_set() is ends and bool(failed) is ends
    finally:
        threading.excepthook = hook
        ended.set()


def test_nobody_waits_twice_for_what_never_answers(zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = True
    wait_exit = zygotes.wait_exit
    # In state D not even SIGKILL ends a child.
    monkeypatch.setattr(zygotes, "wait_exit", lambda pidfd, seconds: not hanging and wait_exit(pidfd, seconds))
    with pytest.raises(JobTimeout) as caught:
        zygote.run(SLEEP, {}, deadline=0.2, on="FUSE connection 57")
    assert caught.value.stuck and zygote.hangs("FUSE connection 57")
    began = time.monotonic()
    with pytest.raises(JobTimeout, match="still waits for an answer of FUSE connection 57"):
        zygote.run(SLEEP, {}, deadline=20, on="FUSE connection 57")
    assert time.monotonic() - began < 5
    assert not zygote.hangs("FUSE connection 58")
    hanging = False
    deadline = time.monotonic() + 5
    while zygote.hangs("FUSE connection 57") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert zygote.run(ECHO, {}, deadline=5, on="FUSE connection 57") == ({}, [])
