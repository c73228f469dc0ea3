# SPDX-License-Identifier: Apache-2.0
"""Whatever dies or is cut off during a migration: one container runs in the end, its clients saw no error, nothing is left.

The fault is injected when the command announces a phase (``--progress json``), so each phase is hit for sure.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "lab" / "lab"
NAME = "fault-c1"
SETTLE_SECONDS = 150.0
CLIENTS = ("reader", "writer", "append", "dirs", "cwd")

pytestmark = pytest.mark.requires_root

KILL = {
    "cli": "pkill -9 -f '[b]in/incus-fusecr migrate'",
    "agent": "kill -9 $(labctl pid agent)",
    "criu": "pkill -9 -x criu",
    "incusd": "kill -9 $(labctl pid incusd)",
}


def on(host: str, *argv: str, code: int | None = 0, timeout: float = 120) -> str:
    done = subprocess.run([str(LAB), "exec", host, "--", *argv], capture_output=True, text=True, timeout=timeout)
    assert code is None or done.returncode == code, f"{host}: {argv}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def sh(host: str, script: str, code: int | None = 0) -> str:
    return on(host, "sh", "-c", script, code=code)


def states() -> dict[str, str]:
    """Status of the container on each host that has it; empty while a host's incusd does not answer."""
    found = {}
    for host in ("h1", "h2"):
        text = on(host, "timeout", "20", "incus", "list", "-f", "csv", "-c", "ns", f"^{NAME}$", code=None).strip()
        if text:
            found[host] = text.split(",")[1]
    return found


def clients(host: str) -> dict[str, Any]:
    text = on(
        host, "incus", "exec", NAME, "--", "sh", "-c",
        "cd /root/wl && python3 check.py summary --max-age 20 /root/reports/*.json", code=None,
    )  # fmt: skip
    try:
        return dict(json.loads(text))
    except ValueError:
        return {"errors": -1, "problems": [text]}


def leftovers(host: str) -> list[str]:
    """Keys, mailboxes, snapshots, journals, rules and hanging tasks that a migration must not leave."""
    found = []
    profiles = on(host, "incus", "profile", "list", "-f", "csv", code=None)
    if "default" not in profiles:
        return ["what cannot be seen: incusd does not answer yet"]
    for profile in profiles.splitlines():
        if profile.startswith("fusecr-"):
            found.append(f"profile {profile}")
    if states().get(host):
        config = on(host, "incus", "config", "show", NAME)
        # user.fusecr.arrived stays where the client could not take it away: it is what a source in doubt goes by.
        found += [line for line in config.splitlines() if "user.fusecr" in line and "arrived" not in line]
        snapshots = on(host, "incus", "snapshot", "list", NAME, "-f", "csv")
        found += [line for line in snapshots.splitlines() if line.startswith("fusecr-")]
    found += sh(host, "ls /run/incus-fusecr/journal 2>/dev/null | grep -v '^init-' || true").split()
    found += sh(host, "ps -eo stat,pid,comm | awk '$1 ~ /^D/ {print}'; sleep 1").splitlines() and sh(
        host, "sleep 2; ps -eo stat,pid,comm | awk '$1 ~ /^D/ {print}'"
    ).splitlines()
    return found


def settled(expected_host: str | None = None) -> str:
    """Wait until exactly one container runs and nothing else is left; returns its host."""
    end = time.monotonic() + SETTLE_SECONDS
    last: Any = None
    while time.monotonic() < end:
        now = states()
        if list(now.values()) == ["RUNNING"]:
            (host,) = now
            summary = clients(host)
            last = (now, summary, [(h, leftovers(h)) for h in ("h1", "h2")])
            if summary.get("errors") == 0 and not any(rest for _, rest in last[2]):
                assert expected_host in (None, host), f"runs on {host}"
                return str(host)
        else:
            last = now
        time.sleep(1)
    raise AssertionError(f"does not settle: {last}\n{agents()}")


def agents() -> str:
    return "\n".join(f"--- {h}\n" + sh(h, "labctl log agent | tail -40", code=None) for h in ("h1", "h2"))


