# SPDX-License-Identifier: Apache-2.0
"""Fresh daemons: started in a mount namespace that only the agent has, so that nobody sees their mount before its time.

The namespace receives what the host unmounts (it is a slave), so it keeps nothing mounted; no process needs to be in it.
What is below here runs in disposable children (linux/zygote.py): the kernel asks the fresh daemon meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..fuse.connection import device_fds
from ..linux import proc
from ..linux.fd import Fd
from ..linux.mount import MNT_DETACH, MS_REC, MS_SLAVE, Mount, mount, mountinfo, umount2
from ..linux.mountapi import clone_at
from ..linux.ns import CLONE_NEWNS, setns, unshare
from ..linux.statx import device
from ..linux.zygote import JobError, Zygote
from .plan import View
from .recipe import FRESH, Recipe

RUN = "/run/incus-fusecr"
START_SECONDS = 10.0
JOB_SECONDS = 5.0
UMOUNT_NOFOLLOW = 8
MAX_LOG = 1 << 20  # bytes; then it begins anew


class StartError(Exception):
    """A daemon that did not start; the text says why."""


@dataclass
class Started:
    """A fresh daemon; its mount is detached, ``tree`` is all that keeps it."""

    pid: int
    start: int
    connection: int
    tree: Fd


def make_namespace(zygote: Zygote) -> Fd:
    """A mount namespace as the host's, without its FUSE mounts. :raises JobError: it could not be made"""
    _, (namespace,) = zygote.run(f"{__name__}:job_namespace", {}, deadline=JOB_SECONDS)
    namespace.name = "the agent's mount namespace"
    return namespace


def start(zygote: Zygote, namespace: Fd, recipe: Recipe, name: str, serial: int) -> Started:
    """Start a daemon.

    :param name: of its files in :data:`RUN`
    :raises StartError: it ended, or did not mount in time; nothing of it is left
    """
    args = {
        "recipe": recipe.to_json(),
        "place": f"{FRESH}/{name}.{serial}",
        "pidfile": f"{RUN}/{name}.{serial}.pid",
        "log": f"{RUN}/{name}.log",
        "seconds": START_SECONDS,
    }
    try:
        found, (tree,) = zygote.run(f"{__name__}:job_start", args, [namespace.fileno()], deadline=START_SECONDS + 3)
    except JobError as error:
        kill_strays(str(args["place"]))
        raise StartError(str(error).removeprefix("StartError: ")) from None
    return Started(int(found["pid"]), int(found["start"]), int(found["connection"]), tree)


def clone_host_mount(zygote: Zygote, namespace: Fd, mountpoint: str) -> tuple[int, Fd]:
    """(connection, detached clone) of what is mounted there on the host. :raises JobError: nothing of FUSE is"""
    args = {"mountpoint": mountpoint}
    number, (tree,) = zygote.run(f"{__name__}:job_clone", args, [namespace.fileno()], deadline=JOB_SECONDS)
    return int(number), tree


def detach_host_mount(zygote: Zygote, namespace: Fd, mountpoint: str, connection: int) -> None:
    """Take away what is on top there if it is this connection, which nobody serves. :raises JobError: it could not be done"""
    args = {"mountpoint": mountpoint, "connection": connection}
    zygote.run(f"{__name__}:job_detach", args, [namespace.fileno()], deadline=JOB_SECONDS)


def tidy(*names: str) -> None:
    """Remove files in :data:`RUN` whose owners have ended."""
    for name in names:
        with contextlib.suppress(OSError):
            os.unlink(f"{RUN}/{name}")


