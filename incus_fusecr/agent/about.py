# SPDX-License-Identifier: Apache-2.0
"""What only a running container's host can tell of it to those who decide where it may go."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from ..checkpoint.cgroup import PAYLOADS, Cgroup
from ..linux import mount, ns, proc

KIB = 1024


def look(init: int, name: str, instance: Mapping[str, Any]) -> dict[str, Any]:
    """Facts for the preflight.

    :param name: liblxc's of the container
    :param instance: as Incus shows it
    """
    group = Cgroup(f"{PAYLOADS}/lxc.payload.{name}")
    return {
        "restored": restored(init, instance),
        "memory": memory(group.pids(), group.path),
        "disks": disks(instance, mount.mountinfo("self")),
    }


def restored(init: int, instance: Mapping[str, Any]) -> bool:
    """Whether the container came out of a dump: CRIU gives what it restores a time namespace, liblxc does not, unless told so.

    Read from the process itself, so that it is known of containers that were restored without this program, too, and
    no agent has to remember it.
    """
    if "lxc.time." in str((instance.get("expanded_config") or {}).get("raw.lxc") or ""):
        return False  # it cannot be told
    try:
        return not ns.same_ns(init, "time")
    except OSError:
        return False  # a kernel without them, or it has just ended


def memory(pids: Iterable[int], cgroup: str) -> int:
    """Bytes that a dump will hold, about: what the container's tasks have written and no file has."""
    try:
        stat = dict(line.split() for line in proc.read_text(f"{cgroup}/memory.stat").splitlines())
        return int(stat["anon"]) + int(stat["shmem"]) + int(proc.read_text(f"{cgroup}/memory.swap.current"))
    except (OSError, ValueError, KeyError):
        pass  # the memory controller is not there: by the tasks, which see no tmpfs
    total = 0
    for pid in pids:
        try:
            status = proc.status(pid)
            total += sum(int(status.get(key, "0 kB").split()[0]) for key in ("RssAnon", "VmSwap")) * KIB
            if status.get("RssShmem", "0 kB") != "0 kB":
                rollup = dict(line.split(":", 1) for line in proc.read_text(f"/proc/{pid}/smaps_rollup").splitlines()[1:])
                total += int(rollup.get("Pss_Shmem", "0").split()[0]) * KIB  # shared among many: each its part
        except (OSError, ValueError):
            continue
    return total


def disks(instance: Mapping[str, Any], mounts: list[mount.Mount]) -> dict[str, str]:
    """Disk devices that are paths of the host: name -> type of the file system that the path is on. By the table of mounts
    alone: the server of a network file system may be gone.

    :param mounts: of the host
    """
    found = {}
    for name, device in (instance.get("expanded_devices") or {}).items():
        source = str(device.get("source") or "")
        if device.get("type") == "disk" and source.startswith("/") and not device.get("pool"):
            path = os.path.normpath(source)
            over = [m for m in mounts if m.mountpoint == "/" or path == m.mountpoint or path.startswith(m.mountpoint + "/")]
            # Of several on one place the last one is on top.
            best = max(enumerate(over), key=lambda pair: (len(pair[1].mountpoint), pair[0]), default=None)
            found[str(name)] = best[1].fstype if best else ""
    return found