class Migrating:
    """A migration whose announced phases can be waited for."""

    def __init__(self, source: str, target: str, *more: str, by: str = "") -> None:
        what = f"{source}:{NAME}" if by else NAME
        argv = ["incus-fusecr", "migrate", "--progress", "json", "-f", "json", *more, what, f"{target}:"]
        self.process = subprocess.Popen(
            [str(LAB), "exec", by or source, "--", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.phases: list[str] = []
        self.errors: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                phase = json.loads(line)["phase"]
            except (ValueError, KeyError, TypeError):
                self.errors.append(line)
                continue
            with self._news:
                self.phases.append(phase)
                self._news.notify_all()
        with self._news:
            self.phases.append("end")
            self._news.notify_all()

    def reached(self, phase: str) -> bool:
        """Wait for a phase; False if the migration ended before."""
        with self._news:
            assert self._news.wait_for(lambda: phase in self.phases or "end" in self.phases, 180)
            return phase in self.phases

    def end(self) -> int:
        assert self.process.stdout is not None and self.process.stderr is not None
        with self.process.stdout as stdout, self.process.stderr:
            self.output = stdout.read()
            code = self.process.wait(timeout=240)
            self._reader.join()
        return code


@pytest.fixture(scope="module")
def lab() -> None:
    done = subprocess.run([str(LAB), "exec", "h1", "--", "true"], capture_output=True, timeout=60)
    if done.returncode:
        pytest.skip("needs a lab that is up: lab test")


@pytest.fixture(scope="module")
def container(lab: None) -> Iterator[None]:
    """With bindfs and five clients on it, none of which may ever see an error."""
    for host in ("h1", "h2"):
        on(host, "incus", "delete", "-f", NAME, code=None)
    on("h1", "incus", "launch", "-q", "debian", NAME, "-p", "default", "-p", "fusecr")
    packed = subprocess.run(
        ["tar", "-C", str(ROOT / "tests/workload"), "-cf", "-", "."], capture_output=True, check=True
    ).stdout
    inside = [str(LAB), "exec", "h1", "--", "incus", "exec", NAME, "--"]
    subprocess.run([*inside, "sh", "-c", "mkdir -p /root/wl /root/reports; tar -C /root/wl -xf -"], input=packed, check=True)
    end = time.monotonic() + 120
    while "running" not in on("h1", "incus", "exec", NAME, "--", "systemctl", "is-system-running", code=None):
        assert time.monotonic() < end, "the container does not come up"
        time.sleep(0.5)
    start = "cd /root/wl && python3 daemons.py start bindfs /mnt/f --state /root/st </dev/null >/root/st.log 2>&1"
    on("h1", "incus", "exec", NAME, "--", "sh", "-c", start)
    for mode in CLIENTS:
        client = f"setsid --fork python3 fsclient.py {mode} /mnt/f /root/reports/{mode}.json </dev/null >/dev/null 2>&1"
        on("h1", "incus", "exec", NAME, "--", "sh", "-c", f"cd /root/wl && {client}")
    end = time.monotonic() + 60
    while len(clients("h1").get("problems", [1])) or clients("h1").get("reports") != len(CLIENTS):
        assert time.monotonic() < end, clients("h1")
        time.sleep(0.5)
    yield
    for host in ("h1", "h2"):
        on(host, "incus", "delete", "-f", NAME, code=None)


@pytest.fixture
def place(container: None) -> tuple[str, str]:
    """(host it runs on, the other one)"""
    host = settled()
    return host, "h2" if host == "h1" else "h1"


def init_pid(host: str) -> str:
    (found,) = json.loads(on(host, "incus", "list", f"^{NAME}$", "-f", "json"))
    return str(found["state"]["pid"])


# Each of these has been seen to matter; the others are as good, and run when FUSECR_FAULTS is "all".
KILLS = [
    ("agent", "source", "final copy"),
    ("agent", "target", "commit"),
    ("criu", "source", "final copy"),
    # It writes into the instance's directory then, and leaves that mounted.
    ("incusd", "target", "final copy"),
]
MORE_KILLS = [
    ("incusd", "target", "start"),
    ("cli", "source", "precopy"),
    ("cli", "source", "hold"),
    ("cli", "source", "commit"),
    ("agent", "source", "hold"),
    ("agent", "source", "commit"),
    ("agent", "target", "start"),
    ("criu", "source", "hold"),
    ("criu", "target", "start"),
    ("incusd", "source", "final copy"),
]
# By a third machine, which still reaches both: it has to notice by itself that nothing comes through.
CUTS = [("final copy", "net"), ("commit", "")]
MORE_CUTS = [("precopy", ""), ("hold", ""), ("final copy", ""), ("start", "")]
INTERRUPTS = ["final copy", "finish"]
MORE_INTERRUPTS = ["precopy"]
ALL = os.environ.get("FUSECR_FAULTS") == "all"


@pytest.mark.parametrize(("victim", "where", "phase"), KILLS + (MORE_KILLS if ALL else []))
def test_killed(place: tuple[str, str], victim: str, where: str, phase: str) -> None:
    source, target = place
    migration = Migrating(source, target)
    assert migration.reached(phase), migration.errors
    sh(source if where == "source" else target, KILL[victim], code=None)
    code = migration.end()
    host = settled()
    # What the command says agrees with what is.
    if code == 0:
        assert host == target
    elif code == 1:
        assert host == source, migration.errors
    else:
        assert victim == "cli" or code == 4, (code, migration.errors)


def test_an_incusd_that_dies_before_it_has_noted_the_sources_end(place: tuple[str, str]) -> None:
    """The next one starts what ran before: a second life of the source, beside the container on the target."""
    source, target = place
    gone = "timeout 100 tail -n 0 -F /var/log/fusecr-lab/agent.log | grep -m 1 -q 'gone; frozen'"
    killer = subprocess.Popen([str(LAB), "exec", source, "--", "sh", "-c", f"{gone}; sleep 0.1; {KILL['incusd']}"])
    time.sleep(0.5)
    migration = Migrating(source, target)
    migration.end()
    assert killer.wait(timeout=120) == 0, "incusd was not killed"
    assert settled() == target


@pytest.mark.parametrize("phase", ["start", "finish"])
def test_the_next_migration_need_not_wait_for_what_a_killed_one_left(place: tuple[str, str], phase: str) -> None:
    """Killed before the target runs: there again. After: back, to where the source has just ended, or is about to."""
    source, target = place
    migration = Migrating(source, target)
    assert migration.reached(phase), migration.errors
    sh(source, KILL["cli"], code=None)
    migration.end()
    if phase == "finish":
        source, target = target, source
    again = Migrating(source, target)
    assert again.end() == 0, again.errors
    assert settled() == target


@pytest.mark.parametrize(("phase", "by"), CUTS + (MORE_CUTS if ALL else []))
def test_the_hosts_are_cut_off_from_each_other(place: tuple[str, str], phase: str, by: str) -> None:
    source, target = place
    migration = Migrating(source, target, by=by)
    assert migration.reached(phase), migration.errors
    subprocess.run([str(LAB), "cut", source, target], check=True, capture_output=True)
    try:
        code = migration.end()
        if phase != "commit":
            assert code == 1, (code, migration.errors)
            summary = clients(source)
            assert summary.get("errors") == 0, summary
    finally:
        subprocess.run([str(LAB), "heal"], check=True, capture_output=True)
    host = settled()
    assert (host == target) == (code == 0) or code == 4


@pytest.mark.parametrize("phase", INTERRUPTS + (MORE_INTERRUPTS if ALL else []))
def test_interrupted(place: tuple[str, str], phase: str) -> None:
    """Ctrl-C takes back what can be taken back, and waits for the end of what cannot."""
    source, target = place
    migration = Migrating(source, target)
    assert migration.reached(phase), migration.errors
    migration.process.send_signal(signal.SIGINT)
    migration.process.send_signal(signal.SIGINT)
    code = migration.end()
    report = json.loads(migration.output)
    if phase == "finish":
        assert (code, report["outcome"]) == (0, "done")
        assert any("interrupted" in text for text in report["warnings"])
    else:
        assert (code, report["outcome"], report["error"]["why"]) == (130, "failed", "interrupted")
    assert settled() == (target if phase == "finish" else source)


def test_a_stopped_agent_on_the_target_is_found_before_anything_is_touched(place: tuple[str, str]) -> None:
    source, target = place
    before = init_pid(source)
    on(target, "labctl", "stop", "agent")
    try:
        migration = Migrating(source, target)
        assert migration.end() == 3
        assert migration.phases == ["preflight", "end"]
        assert "agent" in "".join(migration.errors)
    finally:
        on(target, "labctl", "start", "agent")
    assert settled() == source and init_pid(source) == before


@pytest.mark.parametrize("phase", ["final copy", *(["hold"] if ALL else [])])
def test_an_agent_that_is_stopped_on_the_source_leaves_nothing_frozen(place: tuple[str, str], phase: str) -> None:
    """... for nobody knows whether another one comes: an administrator may have stopped it for good."""
    source, target = place
    before = init_pid(source)
    migration = Migrating(source, target)
    assert migration.reached(phase), migration.errors
    on(source, "labctl", "stop", "agent")
    try:
        assert sh(source, f"cat /sys/fs/cgroup/lxc.payload.{NAME}/cgroup.freeze").strip() == "0"
        assert sh(source, "ls /run/incus-fusecr/journal | grep -v '^init-' || true") == ""
        summary = clients(source)
        assert summary.get("errors") == 0 and not summary.get("problems"), summary
        assert migration.end() == 1, migration.errors
    finally:
        on(source, "labctl", "start", "agent")
    assert settled() == source and init_pid(source) == before


def test_a_full_pool_on_the_target(place: tuple[str, str]) -> None:
    source, target = place
    sh(target, "mkdir -p /mnt/tiny && mount -t tmpfs -o size=300m tmpfs /mnt/tiny")
    on(target, "incus", "storage", "create", "tiny", "dir", "source=/mnt/tiny")
    try:
        migration = Migrating(source, target, "-s", "tiny")
        assert migration.reached("precopy")
        # Preflight found room; now there is none any more.
        sh(target, "head -c 290m /dev/zero > /var/lib/incus/storage-pools/tiny/filler || true")
        assert migration.end() == 1
        assert "hold" not in migration.phases
        text = "".join(migration.errors)
        assert any(reason in text for reason in ("No space", "write failed", "disk space")), text
        assert settled() == source
    finally:
        sh(target, "rm -f /var/lib/incus/storage-pools/tiny/filler; incus storage delete tiny; umount /mnt/tiny", code=None)


def test_an_unlinked_file_is_refused_by_name_and_the_container_is_not_touched(place: tuple[str, str]) -> None:
    source, target = place
    before = init_pid(source)
    hold = "import os,time; f=open('/mnt/f/gone','w'); os.unlink('/mnt/f/gone'); time.sleep(1000)"
    on(source, "incus", "exec", NAME, "--", "setsid", "--fork", "python3", "-c", hold)
    try:
        time.sleep(1)
        migration = Migrating(source, target)
        assert migration.end() == 3
        text = "".join(migration.errors)
        assert "gone" in text and "unlinked" in text and "python3" in text
        assert "hold" not in migration.phases
    finally:
        on(source, "incus", "exec", NAME, "--", "pkill", "-f", "/mnt/f/[g]one")
    assert settled() == source and init_pid(source) == before


def test_a_target_without_the_plugin_is_refused(place: tuple[str, str]) -> None:
    source, target = place
    sh(target, "mv /usr/lib/criu/fusecr.so /root/fusecr.so.off")
    try:
        migration = Migrating(source, target)
        # Preflight notices that the plugin is not there.
        assert migration.end() == 3, migration.errors
        assert "plugin" in "".join(migration.errors)
    finally:
        sh(target, "mv /root/fusecr.so.off /usr/lib/criu/fusecr.so")
    assert settled() == source


def test_random_kills(place: tuple[str, str]) -> None:
    """FUSECR_CHAOS sets the number of migrations that are hit at a random moment."""
    host, other = place
    seed = int(os.environ.get("FUSECR_SEED", str(int(time.time()))))
    chance = random.Random(seed)
    for number in range(int(os.environ.get("FUSECR_CHAOS", "1"))):
        victim, side = chance.choice(list(KILL)), chance.choice([host, other])
        migration = Migrating(host, other)
        delay = chance.uniform(0.2, 6.0)
        time.sleep(delay)
        sh(host if victim == "cli" else side, KILL[victim], code=None)
        migration.end()
        try:
            host = settled()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, migration {number}: {victim} on {side} after {delay:.2f} s: {error}") from None
        other = "h2" if host == "h1" else "h1"


def test_after_all_this_a_migration_works(place: tuple[str, str]) -> None:
    source, target = place
    migration = Migrating(source, target)
    assert migration.end() == 0, migration.errors
    assert settled() == target
    assert json.loads(migration.output)["handles"] >= 3
