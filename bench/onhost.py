# SPDX-License-Identifier: Apache-2.0
"""Runs on a host of the lab with the product's own Python: ``onhost.py PART JSON``; prints one document.

Kills and upgrades lxcfs while readers in containers note how long each operation took, counts what the processes of the
product need, and protects many small daemons. Clocks: CLOCK_MONOTONIC is the containers', too.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from incus_fusecr.errors import FusecrError
from incus_fusecr.guard.client import Follower, status
from incus_fusecr.recovery.control import ask

LXCFS = "lxcfs"
EVERY = 0.2  # seconds: the windows of lxreader
WINDOW = 0.6  # of ours: three of these
LATER = 2  # windows after the first one: until a new spare is there
READY_SECONDS = 60.0
TICK = os.sysconf("SC_CLK_TCK")


# -- waiting


def wait_for(what: str, holds: Callable[[], Any], seconds: float = READY_SECONDS) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        if time.monotonic() > end:
            sys.exit(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)
    return found


def units() -> list[dict[str, Any]]:
    return list(ask({"op": "status"})["units"])


def control_of(link: dict[str, Any]) -> str:
    return f"/run/incus-fusecr/guard-{link['connection']}.sock"


def ready() -> dict[str, Any]:
    """lxcfs as it is when it and its spare serve, each with a guard whose sidecar has done INIT."""

    def look() -> dict[str, Any] | None:
        try:
            (unit,) = (u for u in units() if u["name"] == LXCFS)
        except (FusecrError, ValueError):
            return None
        links = {link["role"]: link for link in unit["connections"]}
        if unit["state"] != "protected" or not {"current", "spare"} <= set(links):
            return None
        try:
            found = [status(control_of(links[role]), 2.0) for role in ("current", "spare")]
        except OSError:
            return None
        return unit if all((s.get("phase"), s.get("ready")) == ("standby", "1") for s in found) else None

    return dict(wait_for("lxcfs is protected", look))


# -- what readers noted


def reports(places: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for place in places:
        for name in sorted(os.listdir(place)):
            if name.endswith(".json"):
                with open(f"{place}/{name}") as file:
                    yield f"{place}/{name}", json.load(file)


def longest(report: dict[str, Any], begin: float, end: float) -> float | None:
    """Milliseconds of the longest operation in the reader's windows that touch a time; None if it did nothing."""
    found, before = None, report["started"]
    for window_end, operations, _, max_us in report["windows"]:
        if window_end >= begin and before <= end and operations:
            found = max(found or 0.0, max_us / 1e3)
        before = window_end
    return found


def stalls(places: list[str], windows: list[tuple[float, float]]) -> list[float]:
    """Of each reader in each window; waits until the readers have noted what was last."""
    last = max(end for _, end in windows)

    def noted() -> bool:
        return all(r["windows"] and r["windows"][-1][0] > last for _, r in reports(places) if not r["unsupported"])

    wait_for("the readers write what they saw", noted)
    found = [longest(r, *w) for _, r in reports(places) for w in windows if not r["unsupported"]]
    return [value for value in found if value is not None]


def control_window() -> tuple[float, float]:
    """Passes, and then as much time that windows of readers which touch it do not touch what comes."""
    begin = time.monotonic()
    time.sleep(WINDOW + 2 * EVERY)
    return begin, begin + WINDOW


# -- parts


