# SPDX-License-Identifier: Apache-2.0
"""A holder as a process, and what of systemd it needs: the notify socket, the fd store, the environment at a restart."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from incus_fusecr.holder import main as program
from incus_fusecr.holder.client import HolderClient
from incus_fusecr.linux.fd import Fd

PYTHON = "/usr/bin/python3"
SECONDS = 20.0
# As systemd does after its fork: the fds from 3 on, and LISTEN_PID, which is not known before.
EXEC = """import os, sys
fds = [int(n) for n in sys.argv[1].split(',') if n]
for number, fd in enumerate(fds):
    os.dup2(fd, 3 + number, True)
    os.close(fd)
os.environ['LISTEN_PID'] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


def wait_for(what: str, holds: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {SECONDS:g} s"
        time.sleep(0.005)


def fds_of(pid: int) -> dict[int, str]:
    """What a process has open."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def rss(pid: int) -> int:
    """Resident kB."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


class Manager:
    """Keeps fds as systemd does (src/core/service.c): by name; of one open file description only the first is taken.

    :ivar stored: names and fds in the order of their arrival
    """

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "notify.sock")
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(self.path)
        self.sock.setblocking(False)
        self.stored: list[tuple[str, int]] = []
        self.said: list[str] = []

    def read(self) -> None:
        """Take all messages that are there."""
        while True:
            try:
                data, ancillary, _, _ = self.sock.recvmsg(65536, socket.CMSG_SPACE(256), socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            fds = array.array("i")
            for _, _, raw in ancillary:
                fds.frombytes(raw)
            text = data.decode()
            self.said.append(text)
            fields = dict(line.partition("=")[::2] for line in text.splitlines())
            if "FDSTOREREMOVE" in fields:
                for name, fd in [item for item in self.stored if item[0] == fields["FDNAME"]]:
                    self.stored.remove((name, fd))
                    os.close(fd)
            if "FDSTORE" in fields:
                assert fields["FDPOLL"] == "0" and ":" not in fields["FDNAME"]
                self.stored += [(fields["FDNAME"], fd) for fd in fds]

    def close(self) -> None:
        self.sock.close()
        for _, fd in self.stored:
            os.close(fd)


class Holder:
    """``systemd``: a :class:`Manager`, whose store goes with each start."""

    def __init__(self, directory: Path, systemd: Manager | None = None) -> None:
        self.path = str(directory / "holder.sock")
        self.systemd = systemd
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory / "holder.log"
        self.client = HolderClient(self.path, SECONDS)

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    def start(self, environment: dict[str, str] | None = None) -> None:
        """Start, and wait until it serves."""
        env = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})}
        kept: list[int] = []
        if self.systemd:
            env["NOTIFY_SOCKET"] = self.systemd.path
            self.systemd.said.clear()
            if self.systemd.stored:
                # High, so that no number is in the way of the ones from 3 on.
                kept = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 500) for _, fd in self.systemd.stored]
                env.update(LISTEN_FDS=str(len(kept)), LISTEN_FDNAMES=":".join(name for name, _ in self.systemd.stored))
        command = [PYTHON, "-I", "-S", program.__file__, self.path]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [PYTHON, "-I", "-S", "-c", EXEC, ",".join(map(str, kept)), *command],
                env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=kept,
            )
        for fd in kept:
            os.close(fd)
        if self.systemd:
            wait_for("READY=1", self._ready)
        else:
            wait_for("a socket that listens", self._listens)
            list(self.client.entries())
            self.client.close()
            wait_for("only that one", lambda: sum(link.startswith("socket:") for link in fds_of(self.pid).values()) == 1)

    def _ready(self) -> bool:
        assert self.systemd and self.process
        assert self.process.poll() is None, self.log.read_text()
        self.systemd.read()
        return any("READY=1" in text for text in self.systemd.said)

    def _listens(self) -> bool:
        assert self.process
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            return sock.connect_ex(self.path) == 0

    def kill(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(SECONDS)
        self.process = None
        if self.systemd:
            self.systemd.read()

    def restart(self) -> None:
        self.kill()
        self.start()

    def raw(self) -> socket.socket:
        """A connection without our client's good manners."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sock.connect(self.path)  # blocking: with a timeout a full backlog is an error
        sock.settimeout(SECONDS)
        return sock

    def close(self) -> None:
        self.client.close()
        if self.process:
            self.kill()


def same_pipe(a: Fd, b: Fd) -> bool:
    return os.fstat(a.fileno()).st_ino == os.fstat(b.fileno()).st_ino


def hung_up(r: Fd) -> bool:
    """Nobody has the writing end."""
    poll = select.poll()
    poll.register(r.fileno(), 0)
    return bool(poll.poll(0))


def holders(path: str) -> set[int]:
    """Processes that serve this path, or are about to; zombies have no command line."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (directory / "cmdline").read_bytes().endswith(f"main.py\0{path}\0".encode()):
                found.add(int(directory.name))
    return found


Box = Callable[..., Holder]
Pipe = Callable[[], tuple[Fd, Fd]]
