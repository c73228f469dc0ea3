# SPDX-License-Identifier: Apache-2.0
"""The INIT probe on real daemons: byte for byte what strace saw the daemon answer at its own mount."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sandbox import USER_BASE, Sandbox, alive, descendants, minor, wait_for

from incus_fusecr.fuse import initprobe
from incus_fusecr.fuse.init import InitReply, compare
from incus_fusecr.fuse.initprobe import kernel_init_request, probe_init

DEADLINE = 20.0
NOBODY = 65534  # fusermount wants a user that has a name
SFTP_SERVER = "/usr/lib/openssh/sftp-server"

pytestmark = [pytest.mark.requires_root, pytest.mark.requires_fuse, pytest.mark.requires_command("strace", "nsenter")]
Make = Callable[..., Sandbox]
both = pytest.mark.parametrize("user", [False, True], ids=["root", "userns"])


class Traced:
    """A daemon that was started under strace, which wrote down what it answered to FUSE_INIT."""

    def __init__(self, box: Sandbox, command: list[str], cwd: str = "/", reader: list[str] | None = None, **env: str) -> None:
        self.box = box
        self.log = box.directory / "trace"
        before = box.connections()
        strace = ["strace", "-f", "-y", "-xx", "-s", "256", "-o", str(self.log), "-e", "trace=write,writev"]
        variables = [f"{key}={value}" for key, value in {"PWD": cwd, **env}.items()]
        script = ["env", f"--chdir={cwd}", *variables, *strace, "--", *command]
        self.output = box.directory / "output"
        with self.output.open("wb") as out:
            self.process = box.popen(script, stdout=out, stderr=out)
        new = wait_for(lambda: self._new(before), f"mount of {command[0]}")
        self.connection = min(new)
        # A daemon that answers has daemonized, or is about to: its parent waits for that.
        listed = box.run([*(reader or []), "ls", mountpoint(self)])
        assert listed.returncode == 0, listed.stderr
        self.pid = wait_for(self._find, f"process of {command[0]}")

    def _new(self, before: set[int]) -> set[int]:
        if self.process.poll():
            raise AssertionError(f"the daemon ended: {self.output.read_text()}")
        return self.box.connections() - before

    def _find(self) -> int | None:
        """The one process that has the connection's device open; a parent that daemonizes has it for a moment, too."""
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                if any(
                    f"fuse_connection:\t{self.connection}\n" in fdinfo.read_text()
                    for fdinfo in Path(f"/proc/{entry}/fdinfo").iterdir()
                ):
                    found.append(int(entry))
            except OSError:
                continue
        return found[0] if len(found) == 1 else None

    @property
    def truth(self) -> bytes:
        """The body of the first message that was written to /dev/fuse."""

        def first() -> bytes | None:
            for line in self.log.read_text().splitlines():
                found = re.match(r"\d+ +writev?\(\d+<([^>]*)>, (.*)", line)
                if found and unhex(found[1]).endswith(b"/fuse"):
                    strings = re.findall(r'"((?:\\x[0-9a-f]{2})*)"', found[2])
                    return unhex("".join(strings))
            return None

        message: bytes = wait_for(first, "FUSE_INIT reply in the trace")
        assert int.from_bytes(message[:4], "little") == len(message), "the trace has not all of the reply"
        return message[16:]


def unhex(text: str) -> bytes:
    return bytes(int(two, 16) for two in re.findall(r"\\x([0-9a-f]{2})", text))


@pytest.fixture
def unharmed() -> Iterator[Callable[[Traced], None]]:
    """``unharmed(daemon)``: its mount must answer, and nothing may run that did not run before, when the test
    ends.
    """
    watched: list[tuple[Traced, set[int]]] = []
    yield lambda daemon: watched.append((daemon, living()))
    for daemon, before in watched:
        done = daemon.box.run(["ls", "-A", mountpoint(daemon)])
        assert done.returncode == 0, done.stderr
        assert daemon.connection in daemon.box.connections()
        assert alive(daemon.pid)
        gone_again(before)


def gone_again(before: set[int]) -> None:
    wait_for(lambda: not new_processes(before), "end of everything that the probe started")


def living() -> set[int]:
    return descendants(os.getpid())


def new_processes(before: set[int]) -> set[int]:
    return {pid for pid in living() - before if alive(pid)}


