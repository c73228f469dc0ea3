# SPDX-License-Identifier: Apache-2.0
"""Keys that anybody may write who may edit one instance: whatever is in them, the agent hears the others'."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from incus_fusecr.agent import requests as under_test
from incus_fusecr.agent.agenda import Agenda
from incus_fusecr.agent.bindings import bound_to
from incus_fusecr.agent.limits import Limits
from incus_fusecr.agent.plugin import Server as PluginServer
from incus_fusecr.agent.requests import Request, Requests, report_text
from incus_fusecr.checkpoint.freezer import FreezeGuard
from incus_fusecr.checkpoint.journal import Journal
from incus_fusecr.checkpoint.survive import Verdict
from incus_fusecr.errors import FusecrError, Refused
from incus_fusecr.incus.ask import MAX_TEXT, REPORT_KEY, REQUEST_KEY, parse_report
from incus_fusecr.incus.failures import NotFound

GOOD = {"v": 1, "id": "0a", "seq": 1, "op": "check", "beat": 3}
DEEP = "[" * 100_000


def text_of(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


HOSTILE = {
    "none": "",
    "deep": DEEP,
    "deep inside": '{"v":1,"id":"0a","seq":1,"op":"check","x":' + DEEP,
    "list": "[]",
    "seq 1e999": '{"v":1,"id":"0a","op":"check","seq":1e999}',
    "beat Infinity": '{"v":1,"id":"0a","op":"check","seq":1,"beat":Infinity}',
    "seconds NaN": '{"v":1,"id":"0a","op":"hold","seq":1,"seconds":NaN}',
    "beat NaN": '{"v":1,"id":"0a","op":"check","seq":1,"beat":NaN}',
    "seq of 5000 digits": '{"v":1,"id":"0a","op":"check","seq":' + "9" * 5000 + "}",
    "seq of 500 digits": '{"v":1,"id":"0a","op":"check","seq":' + "9" * 500 + "}",
    "seq -1": text_of(seq=-1),
    "seq true": text_of(seq=True),
    "seq 1.0": text_of(seq=1.0),
    "seq text": text_of(seq="1"),
    "v true": text_of(v=True),
    "id number": text_of(id=5),
    "id path": text_of(id="../x"),
    "id of letters that are not ours": text_of(id="\u00e9"),
    "id long": text_of(id="a" * 65),
    "op list": text_of(op=["check"]),
    "op with a line break": text_of(op="check\n"),
    "long": text_of(x="x" * MAX_TEXT),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_request_is_none(text: str) -> None:
    assert Request.parse(text, "default", "c1") is None


def test_a_request() -> None:
    found = Request.parse(text_of(), "p", "c1", ("instances/c1", "p"))
    assert found is not None
    assert (found.id, found.seq, found.op, found.project, found.name) == ("0a", 1, "check", "p", "c1")


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("7", 7.0),
        ("1e999", 60.0),
        ("-1e999", 5.0),
        ("9" * 400, 60.0),
        ("true", 30.0),
        ('"7"', 30.0),
    ],
)
def test_numbers_of_a_request_are_bounded(value: str, number: float) -> None:
    found = Request.parse(text_of()[:-1] + f', "seconds": {value}}}', "p", "c1")
    assert found is not None
    assert found.number("seconds", 30, 5, 60) == number


@pytest.mark.parametrize("text", [*HOSTILE.values(), "{}", "null"])
def test_the_binding_key_of_an_instance_is_read_as_carefully(text: str) -> None:
    assert isinstance(bound_to({"config": {REQUEST_KEY: text}}), str)
    assert bound_to({"config": None}) == ""


class Incus:
    """The local server as the agent's threads see it."""

    def __init__(self, instances: list[dict[str, Any]], profiles: list[dict[str, Any]] | None = None) -> None:
        self.all, self.profiles = instances, profiles or []
        self.broken: set[str] = set()
        self.reports: list[dict[str, Any]] = []

    def __enter__(self) -> Incus:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass

    def instances(self, *, all_projects: bool) -> list[dict[str, Any]]:
        return self.all

    def get(self, path: str, _params: object = None) -> Any:
        if path == "profiles":
            return self.profiles
        if path == "":
            return {"config": {}}
        if path.startswith("projects/"):
            return {"config": {"features.profiles": "false" if path == "projects/plain" else "true"}}
        kind, _, name = path.partition("/")
        if name in self.broken:
            raise RuntimeError("what nobody thought of")
        for found in self.all if kind == "instances" else self.profiles:
            if found["name"] == name:
                return found
        raise NotFound(path, "not found", code=404)

    def patch(self, path: str, body: dict[str, Any]) -> None:
        self.reports.append({"path": path, **json.loads(body["config"][REPORT_KEY])})


