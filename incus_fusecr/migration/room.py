# SPDX-License-Identifier: Apache-2.0
"""Whether the pools have room for a migration: for the files on the target, for the dump on both. Decides; asks nobody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .model import Verdict

MIB = 1 << 20
# Beside the pages: descriptions of tasks, and what Incus itself keeps with an instance.
MARGIN = 64 * MIB
# If nobody knows the size of the dump.
UNKNOWN_DUMP = 256 * MIB


@dataclass(frozen=True)
class Need:
    """What goes over.

    :ivar files: bytes of the root file system; None if the driver does not tell
    :ivar memory: bytes of the tasks' memory; None if the agent does not tell
    """

    files: int | None = None
    memory: int | None = None

    @property
    def dump(self) -> int:
        return UNKNOWN_DUMP if self.memory is None else self.memory + MARGIN


def usage(state: Mapping[str, Any], device: str) -> int | None:
    """Bytes of the root disk in an instance's ``/state``; None if its driver counts none (dir, btrfs without quotas)."""
    disk = (state.get("disk") or {}).get(device)
    found = disk.get("usage") if isinstance(disk, Mapping) else None
    return int(found) if found else None


def free(resources: Mapping[str, Any]) -> int | None:
    """Bytes left in a pool, from its ``/resources``; None if it does not tell."""
    space = resources.get("space") or {}
    total, used = int(space.get("total") or 0), int(space.get("used") or 0)
    return max(0, total - used) if total else None


def look(need: Need, *, source_pool: str, source_free: int | None, target_pool: str, target_free: int | None) -> list[Verdict]:
    """Reasons against it, or None of the numbers is bad.

    :param source_free: see :func:`free`
    """
    found = []
    hint = "make room"
    memory = f"{_mib(need.memory)} of memory" if need.memory is not None else "memory of unknown size"
    if source_free is not None and source_free < need.dump:
        why = f"has {_mib(source_free)} left, the dump ({memory}) may need {_mib(need.dump)}"
        found.append(Verdict("refuse", "source", f"storage pool {source_pool}", why, hint))
    if target_free is None:
        return found
    what, hint = f"storage pool {target_pool}", f"{hint}, or choose another with --storage POOL"
    wanted = need.dump + (need.files or 0)
    if target_free < wanted:
        files = f"{_mib(need.files)} of files, " if need.files is not None else ""
        why = f"has {_mib(target_free)} left, the instance ({files}{memory}) may need {_mib(wanted)}"
        found.append(Verdict("refuse", "target", what, why, hint))
    return found


def unknown(need: Need, *, source_used: int, target_pool: str, target_free: int | None) -> Verdict | None:
    """A warning where the size of the files is not known and the pool is not so empty that it does not matter.

    :param source_used: bytes in use in the source's pool: no instance in it is larger
    """
    if need.files is not None or target_free is None or target_free >= source_used + need.dump:
        return None
    why = f"has {_mib(target_free)} left; how much the instance's files take, its storage driver does not tell"
    return Verdict("warn", "target", f"storage pool {target_pool}", why, "look that there is enough room")


def _mib(count: int | None) -> str:
    return f"{-(-(count or 0) // MIB)} MiB"