def mountpoint(daemon: Traced) -> str:
    text = Path(f"/proc/{daemon.box.init}/mountinfo").read_text()
    for line in text.splitlines():
        fields = line.split()
        if minor(fields[2]) == daemon.connection and fields[2].startswith("0:"):
            return fields[4]
    raise AssertionError(f"connection {daemon.connection} is not mounted any more")


def directories(box: Sandbox) -> tuple[str, str]:
    """(source with a file in it, mountpoint), owned by the sandbox's root."""
    owner = USER_BASE if box.user else 0
    for name in ("src", "mnt"):
        (box.directory / name).mkdir()
        os.chown(box.directory / name, owner, owner)
    (box.directory / "src" / "file").write_text("text")
    return str(box.directory / "src"), str(box.directory / "mnt")


def check(daemon: Traced) -> InitReply:
    reply = probe_init(daemon.pid, deadline=DEADLINE)
    assert reply.raw == daemon.truth
    assert compare(reply, kernel_init_request()) == []
    return reply


Unharmed = Callable[[Traced], None]


@both
@pytest.mark.requires_command("bindfs")
@pytest.mark.parametrize("arguments", [["-f"], []], ids=["foreground", "daemonized"])
def test_bindfs_with_relative_arguments(sandbox: Make, unharmed: Unharmed, user: bool, arguments: list[str]) -> None:
    box = sandbox(user)
    directories(box)
    daemon = Traced(box, ["bindfs", *arguments, "src", "mnt"], cwd=str(box.directory))
    unharmed(daemon)
    assert os.readlink(f"/proc/{daemon.pid}/cwd") == str(box.directory / "src"), "bindfs goes into its source"
    check(daemon)


# The process that tells of the copy's init does so half a second late.
LATE = """import sys, time
sys.path.append(sys.argv[1])
from incus_fusecr.fuse import probe_helper, probe_launch
tell = probe_launch.Launch.tell
probe_launch.Launch.tell = lambda self, fds=(), **message: (
    message.get("pidfd") == "init" and time.sleep(0.5), tell(self, fds, **message)
)
probe_helper.main()"""


@pytest.mark.requires_command("bindfs")
def test_a_copy_that_is_faster_than_what_tells_of_it(sandbox: Make, unharmed: Unharmed, monkeypatch: pytest.MonkeyPatch) -> None:
    box = sandbox(True)
    directories(box)
    daemon = Traced(box, ["bindfs", "-f", "src", "mnt"], cwd=str(box.directory))
    unharmed(daemon)
    monkeypatch.setattr(initprobe, "_START", LATE)
    check(daemon)


@pytest.mark.requires_command("bindfs")
def test_start_directory_without_a_truthful_pwd(sandbox: Make, unharmed: Unharmed) -> None:
    """PWD names a directory where the arguments lead nowhere: the next candidate is the directory of the
    process.
    """
    box = sandbox()
    source, _mnt = directories(box)
    os.symlink(source, f"{source}/src")
    os.symlink(box.directory / "mnt", f"{source}/mnt")
    daemon = Traced(box, ["bindfs", "-f", "src", "mnt"], cwd=str(box.directory), PWD="/etc")
    unharmed(daemon)
    check(daemon)


@both
@pytest.mark.requires_command("sshfs")
@pytest.mark.skipif(not os.path.exists(SFTP_SERVER), reason=f"needs {SFTP_SERVER} (package openssh-sftp-server)")
@pytest.mark.parametrize("arguments", [["-f"], []], ids=["foreground", "daemonized"])
def test_sshfs(sandbox: Make, unharmed: Unharmed, user: bool, arguments: list[str]) -> None:
    box = sandbox(user)
    source, mnt = directories(box)
    command = box.directory / "ssh"
    command.write_text(f"#!/bin/sh\nexec {SFTP_SERVER}\n")
    command.chmod(0o755)
    daemon = Traced(box, ["sshfs", *arguments, "-o", f"ssh_command={command}", f"host:{source}", mnt])
    unharmed(daemon)
    check(daemon)


@pytest.mark.requires_daemon("sshfs")
def test_sshfs_over_ssh(fuse_daemon: Callable[..., object]) -> None:
    """The copy logs in to the same server with the same keys."""
    daemon = fuse_daemon("sshfs")
    reply = probe_init(daemon.pid, deadline=DEADLINE)  # type: ignore[attr-defined]
    assert "FUSE_ASYNC_READ" in reply.flag_names()
    assert (reply.major, len(reply.raw)) == (7, 64)
    reader = daemon.client("reader")  # type: ignore[attr-defined]
    reader.advance(5)
    assert reader.stop()["errors"] == 0


