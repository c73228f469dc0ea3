# SPDX-License-Identifier: Apache-2.0
"""What of the kernel recovery is built on: what a drill used of it, what this kernel lacks, and what it cannot do without."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import Refused, UsageError
from ..recovery import supervisor

DEVICE = "/dev/fuse"
FUSECTL = "/sys/fs/fuse/connections"
PYTHONS = (sys.executable, "/usr/bin/python3")


@dataclass(frozen=True)
class Feature:
    """
    :ivar since: version of Linux
    :ivar needed: recovery is refused without
    :ivar used_for: what recovery does with it; empty if nothing
    """

    name: str
    since: tuple[int, int]
    needed: bool
    used_for: str


FEATURES = (
    Feature("FUSE_NOTIFY_RESEND", (6, 9), True, "requests that the dead daemon had read come again"),
    Feature("fdinfo fuse_connection", (6, 16), True, "whose connection a /dev/fuse descriptor is"),
    Feature("FUSE_NOTIFY_INC_EPOCH", (6, 16), False, "names are looked up anew after a death"),
    Feature("MOVE_MOUNT_BENEATH", (6, 5), False, "the fresh mount goes below the old one; without it on top"),
    Feature("move_mount to a detached tree", (6, 15), False, "mounts on the old one are carried before anybody sees the fresh one"),
    Feature("open_tree OPEN_TREE_CLONE", (5, 2), True, "copies of the fresh daemon's mount"),
    Feature("mount_setattr", (5, 12), True, "flags and propagation of these copies"),
    Feature("openat2 RESOLVE_CACHED", (5, 12), True, "mounts are found without asking a file system"),
    Feature("pidfd_getfd", (5, 6), True, "copies of the daemon's /dev/fuse descriptors"),
    Feature("fusectl", (2, 6), False, "the last resort: a connection that nobody can serve is aborted"),
    Feature("statmount, listmount", (6, 8), False, ""),
    Feature("FUSE over io_uring", (6, 14), False, ""),
)


@dataclass(frozen=True)
class Finding:
    """``state``: used, available (not needed in this run), not used (by recovery at all), missing."""

    feature: str
    since: str
    state: str
    note: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def version(release: str) -> tuple[int, int]:
    """(major, minor) of ``uname -r``; (0, 0) if it has none."""
    words = release.split(".")
    try:
        return int(words[0]), int("".join(c for c in words[1] if c.isdigit()) or 0)
    except (IndexError, ValueError):
        return 0, 0


def findings(release: str, used: Mapping[str, str], absent: Collection[str] = ()) -> list[Finding]:
    """
    :param used: names of features that the run has used, and a note on each
    :param absent: names of those that were looked for, or tried, and are not there
    """
    found = []
    for feature in FEATURES:
        note = feature.used_for
        if feature.name in absent or version(release) < feature.since:
            state = "missing"
        elif feature.name in used:
            state, note = "used", used[feature.name] or note
        else:
            state = "available" if feature.used_for else "not used"
        found.append(Finding(feature.name, ".".join(map(str, feature.since)), state, note))
    return found


def used_in(events: Collection[Mapping[str, Any]]) -> tuple[dict[str, str], set[str]]:
    """(used, absent) as :func:`findings` takes them, from the events of a run, each as a dictionary."""
    always = ("fdinfo fuse_connection", "open_tree OPEN_TREE_CLONE", "mount_setattr", "openat2 RESOLVE_CACHED", "pidfd_getfd")
    used, absent = dict.fromkeys(always, ""), set()
    whats = [event["what"] for event in events]
    deaths = whats.count("guard-serving")
    if deaths:
        used["FUSE_NOTIFY_RESEND"] = f"asked {deaths} times for what the dead daemon had read"
        used["FUSE_NOTIFY_INC_EPOCH"] = ""
    if "guard-no-resend" in whats:
        absent.add("FUSE_NOTIFY_RESEND")
    swaps = [event["data"] for event in events if event["what"] == "swapped"]
    below, stacked = (sum(data.get(key, 0) for data in swaps) for key in ("swapped", "stacked"))
    if below:
        used["MOVE_MOUNT_BENEATH"] = f"{below} mounts, {stacked} more stacked on top of one that was in use as a directory"
    if "aborted" in whats:
        used["fusectl"] = "a connection was aborted"
    return used, absent


def python_for_the_file_system() -> str:
    """An interpreter that has pyfuse3 and trio: this one, else the distribution's. :raises Refused: none has"""
    for python in dict.fromkeys(PYTHONS):
        command = [python, "-c", "import pyfuse3, trio"]
        try:
            if subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0:
                return python
        except (OSError, subprocess.TimeoutExpired):
            continue
    raise Refused("drill", "no Python here has the modules pyfuse3 and trio, which its file system needs",
                  "apt install python3-pyfuse3, or pip install pyfuse3 beside incus-fusecr")  # fmt: skip


def require(guard: str) -> str:
    """What a drill cannot do without is there.

    :param guard: the guard's program
    :returns: the interpreter for the file system
    :raises UsageError: this user may not
    :raises Refused: what is missing
    """
    if os.geteuid() != 0:
        raise UsageError("drill", "it mounts, and this user may not", "use sudo")
    why = supervisor.missing(program=guard)
    if why:
        raise Refused("drill", why)
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise Refused("drill", f"{DEVICE}: {error.strerror}", "modprobe fuse") from None
    return python_for_the_file_system()
