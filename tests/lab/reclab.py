# SPDX-License-Identifier: Apache-2.0
"""A host of its own whose lxcfs is protected, with limited containers and readers that run from the first test to the last."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "lab" / "lab"
NAME = f"{os.environ.get('FUSECR_LAB', 'lab')[:20]}-rec"
STATE = Path("/var/lib/incus-fusecr-lab") / NAME
WORKLOAD = ROOT / "tests" / "workload"
PYTHON = "/opt/incus-fusecr/bin/python"
MODES = ("loop", "held", "cwd", "dirs", "poll")
LIMITS = {  # MiB, processors, whose ids
    "small": (256, 1, "security.privileged=false"),
    "big": (512, 2, "security.privileged=true"),
    "apart": (384, 1, "security.idmap.isolated=true"),
}


def lab(*args: str, code: int | None = 0, stdin: bytes = b"", timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FUSECR_LAB": NAME}
    done = subprocess.run([str(LAB), *args], input=stdin, capture_output=True, timeout=timeout, env=environment, check=False)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert code is None or done.returncode == code, f"lab {shlex.join(args)}: {done.returncode}\n{out}{err}"
    return subprocess.CompletedProcess(args, done.returncode, out, err)


def on(script: str, code: int | None = 0, stdin: bytes = b"", timeout: float = 90) -> str:
    return lab("exec", "h1", "--", "sh", "-c", script, code=code, stdin=stdin, timeout=timeout).stdout.strip()


def wait_for(what: str, holds: Callable[[], Any], seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
    return value


def documents(text: str) -> list[dict[str, Any]]:
    """JSON objects one after another."""
    found, decoder = [], json.JSONDecoder()
    text = text.strip()
    while text:
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:].strip()
    return found


def run_killer(seed: int, *arguments: str, seconds: float) -> dict[str, Any]:
    """What killer.py prints."""
    on("cat > /root/killer.py", stdin=(WORKLOAD / "killer.py").read_bytes())
    return dict(json.loads(on(f"{PYTHON} /root/killer.py {seed} {' '.join(arguments)}", timeout=seconds)))


@contextlib.contextmanager
def host_of(factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A lab with its host; it is down again at the end, and nothing is left of it."""
    output = factory.mktemp("lxreader") / "lxreader"
    sources = [str(WORKLOAD / f"{name}.c") for name in ("lxreader", "lxreader-lib")]
    subprocess.run(["gcc", "-O2", "-static", "-o", str(output), *sources, "-lm"], check=True, timeout=120)
    lab("up", "--hosts", "1", "--cgroup", "v1")
    try:
        made = Host(output.read_bytes())
        made.settled()
        yield made
    finally:
        log = lab("exec", "h1", "--", "cat", "/var/log/fusecr-lab/agent.log", code=None).stdout
        (factory.getbasetemp() / "agent.log").write_text(log)
        print("\n".join(line for line in log.splitlines() if " ERROR " in line)[-4000:])
        lab("down", timeout=60)
    left = [str(p) for p in Path("/sys/fs/cgroup").glob(f"**/fusecr-lab.{NAME}")]
    assert not STATE.exists() and not left


