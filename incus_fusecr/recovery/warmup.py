# SPDX-License-Identifier: Apache-2.0
"""A fresh daemon does what it does only at first before anybody depends on it; else a kill just then costs an answer.

A thread of a killed daemon may still take a request. The kernel then copies it to the thread's buffer, and answers EIO to the
client if the page is not there or not writable: a page fault is refused to who is killed (fuse_dev_do_read() and
__get_user_pages()). That is so for the first request of each thread, and after each fork(2) of the daemon, which makes its
pages copy-on-write. libfuse starts a thread when all others are busy; lxcfs forks once for each pid namespace that asks it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

from ..fuse import connection
from ..linux import ns
from ..linux.fd import Fd
from ..linux.libc import PR_SET_PDEATHSIG, prctl
from ..linux.ns import CLONE_NEWPID, setns
from ..linux.zygote import JobError, Zygote

NAMESPACES_SECONDS = 0.5  # at most; a host may have hundreds of pid namespaces
BURST_SECONDS = 0.5  # at most, and never taken by the namespaces: each of them has made the pages copy-on-write
DEADLINE = NAMESPACES_SECONDS + BURST_SECONDS + 2
THREADS = 12  # libfuse has up to 10, which all have to be busy at the same time
ROUNDS = 4
NOBODY = 65534


def warm(zygote: Zygote, tree: Fd, number: int, path: str) -> None:
    """Read the file ``path`` of connection ``number`` from every pid namespace, and many times at once.

    What goes wrong costs nothing but the warmth.
    """
    with contextlib.suppress(JobError):
        zygote.run(f"{__name__}:job_warm", {"path": path}, [tree.fileno()], deadline=DEADLINE, on=connection.label(number))


def job_warm(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """The job, on the tree ``fds[0]``."""
    end = time.monotonic() + NAMESPACES_SECONDS
    tree, path = fds[0], str(args["path"])
    asked = 0
    for pid in other_pid_namespaces():
        if time.monotonic() > end:
            break
        asked += _ask_from(pid, tree, path)
    end = time.monotonic() + BURST_SECONDS
    threads = [threading.Thread(target=_ask, args=(tree, path, end), daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end + 1 - time.monotonic()))
    return asked, []


def job_ask(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """Ask the tree ``fds[0]`` for its root and the file ``path``. :raises OSError: what it answers"""
    os.stat(".", dir_fd=fds[0])
    if args["path"]:
        _read(fds[0], str(args["path"]))
    return None, []


def other_pid_namespaces() -> list[int]:
    """A process of each but our own."""
    found: dict[str, int] = {}
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit():
                found.setdefault(ns.ns_id(name, "pid"), int(name))
    found.pop(ns.ns_id("self", "pid"), None)
    return list(found.values())


def _ask(tree: int, path: str, end: float) -> None:
    for _ in range(ROUNDS):
        if time.monotonic() > end:
            return
        with contextlib.suppress(OSError):
            _read(tree, path)


def _read(tree: int, path: str) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=tree)
    try:
        os.read(file, 4096)
    finally:
        os.close(file)


def _ask_from(pid: int, tree: int, path: str) -> bool:
    """Whether a process in the pid namespace of ``pid`` has read it. Its root there may see that process, and gains nothing."""
    child = os.fork()
    if child == 0:
        _become_stranger(pid, tree, path)
    return os.waitpid(child, 0)[1] == 0


def _become_stranger(pid: int, tree: int, path: str) -> None:
    """Never returns."""
    try:
        prctl(PR_SET_PDEATHSIG, 9)
        namespace = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        os.fchdir(tree)
        os.chroot(".")
        setns(namespace, CLONE_NEWPID)
        os.closerange(0, 1 << 12)
        inner = os.fork()  # the first that is in it
        if inner == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            prctl(PR_SET_PDEATHSIG, 9)
            os.read(os.open(path, os.O_RDONLY), 4096)
            os._exit(0)
        os._exit(os.waitpid(inner, 0)[1] != 0)
    finally:
        os._exit(1)
