# SPDX-License-Identifier: Apache-2.0
"""Whose migrations an agent remembers, what it removes of those that are over, and what it does when it is stopped."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from bound import Incus, bind, bindings

from incus_fusecr.agent import upkeep as under_test
from incus_fusecr.agent.bindings import MAX_PER_INSTANCE, Binding, Bindings
from incus_fusecr.agent.gate import Expected, MigrationGate
from incus_fusecr.agent.holds import COMMITTED, Holds
from incus_fusecr.agent.upkeep import IDLE_SECONDS, Upkeep
from incus_fusecr.checkpoint.journal import Journal
from incus_fusecr.errors import FusecrError
from incus_fusecr.incus.ask import REQUEST_KEY

# What is left over

OLD, NEW, OTHER = "a" * 32, "b" * 32, "c" * 32


def snapshot(migration: str) -> str:
    return f"fusecr-{migration[:12]}"


def upkeep(all_of: Bindings, tmp_path: Path) -> Upkeep:
    journal = Journal(str(tmp_path / "j"))
    zygote: Any = None
    load: Any = None
    gate = MigrationGate(zygote, journal, lambda _expected: None)
    return Upkeep(Holds(journal, {}), gate, all_of, journal, threading.Event(), load)


def age(all_of: Bindings, *migrations: str) -> None:
    for migration in migrations:
        found = all_of.get(migration)
        assert found is not None
        found.touched -= IDLE_SECONDS + 1


def clean(what: Upkeep) -> None:
    for binding in what.bindings.idle(IDLE_SECONDS):
        what._clean(binding)


def test_the_snapshot_of_a_killed_client_goes_though_another_migration_came_at_once(
    tmp_path: Path, expect_log: Any
) -> None:
    expect_log("removed the snapshot")
    incus = Incus(NEW, (snapshot(OLD), snapshot(NEW), "mine", "fusecr-nightly", "fusecr-0123456789ab"))
    all_of = bindings(incus)
    bind(all_of, OLD, "c1")
    bind(all_of, NEW, "c1")
    what = upkeep(all_of, tmp_path)
    age(all_of, OLD)
    clean(what)
    # The later one is at work: a deletion now could meet its pass.
    assert snapshot(OLD) in incus.names
    incus.config.clear()  # it was done and has taken its keys away
    incus.names.remove(snapshot(NEW))
    age(all_of, NEW)
    clean(what)
    assert incus.names == ["mine", "fusecr-nightly"]
    assert all_of.idle(-1) == []
    assert incus.deleted == [f"profiles/fusecr-{OLD}", f"profiles/fusecr-{NEW}"]


def test_the_snapshot_of_a_displaced_id_goes_too(tmp_path: Path, expect_log: Any) -> None:
    expect_log("removed the snapshot")
    incus = Incus(NEW, (snapshot(OLD),))
    all_of = bindings(incus)
    bind(all_of, OLD, "c1")
    for number in range(MAX_PER_INSTANCE):
        bind(all_of, f"d{number}" * 16, "c1")
    bind(all_of, NEW, "c1")
    assert all_of.get(OLD) is None
    age(all_of, *(b.migration for b in all_of.idle(-1)))
    expect_log("removed the keys")
    clean(upkeep(all_of, tmp_path))
    assert incus.names == []


def test_the_snapshot_of_what_is_being_bound_stays(tmp_path: Path, expect_log: Any) -> None:
    """The key may name a migration that this agent has not read yet."""
    expect_log("removed the snapshot fusecr-a")
    incus = Incus(NEW, (snapshot(OLD), snapshot(NEW)))
    all_of = bindings(incus)
    bind(all_of, OLD, "c1")
    age(all_of, OLD)
    clean(upkeep(all_of, tmp_path))
    assert incus.names == [snapshot(NEW)]
    assert REQUEST_KEY in incus.config


def test_one_that_cannot_be_cleaned_keeps_none_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Any
) -> None:
    expect_log("c1: the agent failed at it")
    all_of = bindings()
    what = upkeep(all_of, tmp_path)
    for migration, instance in ((OLD, "c1"), (NEW, "c2")):
        bind(all_of, migration, instance)
    age(all_of, OLD, NEW)
    cleaned: list[str] = []

    def clean_one(binding: Binding) -> None:
        if binding.instance == "c1":
            raise KeyError("config")
        cleaned.append(binding.instance)
        what.stopping.set()

    monkeypatch.setattr(under_test, "TICK", 0.001)
    monkeypatch.setattr(what, "_clean", clean_one)
    what.tidy()
    assert cleaned == ["c2"]


# Leases and doubts


class FakeHold:
    """As much of a hold as those that look after holds see."""

    def __init__(self, name: str, criu: int, phase: str = "held", raises: bool = False) -> None:
        self.name, self.criu, self.phase, self.migration = name, criu, phase, name
        self.init, self.began, self.resolving, self.target = criu, 0.0, False, {"keep_source": "True"}
        self.raises = raises
        self.registry: Holds | None = None
        self.told: list[str] = []

    def _end(self, phase: str) -> None:
        if self.raises:
            raise RuntimeError("what nobody thought of")
        self.phase = phase
        if self.registry is not None:
            self.registry.released(self)  # type: ignore[arg-type]

    def tell(self, phase: str) -> None:
        self.told.append(phase)

    def abort(self, *, even_going: bool = False) -> None:
        assert self.phase == "held" or even_going
        self._end("aborted")

    def commit(self) -> None:
        self._end("committed")


def registered(holds: Holds, *fakes: FakeHold) -> None:
    for fake in fakes:
        fake.registry = holds
        holds.by_criu[fake.criu] = fake  # type: ignore[assignment]


def test_each_lease_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Any) -> None:
    expect_log("lease-c1: the agent failed at it")
    expect_log("client of migration .* is gone")
    what = upkeep(bindings(), tmp_path)
    one, two = FakeHold("c1", 1, raises=True), FakeHold("c2", 2)
    registered(what.holds, one, two)
    monkeypatch.setattr(under_test, "TICK", 0.001)
    watching = threading.Thread(target=what.watch)
    watching.start()
    end = time.monotonic() + 10
    while two.phase == "held" and time.monotonic() < end:
        time.sleep(0.005)
    what.stopping.set()
    watching.join(10)
    assert two.phase == "aborted"


def test_one_whose_end_takes_long_does_not_keep_the_others_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Any
) -> None:
    expect_log("client of migration .* is gone")
    what = upkeep(bindings(), tmp_path)
    slow, quick = FakeHold("c1", 1), FakeHold("c2", 2)
    registered(what.holds, slow, quick)
    go, calls = threading.Event(), []

    def hang(*, even_going: bool = False) -> None:
        calls.append(even_going)
        assert go.wait(10)
        slow._end("aborted")

    slow.abort = hang  # type: ignore[method-assign]
    monkeypatch.setattr(under_test, "TICK", 0.001)
    watching = threading.Thread(target=what.watch)
    watching.start()
    end = time.monotonic() + 10
    while quick.phase == "held" and time.monotonic() < end:
        time.sleep(0.005)
    assert quick.phase == "aborted" and slow.phase == "held" and len(calls) == 1
    go.set()
    while slow.phase == "held" and time.monotonic() < end:
        time.sleep(0.005)
    what.stopping.set()
    watching.join(10)


def test_what_cannot_be_cleaned_is_tried_less_and_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Any
) -> None:
    expect_log("c1: .*not stopped")
    all_of = bindings()
    what = upkeep(all_of, tmp_path)
    bind(all_of, OLD, "c1")
    age(all_of, OLD)
    tries: list[float] = []

    def clean_one(_binding: Binding) -> None:
        tries.append(time.monotonic())
        if len(tries) == 4:
            what.stopping.set()
        raise FusecrError("c1", "is Running, not stopped")

    monkeypatch.setattr(under_test, "TICK", 0.02)
    monkeypatch.setattr(what, "_clean", clean_one)
    what.tidy()
    pauses = [b - a for a, b in itertools.pairwise(tries)]
    assert [pause >= least for pause, least in zip(pauses, (0.02, 0.04, 0.08), strict=True)] == [True] * 3


def test_a_target_waits_while_its_source_is_dumped(tmp_path: Path, expect_log: Any) -> None:
    expect_log("migration aborted: no sign")
    all_of = bindings(Incus(OLD))
    what = upkeep(all_of, tmp_path)
    bind(all_of, OLD, "c1", role="target")
    what.gate.expect(Expected(OLD, "default", "c1", IDLE_SECONDS + 100))
    age(all_of, OLD)
    clean(what)
    assert all_of.get(OLD) is not None
    expected = what.gate.get(OLD)
    assert expected is not None and expected.phase == "expecting"
    expected.go_seconds = 1.0
    with pytest.raises(FusecrError, match="not stopped"):
        clean(what)
    assert expected.phase == "aborted"


def test_a_source_in_doubt_finds_a_remote_that_is_added_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Any
) -> None:
    """... and neither a configuration that is being written nor anything else ends its asking."""
    expect_log("config.yml")
    expect_log("c1: the agent failed at it")
    expect_log("the target runs")
    what = upkeep(bindings(), tmp_path)
    hold = FakeHold("c1", 1, "going")
    answers: list[Any] = [FusecrError("config.yml", "is no YAML"), "", RecursionError(), "h2"]
    asked: list[str] = []

    def load() -> Any:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def ask_target(config: Any, _target: Any, _migration: str) -> str:
        asked.append(config)
        return "running" if config == "h2" else ""

    monkeypatch.setattr(under_test, "ASK_AGAIN_SECONDS", 0.001)
    monkeypatch.setattr(under_test, "ask_target", ask_target)
    what._load = load
    what.resolve(hold)  # type: ignore[arg-type]
    assert asked == ["", "h2"] and hold.phase == "committed"


# The end of the agent


def test_a_stopped_agent_lets_every_source_go_on_that_may(tmp_path: Path, expect_log: Any) -> None:
    expect_log("held: the agent is being stopped")
    holds = Holds(Journal(str(tmp_path / "j")), {})
    held, going = FakeHold("held", 1), FakeHold("going", 2, "going")
    registered(holds, held, going)
    assert holds.close(10)
    assert (held.phase, going.phase) == ("aborted", "going")
    assert (held.told, going.told) == (["aborted"], [])
    assert holds.ended("held") == ("aborted", {})
    with pytest.raises(FusecrError, match="is being stopped"), holds.starting("m2", "c2"):
        pass


def test_a_stopped_agent_waits_for_a_dump_that_is_being_made(tmp_path: Path, expect_log: Any) -> None:
    expect_log("late: the agent is being stopped")
    holds = Holds(Journal(str(tmp_path / "j")), {})
    inside, late = threading.Event(), FakeHold("late", 1)

    def make() -> None:
        with holds.starting("late", "late"):
            inside.set()
            assert holds.stopping.wait(10)
            registered(holds, late)  # it was over before it could notice

    making = threading.Thread(target=make)
    making.start()
    assert inside.wait(10)
    assert holds.close(10)
    making.join(10)
    assert late.phase == "aborted" and not holds.is_starting("late")


def test_a_stopped_agent_does_not_wait_for_ever(tmp_path: Path, expect_log: Any) -> None:
    expect_log("stuck: the agent is being stopped")
    expect_log("stuck: the agent failed at it")
    expect_log("the next agent ends them")
    holds = Holds(Journal(str(tmp_path / "j")), {})
    registered(holds, FakeHold("stuck", 1, raises=True))
    assert not holds.close(0.2)


def test_what_has_left_something_to_do_is_not_forgotten(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "j"))
    holds = Holds(journal, {})
    hold = FakeHold("0a", 1)
    registered(holds, hold)
    assert holds.has("0a") and not holds.has("0b")
    hold.commit()
    assert holds.of("0a") is None and holds.has("0a")
    journal.remove(COMMITTED, "0a")
    assert not holds.has("0a")


# The target's side


def test_an_instance_is_expected_once(tmp_path: Path, expect_log: Any) -> None:
    expect_log("migration aborted: migration 0b takes its place")
    zygote: Any = None
    gate = MigrationGate(zygote, Journal(str(tmp_path / "j")), lambda _expected: None)
    for number, (migration, instance) in enumerate((("0a", "c1"), ("0c", "c2"), ("0b", "c1"), ("0b", "c1"))):
        assert gate.expect(Expected(migration, "default", instance, 30.0)).migration == migration, number
    phases = {m: gate.get(m) for m in ("0a", "0b", "0c")}
    assert {m: e.phase for m, e in phases.items() if e} == {"0a": "aborted", "0b": "expecting", "0c": "expecting"}


# A second life


@pytest.mark.parametrize("keep", [False, True])
def test_a_committed_source_that_incus_has_started_again_is_stopped(tmp_path: Path, expect_log: Any, keep: bool) -> None:
    """The incusd that should have noted its end was killed, and the next one starts what ran before."""
    expect_log("Incus has started it again")
    incus = Incus(OLD)
    all_of = bindings(incus)
    bind(all_of, OLD, "c1")
    what = upkeep(all_of, tmp_path)
    what.journal.write(COMMITTED, OLD, {"migration": OLD, "keep_source": keep})
    incus.pid = os.getpid()
    what._forget_committed(OLD)
    assert incus.states == [("stop", True)] and what.journal.read(COMMITTED, OLD) is not None
    what._forget_committed(OLD)
    assert incus.states == [("stop", True)]


@pytest.mark.parametrize("case", ["its end is being noted", "another migration's", "no longer bound", "stopped"])
def test_what_is_no_second_life_is_left_alone(tmp_path: Path, case: str) -> None:
    bound = {"another migration's": NEW, "no longer bound": ""}.get(case, OLD)
    incus = Incus(bound, status="Stopped" if case == "stopped" else "Running")
    all_of = bindings(incus)
    bind(all_of, OLD, "c1")
    what = upkeep(all_of, tmp_path)
    what.journal.write(COMMITTED, OLD, {"migration": OLD, "keep_source": False})
    incus.pid = 0 if case == "its end is being noted" else os.getpid()
    what._forget_committed(OLD)
    assert incus.states == []
