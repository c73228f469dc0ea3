# SPDX-License-Identifier: Apache-2.0
"""Processes that ``incus exec`` began and left behind: their session is one of the host, which CRIU cannot dump.

They have no terminal and no group leader that anybody in the container could see, so they lose nothing when each becomes
the leader of a session of its own, as daemon(3) would have made it.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import Any

from ..linux import ptrace
from ..linux.zygote import JobError, Zygote
from .scan import ATTACHED, Scan

log = logging.getLogger(__name__)

CALL_SECONDS = 2.0
JOB_SECONDS = 30.0


def left_behind(seen: Scan) -> list[int]:
    """Processes to be given a session: not those of an ``incus exec`` that goes on, nor stopped or traced ones."""
    return [p.pid for p in seen.processes if p.outside and p.outside != ATTACHED and not p.tracer]


def adopt(zygote: Zygote, seen: Scan, name: str) -> None:
    """Give each of them a session of its own. What could not be done shows in the next scan."""
    pids = left_behind(seen)
    if not pids or not ptrace.can_make_calls():
        return
    try:
        failed, _ = zygote.run(f"{__name__}:adopt_job", {"pids": pids}, deadline=JOB_SECONDS)
    except JobError as error:
        log.warning("%s: sessions of what incus exec left behind: %s", name, error)
        return
    log.info("%s: %d processes that incus exec left behind have sessions of their own", name, len(pids) - len(failed))
    for pid, why in failed:
        log.info("%s: process %s: %s", name, pid, why)


def adopt_job(args: dict[str, Any], _fds: list[int]) -> tuple[Any, list[int]]:
    """Zygote job of :func:`adopt`; returns [[pid, why]] of those that failed."""
    failed = []
    for pid in args["pids"]:
        try:
            result = ptrace.call(pid, ptrace.NR_SETSID, CALL_SECONDS)
            if result < 0 and result != -errno.EPERM:  # EPERM: it is a group leader by now
                failed.append([pid, f"setsid: {os.strerror(-result)}"])
        except OSError as error:
            failed.append([pid, str(error)])
    return failed, []
