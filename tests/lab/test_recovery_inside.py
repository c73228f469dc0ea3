# SPDX-License-Identifier: Apache-2.0
"""Daemons inside of containers die under their clients, and nobody there notices; then their containers move all the same."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fusecontainer import CLIENTS, PLACE, Container, on, sh, wait_for

pytestmark = pytest.mark.requires_root
# "|| true" below: grep, ls, pgrep and pidof that find nothing end with 1, which is what is hoped for. sh() asserts 0, so that a
# host or a container that is not there fails.

HOSTS = ("h1", "h2")
HOLDER = "pgrep -x fusecr-holder"
CONFIG = "/etc/incus-fusecr/daemons.d/inside.conf"
# Not "dirs": it renames from a path, which leads to the new daemon's mount, to a directory that it holds open, which does not.
MODES = tuple(mode for mode in CLIENTS if mode != "dirs")
KILLS = int(os.environ.get("FUSECR_INSIDE_KILLS", "8"))
# bindfs and passthrough write at once: nothing is lost with them. What sshfs has acknowledged may be.
INSIDE = "where = containers\ninstances = ri-*\n"
SECTIONS = "".join(
    f"[daemon {name.replace('_', '-')}]\nexe = {name}\n{INSIDE}durability = relaxed\nrestart-burst = 100\n"
    for name in ("bindfs", "passthrough_fh")
)
SECTIONS += f"[daemon sshfs]\nexe = sshfs\n{INSIDE}"
SECTIONS += f"[daemon warm]\nexe = passthrough_fh\nmountpoint = /mnt/warm\nstandby = warm\n{INSIDE}"


@pytest.fixture(scope="module", autouse=True)
def configured(containers_gone: list[Container]) -> Iterator[None]:
    for host in HOSTS:
        on(host, "sh", "-c", f"mkdir -p /etc/incus-fusecr/daemons.d; cat >{CONFIG}; labctl restart agent", data=SECTIONS.encode())
    yield
    for container in [c for c in containers_gone if c.name.startswith("ri-")]:
        container.delete()
    for host in HOSTS:
        wait_for("the end of all units", lambda host=host: not [u for u in units(host) if u["instance"]])
        left = sh(host, "ls /run/incus-fusecr | grep -e ^facts- -e '^sidecar-.*[.]ri-' ; pgrep -f '[r]ecovery.sidecar'", code=None)
        sh(host, f"rm {CONFIG}; labctl restart agent")
        assert left == ""


def units(host: str, instance: str = "") -> list[dict[str, Any]]:
    text = on(host, "incus-fusecr", "status", "-f", "json", code=None)
    found = json.loads(text) if text.startswith("[") else []  # an agent that starts does not answer yet
    return [unit for unit in found if instance in ("", unit["instance"])]


def protected(container: Container, count: int = 1) -> list[dict[str, Any]]:
    """The units of a container as soon as all its daemons are protected."""

    def ready() -> list[dict[str, Any]]:
        found = units(container.host, container.name)
        well = len(found) == count and all(unit["state"] == "protected" and not unit["problem"] for unit in found)
        return found if well else []

    return list(wait_for(f"{count} protected daemons in {container.name}", ready))


def kill(container: Container, unit: dict[str, Any], signal: str = "KILL") -> dict[str, Any]:
    """Kill the daemon of a unit; the unit as soon as another one serves it."""
    sh(container.host, f"kill -{signal} {unit['pid']}")

    def replaced() -> dict[str, Any] | None:
        found = [u for u in units(container.host, container.name) if u["name"] == unit["name"]]
        return found[0] if found and found[0]["state"] == "protected" and found[0]["pid"] != unit["pid"] else None

    return dict(wait_for(f"another daemon for {unit['name']}", replaced))


def table(container: Container) -> list[tuple[str, ...]]:
    """FUSE mounts of the container's own daemons, but for ids, devices and numbers of groups."""
    found = []
    for line in container.sh("grep ' - fuse' /proc/1/mountinfo | grep -v -e lxcfs -e fusectl").splitlines():
        left, _, right = line.partition(" - ")
        words = left.split()
        found.append((words[4], words[3], words[5], *(w.split(":")[0] for w in words[6:]), *right.split()))
    return sorted(found)


