# SPDX-License-Identifier: Apache-2.0
"""Real mounts whose requests wait.

A placeholder leaves while a stranger looks a name up: the stranger holds its directory's lock, for which the notes wait,
unkillably.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from incus_fusecr.checkpoint import standin as standins
from incus_fusecr.checkpoint.answers import Answers
from incus_fusecr.checkpoint.manifest import Connection, Name, Node
from incus_fusecr.checkpoint.standin import StandIn, leave
from incus_fusecr.fuse import connection, wire
from incus_fusecr.fuse.wire import Request
from incus_fusecr.linux import mount, proc
from incus_fusecr.linux.fd import Fd
from incus_fusecr.linux.zygote import JobTimeout, Zygote

pytestmark = [pytest.mark.requires_root, pytest.mark.requires_fuse]

INIT = struct.pack("<IIIIHHIIHHII", 7, 31, 65536, 0x31, 7, 5, 131072, 1, 32, 0, 0, 0).ljust(64, b"\0")
WINDOW = 0.3  # seconds


def attr(nodeid: int, mode: int) -> list[int]:
    return [nodeid, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0]


class DeafAnswers(Answers):
    """Never answers a look-up of ``never``."""

    def answer(self, request: Request) -> bytes | None:
        if request.opcode == wire.FUSE_LOOKUP and request.body.startswith(b"never"):
            return None
        return super().answer(request)


class Mounted:
    def __init__(self, where: Path) -> None:
        where.mkdir()
        self.where = where
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        mount.mount("x", str(where), "fuse.t", 0, f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other")
        self.number = int(proc.fdinfo("self", device)["fuse_connection"])
        recorded = Connection(
            key="fusecr0",
            number=self.number,
            daemons=[],
            mountpoint=str(where),
            fstype="fuse.t",
            source="x",
            mount_options="rw",
            super_options="rw",
            init_reply=INIT.hex(),
            pointer_nodeids=False,
            statfs=[1] * 8,
            nodes=[Node(1, 0, attr(1, stat.S_IFDIR | 0o755)), Node(2, 0, attr(2, stat.S_IFREG | 0o644))],
            names=[Name(1, "known", 2)],
            handles=[],
        )
        self.standin = StandIn(Fd(device), DeafAnswers(recorded, INIT))
        self.standin.start()
        assert self.standin.ready.wait(5)

    def look(self, name: str) -> subprocess.Popen[bytes]:
        """A stranger, in state D until it is answered."""
        return subprocess.Popen(["stat", str(self.where / name)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        if connection.alive(self.number):
            connection.abort(self.number)
        leave([self.standin])
        mount.umount2(str(self.where), mount.MNT_DETACH)


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mounted]:
    control = tmp_path / "ctl"
    control.mkdir()
    mount.mount("none", str(control), "fusectl", 0, "")
    monkeypatch.setattr(connection, "FUSECTL", str(control))
    try:
        made = Mounted(tmp_path / "m")
        yield made
        made.close()
    finally:
        mount.umount2(str(control), mount.MNT_DETACH)


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


class Hooked:
    """A zygote before whose job something happens."""

    def __init__(self, zygote: Zygote, before: Callable[[], None]) -> None:
        self.zygote, self.before = zygote, before

    def run(self, *args: Any, **more: Any) -> Any:
        self.before()
        return self.zygote.run(*args, **more)


def bounded(deed: Callable[[], None], mounted: Mounted, seconds: float) -> float:
    """How long ``deed`` took; if it hangs, the connection is aborted, for nothing else ends that."""
    began = time.monotonic()
    thread = threading.Thread(target=deed, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        connection.abort(mounted.number)
        thread.join(5)
        pytest.fail(f"hung for {seconds} s")
    return time.monotonic() - began


def test_entries_are_expired_on_a_live_mount(mounted: Mounted, zygote: Zygote) -> None:
    assert (mounted.where / "known").stat().st_ino == 2
    counts = mounted.standin.answers.counts
    assert counts["LOOKUP"] == 1
    (mounted.where / "known").stat()
    assert counts["LOOKUP"] == 1  # valid
    seen: list[int] = []

    class After(Hooked):
        def run(self, *args: Any, **more: Any) -> Any:
            result = super().run(*args, **more)
            # Not valid any more, and not given out again: the daemon counts from here.
            with pytest.raises(OSError) as caught:
                (mounted.where / "known").stat()
            seen.append(caught.value.errno or 0)
            return result

    bounded(lambda: leave([mounted.standin], After(zygote, lambda: None)), mounted, 10)  # type: ignore[arg-type]
    assert seen == [errno.ENOMEM] and counts["LOOKUP"] == 2


def test_a_stranger_that_looks_up_is_answered_and_the_farewell_ends(mounted: Mounted, zygote: Zygote) -> None:
    strangers: list[subprocess.Popen[bytes]] = []

    def strange() -> None:
        strangers.append(mounted.look("unknown"))
        time.sleep(WINDOW)

    took = bounded(lambda: leave([mounted.standin], Hooked(zygote, strange)), mounted, 10)  # type: ignore[arg-type]
    assert strangers[0].wait(5) == 1
    assert took < standins.FAREWELL_SECONDS


def test_a_lock_that_nobody_lets_go_hangs_a_child_and_not_the_agent(
    mounted: Mounted, zygote: Zygote, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("answers may not have been expired")
    monkeypatch.setattr(standins, "FAREWELL_SECONDS", 0.5)
    strangers: list[subprocess.Popen[bytes]] = []

    def strange() -> None:
        strangers.append(mounted.look("never"))
        time.sleep(WINDOW)

    bounded(lambda: leave([mounted.standin], Hooked(zygote, strange)), mounted, 10)  # type: ignore[arg-type]
    assert mounted.standin.device.closed
    assert "D" not in proc.thread_states(os.getpid())
    connection.abort(mounted.number)
    assert strangers[0].wait(5) == 1


def stat_job(args: dict[str, Any], _fds: list[int]) -> tuple[Any, list[int]]:
    return os.stat(args["path"]).st_ino, []


def test_a_child_that_hangs_keeps_others_from_hanging_until_its_connection_ends(mounted: Mounted, zygote: Zygote) -> None:
    job, on = f"{__name__}:stat_job", connection.label(mounted.number)
    with pytest.raises(JobTimeout) as caught:
        zygote.run(job, {"path": str(mounted.where / "never")}, deadline=0.5, on=on)
    assert caught.value.stuck
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(JobTimeout, match="a former request still waits"):
            zygote.run(job, {"path": str(mounted.where / "never")}, deadline=5, on=on)
    assert time.monotonic() - began < 1
    connection.abort(mounted.number)
    deadline = time.monotonic() + 5
    while zygote.hangs(on) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not zygote.hangs(on)


def test_a_connection_that_only_a_stuck_thread_keeps_is_aborted(
    mounted: Mounted, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("stand-in of connection .* failed")
    expect_log("does not end; its descriptor stays open")
    expect_log(f"aborting FUSE connection {mounted.number}")
    monkeypatch.setattr(standins, "LEAVE_SECONDS", 0.2)
    waiting, reading = threading.Event(), threading.Event()

    def serve() -> bool:
        reading.set()
        waiting.wait()
        raise OSError(errno.ENODEV, "what read(2) says now")

    monkeypatch.setattr(mounted.standin, "_serve_one", serve)
    stranger = mounted.look("x")
    assert reading.wait(5)
    leave([mounted.standin])
    assert mounted.standin.is_alive()
    mounted.standin.abort()
    assert stranger.wait(5) == 1
    waiting.set()
    mounted.standin.join(5)
    assert not mounted.standin.is_alive() and mounted.standin.device.closed
