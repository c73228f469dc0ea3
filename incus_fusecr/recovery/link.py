# SPDX-License-Identifier: Apache-2.0
"""One FUSE connection of a protected daemon, as the agent holds it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..fuse.connection import connected, device_fds
from ..guard import client as guard_client
from ..holder.table import MAX_FDS
from ..linux import ns, proc
from ..linux.fd import Fd
from ..linux.pidfd import exit_status, pidfd_getfd, pidfd_open, wait_exit
from .plan import Device
from .recipe import Recipe

_UCRED = struct.Struct("3i")


@dataclass
class Process:
    """A process by pid and start time, whoever's child it is; ``pidfd`` is None when it has ended.

    :ivar status: then its wait status, if we saw it end
    """

    pid: int
    start: int
    pidfd: Fd | None = None
    status: int | None = None

    @classmethod
    def find(cls, pid: int, start: int) -> Process:
        """The one that was noted: with a descriptor if it still lives."""
        try:
            pidfd = pidfd_open(pid)
        except OSError:
            return cls(pid, start)
        try:
            if proc.start_time(pid) == start and proc.thread_states(pid)[:1] not in ([], ["Z"], ["X"]):
                return cls(pid, start, pidfd)
        except OSError:
            pass
        pidfd.close()
        return cls(pid, start)

    @classmethod
    def of(cls, pid: int) -> Process:
        """A living one. :raises OSError: it has ended"""
        pidfd = pidfd_open(pid)
        try:
            return cls(pid, proc.start_time(pid), pidfd)
        except OSError:
            pidfd.close()
            raise

    def alive(self) -> bool:
        """Closes the descriptor of one that has ended."""
        if self.pidfd is None:
            return False
        if wait_exit(self.pidfd, 0):
            self.status = exit_status(self.pidfd, self.pid)
            self.close()
            return False
        return True

    @property
    def end(self) -> str:
        """How it ended, in words; empty if nobody knows."""
        if self.status is None:
            return ""
        code = os.waitstatus_to_exitcode(self.status)
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    @property
    def killed(self) -> bool:
        """Somebody else did it."""
        return self.status is not None and os.waitstatus_to_exitcode(self.status) in (
            -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT
        )  # fmt: skip

    @property
    def told_to_end(self) -> bool:
        """Somebody wanted it to: it says nothing about whether the next one will live."""
        return self.killed or self.status == 0

    def close(self) -> None:
        if self.pidfd is not None:
            self.pidfd.close()
        self.pidfd = None


@dataclass
class Guard:
    """A guard that was started or found."""

    process: Process
    control: str
    child: subprocess.Popen[bytes] | None = None
    follower: guard_client.Follower | None = None

    def alive(self) -> bool:
        if self.child is not None:
            self.child.poll()  # reap it
        return self.process.alive()

    def close(self) -> None:
        self.process.close()
        if self.child is not None and self.child.poll() is None:  # it ends with its connection, and is not to stay a zombie
            threading.Thread(target=self.child.wait, daemon=True, name="reap").start()
        if self.follower is not None:
            self.follower.close()
        self.follower = None


@dataclass
class Link:
    """A connection and who serves it.

    :ivar unit: key of the unit that it belongs to
    :ivar ours: the daemon was started by an agent, in a mount namespace without anything of it
    :ivar fuse: copies of all /dev/fuse descriptors
    :ivar unheld: its daemon may have made more of them since (clones, one for each thread that libfuse starts)
    :ivar tree: detached clone of its root, as long as it may be needed
    :ivar tree_in: ``ns`` or ``host``: the mount namespace in which the tree was made
    :ivar roots: roots of its mounts by mount id, noted before they are detached
    :ivar nodes: which inode is which name, see acquaint.py; None: nobody has asked
    """

    number: int
    unit: str
    daemon: Process
    recipe: Recipe
    ours: bool
    fuse: list[Fd]
    tree: Fd | None = None
    tree_in: str = "ns"
    guard: Guard | None = None
    guard_failures: int = 0
    guard_not_before: float = 0.0
    unserved_since: float | None = None
    unheld: bool = True
    roots: dict[int, str] = field(default_factory=dict)
    nodes: list[guard_client.Node] | None = None

    @property
    def device(self) -> Device:
        return (0, self.number)

    def alive(self) -> bool:
        """Whether its daemon lives."""
        return self.daemon.alive()

    def gone(self) -> bool:
        """Whether the kernel has ended the connection. Asked without waiting: each request would wake who waits."""
        poll = select.poll()
        poll.register(self.fuse[0].fileno(), 0)
        return bool(poll.poll(0))

    def drop_tree(self) -> None:
        if self.tree is not None:
            self.tree.close()
        self.tree = None

    def close(self) -> None:
        self.drop_tree()
        for fd in self.fuse:
            fd.close()
        self.daemon.close()
        if self.guard is not None:
            self.guard.close()

    def meta(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "pid": self.daemon.pid,
            "start": self.daemon.start,
            "ours": self.ours,
            "recipe": self.recipe.to_json(),
        }

    @classmethod
    def from_meta(cls, number: int, meta: Mapping[str, Any], fuse: list[Fd]) -> Link:
        """:raises KeyError, TypeError, ValueError: it is no entry of ours"""
        daemon = Process.find(int(meta["pid"]), int(meta["start"]))
        return cls(number, str(meta["unit"]), daemon, Recipe.from_json(meta["recipe"]), bool(meta["ours"]), fuse)


def hold(pid: int, number: int) -> tuple[Process, list[Fd]]:
    """A daemon and copies of all its descriptors of a connection, as far as the holder takes them; one that has ended may have
    had the same number.

    :raises OSError: it has ended, or has none
    """
    process = Process.of(pid)
    found: list[Fd] = []
    try:
        assert process.pidfd is not None
        for device in device_fds(pid):
            if device.connection != number or len(found) == MAX_FDS:
                continue
            if (copy := _connected(process.pidfd, device.fd)) is not None:
                found.append(copy)
        if not found:
            raise ProcessLookupError(f"process {pid} has no descriptor of connection {number}")
    except OSError:
        process.close()
        raise
    return process, found


def hold_clones(link: Link) -> bool:
    """What a daemon has made since: the guard has its own copies, and tells of them. :returns: whether there are more"""
    if not link.unheld or not link.alive():
        return False
    link.unheld = False
    try:
        daemon, found = hold(link.daemon.pid, link.number)
    except OSError:
        return False  # it has just ended
    # fewer: it is ending, or threads of it have; what we have of those does no harm
    more = daemon.start == link.daemon.start and len(found) > len(link.fuse)
    if more:
        found, link.fuse = link.fuse, found
    daemon.close()
    for fd in found:
        fd.close()
    return more


def _connected(pidfd: Fd, fd: int) -> Fd | None:
    """A copy of that descriptor, if its connection has not ended."""
    with contextlib.suppress(OSError):
        copy = pidfd_getfd(pidfd, fd)
        if connected(copy):
            return copy
        copy.close()
    return None


def servers() -> dict[int, int]:
    """connection: pid of the daemon, of all that run in our own user and pid namespace; guards are none.

    A child of lxcfs that asks another pid namespace for it has its descriptors, too, and may outlive it and its connection,
    whose number is another one's by then.
    """

    def ours(pid: int) -> bool:
        if proc.ns_pids(pid)[1:] or not ns.same_ns(pid, "user"):
            return False
        return pid != os.getpid() and proc.comm(pid) not in ("fusecr-guard", "fusecr-holder")

    return served_by((int(name) for name in os.listdir("/proc") if name.isdigit()), ours)


def served_by(pids: Iterable[int], fits: Callable[[int], bool]) -> dict[int, int]:
    """The same of those among ``pids`` that have a /dev/fuse open and fit."""
    found: dict[int, list[int]] = {}
    for pid in sorted(pids):
        try:
            if not _has_device(pid) or not fits(pid):
                continue
            with pidfd_open(pid) as pidfd:
                for device in device_fds(pid):
                    if device.connection is not None and (copy := _connected(pidfd, device.fd)) is not None:
                        copy.close()
                        found.setdefault(device.connection, []).append(pid)
        except (OSError, KeyError, ValueError):
            continue
    return {number: _eldest(pids) for number, pids in found.items()}


def _eldest(pids: list[int]) -> int:
    """The one that is nobody's child of them."""
    for pid in pids:
        with contextlib.suppress(OSError, KeyError, ValueError):
            if int(proc.status(pid)["PPid"]) not in pids:
                return pid
    return pids[0]


def _has_device(pid: int) -> bool:
    directory = f"/proc/{pid}/fd"
    for name in os.listdir(directory):
        with contextlib.suppress(OSError):
            if os.path.basename(os.readlink(f"{directory}/{name}")) == "fuse":
                return True
    return False


def guard_at(control: str, number: int, seconds: float = 1.0) -> Guard | None:
    """The guard that listens there, if it is one of that connection."""
    try:
        if guard_client.status(control, seconds).get("connection") != str(number):
            return None
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(seconds)
            sock.connect(control)
            pid, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return Guard(Process.of(pid), control)
    except OSError:
        return None