def events(host: str) -> int:
    return int(json.loads(on(host, "incus-fusecr", "events", "-f", "json"))[-1]["number"])


def whats(host: str, since: int, name: str) -> list[str]:
    found = json.loads(on(host, "incus-fusecr", "events", "--since", str(since), "-f", "json"))
    return [event["what"] for event in found if event["daemon"] == name]


@pytest.mark.parametrize(("kind", "privileged"), [("bindfs", False), ("passthrough_fh", True)])
def test_kills_under_all_clients(
    debian: Callable[..., Container], static: Callable[[str], Any], kind: str, privileged: bool
) -> None:
    container = debian(f"ri-{kind[:4]}", privileged=privileged)
    if kind == "passthrough_fh":
        container.push([static(kind)])
    container.daemon(kind, f"/mnt/{kind}")
    (unit,) = protected(container)
    container.sh(f"mkdir -p /mnt/bound /mnt/{kind}/below; mount --bind /mnt/{kind}/below /mnt/bound")
    # A peer of the daemon's own mount: there is to be one of it after all kills, and not two to the power of their number.
    container.sh(f"mkdir -p /mnt/whole; mount --bind /mnt/{kind} /mnt/whole")
    for mode in (*MODES, "mapper"):
        container.client(mode, f"/mnt/{kind}")
    container.client("reader", "/mnt/bound")
    before, own = table(container), container.sh(f"cat /proc/$(pidof {kind})/status | grep -E '^(Uid|Gid|Cap|Seccomp|NoNew)'")
    for number in range(KILLS):
        time.sleep(random.Random(number).uniform(0.0, 0.5))
        unit = kill(container, unit, "KILL" if number % 2 else "SEGV")
    container.advances()
    # The daemon is as the first one was, and its container's own child.
    (pid,) = container.sh(f"pgrep -x -P 1 {kind}").split()
    assert container.sh(f"grep -E '^(Uid|Gid|Cap|Seccomp|NoNew)' /proc/{pid}/status") == own
    assert "/proc/1/" not in container.sh(f"ls -l /proc/{pid}/fd") and container.sh(f"readlink /proc/{pid}/fd/0") == "/dev/null"
    old = [link for link in unit["connections"] if link["role"] == "old"]
    assert old and {link["phase"] for link in old} == {"serving"}, "clients hold what they have had open since before"
    for client in list(container.clients):
        container.sh(f"pkill -f {shlex.quote(client)}.json", code=None)
    container.clients.clear()
    wait_for("the end of old connections", lambda: [len(u["connections"]) for u in units(container.host, container.name)] == [1])
    assert container.sh("pgrep -f [r]ecovery.sidecar || true") == ""
    assert table(container) == before


def test_the_container_s_own_restarts(debian: Callable[..., Container]) -> None:
    """Its root kills the daemon and starts another at once, as a service manager would, or unmounts before."""
    container = debian("ri-again")
    container.daemon("bindfs", "/mnt/b")
    container.sh("mkdir -p /mnt/bound /mnt/b/below; mount --bind /mnt/b/below /mnt/bound")
    for place in ("/mnt/b", "/mnt/bound"):
        container.client("reader", place)
    protected(container)
    before = table(container)
    for again in ("pkill -9 -x bindfs", "pkill -9 -x bindfs; sleep 0.3", "pkill -x bindfs; umount -l /mnt/b", "umount -l /mnt/b"):
        container.sh(f"{again}; bindfs -o allow_other,nonempty /srv/b /mnt/b", code=None)
        time.sleep(2)
        wait_for("one mount at its place", lambda: container.sh("grep -c ' /mnt/b fuse' /proc/mounts") == "1")
        protected(container)
        assert [row[0] for row in table(container)] == [row[0] for row in before]
        container.advances()


