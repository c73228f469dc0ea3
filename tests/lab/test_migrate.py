# SPDX-License-Identifier: Apache-2.0
"""Migrations that succeed: everything in the container goes on, on the other host, as if nothing had been."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fusecontainer import CLIENTS, LAB, PLACE, Container, modes_of, on, sh, wait_for

pytestmark = pytest.mark.requires_root

MODES = (*CLIENTS, "mapper", "bind")
# kind -> privileged
KINDS = {"memfs": False, "passthrough_fh": False, "passthrough_ll": True}
OTHER = {"h1": "h2", "h2": "h1"}
SOAK_HOPS = int(os.environ.get("FUSECR_SOAK_HOPS", "0"))  # a long run: so many hops instead of six


def facts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `list` says that a hop must not change, of all connections."""
    kept = ("instance", "daemon", "pid", "fstype", "mountpoint", "mounts")
    return sorted(({k: row[k] for k in kept} for row in rows), key=lambda row: str(row["mountpoint"]))


def hop(container: Container, *options: str) -> dict[str, Any]:
    """To the other host, and look at once: one container, the same daemons, nobody disturbed."""
    before, tasks = container.listed(), container.tasks()
    source, name = container.host, container.name
    report = container.migrate(f"{OTHER[source]}:", *options)
    after = container.listed()
    assert facts(after) == facts(before)
    # On a busy machine files may come and go faster than rsync looks at them: the first copy was made another way then.
    warnings = [text for text in report["warnings"] if "first copy" not in text]
    assert (report["outcome"], report["error"], warnings) == ("done", None, [])
    assert len(report["carried"]) == len(before)
    assert container.tasks() == tasks
    container.advances()
    assert name not in on(source, "incus", "list", "-f", "csv", "-c", "n").split()
    remains = "ls /run/incus-fusecr/journal | grep -v -e ^init- -e ^gate- ; ls /run/incus-fusecr/stage 2>/dev/null"
    assert [sh(host, remains, code=None) for host in OTHER] == ["", ""]
    config = json.loads(on(container.host, "incus", "query", f"/1.0/instances/{container.name}"))["config"]
    assert not [key for key in config if key.startswith("user.fusecr.")]
    return report


def test_what_incus_exec_left_behind_goes_along(small: Callable[..., Container]) -> None:
    """A daemon and its client, begun as everybody would: in the background of an ``incus exec``, in its session."""
    container = small("mg-exec")
    container.sh("mkdir -p /mnt/two /srv/two")
    daemon = f"{PLACE}/passthrough_fh -f -o modules=subdir,subdir=/srv/two,allow_other /mnt/two"
    container.sh(f"{daemon} </dev/null >/root/two.log 2>&1 &")
    wait_for("its mount", lambda: container.sh("grep -c ' /mnt/two fuse' /proc/mounts || true") == "1")
    container.client("reader", "/mnt/two", program=f"{PLACE}/fsclient", session=False)
    pids = container.sh("pidof passthrough_fh fsclient").split()
    sessions = [container.sh(f"cut -d' ' -f6 /proc/{pid}/stat") for pid in pids]
    assert sessions.count("0") == 2  # theirs are outside; the clients of the fixture have their own
    going_on = subprocess.Popen(
        [str(LAB), "exec", container.host, "--", "incus", "exec", "-T", container.name, "--", "sleep", "1000"]
    )
    try:
        wait_for("the sleep", lambda: container.sh("pidof sleep || true"))
        (verdict,) = container.check(code=3)["verdicts"]
        assert "(sleep)" in verdict["what"] and "incus exec" in verdict["hint"]
    finally:
        container.sh("kill $(pidof sleep)")
        going_on.wait(30)
    assert container.check()["fit"]
    hop(container)
    assert container.sh("pidof passthrough_fh fsclient").split() == pids
    assert "0" not in [container.sh(f"cut -d' ' -f6 /proc/{pid}/stat") for pid in pids]
    hop(container)
    container.delete()


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(work: Callable[..., Container], kind: str) -> None:
    container = work(f"mg-{kind.replace('_', '-')}", kind, modes_of(kind, MODES), privileged=KINDS[kind])
    # As the kernel negotiated it with the daemon that was started here, and as the restored one has it.
    assert container.check()["fit"]
    (reply,) = container.init_reply()
    assert reply
    for _ in range(2):
        report = hop(container)
        assert report["carried"][0]["handles"] >= 4
        assert container.check()["fit"]
        assert container.init_reply() == [reply]
    assert container.host == "h1"
    container.delete()


@pytest.fixture(scope="module")
def stacked(debian: Callable[..., Container]) -> Iterator[Container]:
    """Unprivileged: sshfs, bindfs on top of it, and another bindfs twice mounted elsewhere; ten and more clients."""
    container = debian("mg-stacked")
    container.daemon("sshfs", "/mnt/ssh")
    container.sh("mkdir -p /mnt/ssh/below")
    container.daemon("bindfs", "/mnt/top", backing="/mnt/ssh/below")
    container.daemon("bindfs", "/mnt/own")
    for mode in CLIENTS:
        container.client(mode, "/mnt/ssh")
        container.client(mode, "/mnt/own")
    for mode in ("append", "reader"):
        container.client(mode, "/mnt/top")
    container.client("mapper", "/mnt/own")
    container.client("bind", "/mnt/own", "--bind-at", "/mnt/bound")
    container.client("bind", "/mnt/ssh", "--bind-at", "/mnt/bound-ssh")
    container.sh("chown 1234:4321 /srv/own/append/log; mkdir /srv/own/foreign; chown 77:88 /srv/own/foreign")
    yield container
    container.delete()


