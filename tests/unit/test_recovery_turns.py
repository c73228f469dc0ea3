# SPDX-License-Identifier: Apache-2.0
"""Whom the supervisor settles in a turn: all at first and when the host's mounts change, else whom something happened to."""

from __future__ import annotations

import time
from typing import Any

import pytest

from incus_fusecr.errors import FusecrError
from incus_fusecr.recovery.supervisor import Supervisor


class Unit:
    def __init__(self, key: str) -> None:
        self.key, self.due, self.settled = key, None, 0
        self.error: Exception | None = None

    def settle(self) -> None:
        self.due, self.settled = None, self.settled + 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def made() -> Any:
    """Without /proc of a host; what :meth:`_wait` would have found is set by the tests."""
    supervisor: Any = object.__new__(Supervisor)
    supervisor.units = {key: Unit(key) for key in "abc"}
    supervisor._look_for_units = supervisor._stopping = False
    supervisor._all, supervisor._stirred, supervisor._not_before = True, set(), {}
    supervisor._wait = lambda: None
    return supervisor


def turn(made: Any) -> str:
    """Who is settled."""
    before = {unit.key: unit.settled for unit in made.units.values()}
    made._turn()
    return "".join(unit.key for unit in made.units.values() if unit.settled > before[unit.key])


def test_all_at_first_and_then_nobody(made: Any) -> None:
    assert turn(made) == "abc"
    assert turn(made) == ""


def test_whom_something_happened_to(made: Any) -> None:
    turn(made)
    made._stirred = {"b"}
    assert turn(made) == "b"
    assert turn(made) == ""


def test_who_is_due(made: Any) -> None:
    turn(made)
    made.units["a"].due = time.monotonic() + 60
    made.units["c"].due = time.monotonic() - 1
    assert turn(made) == "c"


def test_who_failed_is_tried_again(made: Any, expect_log: Any) -> None:
    expect_log("not now")
    made.units["b"].error = FusecrError("b", "not now")
    assert turn(made) == "abc"
    made._stirred = {"b"}
    assert turn(made) == "", "not before its pause is over"
    made._not_before["b"] = time.monotonic() - 0.001
    made.units["b"].error = None
    assert turn(made) == "b"
    assert turn(made) == ""
