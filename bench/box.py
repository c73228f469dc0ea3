# SPDX-License-Identifier: Apache-2.0
"""The container under test, and the lab that it is in."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
LAUNCHER = REPO / "lab" / "lab"
NAME = "bench"
PLACE = "/opt/bench"
TICKS = "/root/ticks"
COMMAND_SECONDS = 180.0
# Not systemd: a plain `incus move` restores its cgroups with owners that CRIU then refuses, and it is what we compare with.
INIT = "#!/bin/sh\nmkdir -p /run/sshd\nip link set lo up\nexec busybox init\n"
INITTAB = "::sysinit:/bin/true\n"
FILL = """import os, subprocess, sys
wanted = int(sys.argv[1]) << 20
used = int(subprocess.run(["du", "-sxb", "/"], capture_output=True, text=True).stdout.split()[0])
os.makedirs("/var/fill")
number = 0
while used < wanted:
    size = min(4 << 20, wanted - used)
    with open(f"/var/fill/{number}", "wb") as file:
        file.write(os.urandom(size))
    number, used = number + 1, used + size
os.sync()
print(used)
"""
CLIENTS = ("reader", "append")
# setsid: CRIU refuses a task whose session leader, here `incus exec`, is outside of the container.
START_FUSE = f"""/usr/sbin/sshd
setsid sshfs -f localhost:/srv /mnt </dev/null >/root/sshfs.log 2>&1 &
for i in $(seq 300); do mountpoint -q /mnt && break; sleep 0.1; done
mountpoint -q /mnt || {{ echo "no sshfs on /mnt:"; cat /root/sshfs.log; exit 1; }}
for M in {' '.join(CLIENTS)}; do
  setsid python3 {PLACE}/fsclient.py $M /mnt /root/$M.json </dev/null >/root/$M.log 2>&1 &
done
for i in $(seq 300); do
  [ -e /root/{CLIENTS[0]}.json ] && [ -e /root/{CLIENTS[1]}.json ] && exit 0
  sleep 0.1
done
echo "the clients did not start:"; cat /root/*.log; exit 1
"""
# [f]: the pattern must not match the shell that it stands in
STOP_FUSE = f"""pkill -TERM -f {PLACE}/[f]sclient.py
for i in $(seq 100); do pgrep -f {PLACE}/[f]sclient.py >/dev/null || break; sleep 0.1; done
python3 {PLACE}/check.py summary {' '.join(f'/root/{m}.json' for m in CLIENTS)} || true
"""


class BenchError(Exception):
    """A step failed; the text names it, its command and its last output."""


@dataclass
class Output:
    """What a command printed, and how long it took (seconds); ``began`` by CLOCK_REALTIME."""

    text: str
    seconds: float
    began: float


def command(argv: Sequence[str], *, stdin: bytes = b"", timeout: float = COMMAND_SECONDS) -> Output:
    """Run to the end.

    :param timeout: seconds
    :raises BenchError: it failed or overran
    """
    shown = " ".join(argv)[:300]
    began, start = time.time(), time.monotonic()
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{shown}: not finished after {timeout:g} s") from None
    seconds = time.monotonic() - start
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    if done.returncode:
        raise BenchError(f"{shown}: exit code {done.returncode}: {(err or out).strip()[-600:]}")
    return Output(out, seconds, began)


def lab(*argv: str, timeout: float = 1200) -> str:
    """A command of the lab."""
    return command([sys.executable, str(LAUNCHER), *argv], timeout=timeout).text


def on(host: str, *argv: str, stdin: bytes = b"", timeout: float = COMMAND_SECONDS) -> Output:
    """A command on a host of the lab."""
    return command([sys.executable, str(LAUNCHER), "exec", host, "--", *argv], stdin=stdin, timeout=timeout)


def inside(host: str, *argv: str, stdin: bytes = b"") -> str:
    """A command in the container under test."""
    return on(host, "incus", "exec", NAME, "--", *argv, stdin=stdin).text


def _files() -> bytes:
    data = io.BytesIO()
    workload = REPO / "tests" / "workload"
    with tarfile.open(fileobj=data, mode="w") as tar:
        for path in [*sorted(workload.glob("*.py")), Path(__file__).with_name("ticker.py")]:
            tar.add(path, path.name)
    return data.getvalue()


def make(host: str, size: int, *, fuse: bool) -> int:
    """A fresh, running container. Fresh, as stock liblxc cannot dump a restored one a second time.

    :param size: of its root file system, MiB (or what the image needs, if that is more)
    :param fuse: with an sshfs of its own sshd on /mnt, read and written by two clients
    :returns: bytes in its root file system
    """
    remove()
    on(host, "incus", "init", "-q", "debian", NAME, "-p", "default", "-p", "fusecr")
    on(host, "incus", "file", "push", "-q", "--mode", "755", "-", f"{NAME}/sbin/init", stdin=INIT.encode())
    on(host, "incus", "file", "push", "-q", "--mode", "644", "-", f"{NAME}/etc/inittab", stdin=INITTAB.encode())
    on(host, "incus", "start", "-q", NAME)
    inside(host, "sh", "-c", f"mkdir -p {PLACE} && tar -C {PLACE} -xf -", stdin=_files())
    used = int(inside(host, "python3", "-c", FILL, str(size)))
    if fuse:
        inside(host, "sh", "-ec", START_FUSE)
    inside(host, "sh", "-c", f"setsid python3 {PLACE}/ticker.py {TICKS} </dev/null >/dev/null 2>&1 &")
    time.sleep(1.0)  # all that was started has come to rest
    return used


def remove() -> None:
    """The container under test, wherever it is."""
    for host in ("h1", "h2"):
        if on(host, "incus", "list", "-f", "csv", "-c", "n", f"^{NAME}$").text.strip():
            on(host, "incus", "delete", "-f", NAME)


def longest_gap(host: str, since: float) -> float:
    """Seconds for which nothing ran in the container, after ``since`` (CLOCK_REALTIME)."""
    gaps = [line.split() for line in inside(host, "cat", TICKS).splitlines() if not line.startswith("#")]
    # A gap that was cut off at its begin by the start of the command belongs to it too.
    found = [float(length) for begin, length in gaps if float(begin) + float(length) > since]
    if not found:
        raise BenchError("the container never stood still: its ticker noted no gap")
    return max(found)


def client_errors(host: str) -> dict[str, Any]:
    """End the clients of the FUSE mount; what they counted."""
    text = inside(host, "sh", "-c", STOP_FUSE)
    found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return {key: found[key] for key in ("operations", "errors", "problems")}


@dataclass
class LabOf:
    """The lab of a storage driver: the one that is up if it is of that driver, else one that lives as long as this."""

    driver: str
    mine: bool = False

    def __enter__(self) -> LabOf:
        if os.geteuid() != 0:
            raise BenchError("the lab needs root; run it with sudo")
        state = command(["sh", "-c", f"{LAUNCHER} status || true"]).text
        up = " up, driver " in state.partition("\n")[0]
        if up and f" up, driver {self.driver}," not in state:
            raise BenchError(f"another lab is up, not on {self.driver}: take it down, or set FUSECR_LAB to another name")
        if up:
            lab("reload")
        else:
            lab("up", "--driver", self.driver)
            self.mine = True
        return self

    def __exit__(self, *exc: object) -> None:
        if self.mine:
            lab("down")
        else:
            remove()
