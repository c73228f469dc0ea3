# SPDX-License-Identifier: Apache-2.0
"""Addresses and established TCP connections of a migrated container, watched from a third machine.

Every client sends numbered records over one connection and checks each echo; the server checks them, too. A connection that
was reset or closed, and a byte that was lost, doubled or changed, is an error of the client's report.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "lab" / "lab"
NAME = "net-c1"
FILES = ("fsclient.py", "clientlib.py", "tcpecho.py")
PLACE = "/root/net-test"
NET6 = "fd83:6e65:74::"
JOURNAL = "/run/incus-fusecr/journal"
WAIT = "i=0; until {}; do i=$((i+1)); [ $i -gt 6000 ] && exit 99; sleep 0.01; done; "

pytestmark = pytest.mark.requires_root


def on(host: str, *argv: str, code: int | None = 0, text: str | bytes = "") -> subprocess.CompletedProcess[str]:
    """Run a command on a host of the lab and look at its exit code."""
    data = text.encode() if isinstance(text, str) else text
    done = subprocess.run([str(LAB), "exec", host, "--", *argv], capture_output=True, timeout=300, input=data)
    answer = subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())
    assert code is None or done.returncode == code, f"{argv}: {done.returncode}\n{answer.stdout}{answer.stderr}"
    return answer


def sh(host: str, script: str, code: int | None = 0) -> str:
    return on(host, "sh", "-c", script, code=code).stdout.strip()


def inside(host: str, *argv: str, code: int | None = 0, text: bytes = b"") -> str:
    return on(host, "incus", "exec", NAME, "--", *argv, code=code, text=text).stdout.strip()


class Connection:
    """A client on the third machine."""

    def __init__(self, address: str) -> None:
        self.report = f"{PLACE}/{address}.json"
        argv = ["python3", f"{PLACE}/fsclient.py", "tcpclient", f"{address}:7000", self.report]
        on("net", "rm", "-f", self.report)
        self.process = subprocess.Popen([str(LAB), "exec", "net", "--", *argv], stdin=subprocess.DEVNULL)

    def read(self) -> dict[str, Any]:
        return dict(json.loads(on("net", "cat", self.report).stdout))

    def goes_on(self, seconds: float = 90.0) -> None:
        """Wait until 20 more records came back; everything before them has come in sequence then."""
        end = time.monotonic() + seconds
        while on("net", "test", "-e", self.report, code=None).returncode:
            assert time.monotonic() < end and self.process.poll() is None, "the client does not start"
        wanted = self.read()["operations"] + 20
        while (now := self.read())["operations"] < wanted:
            assert now["errors"] == 0, now
            assert time.monotonic() < end, f"no more answers: {now}"
            time.sleep(0.2)
        assert (now["errors"], now["detail"]["resets"], now["detail"]["connections"]) == (0, 0, 1), now

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[str]]:
    """A container on h1 that serves one IPv4 and one IPv6 address of the lab's segment."""
    if subprocess.run([str(LAB), "exec", "h1", "--", "true"], capture_output=True, timeout=60).returncode:
        pytest.skip("needs a lab that is up: lab test")
    net4 = sh("net", "ip -4 -o addr show labbr0").split()[3].rpartition(".")[0]
    found = [f"{net4}.77", f"{NET6}77"]
    delete()
    on("h1", "incus", "launch", "-q", "debian", NAME, "-p", "default", "-p", "fusecr", "-p", "lan")
    end = time.monotonic() + 120
    while inside("h1", "systemctl", "is-system-running", code=None) != "running":
        assert time.monotonic() < end, "the container does not come up"
        time.sleep(0.5)
    setup = f"ip link set eth0 up; ip addr add {found[0]}/24 dev eth0; ip addr add {found[1]}/64 dev eth0"
    # With duplicate address detection, which a restore must not run again: the server cannot bind before it is over.
    inside("h1", "sh", "-c", f"{setup}; while ip -6 addr show tentative | grep -q inet6; do sleep 0.1; done")
    sh("net", f"mkdir -p {PLACE}; ip addr replace {NET6}fe/64 dev labbr0 nodad")
    inside("h1", "mkdir", "-p", PLACE)
    for name in FILES:
        content = (ROOT / "tests" / "workload" / name).read_bytes()
        on("net", "sh", "-c", f"cat > {PLACE}/{name}", text=content)
        inside("h1", "sh", "-c", f"cat > {PLACE}/{name}", text=content)
    for number, address in enumerate(found):
        unit = ["systemd-run", "--quiet", "--collect", "--unit", f"server{number}"]
        server = ["python3", f"{PLACE}/fsclient.py", "tcpserver", f"{address}:7000", f"{PLACE}/server{number}.json"]
        inside("h1", *unit, *server)
    end = time.monotonic() + 60
    connect = "import socket, sys; [socket.create_connection((a, 7000), 1) for a in sys.argv[1:]]"
    while on("net", "python3", "-c", connect, *found, code=None).returncode:
        assert time.monotonic() < end, "the servers do not come up"
    yield found
    sh("net", f"rm -r {PLACE}; ip addr del {NET6}fe/64 dev labbr0")
    delete()


