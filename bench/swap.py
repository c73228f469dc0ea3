# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.swap``, as root: how long the swap of all mounts of a host takes, by its parts.

Makes containers (mount namespaces with so many mounts each, some of them binds of an old FUSE daemon), swaps them to a fresh
one and back, and prints the times of each swap. Nothing of the machine is touched: all of it is in namespaces of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(REPO / "tests" / "workload"), str(REPO / "tests" / "integration")]

from sandbox import Sandbox  # noqa: E402
from swapbox import SwapBox  # noqa: E402

from incus_fusecr.drill.stalls import longest  # noqa: E402
from incus_fusecr.recovery.swap import THREADS, Report  # noqa: E402

# One process that makes a container's mounts, and then as many copies of its namespace as are wanted.
MAKE = """
import ctypes, os, signal, subprocess, sys
libc = ctypes.CDLL(None)
tree, place, count, mounts, binds = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
def sh(command): subprocess.run(command, shell=True, check=True)
sh(f"mkdir -p {place} && mount -t tmpfs ct {place}")
for n in range(binds):
    sh(f": > {place}/bind{n}; mount --bind {tree}/file{n} {place}/bind{n}")
sh(f"umount -l {tree}")
have = len(open('/proc/self/mountinfo').readlines())
for n in range(mounts - have):
    sh(f"mkdir {place}/other{n}; mount -t tmpfs other {place}/other{n}")
for n in range(count):
    if os.fork() == 0:
        assert libc.unshare(0x20000) == 0
        os.write(1, b"+")
        while True:
            signal.pause()
print(len(open('/proc/self/mountinfo').readlines()), flush=True)
os.execvp("sleep", ["sleep", "infinity"])
"""

# A client in a namespace of its own: when each read of a file began, and how long it took (ns of CLOCK_MONOTONIC); -1: an error.
READ = """
import sys, time
path, stop = sys.argv[1:]
while True:
    began = time.monotonic_ns()
    try:
        with open(path, "rb", buffering=0) as file:
            good = bool(file.read(100))
    except OSError:
        good = False
    took = time.monotonic_ns() - began
    print(began, took if good else -1, flush=True)
    try:
        open(stop).close()
        break
    except OSError:
        time.sleep(0.002)
"""


@contextlib.contextmanager
def opened(namespaces: int, mounts: int, binds: int) -> Iterator[tuple[SwapBox, int]]:
    """Two daemons and so many namespaces; (the box, mounts in each namespace)."""
    with contextlib.ExitStack() as undo:
        box = Sandbox.open()
        undo.callback(box.close)
        made = SwapBox.open(undo, box)
        for daemon in (made.old, made.fresh):
            for number in range(binds):
                Path(f"/proc/{box.init}/root{daemon.backing}/file{number}").write_text("text\n")
        command = [sys.executable, "-c", MAKE, str(made.old.mountpoint), str(box.directory / "ct")]
        numbers = [str(n) for n in (namespaces - 1, mounts, binds)]
        maker = box.popen(["unshare", "--mount", "--propagation", "private", *command, *numbers], stdout=subprocess.PIPE)
        assert maker.stdout
        ready, line = 0, b""
        while ready < namespaces - 1 or not line.endswith(b"\n"):
            some = os.read(maker.stdout.fileno(), 4096)
            assert some, "the namespaces were not made"
            ready += some.count(b"+")
            line += some.replace(b"+", b"")
        yield made, int(line)


def swaps(made: SwapBox, rounds: int, threads: int, pause: float = 0.0) -> Iterator[tuple[Report, float, float]]:
    """To the fresh daemon and back; (report, begin, end) of each, CLOCK_MONOTONIC in seconds.

    :param pause: in units of the last swap's length, before each
    """
    swapper = made.swapper(threads=threads)
    ahead, back = made.tree, made.reverse()
    took = 1.0
    for number in range(rounds):
        time.sleep(pause * took)
        old, fresh = (made.fresh, back) if number % 2 else (made.old, ahead)
        begin = time.monotonic()
        report = swapper.swap(made.devices(old), fresh, made.host)
        end = time.monotonic()
        took = end - begin
        assert report.finished and not report.errors and not report.remaining, report
        yield report, begin, end


def measure(namespaces: int, mounts: int, binds: int, rounds: int) -> dict[str, Any]:
    """Swaps while a client reads; its longest operation in each, and in as long a time before each.

    :returns: ``seconds`` of each swap, ``stalls`` and ``control`` in milliseconds, ``errors`` of the client
    """
    found: dict[str, Any] = {"namespaces": namespaces, "mounts": mounts, "binds": binds, "seconds": [], "stalls": [], "control": []}
    windows = []
    with opened(namespaces, mounts, binds) as (made, _), tempfile.TemporaryDirectory() as directory:
        client = made.container()
        client.binds(made.old.mountpoint, "file0")
        stop = Path(f"/proc/{made.box.init}/root{made.box.directory}/stop")
        output = Path(directory) / "operations"
        with output.open("wb") as file:
            enter = ["nsenter", "--target", str(client.pid), "--mount", "--pid", "--wd=/", "--"]
            words = [sys.executable, "-c", READ, str(client.place / "file0"), str(made.box.directory / "stop")]
            reader = subprocess.Popen([*enter, *words], stdin=subprocess.DEVNULL, stdout=file)
            made.box.children.append(reader)
            for _report, begin, end in swaps(made, rounds, THREADS, pause=1.5):
                found["seconds"].append(end - begin)
                windows.append((begin, end))
            stop.touch()
            reader.wait(30)
        operations = [(int(a), int(b)) for a, b in (line.split() for line in output.read_text().splitlines())]
    found["errors"] = sum(took < 0 for _, took in operations)
    found["operations"] = len(operations)
    for begin, end in windows:
        for key, window in (("stalls", (begin, end)), ("control", (begin - (end - begin) * 1.2, begin - (end - begin) * 0.2))):
            worst = longest(operations, (int(window[0] * 1e9), int(window[1] * 1e9)))
            if worst is not None:
                found[key].append(worst / 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.swap", description="Times of the swap of all mounts.")
    parser.add_argument("--namespaces", type=int, default=300)
    parser.add_argument("--mounts", type=int, default=34, help="in each namespace")
    parser.add_argument("--binds", type=int, default=9, help="of these from the daemon")
    parser.add_argument("--threads", type=int, nargs="+", default=[THREADS])
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    with opened(options.namespaces, options.mounts, options.binds) as (made, mounts):
        print(f"{options.namespaces} namespaces of {mounts} mounts, {options.binds} of the daemon; {os.cpu_count()} processors")
        for threads in options.threads:
            parts: dict[str, list[float]] = {}
            for report, _, _ in swaps(made, options.rounds, threads):
                for name, seconds in report.seconds.items():
                    parts.setdefault(name, []).append(seconds * 1e3)
            done = " ".join(f"{name} {count}" for name, count in report.done.items())
            print(f"{threads} threads: {done}, {report.passes} passes; milliseconds, median (and worst) of {options.rounds}:")
            print("  " + ", ".join(f"{name} {statistics.median(v):.0f} ({max(v):.0f})" for name, v in parts.items()))


if __name__ == "__main__":
    main()