def kill_strays(place: str, known: Collection[int] = ()) -> list[int]:
    """End the daemons that were started for a mountpoint at or below ``place`` (their argv names it), but for ``known``."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in known:
            try:
                words = proc.read_text(f"/proc/{name}/cmdline", 1 << 16).split("\0")
                if any(word == place or word.startswith(place + "/") for word in words[1:]) and proc.ns_pids(int(name))[1:] == []:
                    os.kill(int(name), signal.SIGKILL)
                    found.append(int(name))
            except (OSError, ValueError):
                continue
    return found


# -- jobs


def job_namespace(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """A new mount namespace."""
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_SLAVE, "")
    _unmount_fuse()
    return None, [os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)]


def _unmount_fuse() -> None:
    """The outermost first: so no path leads through a file system whose daemon may be dead."""
    for _ in range(8):
        found = sorted((m for m in mountinfo("self") if m.is_fuse), key=lambda m: m.mountpoint.count("/"))
        done = 0
        for one in found:
            try:
                umount2(one.mountpoint, MNT_DETACH | UMOUNT_NOFOLLOW)
                done += 1
            except OSError:
                continue
        if not done:
            return


def job_start(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """A fresh daemon in the namespace of ``fds[0]``."""
    setns(fds[0], CLONE_NEWNS)
    os.close(fds[0])
    _unmount_fuse()
    place = str(args["place"])
    os.makedirs(place, exist_ok=True)
    _remove_pidfiles(str(args["pidfile"]))
    recipe = Recipe.from_json(args["recipe"])
    end = time.monotonic() + float(args["seconds"])
    pid = os.fork()
    if pid == 0:
        _become(recipe, recipe.command(place, str(args["pidfile"])), str(args["log"]))
    try:
        found = _await_mount(place, pid, end, str(args["log"]))
        connection = found.minor
        server = _server(connection, pid)
        tree = clone_at(place)
        umount2(place, MNT_DETACH)
    except BaseException:
        kill_strays(place)
        try:
            os.kill(pid, signal.SIGKILL)
            umount2(place, MNT_DETACH)
        except OSError:
            pass
        raise
    finally:
        try:
            os.rmdir(place)
        except OSError:
            pass
    return {"pid": server, "start": proc.start_time(server), "connection": connection}, [tree.release()]


def _remove_pidfiles(path: str) -> None:
    """Those of daemons that were killed; ``path`` is NAME.SERIAL.pid."""
    directory, name = os.path.split(path)
    stem = name.rsplit(".", 2)[0]
    for other in os.listdir(directory):
        if other.startswith(stem + ".") and other.endswith(".pid"):
            with contextlib.suppress(OSError, ValueError):
                if not os.path.exists(f"/proc/{int(proc.read_text(f'{directory}/{other}'))}"):
                    os.unlink(f"{directory}/{other}")


def _become(recipe: Recipe, command: list[str], log: str) -> None:
    """Never returns."""
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        null = os.open("/dev/null", os.O_RDONLY)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if os.fstat(output).st_size > MAX_LOG:
            os.ftruncate(output, 0)
        for target, source in ((0, null), (1, output), (2, output)):
            os.dup2(source, target)
        os.closerange(3, 1 << 16)
        os.umask(recipe.umask)
        os.chdir(recipe.cwd)
        if recipe.uid or recipe.gid or recipe.groups:
            os.setgroups(list(recipe.groups))
            os.setresgid(recipe.gid, recipe.gid, recipe.gid)
            os.setresuid(recipe.uid, recipe.uid, recipe.uid)
        environ = dict(word.partition("=")[::2] for word in recipe.environ)
        os.execve(recipe.exe, command, environ)
    except OSError as error:
        os.write(2, f"{recipe.exe}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _await_mount(place: str, pid: int, end: float, log: str) -> Mount:
    ended = False
    while True:
        found = [m for m in mountinfo("self") if m.mountpoint == place and m.is_fuse]
        if found:
            return found[-1]
        if not ended:
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                ended = True
                code = os.waitstatus_to_exitcode(status)
                if code:  # with 0 it may have gone to the background
                    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
                    raise StartError(f"it ended with {how}{_last_words(log)}")
        if time.monotonic() > end:
            raise StartError("it did not mount in time" + _last_words(log))
        time.sleep(0.001)


def _last_words(log: str) -> str:
    try:
        with open(log, "rb") as file:
            lines = file.read()[-400:].decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return f"; it said: {proc.printable(lines[-1])}" if lines else ""


def _server(connection: int, pid: int) -> int:
    """Who serves it: the process that was started, or one that went to the background."""
    if any(found.connection == connection for found in device_fds(pid)):
        return pid
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid() and any(f.connection == connection for f in device_fds(int(name))):
            return int(name)
    raise StartError("it mounted, and nobody serves it")


def job_clone(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """What is on top of ``mountpoint`` in the namespace of ``fds[0]``."""
    setns(fds[0], CLONE_NEWNS)
    place = str(args["mountpoint"])
    with clone_at(place) as tree:
        major, minor = device(tree.fileno())
        if major:
            raise StartError(f"{place} is no FUSE mount")
        return minor, [tree.release()]


def job_detach(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """Unmount ``mountpoint`` in the namespace of ``fds[0]``; nothing of its file system is asked."""
    setns(fds[0], CLONE_NEWNS)
    place = str(args["mountpoint"])
    view = View(mountinfo("self"))
    there = [m for m in view.by_id.values() if m.mountpoint == place and view.over(m) is None]
    if there and there[-1].is_fuse and there[-1].minor == args["connection"]:
        umount2(place, MNT_DETACH | UMOUNT_NOFOLLOW)
    return None, []
