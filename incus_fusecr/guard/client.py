# SPDX-License-Identifier: Apache-2.0
"""How the agent starts a guard and talks to it (docs/adr/0012-recovery.md). Standard library only."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

PROGRAM = "/usr/libexec/incus-fusecr/fusecr-guard"
SOCKET_WORD = "@FD@"  # in the sidecar's command: the number of its socket
MESSAGE = 65536
SECONDS = 5.0

# exit codes
GONE = 0  # the connection is
STOPPED = 3  # somebody said stop, the connection lives


Node = tuple[int, int, str]  # nodeid, generation, path from the root of the file system
COUNTED = 1 << 32  # a nodeid below is a count of the daemon's, and never another file's


class GuardError(OSError):
    """A guard that did not come up, refused, or gave no answer in time."""


@dataclass(frozen=True)
class Options:
    """What the command line says beside the descriptors; the defaults are the program's own."""

    warm: bool = True
    strict: bool = True  # an FSYNC that may have lost data fails (--durability)
    attempts: int = 3
    fail_unserved: bool = False
    deadline: int = 0  # seconds; 0: none
    log: str | None = None  # of the sidecar's output
    roots: str | None = None  # file of lines MNT_ID ROOT: mounts that were detached before

    def words(self) -> list[str]:
        words = [
            *("--standby", "warm" if self.warm else "cold"),
            *("--durability", "strict" if self.strict else "none"),
            *("--attempts", str(self.attempts)),
            *("--unserved", "fail" if self.fail_unserved else "wait"),
            *("--deadline", str(self.deadline)),
        ]
        words += ["--log", self.log] if self.log else []
        return words + (["--roots", self.roots] if self.roots else [])


@dataclass(frozen=True)
class Event:
    """One line of ``follow``."""

    name: str
    boottime_ms: int
    values: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, line: str) -> Event:
        """:raises ValueError: not a line of a guard"""
        time_word, name, *words = line.split(" ")
        if not time_word.startswith("t="):
            raise ValueError(f"not an event of a guard: {line!r}")
        return cls(name, int(time_word[2:]), dict(word.split("=", 1) for word in words if "=" in word))


def command(
    connection: int,
    fuse_fds: Sequence[int],
    pidfd: int,
    init: bytes,
    control: str,
    sidecar: Sequence[str],
    options: Options,
    program: str = PROGRAM,
    userns: int = -1,
) -> list[str]:
    """The command line of a guard; ``init`` is the body of the kernel's FUSE_INIT, ``pidfd`` -1 of a dead daemon."""
    return [
        program,
        *("--connection", str(connection)),
        *("--fuse-fd", ",".join(map(str, fuse_fds))),
        *("--pidfd", str(pidfd)),
        *("--init", init.hex()),
        *("--control", control),
        *(("--userns", str(userns)) if userns >= 0 else ()),
        *options.words(),
        "--",
        *sidecar,
    ]


def spawn(
    connection: int,
    fuse_fds: Sequence[int],
    pidfd: int,
    init: bytes,
    control: str,
    sidecar: Sequence[str],
    options: Options | None = None,
    program: str = PROGRAM,
    log: int | None = None,
    seconds: float = SECONDS,
    userns: int = -1,
) -> subprocess.Popen[bytes]:
    """Start a guard and wait until it listens. The caller's descriptors stay open, and the caller's.

    :param log: descriptor for what it writes on stderr
    :param userns: descriptor of the user namespace that the mount belongs to; -1: the caller's
    :raises GuardError: it ended, or does not listen within ``seconds``
    """
    words = command(connection, fuse_fds, pidfd, init, control, sidecar, options or Options(), program, userns)
    passed = [*fuse_fds, *(fd for fd in (pidfd, userns) if fd >= 0)]
    output = subprocess.DEVNULL if log is None else log
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=passed, start_new_session=True, cwd="/"
    )
    deadline = time.monotonic() + seconds
    while True:
        if process.poll() is not None:
            raise GuardError(f"guard of connection {connection}: ended with code {process.returncode}")
        try:
            ask(control, "status", max(0.1, deadline - time.monotonic()))
        except OSError as error:
            if time.monotonic() > deadline:
                process.kill()
                process.wait(seconds)
                raise GuardError(f"guard of connection {connection}: {error}") from None
            time.sleep(0.002)
        else:
            return process


