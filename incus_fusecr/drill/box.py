# SPDX-License-Identifier: Apache-2.0
"""Namespaces of its own for a drill: it sees no process and no mount of the host, so it cannot touch any.

Three processes: the command, a first one in new mount and pid namespaces that only waits and reaps (pid 1: when it ends, the
kernel ends everything in them, and with the last process the mounts go), and the drill itself. The first one ends with the
command, however that ends: its standard input is a pipe from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import FusecrError
from ..linux.libc import PR_SET_PDEATHSIG, prctl
from ..linux.mount import MNT_DETACH, MS_REC, MS_SHARED, MS_SLAVE, mount, mountinfo, umount2
from ..linux.ns import CLONE_NEWNS, CLONE_NEWPID, unshare
from ..linux.pidfd import pidfd_open
from .features import FUSECTL

ROOT = Path(__file__).resolve().parents[2]
END_SECONDS = 10.0  # for the kernel to end what was in the namespaces
UMOUNT_NOFOLLOW = 8
ABANDONED = 125

Tell = Callable[[dict[str, Any]], None]


# -- outside


def lines(options: Mapping[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """Run a drill; what it tells, a dictionary each. Whoever stops iterating ends it.

    :param seconds: until it is ended
    :raises FusecrError: it overran, or came to no end of its own
    """
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from incus_fusecr.drill import box; box.main()"
    command = [sys.executable, "-P", "-c", code, json.dumps({**options, "parent": os.getpid()})]
    # A session of its own: ctrl-C is for the command, which then ends all of it at once.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd="/")
    assert process.stdin and process.stdout
    try:
        yield from _read(process.stdout.fileno(), time.monotonic() + seconds)
        status = process.wait(END_SECONDS)
        if status:
            raise FusecrError("drill", f"it ended with code {status} before its time", "see what it wrote above")
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _read(fd: int, end: float) -> Iterator[dict[str, Any]]:
    data = b""
    while True:
        left = end - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            raise FusecrError("drill", "it is not finished in time", "the machine is too busy, or it hangs: report it")
        part = os.read(fd, 1 << 20)
        if not part:
            return
        data += part
        *whole, data = data.split(b"\n")
        for line in whole:
            yield dict(json.loads(line))


def left_over(connections: list[int], seconds: float = END_SECONDS) -> list[int]:
    """Which of these connections the kernel still has when the namespaces are gone; waits for them."""
    end = time.monotonic() + seconds
    while left := [number for number in connections if os.path.isdir(f"{FUSECTL}/{number}")]:
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    return left


# -- inside


def main() -> None:
    """The process that makes the namespaces; does not return. Standard output is for what the drill tells."""
    options = json.loads(sys.argv[1])
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != options["parent"]:
        os._exit(ABANDONED)
    unshare(CLONE_NEWNS | CLONE_NEWPID)
    pid = os.fork()
    if pid:
        os.close(0)
        os.close(1)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        private()
        drill = os.fork()
        if drill == 0:
            _drill(options)
        _first(drill)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def private() -> None:
    """A /proc and a /run of its own, and no FUSE mount of the host's: one whose daemon is dead is not met, and none is kept."""
    mount("none", "/", "", MS_REC | MS_SLAVE, "")
    mount("proc", "/proc", "proc", 0, "")
    needed = [sys.prefix, sys.base_prefix, str(ROOT)]
    for one in sorted((m for m in mountinfo("self") if m.is_fuse), key=lambda m: m.mountpoint.count("/")):
        if not any(f"{path}/".startswith(one.mountpoint.rstrip("/") + "/") for path in needed):
            with contextlib.suppress(OSError):  # it was below another one
                umount2(one.mountpoint, MNT_DETACH | UMOUNT_NOFOLLOW)
    if not os.listdir(FUSECTL) and not any(m.mountpoint == FUSECTL for m in mountinfo("self")):
        with contextlib.suppress(OSError):
            mount("fusectl", FUSECTL, "fusectl", 0, "")
    mount("none", "/", "", MS_REC | MS_SHARED, "")  # as systemd makes a host's
    mount("drill", "/run", "tmpfs", 0, "mode=0755")


def _first(drill: int) -> None:
    """Reaps, and ends everything when the drill has ended, or the command."""
    pidfd = pidfd_open(drill)
    while True:
        ready, _, _ = select.select([0, pidfd.fileno()], [], [], 0.5)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                os._exit(1)
            if pid == drill:
                os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
            if not pid:
                break
        if 0 in ready and not os.read(0, 1):
            os._exit(ABANDONED)


def _drill(options: dict[str, Any]) -> None:
    """Does not return."""
    code = 1
    try:
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        out = os.fdopen(os.dup(1), "w", buffering=1)
        os.set_inheritable(out.fileno(), False)
        os.dup2(2, 1)  # nothing else may write where the lines go
        from .run import Drill

        Drill(options, lambda told: print(json.dumps(told), file=out)).run()
        out.flush()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)
