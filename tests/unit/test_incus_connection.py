# SPDX-License-Identifier: Apache-2.0
"""Requests against a scripted server: what is repeated, what is not, and what a failure says of its outcome."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_incus import DROP, SERVER_INFO, FakeIncus, Request, operation, refused, started, sync

from incus_fusecr.errors import UsageError
from incus_fusecr.incus import copy
from incus_fusecr.incus.client import Server
from incus_fusecr.incus.config import Endpoint
from incus_fusecr.incus.failures import (
    ApiError,
    Busy,
    Conflict,
    Forbidden,
    NotDelivered,
    NotFound,
    OperationFailed,
    OperationTimeout,
    OutcomeUnknown,
)

Connect = Callable[[Any], tuple[FakeIncus, Server]]
BUSY = 'Failed to create instance update operation: Instance is busy running a "migrate" operation'


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Connect]:
    """A fake with a script, and a Server on it."""
    opened: list[Any] = []

    def make(script: Any, project: str = "default") -> tuple[FakeIncus, Server]:
        fake = FakeIncus(script).listen_unix(tmp_path / f"{len(opened)}.socket")
        server = Server(Endpoint("h1", project, unix_path=fake.path), read_seconds=5)
        fake.requests.clear()
        opened.extend((server, fake))
        return fake, server

    yield make
    for thing in opened:
        thing.close()


def once(*replies: Any) -> Any:
    """A script that answers requests other than GET /1.0 in turn, the last reply again and again."""
    left = list(replies)

    def script(request: Request) -> Any:
        if request.path == "/1.0" and request.method == "GET":
            return None
        return left.pop(0) if len(left) > 1 else left[0]

    return script


def test_project_and_agent_go_along(connect: Connect) -> None:
    fake, server = connect(once(sync([])), "web")  # type: ignore[call-arg]
    server.get("instances", {"recursion": "1"})
    assert fake.requests[0].query == {"project": "web", "recursion": "1"}
    assert fake.requests[0].headers["User-Agent"].startswith("incus-fusecr/")


def test_get_is_repeated_when_the_connection_drops(connect: Connect) -> None:
    fake, server = connect(once(DROP, DROP, sync({"name": "c1"})))
    assert server.instance("c1") == {"name": "c1"}
    assert len(fake.requests) == 3


def test_get_ends_with_an_unknown_outcome_when_it_keeps_dropping(connect: Connect) -> None:
    fake, server = connect(once(DROP))
    with pytest.raises(OutcomeUnknown):
        server.get("instances/c1")
    assert len(fake.requests) == 4


@pytest.mark.parametrize("method", ["PUT", "PATCH", "POST", "DELETE"])
def test_nothing_else_is_repeated(connect: Connect, method: str) -> None:
    fake, server = connect(once(DROP))
    with pytest.raises(OutcomeUnknown) as e:
        server.request(method, "instances/c1", {})
    assert len(fake.requests) == 1
    assert e.value.exit_code == 4 and "may or may not" in str(e.value)


def test_a_dead_server_got_nothing(connect: Connect) -> None:
    fake, server = connect(once(sync({})))
    fake.close()
    with pytest.raises(NotDelivered) as e:
        server.patch("instances/c1", {})
    assert fake.path in str(e.value) and "is Incus running" in str(e.value)


def test_no_socket_at_all(tmp_path: Path) -> None:
    with pytest.raises(NotDelivered, match="No such file"):
        Server(Endpoint("local", "default", unix_path=str(tmp_path / "none")))


def test_a_slow_answer_is_not_repeated(connect: Connect) -> None:
    done = threading.Event()

    def script(request: Request) -> Any:
        if request.path.endswith("c1"):
            done.wait(10)
            return DROP
        return None

    fake, server = connect(script)
    try:
        with pytest.raises(OutcomeUnknown) as e:
            server.get("instances/c1", timeout=0.2)
        assert e.value.timed_out and len(fake.requests) == 1
    finally:
        done.set()


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (404, "Instance not found", NotFound),
        (409, "exists", Conflict),
        (412, "ETag doesn't match", Conflict),
        (403, "not authorized", Forbidden),
        (400, BUSY, Busy),
        (
            500,
            'Failed getting exclusive access to instance: Instance is busy running a "update" operation',
            Busy,
        ),
        (500, "boom", ApiError),
    ],
)
def test_refusals(connect: Connect, code: int, text: str, kind: type[ApiError]) -> None:
    _, server = connect(once(refused(code, text)))
    with pytest.raises(ApiError) as e:
        server.post("instances", {})
    assert type(e.value) is kind and e.value.code == code and text in str(e.value)


@pytest.mark.parametrize(
    "reply", [(200, b"<html>"), (200, b"[1]"), (200, b'{"type": "x"}'), (500, b"\xff\xfe")]
)
def test_nonsense_is_an_error_of_the_api(connect: Connect, reply: Any) -> None:
    _, server = connect(once(reply))
    with pytest.raises(ApiError):
        server.get("instances/c1")


def test_something_else_on_the_socket(tmp_path: Path) -> None:
    fake = FakeIncus(lambda r: (200, b'{"type": "sync"}')).listen_unix(tmp_path / "s")
    with fake, pytest.raises(ApiError, match="not an Incus server"):
        Server(Endpoint("h1", "default", unix_path=fake.path))


def test_untrusted(tmp_path: Path) -> None:
    fake = FakeIncus(lambda r: sync({**SERVER_INFO, "auth": "untrusted"})).listen_unix(tmp_path / "s")
    with fake, pytest.raises(Forbidden, match="does not trust this client"):
        Server(Endpoint("h1", "default", unix_path=fake.path))


def test_a_busy_instance_is_tried_again(connect: Connect) -> None:
    fake, server = connect(once(refused(400, BUSY), refused(400, BUSY), sync({})))
    server.patch_instance_config("c1", {"user.x": "1"})
    assert [r.body for r in fake.requests] == [{"config": {"user.x": "1"}}] * 3


def test_a_busy_instance_is_not_tried_for_ever(connect: Connect) -> None:
    _, server = connect(once(refused(400, BUSY)))
    with pytest.raises(Busy):
        server.patch_instance_config("c1", {}, busy_seconds=0.05)


def test_missing_instance_and_project(connect: Connect) -> None:
    _, server = connect(lambda r: refused(404, "x") if r.path != "/1.0" else None)
    with pytest.raises(UsageError, match='instance "c1" does not exist'):
        server.require_instance("c1")
    _, server = connect(lambda r: refused(404, "x") if r.path != "/1.0" else None, "web")  # type: ignore[call-arg]
    with pytest.raises(UsageError, match='project "web" does not exist'):
        server.require_instance("c1")


def test_one_thread_each(connect: Connect) -> None:
    _, server = connect(once(sync({})))
    server.get("instances/c1")
    seen: list[BaseException] = []

    def other() -> None:
        try:
            server.get("instances/c1")
        except RuntimeError as e:
            seen.append(e)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(10)
    assert len(seen) == 1


# Operations


def waits(*replies: Any) -> Any:
    """A script: every request but GET starts operation ``op``; its waits and reads are answered in turn."""
    left = list(replies)

    def script(request: Request) -> Any:
        if "/operations/" in request.path:
            return left.pop(0) if len(left) > 1 else left[0]
        return started("op") if request.method != "GET" else None

    return script


def test_an_operation_is_followed_to_its_end(connect: Connect) -> None:
    steps: list[Any] = []
    _, server = connect(
        waits(
            refused(500, "context deadline exceeded"),
            sync(operation(103, fs_progress="a")),
            sync(operation(200, fs_progress="b")),
        )
    )
    assert server.put_state("c1", "start", 10, progress=steps.append)["status_code"] == 200
    assert steps == [{"fs_progress": "a"}, {"fs_progress": "b"}]


def test_a_failed_operation_is_an_error(connect: Connect) -> None:
    """Incus 6.0 answers the wait for a failed operation with an HTTP error."""
    _, server = connect(waits(refused(500, "migration failed 1"), sync(operation(400, "migration failed 1"))))
    with pytest.raises(OperationFailed, match="migration failed 1"):
        server.put_state("c1", "stop", 10)


def test_an_operation_that_found_the_instance_busy(connect: Connect) -> None:
    _, server = connect(waits(sync(operation(400, BUSY))))
    with pytest.raises(Busy):
        server.put_state("c1", "stop", 10)


def test_an_operation_that_does_not_end(connect: Connect) -> None:
    _, server = connect(waits(sync(operation(103))))
    with pytest.raises(OperationTimeout) as e:
        server.put_state("c1", "stop", 0.2)
    assert e.value.operation == "op"


def test_an_operation_without_progress_is_given_up(connect: Connect) -> None:
    """A link that lost its other end: nothing fails, nothing comes."""
    _, server = connect(waits(sync(operation(103, fs_progress="a"))))
    with pytest.raises(OperationTimeout, match="no progress") as e:
        server.wait_operation("op", 60, stall=0.1)
    assert e.value.operation == "op"


def test_an_operation_with_progress_is_not(connect: Connect) -> None:
    steps = [sync(operation(103, fs_progress=str(n))) for n in range(20)]
    _, server = connect(waits(*steps, sync(operation(200))))
    assert server.wait_operation("op", 60, stall=0.5)["status_code"] == 200


def test_an_operation_that_the_server_forgot(connect: Connect) -> None:
    _, server = connect(waits(refused(404, "not found")))
    with pytest.raises(OutcomeUnknown, match="no longer knows operation op"):
        server.put_state("c1", "stop", 10)


def test_a_wait_bears_a_short_loss_of_the_link(connect: Connect) -> None:
    _, server = connect(waits(*[DROP] * 6, sync(operation(200))))
    assert server.put_state("c1", "stop", 20)["status_code"] == 200


def test_a_wait_does_not_bear_a_long_one(connect: Connect) -> None:
    _, server = connect(waits(DROP))
    server.lost_seconds = 0.2
    with pytest.raises(OutcomeUnknown):
        server.put_state("c1", "stop", 60)


def test_a_wait_that_loses_the_server_does_not_say_that_nothing_was_sent(connect: Connect) -> None:
    holder: list[FakeIncus] = []

    def script(request: Request) -> Any:
        if "/operations/" in request.path:
            threading.Thread(target=holder[0].close).start()
            return DROP
        return started("op") if request.method != "GET" else None

    fake, server = connect(script)
    holder.append(fake)
    server.lost_seconds = 0.5
    with pytest.raises(OutcomeUnknown):
        server.put_state("c1", "stop", 60)


def test_delete_looks_whether_it_is_gone(connect: Connect) -> None:
    there = [True]

    def script(request: Request) -> Any:
        if "/operations/" in request.path:
            return sync(operation(200))
        if request.method == "DELETE":
            return started("op")
        if request.path.endswith("/c1"):
            return sync({"name": "c1"}) if there[0] else refused(404, "x")
        return None

    _, server = connect(script)
    with pytest.raises(Exception, match="still there"):
        server.delete_instance("c1", 10)
    there[0] = False
    assert server.delete_instance("c1", 10)


# Copies


def migration(
    source_fails: str = "", first_address_fails: bool = False, target_lies: bool = False
) -> tuple[Any, Any, list[Any]]:
    """Scripts for a source and a target, and the bodies that the target got."""
    bodies: list[Any] = []
    there: list[str] = []
    instance = {
        "name": "c1",
        "type": "container",
        "architecture": "x86_64",
        "profiles": ["default"],
        "devices": {},
        "expanded_devices": {"root": {"type": "disk", "path": "/", "pool": "default"}},
        "config": {
            "volatile.last_state.power": "RUNNING",
            "volatile.eth0.hwaddr": "00:16:3e:00:00:01",
            "volatile.base_image": "abc",
            "user.fusecr.request": "{}",
            "user.mine": "1",
            "limits.memory": "1GiB",
        },
    }

    def source(request: Request) -> Any:
        if str(request) == "GET /1.0/instances/c1":
            return sync(instance)
        if str(request) == "POST /1.0/instances/c1":
            return started("offer", {"control": "s1", "fs": "s2"})
        if request.path.startswith("/1.0/operations/offer"):
            return sync(operation(400 if source_fails else 200, source_fails))
        return None

    def target(request: Request) -> Any:
        if str(request) == "POST /1.0/instances":
            bodies.append(request.body)
            there.append("c1")
            return started(f"pull{len(bodies)}")
        if request.path == "/1.0/instances/c1":
            if request.method == "DELETE":
                there.clear()
                return started("delete")
            return sync({"name": "c1"}) if there else refused(404, "gone")
        if "/operations/delete" in request.path:
            return sync(operation(200))
        if "/operations/pull" in request.path:
            if source_fails and not target_lies:
                return sync(operation(400, "websocket: bad handshake"))
            if first_address_fails and "/pull1" in request.path:
                return sync(operation(400, "Failed: dial tcp 192.0.2.1:8443: connect: connection refused"))
            return sync(operation(200, fs_progress="c1: 2.07GB (50.35MB/s)"))
        return None

    return source, target, bodies


def test_pull_sends_what_the_recipe_says(connect: Connect) -> None:
    source_script, target_script, bodies = migration()
    fake, source = connect(source_script)
    _, target = connect(target_script)
    done = copy.pull(
        source, target, "c1", "c2", deadline=10, config_overrides={"user.x": "y", "limits.memory": ""}
    )
    (body,) = bodies
    assert body["name"] == "c2" and body["stateful"] is True
    assert body["config"] == {
        "volatile.eth0.hwaddr": "00:16:3e:00:00:01",
        "volatile.base_image": "abc",
        "user.mine": "1",
        "user.x": "y",
    }
    assert body["source"] == {
        "type": "migration",
        "mode": "pull",
        "operation": "https://192.0.2.1:8443/1.0/operations/offer",
        "certificate": "PEM",
        "secrets": {"control": "s1", "fs": "s2"},
        "base-image": "abc",
        "live": False,
        "instance_only": True,
        "allow_inconsistent": True,
        "refresh": False,
    }
    offer = next(r.body for r in fake.requests if r.method == "POST")
    assert offer["migration"] is True and offer["live"] is False and offer["allow_inconsistent"] is True
    assert done.bytes == 2_070_000_000 and done.address == "https://192.0.2.1:8443"


@pytest.mark.parametrize("refresh", [False, True])
def test_a_target_that_calls_a_failed_transfer_a_success(connect: Connect, refresh: bool) -> None:
    source_script, target_script, _ = migration("rsync: exit status 24", target_lies=True)
    source = connect(source_script)[1]
    fake, target = connect(target_script)
    with pytest.raises(OperationFailed, match="exit status 24"):
        copy.pull(source, target, "c1", "c1", deadline=10, refresh=refresh)
    # a first pass can be repeated; what a refresh has changed is the next one's
    assert [str(r) for r in fake.requests if r.method == "DELETE"] == ([] if refresh else ["DELETE /1.0/instances/c1"])


def test_pull_into_a_pool_and_profiles(connect: Connect) -> None:
    source_script, target_script, bodies = migration()
    source, target = connect(source_script)[1], connect(target_script)[1]
    copy.pull(source, target, "c1", "c1", deadline=10, pool="fast", profiles=["p"], refresh=True)
    assert bodies[0]["devices"] == {"root": {"type": "disk", "path": "/", "pool": "fast"}}
    assert bodies[0]["profiles"] == ["p"] and bodies[0]["source"]["refresh"] is True


def test_pull_tries_the_next_address(connect: Connect) -> None:
    source_script, target_script, bodies = migration(first_address_fails=True)
    source, target = connect(source_script)[1], connect(target_script)[1]
    source._info["environment"] = {"addresses": ["192.0.2.1:8443", "[2001:db8::1]:8443"]}
    done = copy.pull(source, target, "c1", "c1", deadline=10)
    assert done.address == "https://[2001:db8::1]:8443" and len(bodies) == 2


def test_pull_that_reaches_no_address(connect: Connect) -> None:
    source_script, target_script, _ = migration(first_address_fails=True)
    fake, source = connect(source_script)
    _, target = connect(target_script)
    with pytest.raises(OperationFailed, match="not reached under any of its addresses"):
        copy.pull(source, target, "c1", "c1", deadline=10)
    assert "DELETE /1.0/operations/offer" in fake.seen()


def test_a_failed_pull_names_the_source_s_reason_and_cancels_the_offer(connect: Connect) -> None:
    source_script, target_script, _ = migration(source_fails="rsync: disk on fire")
    fake, source = connect(source_script)
    _, target = connect(target_script)
    with pytest.raises(OperationFailed, match="bad handshake; h1 says: rsync: disk on fire"):
        copy.pull(source, target, "c1", "c1", deadline=10)
    assert "DELETE /1.0/operations/offer" in fake.seen()


def test_a_source_without_network(connect: Connect) -> None:
    source_script, target_script, bodies = migration()
    source, target = connect(source_script)[1], connect(target_script)[1]
    source._info["environment"] = {"addresses": []}
    with pytest.raises(Exception, match=r"core\.https_address"):
        copy.pull(source, target, "c1", "c1", deadline=10)
    assert bodies == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("c1: 45.77MB (45.76MB/s)", 45_770_000),
        ("a: 9B (1B/s)", 9),
        ("x: 1.5kB (2kB/s)", 1500),
        ("", 0),
        ("a: MB (", 0),
    ],
)
def test_bytes_of_progress(text: str, count: int) -> None:
    assert copy.transferred(text) == count


def test_waits_end_in_time(connect: Connect) -> None:
    """A wait must not take the server's own idea of how long."""
    began = time.monotonic()
    _, server = connect(waits(sync(operation(103))))
    with pytest.raises(OperationTimeout):
        server.wait_operation("op", 0.3)
    assert time.monotonic() - began < 5