def test_six_hops(stacked: Container) -> None:
    """Three daemons, one of them a client of another; h1 -> h2 -> h1 and so on."""
    places = ("/mnt/own/append/log", "/mnt/own/foreign", "/mnt/ssh/append/log", "/mnt/top/append/log", "/srv/own/foreign")
    ids = stacked.ids(*places)
    assert ids[1].startswith("77:88 ")
    for _ in range(SOAK_HOPS or 6):
        report = hop(stacked)
        assert stacked.ids(*places) == ids
        assert sorted(c["mountpoint"] for c in report["carried"]) == ["/mnt/own", "/mnt/ssh", "/mnt/top"]
        assert report["frozen_seconds"] > 0 and report["bytes"] > 0


UNIT = """[Unit]
Description=A FUSE mount as a unit
[Service]
ExecStart=/usr/bin/bindfs -f -o allow_other /srv/unit /mnt/unit
ExecStop=/bin/umount /mnt/unit
[Install]
WantedBy=multi-user.target
"""


def test_a_mount_that_is_a_unit(debian: Callable[..., Container]) -> None:
    container = debian("mg-unit")
    container.run("sh", "-c", "mkdir -p /srv/unit /mnt/unit; cat > /etc/systemd/system/fuse.service", data=UNIT.encode())
    container.sh("systemctl daemon-reload; systemctl enable --now fuse.service; until mountpoint -q /mnt/unit; do sleep 0.1; done")
    for mode in CLIENTS:
        container.client(mode, "/mnt/unit")
    before = container.sh("systemctl show -p MainPID,NRestarts,ActiveEnterTimestamp fuse.service")
    hop(container)
    assert container.sh("systemctl show -p MainPID,NRestarts,ActiveEnterTimestamp fuse.service") == before
    assert container.sh("systemctl is-active fuse.service; systemctl is-system-running").splitlines() == ["active", "running"]
    # systemd has its units in hand: it can end what came with it and start anew.
    container.sh("pkill -f '[f]sclient.py'; sleep 0.3; systemctl restart fuse.service")
    container.sh("until mountpoint -q /mnt/unit; do sleep 0.1; done")
    assert container.sh("systemctl show -p MainPID fuse.service") not in before
    assert container.sh("test -s /mnt/unit/append/log && echo there") == "there"
    container.delete()


def test_without_fuse(small: Callable[..., Container]) -> None:
    container = small("mg-plain", fuse=False)
    report = hop(container)
    assert report["carried"] == []
    hop(container)
    container.delete()


def test_dry_run_touches_nothing(small: Callable[..., Container]) -> None:
    container = small("mg-dry")
    query = ("incus", "query", "/1.0/instances/mg-dry")
    before, tasks = json.loads(on("h1", *query)), container.tasks()
    report = container.migrate("h2:", "--dry-run")
    assert report["outcome"] == "planned" and report["plan"] and report["frozen_seconds"] == 0
    assert container.host == "h1"
    # its clients open and close as they go
    wait_for("as many handles", lambda: container.listed()[0]["handles"] == report["carried"][0]["handles"])
    after = json.loads(on("h1", *query))
    assert after["config"] == before["config"] and container.tasks() == tasks
    assert "mg-dry" not in on("h2", "incus", "list", "-f", "csv", "-c", "n").split()
    container.advances()
    container.delete()


def test_keep_source_and_another_name(small: Callable[..., Container]) -> None:
    """The source stays, stopped, and its state is not what a start would continue."""
    container = small("mg-keep")
    report = container.migrate("h2:mg-kept", "--keep-source")
    assert report["outcome"] == "done" and (container.host, container.name) == ("h2", "mg-kept")
    container.advances()
    kept = Container("h1", "mg-keep")
    assert kept.status() == "STOPPED"
    (found,) = json.loads(on("h1", "incus", "list", "^mg-keep$", "-f", "json"))
    assert not found["stateful"], "a start would let the same processes live twice"
    container.delete()
    kept.delete()


def test_from_a_third_machine_and_out_of_a_project(small: Callable[..., Container]) -> None:
    """Incus before 7.3 restores under a name that it does not find again, but in the default project: refused by preflight."""
    project = "mg-project"
    for host in OTHER:
        features = ("-c", "features.images=false", "-c", "features.profiles=false")
        on(host, "incus", "project", "create", project, *features, code=None)
    container = small("mg-third", project=project)
    tasks = container.tasks()
    refused = container.migrate("h2:", source="h1:", by="net", code=3)
    assert refused["outcome"] == "refused" and "project" in refused["error"]["why"]
    container.advances()
    report = container.migrate("h2:mg-fourth", "--target-project", "default", source="h1:", by="net")
    assert report["outcome"] == "done"
    container.project = "default"
    assert (container.host, container.name, container.status()) == ("h2", "mg-fourth", "RUNNING")
    assert container.listed()[0]["project"] == "default" and container.tasks() == tasks
    container.advances()
    # The command may run anywhere: here on the target, with the source as a remote.
    assert container.migrate("local:", source="h2:", by="h1")["outcome"] == "done"
    container.advances()
    assert sh("h1", f"incus --project {project} list -f csv -c n") == ""
    container.delete()
    for host in OTHER:
        on(host, "incus", "project", "delete", project)


def test_checkpoints_of_a_migrated_container(small: Callable[..., Container]) -> None:
    """Many migrations of one container, the agent restarted in between: what it has to know is with the container."""
    container = small("mg-often")
    (reply,) = (container.check(), container.init_reply())[1]
    for _ in range(2):
        hop(container)
        on(container.host, "labctl", "restart", "agent")
        wait_for("the agent", lambda: on(container.host, "incus-fusecr", "list", "-f", "json", code=None).startswith("["))
        assert container.check()["fit"]
        assert container.init_reply() == [reply]
    container.delete()
