# SPDX-License-Identifier: Apache-2.0
"""Labs whose containers have real limits, and labs whose hosts have systemd and the packaged units; in labs of their own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lxcheck
import pytest

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "lab" / "lab"
NAME = f"{os.environ.get('FUSECR_LAB', 'lab')[:20]}-mode"
STATE = Path("/var/lib/incus-fusecr-lab") / NAME
MODES = ("loop", "held", "cwd", "dirs", "poll")
PYTHON = "/opt/incus-fusecr/bin/python"

needs_v1 = pytest.mark.skipif(
    " - cgroup cgroup " not in Path("/proc/self/mountinfo").read_text(), reason="needs mounted cgroup v1 hierarchies"
)
pytestmark = [pytest.mark.requires_root, pytest.mark.requires_fuse]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """In place of the suite's own: a lab's processes come to pytest as orphans, and are looked for here."""
    yield
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                return
        except ChildProcessError:
            return


def lab(*args: str, code: int = 0, stdin: bytes = b"", timeout: float = 600) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FUSECR_LAB": NAME}
    done = subprocess.run([str(LAB), *args], input=stdin, capture_output=True, timeout=timeout, env=environment, check=False)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, f"lab {shlex.join(args)}: {done.returncode}\n{out}{err}"
    return subprocess.CompletedProcess(args, done.returncode, out, err)


def inside(script: str, host: str = "h1", code: int = 0, stdin: bytes = b"") -> str:
    return lab("exec", host, "--", "sh", "-c", script, code=code, stdin=stdin, timeout=90).stdout.strip()


def wait_for(what: str, holds: Callable[[], Any], seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
    return value


def down() -> None:
    lab("down", timeout=60)
    left = [str(p) for p in Path("/sys/fs/cgroup").glob(f"**/fusecr-lab.{NAME}")]
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(STATE) in line]
    assert not STATE.exists() and not left and not mounts


@pytest.fixture(scope="module")
def lxreader(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("lxreader") / "lxreader"
    sources = [str(ROOT / "tests" / "workload" / f"{name}.c") for name in ("lxreader", "lxreader-lib")]
    subprocess.run(["gcc", "-O2", "-static", "-o", str(output), *sources, "-lm"], check=True, timeout=120)
    return output.read_bytes()


class Limited:
    """A busybox container with limits and all readers in it."""

    def __init__(self, name: str, mib: int, cpus: int, options: str = "") -> None:
        self.name, self.kb, self.cpus = name, mib * 1024, cpus
        inside(f"incus launch -q busybox {name} -c limits.memory={mib}MiB -c limits.cpu={cpus} {options} </dev/null")

    def sh(self, script: str) -> str:
        return inside(f"incus exec {self.name} -- sh -c {shlex.quote(script)}")

    def start_readers(self, program: bytes) -> None:
        inside(f"incus file push -q --mode 0755 - {self.name}/root/lxreader", stdin=program)
        for mode in MODES:
            self.sh(f"/root/lxreader {mode} /root/{mode}.json /root/stop --mem {self.kb} --cpus {self.cpus} --detach")

    def reports(self) -> list[dict[str, Any]]:
        """One of each; incus exec gives nothing of what was said, now and then on a busy machine."""
        texts = [wait_for(f"report of {mode}", lambda mode=mode: self.sh(f"cat /root/{mode}.json")) for mode in MODES]
        return [json.loads(text) for text in texts]

    def judge(self) -> lxcheck.Summary:
        """Let them work, end them, judge them."""
        wait_for("200 operations", lambda: self.sh("ls /root").count("json") == len(MODES) and sum(
            r["operations"] for r in self.reports()) > 200)
        self.sh("touch /root/stop")
        wait_for("their end", lambda: all(r["finished"] for r in self.reports()))
        return lxcheck.summary(self.reports(), self.kb, self.cpus)


@pytest.fixture(scope="module")
def shape() -> Iterator[Callable[..., None]]:
    """``shape("--cgroup", "v1")``: the lab is up like that; the one before goes down."""
    now: list[tuple[str, ...]] = []

    def make(*options: str) -> None:
        if now != [options]:
            if now:
                now.clear()
                down()
            now.append(options)
            lab("up", "--hosts", "1", *options)

    yield make
    down()


@pytest.fixture
def v1(shape: Callable[..., None]) -> None:
    shape("--cgroup", "v1")


@needs_v1
def test_limits_are_real_and_lxcfs_shows_them(v1: None, lxreader: bytes) -> None:
    host = int(Path("/proc/meminfo").read_text().split()[1])
    small, big = Limited("small", 256, 1), Limited("big", 512, min(2, os.cpu_count() or 1))
    for container in (small, big):
        assert container.kb < host
        container.start_readers(lxreader)
    for container in (small, big):
        found = container.judge()
        assert found.problems == [] and found.values["mem"] == [container.kb] and found.values["cpus"] == [container.cpus]
    # and the kernel keeps them: a process that takes more is ended
    assert inside("incus exec small -- sh -c 'tail -c 400m /dev/zero >/dev/null'; echo $?") == "137"


@needs_v1
def test_exec_status_and_the_shape_of_a_lab(v1: None) -> None:
    done = lab("exec", "h1", "--", "sh", "-c", "cat; exit 7", code=7, stdin=b"in")
    assert done.stdout == "in"
    names = set(inside("ls /sys/fs/cgroup").split())
    assert {"memory", "cpu", "unified"} <= names
    assert inside("cat /proc/self/cgroup | cut -d: -f3 | sort -u") == "/"
    assert "cgroup v1, init labctl" in lab("status").stdout
    refused = lab("up", "--hosts", "1", code=1)
    assert "cgroup v1, init labctl, not 1 on dir, cgroup v2, init labctl" in refused.stderr
    assert "already up" in lab("up", "--hosts", "1", "--cgroup", "v1").stderr


@pytest.fixture
def systemd(shape: Callable[..., None]) -> None:
    shape("--init", "systemd")


@pytest.fixture
def unprotected(systemd: None) -> Iterator[None]:
    """No agent, which would hold lxcfs itself and put another in its place."""
    inside("labctl stop agent")
    yield
    inside("systemctl restart incus-fusecr-holder; labctl start agent; labctl wait agent")


def show(unit: str, *names: str) -> list[str]:
    return inside(f"systemctl show -P {','.join(names)} {unit}").split()


def test_systemd_runs_the_packaged_units_and_ours(systemd: None) -> None:
    assert inside("cat /proc/1/comm") == "systemd"
    assert inside("systemctl is-system-running; systemctl --failed --no-legend") == "running"
    for unit in ("lxcfs", "incus", "incus-fusecr", "incus-fusecr-holder"):
        assert show(unit, "ActiveState") == ["active"], unit
        assert inside(f"systemctl is-enabled {unit}") in ("enabled", "indirect"), unit
    assert show("lxcfs", "FragmentPath") == ["/usr/lib/systemd/system/lxcfs.service"]
    # what it says of missing manual pages goes to stderr in the same form as of unknown keys
    verified = "systemd-analyze verify --man=no incus-fusecr-holder.service incus-fusecr.service lxcfs.service 2>&1"
    assert inside(verified) == ""
    assert "init systemd" in lab("status").stdout
    inside("incus launch -q busybox c1 </dev/null; incus exec c1 -- grep -q lxcfs /proc/mounts")


def test_labctl_has_the_same_words(systemd: None) -> None:
    old = inside("labctl pid agent")
    assert inside("cat /proc/$(labctl pid agent)/comm").startswith("incus-fusecr")
    inside("kill -9 $(labctl pid agent)")
    wait_for("another agent", lambda: inside("labctl pid agent || true") not in ("0", old))
    inside("labctl wait agent; labctl stop agent")
    assert inside("labctl pid agent", code=3) == "0"
    assert "agent        inactive" in inside("labctl status")
    lab("reload")
    assert inside("labctl pid agent") != "0" and "serves" in inside("labctl log agent")
    assert "no service" in lab("exec", "h1", "--", "labctl", "start", "nothing", code=1).stderr


PUT = """
import os
from incus_fusecr.holder.client import HolderClient
r, w = os.pipe()
fuse = os.open('/dev/fuse', os.O_RDWR)
tree = os.open('/var/lib/lxcfs', os.O_PATH)
with HolderClient() as holder:
    for number in range(50):
        holder.put(f'conn-{number}', {'n': number}, [fuse, w])
    holder.put('tree-1', {}, [tree])
    holder.meta('conn-7', {'n': 'seven'})
    holder.drop('conn-8')
