# SPDX-License-Identifier: Apache-2.0
"""The commands as their users type them, on a host and on a third machine that is only an Incus client.

What a migration keeps is tested elsewhere; here: answers, refusals, exit codes, and that a refusal touches nothing.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LAB = Path(__file__).resolve().parents[2] / "lab" / "lab"
NAME, PLAIN, PROJECT = "cmd-c1", "cmd-c2", "cmd-project"

pytestmark = pytest.mark.requires_root


def on(host: str, *argv: str, code: int | None = 0, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command on a host of the lab and look at its exit code."""
    done = subprocess.run(
        [str(LAB), "exec", host, "--", *argv], capture_output=True, text=True, timeout=300, input=text
    )
    assert code is None or done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def refused(host: str, *argv: str, code: int) -> str:
    """The one line that an unsuccessful command says."""
    done = on(host, "incus-fusecr", *argv, code=code)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: "), done.stderr
    assert done.stdout == ""
    return lines[0]


def state(host: str, name: str) -> tuple[str, int]:
    """Status and pid of the container's init."""
    (found,) = json.loads(on(host, "incus", "list", f"^{name}$", "-f", "json").stdout)
    return found["status"], found["state"]["pid"]


@pytest.fixture(scope="module")
def lab() -> None:
    done = subprocess.run([str(LAB), "exec", "h1", "--", "true"], capture_output=True, timeout=60)
    if done.returncode:
        pytest.skip("needs a lab that is up: lab test")


@pytest.fixture(scope="module")
def containers(lab: None) -> Iterator[None]:
    """On h1: one with bindfs and an open file on it, one without FUSE."""
    for name in (NAME, PLAIN):
        on("h1", "incus", "delete", "-f", name, code=None)
    on("h1", "incus", "launch", "-q", "debian", NAME, "-p", "default", "-p", "fusecr")
    on("h1", "incus", "launch", "-q", "busybox", PLAIN, "-p", "default", "-p", "fusecr")
    end = time.monotonic() + 120
    while (
        on("h1", "incus", "exec", NAME, "--", "systemctl", "is-system-running", code=None).stdout
        != "running\n"
    ):
        assert time.monotonic() < end, "the container does not come up"
        time.sleep(0.5)
    unit = ["systemd-run", "--quiet", "--collect"]
    on("h1", "incus", "exec", NAME, "--", "mkdir", "/back", "/front")
    on("h1", "incus", "exec", NAME, "--", *unit, "--unit", "front", "bindfs", "-f", "/back", "/front")
    wait = "until mountpoint -q /front; do sleep 0.1; done; exec sleep 100000 > /front/open"
    on("h1", "incus", "exec", NAME, "--", *unit, "--unit", "user", "sh", "-c", wait)
    end = time.monotonic() + 60
    while on("h1", "incus", "exec", NAME, "--", "test", "-e", "/back/open", code=None).returncode:
        assert time.monotonic() < end, "the FUSE client does not come up"
        time.sleep(0.2)
    yield
    for name in (NAME, PLAIN):
        on("h1", "incus", "delete", "-f", name, code=None)


