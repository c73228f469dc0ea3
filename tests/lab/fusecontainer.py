# SPDX-License-Identifier: Apache-2.0
"""A container with FUSE daemons and clients on a host of the lab, and what a test wants to know of it."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "lab" / "lab"
WORKLOAD = [*sorted((ROOT / "tests" / "workload").glob("*.py")), ROOT / "examples" / "memfs.py"]
PLACE = "/root/wl"
REPORTS = "/root/reports"
CLIENTS = ("reader", "writer", "append", "dirs", "cwd")
# Daemons that know files by the inode numbers of their backing file system. A restored one remembers those of files that were in
# use, which are free by then, and takes a new file that gets one for the old file: no client that makes files works on them here.
BY_INODE = ("passthrough_ll",)
# Slower than the clients' own pace: a directory that changes all the time fails Incus' copies with "file has vanished".
PACE_MS = 25
BOOT_SECONDS = 120.0
ADVANCE_SECONDS = 60.0


def on(host: str, *argv: str, code: int | None = 0, data: bytes = b"", seconds: float = 200) -> str:
    """Run a command on a host of the lab; its output.

    :param code: the exit code that it must have; None for any
    """
    command = [str(LAB), "exec", host, "--", *argv]
    done = subprocess.run(command, input=data, capture_output=True, timeout=seconds, check=False)
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert code is None or done.returncode == code, f"{host}: {shlex.join(argv)}: {done.returncode}\n{out}{err}"
    return out


def sh(host: str, script: str, code: int | None = 0) -> str:
    """Run a shell script on a host."""
    return on(host, "sh", "-c", script, code=code).strip()


def modes_of(kind: str, modes: Sequence[str]) -> tuple[str, ...]:
    """Those of the clients that a daemon can have across a restore."""
    return tuple(mode for mode in modes if mode != "dirs" or kind not in BY_INODE)


def wait_for(what: str, holds: Callable[[], Any], seconds: float = ADVANCE_SECONDS) -> Any:
    """Poll until ``holds()`` is true; its value."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.2)
    return value


