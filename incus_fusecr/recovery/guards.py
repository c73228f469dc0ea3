# SPDX-License-Identifier: Apache-2.0
"""Every held connection has a guard that lives: found again, or started."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from ..fuse.initprobe import kernel_init_request
from ..fuse.wire import IN_HEADER
from ..guard import client as guard_client
from ..linux.fd import Fd
from . import facts
from .config import Daemon
from .events import EventLog
from .fresh import MAX_LOG, RUN
from .keeping import Keeping
from .link import Guard, Link, Process, guard_at

log = logging.getLogger(__name__)

BACKOFF_MAX = 10.0
LOOK_SECONDS = 2.0
# What concerns /dev/fuse itself, and is nothing for a daemon whose device is a socket: splice, passthrough, io_uring.
NOT_FOR_SIDECARS = sum(1 << bit for bit in (7, 8, 9, 37, 41))
# Of a guard's events those that somebody may want to know afterwards.
NOTABLE = {"serving", "served", "no-resend"}
BAD = {"sidecar-exit", "sidecar-failed", "sidecar-silent", "poison", "deadline", "malformed", "search-hangs", "stale"}


@functools.cache
def sidecar_init() -> bytes:
    """Body of the FUSE_INIT that sidecars are asked. :raises FusecrError: this kernel's cannot be read"""
    body = bytearray(kernel_init_request().raw[IN_HEADER.size :])
    for offset, shift in ((12, 0), (16, 32)):  # flags, flags2
        flags = int.from_bytes(body[offset : offset + 4], "little") & ~(NOT_FOR_SIDECARS >> shift)
        body[offset : offset + 4] = (flags & 0xFFFFFFFF).to_bytes(4, "little")
    return bytes(body)


def roots_file(number: int) -> str:
    """Where the roots of detached mounts of a connection are; it goes with the connection."""
    return f"{RUN}/roots-{number}"


def read_roots(number: int) -> dict[int, str]:
    """What :func:`roots_file` has; empty if there is none."""
    try:
        with open(roots_file(number), errors="surrogateescape") as file:
            pairs = [line.rstrip("\n").partition(" ") for line in file]
    except OSError:
        return {}
    return {int(mount_id): root for mount_id, _, root in pairs if mount_id.isdigit()}