"""
GET = """
import os
from incus_fusecr.holder.client import HolderClient
with HolderClient() as holder:
    entries = list(holder.entries())
    links = [os.readlink(f'/proc/self/fd/{fd.fileno()}') for key in ('conn-7', 'tree-1') for fd in holder.get(key)[1]]
    print(len(entries), sum(entry.fds for entry in entries), holder.get('conn-7')[0]['n'], links[0], links[1][:5], links[2])
"""
HELD = "50 99 seven /dev/fuse pipe: /var/lib/lxcfs"


def python(script: str) -> str:
    return lab("exec", "h1", "--", PYTHON, "-c", script, timeout=60).stdout.strip()


def test_the_store_gives_everything_back(unprotected: None) -> None:
    """After a kill -9, a restart, and systemd's own re-execution; and nothing after a stop."""
    python(PUT)
    assert python(GET) == HELD
    for step in (
        "kill -9 $(labctl pid holder)",
        "systemctl restart incus-fusecr-holder",
        "systemctl daemon-reexec; kill -9 $(labctl pid holder)",
    ):
        old = inside("labctl pid holder")
        inside(step)
        wait_for("another holder", lambda old=old: inside("labctl pid holder || true") not in ("0", old))
        assert python(GET) == HELD
        assert show("incus-fusecr-holder", "NFileDescriptorStore") == ["50"]
    assert "<4>" not in inside("journalctl -q -o cat -u incus-fusecr-holder -p warning")
    inside("systemctl stop incus-fusecr-holder")
    assert show("incus-fusecr-holder", "NFileDescriptorStore", "Result") == ["0", "success"]
    inside("systemctl start incus-fusecr-holder")
    assert python("from incus_fusecr.holder.client import HolderClient; print(list(HolderClient().entries()))") == "[]"