def instance(name: str, request: str, report: str = "") -> dict[str, Any]:
    return {"name": name, "project": "default", "config": {REQUEST_KEY: request, REPORT_KEY: report}}


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Incus], tuple[Requests, list[str]]]]:
    """``agent(incus)``: the requests of an agent, and the instances that it was asked about, in order."""
    made: list[Requests] = []

    def make(incus: Incus) -> tuple[Requests, list[str]]:
        handled: list[str] = []

        def handle(request: Request) -> tuple[str, Any]:
            handled.append(request.name)
            return "checked", {}

        config: Any = None
        bound = {"0b": ("default", "c2"), "0d": ("own", "c3"), "0e": ("plain", "c4")}
        found = Requests(config, handle, lambda _request: None, lambda _op, _args: None, bound.get)
        monkeypatch.setattr(found, "server", lambda _project="default": incus)
        made.append(found)
        return found, handled

    yield make
    for found in made:
        found.stop.set()
        found.drain(5)


def wait_for(holds: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_list_with_a_hostile_instance_in_it_is_heard_to_its_end(agent: Any, text: str) -> None:
    requests, handled = agent(Incus([instance("bad", text), instance("good", text_of())]))
    requests._look_at_all(requests.server())
    requests.drain(5)
    assert handled == ["good"]


@pytest.mark.parametrize("report", ['{"v":1,"id":"0a","phase":"x","seq":1e999}', DEEP, "[]", "x" * (MAX_TEXT + 1)])
def test_a_hostile_report_key_keeps_no_request_from_being_done(agent: Any, report: str) -> None:
    requests, handled = agent(Incus([instance("c1", text_of(), report)]))
    requests._look_at_all(requests.server())
    requests.drain(5)
    assert handled == ["c1"]


def test_what_was_answered_is_not_done_again_and_what_was_begun_is(agent: Any) -> None:
    done = report_text("0a", 1, "checked", {}, None)
    begun = report_text("0a", 1, "working", None, None)
    requests, handled = agent(Incus([instance("done", text_of(), done), instance("begun", text_of(), begun)]))
    requests._look_at_all(requests.server())
    requests.drain(5)
    assert handled == ["begun"]


@pytest.mark.parametrize(
    ("migration", "project", "handled"),
    [
        ("0b", "default", ["c2"]),
        ("0b", "own", []),
        ("0c", "default", []),
        ("0d", "own", ["c3"]),
        ("0d", "default", []),
        ("0e", "plain", ["c4"]),
        ("0e", "default", ["c4"]),  # a project without profiles of its own
        ("0e", "own", []),
    ],
)
def test_a_profile_speaks_for_the_instance_its_id_is_bound_to_in_its_project(
    agent: Any, migration: str, project: str, handled: list[str]
) -> None:
    """Who knows an id and may make profiles elsewhere may not speak for it."""
    profile = {"name": f"fusecr-{migration}", "project": project, "config": {REQUEST_KEY: text_of(id=migration)}}
    requests, seen = agent(Incus([], [profile]))
    requests._look_at_all(requests.server())
    requests.drain(5)
    assert seen == handled


def test_each_object_has_its_own_failure(agent: Any, monkeypatch: pytest.MonkeyPatch, expect_log: Any) -> None:
    """Whatever nobody thought of, at one instance: the others of a list are looked at."""
    expect_log("instance bad: the agent failed")
    requests, handled = agent(Incus([instance("bad", text_of()), instance("good", text_of())]))
    parse = Request.parse

    def broken(text: object, project: str, name: str, mailbox: Any) -> Any:
        if name == "bad":
            raise OverflowError
        return parse(text, project, name, mailbox)

    monkeypatch.setattr(under_test.Request, "parse", broken)
    requests._look_at_all(requests.server())
    requests.drain(5)
    assert handled == ["good"]


@pytest.mark.parametrize("thread", ["_read_instances", "_read_others"])
def test_the_threads_outlive_what_nobody_thought_of(agent: Any, expect_log: Any, thread: str) -> None:
    expect_log("bad: the agent failed")
    incus = Incus([instance("bad", text_of()), instance("good", text_of())], [{"name": "fusecr-0b"}])
    incus.broken = {"bad", "fusecr-bad"}
    incus.profiles[0]["config"] = {REQUEST_KEY: text_of(id="0b")}
    requests, handled = agent(incus)
    running = threading.Thread(target=getattr(requests, thread), daemon=True)
    running.start()
    for name in ("bad", "good"):
        requests._instances.put(("default", name))
    for name in ("fusecr-bad", "fusecr-0b"):
        requests._others.put(("default", name))
    wait_for(lambda: handled)
    requests._instances.close()
    requests._others.close()
    running.join(5)
    assert not running.is_alive()


def test_an_instance_has_few_requests_at_once_and_none_is_lost(agent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    incus = Incus([instance("c1", "")])
    requests, _ = agent(incus)
    go, begun = threading.Event(), []

    def handle(request: Request) -> tuple[str, Any]:
        begun.append(request.seq)
        assert go.wait(10)
        return "checked", {}

    monkeypatch.setattr(requests, "_handle", handle)
    for seq in range(1, 20):
        requests._look("default", instance("c1", text_of(seq=seq)))
    wait_for(lambda: len(begun) == under_test.MAX_DOING)
    incus.all = [instance("c1", text_of(seq=19))]
    reader = threading.Thread(target=requests._read_instances, daemon=True)
    reader.start()
    go.set()
    wait_for(lambda: 19 in begun)
    assert sorted(begun) == [*range(1, under_test.MAX_DOING + 1), 19]
    requests._instances.close()
    reader.join(5)


def test_what_changes_all_the_time_takes_one_place() -> None:
    agenda: Agenda[str] = Agenda()
    for _ in range(1000):
        agenda.put("restless", (0.0, 0.01, 0.02))
        agenda.put("other", (0.0,))
    assert len(agenda) == 2
    assert {agenda.get(), agenda.get()} == {"restless", "other"}
    began = time.monotonic()
    assert agenda.get() == "restless"  # again, a little later
    while len(agenda):
        assert agenda.get() == "restless"
    assert time.monotonic() - began < 5
    threading.Timer(0.02, agenda.close).start()
    assert agenda.get() is None


def test_one_project_leaves_slots_to_others() -> None:
    limits = Limits(each=1, total=2)
    with limits.slot("p1", "check", 0):
        with pytest.raises(Refused, match="too many"), limits.slot("p1", "check of c1", 0.01):
            pass
        with limits.slot("p2", "check", 0), pytest.raises(Refused), limits.slot("p3", "check", 0.01):
            pass
    with limits.slot("p1", "check", 0), limits.slot("p3", "check", 0):
        pass


def test_the_follower_connects_again_after_what_nobody_thought_of(
    agent: Any, monkeypatch: pytest.MonkeyPatch, expect_log: Any
) -> None:
    expect_log("events of incus: the agent failed")
    requests, _ = agent(Incus([]))
    calls: list[int] = []

    def follow() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RecursionError
        requests.stop.set()

    monkeypatch.setattr(requests, "_follow", follow)
    requests.run()
    assert len(calls) == 2


def test_a_deleted_instance_is_forgotten(agent: Any) -> None:
    incus = Incus([instance("c1", text_of())])
    requests, _ = agent(incus)
    requests._look_at_all(requests.server())
    assert requests._seen
    incus.all = []  # its event was lost with the connection
    requests._look_at_all(requests.server())
    assert not requests._seen
    incus.all = [instance("c1", text_of())]
    requests._look_at_all(requests.server())
    event = {"metadata": {"action": "instance-deleted", "source": "/1.0/instances/c1"}, "project": "default"}
    requests._event(requests.server(), event)
    assert not requests._seen


# Reports


def test_a_report_that_is_too_long_is_an_error(expect_log: Any) -> None:
    expect_log("more than a report may have")
    text = report_text("0a", 1, "checked", {"verdicts": ["x" * MAX_TEXT]}, None)
    assert len(text) <= MAX_TEXT
    found = parse_report(text)
    assert found is not None and found.error is not None
    assert "longer" in str(found.as_error("check of c1"))


def test_an_error_of_any_length_can_be_reported() -> None:
    text = report_text("0a", 1, "refused", None, FusecrError("w" * 300_000, "\u00e9" * 300_000, "h"))
    found = parse_report(text)
    assert found is not None and found.error is not None
    assert found.error["what"].startswith("www") and "..." in found.error["what"]


def test_thousands_of_verdicts_are_cut_and_say_so() -> None:
    from incus_fusecr.agent import brief

    found = [Verdict(f"pid {n} fd 3: /mnt/{'<ff>' * 4000}", "\u00e9" * 9000, "close it") for n in range(2500)]
    cut = brief.verdicts(found)
    assert len(cut) <= 101
    assert cut[-1]["what"] == f"and {2500 - len(cut) + 1} more"
    assert len(report_text("0a", 1, "checked", {"verdicts": cut}, None)) < MAX_TEXT // 2
    plain = brief.verdicts([Verdict(f"pid {n}", "why", "do") for n in range(150)])
    assert len(plain) == 101 and plain[0]["what"] == "pid 0" and plain[-1]["what"] == "and 50 more"
    assert brief.verdicts([Verdict("a", "b", "c")]) == [{"what": "a", "why": "b", "hint": "c"}]


# The freezer guard


def test_the_freezer_guard_looks_at_every_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Any
) -> None:
    expect_log("freeze guard: lxc.payload.bad: the agent failed")
    for name in ("lxc.payload.bad", "lxc.payload.good", "other"):
        (tmp_path / name).mkdir()
    seen: list[str] = []

    def look_at(_self: FreezeGuard, _path: str, name: str) -> None:
        seen.append(name)
        if name.endswith("bad"):
            raise StopIteration

    monkeypatch.setattr(FreezeGuard, "_look_at", look_at)
    zygote: Any = None
    FreezeGuard(zygote, Journal(str(tmp_path / "journal")), str(tmp_path)).look()
    assert sorted(seen) == ["lxc.payload.bad", "lxc.payload.good"]


# The plugin's socket


def test_the_plugins_socket_outlives_a_lack_of_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Any
) -> None:
    expect_log("Too many open files")
    tools: Any = None
    gate: Any = None
    server = PluginServer(tools, gate, str(tmp_path / "s"))
    served = threading.Event()
    monkeypatch.setattr(server, "_serve", lambda sock: (sock.close(), served.set()))
    server.listen()
    real = server._sock

    class Once:
        """A socket that has no descriptor left the first time."""

        failed = False

        def accept(self) -> Any:
            if not self.failed:
                self.failed = True
                raise OSError(24, "Too many open files")
            return real.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    once: Any = Once()
    server._sock = once
    running = threading.Thread(target=server.run)
    running.start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(server.path)
        assert served.wait(10)
    server.close()
    running.join(10)
    assert not running.is_alive()
