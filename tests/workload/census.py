#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What recovery has on a host, as counts: ``census.py`` prints JSON. What stays the same however often lxcfs died does not grow.

Runs with the product's own Python, as root of the host.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from incus_fusecr.holder.client import HolderClient, HolderError

OURS = ("lxcfs", "fusecr-guard", "fusecr-holder", "fusecr-zygote", "incus-fusecr")


def field(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    return 0


def main() -> None:
    processes: Counter[str] = Counter()
    fds: Counter[str] = Counter()
    rss: Counter[str] = Counter()
    threads: Counter[str] = Counter()
    zombies = 0
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            comm = Path(f"/proc/{pid}/comm").read_text().strip()
            zombies += " Z " in Path(f"/proc/{pid}/stat").read_text()
            if comm not in OURS or pid == os.getpid():
                continue
            processes[comm] += 1
            fds[comm] += len(os.listdir(f"/proc/{pid}/fd"))
            rss[comm] += field(pid, "VmRSS")
            threads[comm] += field(pid, "Threads")
        except (FileNotFoundError, ProcessLookupError):
            continue
    try:
        with HolderClient() as holder:
            entries = sorted(entry.key for entry in holder.entries())
    except HolderError:
        entries = ["no holder"]
    print(json.dumps({
        "processes": processes,
        "zombies": zombies,
        "fds": fds,
        "threads": threads,
        "mounts": len(Path("/proc/1/mountinfo").read_text().splitlines()),
        "entries": len(entries),
        "files": len(os.listdir("/run/incus-fusecr")),
        "rss_kb": rss,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
