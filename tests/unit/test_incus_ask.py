# SPDX-License-Identifier: Apache-2.0
"""Questions and conversations with an agent: here one that a script plays, behind a scripted server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_incus import DROP, SERVER_INFO, FakeIncus, Request, refused, sync

from incus_fusecr.incus.ask import MAX_TEXT, AgentError, AgentSilent, ask_host, parse_report
from incus_fusecr.incus.client import Server
from incus_fusecr.incus.config import Endpoint
from incus_fusecr.incus.conversation import Beater, Conversation, ask_instance
from incus_fusecr.incus.failures import NotDelivered, OutcomeUnknown
from incus_fusecr.incus.mailbox import InstanceMailbox, ProfileMailbox, ServerMailbox

Agent = Callable[[str, dict[str, Any]], str | None]


class World:
    """A server with configuration, one instance ``c1`` and profiles, whose keys an agent may answer at once."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.objects: dict[str, dict[str, str]] = {"/1.0": {}, "/1.0/instances/c1": {}}
        self.lock = threading.Lock()
        self.written: list[dict[str, str]] = []
        self.drop = ""  # end the connection at requests of this method

    def script(self, request: Request) -> Any:
        with self.lock:
            path = request.path
            if request.method == self.drop:
                return DROP
            if str(request) == "POST /1.0/profiles":
                self.objects[f"/1.0/profiles/{request.body['name']}"] = dict(request.body["config"])
                self.react(f"/1.0/profiles/{request.body['name']}")
                return sync({})
            if path not in self.objects:
                return refused(404, "not found")
            if request.method == "DELETE":
                del self.objects[path]
            if request.method == "PATCH":
                self.written.append(dict(request.body["config"]))
                for key, value in request.body["config"].items():
                    self.objects[path].pop(key, None)
                    if value:
                        self.objects[path][key] = value
                self.react(path)
            config = dict(self.objects.get(path, {}))
            return sync({**SERVER_INFO, "config": config} if path == "/1.0" else {"config": config})

    def react(self, path: str) -> None:
        for key, value in list(self.objects[path].items()):
            for asked, answered in (
                ("user.fusecr.ask", "user.fusecr.answer"),
                ("user.fusecr.request", "user.fusecr.report"),
            ):
                if key.startswith(asked):
                    text = self.agent(key, json.loads(value))
                    if text is not None:
                        self.objects[path][answered + key.removeprefix(asked)] = text


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Callable[[Agent], tuple[World, Server]]]:
    opened: list[Any] = []

    def make(agent: Agent) -> tuple[World, Server]:
        made = World(agent)
        fake = FakeIncus(made.script).listen_unix(tmp_path / f"{len(opened)}.socket")
        server = Server(Endpoint("h1", "default", unix_path=fake.path))
        opened.extend((server, fake))
        return made, server

    yield make
    for thing in opened:
        thing.close()


def report(
    request: dict[str, Any], phase: str, data: Any = None, error: Any = None, seq: int | None = None
) -> str:
    found = request.get("seq", 0) if seq is None else seq
    return json.dumps(
        {"v": 1, "id": request["id"], "seq": found, "phase": phase, "data": data, "error": error}
    )


def test_a_host_answers_and_nothing_stays(world: Any) -> None:
    asked: list[dict[str, Any]] = []

    def agent(key: str, request: dict[str, Any]) -> str:
        asked.append(request)
        return report(request, "done", {"pong": 1})

    made, server = world(agent)
    assert ask_host(server, "ping", {"a": 1}, 5) == {"pong": 1}
    assert asked[0]["op"] == "ping" and asked[0]["args"] == {"a": 1} and asked[0]["v"] == 1
    assert made.objects["/1.0"] == {}


def test_a_host_without_agent_is_found_out_soon(world: Any) -> None:
    made, server = world(lambda key, request: None)
    with pytest.raises(AgentSilent, match="no incus-fusecr agent") as e:
        ask_host(server, "ping", {}, 60, first_sign=0.1)
    assert e.value.exit_code == 3
    assert made.objects["/1.0"] == {}


def test_a_working_agent_gets_its_time(world: Any) -> None:
    made, server = world(lambda key, request: report(request, "working"))
    with pytest.raises(AgentSilent, match="did not finish"):
        ask_host(server, "list", {}, 0.5, first_sign=0.1)
    assert made.objects["/1.0"] == {}