def test_a_user_s_sshfs_and_its_readers(debian: Callable[..., Container]) -> None:
    """Not root, mounted by fusermount; with a client of its own, ssh."""
    container = debian("ri-ssh")
    container.daemon("sshfs", "/mnt/ssh")
    for mode in ("reader", "cwd"):
        container.client(mode, "/mnt/ssh")
    (unit,) = protected(container)
    for _ in range(3):
        unit = kill(container, unit)
        container.advances()
    assert len(container.sh("pgrep -x -P 1 sshfs").split()) == 1


def test_a_daemon_that_died_moves_with_its_container(small: Callable[..., Container]) -> None:
    container = small("ri-move", modes=MODES)
    (unit,) = protected(container)
    assert container.check()["fit"]
    unit = kill(container, unit)
    # What was open then is served from outside: it cannot be carried, and that is said before anything is touched.
    (verdict,) = [v for v in container.check(code=3)["verdicts"] if "/mnt/fh" in v["what"]]
    assert "died" in verdict["why"] and "lsof" in verdict["hint"]
    assert container.migrate("h2:", code=3)["outcome"] == "refused"
    container.advances()
    (unit,) = protected(container)
    container.sh("kill $(pidof fsclient)")
    container.clients.clear()
    wait_for("the end of the old connection", lambda: [len(u["connections"]) for u in units("h1", container.name)] == [1])
    for mode in MODES:
        container.client(mode, "/mnt/fh", program=f"{PLACE}/fsclient")
    assert container.check()["fit"]
    container.migrate("h2:")
    container.advances()
    assert units("h1", "ri-move") == []
    (unit,) = protected(container)
    kill(container, unit)
    container.advances()


def test_a_warm_sidecar_and_another_executable(debian: Callable[..., Container], static: Callable[[str], Any]) -> None:
    """The sidecar is there before a death, and in nobody's way at a move; the next daemon is what is on disk by then."""
    container = debian("ri-warm")
    container.push([static("passthrough_fh")])
    container.daemon("passthrough_fh", "/mnt/warm")

    def ready() -> dict[str, Any]:
        (unit,) = protected(container)
        wait_for("its sidecar", lambda: units(container.host, container.name)[0]["connections"][0]["sidecar"])
        return unit

    ready()
    container.client("reader", "/mnt/warm")
    container.migrate("h2:")
    unit = ready()
    container.advances()
    container.sh(f"cd {PLACE}; cp passthrough_fh new; mv new passthrough_fh")
    kill(container, unit)
    container.advances()
    (pid,) = container.sh("pgrep -x -P 1 passthrough_fh").split()
    assert container.sh(f"stat -L -c %i /proc/{pid}/exe") == container.sh(f"stat -c %i {PLACE}/passthrough_fh")


def test_what_is_unmounted_inside_is_gone(small: Callable[..., Container]) -> None:
    started = small("ri-gone", modes=MODES)
    (unit,) = protected(started)
    started.sh("kill $(pidof fsclient); sleep 0.5; umount /mnt/fh")
    started.clients.clear()
    wait_for("no unit", lambda: units("h1", "ri-gone") == [])
    assert started.sh("grep -c ' /mnt/fh ' /proc/mounts || true") == "0"
    wait_for("the daemon's end", lambda: started.sh("pidof passthrough_fh || true") == "")
    guard = unit["connections"][0]["guard"]
    assert sh("h1", f"ls -d /proc/{guard} || true") == ""


