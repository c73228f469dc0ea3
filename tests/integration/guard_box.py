# SPDX-License-Identifier: Apache-2.0
"""A mount namespace with a daemon, its clients and its guard; ``close`` ends all of it, whatever hangs.

The pid namespace is the host's, so that the kernel's requests name their processes as the guard sees them. Only lxcfs
has one of its own: it must be able to read /proc/1/personality.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import criu_box

from incus_fusecr.fuse import connection as fuse_connection
from incus_fusecr.guard import client as guard_client
from incus_fusecr.linux import pidfd as pidfds

SECONDS = 20.0
HERE = Path(__file__).resolve().parent
CLIENT = HERE / "guard_client.py"
# What a kernel of 6.18 offers, without what concerns /dev/fuse itself (splice, io_uring).
INIT_FLAGS = sum(1 << bit for bit in (0, 1, 3, 4, 5, 6, 12, 13, 14, 15, 16, 18, 19, 20, 22))
INIT = struct.pack("<IIIII", 7, 45, 131072, INIT_FLAGS, 0) + bytes(44)


def wait_for(holds: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.01)
    return value


class Refused(OSError):
    """What a client got."""


class Client:
    """See guard_client.py."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        assert process.stdin and process.stdout
        self.sender, self.receiver = process.stdin, process.stdout

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, **message: str) -> None:
        self.sender.write(json.dumps(message).encode() + b"\n")
        self.sender.flush()

    def has_answer(self, seconds: float) -> bool:
        return bool(select.select([self.receiver], [], [], seconds)[0])

    def answer(self, seconds: float = SECONDS) -> Any:
        assert self.has_answer(seconds), f"no answer within {seconds:g} s"
        line = self.receiver.readline()
        assert line, "the client has ended"
        answer = json.loads(line)
        if "errno" in answer:
            raise Refused(answer["errno"], answer["text"])
        return answer["value"]

    def run(self, code: str) -> None:
        self.send(run=code)
        self.answer()

    def value(self, expression: str) -> Any:
        self.send(value=expression)
        return self.answer()


class Guard:
    """A guard and whoever follows it."""

    def __init__(self, process: subprocess.Popen[bytes], control: Path) -> None:
        self.process = process
        self.control = str(control)
        self.follower = guard_client.Follower(self.control)

    @property
    def pid(self) -> int:
        return self.process.pid

    def status(self) -> dict[str, str]:
        return guard_client.status(self.control)

    def number(self, key: str) -> int:
        return int(self.status()[key])

    def sidecar(self) -> int:
        """Its pid, once it is ready."""

        def ready() -> int:
            found = self.status()
            return int(found["sidecar"]) if found["ready"] == "1" else 0

        return int(wait_for(ready, "a sidecar that is ready"))

    def event(self, name: str, seconds: float = SECONDS) -> guard_client.Event:
        return self.follower.wait_for(name, seconds)


class Daemon:
    def __init__(self, process: subprocess.Popen[bytes], pid: int, mount: Path, connection: int) -> None:
        self.process = process
        self.pid = pid
        self.mount = mount
        self.connection = connection

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait(SECONDS)


def child_of(pid: int) -> int:
    return int(wait_for(lambda: Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[:1], f"child of {pid}")[0])