@dataclass
class Container:
    """One container; ``host`` and ``name`` say where it is now.

    :ivar logs: append logs by the name of their client's report
    """

    host: str
    name: str
    project: str = "default"
    clients: list[str] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)

    # Life

    def incus(self, command: str, *rest: str, code: int | None = 0) -> str:
        """``incus COMMAND...`` on its host, in its project."""
        return on(self.host, "incus", "--project", self.project, *command.split(), *rest, code=code)

    def create(self, image: str = "debian", *options: str, privileged: bool = False) -> Container:
        """Launch it and wait until it is up.

        :param options: more of ``incus launch``
        """
        self.delete()
        more = ["-c", "security.privileged=true"] if privileged else []
        profiles = ["-p", "default", "-p", "fusecr"]
        self.incus("launch -q", image, self.name, *profiles, *more, *options)
        if image == "debian":
            up = "systemctl is-system-running | grep -qx running"
            wait_for("boot", lambda: self.sh(f"{up} && echo up", code=None), BOOT_SECONDS)
        self.sh(f"mkdir -p {REPORTS} {PLACE}")
        return self

    def delete(self) -> None:
        """On every host where it may be."""
        for host in ("h1", "h2"):
            incus = f"incus --project {self.project}"
            # Killed first, and seen to have ended: a forced stop freezes it before, and liblxc waits without end for kernels that
            # then miscount.
            listed = f"{incus} list -f csv '^{self.name}$' -c"
            ended = f"i=0; while {listed} s | grep -q RUNNING && [ $((i+=1)) -lt 100 ]; do sleep 0.1; done"
            killed = f'p=$({listed} p); [ -z "$p" ] || [ $p = 0 ] || {{ kill -9 $p; {ended}; }}'
            sh(host, f"{killed}; {incus} delete -f {self.name}", code=None)

    def push(self, files: Sequence[Path]) -> None:
        """Copy files into the place of the workload."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path in files:
                archive.add(path, path.name)
        self.run("tar", "-C", PLACE, "-xf", "-", data=buffer.getvalue())

    def run(self, *argv: str, code: int | None = 0, data: bytes = b"") -> str:
        """Run a command in it."""
        # -T: without a pseudo-terminal, whatever standard input is
        return on(self.host, "incus", "--project", self.project, "exec", "-T", self.name, "--", *argv, code=code, data=data)

    def sh(self, script: str, code: int | None = 0) -> str:
        """Run a shell script in it."""
        return self.run("sh", "-c", script, code=code).strip()

    def status(self) -> str:
        """``RUNNING``, ``STOPPED``, ... or empty if it is not there."""
        return self.incus("list -f csv -c s", f"^{self.name}$").strip()

    def migrate(self, target: str, *options: str, source: str = "", by: str = "", code: int = 0) -> dict[str, Any]:
        """``incus-fusecr migrate -f json``; the report. On success it is the moved container from then on."""
        at = [] if self.project == "default" else ["--project", self.project]
        where = f"{source}{self.name}"
        command = ["incus-fusecr", "migrate", *at, "-f", "json", *options, where, target]
        report: dict[str, Any] = json.loads(on(by or self.host, *command, code=code))
        if report["outcome"] == "done":
            remote, _, name = target.partition(":")
            self.host, self.name = (by or self.host) if remote == "local" else remote, name or self.name
        return report

    # Work

    def daemon(self, kind: str, mountpoint: str, *, backing: str = "", state: str = "") -> None:
        """Start a daemon of workload/daemons.py; everybody may use its mount."""
        backing = backing or f"/srv/{Path(mountpoint).name}"
        state = state or f"/root/state-{Path(mountpoint).name}"
        start = ["python3", f"{PLACE}/daemons.py", "start", kind, mountpoint]
        self.run(*start, "--backing", backing, "--state", state, "-o", "allow_other")

    def client(
        self, mode: str, directory: str, *options: str, program: str = f"python3 {PLACE}/fsclient.py", session: bool = True
    ) -> None:
        """Start a client, in a session of its own or in that of ``incus exec``, and wait until it works."""
        name = f"{directory.strip('/').replace('/', '-')}-{mode}"
        report = f"{REPORTS}/{name}.json"
        words = [mode, directory, report, "--pace-ms", str(PACE_MS), *options]
        self.sh(
            f"{'setsid ' if session else ''}{program} {shlex.join(words)} </dev/null >{REPORTS}/{name}.out 2>&1 & "
            f"i=0; until [ -e {report} ]; do i=$((i+1)); [ $i -gt 600 ] && {{ cat {REPORTS}/{name}.out; exit 9; }}; "
            "sleep 0.1; done"
        )
        self.clients.append(name)
        if mode == "append":
            self.logs[name] = f"{directory}/append/log"

    def reports(self) -> dict[str, dict[str, Any]]:
        """The clients' reports by name."""
        script = f"cd {REPORTS}; for n in {shlex.join(self.clients)}; do cat $n.json; echo; done; echo end"
        end = time.monotonic() + 20
        while True:
            *lines, last = [line for line in self.sh(script).splitlines() if line] or [""]
            # All that was written has come: otherwise `incus exec` is what was lost, not a client.
            if last == "end":
                return dict(zip(self.clients, map(json.loads, lines), strict=True))
            assert time.monotonic() < end, f"reports of {self.name}: the output ends with {last[-100:]!r}"
            time.sleep(0.5)

    def advances(self) -> None:
        """Every client goes on, and none has seen an error."""
        before = {n: r["operations"] for n, r in self.reports().items()}

        def all_go_on() -> bool:
            return all(r["operations"] > before[n] + 2 for n, r in self.reports().items())

        try:
            wait_for(f"operations beyond {before}", all_go_on)
        except AssertionError as error:
            now = {n: [r[key] for key in ("operations", "state", "first_errors")] for n, r in self.reports().items()}
            tasks = "ps -eLo pid,tid,stat,wchan:32,args | grep -E 'PID|fsclient|/mnt' | cut -c1-150"
            raise AssertionError(f"{error}; now {now}\n{on(self.host, 'sh', '-c', tasks)}") from None
        self.clean()

    def clean(self) -> None:
        """No client has seen an error, no log has a hole or a repetition."""
        found = self.reports()
        bad = {n: r["first_errors"] for n, r in found.items() if r["errors"] or r["state"] != "running"}
        assert not bad, bad
        for name, log in self.logs.items():
            # Lines that the report knows of were written before it: all have to be there.
            lines = str(found[name]["detail"]["lines"])
            data = on(
                self.host, "incus", "--project", self.project, "exec", "-T", self.name, "--", "cat", log, seconds=60
            )
            assert judged(data, int(lines)) == (0, 0, 0), f"{log} (holes, repetitions, torn)"

    def tasks(self) -> dict[int, str]:
        """Names of the long-lived processes by pid in the container: the same ones after a restore."""
        script = "for p in /proc/[0-9]*; do [ -e $p/exe ] && echo ${p#/proc/} $(cat $p/comm); done 2>/dev/null"
        tasks = dict(line.split(None, 1) for line in self.sh(script).splitlines() if " " in line)
        wanted = ("python3", "fsclient", "bindfs", "sshfs", "passthrough_fh", "passthrough_ll", "init", "systemd")
        return {int(pid): comm for pid, comm in tasks.items() if comm in wanted}

    def ids(self, *paths: str) -> list[str]:
        """``UID:GID MODE`` of files in it."""
        return self.sh(f"stat -c '%u:%g %a' {shlex.join(paths)}").splitlines()

    def listed(self) -> list[dict[str, Any]]:
        """``incus-fusecr list`` of it."""
        at = [] if self.project == "default" else ["--project", self.project]
        found: list[dict[str, Any]] = json.loads(on(self.host, "incus-fusecr", "list", *at, "-f", "json", self.name))
        return found

    def init_reply(self) -> list[str]:
        """INIT replies of its daemons as the agent knows them: learnt from a copy, or those of the manifest they came with."""
        script = "cat /run/incus-fusecr/journal/init-*.json 2>/dev/null"
        known = {}
        for text in sh(self.host, script, code=None).replace("}{", "}\n{").splitlines():
            entry = json.loads(text)
            known[entry["pid"]] = entry["reply"]
        return [known.get(row["host_pid"], "") for row in self.listed()]

    def check(self, code: int = 0) -> dict[str, Any]:
        """``incus-fusecr check``."""
        at = [] if self.project == "default" else ["--project", self.project]
        found: dict[str, Any] = json.loads(on(self.host, "incus-fusecr", "check", *at, "-f", "json", self.name, code=code))
        return found


def judged(log: str, lines: int) -> tuple[int, int, int]:
    """check.append_holes() of a log that was read already."""
    import tempfile

    from check import append_holes

    with tempfile.NamedTemporaryFile("w") as file:
        file.write(log)
        file.flush()
        return tuple(append_holes(file.name, lines))  # type: ignore[return-value]
