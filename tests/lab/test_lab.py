# SPDX-License-Identifier: Apache-2.0
"""The lab itself, in labs of its own: what it promises its users, and that nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

LAB = Path(__file__).resolve().parents[2] / "lab" / "lab"
NAME = f"{os.environ.get('FUSECR_LAB', 'lab')[:20]}-self"
STATE = Path("/var/lib/incus-fusecr-lab") / NAME
SLOW = 600  # the first `up` of a machine builds the caches

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


def lab(*args: str, check: bool = True, stdin: str = "", timeout: float = SLOW) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(LAB), *args], input=stdin, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "FUSECR_LAB": NAME}, check=False)
    if check:
        assert done.returncode == 0, f"lab {' '.join(args)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def inside(host: str, script: str, check: bool = True) -> str:
    return lab("exec", host, "--", "sh", "-c", script, check=check, timeout=60).stdout.strip()


def pid_of(host: str) -> int:
    return int(json.loads((STATE / "lab.json").read_text())["hosts"][host]["pid"])


def pool_devices() -> list[str]:
    return [line for line in subprocess.run(["losetup", "-n", "-O", "NAME,BACK-INO", "-a"], capture_output=True,
                                            text=True, check=True).stdout.splitlines()
            if int(line.split()[1]) in {p.stat().st_ino for p in STATE.glob("*/incus/disks/*")}]


def processes() -> list[str]:
    """Live processes that look at the lab's directory as one of their mounts, or are in its cgroups."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            text = (path / "mountinfo").read_text() + (path / "cgroup").read_text()
        except OSError:
            continue
        if state not in "ZX" and (f"{STATE}/" in text or f"fusecr-lab.{NAME}" in text):
            found.append(path.name)
    return found


def remains(loops: list[str]) -> dict[str, object]:
    """What a lab must not leave behind; empty values if it left nothing."""
    attached = {line.split()[0] for line in subprocess.run(["losetup", "-n", "-O", "NAME", "-a"], check=True, text=True,
                                                           capture_output=True).stdout.splitlines()}
    mine = [name for name in (line.split()[0] for line in loops) if name in attached]
    return {
        "state": STATE.exists(),
        "processes": processes(),
        "mounts": [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(STATE) in line],
        "cgroups": [str(p) for p in Path("/sys/fs/cgroup").glob(f"**/fusecr-lab.{NAME}")],
        "loops": mine,
    }


@pytest.fixture(scope="module")
def up() -> Iterator[None]:
    lab("up", "--driver", "btrfs")
    yield
    lab("down")


def test_exec_passes_input_output_and_exit_code(up: None) -> None:
    done = lab("exec", "h1", "--", "sh", "-c", "cat; echo oops >&2; exit 7", stdin="in\n", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "in\n", "oops\n")
    assert lab("exec", "h1", "--", "sh", "-c", "kill -9 $$", check=False).returncode == 128 + signal.SIGKILL
    assert lab("exec", "h1", "--", "no-such-command", check=False).returncode == 127
    unknown = lab("exec", "h7", "--", "true", check=False)
    assert unknown.returncode == 125 and "h7" in unknown.stderr and "h1, h2" in unknown.stderr


def test_killed_exec_takes_its_command_along(up: None) -> None:
    process = subprocess.Popen([str(LAB), "exec", "h1", "--", "sh", "-c", "echo $$; exec sleep 1234"], text=True,
                               env={**os.environ, "FUSECR_LAB": NAME}, stdout=subprocess.PIPE)
    assert process.stdout
    pid = process.stdout.readline().strip()
    process.kill()
    process.wait(10)
    process.stdout.close()
    deadline = time.monotonic() + 10
    while inside("h1", f"grep -s '^State:.[^ZX]' /proc/{pid}/status", check=False):
        assert time.monotonic() < deadline


def test_hosts_trust_each_other_and_the_client(up: None) -> None:
    for host, remote in (("h1", "h2"), ("h2", "h1"), ("client", "h1"), ("client", "h2")):
        assert inside(host, f"incus query {remote}:/1.0 | grep '\"auth\"'").endswith('"trusted",')
        assert set(inside(host, f"incus image list {remote}: -f csv -c l").split()) == {"busybox", "debian"}


