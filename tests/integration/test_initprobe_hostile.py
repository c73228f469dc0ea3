# SPDX-License-Identifier: Apache-2.0
"""The INIT probe on daemons that misbehave in their second life, and what rights that life has."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rawfuse import CAP_MKNOD, REPLY
from sandbox import USER_BASE, Sandbox, alive, descendants, wait_for

from incus_fusecr.fuse import initprobe
from incus_fusecr.fuse.initprobe import ProbeError, kernel_init_request, probe_init

HERE = Path(__file__).resolve().parent
SHORT = 3.0  # seconds: for copies that never answer
DEADLINE = 20.0

pytestmark = [pytest.mark.requires_root, pytest.mark.requires_fuse, pytest.mark.requires_command("nsenter", "setpriv")]
both = pytest.mark.parametrize("user", [False, True], ids=["root", "userns"])


class Raw:
    """A running rawfuse.py."""

    def __init__(
        self, box: Sandbox, mode: str, wrapper: list[str] | None = None, owner: int = 0, python: str = "/usr/bin/python3"
    ) -> None:
        self.box = box
        self.base = box.directory / f"raw-{len(box.children)}"
        self.notes, self.mnt = self.base / "notes", self.base / "mnt"
        host_owner = owner + (USER_BASE if box.user else 0)
        for path in (self.base, self.notes, self.mnt, self.base / "mnt-2"):
            path.mkdir()
            os.chown(path, host_owner, host_owner)
        script = self.base / "rawfuse.py"
        shutil.copy(HERE / "rawfuse.py", script)
        before = box.connections()
        command = ["env", "-u", "PWD", python, str(script), mode, str(self.mnt), str(self.notes)]
        self.log = self.base / "log"
        with self.log.open("wb") as log:
            self.process = box.popen([*(wrapper or []), *command], stdout=log, stderr=log)
        mounts = 2 if mode.startswith("two") else 1
        new = wait_for(lambda: len(box.connections() - before) == mounts and box.connections() - before, f"mount of {mode}")
        self.connection = min(new)
        self.pid = wait_for(self._find, "the daemon's pid")
        self.works()
        self.before = descendants(os.getpid())

    def _find(self) -> int | None:
        for pid in self.box.processes():
            try:
                for fdinfo in Path(f"/proc/{pid}/fdinfo").iterdir():
                    if f"fuse_connection:\t{self.connection}\n" in fdinfo.read_text():
                        return pid
            except OSError:
                continue
        return None

    def works(self) -> None:
        done = self.box.run(["cat", f"{self.mnt}/hello"])
        assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr

    def facts(self, life: int) -> dict[str, Any]:
        return dict(json.loads((self.notes / f"facts-{life}").read_text()))

    def probe(self, deadline: float = DEADLINE) -> bytes:
        return probe_init(self.pid, deadline=deadline).raw

    def unharmed(self) -> None:
        """The first life goes on, and nothing is left of the second."""
        self.works()
        assert alive(self.pid)

        def left() -> set[int]:
            return {pid for pid in descendants(os.getpid()) - self.before if alive(pid)}

        wait_for(lambda: not left(), f"end of what the probe started ({left()})")


@pytest.fixture
def raw(sandbox: Callable[..., Sandbox]) -> Iterator[Callable[..., Raw]]:
    """``raw(mode, user=False)``: a rawfuse.py; at the end its mount must work and nothing of the probe may be
    left.
    """
    started: list[Raw] = []

    def make(mode: str, user: bool = False, **more: Any) -> Raw:
        started.append(Raw(sandbox(user), mode, **more))
        return started[-1]

    yield make
    for daemon in started:
        daemon.unharmed()


Make = Callable[..., Raw]


@both
@pytest.mark.parametrize("mode", ["plain", "new-api", "child-mounts", "sync-init"])
def test_every_way_to_mount(raw: Make, mode: str, user: bool) -> None:
    daemon = raw(mode, user)
    assert daemon.probe() == REPLY
    assert daemon.facts(2)["argv"] == daemon.facts(1)["argv"]


def test_two_mounts_of_one_process(raw: Make) -> None:
    assert raw("two").probe() == REPLY


def test_two_mounts_that_differ_are_a_reason_to_refuse(raw: Make) -> None:
    with pytest.raises(ProbeError, match="several mounts, and answered FUSE_INIT differently"):
        raw("two-differ").probe()


@both
@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("silent", r"did not answer FUSE_INIT in time"),
        ("stops", r"did not answer FUSE_INIT in time"),
        ("garbage", r"its header says 4294967295 bytes, it has 80"),
        ("huge", r"its header says 1048576 bytes, it has 4096"),
        ("refuse", r"the daemon answered with error -71"),
        ("other-major", r"protocol 8\.0; the kernel speaks 7"),
        ("endless-notifications", r"sends notifications and does not answer"),
        ("endless-output", r"did not answer FUSE_INIT in time; it said: <1b>\[31mendless"),
        ("escape-codes", r"exited with status 3 .*; it said: <1b>\]0;owned<07> cannot start: caf<e9>"),
        ("crash", r"was killed by signal 11"),
        ("exit-early", r"exited with status 9 .*; it said: another instance is running"),
        ("forks-away", r"did not answer FUSE_INIT in time"),
    ],
)
def test_hostile_second_life(raw: Make, mode: str, why: str, user: bool) -> None:
    daemon = raw(mode, user)
    with pytest.raises(ProbeError) as caught:
        daemon.probe(SHORT)
    assert re.search(why, caught.value.why), caught.value.why
    assert caught.value.pid == daemon.pid
    assert "rawfuse.py " + mode in caught.value.command
    assert str(daemon.pid) in caught.value.what
    assert caught.value.hint
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


@both
def test_attack_on_the_mounts(raw: Make, user: bool) -> None:
    daemon = raw("attack", user)
    before = Path(f"/proc/{daemon.box.init}/mountinfo").read_text()
    assert daemon.probe() == REPLY
    did = json.loads((daemon.notes / "did-attack").read_text())
    assert did["umount"] == did["detach"] == did["force"] == did["umount-there"] == errno.EINVAL
    assert did["tmpfs"] == did["pivot_root"] == did["open_tree"] == did["mount_setattr"] == errno.EPERM
    assert did["bound"], "a bind mount was really made, or the first life's mount is seen"
    assert Path(f"/proc/{daemon.box.init}/mountinfo").read_text() == before


@both
def test_the_copy_is_like_the_daemon(raw: Make, user: bool) -> None:
    daemon = raw("plain", user, wrapper=["prlimit", "--nofile=777:888", "--stack=4194304:4194304", "--"])
    assert daemon.probe() == REPLY
    one, two = daemon.facts(1), daemon.facts(2)
    for key in ("status", "namespaces", "cgroup", "limits", "argv", "environ", "cwd", "below", "blocked"):
        assert two[key] == one[key], key
    assert two["limits"]["RLIMIT_NOFILE"] == [777, 888]
    assert two["pidns"] != one["pidns"], "a pid namespace of its own, so that its end ends all"
    assert (one["seccomp"], two["seccomp"]) == (["0", "0"], ["2", "1"])
    assert {fd: kind for fd, kind in two["fds"].items() if fd in "012"} == {"0": "fifo", "1": "fifo", "2": "fifo"}
    assert set(two["fds"]) - set("012") <= {"3"}, "only the listing of /proc/self/fd itself"


@pytest.mark.parametrize(
    "options",
    [
        ["--reuid", "1234", "--regid", "1234", "--groups", "5,6", "--inh-caps", "+sys_admin",
        "--ambient-caps",
         "+sys_admin"],
        ["--bounding-set", "-sys_module,-mknod,-setuid,-setgid,-setpcap"],
        ["--no-new-privs", "--inh-caps", "-all"],
    ],
    ids=["ambient", "bounding", "no-new-privs"],
)  # fmt: skip
@both
def test_rights_of_the_copy(raw: Make, options: list[str], user: bool) -> None:
    owner = 1234 if "1234" in options else 0
    daemon = raw("plain", user, wrapper=["setpriv", *options], owner=owner)
    assert daemon.probe() == REPLY
    assert daemon.facts(2)["status"] == daemon.facts(1)["status"]


# a service manager that filters what it starts: swapoff() fails with EXDEV
FILTERED = """
import errno, os, sys
sys.path.insert(0, sys.argv[1])
from incus_fusecr.linux import seccomp
seccomp.SYSCALLS["x86_64"]["swapoff"], seccomp.SYSCALLS["aarch64"]["swapoff"] = 168, 225
seccomp.install(seccomp.build_filter({"swapoff": seccomp.ret_errno(errno.EXDEV)}), listener=False)
seccomp.install(seccomp.build_filter({"kexec_load": seccomp.ret_errno(errno.EXDEV)}), listener=False)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@both
def test_the_copy_has_the_daemons_seccomp_filters(raw: Make, user: bool) -> None:
    daemon = raw("plain", user, wrapper=["/usr/bin/python3", "-c", FILTERED, initprobe._PARENT])
    before = daemon.facts(1)
    assert (before["seccomp"], before["swapoff"]) == (["2", "2"], errno.EXDEV)
    assert daemon.probe() == REPLY
    after = daemon.facts(2)
    assert (after["seccomp"], after["swapoff"]) == (["2", "3"], errno.EXDEV)
    assert Path(f"/proc/{daemon.pid}/status").read_text().count("TracerPid:\t0\n") == 1