def test_an_agent_s_error_is_passed_on(world: Any) -> None:
    error = {"what": "list", "why": "no", "hint": "do"}
    _, server = world(lambda key, request: report(request, "done", error=error))
    with pytest.raises(AgentError) as e:
        ask_host(server, "list", {}, 5)
    assert e.value.to_dict() == error


def test_a_conversation(world: Any) -> None:
    made, server = world(lambda key, request: report(request, {"hold": "held"}.get(request["op"], "going")))
    talk = Conversation(server, "c1", "m1")
    assert talk.send("hold", {"gate": "g", "op": "forged", "id": "forged"}) == 1
    assert talk.wait(("held",), 5).seq == 1
    assert talk.send("going") == 2
    assert talk.wait(("going",), 5).seq == 2
    requests = [json.loads(w["user.fusecr.request"]) for w in made.written]
    assert [(r["op"], r["id"], r["seq"]) for r in requests] == [("hold", "m1", 1), ("going", "m1", 2)]
    assert requests[1]["beat"] > requests[0]["beat"] and requests[0]["gate"] == "g"
    talk.close()
    assert made.objects["/1.0/instances/c1"] == {}


def test_a_report_of_before_does_not_count(world: Any) -> None:
    """Neither that of another migration nor that of an earlier request."""
    _, server = world(lambda key, request: report({**request, "id": "other"}, "held"))
    talk = Conversation(server, "c1", "m1")
    talk.send("hold")
    with pytest.raises(AgentSilent):
        talk.wait(("held",), 5, first_sign=0.1)
    _, server = world(lambda key, request: report(request, "held", seq=0))
    talk = Conversation(server, "c1", "m1")
    talk.send("hold")
    with pytest.raises(AgentSilent):
        talk.wait(("held",), 0.2)


def test_the_error_of_a_request(world: Any) -> None:
    _, server = world(
        lambda key, request: report(request, "failed", error={"what": "w", "why": "y", "hint": "h"})
    )
    talk = Conversation(server, "c1", "m1")
    talk.send("hold")
    with pytest.raises(AgentError, match=r"w: y \(h\)"):
        talk.wait(("held",), 5)


def test_ask_instance_leaves_no_keys_also_when_nobody_answers(world: Any) -> None:
    made, server = world(lambda key, request: None)
    with pytest.raises(AgentSilent):
        ask_instance(server, "c1", "check", {}, 0.1, phases=("checked",))
    assert made.objects["/1.0/instances/c1"] == {}


def test_beats_come_from_another_thread(world: Any) -> None:
    seen: set[int] = set()
    enough = threading.Event()

    def agent(key: str, request: dict[str, Any]) -> str:
        seen.add(request["beat"])
        if len(seen) > 3:
            enough.set()
        return report(request, "held")

    _, server = world(agent)
    talk = Conversation(server, "c1", "m1")
    talk.send("hold")
    with Beater(talk, 0.02) as beater:
        assert enough.wait(20)
        assert talk.wait(("held",), 5).phase == "held"
    assert beater.failure is None


def test_a_request_that_a_report_undid_is_written_again(world: Any) -> None:
    """The agent's write had read the object before the request was written, and wrote it after that: without an event for it."""
    seen: list[int] = []

    def agent(key: str, request: dict[str, Any]) -> str:
        seen.append(request["seq"])
        return report(request, "held" if request["seq"] == 1 else "going")

    made, server = world(agent)
    talk = Conversation(server, "c1", "m1")
    talk.send("hold")
    assert talk.wait(("held",), 5).phase == "held"
    first = dict(made.objects["/1.0/instances/c1"])
    talk.send("going")
    made.objects["/1.0/instances/c1"] = first
    seen.clear()
    assert talk.wait(("going",), 5, first_sign=None).phase == "going"
    assert seen == [2]


@pytest.mark.parametrize("kind", [InstanceMailbox, ServerMailbox, ProfileMailbox])
def test_every_mailbox_carries_a_conversation(world: Any, kind: Any) -> None:
    made, server = world(lambda key, request: report(request, "held", {"x": 1}))
    mailbox = kind("c1" if kind is InstanceMailbox else "0123")
    talk = Conversation(server, "c1", "m1", mailbox=mailbox)
    talk.send("hold")
    talk.beat()
    assert talk.wait(("held",), 5).data == {"x": 1}
    talk.close()
    talk.close()
    assert made.objects == {"/1.0": {}, "/1.0/instances/c1": {}}