class Guards:
    """Starts, finds, follows and ends guards."""

    def __init__(self, keeping: Keeping, events: EventLog, program: str = guard_client.PROGRAM) -> None:
        self._keeping, self._events, self._program = keeping, events, program
        self._stale_at = 0.0

    def ensure(self, link: Link, daemon: Daemon) -> bool:
        """:returns: whether there is one; if not, it is tried again from ``link.guard_not_before`` on"""
        if link.guard is not None:
            if link.guard.alive():
                return True
            self._events.add("guard-died", link.unit, link.number, level=logging.WARNING, pid=link.guard.process.pid)
            link.guard.close()
            link.guard = None
        if time.monotonic() < link.guard_not_before:
            return False
        control = f"{RUN}/guard-{link.number}.sock"
        try:
            link.guard = guard_at(control, link.number) if os.path.exists(control) else None
            found = link.guard is not None
            link.guard = link.guard or self._spawn(link, daemon, control)
            self._follow(link)
        except OSError as error:
            link.guard_failures += 1
            link.guard_not_before = time.monotonic() + min(BACKOFF_MAX, 0.05 * 2.0 ** min(link.guard_failures, 16))
            if link.guard is not None:
                link.guard.close()
            link.guard = None
            if not link.gone():
                self._events.add("guard-failed", link.unit, link.number, level=logging.ERROR, why=str(error))
            return False
        link.guard_failures = 0
        self._keeping.put_guard(link.number, link.guard)
        dead = not link.alive()
        self._events.add(
            "guard-found" if found else "guard-started", link.unit, link.number, pid=link.guard.process.pid, daemon_dead=dead
        )
        return True

    def _spawn(self, link: Link, daemon: Daemon, control: str) -> Guard:
        options = guard_client.Options(
            warm=daemon.standby == "warm" or not link.alive(),
            strict=daemon.durability == "strict",
            attempts=daemon.attempts,
            fail_unserved=daemon.unserved == "fail",
            deadline=math.ceil(daemon.deadline),
            log=f"{RUN}/sidecar-{link.unit}.log",
            roots=self._write_roots(link),
        )
        sidecar = link.recipe.sidecar(f"{RUN}/sidecar-{link.number}.pid", link.number)
        pidfd = link.daemon.pidfd.fileno() if link.daemon.pidfd is not None else -1
        with self._log(f"{RUN}/guards.log") as output, ExitStack() as opened:
            userns = opened.enter_context(facts.userns(link.recipe.facts)).fileno() if link.recipe.facts else -1
            child = guard_client.spawn(
                link.number, [fd.fileno() for fd in link.fuse], pidfd, sidecar_init(), control, sidecar, options,
                program=self._program, log=output.fileno(), userns=userns,
            )
        return Guard(Process.of(child.pid), control, child)

    @staticmethod
    def _write_roots(link: Link) -> str | None:
        """A guard may have to serve before anybody can tell it anything; and whoever dies, the file is there."""
        if not link.roots:
            return None
        path = roots_file(link.number)
        with open(path + ".new", "w", errors="surrogateescape", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.writelines(f"{mount_id} {root}\n" for mount_id, root in link.roots.items() if "\n" not in root)
        os.rename(path + ".new", path)
        return path

    @staticmethod
    def _log(path: str) -> Fd:
        output = Fd(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), path)
        if os.fstat(output.fileno()).st_size > MAX_LOG:
            os.ftruncate(output.fileno(), 0)
        return output

    def _follow(self, link: Link) -> None:
        assert link.guard is not None
        if link.guard.follower is None:
            link.guard.follower = guard_client.Follower(link.guard.control, 1.0)
        if link.roots:
            guard_client.tell_roots(link.guard.control, link.roots)
        self.tell_nodes(link)

    def tell_roots(self, link: Link, roots: dict[int, str]) -> None:
        """One that does not listen is told by its successor's start."""
        self._write_roots(link)
        if link.guard is not None:
            with contextlib.suppress(OSError):
                guard_client.tell_roots(link.guard.control, roots, 1.0)

    def tell_nodes(self, link: Link) -> None:
        """One that does not listen looks for them itself, when somebody uses one."""
        if link.guard is not None and link.nodes:
            with contextlib.suppress(OSError):
                guard_client.tell_nodes(link.guard.control, link.nodes, 1.0)

    def warm(self, link: Link, path: str, pids: Sequence[int]) -> None:
        """Ask the sidecar for ``path`` in the name of each process, so that it knows their pid namespaces. One that does not
        answer will have to get to know them when it is needed."""
        node = next((number for number, _, name in link.nodes or () if name == path), None)
        if link.guard is not None and node is not None and pids:
            with contextlib.suppress(OSError):
                guard_client.warm(link.guard.control, node, pids, 0.2)

    def look(self, links: Iterable[Link]) -> None:
        """Before the mounts of connections whose daemons are dead are detached."""
        for link in links:
            if link.guard is None or link.alive():
                continue
            try:
                guard_client.serve(link.guard.control, 1.0)
                guard_client.look(link.guard.control, LOOK_SECONDS)
            except OSError as error:
                log.warning("guard of connection %d: %s", link.number, error)

    def heard(self, link: Link) -> None:
        """Read what a follower has, into the events."""
        follower = link.guard.follower if link.guard is not None else None
        if follower is None:
            return
        try:
            while (event := follower.next(0)) is not None:
                if event.name == "stale" and time.monotonic() - self._stale_at < 1:
                    continue  # one a second tells that there are some
                if event.name == "sidecar-exit" and link.gone():
                    continue  # it was ended
                if event.name == "clones":
                    link.unheld = True
                if event.name in NOTABLE | BAD:
                    self._stale_at = time.monotonic() if event.name == "stale" else self._stale_at
                    level = logging.WARNING if event.name in BAD else logging.INFO
                    self._events.add(f"guard-{event.name}", link.unit, link.number, level=level, **event.values)
        except (OSError, ValueError):
            follower.close()
            assert link.guard is not None
            link.guard.follower = None

    def status(self, link: Link) -> dict[str, str]:
        """Of a link's guard; empty if it does not answer."""
        if link.guard is None:
            return {}
        try:
            return guard_client.status(link.guard.control, 1.0)
        except OSError:
            return {}

    def stop(self, link: Link) -> bool:
        """End one in standby. :returns: False if it serves"""
        guard = link.guard
        if guard is None:
            return True
        try:
            guard_client.stop(guard.control, 1.0)
        except guard_client.GuardError:
            return False
        except OSError:
            pass  # it has ended by itself
        end = time.monotonic() + 2
        while guard.alive() and time.monotonic() < end:
            time.sleep(0.002)
        guard.close()
        link.guard = None
        self._keeping.put_guard(link.number, None)
        return True