def test_the_holder_is_shut_in(systemd: None) -> None:
    pid = inside("labctl pid holder")
    status = dict(line.split(":", 1) for line in inside(f"cat /proc/{pid}/status").splitlines())
    assert (status["Seccomp"].strip(), status["NoNewPrivs"].strip()) == ("2", "1")
    allowed = 1 << 19 | 1 << 24  # SYS_PTRACE, SYS_RESOURCE
    assert int(status["CapEff"], 16) & ~allowed == 0
    assert inside(f"cat /proc/{pid}/comm") == "fusecr-holder"
    assert inside(f"ls /proc/{pid}/root/home | wc -l") == "0"
    inside(f"nsenter -m -t {pid} touch /etc/x 2>/dev/null", code=1)


def test_lxcfs_comes_back_without_an_agent_as_before(unprotected: None) -> None:
    """The drop-in takes the package's ExecStopPost away; a mount that nobody holds must go all the same."""
    assert "path=/bin/sh" in inside("systemctl show -P ExecStopPost lxcfs")
    assert "path=/bin/fusermount" not in inside("systemctl show -P ExecStopPost lxcfs")
    for _ in range(2):
        old = inside("labctl pid lxcfs")
        inside(f"kill -9 {old}")
        wait_for("another lxcfs", lambda old=old: inside("labctl pid lxcfs || true") not in ("0", old))
        wait_for("its files", lambda: "MemTotal" in inside("head -1 /var/lib/lxcfs/proc/meminfo 2>/dev/null || true"))
        assert inside("grep -c ' /var/lib/lxcfs ' /proc/self/mountinfo") == "1"


HOLD = """
import os, subprocess
from incus_fusecr.holder.client import HolderClient
from incus_fusecr.linux.pidfd import pidfd_getfd, pidfd_open
pid = int(subprocess.check_output(['labctl', 'pid', 'lxcfs']))
numbers = [int(n) for n in os.listdir(f'/proc/{pid}/fd') if os.readlink(f'/proc/{pid}/fd/{n}') == '/dev/fuse']
with HolderClient() as holder:
    holder.put('conn-1', {}, [pidfd_getfd(pidfd_open(pid), n) for n in numbers])
"""


