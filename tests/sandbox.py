# SPDX-License-Identifier: Apache-2.0
"""Real FUSE daemons and their clients in namespaces of their own; ``close`` ends all of it, whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
WORKLOAD = TESTS / "workload"
MEMFS = TESTS.parent / "examples" / "memfs.py"
USER_BASE = 1_000_000  # first id of the host that a sandbox with a user namespace uses
DEADLINE = 20.0  # seconds, for everything that is waited for here


class SandboxError(Exception):
    """The environment of a test did not come up or would not end."""


def wait_for(holds: Any, what: str, timeout: float = DEADLINE) -> Any:
    """Call ``holds`` until it is true; returns its value. :raises SandboxError: not within timeout seconds"""
    deadline = time.monotonic() + timeout
    while not (value := holds()):
        if time.monotonic() > deadline:
            raise SandboxError(f"{what}: not after {timeout:g} s")
        time.sleep(0.02)
    return value


@dataclass
class ClientProcess:
    """A running fsclient."""

    process: subprocess.Popen[bytes]
    report_path: Path
    mode: str

    def report(self) -> dict[str, Any]:
        return dict(json.loads(self.report_path.read_text()))

    def operations(self) -> int:
        try:
            return int(self.report()["operations"])
        except FileNotFoundError:
            if self.process.poll() is not None:
                raise SandboxError(f"client {self.mode}: ended with rc {self.process.returncode}") from None
            return 0

    def advance(self, more: int = 20, timeout: float = DEADLINE) -> None:
        """Wait until so many more operations were done."""
        wanted = self.operations() + more
        wait_for(lambda: self.operations() >= wanted, f"client {self.mode}: {more} more operations", timeout)

    def stop(self, timeout: float = DEADLINE) -> dict[str, Any]:
        """SIGTERM to the client itself (its nsenter parent only waits); returns the final report."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            if pid != self.process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise SandboxError(f"client {self.mode}: does not end {timeout:g} s after SIGTERM") from None
        return self.report()


@dataclass
class Daemon:
    """A mounted daemon. Paths are the sandbox's; pids are the host's."""

    sandbox: Sandbox
    kind: str
    mountpoint: Path
    backing: Path
    state: Path
    pid: int
    pids: list[int]
    connection: int

    def client(self, mode: str, *options: str, name: str = "", wait: bool = True) -> ClientProcess:
        """Start an fsclient on the mount and, with ``wait``, wait for its first operations."""
        name = name or mode
        report = self.sandbox.directory / f"{self.mountpoint.name}.{name}.json"
        script = str(self.sandbox.workload / "fsclient.py")
        command = [script, mode, str(self.mountpoint), str(report), "--name", name, *options]
        if mode == "bind" and "--bind-at" not in options:
            command += ["--bind-at", str(self.sandbox.directory / f"{self.mountpoint.name}.{name}.bind")]
        client = ClientProcess(self.sandbox.popen([self.sandbox.python, *command]), report, mode)
        if wait:
            client.advance(2)
        return client


