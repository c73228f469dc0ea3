# SPDX-License-Identifier: Apache-2.0
"""Connections as operators want to see them."""

from __future__ import annotations

import os
from typing import Any

from ..checkpoint import survive
from ..checkpoint.cgroup import PAYLOADS, Cgroup
from ..checkpoint.scan import Scan
from ..linux.proc import printable
from . import brief

PREFIX = "lxc.payload."


def payloads() -> list[Cgroup]:
    """The cgroups of all containers of liblxc on this host."""
    return [Cgroup(e.path) for e in sorted(os.scandir(PAYLOADS), key=lambda e: e.name) if e.name.startswith(PREFIX)]


def name_of(group: Cgroup) -> str:
    """liblxc's name of the container."""
    return os.path.basename(group.path).removeprefix(PREFIX)


def connections(seen: Scan) -> list[dict[str, Any]]:
    """One entry a connection: daemon, pid, mounts, handles."""
    found = []
    for number, pids in sorted(seen.connections.items()):
        root = survive.root_mount(seen, number)
        refs = [r for r in seen.refs if r.connection == number]
        daemon = seen.process(pids[0])
        found.append(
            {
                "connection": number,
                "daemon": daemon.comm,
                "pid": daemon.ns_pid,
                "host_pid": daemon.pid,
                "fstype": brief.short(printable(root.fstype), brief.NAME) if root else "fuse",
                "mountpoint": brief.short(printable(root.mountpoint), brief.NAME) if root else "",
                "mounts": len([m for m in seen.mounts if m.connection == number]),
                "handles": len([r for r in refs if r.kind == "fd"]),
                "references": len(refs),
            }
        )
    return found
