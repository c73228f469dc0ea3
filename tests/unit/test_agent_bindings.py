# SPDX-License-Identifier: Apache-2.0
"""Whose migrations and questions an agent remembers, and what it takes away of them."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from bound import Incus, bind, bindings

from incus_fusecr.agent import leftmount
from incus_fusecr.agent.bindings import ASKED, MAX_PER_INSTANCE, MAX_PER_PROJECT, Binding
from incus_fusecr.errors import FusecrError
from incus_fusecr.incus.ask import REQUEST_KEY

OLD = "a" * 32


def test_who_writes_thousands_of_ids_displaces_only_his_own() -> None:
    dropped: list[str] = []
    all_of = bindings(dropped=dropped)
    bind(all_of, "a1", "victim")
    for number in range(3000):
        bind(all_of, f"b{number}", "attacker")
    assert all_of.instance_of("a1") == ("default", "victim")
    # His last one is bound, for that is what a real client would have written; and not many are kept.
    assert all_of.instance_of("b2999") == ("default", "attacker")
    assert len([b for b in all_of.idle(-1) if b.instance == "attacker"]) == MAX_PER_INSTANCE
    assert dropped == [f"b{n}" for n in range(3000 - MAX_PER_INSTANCE)]


def test_who_may_make_instances_in_a_project_displaces_none_of_another() -> None:
    all_of = bindings()
    bind(all_of, "a1", "victim", "p1")
    for number in range(MAX_PER_PROJECT + 50):
        bind(all_of, f"b{number}", f"i{number}", "p2")
    assert all_of.get("a1") is not None
    assert len(all_of.idle(-1)) == MAX_PER_PROJECT + 1


def test_what_is_under_way_is_not_displaced_and_the_next_migration_is_bound_beside_it() -> None:
    all_of = bindings(live={"a1"})
    bind(all_of, "a1", "c1")
    for number in range(50):
        bind(all_of, f"b{number}", "c1")
    assert all_of.get("a1") is not None and all_of.get("b49") is not None


def test_what_an_incusd_that_died_left_mounted_is_in_nobodys_way(
    monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("removed what was left")
    incus = Incus("a1", status="Stopped")
    incus.mounted = True
    asked: list[str] = []

    def take_away(name: str) -> bool:
        asked.append(name)
        incus.mounted = False
        return True

    monkeypatch.setattr(leftmount, "take_away", take_away)
    monkeypatch.setattr(leftmount, "there", lambda _name: incus.mounted)
    all_of = bindings(incus)
    bound = bind(all_of, "a1", "c1", "p1", role="target")
    incus.running = [{"description": "Creating instance", "status": "Running", "resources": {"instances": ["/1.0/instances/c1"]}}]
    all_of.free(bound)
    with pytest.raises(FusecrError, match="busy"):
        all_of.clean(bound, delete=True)
    assert not asked and incus.there, "somebody works there"
    incus.running = []
    all_of.clean(bound, delete=True)
    assert asked == ["p1_c1"] and not incus.there


def test_the_keys_of_a_question_go_when_nobody_waits_for_the_answer() -> None:
    incus = Incus("q1")
    incus.config["user.fusecr.report"] = "{}"
    all_of = bindings(incus)
    migration = bind(all_of, "a1", "c1")
    for number in range(50):
        bind(all_of, f"p{number}", "c1", role=ASKED)
    asked = bind(all_of, "q1", "c1", role=ASKED)
    assert [b.migration for b in all_of.idle(-1)] == ["a1", "q1"], "of questions the last one counts, and displaces no migration"
    bound = all_of.get(migration.migration)
    assert bound is not None and not all_of.contended(bound, 100)
    all_of.take_question(asked)
    assert not incus.config and incus.there and all_of.get("q1") is None and all_of.get("a1") is not None
    incus.config[REQUEST_KEY] = json.dumps({"id": "other"})
    all_of.take_question(bind(all_of, "q2", "c1", role=ASKED))
    assert incus.config, "somebody else's"


def test_an_id_stays_with_the_instance_that_had_it_first() -> None:
    all_of = bindings()
    bind(all_of, "a1", "c1")
    bind(all_of, "a1", "thief")
    assert all_of.instance_of("a1") == ("default", "c1")


def test_only_a_newer_request_is_a_sign_of_life() -> None:
    """The lease is the client's beat: the key is read again for whatever changes in the instance."""
    all_of = bindings()
    bind(all_of, "a1", "c1")
    place, found = ("default", "c1"), all_of.get("a1")
    assert found is not None

    def renewed(place: tuple[str, str], mark: tuple[int, int]) -> bool:
        found.touched = 0.0
        all_of.beat("a1", place, mark)
        return found.touched > 0.0

    assert not renewed(place, (0, 0))  # the key that binds
    assert renewed(place, (1, 5))
    assert not renewed(place, (1, 5)) and not renewed(place, (1, 4)) and not renewed(place, (0, 9))
    assert renewed(place, (1, 6)) and renewed(place, (2, 1))
    assert not renewed(("default", "thief"), (9, 9)) and not renewed(("p2", "c1"), (9, 9))


def test_a_new_instance_of_the_same_name_is_not_deleted_for_the_old_one() -> None:
    incus = Incus(OLD, status="Stopped")
    incus.config["volatile.uuid"] = "new"
    all_of = bindings(incus)
    all_of.bind(Binding(OLD, "source", "default", "c1", uuid="old"))
    found = all_of.get(OLD)
    assert found is not None
    all_of.clean(found, delete=True)
    assert incus.there
