# SPDX-License-Identifier: Apache-2.0
"""Who may say what of a migration, and what a source in doubt is told: two must never run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from incus_fusecr.agent import ledger as ledgers
from incus_fusecr.agent import resolve
from incus_fusecr.agent import service as under_test
from incus_fusecr.agent.gate import Expected
from incus_fusecr.agent.ledger import ABORTED, RUNNING, Ledger
from incus_fusecr.agent.requests import Request
from incus_fusecr.agent.service import Service
from incus_fusecr.checkpoint.dump import Tools
from incus_fusecr.checkpoint.journal import Journal
from incus_fusecr.errors import FusecrError, Refused
from incus_fusecr.incus import arrival
from incus_fusecr.incus.ask import REQUEST_KEY

ID, OTHER = "a" * 32, "b" * 32


class Incus:
    """A server with at most one instance."""

    def __init__(self, instance: dict[str, Any] | None = None) -> None:
        self.found = instance
        self.deleted: list[str] = []
        self.marks: list[dict[str, str]] = []

    def __enter__(self) -> Incus:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def instance(self, _name: str) -> dict[str, Any] | None:
        return self.found

    def delete(self, path: str) -> None:
        self.deleted.append(path)

    def patch_instance_config(self, _name: str, values: dict[str, str]) -> None:
        self.marks.append(values)
        if len(self.marks) == 1:
            raise KeyError("what nobody thought of")


Make = Callable[[], Service]


@pytest.fixture
def incus() -> Incus:
    return Incus()


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, incus: Incus) -> Make:
    """``agent()``: one that serves nothing; the next one finds what the last one has kept."""

    def make() -> Service:
        journal = Journal(str(tmp_path / "journal"))
        tools: Any = Tools(*[None] * 4)  # type: ignore[arg-type]
        tools.journal = journal
        config: Any = None
        monkeypatch.setattr(under_test, "Ledger", lambda live: Ledger(str(tmp_path / "ledger"), live))
        made = Service(tools, config, [])
        monkeypatch.setattr(made.requests, "server", lambda _project="default": incus)
        monkeypatch.setattr(made.bindings, "_server", lambda _project: incus)
        return made

    return make


def ask(what: Service, op: str, name: str = "c1", project: str = "default", migration: str = ID, **args: Any) -> str:
    """One request; the phase that it is answered with."""
    raw = {"v": 1, "id": migration, "seq": 1, "op": op, **args}
    request = Request.parse(json.dumps(raw), project, name)
    assert request is not None
    what.touch(request)
    return what.handle(request)[0] if op != "bind" else ""


class FakeHold:
    """As much of a hold as requests see."""

    def __init__(self) -> None:
        self.phase, self.migration, self.name, self.init, self.criu, self.began = "held", ID, "c1", 1, 1, 0.0
        self.target = {"project_here": "default", "instance_here": "c1"}

    def going(self) -> None:
        self.phase = "going"

    def commit(self) -> None:
        self.phase = "committed"

    def abort(self, *, even_going: bool = False) -> None:
        self.phase = "aborted"


def held(what: Service) -> FakeHold:
    hold = FakeHold()
    what.holds.by_criu[1] = hold  # type: ignore[assignment]
    return hold


# Who may say it

STRANGERS = [("thief", "default"), ("c1", "other")]


@pytest.mark.parametrize(("name", "project"), STRANGERS)
@pytest.mark.parametrize("op", ["going", "commit", "abort"])
def test_who_knows_the_id_of_a_hold_has_no_right_by_that(agent: Make, op: str, name: str, project: str) -> None:
    what = agent()
    ask(what, "bind", role="source")
    hold = held(what)
    hold.phase = "going" if op == "commit" else "held"
    was = hold.phase
    ask(what, "bind", name, project, role="source")
    with pytest.raises(FusecrError, match=r"holds nothing here|not bound to it"):
        ask(what, op, name, project)
    assert hold.phase == was
    ask(what, op)
    assert hold.phase != was


@pytest.mark.parametrize(("name", "project"), STRANGERS)
@pytest.mark.parametrize("op", ["go", "abort", "status"])
def test_who_knows_the_id_of_what_is_expected_has_no_right_by_that(
    agent: Make, op: str, name: str, project: str
) -> None:
    what = agent()
    ask(what, "bind", role="target")
    assert ask(what, "expect") == "expecting"
    with pytest.raises(FusecrError, match="is of another instance"):
        ask(what, op, name, project)
    assert ask(what, "status") == "expecting"


def test_a_copy_of_an_instance_is_not_bound_by_its_copy_of_the_key(agent: Make) -> None:
    """... also when the agent begins after it was made, and reads the copy first."""
    what = agent()
    ask(what, "bind", "bak", role="source", **{"project": "default", "instance": "c1"})
    assert what.bindings.get(ID) is None
    ask(what, "bind", "c1", role="source", **{"project": "default", "instance": "c1"})
    ask(what, "bind", "bak", role="source")
    assert what.bindings.instance_of(ID) == ("default", "c1")


def test_commit_comes_after_going(agent: Make) -> None:
    what = agent()
    ask(what, "bind", role="source")
    hold = held(what)
    with pytest.raises(FusecrError, match="going comes first"):
        ask(what, "commit")
    assert hold.phase == "held"
    assert (ask(what, "going"), ask(what, "commit")) == ("going", "committed")


@pytest.mark.parametrize("role", ["source", ""])
def test_nothing_is_expected_that_is_not_bound(agent: Make, role: str) -> None:
    what = agent()
    if role:
        ask(what, "bind", role=role)
    with pytest.raises(Refused, match="not bound to it as its target"):
        ask(what, "expect")
    assert what.gate.get(ID) is None and what.ledger.get(ID) is None


def test_nothing_is_held_that_is_not_bound(agent: Make) -> None:
    with pytest.raises(Refused, match="not bound to it as its source"):
        ask(agent(), "hold", target={"fingerprint": "x", "project": "victim", "instance": "v1"})


# What a source in doubt is told

STARTED = {"name": "c1", "status": "Stopped", "last_used_at": "2026-01-01T00:00:00Z", "config": {REQUEST_KEY: "{}"}}


def prepared(what: Service) -> Expected:
    ask(what, "bind", role="target")
    ask(what, "expect")
    expected = what.gate.get(ID)
    assert expected is not None
    return expected


def decide(what: Service, expected: Expected, phase: str) -> None:
    """As the gate does it."""
    what.gate._write(expected, phase)
    expected.phase, expected.marked = phase, True


def forgotten(what: Service) -> None:
    what.bindings.forget(ID)
    assert what.gate.get(ID) is None and what.bindings.get(ID) is None


@pytest.mark.parametrize("instance", [None, STARTED], ids=["gone", "there without its mark"])
@pytest.mark.parametrize("restarted", [False, True])
def test_what_was_let_run_is_said_to_run_though_nothing_of_it_is_left(
    agent: Make, incus: Incus, instance: Any, restarted: bool
) -> None:
    what = agent()
    decide(what, prepared(what), "running")
    forgotten(what)
    incus.found = instance
    if restarted:
        what = agent()
    assert what._place_of(ID) == ("default", "c1")
    with pytest.raises(FusecrError, match=arrival.RUNS_HERE):
        ask(what, "abort")


@pytest.mark.parametrize("phase", ["aborted", "failed"])
def test_what_was_aborted_is_said_to_be_though_nothing_of_it_is_left(agent: Make, phase: str) -> None:
    what = agent()
    decide(what, prepared(what), phase)
    forgotten(what)
    assert ask(agent(), "abort") == "aborted"


def test_what_the_end_of_the_machine_left_undecided_is_decided_by_who_asks(agent: Make, incus: Incus) -> None:
    incus.found = STARTED
    prepared(agent())
    what = agent()  # the journal has ended with the boot
    assert ask(what, "abort") == "aborted"
    # No later request can win.
    ask(what, "bind", role="target")
    with pytest.raises(Refused, match="it is aborted"):
        ask(what, "expect")
    with pytest.raises(FusecrError, match="not known here"):
        ask(what, "go")


def test_what_this_host_never_heard_of_is_not_said_to_be_aborted(agent: Make) -> None:
    with pytest.raises(FusecrError, match="not bound"):
        ask(agent(), "abort")


def test_before_it_is_expected_the_instance_tells(agent: Make, incus: Incus) -> None:
    what = agent()
    ask(what, "bind", role="target")
    incus.found = STARTED
    with pytest.raises(FusecrError, match="whether it was let run is not known"):
        ask(what, "abort")
    incus.found = {**STARTED, "config": {arrival.ARRIVED_KEY: ID}}
    with pytest.raises(FusecrError, match=arrival.RUNS_HERE):
        ask(what, "abort")
    incus.found = None
    assert ask(what, "abort") == "aborted"
    with pytest.raises(Refused):
        ask(what, "expect")


def test_a_go_that_comes_after_the_abort_does_not_count(agent: Make, expect_log: Any) -> None:
    expect_log("migration aborted")
    what = agent()
    expected = prepared(what)
    assert ask(what, "abort") == "aborted"
    with pytest.raises(FusecrError, match="decided otherwise"):
        what.gate._write(expected, "running")


# The ledger


def test_the_first_decision_counts_and_outlives_the_agent(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.open(ID, "p", "c1")
    assert (ledger.decide(ID, RUNNING), ledger.decide(ID, ABORTED)) == (RUNNING, RUNNING)
    again = Ledger(str(tmp_path))
    assert again.decide(ID, ABORTED) == RUNNING and again.place_of(ID) == ("p", "c1")
    with pytest.raises(FusecrError):
        again.decide(OTHER, ABORTED)


def test_a_project_displaces_its_own_records_and_those_that_ran_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "MAX_PER_PROJECT", 10)
    ledger = Ledger(str(tmp_path), live="0007".__eq__)
    ledger.open("00aa", "other", "c1")
    for number in range(30):
        ledger.open(f"{number:04}", "p", f"i{number}")
        ledger.decide(f"{number:04}", RUNNING if number in (3, 4) else ABORTED)
    left = sorted(ledger._all)
    assert left == ["0003", "0004", "0007", *(f"{n:04}" for n in range(23, 30)), "00aa"]
    assert sorted(p.stem for p in tmp_path.iterdir()) == left


def test_a_record_that_was_cut_off_is_left_out(tmp_path: Path, expect_log: Any) -> None:
    expect_log("0002.json")
    Ledger(str(tmp_path)).open("0001", "p", "c1")
    (tmp_path / "0002.json").write_text('{"migration": "00')
    assert Ledger(str(tmp_path)).place_of("0001") == ("p", "c1")


def test_what_is_over_leaves_the_journal_though_its_keys_went_before_the_agent_began(
    agent: Make, incus: Incus, expect_log: Any
) -> None:
    expect_log("could not be written into it")
    what = agent()
    decide(what, prepared(what), "running")
    what = agent()
    what.gate.recover([])
    kept = what.gate.get(ID)
    assert kept is not None
    end = time.monotonic() + 10
    while not kept.marked and time.monotonic() < end:
        time.sleep(0.01)
    assert incus.marks == [{arrival.ARRIVED_KEY: ID}] * 2  # the first one failed
    what.upkeep._forget_expected(ID)
    assert what.tools.journal.entries("gate")  # the instances may not have been listed yet
    what.upkeep._began -= 100
    kept.marked = False
    what.upkeep._forget_expected(ID)
    assert what.tools.journal.entries("gate")
    kept.marked = True
    what.upkeep._forget_expected(ID)
    assert not what.tools.journal.entries("gate") and what.gate.get(ID) is None


# Those who ask


def test_an_instance_that_is_not_there_tells_nothing() -> None:
    server: Any = Incus(None)
    assert arrival.seen(server, "c1", ID) == ""
    server.found = {"config": {arrival.ARRIVED_KEY: OTHER}}
    assert arrival.seen(server, "c1", ID) == ""
    server.found = {"config": {arrival.ARRIVED_KEY: ID}}
    assert arrival.seen(server, "c1", ID) == arrival.RUNNING


@pytest.mark.parametrize("answer", ["running", "aborted", FusecrError("c1", "no answer")])
def test_who_asks_leaves_no_mailbox(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    server = Incus()

    def settle(*_args: Any) -> str:
        if isinstance(answer, FusecrError):
            raise answer
        return str(answer)

    monkeypatch.setattr(resolve, "settle", settle)
    monkeypatch.setattr(resolve, "_open", lambda _config, _target: server)
    config: Any = None
    assert resolve.ask_target(config, {}, ID) == (answer if isinstance(answer, str) else "")
    assert server.deleted == [f"profiles/fusecr-{ID}"]