@pytest.mark.parametrize("how", ["stop -f", "restart -f", "delete -f"])
def test_a_container_ends_with_its_dead_daemon(small: Callable[..., Container], how: str) -> None:
    """Nobody waits for an answer that will not come: else the kernel could not end it."""
    container = small(f"ri-end-{how.split()[0]}", modes=MODES)
    (unit,) = protected(container)
    init = sh("h1", f"incus list -f csv -c p {container.name}")
    since = events("h1")
    sh("h1", f"kill -9 {unit['pid']}; sleep 0.02; kill -9 {init}")
    wait_for("its end", lambda: sh("h1", f"ls -d /proc/{init} || true") == "", 20)
    wait_for("no unit", lambda: units("h1", container.name) == [])
    wait_for("Incus to see it", lambda: container.status() in ("STOPPED", ""))
    container.incus(how.replace("restart -f", "start").replace("stop -f", "start"), container.name)
    assert "aborted" not in whats("h1", since, unit["name"])


def test_agent_guard_and_holder_die(small: Callable[..., Container]) -> None:
    container = small("ri-own", modes=MODES)
    (unit,) = protected(container)
    for victims in ("agent", "guard", "holder", "agent holder", "agent guard", "holder guard"):
        guard = unit["connections"][0]["guard"]
        pids = {"agent": "$(labctl pid agent)", "guard": str(guard), "holder": f"$({HOLDER})"}
        kill_them = " ".join(pids[victim] for victim in victims.split())
        sh("h1", f"kill -9 {kill_them} {unit['pid']}; labctl restart agent")
        container.advances()
        before = unit["pid"]
        wait_for("another daemon", lambda before=before: [u["pid"] for u in protected(container)] != [before])
        (unit,) = protected(container)
        container.advances()


def test_stopping_the_service_leaves_no_trace(small: Callable[..., Container]) -> None:
    container = small("ri-trace", modes=MODES)
    (unit,) = protected(container)
    sh("h1", "labctl stop agent")
    try:
        assert sh("h1", f"ls -d /proc/{unit['connections'][0]['guard']} || true") == ""
        container.advances()
    finally:
        sh("h1", "labctl start agent")
    protected(container)


def test_what_the_configuration_no_longer_names_is_given_back(small: Callable[..., Container]) -> None:
    """The agent before had no time for it."""
    container = small("ri-named", modes=MODES)
    (unit,) = protected(container)
    sh("h1", f"mv {CONFIG} {CONFIG}.off; kill -9 $(labctl pid agent); labctl restart agent")
    try:
        guard = unit["connections"][0]["guard"]
        wait_for("the end of its guard", lambda: sh("h1", f"ls -d /proc/{guard} || true") == "")
        container.advances()
    finally:
        sh("h1", f"mv {CONFIG}.off {CONFIG}; labctl restart agent")
    sh("h1", f"incus-fusecr protect {unit['name']}", code=None)
    protected(container)


def test_what_cannot_be_protected_is_said(debian: Callable[..., Container]) -> None:
    container = debian("ri-unfit")
    container.sh("mkdir -p /srv/a /mnt/a /mnt/b /mnt/c; echo x >/srv/a/f")
    since = events("h1")
    container.sh("unshare -m --propagation shared bindfs /srv/a /mnt/a")
    container.sh("bindfs /mnt/b /mnt/b; bindfs /srv/a /mnt/c")
    (unit,) = protected(container)
    assert unit["mountpoint"] == "/mnt/c"

    def reasons() -> list[str]:
        found = json.loads(on("h1", "incus-fusecr", "events", "--since", str(since), "-f", "json"))
        return sorted(e["data"]["why"] for e in found if e["what"] == "cannot-protect" and ".ri-unfit." in e["daemon"])

    wait_for("both reasons", lambda: len(set(reasons())) == 2)
    first, second = sorted(set(reasons()))
    assert re.search("below its own mount", first) and re.search("mnt namespace", second)


def test_who_is_not_named_is_left_alone(small: Callable[..., Container]) -> None:
    small("other-one")
    time.sleep(3)
    assert units("h1", "other-one") == []
