# SPDX-License-Identifier: Apache-2.0
"""What the agent makes of a guard's events."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from incus_fusecr.guard.client import Event
from incus_fusecr.linux.fd import Fd
from incus_fusecr.recovery.events import EventLog
from incus_fusecr.recovery.guards import Guards
from incus_fusecr.recovery.link import Guard, Link, Process
from incus_fusecr.recovery.recipe import MOUNT_WORD, Recipe


class PaperFollower:
    def __init__(self, *names: str) -> None:
        self.names = list(names)

    def next(self, seconds: float) -> Event | None:
        return Event(self.names.pop(0), 1) if self.names else None

    def close(self) -> None:
        pass


@pytest.fixture
def events(tmp_path: Path) -> Iterator[EventLog]:
    log = EventLog(str(tmp_path / "events.jsonl"))
    yield log
    log.close()


def heard(events: EventLog, *names: str) -> Link:
    follower: Any = PaperFollower(*names)
    recipe = Recipe("/usr/bin/lxcfs", ("lxcfs", MOUNT_WORD))
    device = Fd(os.open("/dev/null", os.O_RDONLY))
    link = Link(7, "lxcfs", Process(0, 0), recipe, False, [device], guard=Guard(Process(1, 1), "", follower=follower), unheld=False)
    nobody: Any = None
    Guards(nobody, events).heard(link)
    link.close()
    return link


def test_clones_are_to_be_held(events: EventLog) -> None:
    assert not heard(events, "standby", "sidecar-ready").unheld
    assert heard(events, "standby", "clones").unheld
    assert [event.what for event in events.since()] == []


def test_what_is_bad_is_an_event(events: EventLog, expect_log: Callable[[str], None]) -> None:
    expect_log("guard-sidecar-silent")
    heard(events, "sidecar-silent", "sidecar-ready", "serving")
    assert [event.what for event in events.since()] == ["guard-sidecar-silent", "guard-serving"]
