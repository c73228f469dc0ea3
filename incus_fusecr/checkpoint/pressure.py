# SPDX-License-Identifier: Apache-2.0
"""Pressure stall triggers, which CRIU does not restore.

A descriptor of a pressure file holds the trigger that was written through it (Documentation/accounting/psi.rst). Restored
without one it polls EPOLLERR for ever (kernel/sched/psi.c psi_trigger_poll()): systemd and its journal would spin. Nobody can
read a trigger back, so what comes in its place is systemd's default, which any process may ask for.
"""

from __future__ import annotations

import logging
import os
import re
import select
from collections.abc import Iterable
from typing import Any

from ..linux import mount, proc
from ..linux.zygote import JobError, Zygote
from .sockets import copies

log = logging.getLogger(__name__)

PRESSURE = re.compile(r"/(?:[^/]+/)*(?:(?:cpu|memory|io|irq)\.pressure|pressure/(?:cpu|memory|io|irq))")
TRIGGER = b"some 200000 2000000\0"  # systemd.resource-control(5) MemoryPressureThresholdSec=, and the window of it
JOB_SECONDS = 10.0


def rearm(zygote: Zygote, pids: Iterable[int]) -> int:
    """Write a trigger through each restored descriptor that may hold one and does not; returns how many.

    :param pids: stopped processes
    """
    try:
        count, _ = zygote.run(f"{__name__}:rearm_job", {"pids": list(pids)}, deadline=JOB_SECONDS)
    except JobError as error:
        log.warning("pressure stall triggers were not restored: %s", error)
        return 0
    return int(count)


def rearm_job(args: dict[str, Any], _fds: list[int]) -> tuple[Any, list[int]]:
    """args: pids; the result is the number of triggers"""
    count = 0
    tables: dict[int, dict[int, str]] = {}

    def wanted(pid: int, fd: int, link: str) -> bool:
        if not PRESSURE.fullmatch(link):
            return False
        info = proc.fdinfo(pid, fd)
        if int(info["flags"], 8) & os.O_ACCMODE == os.O_RDONLY:
            return False
        if pid not in tables:
            tables[pid] = {m.id: m.fstype for m in mount.mountinfo(pid)}
        # By the mount, not by the name: no copy of a FUSE file may be made.
        return tables[pid].get(int(info["mnt_id"])) in ("cgroup2", "proc")

    for copy in copies(args["pids"], wanted):
        with copy:
            poll = select.poll()
            poll.register(copy.fileno(), select.POLLPRI)
            if any(events & select.POLLERR for _, events in poll.poll(0)):
                os.write(copy.fileno(), TRIGGER)
                count += 1
    return count, []
