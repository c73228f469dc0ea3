#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Kills lxcfs and all that keeps it, one or two at a time, at random: ``killer.py SEED SECONDS`` on a host; prints counts.

What it does not do: wait until the damage is repaired. ``killer.py SEED --kills N`` kills the daemon alone, N times, each time
as soon as there is another one, or a moment later. Runs with the product's own Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any

from incus_fusecr.errors import FusecrError
from incus_fusecr.recovery.control import ask

WHAT = ("daemon", "daemon", "daemon", "agent", "guard", "sidecar", "holder", "spare", "term", "upgrade", "restart")
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def unit() -> dict[str, Any]:
    end = time.monotonic() + 20
    while True:
        try:
            units = ask({"op": "status"})["units"]
            if units:
                return dict(units[0])
        except FusecrError:
            pass
        assert time.monotonic() < end, "no agent"
        time.sleep(0.05)


def pids(*command: str) -> list[int]:
    return [int(word) for word in subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.split()]


def victims(what: str, now: dict[str, Any]) -> list[int]:
    if what in ("daemon", "term"):
        return [now["pid"]]
    if what == "spare":
        return [now["spare"]]
    if what == "agent":
        return pids("labctl", "pid", "agent")
    if what == "holder":
        return pids("pgrep", "-x", "fusecr-holder")
    found = [link[what] for link in now["connections"] if link[what]]
    return random.sample(found, min(1, len(found)))


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def in_a_row(count: int) -> None:
    """Prints also how long it took until there was another one, in ms, at most."""
    longest, began = 0.0, time.monotonic()
    for _ in range(count):
        pid = unit()["pid"]
        killed = time.monotonic()
        kill(pid)
        while not ((now := unit())["pid"] not in (0, pid) and now["state"] == "protected"):
            assert time.monotonic() < killed + 30, f"nobody after {pid}: {now}"
            time.sleep(0.01)
        longest = max(longest, time.monotonic() - killed)
        time.sleep(random.choice((0, 0, 0, 0.02, 0.1, 0.4)))
    print(json.dumps({"kills": count, "longest_ms": round(longest * 1000), "seconds": round(time.monotonic() - began, 1)}))


def main() -> None:
    random.seed(int(sys.argv[1]))
    if sys.argv[2] == "--kills":
        in_a_row(int(sys.argv[3]))
        return
    end = time.monotonic() + float(sys.argv[2])
    done: Counter[str] = Counter()
    while time.monotonic() < end:
        now = unit()
        for what in random.sample(WHAT, random.choice((1, 1, 2))):
            done[what] += 1
            if what == "upgrade":
                subprocess.Popen(["incus-fusecr", "upgrade", now["name"]], **QUIET)
            elif what == "restart":
                subprocess.Popen(["labctl", "restart", "lxcfs"], **QUIET)
            else:
                for pid in filter(None, victims(what, now)):
                    kill(pid, signal.SIGTERM if what == "term" else signal.SIGKILL)
            time.sleep(random.choice((0, 0, 0.01, 0.05, 0.2)))
        time.sleep(random.choice((0.05, 0.2, 0.5, 1, 1.5)))
    print(json.dumps(done))


if __name__ == "__main__":
    main()