def listed(host: str, *argv: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(on(host, "incus-fusecr", "list", *argv, "-f", "json").stdout)
    return found


@pytest.mark.parametrize(
    ("host", "where"), [("h1", ""), ("h2", "h1:"), ("net", "h1:"), ("net", f"h1:{NAME}")]
)
def test_list(containers: None, host: str, where: str) -> None:
    rows = [row for row in listed(host, *([where] if where else [])) if row["instance"] == NAME]
    assert len(rows) == 1
    (row,) = rows
    assert (row["daemon"], row["mountpoint"], row["mounts"], row["handles"]) == ("bindfs", "/front", 1, 1)
    pid = on("h1", "incus", "exec", NAME, "--", "pgrep", "-x", "bindfs").stdout.strip()
    assert str(row["pid"]) == pid


def test_list_as_table_and_csv(containers: None) -> None:
    table = on("net", "incus-fusecr", "list", "h1:").stdout
    assert table.splitlines()[1].split()[:2] == ["|", "INSTANCE"] and "/front" in table
    assert f"{NAME},bindfs\n" in on("net", "incus-fusecr", "list", "h1:", "-f", "csv", "-c", "id").stdout
    assert listed("net", "h2:") == [] or all(r["instance"] != NAME for r in listed("net", "h2:"))
    assert listed("h1", PLAIN) == []


@pytest.mark.parametrize("name", [NAME, PLAIN])
def test_check_says_that_nothing_is_in_the_way(containers: None, name: str) -> None:
    before = state("h1", name)
    found = json.loads(on("net", "incus-fusecr", "check", f"h1:{name}", "-f", "json").stdout)
    assert found["fit"] is True and found["verdicts"] == []
    assert [c["daemon"] for c in found["connections"]] == (["bindfs"] if name == NAME else [])
    assert state("h1", name) == before
    assert f"Nothing is in the way on h1:{name}." in on("net", "incus-fusecr", "check", f"h1:{name}").stdout


def test_check_names_what_is_in_the_way(containers: None) -> None:
    """A file that is deleted and still open."""
    on("h1", "incus", "exec", NAME, "--", "systemd-run", "-q", "--collect", "--unit", "gone", "sh", "-c",
       "exec 3>/front/gone; rm /front/gone; exec sleep 100000")  # fmt: skip
    try:
        end = time.monotonic() + 30
        while on("h1", "incus", "exec", NAME, "--", "test", "-e", "/back/gone", code=None).returncode == 0:
            assert time.monotonic() < end
            time.sleep(0.1)
        time.sleep(0.5)
        done = on("net", "incus-fusecr", "check", f"h1:{NAME}", "-f", "json", code=3)
        (verdict,) = json.loads(done.stdout)["verdicts"]
        assert verdict["why"] and verdict["hint"]
        error = refused("net", "checkpoint", f"h1:{NAME}", "nope", code=3)
        assert verdict["what"] in error
        error = refused("net", "migrate", f"h1:{NAME}", "h2:", code=3)
        assert verdict["what"] in error
        assert state("h1", NAME)[0] == "Running"
        assert "h2" not in on("h2", "incus", "list", "-f", "csv", "-c", "n").stdout
    finally:
        on("h1", "incus", "exec", NAME, "--", "systemctl", "stop", "gone")


def test_dry_run_touches_nothing(containers: None) -> None:
    before = state("h1", NAME)
    report = json.loads(
        on("net", "incus-fusecr", "migrate", f"h1:{NAME}", "h2:", "--dry-run", "-f", "json").stdout
    )
    assert report["outcome"] == "planned" and report["plan"]
    assert [c["daemon"] for c in report["carried"]] == ["bindfs"]
    assert state("h1", NAME) == before
    assert NAME not in on("h2", "incus", "list", "-f", "csv", "-c", "n").stdout
    config = on("h1", "incus", "config", "show", NAME).stdout + on("h1", "incus", "config", "show").stdout
    assert "user.fusecr" not in config
    assert "fusecr-" not in on("h1", "incus", "profile", "list", "-f", "csv").stdout


@pytest.mark.parametrize(
    ("argv", "code", "word"),
    [
        (["migrate", "h1:nope", "h2:"], 2, '"nope" does not exist'),
        (["migrate", f"h9:{NAME}", "h2:"], 2, 'remote "h9"'),
        (["migrate", f"h1:{NAME}", "h9:"], 2, 'remote "h9"'),
        (["migrate", f"h1:{NAME}", "h1:other"], 2, "same server"),
        (["migrate", "--project", "nope", f"h1:{NAME}", "h2:"], 2, 'project "nope"'),
        (["check", "--project", "nope", "h1:"], 2, 'project "nope"'),
        (["list", "--project", "nope", "h1:"], 2, 'project "nope"'),
        (["check", "h1:nope"], 2, '"nope" does not exist'),
        (["checkpoint", "h1:nope"], 2, '"nope" does not exist'),
        (["checkpoint", f"h1:{NAME}", "a/b"], 2, "not a name"),
        (["restore", f"h1:{NAME}", "nope"], 2, 'no snapshot "nope"'),
        (["restore", f"h1:{NAME}"], 3, "it is Running"),
    ],
)
def test_refusals(containers: None, argv: list[str], code: int, word: str) -> None:
    assert word in refused("net", *argv, code=code)
    assert state("h1", NAME)[0] == "Running"


def test_a_stopped_instance(containers: None) -> None:
    on("h1", "incus", "stop", "-f", PLAIN)
    try:
        for argv in (
            ["migrate", f"h1:{PLAIN}", "h2:"],
            ["check", f"h1:{PLAIN}"],
            ["checkpoint", f"h1:{PLAIN}"],
        ):
            assert "not running" in refused("net", *argv, code=3)
        assert "without saving its state" in refused("net", "restore", f"h1:{PLAIN}", code=3)
    finally:
        on("h1", "incus", "start", PLAIN)


def test_a_stateless_snapshot_is_no_state(containers: None) -> None:
    on("h1", "incus", "snapshot", "create", PLAIN, "files")
    try:
        assert "files only" in refused("net", "restore", f"h1:{PLAIN}", "files", code=3)
    finally:
        on("h1", "incus", "snapshot", "delete", PLAIN, "files")


def test_a_host_without_agent_is_told_soon(containers: None) -> None:
    on("h1", "labctl", "stop", "agent")
    try:
        for argv in (["check", f"h1:{PLAIN}"], ["list", "h1:"], ["checkpoint", f"h1:{PLAIN}"]):
            assert "no incus-fusecr agent answers" in refused("net", *argv, code=3)
        config = (
            on("h1", "incus", "config", "show", PLAIN).stdout + on("h1", "incus", "config", "show").stdout
        )
        assert "user.fusecr" not in config
    finally:
        on("h1", "labctl", "start", "agent")
        end = time.monotonic() + 30
        while on("h1", "incus-fusecr", "list", code=None).returncode:
            assert time.monotonic() < end, "the agent does not come back"
            time.sleep(0.2)


def test_a_wrong_certificate_is_not_talked_to(lab: None) -> None:
    """The third machine pins another server's certificate."""
    script = (
        "set -e; cp -a ~/.config/incus /tmp/pins; cp /tmp/pins/servercerts/h2.crt /tmp/pins/servercerts/h1.crt;"
        "rc=0; INCUS_CONF=/tmp/pins incus-fusecr list h1: || rc=$?; rm -r /tmp/pins; exit $rc"
    )
    done = on("net", "sh", "-c", script, code=1)
    assert "not the pinned one" in done.stderr and done.stdout == ""


def test_checkpoint_and_restore(containers: None) -> None:
    """Of the container with FUSE: what its client does goes on from the state, and the file is open as before."""
    before = listed("h1", NAME)
    done = json.loads(on("net", "incus-fusecr", "checkpoint", f"h1:{NAME}", "one", "-f", "json").stdout)
    assert (done["snapshot"], done["status"]) == ("one", "Running")
    assert "exists already" in refused("net", "checkpoint", f"h1:{NAME}", "one", code=2)
    assert [(r["daemon"], r["handles"]) for r in listed("h1", NAME)] == [("bindfs", 1)]
    on("h1", "incus", "exec", NAME, "--", "touch", "/back/later")
    done = json.loads(on("net", "incus-fusecr", "restore", f"h1:{NAME}", "one", "-f", "json").stdout)
    assert done["status"] == "Running"
    assert on("h1", "incus", "exec", NAME, "--", "ls", "/front").stdout == "open\n"
    keep = ("daemon", "pid", "mountpoint", "mounts", "handles")
    assert [[r[k] for k in keep] for r in listed("h1", NAME)] == [[r[k] for k in keep] for r in before]
    on("h1", "incus", "snapshot", "delete", NAME, "one")


def test_checkpoint_stop_and_restore(containers: None) -> None:
    """Of a fresh container, since liblxc 6.0.4 dumps none twice."""
    on("h1", "incus", "restart", "-f", PLAIN)
    done = json.loads(on("net", "incus-fusecr", "checkpoint", f"h1:{PLAIN}", "--stop", "-f", "json").stdout)
    assert (done["snapshot"], done["status"]) == ("", "Stopped")
    done = json.loads(on("net", "incus-fusecr", "restore", f"h1:{PLAIN}", "-f", "json").stdout)
    assert done["status"] == "Running"
    assert "it is Running" in refused("net", "restore", f"h1:{PLAIN}", code=3)


def test_a_project(lab: None) -> None:
    """Its instances have liblxc's longer names, and are listed under their own."""
    on(
        "h1",
        "incus",
        "project",
        "create",
        PROJECT,
        "-c",
        "features.images=false",
        "-c",
        "features.profiles=false",
    )
    try:
        on(
            "h1",
            "incus",
            "launch",
            "-q",
            "busybox",
            PLAIN,
            "--project",
            PROJECT,
            "-p",
            "default",
            "-p",
            "fusecr",
        )
        found = json.loads(
            on("net", "incus-fusecr", "check", "--project", PROJECT, f"h1:{PLAIN}", "-f", "json").stdout
        )
        assert found["fit"] is True
        assert (
            on("net", "incus-fusecr", "--project", PROJECT, "list", f"h1:{PLAIN}", "-f", "csv").stdout == ""
        )
    finally:
        on("h1", "incus", "delete", "-f", PLAIN, "--project", PROJECT, code=None)
        on("h1", "incus", "project", "delete", PROJECT)