def test_a_lost_write_is_an_unknown_outcome_and_is_not_repeated_by_a_beat(world: Any) -> None:
    made, server = world(lambda key, request: None)
    talk = Conversation(server, "c1", "m1")
    talk.send("hold")
    made.drop = "PATCH"
    with pytest.raises(OutcomeUnknown):
        talk.send("commit")
    made.drop = ""
    count = len(made.written)
    talk.beat()
    assert len(made.written) == count
    talk.send("status")
    talk.beat()
    assert [json.loads(w["user.fusecr.request"])["op"] for w in made.written[count:]] == ["status", "status"]


def test_an_undelivered_request_never_comes_true(world: Any, tmp_path: Path) -> None:
    """The driver lets the source run on when ``go`` was not delivered; no beat may deliver it after that."""
    made = World(lambda key, request: None)
    path = tmp_path / "s"
    fake = FakeIncus(made.script).listen_unix(path)
    with Server(Endpoint("h1", "default", unix_path=str(path))) as server:
        talk = Conversation(server, "c1", "m1")
        talk.send("expect")
        fake.close()
        with pytest.raises(NotDelivered):
            talk.send("go")
        path.unlink()
        with FakeIncus(made.script).listen_unix(path):
            talk.beat()
            talk.beat()
    ops = [json.loads(w["user.fusecr.request"])["op"] for w in made.written]
    assert ops == ["expect", "expect", "expect"]


def test_a_short_loss_of_the_link_does_not_end_a_wait(world: Any) -> None:
    made, server = world(lambda key, request: report(request, "held"))
    talk = Conversation(server, "c1", "m1")
    talk.send("hold")
    made.drop = "GET"
    timer = threading.Timer(0.3, lambda: setattr(made, "drop", ""))
    timer.start()
    try:
        assert talk.wait(("held",), 20).phase == "held"
    finally:
        timer.join()


def test_a_long_loss_of_the_link_ends_a_wait_with_an_unknown_outcome(world: Any) -> None:
    made, server = world(lambda key, request: report(request, "held"))
    server.lost_seconds = 0.2
    talk = Conversation(server, "c1", "m1")
    talk.send("hold")
    made.drop = "GET"
    with pytest.raises(OutcomeUnknown):
        talk.wait(("held",), 60)


HOSTILE = [
    "",
    "{",
    "[]",
    "null",
    '"x"',
    "1e999",
    "[" * 100_000,
    '{"v": 2, "id": "a", "phase": "x"}',
    '{"v": 1, "id": 5, "phase": "x"}',
    '{"v": 1, "id": "a", "phase": null}',
    '{"v": 1, "id": "a", "phase": "x", "seq": "1"}',
    '{"v": 1, "id": "a", "phase": "x", "seq": true}',
    '{"v": 1, "id": "a", "phase": "x", "seq": 1e999}',
    '{"v": 1, "id": "a", "phase": "x", "seq": -1}',
    '{"v": true, "id": "a", "phase": "x"}',
    '{"v": 1, "id": "a", "phase": "x"}' + " " * MAX_TEXT,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_malformed_reports_are_none(text: str) -> None:
    assert parse_report(text) is None


def test_odd_reports_are_bounded() -> None:
    found = parse_report(
        json.dumps({"v": 1, "id": "a", "phase": "x" * 999, "data": [1], "error": "e" * 99999})
    )
    assert found is not None
    assert len(found.phase) == 64 and found.data == {} and found.error is not None
    assert len(found.error["what"]) == 4000


def test_a_truncated_report_is_an_error_for_every_reader(world: Any) -> None:
    """No verdicts and no connections would read as: nothing is in the way."""
    _, server = world(lambda key, request: report(request, "checked", {"truncated": True}))
    with pytest.raises(AgentError, match="check of h1:c1: its report is longer"):
        ask_instance(server, "c1", "check", {}, 5, phases=("checked",))
    _, server = world(lambda key, request: report(request, "done", {"truncated": True}))
    with pytest.raises(AgentError, match="list on h1: its report is longer"):
        ask_host(server, "list", {}, 5)
