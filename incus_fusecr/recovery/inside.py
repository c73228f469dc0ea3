# SPDX-License-Identifier: Apache-2.0
"""What is done inside of containers for their daemons: one is read, one is started. All of it in disposable children.

A fresh daemon mounts for itself, on top of the mount of the dead one, as it would if somebody in the container started it: so
what it says to its mount, its helper and its file system is as it always was. The swap puts in order what is below.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from typing import Any

from ..fuse import connection
from ..fuse.probe_launch import Launch, receive
from ..linux.fd import Fd
from ..linux.mount import mountinfo
from ..linux.zygote import JobError, Zygote
from . import facts
from .facts import Facts, Unfit

READ_SECONDS = 5.0
START_SECONDS = 10.0
FORKED_SECONDS = 0.5  # so long a daemon that has ended may have left a child behind that mounts
LOOK_SECONDS = 0.005


def read(
    zygote: Zygote, path: str, pid: int, instance: str, init: tuple[int, int], mountpoint: str, number: int, name: str
) -> tuple[str, str]:
    """Write the facts of a daemon to ``path``. :returns: its executable, and why it cannot be protected (or empty)

    :raises JobError: not now; it may be ending, or frozen
    """
    args = {"path": path, "pid": pid, "instance": instance, "init": init, "name": name}
    args |= {"mountpoint": mountpoint, "connection": number}
    found, _ = zygote.run(f"{__name__}:job_read", args, deadline=READ_SECONDS, on=connection.label(number))
    return str(found["exe"]), str(found["unfit"])


def job_read(args: dict[str, Any], _fds: list[int]) -> tuple[Any, list[int]]:
    """The job."""
    pid, start = args["init"]
    mountpoint, number = str(args["mountpoint"]), int(args["connection"])
    try:
        init = int(pid), int(start)
        found = facts.read(int(args["pid"]), str(args["instance"]), init, mountpoint, number, str(args["name"]))
    except Unfit as error:
        return {"exe": "", "unfit": str(error)}, []
    os.close(found.open_init())
    found.save(str(args["path"]))
    return {"exe": found.daemon.exe, "unfit": ""}, []


def start(zygote: Zygote, path: str) -> int:
    """Start a fresh daemon by the facts in ``path``. :returns: the number of its connection, which is mounted

    :raises JobError: why it did not mount; nothing of it is left
    """
    number, _ = zygote.run(f"{__name__}:job_start", {"path": path, "seconds": START_SECONDS}, deadline=START_SECONDS + 3)
    return int(number)


def job_start(args: dict[str, Any], _fds: list[int]) -> tuple[Any, list[int]]:
    """The job."""
    found = facts.load(str(args["path"]))
    end = time.monotonic() + float(args["seconds"])
    with Fd(found.open_init(), "init") as init:
        before = mounted(found)
        first = ""
        for directory in found.daemon.directories:
            attempt = Attempt(found, init.fileno(), directory)
            try:
                number = attempt.run(before, end)
            except JobError as error:
                first = first or str(error)
            else:
                return number, []
            finally:
                attempt.close()
            if time.monotonic() > end:
                break
    raise JobError(first or "there was no time for it")


def mounted(found: Facts) -> set[int]:
    """Connections that are mounted at the daemon's mountpoint in its container."""
    return {m.minor for m in mountinfo(found.init[0]) if m.is_fuse and not m.major and m.mountpoint == found.mountpoint}


class Attempt:
    """One start in one working directory."""

    def __init__(self, found: Facts, init: int, directory: bytes) -> None:
        self._facts = found
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        empty, writer = os.pipe2(os.O_CLOEXEC)  # for a container without /dev/null: nobody writes, nobody reads
        try:
            launch = Launch(found.fresh(), init, directory, {}, theirs, writer, empty, {}, exe=found.open_exe(), stay=True)
            self._entrant = launch.start()
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()
            os.close(empty)
            os.close(writer)
        self._pidfds: dict[str, int] = {}
        self._mounted = False

    def run(self, before: set[int], end: float) -> int:
        """Wait for its mount. :raises JobError: it ended, or did not mount in time"""
        listening, ended_at = True, 0.0
        while True:
            if new := mounted(self._facts) - before:
                self._mounted = True
                return new.pop()
            now = time.monotonic()
            if now > end:
                raise JobError("it did not mount in time")
            if ended_at and now > ended_at + FORKED_SECONDS:
                raise JobError("it ended before it mounted; start it by hand in the container to see why")
            poll = select.poll()
            if listening:
                poll.register(self._control.fileno(), select.POLLIN)
            elif not ended_at and self._ended():
                ended_at = now
            if poll.poll(LOOK_SECONDS * 1000):
                listening = self._hear()

    def _ended(self) -> bool:
        copy = self._pidfds.get("copy")
        if copy is None:
            raise JobError("it could not be started; its container may be ending")
        poll = select.poll()
        poll.register(copy, select.POLLIN)
        return bool(poll.poll(0))

    def _hear(self) -> bool:
        """False at the end: the copy has become the daemon, or none of the processes lives."""
        message = receive(self._control)
        if message is None:
            return False
        fields, fds = message
        if "error" in fields:
            raise JobError(str(fields["error"])[:400])
        if "pidfd" in fields and fds:
            self._pidfds[str(fields["pidfd"])] = fds[0]
        return True

    def close(self) -> None:
        """End what has not mounted; let go of what has."""
        if not self._mounted:
            for pidfd in self._pidfds.values():
                try:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            os.kill(self._entrant, signal.SIGKILL)
        os.waitpid(self._entrant, 0)
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._control.close()