@pytest.mark.requires_command("strace")
def test_filters_that_cannot_be_read_are_a_reason_to_refuse(raw: Make) -> None:
    daemon = raw("plain", wrapper=["/usr/bin/python3", "-c", FILTERED, initprobe._PARENT])
    strace = subprocess.Popen(["strace", "-q", "-o", "/dev/null", "-p", str(daemon.pid)])
    try:
        traced = f"TracerPid:\t{strace.pid}\n"
        wait_for(lambda: traced in Path(f"/proc/{daemon.pid}/status").read_text(), "strace")
        with pytest.raises(ProbeError, match=r"seccomp filters of process .*being traced"):
            daemon.probe(SHORT)
    finally:
        strace.terminate()
        strace.wait(DEADLINE)
    assert not (daemon.notes / "facts-2").exists()


@both
def test_rights_that_the_daemon_has_dropped(raw: Make, user: bool) -> None:
    """At exec root gets its whole bounding set back: the copy's is no larger than what the daemon still has."""
    daemon = raw("fewer-rights", user)
    assert daemon.probe() == REPLY
    mask = 1 << CAP_MKNOD
    assert int(daemon.facts(1)["status"]["CapPrm"], 16) & mask, "facts are written before the drop"
    assert not int(daemon.facts(2)["status"]["CapPrm"], 16) & mask
    assert not int(daemon.facts(2)["status"]["CapBnd"], 16) & mask


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of the test, in the first hierarchy with a freezer."""
    text = Path("/proc/self/mountinfo").read_text()
    found = re.findall(r"^\d+ \d+ \S+ / (\S+) .* - (cgroup2?) \S+ (\S+)$", text, re.MULTILINE)
    bases = [Path(path) for path, kind, options in found if kind == "cgroup2" or "freezer" in options.split(",")]
    if not bases:
        pytest.skip("needs a cgroup2 or v1 freezer hierarchy")
    base = next((path for path in bases if (path / "cgroup.controllers").exists()), bases[0])
    made = base / f"fusecr-test-{os.getpid()}"
    made.mkdir()
    yield made
    for pid in made.joinpath("cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    wait_for(lambda: not made.joinpath("cgroup.procs").read_text(), "end of the cgroup's processes")
    made.rmdir()


def test_the_copy_is_in_the_daemons_cgroup(raw: Make, cgroup: Path) -> None:
    daemon = raw("plain")
    (cgroup / "cgroup.procs").write_text(str(daemon.pid))
    assert daemon.probe() == REPLY
    assert cgroup.name in daemon.facts(2)["cgroup"]
    (cgroup / "cgroup.procs").parent.parent.joinpath("cgroup.procs").write_text(str(daemon.pid))


def test_frozen_daemon_is_refused(raw: Make, cgroup: Path) -> None:
    daemon = raw("plain")
    (cgroup / "cgroup.procs").write_text(str(daemon.pid))
    version2 = (cgroup / "cgroup.freeze").exists()
    name, on, off = ("cgroup.freeze", "1", "0") if version2 else ("freezer.state", "FROZEN", "THAWED")
    (cgroup / name).write_text(on)
    try:
        wait_for(lambda: "frozen 1" in (cgroup / "cgroup.events").read_text() if version2 else True, "the frozen cgroup")
        with pytest.raises(ProbeError, match="this cgroup is frozen"):
            daemon.probe(SHORT)
    finally:
        (cgroup / name).write_text(off)
        cgroup.parent.joinpath("cgroup.procs").write_text(str(daemon.pid))
    assert not (daemon.notes / "facts-2").exists()


def test_program_that_was_replaced(sandbox: Callable[..., Sandbox]) -> None:
    """After an upgrade the path has another program, or none: the copy runs the one that the daemon runs."""
    box = sandbox()
    python = box.directory / "python"
    shutil.copy(os.path.realpath("/usr/bin/python3"), python)
    daemon = Raw(box, "plain", python=str(python))
    python.unlink()
    assert daemon.probe() == REPLY
    python.write_text("#!/bin/sh\nexit 77\n")
    python.chmod(0o755)
    assert daemon.probe() == REPLY
    daemon.unharmed()


def test_device_named_on_the_command_line(sandbox: Callable[..., Sandbox]) -> None:
    """mount.fuse3 -o drop_privileges: the daemon gets /dev/fuse mounted and open, as /dev/fd/N."""
    box = sandbox()
    for name in ("notes", "mnt"):
        (box.directory / name).mkdir()
    script = box.directory / "rawfuse.py"
    shutil.copy(HERE / "rawfuse.py", script)
    starter = (
        f"import os,sys; sys.path.insert(0, {str(box.directory)!r}); import rawfuse\n"
        f"fd = os.open('/dev/fuse', os.O_RDWR); os.dup2(fd, 23); rawfuse.mount_classic(23, {str(box.directory)!r}+'/mnt')\n"
        f"os.execv(sys.executable, [sys.executable, {str(script)!r}, 'plain', '/dev/fd/23', {str(box.directory)!r}+'/notes'])"
    )
    process = box.popen(["/usr/bin/python3", "-c", starter])
    wait_for(lambda: (box.directory / "notes" / "facts-1").exists(), "the daemon")
    pid = wait_for(lambda: [p for p in descendants(process.pid) if alive(p)], "the daemon's pid")[0]
    assert probe_init(pid, deadline=DEADLINE).raw == REPLY
    assert box.run(["cat", f"{box.directory}/mnt/hello"]).stdout == "hello\n"


def test_process_that_is_gone() -> None:
    process = subprocess.Popen(["true"])
    with pytest.raises(ProbeError, match="a zombie or a kernel thread"):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        probe_init(process.pid, deadline=SHORT)
    process.wait()
    with pytest.raises(ProbeError, match="the process is gone"):
        probe_init(process.pid, deadline=SHORT)


def helper(daemon: Raw) -> subprocess.Popen[bytes]:
    """The helper of a probe whose copy never answers, once that copy runs."""
    job = {"op": "probe", "pid": daemon.pid, "connections": [], "seconds": 60,
           "request": kernel_init_request().raw.hex()}  # fmt: skip
    command = [sys.executable, "-I", "-S", "-c", initprobe._START, initprobe._PARENT]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={})
    assert process.stdin
    process.stdin.write(json.dumps(job).encode() + b"\n")
    process.stdin.flush()
    wait_for(lambda: (daemon.notes / "facts-2").exists(), "the second life")
    return process


@pytest.mark.parametrize("end", ["close", "kill"])
@both
def test_nothing_outlives_the_helper(raw: Make, end: str, user: bool) -> None:
    """The agent dies (its end of the pipe closes), or the helper is killed: the copy goes, stopped or not."""
    daemon = raw("stops", user)
    process = helper(daemon)
    assert len(descendants(process.pid)) >= 4
    if end == "kill":
        process.kill()
    finish(process)


def test_container_root_cannot_look_into_the_helpers(raw: Make) -> None:
    """What the host runs in the container's pid namespace is not dumpable: no ptrace, no descriptors, no root directory."""
    daemon = raw("silent", user=True)
    process = helper(daemon)
    for pid, names in inside(process):
        for name in ("fd", "root", "cwd", "exe"):
            done = daemon.box.run(["ls", f"/proc/{names[1]}/{name}"])
            assert done.returncode != 0 and "ermission denied" in done.stderr, f"{pid}/{name}: {done.stdout}{done.stderr}"
    finish(process)


def test_the_helpers_have_no_more_rights_than_the_container(raw: Make) -> None:
    """In a privileged container its root may ptrace them: they must not have what it has not."""
    daemon = raw("silent", wrapper=["setpriv", "--bounding-set", "-sys_module,-sys_time"])
    process = helper(daemon)
    for pid, _names in inside(process):
        status = Path(f"/proc/{pid}/status").read_text()
        for name in ("CapBnd", "CapPrm", "CapEff", "CapInh"):
            found = re.search(rf"{name}:\t(.*)", status)
            assert found and not int(found[1], 16) & (1 << 16 | 1 << 25), name
    finish(process)


def inside(process: subprocess.Popen[bytes]) -> list[tuple[int, list[str]]]:
    """inner and init: pid here, and in each of their pid namespaces."""
    found = []
    for pid in sorted(descendants(process.pid)):
        line = re.search(r"NSpid:\t(.*)", Path(f"/proc/{pid}/status").read_text())
        assert line
        names = line[1].split()
        if len(names) == 2 or names[2:] == ["1"]:
            found.append((pid, names))
    assert len(found) == 2
    return found


def finish(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin and process.stdout
    process.stdin.close()
    process.wait(DEADLINE)
    process.stdout.close()
