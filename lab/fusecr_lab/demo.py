# SPDX-License-Identifier: Apache-2.0
"""`lab demo`: a container whose sshfs and bindfs are being read and written moves from h1 to h2 and back; its clients count
what they see."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from typing import Any

from .errors import LabError
from .incus import LAUNCHER, REPO
from .run import progress, run
from .state import Lab

NAME = "demo"
MODES = ("reader", "writer", "append", "dirs", "cwd")
# Files that come and go faster than rsync walks the tree make Incus give a copy up (rsync's exit code 24)
PACE_MS = {"dirs": 500}
MOUNTS = {"sshfs": "/mnt", "bindfs": "/media"}
CLIENTS = [f"{daemon}-{mode}" for daemon in MOUNTS for mode in MODES]
HOPS = (("h1", "h2"), ("h2", "h1"))
WORKLOAD = REPO / "tests" / "workload"
PLACE = "/opt/workload"  # outside of the file systems under test
REPORTS = "/root/reports"
# setsid: CRIU refuses a task whose session leader is outside of the container, as `incus exec` is; in the foreground (-f), as
# a unit of systemd would have it: sshfs' ssh stays in the session of whoever started it
START_CLIENTS = f"""mkdir -p {PLACE} {REPORTS} /srv/bound
tar -C {PLACE} -xf -
setsid sshfs -f localhost:/srv {MOUNTS['sshfs']} </dev/null >{REPORTS}/sshfs.log 2>&1 &
setsid bindfs -f /srv/bound {MOUNTS['bindfs']} </dev/null >{REPORTS}/bindfs.log 2>&1 &
for M in {' '.join(MOUNTS.values())}; do
  for i in $(seq 300); do mountpoint -q $M && break; sleep 0.1; done
  mountpoint -q $M || {{ cat {REPORTS}/*fs.log; exit 1; }}
done
start() {{
  DAEMON=$1 MODE=$2 MOUNT=$3; shift 3
  setsid python3 {PLACE}/fsclient.py $MODE $MOUNT {REPORTS}/$DAEMON-$MODE.json "$@" </dev/null >{REPORTS}/$DAEMON-$MODE.log 2>&1 &
}}
""" + "\n".join(f"start {daemon} {mode} {path}" + (f" --pace-ms {PACE_MS[mode]}" if mode in PACE_MS else "")
                for daemon, path in MOUNTS.items() for mode in MODES) + "\n"
BOOTED = """for i in $(seq 300); do
  case $(systemctl is-system-running 2>&1) in running) exit 0;; degraded) systemctl --failed; exit 1;; esac
  sleep 0.1
done
systemctl list-jobs; exit 1
"""
# [f]: the pattern must not match the shell that it stands in
STOP_CLIENTS = f"""pkill -TERM -f {PLACE}/[f]sclient.py
for i in $(seq 100); do pgrep -f {PLACE}/[f]sclient.py >/dev/null || break; sleep 0.1; done
python3 {PLACE}/check.py summary {REPORTS}/*.json
"""
READ_REPORTS = (f"import glob, json, os; print(json.dumps({{os.path.basename(p)[:-5]: json.load(open(p)) "
                f"for p in sorted(glob.glob('{REPORTS}/*.json'))}}))")


def host(lab_host: str, *argv: str) -> list[str]:
    """A command in a host of the lab."""
    return [sys.executable, str(LAUNCHER), "exec", lab_host, "--", *argv]


def inside(lab_host: str, *argv: str) -> list[str]:
    """A command in the demo's container."""
    return host(lab_host, "incus", "exec", NAME, "--", *argv)


def workload() -> bytes:
    """The clients as a tar."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for path in sorted(WORKLOAD.glob("*.py")):
            tar.add(path, path.name)
    return data.getvalue()


def reports(lab_host: str) -> dict[str, dict[str, Any]]:
    """What each client has reported, by its name in CLIENTS."""
    found: dict[str, dict[str, Any]] = json.loads(run("read the clients' reports",
                                                      inside(lab_host, "python3", "-c", READ_REPORTS)))
    return found


def wait_for_clients(lab_host: str, more_than: Mapping[str, int], timeout: float) -> dict[str, dict[str, Any]]:
    """Wait until every client has reported more operations than given."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            seen = reports(lab_host)
        except LabError:
            if time.monotonic() > deadline:
                raise
            seen = {}
        if all(c in seen and seen[c]["operations"] > more_than[c] for c in CLIENTS):
            return seen
        if time.monotonic() > deadline:
            counts = {c: seen[c]["operations"] if c in seen else None for c in CLIENTS}
            raise LabError(f"the clients on {lab_host} do not go on: {timeout:g} s later their operations are {counts}, "
                           f"not more than {dict(more_than)}; their logs are in {REPORTS} of the container")
        time.sleep(0.2)


def placed() -> dict[str, str]:
    """The state of the demo's container on each host that has it."""
    found = {}
    for name in ("h1", "h2"):
        out = run("list instances", host(name, "incus", "list", "-f", "csv", "-c", "ns", f"^{NAME}$"))
        states = [line.split(",")[1] for line in out.splitlines() if line.startswith(f"{NAME},")]
        if states:
            found[name] = states[0]
    return found


def run_demo(lab: Lab) -> int:
    """Run the demo on a lab that is up; return 0 if the container moved both ways and no client saw an error."""
    for name in placed():
        run("remove an earlier demo", host(name, "incus", "delete", "-f", NAME))
    try:
        return _demo()
    finally:
        for name in placed():
            run("remove the demo's container", host(name, "incus", "delete", "-f", NAME))


def _demo() -> int:
    progress("h1: launching a Debian container with systemd, sshd, sshfs and bindfs")
    run("launch the container", host("h1", "incus", "launch", "-q", "debian", NAME, "-p", "default", "-p", "fusecr"))
    run("boot the container", inside("h1", "sh", "-c", BOOTED), timeout=60)
    where = ", ".join(f"{daemon} on {path}" for daemon, path in MOUNTS.items())
    progress(f"h1: mounting {where}; on each, {len(MODES)} clients begin to work: {', '.join(MODES)}")
    run("start the mounts and their clients", inside("h1", "sh", "-ec", START_CLIENTS), stdin=workload(), timeout=60)
    seen = wait_for_clients("h1", dict.fromkeys(CLIENTS, 20), 60)
    for source, target in HOPS:
        seen = _hop(source, target, seen)
    return _judge(HOPS[-1][1])


def _hop(source: str, target: str, before: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Migrate once, and see every client go on."""
    done = sum(r["operations"] for r in before.values())
    progress(f"{source}: {done} operations so far; now: incus-fusecr migrate {NAME} {target}:")
    sys.stdout.flush()
    moved = subprocess.run(host(source, "incus-fusecr", "migrate", NAME, f"{target}:"), stdin=subprocess.DEVNULL, check=False)
    if moved.returncode:
        raise LabError(f"incus-fusecr migrate {NAME} {target}: on {source} ended with exit code {moved.returncode}; "
                       f"the container is now: {placed()}")
    progress(f"{target}: the clients go on; incus-fusecr list:")
    seen = wait_for_clients(target, {c: before[c]["operations"] + 20 for c in CLIENTS}, 60)
    subprocess.run(host(target, "incus-fusecr", "list"), stdin=subprocess.DEVNULL, check=False)
    return seen


def _judge(last: str) -> int:
    """End the clients; print what they counted; 0 if nothing went wrong.

    :raises LabError: something did
    """
    done = subprocess.run(inside(last, "sh", "-c", STOP_CLIENTS), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=60, check=False)
    after = reports(last)
    print(f"\n{'client':14} {'operations':>10} {'errors':>7} {'longest gap':>12}")
    for client in CLIENTS:
        report = after[client]
        print(f"{client:14} {report['operations']:10} {report['errors']:7} {report['longest_gap_ms']:9.0f} ms")
    for daemon in MOUNTS:
        detail = after[f"{daemon}-append"]["detail"]
        lines = int(detail["lines"])
        log = json.loads(run("look at the append log", inside(last, "python3", f"{PLACE}/check.py", "append", detail["log"],
                                                              "--lines", str(lines))))
        print(f"append log on {daemon}: {lines} lines, " + ", ".join(f"{count} {what}" for what, count in log.items()))
    operations, errors = (sum(int(r[key]) for r in after.values()) for key in ("operations", "errors"))
    where = placed()
    print(f"{operations} operations, {errors} errors; the container is now: "
          + ", ".join(f"{name} {state}" for name, state in where.items()), flush=True)
    if done.returncode or errors or where != {last: "RUNNING"}:
        raise LabError(f"the demo did not go as it should:\n{done.stdout}")
    return 0