def delete() -> None:
    for host in ("h1", "h2"):
        on(host, "incus", "delete", "-f", NAME, code=None)


@pytest.fixture
def connections(addresses: list[str]) -> Iterator[list[Connection]]:
    """Connections to both addresses, at work; the container is on h1."""
    assert status("h1") == "Running", "a former test left the container elsewhere"
    made = [Connection(address) for address in addresses]
    try:
        for connection in made:
            connection.goes_on()
        yield made
    finally:
        for connection in made:
            connection.close()


def status(host: str) -> str:
    found = json.loads(on(host, "incus", "list", f"^{NAME}$", "-f", "json").stdout)
    return str(found[0]["status"]) if found else ""


def answers_arp(address: str) -> bool:
    """Whether anybody on the segment has the address; asked anew, three times."""
    sh("net", f"ip neigh del {address} dev labbr0; ping -c 3 -i 0.3 -W 1 {address}", code=None)
    return "lladdr" in sh("net", f"ip neigh show {address}")


def wait_for(phase: str, kind: str) -> str:
    """A line of shell that waits for the phase of a session that the agent of the host is in."""
    return WAIT.format(f"grep -qs '\"phase\": \"{phase}\"' {JOURNAL}/{kind}-*.json")


def wait_gone(host: str) -> None:
    """Until the agent there has removed what a broken migration left."""
    end = time.monotonic() + 120
    while status(host):
        assert time.monotonic() < end, f"{host} still has {NAME}"
        time.sleep(0.5)


def rules(host: str) -> str:
    """What of CRIU's network lock is in the container's network namespace."""
    (found,) = json.loads(on(host, "incus", "list", f"^{NAME}$", "-f", "json").stdout)
    enter = f"nsenter --net=/proc/{found['state']['pid']}/ns/net"
    return sh(host, f"({enter} iptables-save; {enter} ip6tables-save; {enter} nft list tables) | grep -w CRIU", code=None)


def test_connections_survive_two_hops(connections: list[Connection]) -> None:
    before = inside("h1", "ip", "-o", "addr")
    mac = inside("h1", "cat", "/sys/class/net/eth0/address")
    on("h1", "incus-fusecr", "migrate", NAME, "h2:")
    assert (status("h1"), status("h2")) == ("", "Running")
    for connection in connections:
        connection.goes_on()
    on("h2", "incus-fusecr", "migrate", NAME, "h1:")
    assert (status("h1"), status("h2")) == ("Running", "")
    for connection in connections:
        connection.goes_on()
    assert inside("h1", "cat", "/sys/class/net/eth0/address") == mac
    fields = [[line.split()[i] for i in (1, 2, 3)] for line in before.splitlines()]
    assert [[line.split()[i] for i in (1, 2, 3)] for line in inside("h1", "ip", "-o", "addr").splitlines()] == fields


def test_a_held_source_does_not_answer_and_goes_on(connections: list[Connection], addresses: list[str]) -> None:
    assert answers_arp(addresses[0])
    state = "cat /sys/class/net/$(basename /sys/class/net/labbr0/brif/veth*)/{brport/state,operstate}"
    before = sh("h1", f"bash -c '{state}'")
    migrate = f"incus-fusecr migrate {NAME} h2: >/dev/null 2>&1 & "
    sh("h1", migrate + wait_for("held", "hold") + "kill -9 $!")
    assert not answers_arp(addresses[0])
    assert sh("h1", f"grep -l '\"phase\": \"held\"' {JOURNAL}/hold-*.json"), "the hold was over before the question was"
    for connection in connections:
        connection.goes_on()
    assert status("h1") == "Running" and answers_arp(addresses[0])
    assert sh("h1", f"bash -c '{state}'") == before
    wait_gone("h2")


