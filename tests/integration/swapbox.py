# SPDX-License-Identifier: Apache-2.0
"""An old and a fresh daemon, and containers that are shells in mount namespaces of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox import Daemon, Sandbox, wait_for

from incus_fusecr.linux import mountapi
from incus_fusecr.linux.fd import Fd
from incus_fusecr.linux.mount import Mount, mountinfo
from incus_fusecr.linux.mountapi import clone_at
from incus_fusecr.linux.pidfd import pidfd_getfd, pidfd_open
from incus_fusecr.linux.proc import fds
from incus_fusecr.linux.zygote import Zygote
from incus_fusecr.recovery.locked import zygote_locker
from incus_fusecr.recovery.namespaces import open_proc, visit
from incus_fusecr.recovery.opener import zygote_opener
from incus_fusecr.recovery.plan import Device
from incus_fusecr.recovery.swap import Fresh, Host, Report, Swapper

PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
BINDS = ("proc/meminfo", "proc/uptime", "sys")
FILES = ("top", "proc/meminfo", "proc/uptime", "sys/cpu/online", "deep/a/b/file")


class Container:
    """A shell in a new mount namespace; commands are written to it, so it can have a working directory."""

    def __init__(self, box: Sandbox, propagation: str = "private", within: Container | None = None, user: bool = False) -> None:
        self.box = box
        command = ["unshare", "--mount", "--propagation", propagation, *(["--user", "--map-root-user"] if user else [])]
        if within:
            self.shell = within.spawn([*command, "sh", "-c", "echo $$; exec sh"])
        else:
            self.shell = box.popen([*command, "sh", "-c", "echo $$; exec sh"], **PIPES)
        assert self.shell.stdout
        inside = self.shell.stdout.readline().split()
        assert inside, "the container did not come up"
        self.pid = box.host_pid(int(inside[0]))
        self.place = box.directory / "ct"

    def spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start a program in its namespace."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--wd=/", "--"]
        child = subprocess.Popen([*enter, *command], **PIPES)
        self.box.children.append(child)
        return child

    def __call__(self, command: str) -> str:
        """Output of a shell command there. :raises AssertionError: it fails"""
        code, output = self.attempt(command)
        assert code == 0, f"{command}: {output}"
        return output

    def attempt(self, command: str) -> tuple[int, str]:
        assert self.shell.stdin and self.shell.stdout
        self.shell.stdin.write(f'{command}\nr=$?; echo; echo "@done $r"\n'.encode())
        self.shell.stdin.flush()
        lines = []
        while not (line := self.shell.stdout.readline().decode()).startswith("@done"):
            assert line, f"the container ended: {''.join(lines)}"
            lines.append(line)
        return int(line.split()[1]), "".join(lines).strip()

    def binds(self, source: Path, *paths: str) -> None:
        """As LXC does with lxcfs: parts of ``source`` on files and directories of its own."""
        self(f"mkdir -p {self.place} && mount -t tmpfs -o mode=755 ct {self.place}")
        for path in paths:
            self(f"if [ -d {source}/{path} ]; then mkdir -p {self.place}/{path}; else mkdir -p $(dirname {self.place}/{path}); "
                 f": > {self.place}/{path}; fi; mount --bind {source}/{path} {self.place}/{path}")

    def mounts(self) -> list[Mount]:
        return mountinfo(self.pid)

    def at(self, place: Path | str) -> list[Mount]:
        """The mounts at a place, the lowest first."""
        found = [m for m in self.mounts() if m.mountpoint == str(place)]
        order: list[Mount] = []
        ids = {m.id for m in found}
        todo = [m for m in found if m.parent not in ids]
        while todo:
            order.append(todo.pop())
            todo += [m for m in found if m.parent == order[-1].id]
        return order

    def namespace(self) -> Fd:
        return Fd(os.open(f"/proc/{self.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), "container")


@dataclass
class SwapBox:
    """``old`` and ``fresh`` show directories of the same names; each file says which one it is of."""

    box: Sandbox
    old: Daemon
    fresh: Daemon
    zygote: Zygote
    host: Host
    tree: Fresh
    undo: contextlib.ExitStack
    held: dict[int, Fd] = field(default_factory=dict)

    @classmethod
    def open(cls, undo: contextlib.ExitStack, box: Sandbox, kind: str = "bindfs", options: str = "") -> SwapBox:
        zygote = Zygote()
        undo.callback(zygote.close)
        old, fresh = (box.daemon(kind, options, name=name) for name in ("old", "fresh"))
        for daemon in (old, fresh):
            name = daemon.mountpoint.name
            for file in FILES:
                path = Path(f"/proc/{box.init}/root{daemon.backing}") / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{name} {file}\n")
        namespace = undo.enter_context(Fd(os.open(f"/proc/{box.init}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), "host"))
        with open_proc() as proc:
            tree = undo.enter_context(visit(namespace, lambda: clone_at(str(fresh.mountpoint)), proc))
        box.run(["umount", "-l", str(fresh.mountpoint)])
        host, made = Host(namespace, str(old.mountpoint)), Fresh(tree, namespace, (0, fresh.connection))
        opened = cls(box, old, fresh, zygote, host, made, undo)
        opened.devices(old)
        opened.devices(fresh)
        return opened

    def devices(self, daemon: Daemon) -> dict[Device, Fd]:
        """Its device, with a copy of the descriptor that it reads requests from."""
        if daemon.connection not in self.held:
            with pidfd_open(daemon.pid) as pidfd:
                number = next(n for n in fds(daemon.pid) if os.readlink(f"/proc/{daemon.pid}/fd/{n}") == "/dev/fuse")
                self.held[daemon.connection] = self.undo.enter_context(pidfd_getfd(pidfd, number))
        return {(0, daemon.connection): self.held[daemon.connection]}

    def reverse(self) -> Fresh:
        """The old daemon as a fresh one, while it is still mounted."""
        with open_proc() as proc:
            tree = self.undo.enter_context(visit(self.host.namespace, lambda: clone_at(str(self.old.mountpoint)), proc))
        return Fresh(tree, self.host.namespace, (0, self.old.connection))

    def attached(self) -> Fresh:
        """The fresh tree as an attached mount, as kernels before 6.15 need it."""
        where = str(self.fresh.mountpoint)

        def attach() -> Fd:
            place = Fd(os.open(where, os.O_PATH | os.O_CLOEXEC), where)
            with place, mountapi.open_tree(self.tree.tree, mountapi.OPEN_TREE_CLONE) as copy:
                mountapi.move_mount(copy, place)
            return Fd(os.open(where, os.O_PATH | os.O_CLOEXEC), where)

        with open_proc() as proc:
            tree = self.undo.enter_context(visit(self.host.namespace, attach, proc))
        return Fresh(tree, self.host.namespace, self.tree.device)

    def container(self, propagation: str = "private", within: Container | None = None, user: bool = False) -> Container:
        return Container(self.box, propagation, within, user)

    def swapper(self, deadline: float = 10, **more: Any) -> Swapper:
        return Swapper(zygote_opener(self.zygote, deadline), zygote_locker(self.zygote), **more)

    def swap(self, swapper: Swapper | None = None, **more: Any) -> Report:
        return (swapper or self.swapper()).swap(self.devices(self.old), self.tree, self.host, **more)

    def say(self, path: str) -> dict[str, str]:
        """What a file says when it is one of the old, and of the fresh daemon."""
        return {name: f"{name} {path}" for name in ("old", "fresh")}

    def count(self, where: Container, which: Daemon) -> int:
        return sum((m.major, m.minor) == (0, which.connection) for m in where.mounts())


def shape(mounts: list[Mount], replaced: dict[Device, Device]) -> list[tuple[object, ...]]:
    """A mount table without what a swap may change: ids, and the device that was replaced."""
    place = {m.id: m.mountpoint for m in mounts}
    device = {m.id: replaced.get((m.major, m.minor), (m.major, m.minor)) for m in mounts}
    return sorted((m.mountpoint, place.get(m.parent, ""), device[m.id], m.root, m.options) for m in mounts)


def swapped_shape(made: SwapBox, where: Container) -> list[tuple[object, ...]]:
    return shape(where.mounts(), {(0, made.old.connection): (0, made.fresh.connection)})


class Reader:
    """Reads a file of a container in a loop, by path, in threads of this process."""

    def __init__(self, c: Container, path: str, allowed: set[str]) -> None:
        self.reads, self.errors = 0, list[str]()
        self._stop = threading.Event()
        self._path, self._allowed = f"/proc/{c.pid}/root{path}", allowed
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                text = Path(self._path).read_text().strip()
                if text not in self._allowed:
                    self.errors.append(f"read {text!r}")
            except OSError as error:
                self.errors.append(str(error))
            self.reads += 1

    def __enter__(self) -> Reader:
        self._thread.start()
        wait_for(lambda: self.reads > 5, "first reads")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