def crash(options: dict[str, Any]) -> dict[str, Any]:
    """``kills`` times."""
    result: dict[str, Any] = {"control": [], "stalls": [], "later": [], "serving_ms": [], "swapped_ms": [], "kills": 0}
    since = last_event()
    while result["kills"] < options["kills"]:
        ready()
        before = control_window()
        current = next(link for link in ready()["connections"] if link["role"] == "current")
        if time.monotonic() > before[1] + 3 * EVERY:
            continue  # the lab has started its own lxcfs meanwhile, which was adopted
        with Follower(control_of(current)) as follower:
            start, boot = time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME) * 1e3
            os.kill(current["daemon"], signal.SIGKILL)
            served = follower.wait_for("serving", 20)
        result["serving_ms"].append(max(0.0, served.boottime_ms - boot))
        later = [(start + number * WINDOW, start + (number + 1) * WINDOW) for number in range(1, LATER + 1)]
        time.sleep(max(0.0, later[-1][1] - time.monotonic()))
        result["control"] += stalls(options["places"], [before])
        result["stalls"] += stalls(options["places"], [(start, start + WINDOW)])
        result["later"] += stalls(options["places"], later)
        result["kills"] += 1
    ready()
    events = [event for event in all_events(since) if event["what"] == "swapped"]
    result["swapped_ms"] = [e["data"]["after_death_ms"] for e in events if "after_death_ms" in e["data"]]
    return result


def upgrade(options: dict[str, Any]) -> dict[str, Any]:
    """``upgrades`` times; the whole of each is looked at, in windows as long as the control's."""
    result: dict[str, Any] = {"control": [], "stalls": [], "seconds": [], "upgrades": 0}
    for _ in range(options["upgrades"]):
        ready()
        before = control_window()
        start = time.monotonic()
        done = ask({"op": "upgrade", "name": LXCFS, "exec": ""})
        end = time.monotonic()
        count = max(1, math.ceil((end - start) / WINDOW))
        windows = [(start + n * WINDOW, start + (n + 1) * WINDOW) for n in range(count)]
        time.sleep(max(0.0, windows[-1][1] - time.monotonic()))
        result["control"] += stalls(options["places"], [before])
        result["stalls"] += stalls(options["places"], windows)
        result["seconds"].append(done["seconds"])
        result["upgrades"] += 1
    ready()
    return result