def test_a_restored_target_does_not_answer_before_go(connections: list[Connection], addresses: list[str]) -> None:
    migrate = f"incus-fusecr migrate h1:{NAME} local: >/dev/null 2>&1 & "
    sh("h2", migrate + wait_for("prepared", "gate") + "kill -9 $!")
    assert not answers_arp(addresses[0])
    for connection in connections:
        connection.goes_on()
    assert status("h1") == "Running"
    wait_gone("h2")


def test_a_failed_start_keeps_the_connections(connections: list[Connection]) -> None:
    process = subprocess.Popen(
        [str(LAB), "exec", "h1", "--", "incus-fusecr", "migrate", NAME, "h2:"], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        sh("h1", wait_for("held", "hold"))
        sh("h2", "labctl stop agent")
        _, error = process.communicate(timeout=200)
        assert process.returncode == 1 and error.startswith("Error: "), error
        for connection in connections:
            connection.goes_on()
        assert status("h1") == "Running"
    finally:
        sh("h2", "labctl start agent")
        process.kill()
        process.wait()
    wait_gone("h2")


def test_killed_criu_keeps_the_connections(connections: list[Connection]) -> None:
    kill = f"kill -9 $(sed 's/.*\"criu\": \\([0-9]*\\).*/\\1/' {JOURNAL}/hold-*.json)"
    script = f"incus-fusecr migrate {NAME} h2: >/dev/null & {wait_for('held', 'hold')} {kill}; wait $!"
    done = on("h1", "sh", "-c", script, code=None)
    assert done.returncode not in (0, 99) and done.stderr.startswith("Error: "), done
    for connection in connections:
        connection.goes_on()
    assert status("h1") == "Running"
    assert rules("h1") == ""
    wait_gone("h2")


def test_a_renamed_device_is_refused(addresses: list[str]) -> None:
    rename = "ip link set {0} down && ip link set {0} name {1} && ip link set {1} up"
    inside("h1", "sh", "-c", rename.format("eth0", "wan0"))
    try:
        done = on("h1", "incus-fusecr", "migrate", NAME, "h2:", code=3)
        assert "eth0" in done.stderr and "wan0" in done.stderr
    finally:
        inside("h1", "sh", "-c", rename.format("wan0", "eth0"))
    assert (status("h1"), status("h2")) == ("Running", "")


# The answer of poll(2) on a pressure file without a trigger is EPOLLERR, at once and for ever.
WATCH = """
import os, select, time
own = open("/proc/self/cgroup").read().split("0::")[1].strip()
fd = os.open(f"/sys/fs/cgroup{own}/memory.pressure", os.O_RDWR)
os.write(fd, b"some 150000 2000000\\0")
poll = select.poll()
poll.register(fd, select.POLLPRI)
while True:
    events = poll.poll(1)
    with open("/run/watch.new", "w") as file:
        file.write(f"{time.time()} {int(any(e & select.POLLERR for _, e in events))}")
    os.rename("/run/watch.new", "/run/watch")
    time.sleep(0.05)
"""


def test_pressure_triggers_are_armed_again(addresses: list[str]) -> None:
    inside("h1", "systemd-run", "--quiet", "--collect", "--unit", "watch", "python3", "-c", WATCH)
    end = time.monotonic() + 30
    while not inside("h1", "sh", "-c", "cat /run/watch 2>/dev/null", code=None):
        assert time.monotonic() < end, "the watcher does not come up"
    assert inside("h1", "cat", "/run/watch").split()[1] == "0"
    on("h1", "incus-fusecr", "migrate", NAME, "h2:")
    try:
        now = time.time()
        end = time.monotonic() + 30
        while float((seen := inside("h2", "cat", "/run/watch").split())[0]) < now:
            assert time.monotonic() < end, "the watcher does not go on"
        assert seen[1] == "0"
    finally:
        on("h2", "incus-fusecr", "migrate", NAME, "h1:")
        inside("h1", "systemctl", "stop", "watch")
