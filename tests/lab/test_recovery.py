# SPDX-License-Identifier: Apache-2.0
"""lxcfs is killed, replaced and restarted, and what keeps it is killed: the containers' readers notice nothing.

``FUSECR_KILLS=1000`` and ``FUSECR_SOAK=600`` (seconds) make a soak of it.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lxcheck
import pytest
from reclab import LIMITS, MODES, PYTHON, ROOT, Host, host_of, lab, on, run_killer, wait_for

V1 = " - cgroup cgroup " in Path("/proc/self/mountinfo").read_text()
pytestmark = [
    pytest.mark.requires_root,
    pytest.mark.requires_fuse,
    pytest.mark.skipif(not V1, reason="needs mounted cgroup v1 hierarchies"),
]
KILLS = int(os.environ.get("FUSECR_KILLS", "200"))
SOAK = float(os.environ.get("FUSECR_SOAK", "0"))
HOLDER = "pgrep -x fusecr-holder"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """In place of the suite's own: a lab's processes come to pytest as orphans."""
    yield
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                return
        except ChildProcessError:
            return


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with host_of(tmp_path_factory) as made:
        yield made


@pytest.fixture(autouse=True)
def readers(host: Host, request: pytest.FixtureRequest) -> Iterator[None]:
    """During each test nobody has noticed anything. (What somebody has noticed is not every later test's.)"""
    before = host.problems()
    yield
    problems = [problem for problem in host.problems() if problem not in before]
    if problems:
        print(on("incus-fusecr events -f csv | tail -n 400; tail -n 30 /var/log/fusecr-lab/agent.log"))
    assert problems == []


def test_protected_out_of_the_box(host: Host) -> None:
    unit = host.settled()
    assert unit["name"] == "lxcfs" and unit["mountpoint"] == "/var/lib/lxcfs" and unit["pid"] == int(on("labctl pid lxcfs"))
    phases = {link["role"]: link["phase"] for link in unit["connections"]}
    assert phases == {"current": "standby", "spare": "standby"}
    assert "PROBLEM" in on("incus-fusecr status") and "lxcfs,protected" in on("incus-fusecr status -f csv")


def test_kills(host: Host) -> None:
    last = host.last_event()
    for _ in range(2):
        old = host.unit()["pid"]
        on(f"sleep {random.random():.3f}; kill -9 {old}")
        host.settled(old)
    assert host.whats(last).count("daemon-died") >= 2
    wait_for("all containers on it", lambda: host.all_have(host.unit()["connection"]))
    # the mount that a reader of mode cwd stands in is covered, not gone
    assert {name: set(host.table(name)) for name in LIMITS} == {name: set(table) for name, table in host.tables.items()}


def test_kills_in_a_row_leave_nothing(host: Host) -> None:
    """FUSECR_KILLS of them, as fast as there is another daemon; what is the same after each kill must not grow with them."""
    seed = random.randrange(1000)
    host.settled()
    run_killer(seed, "--kills", "10", seconds=60)
    host.calm()
    before = host.census()
    result = run_killer(seed, "--kills", str(KILLS), seconds=60 + 2 * KILLS)
    host.calm()
    print(f"seed {seed}: {result}")
    assert result["kills"] == KILLS
    not_grown(before, host)


def test_all_of_its_processes_killed_at_once(host: Host) -> None:
    """As somebody does it who knows no better: the daemon, the spare and every sidecar."""
    for _ in range(3):
        old = host.settled()["pid"]
        on("pkill -9 -x lxcfs")
        host.settled(old)
    wait_for("all containers on it", lambda: host.all_have(host.unit()["connection"]))


def not_grown(before: dict[str, Any], host: Host, seconds: float = 30) -> None:
    """A busy machine may still be putting the last death in order: what has grown does not go by that."""
    end = time.monotonic() + seconds
    while True:
        try:
            return grown(before, host.census())
        except AssertionError:
            if time.monotonic() > end:
                raise
        time.sleep(1)


def grown(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Asserts that nothing has; but for memory, of which interpreters keep some for the next time."""
    memory = [(name, before["rss_kb"][name], kb) for name, kb in after["rss_kb"].items() if kb > before["rss_kb"][name] + 4096]
    print(f"before {before}\nafter  {after}")
    assert memory == []
    assert [kind for kind, n in after["processes"].items() if n > before["processes"].get(kind, 0)] == []
    # a request or an event may be under way
    assert [kind for kind, n in after["fds"].items() if n > before["fds"].get(kind, 0) + 3] == []
    assert [name for name in ("zombies", "mounts") if after[name] > before[name]] == []
    # the spare of the moment has a pid file, and a connection that is in use has the roots of its mounts
    assert [name for name in ("entries", "files") if after[name] > before[name] + 2] == []
    # libfuse starts threads as they are needed, up to ten of each daemon
    assert after["threads"]["incus-fusecr"] <= before["threads"]["incus-fusecr"] + 2


def test_other_deaths(host: Host) -> None:
    for signal in ("SEGV", "TERM"):
        old = host.unit()["pid"]
        on(f"kill -{signal} {old}")
        host.settled(old)
    wait_for("all containers on it", lambda: host.all_have(host.unit()["connection"]))


def upgrade(path: str, *options: str, code: int = 0) -> str:
    """Its error, or its output."""
    done = lab("exec", "h1", "--", "incus-fusecr", "upgrade", "lxcfs", "--exec", path, *options, code=code, timeout=90)
    return done.stderr if code else done.stdout


def test_upgrade(host: Host) -> None:
    """``FUSECR_UPGRADES=20``: so many."""
    on("cp /usr/bin/lxcfs /usr/local/bin/lxcfs; cp /usr/bin/lxcfs /usr/local/bin/lxcfs-new")
    last = host.last_event()
    count = int(os.environ.get("FUSECR_UPGRADES", "3"))
    for number in range(count):
        old = host.settled()["pid"]
        upgrade(("/usr/local/bin/lxcfs", "/usr/local/bin/lxcfs-new")[number % 2], "--watch", "0.5")
        host.settled(old)
    assert host.whats(last).count("upgraded") == count
    # who was the current one a moment ago may have ended by now
    exe = wait_for("the daemon's executable", lambda: on(f"readlink /proc/{host.unit()['pid']}/exe || true"))
    assert exe.startswith("/usr/local/bin/lxcfs") or exe == "/usr/bin/lxcfs"  # the lab's supervisor starts its own again


LAST = 'for last; do :; done\ncase $last in /dev/fd/*) set -- --fd ${last##*/};; *) set -- --mount "$last";; esac\n'
FAKE = LAST + f'exec {PYTHON} /root/fake_fuse.py /srv "$@"'
BAD = {  # what it does: (script, options, what the error has to say)
    "nowhere": ("", (), "is no program that can be run"),
    "a-directory": ("", (), "is no program that can be run"),
    "no-mode": ("exit 0", (), "is no program that can be run"),
    "no-program": ("", (), "exit code 127; it said: /root/bad/no-program: Exec format error"),
    "ends": ("echo no luck; exit 3", (), "it ended with exit code 3; it said: no luck"),
    "never-mounts": ("exec sleep 1000", (), "it did not mount in time"),
    "ends-late": ('exec timeout -s SEGV 1.5 lxcfs "$@"', ("--watch", "4"), "it ended by itself after"),
    "hangs": (f"{FAKE} --ready-after 1000", (), "its copy for open files does not answer FUSE_INIT"),
    "other-init": (FAKE, (), "it answers FUSE_INIT otherwise than the old one: "),
}


@pytest.fixture(scope="module")
def bad(host: Host) -> str:
    """The directory of the executables that are not fit."""
    script = "mkdir -p /root/bad/a-directory; cat > /root/fake_fuse.py\n"
    for name, (text, _, _) in BAD.items():
        if text:
            script += f"cat > /root/bad/{name} <<'END'\n#!/bin/sh\n{text}\nEND\nchmod 755 /root/bad/{name}\n"
    script += "printf '\\177ELF nothing' > /root/bad/no-program; chmod 755 /root/bad/no-program; chmod 644 /root/bad/no-mode"
    on(script, stdin=(ROOT / "tests" / "integration" / "fake_fuse.py").read_bytes())
    return "/root/bad"


@pytest.mark.parametrize("name", BAD)
def test_an_upgrade_to_what_is_not_fit_is_refused(host: Host, bad: str, name: str) -> None:
    _, options, why = BAD[name]
    before, last = host.settled(), host.last_event()
    error = upgrade(f"{bad}/{name}", *(options or ("--watch", "0.5")), code=1)
    assert error.startswith("Error: upgrade of lxcfs: ") and why in error, error
    assert f"the old one, pid {before['pid']}, stays" in error and error.count("\n") == 1
    after = host.settled()
    assert (after["pid"], after["spare"], after["exe"]) == (before["pid"], before["spare"], before["exe"])
    assert not {"swapped", "daemon-died", "upgraded"} & set(host.whats(last))
    wait_for("the end of what it was", lambda: on(f"pgrep -f '[b]ad/{name}|[f]ake_fuse' || true") == "")
    assert on("ps -eo stat,comm | grep '^Z.*fusecr-guard' || true") == ""
    host.calm()


def test_a_new_one_that_dies_later_gives_way_to_the_one_before(host: Host) -> None:
    on("printf '#!/bin/sh\\nexec timeout -s SEGV 3 lxcfs \"$@\"\\n' > /root/short-lived; chmod 755 /root/short-lived")
    old = host.settled()["pid"]
    on("labctl stop lxcfs")  # or it would start one of its own in place of it
    try:
        exe, last = host.settled(old)["exe"], host.last_event()
        upgrade("/root/short-lived", "--watch", "0.5")
        wait_for("its end", lambda: "upgrade-undone" in host.whats(last))
        assert wait_for("the one before", lambda: (unit := host.settled())["exe"] == exe and unit)["problem"] == ""
    finally:
        on("labctl start lxcfs")
    wait_for("the service's own", lambda: host.settled()["pid"] == int(on("labctl pid lxcfs")))
    host.calm()


def test_restart_of_its_service(host: Host) -> None:
    old = host.settled()["pid"]
    on("labctl restart lxcfs")
    pid = int(on("labctl pid lxcfs"))
    unit = wait_for("the service's own daemon in use", lambda: (u := host.settled(old))["pid"] == pid and u)
    wait_for("all containers on it", lambda: host.all_have(unit["connection"]))
    assert on("grep -c ' /var/lib/lxcfs ' /proc/self/mountinfo") == "1"


def test_a_new_container_has_the_current_one(host: Host) -> None:
    old = host.settled()["pid"]
    on(f"kill -9 {old}; incus launch -q busybox late </dev/null")
    unit = host.settled(old)
    assert "MemTotal" in on("incus exec late -- head -1 /proc/meminfo")
    wait_for("it has the current one", lambda: host.devices("late") == {host.unit()["connection"]}, 30)
    assert unit["state"] == "protected"
    on("incus delete -f late")


def test_agent_killed_at_once_after_lxcfs(host: Host) -> None:
    for pause in ("0.01",):
        old = host.settled()["pid"]
        on(f"kill -9 {old}; sleep {pause}; kill -9 $(labctl pid agent)")
        host.settled(old)
    wait_for("all containers on it", lambda: host.all_have(host.unit()["connection"]))
    assert "taken-over" in host.whats(0)


def test_guards_and_sidecars_killed(host: Host) -> None:
    """Of the connection on which the readers of mode held have their files: it is served from the first kill on."""
    old = [link for link in host.settled()["connections"] if link["role"] == "old" and link["phase"] == "serving"]
    assert old, "nobody holds files of a dead daemon"
    on("kill -9 " + " ".join(str(link["sidecar"]) for link in old))
    wait_for("other sidecars", lambda: all(
        link["sidecar"] not in (0, *(o["sidecar"] for o in old)) for link in host.unit()["connections"] if link["role"] == "old"))
    last = host.last_event()
    on("pkill -9 -x fusecr-guard")
    unit = host.settled()
    assert host.whats(last).count("guard-died") == len(unit["connections"])
    assert all(link["guard"] for link in unit["connections"])


def test_holder_killed(host: Host) -> None:
    old = on(HOLDER)
    on(f"kill -9 {old}")
    wait_for("another holder", lambda: on(HOLDER, code=None) not in ("", old))
    numbers = {link["connection"] for link in host.settled()["connections"]}
    script = "from incus_fusecr.holder.client import HolderClient as H; print(*(e.key for e in H().entries()))"
    keys = set(on(f'/opt/incus-fusecr/bin/python -c "{script}"').split())
    assert {f"conn-{number}" for number in numbers} <= keys and {"ns", "unit-lxcfs", "current-lxcfs", "warm-lxcfs"} <= keys


def test_holder_and_agent_killed_together(host: Host) -> None:
    before = {link["connection"] for link in host.settled()["connections"] if link["role"] == "old"}
    on(f"kill -9 $({HOLDER}) $(labctl pid agent)")
    unit = host.settled()
    assert before <= {link["connection"] for link in unit["connections"]}
    on("pkill -9 -x fusecr-guard")  # what it was told is not lost with it
    old = host.settled()["pid"]
    on(f"kill -9 {old}")
    host.settled(old)


@pytest.mark.skipif(not SOAK, reason="FUSECR_SOAK names no seconds for a soak")
def test_everything_at_random(host: Host) -> None:
    """FUSECR_SOAK: for so many seconds."""
    seed = random.randrange(1000)
    host.calm()
    before = host.census()
    done = run_killer(seed, str(SOAK), seconds=SOAK + 60)
    print(f"seed {seed}: {done}")
    unit = host.settled()
    host.calm()
    not_grown(before, host)
    wait_for("all containers on it", lambda: host.all_have(host.unit()["connection"]))
    assert on("grep -c ' /var/lib/lxcfs ' /proc/self/mountinfo") == "1"
    assert json.loads(on("incus-fusecr status -f json"))[0]["name"] == unit["name"] == "lxcfs"


def test_unprotect_and_protect(host: Host) -> None:
    unit = host.settled()
    table = on("cat /proc/self/mountinfo")
    old = [link for link in unit["connections"] if link["role"] == "old" and not link["alive"]]
    kept = on("incus-fusecr unprotect lxcfs").splitlines()
    assert len(kept) == len(old), "what is served goes on"
    after = host.unit()
    assert after["state"] == "unprotected" and all(not link["alive"] for link in after["connections"])
    assert int(on("pgrep -c -x fusecr-guard", code=None)) == len(old) and on("cat /proc/self/mountinfo") == table
    on("incus-fusecr protect")
    assert host.settled()["pid"] == unit["pid"]


def test_old_connections_end_with_their_last_user(host: Host) -> None:
    """The last test: it ends the readers."""
    for name in LIMITS:
        on(f"incus exec {name} -- touch /root/stop")
    wait_for("their end", lambda: all(r["finished"] for reports in host.reports().values() for r in reports))
    cpus = os.cpu_count() or 1
    for name, (mib, wanted, _) in LIMITS.items():
        found = lxcheck.summary(host.reports()[name], mib * 1024, min(wanted, cpus))
        assert found.problems == [] and found.reports == len(MODES)
    started = time.monotonic()
    unit = wait_for("no old connection", lambda: (u := host.settled()) and len(u["connections"]) == 2 and u, 45)
    print(f"old connections were gone after {time.monotonic() - started:.1f} s")
    assert {name: host.table(name) for name in LIMITS} == host.tables
    guards = int(on("pgrep -c -x fusecr-guard"))
    daemons = int(on("pgrep -c -x lxcfs"))
    assert (guards, daemons) == (2, 4), unit
