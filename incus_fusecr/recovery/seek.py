# SPDX-License-Identifier: Apache-2.0
"""Daemons in containers that the configuration names. Reads /proc, and asks no file system."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..checkpoint import scan
from ..fuse.connection import FUSECTL
from ..linux import ns, proc
from ..linux.mount import Mount
from .config import Config, Daemon
from .hostmount import seen
from .link import served_by

PREFIX = "lxc.payload."
MOST = 64  # protected daemons of one container: its root decides how many it starts
HELD = frozenset("tT")  # traced or stopped: CRIU is at work, or a restore is not finished


@dataclass(frozen=True)
class Container:
    """A running container by its init; ``name`` is liblxc's."""

    name: str
    init: int
    start: int

    @property
    def identity(self) -> tuple[int, int]:
        return self.init, self.start

    def ending(self) -> bool:
        """Gone, or about to be: its init has been killed. The kernel kills the rest first, and waits for all of it."""
        try:
            return proc.start_time(self.init) != self.start or proc.dying(self.init) or proc.exiting(self.init)
        except (FileNotFoundError, ProcessLookupError):
            return True

    def held(self) -> bool:
        """Whether somebody has stopped its init."""
        return bool(HELD & set(proc.thread_states(self.init)))

    def servers(self) -> dict[int, int]:
        """connection: pid of its daemon, of those in the container's own pid and user namespace."""
        try:
            wanted = {kind: ns.ns_id(self.init, kind) for kind in ("pid", "user")}
            pids = scan.container_pids(self.init)
        except (FileNotFoundError, ProcessLookupError):
            return {}
        return served_by(pids, lambda pid: all(ns.ns_id(pid, kind) == wanted[kind] for kind in wanted))


@dataclass(frozen=True)
class Found:
    """A daemon and its mount in the container's own mount namespace."""

    container: Container
    config: Daemon
    pid: int
    mount: Mount


def containers(config: Config) -> list[Container]:
    """Running ones in which the configuration wants something protected; of liblxc, whatever cgroups the host has."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        pid = int(entry)
        try:
            if proc.ns_pids(pid)[1:] != [1] or (name := name_of(proc.read_text(f"/proc/{pid}/cgroup"))) is None:
                continue
            if any(daemon.protect and daemon.in_container(name) for daemon in config.daemons):
                found.append(Container(name, pid, proc.start_time(pid)))
        except (FileNotFoundError, ProcessLookupError, KeyError):
            continue
    return found


def name_of(cgroups: str) -> str | None:
    """liblxc's name of a container, from what its init's /proc/PID/cgroup says."""
    for line in proc.lines(cgroups):
        for part in line.split(":", 2)[-1].split("/"):
            if part.startswith(PREFIX):
                return part.removeprefix(PREFIX)
    return None


def daemons(container: Container, config: Config) -> Iterator[Found]:
    """Those in a container: each whole file system that is the topmost at its place; one place of each."""
    try:
        view = seen(container.init)
    except OSError:
        return  # it ends
    places: dict[int, list[Mount]] = {}
    for mount in view.by_id.values():
        if mount.is_fuse and not mount.major and mount.root == "/" and view.over(mount) is None:
            places.setdefault(mount.minor, []).append(mount)
    serving = container.servers() if places else {}
    for number, mounts in places.items():
        pid = serving.get(number)
        if pid is None:
            continue
        try:
            exe = os.readlink(f"/proc/{pid}/exe")
            words = proc.read_text(f"/proc/{pid}/cmdline").split("\0")
        except OSError:
            continue
        mount = its_own(mounts, words)
        wanted = config.find(exe=exe, fstype=mount.fstype, mountpoint=mount.mountpoint, instance=container.name)
        if wanted is not None:
            yield Found(container, wanted, pid, mount)


def its_own(mounts: Sequence[Mount], argv: Sequence[str]) -> Mount:
    """Where a daemon has mounted: at a place that its command line names. The others are bind mounts."""
    named = {os.path.normpath(word) for word in argv[1:] if word.startswith("/")}
    return min(mounts, key=lambda mount: (mount.mountpoint not in named, mount.id))


def connections() -> frozenset[str]:
    """All of the kernel; it changes when somebody mounts or unmounts. Empty if fusectl is not mounted."""
    try:
        return frozenset(os.listdir(FUSECTL))
    except OSError:
        return frozenset()