@dataclass
class Sandbox:
    """Mount and pid namespace, with ``user`` also a user namespace; make it with ``Sandbox.open``."""

    directory: Path
    user: bool
    python: str
    process: subprocess.Popen[str]
    init: int
    daemons: list[Daemon] = field(default_factory=list)
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @classmethod
    def open(cls, user: bool = False) -> Sandbox:
        # Not in pytest's own directory: that is 0700, and root of a user namespace could not get there.
        directory = Path(tempfile.mkdtemp(prefix="fusecr-test-"))
        directory.chmod(0o755)
        shutil.copytree(WORKLOAD, directory / "workload", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(MEMFS, directory / "workload")
        if user:
            os.chown(directory, USER_BASE, USER_BASE)
        python = "/usr/bin/python3" if user else sys.executable
        command = [sys.executable, str(TESTS / "nsinit.py"), str(directory)]
        process = subprocess.Popen(
            command + (["--user", str(USER_BASE)] if user else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        if not line:
            error = process.stderr.read()
            end(process)
            shutil.rmtree(directory)
            raise SandboxError(f"namespaces: {error.strip()}")
        return cls(directory, user, python, process, json.loads(line)["init"])

    @property
    def workload(self) -> Path:
        return self.directory / "workload"

    def enter(self, command: Sequence[str]) -> list[str]:
        """The command line that runs a command inside."""
        user = ["--user", "--setuid", "0", "--setgid", "0"] if self.user else []
        return ["nsenter", "--target", str(self.init), *user, "--mount", "--pid", "--wd=/", "--", *command]

    def run(self, command: Sequence[str], timeout: float = DEADLINE) -> subprocess.CompletedProcess[str]:
        """Run inside; output is text. :raises SandboxError: it takes longer than timeout seconds"""
        try:
            return subprocess.run(self.enter(command), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise SandboxError(f"{' '.join(command)}: longer than {timeout:g} s") from None

    def popen(self, command: Sequence[str], **more: Any) -> subprocess.Popen[bytes]:
        """Start inside; ended by close()."""
        more.setdefault("stdin", subprocess.DEVNULL)
        child = subprocess.Popen(self.enter(command), **more)
        self.children.append(child)
        return child

    def daemon(self, kind: str, options: str = "", name: str = "") -> Daemon:
        """Mount a daemon (kinds: workload/daemons.py) and wait for the mount."""
        base = self.directory / (name or f"{kind}-{len(self.daemons)}")
        script = str(self.workload / "daemons.py")
        command = [self.python, script, "start", kind, str(base)]
        done = self.run(command + (["-o", options] if options else []))
        if done.returncode:
            raise SandboxError(f"{kind}: {done.stderr.strip()}")
        data = json.loads(done.stdout)
        daemon = Daemon(
            sandbox=self,
            kind=kind,
            mountpoint=base,
            backing=Path(data["backing"]),
            state=Path(f"{base}.state"),
            pid=self.host_pid(data["pid"]),
            pids=[self.host_pid(pid) for pid in data["pids"]],
            connection=minor(data["device"]),
        )
        self.daemons.append(daemon)
        return daemon

    def host_pid(self, inside: int) -> int:
        """The host's pid of one inside. :raises SandboxError: there is none"""
        namespace = os.stat(f"/proc/{self.init}/ns/pid").st_ino
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and os.stat(f"/proc/{entry}/ns/pid").st_ino == namespace:
                    status = Path(f"/proc/{entry}/status").read_text()
                    found = re.search(r"^NSpid:.*\s(\d+)$", status, re.MULTILINE)
                    if found and int(found[1]) == inside:
                        return int(entry)
        raise SandboxError(f"no process {inside} in the sandbox")

    def processes(self) -> list[int]:
        """Host pids of everything that runs inside."""
        namespace = os.stat(f"/proc/{self.init}/ns/pid").st_ino
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{entry}/ns/pid").st_ino == namespace:
                    found.append(int(entry))
        return sorted(found)

    def connections(self) -> set[int]:
        """Numbers of the FUSE connections that are mounted inside."""
        text = Path(f"/proc/{self.init}/mountinfo").read_text()
        pattern = r"^\d+ \d+ (\S+) .* - fuse(?:\.\S+|blk)? "
        return {minor(device) for device in re.findall(pattern, text, re.MULTILINE)}

    def abort(self, connection: int) -> None:
        """Free every task that waits on it: the only way out of D."""
        control = Path(f"/proc/{self.process.pid}/root{self.directory}/ctl/{connection}/abort")
        with contextlib.suppress(FileNotFoundError):
            control.write_text("1")

    def tell(self) -> None:
        """What pytest is to show of the daemons if the test has failed."""
        for daemon in self.daemons:
            state = "runs" if alive(daemon.pid) else "HAS ENDED"
            mounted = "is mounted" if daemon.connection in self.connections() else "is not mounted"
            print(f"-- {daemon.kind} (pid {daemon.pid}) {state}, connection {daemon.connection} {mounted}")
            for log in sorted(daemon.state.glob("*.log")):
                print(f"-- {daemon.state.name}/{log.name}\n{log.read_text(errors='replace')[-3000:]}")
        exits = self.directory / "exits"
        print(f"-- orphans that ended\n{exits.read_text()[-3000:] if exits.exists() else ''}")

    def close(self) -> None:
        """End everything inside. :raises SandboxError: something does not"""
        try:
            with contextlib.suppress(OSError):
                self.tell()
            # not the dead ones': the kernel has given their numbers to others
            numbers = {daemon.connection for daemon in self.daemons if alive(daemon.pid)}
            with contextlib.suppress(OSError):
                numbers |= self.connections()
            for number in numbers:
                self.abort(number)
            inside = []
            with contextlib.suppress(OSError):
                inside = self.processes()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.init, signal.SIGKILL)
            wait_for(lambda: not [p for p in inside if alive(p)], "end of the sandbox's processes")
            for child in self.children:
                end(child)
        finally:
            end(self.process)
            shutil.rmtree(self.directory)


def minor(device: str) -> int:
    """Connection number: fuse's anonymous device, major 0."""
    return int(device.split(":")[1])


def end(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait(DEADLINE)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            stream.close()


def alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text[text.rindex(")") + 2] not in "ZX"


def descendants(root: int) -> set[int]:
    """Pids of all children, their children and so on."""
    parents: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{entry}/stat").read_text()
            parents.setdefault(int(text[text.rindex(")") + 4 :].split()[0]), []).append(int(entry))
    found: set[int] = set()
    todo = [root]
    while todo:
        for pid in parents.get(todo.pop(), []):
            if pid not in found:
                found.add(pid)
                todo.append(pid)
    return found