class Host:
    def __init__(self, lxreader: bytes) -> None:
        cpus = os.cpu_count() or 1
        script = "cat > /root/lxreader; chmod 755 /root/lxreader\n"
        for name, (mib, wanted, ids) in LIMITS.items():
            limits = f"-c limits.memory={mib}MiB -c limits.cpu={min(wanted, cpus)} -c {ids}"
            script += f"incus launch -q busybox {name} {limits} </dev/null\n"
            script += f"incus file push -q /root/lxreader {name}/root/lxreader\n"
        on(script, stdin=lxreader)
        self.tables = {name: self.table(name) for name in LIMITS}
        script = ""
        for name, (mib, wanted, _) in LIMITS.items():
            values = f"--mem {mib * 1024} --cpus {min(wanted, cpus)} --detach"
            readers = "; ".join(f"/root/lxreader {mode} /root/{mode}.json /root/stop {values}" for mode in MODES)
            readers += "; top -b -d 1 </dev/null >/root/top.log 2>&1 &"
            script += f"incus exec {name} -- sh -c {shlex.quote(readers)}\n"
        on(script)

    def reports(self) -> dict[str, list[dict[str, Any]]]:
        each = "for f in /root/*.json; do cat $f; done"
        text = on("; ".join(f"incus exec {name} -- sh -c {shlex.quote(each)}; echo @" for name in LIMITS))
        return {name: documents(part) for name, part in zip(LIMITS, text.split("@"), strict=False)}

    def problems(self) -> list[str]:
        """What the readers have noticed so far."""
        found = []
        for name, reports in self.reports().items():
            assert len(reports) == len(MODES)
            found += [f"{name} {r['mode']}: {text}" for r in reports for text in r["texts"]]
            found += [f"{name} {r['mode']}: {r['errors']} {r['wrong']}" for r in reports if r["errors"] or r["wrong"]]
        return found + self._of_top()

    @staticmethod
    def _of_top() -> list[str]:
        """top -b runs on, and has never had the host's memory before it."""
        script = "; ".join(f"incus exec {name} -- sh -c 'pidof top; grep ^Mem: /root/top.log'; echo @" for name in LIMITS)
        found = []
        for (name, (mib, _, _)), text in zip(LIMITS.items(), on(script).split("@"), strict=False):
            pid, *lines = text.strip().splitlines()
            sums = {sum(int(word.rstrip("K,")) for word in (line.split()[1], line.split()[3])) for line in lines}
            if not pid.isdigit() or not lines or sums != {mib * 1024}:
                found.append(f"{name} top: pid {pid}, memory {sorted(sums)} of {mib * 1024}, {len(lines)} times")
        return found

    @staticmethod
    def table(name: str) -> list[tuple[str, ...]]:
        """Mount table of a container without ids and devices: mountpoint, root, options, propagation, type."""
        found = []
        for line in on(f"incus exec {name} -- cat /proc/1/mountinfo").splitlines():
            left, _, right = line.partition(" - ")
            words = left.split()
            found.append((words[4], words[3], words[5], *(w.split(":")[0] for w in words[6:]), right.split()[0]))
        return sorted(found)

    @staticmethod
    def unit() -> dict[str, Any]:
        (unit,) = json.loads(on("incus-fusecr status -f json", code=None))
        return dict(unit)

    @staticmethod
    def last_event() -> int:
        return int(json.loads(on("incus-fusecr events -f json"))[-1]["number"])

    @staticmethod
    def events(since: int) -> list[dict[str, Any]]:
        return list(json.loads(on(f"incus-fusecr events --since {since} -f json")))

    def whats(self, since: int) -> list[str]:
        return [event["what"] for event in self.events(since)]

    def settled(self, not_pid: int = 0) -> dict[str, Any]:
        """The unit as soon as it is protected by another daemon than ``not_pid``, with a spare."""

        def ready() -> dict[str, Any] | None:
            text = on("incus-fusecr status -f json", code=None)
            unit = json.loads(text)[0] if text.startswith("[") else {}
            return unit if unit.get("state") == "protected" and unit["spare"] and unit["pid"] != not_pid else None

        return dict(wait_for("a protected lxcfs", ready))

    def calm(self) -> dict[str, Any]:
        """The unit as soon as it has the one old connection that readers have had files of since the first kill, and no other."""
        began = time.monotonic()

        def ready() -> dict[str, Any] | None:
            unit = self.settled()
            return unit if len(unit["connections"]) <= 3 else None

        try:
            unit = dict(wait_for("the end of old connections", ready))
        except AssertionError:
            unit = self.unit()
            for link in (link for link in unit["connections"] if link["role"] == "old"):
                print(link, on(f"grep -l ' 0:{link['connection']} ' /proc/[0-9]*/mountinfo || true"))
            print(on("incus-fusecr events -f csv | tail -n 40; ps -eo pid,ppid,stat,args | cut -c1-150"))
            raise
        print(f"calm after {time.monotonic() - began:.1f} s")
        return unit

    @staticmethod
    def census() -> dict[str, Any]:
        """See census.py."""
        script = (ROOT / "tests" / "workload" / "census.py").read_bytes()
        return dict(json.loads(on("/opt/incus-fusecr/bin/python -", stdin=script)))

    @classmethod
    def devices(cls, *names: str) -> set[int]:
        """Connections that containers see: those on top."""
        return cls.tops(on("; ".join(f"incus exec {name} -- cat /proc/1/mountinfo; echo @" for name in names)))

    @classmethod
    def devices_of_init(cls, name: str) -> set[int]:
        """The same without anything that runs in the container."""
        return cls.tops(on(f"cat /proc/$(incus list -f csv -c p {name})/mountinfo"))

    @staticmethod
    def tops(tables: str) -> set[int]:
        found = set()
        for text in tables.split("@"):
            rows = [line.split() for line in text.splitlines() if " fuse.lxcfs " in line]
            covered = {row[1] for row in rows}  # who is a parent of one of them
            found |= {int(row[2].split(":")[1]) for row in rows if row[0] not in covered}
        return found

    def all_have(self, number: int) -> bool:
        return self.devices(*LIMITS) == {number}