class Box:
    def __init__(self, program: Path, own_pids: bool = False) -> None:
        self.program = program
        self.own_pids = own_pids
        self.directory = Path(tempfile.mkdtemp(prefix="fusecr-test-"))
        self.directory.chmod(0o755)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.guards: list[Guard] = []
        self.held: list[int] = []
        (self.directory / "ctl").mkdir()
        script = f"mount -t fusectl none {self.directory}/ctl && echo ready && exec sleep infinity"
        pids = ["--pid", "--fork", "--kill-child", "--mount-proc"] if own_pids else []
        self.holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", *pids, "--", "sh", "-c", script], stdout=subprocess.PIPE
        )
        assert self.holder.stdout and self.holder.stdout.readline() == b"ready\n"
        self.init = child_of(self.holder.pid) if own_pids else self.holder.pid

    def enter(self, command: Sequence[str]) -> list[str]:
        pids = ["--pid"] if self.own_pids else []
        return ["nsenter", "--target", str(self.init), "--mount", *pids, "--wd=/", "--", *command]

    def run(self, *command: str) -> str:
        done = subprocess.run(self.enter(command), capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def popen(self, command: Sequence[str], **more: Any) -> subprocess.Popen[bytes]:
        more.setdefault("stdin", subprocess.DEVNULL)
        process = subprocess.Popen(self.enter(command), start_new_session=True, **more)
        self.processes.append(process)
        return process

    def device(self, mount: Path) -> int | None:
        """Number of the connection that is mounted there."""
        found = None
        for line in Path(f"/proc/{self.init}/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[4] == str(mount) and re.fullmatch(r"fuse(\..*)?", fields[fields.index("-") + 1]):
                found = int(fields[2].split(":")[1])
        return found

    def mounted(self) -> set[int]:
        lines = Path(f"/proc/{self.init}/mountinfo").read_text().splitlines()
        found = [line.split() for line in lines]
        return {int(f[2].split(":")[1]) for f in found if re.fullmatch(r"fuse(\..*)?", f[f.index("-") + 1])}

    def daemon(self, command: Sequence[str], mount: Path) -> Daemon:
        if not mount.is_relative_to(self.directory / "tree"):
            mount.mkdir(exist_ok=True)
        log_path = self.directory / "daemon.log"
        with open(log_path, "ab") as log:
            process = self.popen(command, stdout=log, stderr=log)

        def mounted() -> int | None:
            assert process.poll() is None, f"{command[0]} ended: {log_path.read_text(errors='replace')}"
            return self.device(mount)

        number = int(wait_for(mounted, f"mount of {command[0]}"))
        self.run("stat", str(mount))  # it is mounted before it has answered INIT
        return Daemon(process, child_of(process.pid) if self.own_pids else process.pid, mount, number)

    def guard(
        self, daemon: Daemon, sidecar: Sequence[str], options: guard_client.Options | None = None, *, plain: bool = False
    ) -> Guard:
        """``plain``: the sidecar is not to run in this namespace."""
        with contextlib.ExitStack() as undo:
            pidfd = -1
            held = []
            if daemon.process.poll() is None:
                process = undo.enter_context(pidfds.pidfd_open(daemon.pid))
                numbers = [f.fd for f in fuse_connection.device_fds(daemon.pid) if f.connection == daemon.connection]
                assert numbers, "needs a kernel whose fdinfo names the connection"
                for number in numbers:
                    held.append(undo.enter_context(pidfds.pidfd_getfd(process, number)).fileno())
                pidfd = process.fileno()
            else:
                held = [os.dup(fd) for fd in self.held]
                for fd in held:
                    undo.callback(os.close, fd)
            control = self.directory / f"guard-{len(self.guards)}.sock"
            log = undo.enter_context(open(self.directory / "guard.log", "ab"))
            made = guard_client.spawn(
                daemon.connection, held, pidfd, INIT, str(control), sidecar if plain else self.enter(sidecar),
                options or guard_client.Options(strict=False, log=str(self.directory / "sidecar.log")),
                program=str(self.program), log=log.fileno(),
            )  # fmt: skip
            self.processes.append(made)
        guard = Guard(made, control)
        self.guards.append(guard)
        return guard

    def keep(self, daemon: Daemon) -> None:
        """Copies of its descriptors, for a guard that is started when it is dead."""
        with pidfds.pidfd_open(daemon.pid) as process:
            for found in fuse_connection.device_fds(daemon.pid):
                self.held.append(pidfds.pidfd_getfd(process, found.fd).release())

    def client(self, mount: Path) -> Client:
        command = [sys.executable, str(CLIENT), str(mount)]
        return Client(self.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))

    def abort(self, connection: int) -> None:
        control = Path(f"/proc/{self.init}/root{self.directory}/ctl/{connection}/abort")
        with contextlib.suppress(FileNotFoundError):
            control.write_text("1")

    def alive(self, connection: int) -> bool:
        return Path(f"/proc/{self.init}/root{self.directory}/ctl/{connection}").exists()

    def close(self) -> None:
        for guard in self.guards:
            guard.follower.close()
        for number in self.mounted():  # not what was mounted once: its number may be somebody else's now
            self.abort(number)
        for fd in self.held:
            os.close(fd)
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in [*self.processes, self.holder]:
            process.kill()
            process.wait(SECONDS)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
        for log in sorted(self.directory.glob("*.log")):  # pytest shows it if the test has failed
            print(f"-- {log.name}\n{log.read_text(errors='replace')[-5000:]}")
        shutil.rmtree(self.directory)

    # -- lxcfs, from the lab's tree of Debian: a machine that has the package runs it as a service

    def enter_tree(self) -> Path:
        """Mount the tree; returns its root."""
        tree = self.directory / "tree"
        tree.mkdir()
        source = criu_box.find_trees()[0]
        if source.is_file():
            self.run("mount", "-t", "squashfs", "-o", "loop,ro", str(source), str(tree))
        else:
            self.run("mount", "--bind", str(source), str(tree))
        for name in ("run", "tmp", "var/lib/lxcfs"):
            self.run("mount", "-t", "tmpfs", "none", str(tree / name))
        self.run("mount", "-t", "proc", "none", str(tree / "proc"))
        self.run("mount", "--rbind", "/sys", str(tree / "sys"))
        self.run("mount", "--bind", "/dev", str(tree / "dev"))
        return tree


def lxcfs(tree: Path, name: str, where: str) -> list[str]:
    return ["chroot", str(tree), "/usr/bin/lxcfs", "-f", "-p", f"/run/{name}.pid", where]


def has_lxcfs() -> bool:
    trees = criu_box.find_trees()
    return bool(trees) and (trees[0].is_file() or (trees[0] / "usr/bin/lxcfs").exists())


def memory_kb(pid: int, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def wakeups(pid: int) -> int:
    found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def build(directory: Path) -> Path:
    subprocess.run(["make", "-s", "-C", str(HERE.parents[1] / "incus_fusecr/guard"), f"O={directory}"], check=True, timeout=600)
    return directory / "fusecr-guard"


@contextlib.contextmanager
def opened(program: Path, own_pids: bool = False) -> Iterator[Box]:
    box = Box(program, own_pids)
    try:
        yield box
    finally:
        box.close()
