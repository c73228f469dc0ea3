# SPDX-License-Identifier: Apache-2.0
"""Sidecars in standby know the pid namespaces of the host's containers.

lxcfs forks when a pid namespace asks it for the first time, or for the first time in five seconds, and lets everybody else wait
meanwhile. A sidecar that is asked in time does not have to just after a death, when everybody asks it at once.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .warmup import other_pid_namespaces

if TYPE_CHECKING:
    from .unit import Unit

SECONDS = 4.0  # lxcfs forgets after five (PURGE_SECS)
MOST = 64  # namespaces; with more of them it is not worth what it costs


def tick(unit: Unit) -> None:
    """Ask the sidecars of the present daemon and of the spare, if it is time."""
    if not unit.config.warmup or unit.config.standby != "warm":
        return
    now = time.monotonic()
    if now >= unit.warm_again:
        unit.warm_again = now + SECONDS
        pids = other_pid_namespaces()[:MOST]
        for link in filter(None, (unit.link(unit.current), unit.link(unit.warm))):
            if link.alive():
                unit.context.guards.warm(link, f"/{unit.config.warmup}", pids)
    unit.wake(unit.warm_again)