def test_a_mount_that_is_held_is_not_taken_away(unprotected: None) -> None:
    """Nobody serves it here, so the next lxcfs waits in its mkdir; once it is let go, all is as without us."""
    wait_for("lxcfs", lambda: inside("grep -c ' /var/lib/lxcfs ' /proc/self/mountinfo || true") == "1")
    python(HOLD)
    device = inside("grep ' /var/lib/lxcfs ' /proc/self/mountinfo | cut -d' ' -f3")
    inside("kill -9 $(labctl pid lxcfs)")
    wait_for("the next start", lambda: show("lxcfs", "SubState") == ["start-pre"])
    assert inside("grep ' /var/lib/lxcfs ' /proc/self/mountinfo | cut -d' ' -f3") == device
    python("from incus_fusecr.holder.client import HolderClient; HolderClient().drop('conn-1')")
    wait_for("its files", lambda: "MemTotal" in inside("timeout 1 head -1 /var/lib/lxcfs/proc/meminfo 2>/dev/null || true"))


@needs_v1
def test_systemd_and_real_limits_go_together(shape: Callable[..., None], lxreader: bytes) -> None:
    shape("--init", "systemd", "--cgroup", "v1")
    assert inside("systemctl is-system-running") == "running"
    container = Limited("c1", 128, 1)
    container.start_readers(lxreader)
    assert container.judge().problems == []


def protected(not_pid: int = 0) -> dict[str, Any]:
    """What status says of lxcfs as soon as it is protected, with a spare, and by another daemon than this one."""

    def ready() -> dict[str, Any] | None:
        text = inside("incus-fusecr status -f json || true")
        unit = json.loads(text)[0] if text.startswith("[") else {}
        return unit if unit.get("state") == "protected" and unit["spare"] and unit["pid"] != not_pid else None

    return dict(wait_for("a protected lxcfs", ready))


@needs_v1
def test_what_systemd_and_apt_do_to_lxcfs_goes_unnoticed(shape: Callable[..., None], lxreader: bytes) -> None:
    """``FUSECR_RESTARTS=20``: so many restarts."""
    shape("--init", "systemd", "--cgroup", "v1")
    containers = Limited("r1", 128, 1), Limited("r2", 256, min(2, os.cpu_count() or 1), "-c security.privileged=true")
    for container in containers:
        container.start_readers(lxreader)
    package = inside("dpkg-query -W -f '${Version} ${db:Status-Abbrev}' lxcfs")
    restarts = int(os.environ.get("FUSECR_RESTARTS", "3"))
    steps = ["systemctl restart lxcfs"] * restarts + [
        "systemctl stop lxcfs; sleep 0.5; systemctl start lxcfs",
        "systemctl kill -s KILL lxcfs",
        "systemctl reload lxcfs || true",
        "systemctl restart incus-fusecr-holder; systemctl restart lxcfs; systemctl restart incus-fusecr",
        "apt-get install -y -q --reinstall /usr/share/fusecr-lab/lxcfs_*.deb 2>&1",
    ]
    said = ""
    for step in steps:
        before = protected()["pid"]
        said = inside(step)
        if "reload" not in step:
            # at the end everybody has the daemon that systemd started
            wait_for(f"the service's daemon after {step}", lambda: protected()["pid"] == int(inside("labctl pid lxcfs")), 60)
        assert "apt-get" in step or protected()["pid"] != before or "reload" in step, step
        for container in containers:
            assert [r["texts"] for r in container.reports()] == [[]] * len(MODES), step
    assert "Setting up lxcfs" in said and inside("dpkg-query -W -f '${Version} ${db:Status-Abbrev}' lxcfs") == package
    assert inside("systemctl is-system-running; systemctl --failed --no-legend") == "running"
    assert inside("grep -c ' /var/lib/lxcfs ' /proc/self/mountinfo") == "1"
    for container in containers:
        assert container.judge().problems == []
    wait_for("the end of old connections", lambda: len(protected()["connections"]) == 2, 45)