@contextmanager
def _connected(control: str, seconds: float) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(seconds)
        sock.connect(control)
        yield sock


def _exchange(sock: socket.socket, message: str) -> str:
    sock.send(os.fsencode(message))
    answer = sock.recv(MESSAGE)
    if not answer:
        raise GuardError(f"{message.split()[0]}: the guard hung up (not root, or too many clients)")
    text = os.fsdecode(answer)
    if text.startswith("error "):
        raise GuardError(text[6:])
    return text


def ask(control: str, message: str, seconds: float = SECONDS) -> str:
    """One message, its answer.

    :raises GuardError: the guard refuses
    :raises OSError: there is none, or no answer (TimeoutError)
    """
    with _connected(control, seconds) as sock:
        return _exchange(sock, message)


def status(control: str, seconds: float = SECONDS) -> dict[str, str]:
    """The answer to ``status``; raises as :func:`ask`."""
    lines = ask(control, "status", seconds).splitlines()
    return {key: value for key, _, value in (line.partition(" ") for line in lines)}


def serve(control: str, seconds: float = SECONDS) -> None:
    """Have it take over, whether the daemon is dead or not; raises as :func:`ask`."""
    ask(control, "serve", seconds)


def stop(control: str, seconds: float = SECONDS) -> None:
    """End a guard in standby; raises as :func:`ask`, so if it serves."""
    ask(control, "stop", seconds)


def look(control: str, seconds: float = SECONDS) -> None:
    """Have it look which inodes the roots of mounts are, and wait for that; raises as :func:`ask`.

    Before mounts are detached: afterwards that cannot be asked, and requests for these inodes may still be under way.
    """
    end = time.monotonic() + seconds
    with _connected(control, seconds) as sock:
        while True:
            try:
                _exchange(sock, "look")
                break
            except GuardError:  # it looks for something else
                if time.monotonic() > end:
                    raise
                time.sleep(0.002)
        while "\nlooking 1\n" in _exchange(sock, "status"):
            if time.monotonic() > end:
                raise TimeoutError("the guard looks for too long")
            time.sleep(0.001)


def tell_roots(control: str, roots: dict[int, str], seconds: float = SECONDS) -> None:
    """Before mounts are detached: their ids, and which directory or file is their root; raises as :func:`ask`."""
    with _connected(control, seconds) as sock:
        for mount_id, root in roots.items():
            _exchange(sock, f"roots {mount_id} {root}")


def tell_nodes(control: str, nodes: Iterable[Node], seconds: float = SECONDS) -> None:
    """Which inode is which name, so that it need not look when one is used; raises as :func:`ask`."""
    with _connected(control, seconds) as sock:
        for node, generation, path in nodes:
            _exchange(sock, f"node {node} {generation} {path}")


def warm(control: str, node: int, pids: Sequence[int], seconds: float = SECONDS) -> None:
    """Have its sidecar asked for the file ``node`` in the name of each process; raises as :func:`ask`."""
    ask(control, f"warm {node} {' '.join(map(str, pids))}", seconds)


class Follower:
    """A connection that gets each event; a context manager. The guard drops who does not read."""

    def __init__(self, control: str, seconds: float = SECONDS) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._sock.settimeout(seconds)
            self._sock.connect(control)
            _exchange(self._sock, "follow")
        except OSError:
            self._sock.close()
            raise

    def fileno(self) -> int:
        return self._sock.fileno()

    def next(self, seconds: float) -> Event | None:
        """The next event; None if there is none in time.

        :raises GuardError: the guard has ended, or dropped us
        """
        poll = select.poll()  # select(2) ends at descriptor 1023
        poll.register(self._sock, select.POLLIN)
        if not poll.poll(max(0.0, seconds) * 1000):
            return None
        data = self._sock.recv(MESSAGE)
        if not data:
            raise GuardError("the guard hung up")
        return Event.parse(data.decode(errors="replace"))

    def wait_for(self, name: str, seconds: float = SECONDS) -> Event:
        """Skip to the next event of that name.

        :raises TimeoutError: none within ``seconds``
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            event = self.next(deadline - time.monotonic())
            if event is not None and event.name == name:
                return event
        raise TimeoutError(f"no event {name} within {seconds:g} s")

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
