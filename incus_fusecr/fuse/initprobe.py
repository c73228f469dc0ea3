# SPDX-License-Identifier: Apache-2.0
"""The FUSE_INIT reply of a running daemon, learnt from a second copy of it.

The kernel does not tell what a daemon negotiated when it mounted. So a copy of the daemon is started from
/proc/PID/{exe,cmdline,environ} inside the daemon's own namespaces, cgroups, ids, capabilities and AppArmor
label, with a socket in place of /dev/fuse; it gets the kernel's own FUSE_INIT, answers, and is killed. It
mounts and unmounts nothing (probe_mounts.py). It is a real second instance, though: it opens what the daemon
opens at start (a connection to a server, a lock, a log file); a daemon that allows only one instance cannot
be probed.

This module is for the agent, which has threads: all work is in a helper process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import FusecrError
from .init import InitReply, InitRequest, parse_init_out, parse_request
from .probe_facts import printable

KERNEL_INIT_SECONDS = 15.0
MAX_ANSWER = 1 << 16  # bytes
CLEANUP_SECONDS = 6.0  # what the helper needs to kill a copy that does not want to die

_PARENT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# -I and -S: neither the environment nor site-packages decide what the helper runs.
_START = "import sys; sys.path.append(sys.argv[1]); from incus_fusecr.fuse.probe_helper import main; main()"


class ProbeError(FusecrError):
    """The reply of a daemon could not be learnt.

    :param pid: the daemon
    :param command: its command line, printable and shortened
    """

    def __init__(self, what: str, why: str, hint: str, pid: int, command: str) -> None:
        super().__init__(what, why, hint)
        self.pid = pid
        self.command = command


class _HelperFailed(Exception):
    """The helper gave no answer; the text says why."""


def _run_helper(request: dict[str, Any], seconds: float) -> dict[str, Any]:
    end = time.monotonic() + seconds
    helper = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _START, _PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env={},
    )
    assert helper.stdin and helper.stdout and helper.stderr
    try:
        # stdin stays open until the end: the helper gives up when it is closed.
        os.write(helper.stdin.fileno(), json.dumps(request).encode() + b"\n")
        out, err = _collect(helper.stdout.fileno(), helper.stderr.fileno(), end)
        if out is None:
            raise _HelperFailed("the helper process did not finish in time")
        try:
            answer = json.loads(out)
        except ValueError:
            said = err.strip().splitlines() or [b"no output"]
            raise _HelperFailed(f"the helper process failed: {printable(said[-1], 300)}") from None
        return dict(answer)
    except BrokenPipeError:
        raise _HelperFailed("the helper process ended at its start") from None
    finally:
        for pipe in (helper.stdin, helper.stdout, helper.stderr):
            pipe.close()
        helper.kill()
        try:
            helper.wait(1)
        except subprocess.TimeoutExpired:
            # In D: it touched something that a stuck daemon serves. subprocess reaps it at a later Popen.
            pass


def _collect(stdout: int, stderr: int, end: float) -> tuple[bytes | None, bytes]:
    """All of stdout up to its end (None at the deadline), and the tail of stderr."""
    out, err = bytearray(), bytearray()
    poll = select.poll()
    poll.register(stdout, select.POLLIN)
    poll.register(stderr, select.POLLIN)
    while (left := end - time.monotonic()) > 0 and len(out) <= MAX_ANSWER:
        for fd, _events in poll.poll(left * 1000):
            chunk = os.read(fd, 65536)
            if fd == stdout:
                if not chunk:
                    return bytes(out), bytes(err)
                out += chunk
            elif chunk:
                err = (err + chunk)[-4096:]
            else:
                poll.unregister(stderr)
    return None, bytes(err)


@dataclass(frozen=True)
class Kernel:
    """What the running kernel's FUSE does.

    :ivar request: the FUSE_INIT that it sends to a daemon
    :ivar names_connections: whether fdinfo of /dev/fuse names its connection, without which no daemon can be found
    """

    request: InitRequest
    names_connections: bool


@functools.cache
def kernel() -> Kernel:
    """Found out on a mount of our own, once a process.

    :raises FusecrError: /dev/fuse is missing, or this process may not mount
    """
    try:
        answer = _run_helper({"op": "kernel"}, KERNEL_INIT_SECONDS)
    except _HelperFailed as error:
        raise FusecrError("read this kernel's FUSE_INIT", str(error)) from None
    if "error" in answer:
        raise FusecrError(**answer["error"])
    return Kernel(parse_request(bytes.fromhex(answer["request"])), answer["names_connections"])


def kernel_init_request() -> InitRequest:
    """The FUSE_INIT that the running kernel sends to a daemon.

    :raises FusecrError: as :func:`kernel`
    """
    return kernel().request


def probe_init(
    daemon_pid: int,
    *,
    deadline: float,
    connections: Iterable[int] = (),
    request: InitRequest | None = None,
) -> InitReply:
    """The FUSE_INIT reply of a running daemon, from a second copy of it.

    :param daemon_pid: of the process that has /dev/fuse open, in the caller's pid namespace
    :param deadline: seconds for everything; up to 6 s more may pass until a copy that resists is killed
    :param connections: connection numbers that it is known to serve, for kernels whose fdinfo does not name
        them
    :param request: what the daemon was asked when it mounted; this kernel's request if not given
    :raises ProbeError: the copy did not start, answer, or answer well
    :raises FusecrError: this kernel's request cannot be read
    """
    request = request or kernel_init_request()
    job = {
        "op": "probe",
        "pid": daemon_pid,
        "connections": sorted(connections),
        "request": request.raw.hex(),
        "seconds": deadline,
    }
    what = f"learn the FUSE_INIT reply of daemon {daemon_pid}"
    try:
        answer = _run_helper(job, deadline + CLEANUP_SECONDS)
    except _HelperFailed as error:
        hint = "if the daemon itself is stuck: echo 1 > /sys/fs/fuse/connections/N/abort ends its mount"
        raise ProbeError(what, str(error), hint, daemon_pid, "?") from None
    if "error" in answer:
        raise ProbeError(**answer["error"], pid=daemon_pid, command=answer.get("command", "?"))
    return parse_init_out(bytes.fromhex(answer["reply"]))
