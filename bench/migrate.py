# SPDX-License-Identifier: Apache-2.0
"""How long a container stands still, in each way to move it or to save and continue it. All ways in turn, N times."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import box, report
from .box import NAME, BenchError, Output


@dataclass
class Run:
    """One container, moved once.

    :ivar frozen: longest time in which nothing ran inside, as a process in it saw it, seconds
    :ivar total: of the command, seconds
    :ivar reported: frozen time as ``incus-fusecr`` reports it, seconds; None for other commands
    :ivar parts: of the reported time, seconds
    :ivar carried: handles of FUSE files
    """

    driver: str
    size: int
    way: str
    number: int
    root_bytes: int = 0
    frozen: float | None = None
    total: float | None = None
    reported: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    carried: int = 0
    clients: dict[str, Any] = field(default_factory=dict)
    failed: str = ""


def _migrate(run: Run) -> tuple[str, Output]:
    done = box.on("h1", "incus-fusecr", "-q", "migrate", NAME, "h2:", "-f", "json")
    found = json.loads(done.text)
    run.reported = float(found["frozen_seconds"])
    run.parts = {str(k): float(v) for k, v in found["frozen_parts"].items()}
    run.carried = int(found["handles"])
    return "h2", done


def _move(run: Run) -> tuple[str, Output]:
    return "h2", box.on("h1", "incus", "move", NAME, "h2:")


def _stop_start(run: Run) -> tuple[str, Output]:
    stop = box.on("h1", "incus", "stop", "--stateful", NAME)
    start = box.on("h1", "incus", "start", NAME)
    run.parts = {"incus stop --stateful": stop.seconds, "incus start": start.seconds}
    return "h1", Output("", stop.seconds + start.seconds, stop.began)


@dataclass(frozen=True)
class Way:
    """A way to move a container: whether an sshfs is at work in it, and what to run (returns where it is then)."""

    name: str
    fuse: bool
    do: Callable[[Run], tuple[str, Output]]


WAYS = [
    Way("incus-fusecr migrate, sshfs inside", True, _migrate),
    Way("incus-fusecr migrate, no FUSE", False, _migrate),
    Way("incus move, no FUSE", False, _move),
    Way("incus stop --stateful and start, sshfs inside", True, _stop_start),
    Way("incus stop --stateful and start, no FUSE", False, _stop_start),
]


def measure(run: Run, way: Way) -> None:
    """Make a container, move it, look; a failure is part of the result."""
    try:
        run.root_bytes = box.make("h1", run.size, fuse=way.fuse)
        host, done = way.do(run)
        if way.fuse and run.reported is not None and not run.carried:
            raise BenchError("nothing of FUSE was carried over")
        run.total = done.seconds
        run.frozen = box.longest_gap(host, done.began)
        if way.fuse:
            run.clients = box.client_errors(host)
    except BenchError as error:
        run.failed = str(error)
    finally:
        try:
            box.remove()
        except BenchError as error:
            run.failed = run.failed or f"removing it: {error}"


def plan(drivers: Sequence[str], sizes: Sequence[int], repetitions: int) -> Iterator[tuple[str, list[tuple[int, int, Way]]]]:
    """Drivers, and the runs on each: the ways take turns, so that a slow hour of the machine meets them all."""
    for driver in drivers:
        yield driver, [(number, size, way) for number in range(repetitions) for size in sizes for way in WAYS]


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load": list(os.getloadavg()),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="bench", description=__doc__)
    found.add_argument("-n", "--repetitions", type=int, default=5, help="of each way (default 5)")
    found.add_argument("--drivers", default="dir,btrfs", help="storage drivers, with commas (default dir,btrfs)")
    found.add_argument("--sizes", default="500,1000", help="of the root file system, MiB (default 500,1000)")
    found.add_argument("--json", metavar="FILE", help="where the document goes (default bench/results/DATE.json)")
    found.add_argument("--max-ratio", type=float, metavar="R", help="exit code 1 if on dir, at the first size, the frozen time "
                       "of the first way is more than R of plain incus move's")
    return found


def main(argv: Sequence[str]) -> int:
    """Measure; print the tables; 0 if everything worked, no client saw an error, and --max-ratio holds."""
    args = parser().parse_args(argv)
    os.environ.setdefault("FUSECR_LAB", "bench")
    drivers = args.drivers.split(",")
    sizes = [int(size) for size in args.sizes.split(",")]
    before = machine()
    runs: list[Run] = []
    try:
        for driver, todo in plan(drivers, sizes, args.repetitions):
            with box.LabOf(driver):
                for done, (number, size, way) in enumerate(todo, 1):
                    print(f"bench: {driver} {done}/{len(todo)}: {size} MiB, {way.name}", file=sys.stderr, flush=True)
                    run = Run(driver, size, way.name, number)
                    runs.append(run)
                    measure(run, way)
                    outcome = f"failed: {run.failed}" if run.failed else f"frozen {run.frozen:.3f} s, total {run.total:.3f} s"
                    print(f"bench: {outcome}", file=sys.stderr, flush=True)
    except BenchError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    summary = report.summarize([asdict(run) for run in runs], [way.name for way in WAYS])
    path = Path(args.json) if args.json else box.REPO / "bench" / "results" / time.strftime("%Y%m%d-%H%M%S.json", time.gmtime())
    document = {"version": 1, "machine": before, "load_after": list(os.getloadavg()), **summary,
                "runs": [asdict(run) for run in runs]}
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(report.text(summary))
    print(f"{path}")
    return verdict(runs, summary, args.max_ratio, drivers, sizes)


def verdict(runs: list[Run], summary: dict[str, Any], limit: float | None, drivers: list[str], sizes: list[int]) -> int:
    """The exit code, and on standard error why it is not 0."""
    wrong = [f"{r.driver} {r.size} MiB, {r.way}: {r.failed}" for r in runs if r.failed]
    wrong += [f"{r.driver} {r.size} MiB, {r.way}: clients: {r.clients}" for r in runs if r.clients.get("errors")]
    if limit is not None and "dir" in drivers:
        ratio = next((x["ratio"] for x in summary["ratios"] if x["driver"] == "dir" and x["size"] == sizes[0]), None)
        if ratio is None or ratio > limit:
            wrong.append(f"ratio to plain incus move on dir, {sizes[0]} MiB: {ratio}, wanted at most {limit}")
    for text in wrong:
        print(f"Error: {text}", file=sys.stderr)
    return 1 if wrong else 0
