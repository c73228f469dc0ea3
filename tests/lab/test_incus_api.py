# SPDX-License-Identifier: Apache-2.0
"""The Incus client against two real servers: what their documentation leaves open, and this program builds on."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from incus_fusecr.errors import UsageError
from incus_fusecr.incus import copy
from incus_fusecr.incus.client import Server
from incus_fusecr.incus.config import Endpoint
from incus_fusecr.incus.events import CONNECTED
from incus_fusecr.incus.failures import ApiError, Busy, NotFound, OperationFailed, OutcomeUnknown
from incus_fusecr.incus.mailbox import InstanceMailbox, Mailbox, ProfileMailbox, ServerMailbox

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "lab" / "lab"
NAME = "api-c1"

pytestmark = pytest.mark.requires_root


def lab_directory() -> Path:
    sys.path.insert(0, str(LAB.parent))
    from fusecr_lab.state import Lab

    lab = Lab.load()
    if not lab.ready:
        pytest.skip("needs a lab that is up: lab test")
    return Path(lab.dir)


def lab_exec(host: str, *argv: str) -> str:
    done = subprocess.run(
        [str(LAB), "exec", host, "--", *argv],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def server() -> Iterator[Callable[[str], Server]]:
    """A connection to a host, for the thread of the test."""
    directory = lab_directory()
    opened = []

    def make(host: str) -> Server:
        made = Server(Endpoint(host, "default", unix_path=str(directory / host / "incus" / "unix.socket")))
        opened.append(made)
        return made

    yield make
    for made in opened:
        made.close()


@pytest.fixture
def running(server: Callable[[str], Server]) -> Iterator[Server]:
    """h1 with a running container; on h1 and h2 nothing of it stays."""
    h1, h2 = server("h1"), server("h2")
    remove(h1, h2)
    lab_exec("h1", "incus", "launch", "-q", "busybox", NAME, "-p", "default", "-p", "fusecr")
    yield h1
    remove(h1, h2)


def remove(*hosts: Server) -> None:
    """A busy machine may take its time for it."""
    for host in hosts:
        found = host.instance(NAME)
        if found is not None and found["status"] != "Stopped":
            host.put_state(NAME, "stop", 120, force=True)
        if found is not None:
            host.delete_instance(NAME, 120)


def own_keys(server: Server) -> dict[str, str]:
    found = server.require_instance(NAME)["config"]
    return {k: v for k, v in found.items() if k.startswith("user.")}


def test_an_empty_value_removes_a_key(running: Server) -> None:
    running.patch_instance_config(NAME, {"user.a": "1", "user.b": "2"})
    running.patch_instance_config(NAME, {"user.a": ""})
    assert own_keys(running) == {"user.b": "2"}
    running.patch_server_config({"user.fusecr.test": "1"})
    assert running.server()["config"]["user.fusecr.test"] == "1"
    running.patch_server_config({"user.fusecr.test": ""})
    assert "user.fusecr.test" not in running.server()["config"]


def test_writers_of_different_keys_lose_nothing(running: Server) -> None:
    """Of an instance and of the server: agent and client write at the same time."""
    faults: list[Any] = []

    def write(number: int) -> None:
        with running.clone() as own:
            for value in range(15):
                own.patch_instance_config(NAME, {f"user.w{number}": str(value)})
                own.patch_server_config({f"user.w{number}": str(value)})
                seen = own.require_instance(NAME)["config"].get(f"user.w{number}")
                both = (seen, own.server()["config"].get(f"user.w{number}"))
                if both != (str(value), str(value)):
                    faults.append((number, value, both))
            own.patch_server_config({f"user.w{number}": ""})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert faults == []


def test_missing_things(running: Server) -> None:
    assert running.instance("nope") is None
    with pytest.raises(UsageError, match="nope"):
        running.require_instance("nope")
    with pytest.raises(NotFound):
        running.put_state("nope", "start", 10)
    with running.clone("nope") as elsewhere, pytest.raises(UsageError, match='project "nope"'):
        elsewhere.require_instance("c1")


def test_an_operation_of_more_than_a_second(running: Server) -> None:
    """Incus answers each second of waiting with an error; the operation is followed nevertheless."""
    body = {"command": ["sleep", "2.5"], "wait-for-websocket": False, "interactive": False}
    done = running.run("POST", f"instances/{NAME}/exec", body, 30)
    assert done["metadata"]["return"] == 0


def test_a_failed_operation_says_why(running: Server) -> None:
    with pytest.raises(OperationFailed, match="already running"):
        running.put_state(NAME, "start", 30)
    with pytest.raises(ApiError, match="running"):
        running.delete_instance(NAME, 30)
    assert running.require_instance(NAME)["status"] == "Running"


def test_an_operation_that_a_restart_of_incusd_ended(running: Server) -> None:
    body = {"command": ["sleep", "60"], "wait-for-websocket": False, "interactive": False}
    operation = running.post(f"instances/{NAME}/exec", body).operation
    seen: list[BaseException] = []

    def wait() -> None:
        try:
            with running.clone() as own:
                own.lost_seconds = 20
                own.wait_operation(operation, 60)
        except BaseException as e:
            seen.append(e)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.5)
    lab_exec("h1", "labctl", "restart", "incusd")
    lab_exec("h1", "incusd", "waitready", "--timeout=60")
    thread.join(90)
    assert len(seen) == 1 and isinstance(seen[0], (OutcomeUnknown, OperationFailed)), seen


def test_a_copy_takes_what_it_should(running: Server, server: Callable[[str], Server]) -> None:
    h2 = server("h2")
    running.patch_instance_config(NAME, {"user.fusecr.request": "x", "user.mine": "1"})
    lab_exec("h1", "incus", "exec", NAME, "--", "sh", "-c", "echo one > /root/f")
    before = running.require_instance(NAME)
    first = copy.pull(running, h2, NAME, NAME, deadline=60, config_overrides={"user.fusecr.new": "n"})
    there = h2.require_instance(NAME)
    assert there["status"] == "Stopped" and there["stateful"] is True
    assert own_keys(h2) == {"user.mine": "1", "user.fusecr.new": "n"}
    assert there["config"]["volatile.uuid"] == before["config"]["volatile.uuid"]
    assert running.require_instance(NAME)["status"] == "Running"
    # What the agent writes on the target outlives a refresh, and the refresh brings the files.
    h2.patch_instance_config(NAME, {"user.fusecr.report": "r"})
    lab_exec("h1", "incus", "exec", NAME, "--", "sh", "-c", "echo two > /root/f")
    copy.pull(running, h2, NAME, NAME, deadline=60, refresh=True, address=first.address)
    assert own_keys(h2)["user.fusecr.report"] == "r"
    assert h2.require_instance(NAME)["stateful"] is True
    assert lab_exec("h2", "incus", "file", "pull", f"{NAME}/root/f", "-") == "two\n"


def test_changes_of_the_configuration_do_not_spoil_a_copy(
    running: Server, server: Callable[[str], Server]
) -> None:
    """Incus refuses each of both while the other runs; both are tried again."""
    h2 = server("h2")
    stop = threading.Event()
    written: list[int] = []
    failed: list[BaseException] = []

    def hammer() -> None:
        with running.clone() as own:
            while not stop.is_set():
                try:
                    own.patch_instance_config(NAME, {"user.beat": str(len(written))}, busy_seconds=10)
                    written.append(1)
                except Exception as e:
                    failed.append(e)
                    return
                stop.wait(0.02)

    thread = threading.Thread(target=hammer)
    thread.start()
    try:
        copy.pull(running, h2, NAME, NAME, deadline=60)
        for _ in range(3):
            copy.pull(running, h2, NAME, NAME, deadline=60, refresh=True)
    finally:
        stop.set()
        thread.join(30)
    assert failed == [] and len(written) > 3


@pytest.mark.parametrize("mailbox", [InstanceMailbox(NAME), ServerMailbox("0abc"), ProfileMailbox("0abc")])
def test_mailboxes(running: Server, mailbox: Mailbox) -> None:
    mailbox.write(running, {"user.fusecr.request": "1"})
    mailbox.write(running, {"user.fusecr.report": "2"})
    assert mailbox.read(running).items() >= {"user.fusecr.request": "1", "user.fusecr.report": "2"}.items()
    mailbox.write(running, {"user.fusecr.request": ""})
    assert "user.fusecr.request" not in mailbox.read(running)
    mailbox.clear(running)
    mailbox.clear(running)
    assert not any(k.startswith("user.fusecr") for k in running.server()["config"])
    assert own_keys(running) == {}
    assert not any("fusecr-0abc" in p for p in running.get("profiles"))


def test_which_mailbox_a_stateful_stop_leaves_open(running: Server) -> None:
    """The reason why there is more than one kind."""
    refused = opened = 0
    operation = running.put(
        f"instances/{NAME}/state", {"action": "stop", "stateful": True, "timeout": 60, "force": False}
    ).operation
    end = time.monotonic() + 60
    while time.monotonic() < end and (running.operation(operation) or {}).get("status_code") == 103:
        try:
            running.patch_instance_config(NAME, {"user.x": "1"}, busy_seconds=0)
        except Busy:
            refused += 1
        ProfileMailbox("0abc").write(running, {"user.fusecr.request": "1"})
        ServerMailbox("0abc").write(running, {"user.fusecr.request": "1"})
        opened += 1
    for mailbox in (ProfileMailbox("0abc"), ServerMailbox("0abc")):
        mailbox.clear(running)
    assert running.wait_operation(operation, 60)["status_code"] == 200
    assert refused > 0 and opened >= refused


def test_events_over_a_restart_of_incusd(running: Server, expect_log: Callable[[str], None]) -> None:
    expect_log("no events from h1")
    stop = threading.Event()
    seen: list[Any] = []
    up = [threading.Event(), threading.Event()]
    connects = 0
    heard = threading.Event()

    def follow() -> None:
        nonlocal connects
        for event in running.events(all_projects=True, stop=stop):
            seen.append(event)
            if event.get("type") == CONNECTED:
                up[min(connects, 1)].set()
                connects += 1
            if (event.get("metadata") or {}).get("action") == "instance-updated":
                heard.set()

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        for turn in (0, 1):
            assert up[turn].wait(60)
            heard.clear()
            running.patch_instance_config(NAME, {"user.turn": str(turn)}, busy_seconds=10)
            assert heard.wait(20), seen
            if turn == 0:
                lab_exec("h1", "labctl", "restart", "incusd")
                lab_exec("h1", "incusd", "waitready", "--timeout=60")
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()
