# SPDX-License-Identifier: Apache-2.0
"""A report that another write undid is written again, and no other one.

Incus reads an object and writes it in two transactions: a beat of the client that read before a report was written, and writes
after it, takes the report away. The client waits for it then until it gives up, with the container frozen.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from incus_fusecr.agent.requests import Request, Requests
from incus_fusecr.incus.ask import REPORT_KEY, REQUEST_KEY, parse_report
from incus_fusecr.incus.failures import NotFound

ID = "0b"
PROFILE = f"fusecr-{ID}"


class Incus:
    """The local server, with the profile of one conversation."""

    def __init__(self) -> None:
        self.config: dict[str, str] = {}
        self.written = 0
        self.slow = threading.Event()
        self.slow.set()

    def __enter__(self) -> Incus:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get(self, path: str, _params: object = None) -> Any:
        if path.startswith("projects/"):
            return {"config": {}}
        if path != f"profiles/{PROFILE}":
            raise NotFound(path, "not found", code=404)
        return {"name": PROFILE, "config": dict(self.config)}

    def patch(self, _path: str, body: dict[str, Any]) -> None:
        assert self.slow.wait(10)
        self.written += 1
        self.config.update(body["config"])

    @property
    def report(self) -> tuple[int, str] | None:
        found = parse_report(self.config.get(REPORT_KEY, ""))
        return (found.seq, found.phase) if found else None


@pytest.fixture
def incus() -> Incus:
    return Incus()


@pytest.fixture
def requests(incus: Incus, monkeypatch: pytest.MonkeyPatch) -> Requests:
    config: Any = None

    def handle(request: Request) -> tuple[str, Any]:
        return request.op, {}

    made = Requests(config, handle, lambda _request: None, lambda _op, _args: None, {ID: ("default", "c1")}.get)
    monkeypatch.setattr(made, "server", lambda _project="default": incus)
    return made


@pytest.fixture
def ask(incus: Incus, requests: Requests) -> Iterator[Callable[..., None]]:
    """``ask("going", 2)``: the client writes a request, and the agent reads the profile."""

    def make(op: str, seq: int, beat: int = 0, keep: bool = True) -> None:
        text = json.dumps({"v": 1, "id": ID, "seq": seq, "op": op, "beat": beat})
        incus.config = {**(incus.config if keep else {}), REQUEST_KEY: text}
        requests._read_profile(requests.server(), "default", PROFILE)  # type: ignore[arg-type]

    yield make
    incus.slow.set()
    for thread in threading.enumerate():
        if thread.name.startswith(("again-", "hold-", "going-", "status-")):
            thread.join(10)


def wait_for(holds: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_beat_that_undoes_a_report(ask: Callable[..., None], incus: Incus) -> None:
    ask("going", 2)
    wait_for(lambda: incus.report == (2, "going"))
    ask("going", 2, beat=1, keep=False)
    wait_for(lambda: incus.report == (2, "going"))
    assert incus.written == 2


def test_a_report_that_is_there_is_not_written_again(ask: Callable[..., None], incus: Incus) -> None:
    ask("going", 2)
    wait_for(lambda: incus.report == (2, "going"))
    for beat in range(5):
        ask("going", 2, beat)
    time.sleep(0.1)
    assert incus.written == 1


def test_an_older_report_in_its_place(ask: Callable[..., None], incus: Incus) -> None:
    ask("hold", 1)
    wait_for(lambda: incus.report == (1, "hold"))
    old = dict(incus.config)
    ask("going", 2)
    wait_for(lambda: incus.report == (2, "going"))
    incus.config[REPORT_KEY] = old[REPORT_KEY]
    ask("going", 2, beat=1)
    wait_for(lambda: incus.report == (2, "going"))


def test_one_that_is_being_written_is_not_written_twice(ask: Callable[..., None], incus: Incus) -> None:
    incus.slow.clear()
    ask("going", 2)
    wait_for(lambda: any(thread.name == "going-c1" for thread in threading.enumerate()))
    for beat in range(5):
        ask("going", 2, beat)
    incus.slow.set()
    wait_for(lambda: incus.report == (2, "going"))
    time.sleep(0.1)
    assert incus.written == 1


def test_what_is_gone_is_forgotten(ask: Callable[..., None], incus: Incus, requests: Requests) -> None:
    ask("going", 2)
    wait_for(lambda: incus.report == (2, "going"))
    server: Any = requests.server()
    requests._event(server, {
        "type": "lifecycle", "project": "default",
        "metadata": {"action": "profile-deleted", "source": f"/1.0/profiles/{PROFILE}?project=default"},
    })  # fmt: skip
    assert not requests._reports._said
