# SPDX-License-Identifier: Apache-2.0
"""Restart limits, backoff and circuit breaker, on a clock of the test's."""

from __future__ import annotations

import random

from incus_fusecr.recovery.config import Limits
from incus_fusecr.recovery.policy import Attempts, Restarts, Verdict

LIMITS = Limits(burst=3, interval=10, backoff=1, backoff_max=6, breaker=5, cooldown=100)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(limits: Limits = LIMITS) -> tuple[Restarts, Clock]:
    clock = Clock()
    return Restarts(limits, clock), clock


def test_a_burst_is_let_through_and_then_the_oldest_has_to_be_past() -> None:
    restarts, clock = make()
    for _ in range(3):
        assert restarts.ask().allowed
        restarts.started()
        restarts.served()
        clock.now += 1
    assert restarts.ask() == Verdict(7, "limit")
    clock.now += 6.5
    assert restarts.ask() == Verdict(0.5, "limit")
    clock.now += 0.5
    assert restarts.ask().allowed
    restarts.started()
    assert restarts.ask() == Verdict(1, "limit")


def test_the_pause_doubles_up_to_its_most_and_a_service_resets_it() -> None:
    restarts, clock = make(Limits(burst=1000, interval=1, backoff=1, backoff_max=6, breaker=100, cooldown=1))
    seen = []
    for _ in range(5):
        restarts.started()
        restarts.failed()
        verdict = restarts.ask()
        assert verdict.reason == "backoff"
        seen.append(verdict.seconds)
        clock.now += verdict.seconds
        assert restarts.ask().allowed
    assert seen == [1, 2, 4, 6, 6]
    restarts.served()
    restarts.failed()
    assert restarts.ask() == Verdict(1, "backoff")


def test_a_pause_is_over_with_a_service_in_the_middle_of_it() -> None:
    restarts, _ = make()
    restarts.failed()
    restarts.served()
    assert restarts.ask().allowed


def test_the_breaker_opens_lets_one_try_through_and_opens_again() -> None:
    restarts, clock = make()
    for number in range(5):
        assert not restarts.open, number
        clock.now += 50
        restarts.started()
        restarts.failed()
    assert restarts.open and restarts.ask() == Verdict(100, "breaker")
    clock.now += 100
    assert restarts.ask().allowed
    restarts.started()
    restarts.failed()
    assert restarts.ask() == Verdict(100, "breaker")
    clock.now += 100
    restarts.started()
    restarts.served()
    assert not restarts.open and restarts.ask().allowed


def test_the_longest_wait_counts() -> None:
    restarts, clock = make()
    for _ in range(3):
        restarts.started()
    restarts.failed()
    assert restarts.ask() == Verdict(10, "limit")
    clock.now += 10
    assert restarts.ask().allowed


def test_no_pause_without_a_backoff_and_no_overflow_after_thousands() -> None:
    restarts, _ = make(Limits(burst=3, interval=1, backoff=0, backoff_max=0, breaker=1000, cooldown=1))
    restarts.failed()
    assert restarts.ask().allowed
    restarts, _ = make(Limits(burst=3, interval=1, backoff=1, backoff_max=6, breaker=100000, cooldown=1))
    for _ in range(5000):
        restarts.failed()
    assert restarts.ask() == Verdict(6, "backoff")


def test_asking_changes_nothing_and_no_interval_has_more_than_the_burst() -> None:
    random.seed(5)
    restarts, clock = make()
    starts: list[float] = []
    for _ in range(2000):
        clock.now += random.random()
        first = restarts.ask()
        assert restarts.ask() == first
        if first.allowed:
            restarts.started()
            starts.append(clock.now)
            (restarts.failed if random.random() < 0.3 else restarts.served)()
    assert all(starts[n + 3] - starts[n] >= 10 - 1e-9 for n in range(len(starts) - 3)) and len(starts) > 100


def test_the_third_death_of_one_request_is_its_last() -> None:
    attempts = Attempts(3)
    assert [attempts.died(7) for _ in range(3)] == [False, False, True]
    assert [attempts.died(8), attempts.died(9), attempts.died(8)] == [False, False, False]
    attempts.answered(8)
    assert [attempts.died(8) for _ in range(3)] == [False, False, True]
    assert Attempts(1).died(1)


def test_what_is_remembered_of_requests_has_a_bound() -> None:
    attempts = Attempts(2, most=10)
    for number in range(1000):
        assert not attempts.died(number)
    assert len(attempts._deaths) == 10 and attempts.died(999) and not attempts.died(0)
