# SPDX-License-Identifier: Apache-2.0
"""What the death and the upgrade of lxcfs cost the containers, and what its protection costs: ``bench/run recovery``.

Each part has its control in the same run on the same machine: windows just before each kill, rounds without protection
between rounds with it. Ratios are what counts; milliseconds depend on the machine and its other work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import box, recovery_report, swap
from .box import REPO, BenchError
from .migrate import machine

PYTHON = "/opt/incus-fusecr/bin/python"
MODES = ("loop", "held", "cwd", "dirs", "poll")
LIMITS = {"small": (256, 1, "false"), "big": (512, 2, "true"), "third": (384, 2, "false")}  # MiB, processors, privileged
SMALL = "passthrough_fh"
CONFIG = f"""[daemon lxcfs]
restart-burst = 1000
breaker-failures = 1000
backoff = 10ms
backoff-max = 100ms
[daemon small]
exe = {SMALL}
where = containers
"""
EACH = 40  # daemons of a container
READ_SECONDS = 2.0


class Bench:
    """A host of its own with three limited containers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.places: list[str] = []

    def __enter__(self) -> Bench:
        if os.geteuid() != 0:
            raise BenchError("the lab needs root; run it with sudo")
        box.lab("up", "--hosts", "1", "--cgroup", "v1")
        try:
            self._prepare()
        except BaseException:
            box.lab("down")
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        box.lab("down")

    def sh(self, script: str, stdin: bytes = b"", timeout: float = box.COMMAND_SECONDS) -> str:
        return box.on("h1", "sh", "-ec", script, stdin=stdin, timeout=timeout).text

    def part(self, name: str, timeout: float, **options: Any) -> dict[str, Any]:
        """A part of onhost.py on the host."""
        words = [PYTHON, "/root/onhost.py", name, json.dumps({"places": self.places, **options})]
        found: dict[str, Any] = json.loads(box.on("h1", *words, timeout=timeout).text)
        return found

    def _prepare(self) -> None:
        self.sh(
            f"mkdir -p /etc/incus-fusecr; printf %s {shlex.quote(CONFIG)} >/etc/incus-fusecr/daemons.conf; labctl restart agent"
        )
        self.sh("cat >/root/onhost.py", stdin=Path(__file__).with_name("onhost.py").read_bytes())
        with tempfile.TemporaryDirectory() as directory:
            output = Path(directory) / "lxreader"
            sources = [str(REPO / "tests" / "workload" / f"{name}.c") for name in ("lxreader", "lxreader-lib")]
            subprocess.run(["gcc", "-O2", "-static", "-o", str(output), *sources, "-lm"], check=True, timeout=120)
            self.sh("cat >/root/lxreader; chmod 755 /root/lxreader", stdin=output.read_bytes())
        self.part("ready", 120)
        cpus = os.cpu_count() or 1
        for name, (mib, wanted, privileged) in LIMITS.items():
            limits = f"-c limits.memory={mib}MiB -c limits.cpu={min(wanted, cpus)} -c security.privileged={privileged}"
            self.sh(f"incus launch -q busybox {name} {limits} </dev/null; incus file push -q /root/lxreader {name}/root/lxreader")
        for instance in json.loads(self.sh("incus list -f json")):
            self.places.append(f"/proc/{instance['state']['pid']}/root/root")

    def start_readers(self) -> None:
        cpus = os.cpu_count() or 1
        for name, (mib, wanted, _) in LIMITS.items():
            values = f"--mem {mib * 1024} --cpus {min(wanted, cpus)} --detach"
            readers = "; ".join(f"/root/lxreader {mode} /root/{mode}.json /root/stop {values}" for mode in MODES)
            self.sh(f"incus exec {name} -- sh -c {shlex.quote('rm -f /root/stop; ' + readers)}")
        time.sleep(2)

    def end_readers(self) -> dict[str, Any]:
        """What they noticed."""
        script = "import glob, json, sys\n" + (
            "found = [json.load(open(f)) for place in sys.argv[1:] for f in glob.glob(place + '/*.json')]\n"
            "print(json.dumps({'readers': len(found), 'finished': sum(r['finished'] for r in found),\n"
            "    'operations': sum(r['operations'] for r in found), 'errors': sum(r['errors'] + r['wrong'] for r in found),\n"
            "    'texts': [t for r in found for t in r['texts']][:20]}))"
        )
        for name in LIMITS:
            self.sh(f"incus exec {name} -- touch /root/stop")
        end = time.monotonic() + 30
        while True:
            found: dict[str, Any] = json.loads(box.on("h1", "python3", "-c", script, *self.places).text)
            if found["finished"] == found["readers"] or time.monotonic() > end:
                break
            time.sleep(0.2)
        self.sh("; ".join(f"incus exec {name} -- sh -c 'rm -f /root/*.json /root/stop'" for name in LIMITS))
        return found

    # -- parts

    def crash(self) -> dict[str, Any]:
        return self._read_while("crash", 60 + 10.0 * self.options.kills, kills=self.options.kills)

    def upgrade(self) -> dict[str, Any]:
        return self._read_while("upgrade", 60 + 20.0 * self.options.upgrades, upgrades=self.options.upgrades)

    def _read_while(self, part: str, timeout: float, **options: Any) -> dict[str, Any]:
        self.start_readers()
        try:
            found = self.part(part, timeout, **options)
        finally:
            readers = self.end_readers()
        return {**found, "readers": readers}

    def reads(self) -> dict[str, Any]:
        return self.part("reads", 120 + 20.0 * self.options.rounds, rounds=self.options.rounds, seconds=READ_SECONDS)

    def idle(self) -> dict[str, Any]:
        self.part("ready", 120)
        return self.part("idle", 180, seconds=self.options.seconds)

    def many(self) -> dict[str, Any]:
        """Small daemons in containers of their own."""
        with tempfile.TemporaryDirectory() as directory:
            program = Path(directory) / SMALL
            command = [sys.executable, str(REPO / "tests" / "workload" / "daemons.py"), "build", SMALL, str(program)]
            subprocess.run(command, check=True, timeout=120)
            self.sh(f"cat >/root/{SMALL}; chmod 755 /root/{SMALL}", stdin=program.read_bytes())
        wanted = self.options.connections
        counts = {f"m{first // EACH}": min(EACH, wanted - first) for first in range(0, wanted, EACH)}
        for name in counts:
            self.sh(f"incus launch -q busybox {name} </dev/null; incus file push -q /root/{SMALL} {name}/root/{SMALL}")
        try:
            made = self.part("many", 600, program=f"/root/{SMALL}", containers=counts)
            found = self.part("idle", 180, seconds=self.options.seconds)
        finally:
            self.part("end_many", 300, containers=list(counts))
        return {**made, **found, "settled_seconds": made["seconds"]}