def reads(options: dict[str, Any]) -> dict[str, Any]:
    """``rounds`` with and without protection in turn; microseconds that open, read and close of a container's file took.

    Medians: what else the machine does makes some reads long, not the typical one.
    """
    path = options["places"][0].removesuffix("/root") + "/proc/meminfo"
    found: dict[str, list[float]] = {"protected": [], "unprotected": []}
    for number in range(options["rounds"]):
        for kind in list(found) if number % 2 else list(found)[::-1]:
            if kind == "protected":
                ask({"op": "protect", "name": LXCFS})
                ready()
            else:
                ask({"op": "unprotect", "name": LXCFS})
            time.sleep(1)
            took, end = [], time.monotonic() + options["seconds"]
            while time.monotonic() < end:
                begin = time.perf_counter_ns()
                fd = os.open(path, os.O_RDONLY)
                os.read(fd, 8192)
                os.close(fd)
                took.append(time.perf_counter_ns() - begin)
            found[kind].append(sorted(took)[len(took) // 2] / 1e3)
    ask({"op": "protect", "name": LXCFS})
    ready()
    return {"microseconds": found}


def last_event() -> int:
    from incus_fusecr.recovery.events import read

    return max((event.number for event in read()), default=0)


def all_events(since: int) -> list[dict[str, Any]]:
    from incus_fusecr.recovery.events import read

    return [vars(event) for event in read() if event.number > since]


def idle(options: dict[str, Any]) -> dict[str, Any]:
    """What each kind of process needs while nothing happens, for ``seconds``."""
    time.sleep(2)
    before = {pid: (kind, switches(pid)) for kind, pid in processes()}
    start = time.monotonic()
    time.sleep(options["seconds"])
    took = time.monotonic() - start
    kinds: dict[str, dict[str, Any]] = {}
    for pid, (kind, switched) in before.items():
        try:
            more, (rss, pss) = switches(pid) - switched, memory(pid)
        except OSError:
            continue
        row = kinds.setdefault(kind, {"processes": 0, "rss_kb": 0, "pss_kb": 0, "wakeups_per_second": 0.0})
        row["processes"] += 1
        row["rss_kb"] += rss
        row["pss_kb"] += pss
        row["wakeups_per_second"] = round(row["wakeups_per_second"] + more / took, 3)
    return {"seconds": round(took, 1), "kinds": kinds}


def processes() -> list[tuple[str, int]]:
    """(kind, pid) of the agent, its zygote, the holder, guards, their sidecars, and fresh daemons."""
    agent = int(subprocess.run(["labctl", "pid", "agent"], capture_output=True, text=True, timeout=20, check=True).stdout)
    found = [("agent", agent)]
    guards = set()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/comm") as file:
                comm = file.read().strip()
        except OSError:
            continue
        if comm == "fusecr-guard":
            guards.add(int(name))
            found.append(("guards", int(name)))
        elif comm == "fusecr-holder":
            found.append(("holder", int(name)))
        elif comm == "fusecr-zygote" or (parent(name) == agent and comm != "fusecr-guard"):
            found.append(("zygote", int(name)))
    for name in os.listdir("/proc"):
        if name.isdigit() and parent(name) in guards:
            found.append(("sidecars", int(name)))
    spares = [unit["spare"] for unit in units() if unit["spare"]]
    return found + [("spares", pid) for pid in spares]


def parent(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def switches(pid: int) -> int:
    """Times its threads were put on a processor."""
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/status") as file:
            total += sum(int(line.split()[1]) for line in file if "ctxt_switches" in line)
    return total


def memory(pid: int) -> tuple[int, int]:
    """Resident, and the share of it that would be free without the process: kB."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        found = {line.split(":")[0]: int(line.split()[1]) for line in file if line.startswith(("Rss:", "Pss:"))}
    return found["Rss"], found["Pss"]


def many(options: dict[str, Any]) -> dict[str, Any]:
    """So many small daemons of ``program`` in each of ``containers`` are started and protected; returns when all are."""
    started, count = time.monotonic(), sum(options["containers"].values())
    for name, number in options["containers"].items():
        daemon = f"{options['program']} -f -o modules=subdir,subdir=/srv,allow_other /mnt/$i"
        script = f"mkdir -p /srv; i=0; while [ $i -lt {number} ]; do mkdir -p /mnt/$i; setsid {daemon} & i=$((i+1)); done"
        command = ["incus", "exec", "-T", name, "--", "sh", "-c", f"({script}) </dev/null >/dev/null 2>&1"]
        subprocess.run(command, timeout=120, check=True, stdin=subprocess.DEVNULL)

    def protected() -> list[dict[str, Any]]:
        found = [u for u in units() if u["name"].startswith("small") and u["state"] == "protected"]
        return found if len(found) == count else []

    found = wait_for("all are protected", protected, 300)
    mounted = time.monotonic() - started
    dead = found[len(found) // 2]
    os.kill(dead["pid"], signal.SIGKILL)
    wait_for(
        "one that was killed is back",
        lambda: next((u for u in protected() if u["name"] == dead["name"] and u["pid"] != dead["pid"]), None),
    )
    wait_for("its old connection ends", lambda: all(len(u["connections"]) == 1 for u in protected() if u["name"] == dead["name"]))
    return {"count": len(found), "seconds": round(mounted, 1)}


def end_many(options: dict[str, Any]) -> dict[str, Any]:
    """End them with their containers."""
    for name in options["containers"]:
        subprocess.run(["incus", "delete", "-f", name], timeout=120, check=False, capture_output=True, stdin=subprocess.DEVNULL)
    wait_for("their units end", lambda: not [unit for unit in units() if unit["name"].startswith("small")])
    return {}


if __name__ == "__main__":
    parts = {
        "crash": crash,
        "upgrade": upgrade,
        "reads": reads,
        "idle": idle,
        "many": many,
        "end_many": end_many,
        "ready": lambda _: ready(),
    }
    print(json.dumps(parts[sys.argv[1]](json.loads(sys.argv[2]))))