@both
@pytest.mark.requires_command("gcc", "pkg-config")
@pytest.mark.parametrize("name", ["passthrough_ll", "passthrough_fh", "passthrough", "hello"])
def test_libfuse3_examples(sandbox: Make, compiled: Callable[[str], Path], unharmed: Unharmed, user: bool, name: str) -> None:
    if not Path(f"/usr/share/doc/libfuse3-dev/examples/{name}.c").exists():
        pytest.skip(f"needs {name}.c (package libfuse3-dev)")
    box = sandbox(user)
    source, mnt = directories(box)
    program = shutil.copy(compiled(name), box.directory / name)
    extra = ["-o", f"source={source},writeback"] if name == "passthrough_ll" else []
    daemon = Traced(box, [str(program), "-f", *extra, mnt])
    unharmed(daemon)
    reply = check(daemon)
    assert ("FUSE_WRITEBACK_CACHE" in reply.flag_names()) == (name == "passthrough_ll")


@both
@pytest.mark.requires_daemon("memfs")
def test_pyfuse3(sandbox: Make, unharmed: Unharmed, user: bool) -> None:
    box = sandbox(user)
    _source, mnt = directories(box)
    daemon = Traced(box, ["/usr/bin/python3", str(box.workload / "memfs.py"), mnt])
    unharmed(daemon)
    check(daemon)


@pytest.mark.requires_command("squashfuse", "squashfuse_ll", "mksquashfs")
@pytest.mark.parametrize("name", ["squashfuse", "squashfuse_ll"])
def test_squashfuse(sandbox: Make, unharmed: Unharmed, name: str) -> None:
    box = sandbox()
    source, mnt = directories(box)
    image = box.directory / "image"
    subprocess.run(["mksquashfs", source, str(image), "-quiet"], check=True, stdout=subprocess.DEVNULL, timeout=60)
    daemon = Traced(box, [name, "-f", str(image), mnt])
    unharmed(daemon)
    check(daemon)


@both
@pytest.mark.requires_command("fuse-overlayfs")
def test_fuse_overlayfs(sandbox: Make, unharmed: Unharmed, user: bool) -> None:
    box = sandbox(user)
    source, mnt = directories(box)
    for name in ("upper", "wd"):
        (box.directory / name).mkdir()
        os.chown(box.directory / name, USER_BASE if user else 0, USER_BASE if user else 0)
    options = f"lowerdir={source},upperdir={box.directory}/upper,workdir={box.directory}/wd"
    daemon = Traced(box, ["fuse-overlayfs", "-f", "-o", options, mnt])
    unharmed(daemon)
    check(daemon)


@pytest.mark.requires_command("gocryptfs")
def test_gocryptfs(sandbox: Make, unharmed: Unharmed) -> None:
    """go-fuse mounts through the setuid fusermount3, which inherits the filter."""
    box = sandbox()
    source, mnt = directories(box)
    os.remove(f"{source}/file")
    password = ["-extpass", "echo", "-extpass", "secret"]
    done = box.run(["gocryptfs", "-q", "-init", "-scryptn", "10", *password, source])
    assert done.returncode == 0, done.stderr
    daemon = Traced(box, ["gocryptfs", "-q", "-nosyslog", "-fg", *password, source, mnt])
    unharmed(daemon)
    check(daemon)


@pytest.mark.requires_command("bindfs", "sshfs", "fusermount3", "setpriv")
@pytest.mark.parametrize("name", ["bindfs", "sshfs"])
def test_daemon_of_a_user_through_fusermount(sandbox: Make, name: str) -> None:
    box = sandbox()
    source, mnt = directories(box)
    for path in (source, mnt):
        os.chown(path, NOBODY, NOBODY)
    command = box.directory / "ssh"
    command.write_text(f"#!/bin/sh\nexec {SFTP_SERVER}\n")
    command.chmod(0o755)
    more = ["--no-allow-other", source] if name == "bindfs" else ["-o", f"ssh_command={command}", f"host:{source}"]
    user = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--groups", "5,6"]
    # fusermount is setuid, and keeps that under a tracer which has CAP_SYS_PTRACE.
    daemon = Traced(box, [*user, name, "-f", *more, mnt], reader=user)
    assert os.stat(f"/proc/{daemon.pid}").st_uid == NOBODY
    before = living()
    check(daemon)
    done = box.run([*user, "ls", mnt])
    assert (done.returncode, done.stdout) == (0, "file\n"), done.stderr
    gone_again(before)