def measure_swap(options: argparse.Namespace) -> dict[str, Any]:
    """Not in the lab: in a sandbox on this machine."""
    return swap.measure(namespaces=options.namespaces, mounts=34, binds=9, rounds=options.swaps)


LAB_PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "crash": Bench.crash, "upgrade": Bench.upgrade, "reads": Bench.reads, "idle": Bench.idle, "many": Bench.many,
}  # fmt: skip
PARTS = ("swap", *LAB_PARTS)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="bench recovery", description=__doc__)
    found.add_argument("--parts", default=",".join(PARTS), help=f"with commas (default {','.join(PARTS)})")
    found.add_argument("-n", "--repetitions", type=int, default=1, help="of all parts in turn; medians are shown (default 1)")
    found.add_argument("--kills", type=int, default=100)
    found.add_argument("--upgrades", type=int, default=20)
    found.add_argument("--rounds", type=int, default=12, help="of reads with and without protection (default 12)")
    found.add_argument("--seconds", type=float, default=30, help="without anything to do (default 30)")
    found.add_argument("--connections", type=int, default=200)
    found.add_argument("--namespaces", type=int, default=300)
    found.add_argument("--swaps", type=int, default=6)
    found.add_argument("--json", metavar="FILE", help="where the document goes (default bench/results/recovery-DATE.json)")
    return found


def main(argv: Sequence[str]) -> int:
    """Measure; print the tables; 0 if nothing failed and no client saw an error. Targets that are missed are shown."""
    args = parser().parse_args(argv)
    os.environ.setdefault("FUSECR_LAB", "benchrec")
    wanted = args.parts.split(",")
    if unknown := sorted(set(wanted) - set(PARTS)):
        print(f"Error: no part {', '.join(unknown)}; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    before = machine()
    found: dict[str, list[dict[str, Any]]] = {}
    failed: list[str] = []
    with contextlib.ExitStack() as undo:
        lab: Bench | None = None
        for number in range(args.repetitions):
            for part in wanted:
                print(f"bench: {part}, {number + 1} of {args.repetitions}", file=sys.stderr, flush=True)
                try:
                    if part != "swap" and lab is None:
                        lab = undo.enter_context(Bench(args))
                    result = measure_swap(args) if lab is None or part == "swap" else LAB_PARTS[part](lab)
                    found.setdefault(part, []).append({**result, "load": os.getloadavg()[0]})
                except (BenchError, OSError, subprocess.SubprocessError, AssertionError) as error:
                    failed.append(f"{part}: {error}")
                    print(f"bench: {part}: {error}", file=sys.stderr, flush=True)
    summary = recovery_report.summarize(found)
    name = time.strftime("recovery-%Y%m%d-%H%M%S.json", time.gmtime())
    path = Path(args.json) if args.json else REPO / "bench" / "results" / name
    document = {"version": 1, "machine": before, "load_after": list(os.getloadavg()), "summary": summary, "runs": found}
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(recovery_report.text(summary))
    print(f"{path}")
    failed += recovery_report.errors(found)
    for text in failed:
        print(f"Error: {text}", file=sys.stderr)
    return 1 if failed else 0