def test_no_route_leads_out(up: None) -> None:
    for host in ("h1", "h2", "net"):
        routes = inside(host, "ip route").splitlines()
        assert len(routes) == 1 and "dev labbr0 proto kernel scope link" in routes[0]


def test_a_container_answers_on_the_network_until_it_is_cut(up: None) -> None:
    net = inside("net", "ip -4 -o addr show labbr0").split()[3].rpartition(".")[0]
    inside("h1", "incus launch -q busybox c1 -p default -p fusecr -p lan </dev/null")
    inside("h1", f"incus exec c1 -- sh -c 'ip addr add {net}.50/24 dev eth0; ip link set eth0 up'")
    ping = f"ping -c 1 -W 1 {net}.50 >/dev/null && echo yes || echo no"
    assert inside("net", ping) == "yes"
    lab("cut", "h1")
    assert inside("net", ping) == "no"
    lab("heal")
    assert inside("net", ping) == "yes" and inside("h2", ping) == "yes"
    lab("cut", "h1", "h2")
    assert inside("net", ping) == "yes" and inside("h2", ping) == "no"
    lab("heal")
    assert inside("h2", ping) == "yes"


def test_killed_services_come_back_and_stopped_ones_do_not(up: None) -> None:
    for service in ("incusd", "agent"):
        old = inside("h2", f"labctl pid {service}")
        inside("h2", f"kill -9 {old}")
        deadline = time.monotonic() + 20
        while inside("h2", f"labctl pid {service}", check=False) in ("0", old):
            assert time.monotonic() < deadline
        inside("h2", f"labctl wait {service}")
    inside("h2", "labctl stop agent")
    assert "stopped" in inside("h2", "sleep 1; labctl status | grep agent")
    inside("h2", "labctl start agent")
    assert inside("h2", "labctl pid agent") != "0"


def test_up_again_changes_nothing(up: None) -> None:
    before = pid_of("h1")
    assert "already up" in lab("up", "--driver", "btrfs").stderr
    assert pid_of("h1") == before
    refused = lab("up", "--hosts", "3", check=False)
    assert refused.returncode == 1 and "lab down" in refused.stderr


def test_down_after_kills_leaves_nothing() -> None:
    lab("up", "--driver", "btrfs")
    inside("h1", "incus launch -q busybox c1 </dev/null; incus launch -q debian d1 </dev/null")
    inside("h1", "incus exec d1 -- sh -c 'mkdir /mnt/b && bindfs /srv /mnt/b && (sleep 1000 </mnt/b >/dev/null 2>&1 &)'")
    loops = pool_devices()
    assert len(loops) == 2
    inside("h2", "kill -9 $(labctl pid incusd)")
    inside("h1", "kill -STOP $(pgrep -x bindfs); kill -9 $(pgrep -f 'incusd forkstart|lxc monitor' | head -n1)", check=False)
    os.kill(pid_of("h1"), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while lab("status", check=False).returncode != 3:
        assert time.monotonic() < deadline
    dead = lab("exec", "h1", "--", "true", check=False)
    assert dead.returncode == 125 and "not running" in dead.stderr
    lab("down", timeout=60)
    assert not any(remains(loops).values()), remains(loops)
    assert lab("status", check=False).returncode == 3


def test_up_after_a_killed_up() -> None:
    for delay in (0.15, 0.4, 1.2):
        process = subprocess.Popen([str(LAB), "up"], env={**os.environ, "FUSECR_LAB": NAME}, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        process.wait(10)
    assert "left behind" in lab("up", "--hosts", "1").stderr
    assert inside("h1", "incus storage list -f csv").startswith("default,dir")
    lab("down", timeout=60)
    assert not any(remains([]).values()), remains([])


def test_the_second_of_two_up_at_once_is_refused() -> None:
    first = subprocess.Popen([str(LAB), "up", "--hosts", "1"], env={**os.environ, "FUSECR_LAB": NAME},
                             stderr=subprocess.PIPE, text=True)
    assert first.stderr
    first.stderr.readline()  # its first progress line: it holds the lock
    second = lab("up", "--hosts", "1", check=False)
    assert second.returncode == 1 and "locked by `lab up`" in second.stderr and str(first.pid) in second.stderr
    assert "Traceback" not in second.stderr
    first.communicate(timeout=SLOW)
    assert first.returncode == 0
    lab("down", timeout=60)
    assert not any(remains([]).values()), remains([])
