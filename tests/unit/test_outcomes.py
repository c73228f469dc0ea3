# SPDX-License-Identifier: Apache-2.0
"""What becomes of a migration that fails or is interrupted: the meaning for its user, and signals that must wait."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from incus_fusecr.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNCERTAIN, FusecrError, Refused, Uncertain
from incus_fusecr.incus.ask import AgentSilent
from incus_fusecr.incus.failures import NotDelivered, OutcomeUnknown
from incus_fusecr.interrupt import SIGNALS, Interrupts
from incus_fusecr.migration import account
from incus_fusecr.migration.model import MigrateRequest, Report

REQUEST = MigrateRequest("h1", "web", "h2", "web")


@pytest.mark.parametrize(
    "error",
    [
        AgentSilent("hold of h1:web", "no agent answers", "start it"),
        Refused("hold of web", "a lock"),
        OutcomeUnknown("copy", "the link is lost"),
        NotDelivered("go", "no connection"),
        FusecrError("dump of web", "CRIU says no"),
    ],
)
def test_a_failure_after_the_preflight_is_no_refusal(error: FusecrError) -> None:
    found = account.meaning(error, [], REQUEST)
    assert (found.exit_code, found.what, found.why) == (EXIT_FAILED, error.what, error.why)
    assert error.hint in found.hint


@pytest.mark.parametrize("error", [AgentSilent("hold of h1:web", "no agent answers"), KeyboardInterrupt()])
def test_a_source_that_was_not_seen_to_go_on_is_uncertain(error: FusecrError | KeyboardInterrupt) -> None:
    found = account.meaning(error, ["h1:web was not seen to go on: no agent answers"], REQUEST)
    assert found.exit_code == EXIT_UNCERTAIN
    assert "not seen to go on" in found.why and "incus list h1:web" in found.hint


def test_uncertain_stays_uncertain() -> None:
    error = Uncertain("migration", "nobody knows", "look")
    assert account.meaning(error, [], REQUEST) is error


def test_an_interrupted_migration_says_that_the_source_runs_on() -> None:
    found = account.meaning(KeyboardInterrupt(), [], REQUEST)
    assert (found.exit_code, found.why, found.hint) == (EXIT_INTERRUPTED, "interrupted", "the source runs on")


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_interrupt_until_they_have_to_wait(number: int) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert not interrupts.noted
        interrupts.hold()
        os.kill(os.getpid(), number)
        assert interrupts.noted
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_a_migration_in_a_thread_has_no_signals() -> None:
    found: list[bool] = []

    def run() -> None:
        with Interrupts() as interrupts:
            interrupts.hold()
            found.append(interrupts.noted)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]


def test_frozen_time_counts_a_first_copy_that_stood_still() -> None:
    report = Report("id", "h1:web", "h2:web")
    report.frozen_parts["first copy"] = 3.0
    held = {"parts": {"quiesce": 0.1, "dump": 0.2}, "frozen_since": 0.4, "handles": [{"daemon": "sshfs", "handles": 2}]}
    account.frozen(report, held, {"parts": {"restore": 0.3}}, since_held=1.0, ending=0.0)
    assert report.frozen_seconds == pytest.approx(4.4)
    assert report.frozen_parts["first copy"] == 3.0 and report.frozen_parts["dump"] == 0.2
    assert [(c.daemon, c.handles) for c in report.carried] == [("sshfs", 2)]
