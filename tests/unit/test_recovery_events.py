# SPDX-License-Identifier: Apache-2.0
"""The log of events: bounds, numbers that survive, subscribers, a reader beside a writer."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from incus_fusecr.recovery import events
from incus_fusecr.recovery.events import Event, EventLog, read

Make = Callable[..., EventLog]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run" / "events.jsonl")


@pytest.fixture
def make(path: str) -> Iterator[Make]:
    made: list[EventLog] = []

    def open_log(max_bytes: int = events.MAX_BYTES) -> EventLog:
        made.append(EventLog(path, max_bytes, clock=lambda: 12.5))
        return made[-1]

    yield open_log
    for one in made:
        one.close()


def test_an_event_is_in_the_file_and_in_the_journal(make: Make, path: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        event = make().add("swapped", "lxcfs", 63, mounts=34, seconds=0.02)
    assert event == Event(1, 12.5, "swapped", "lxcfs", 63, {"mounts": 34, "seconds": 0.02})
    assert list(read(path)) == [event]
    assert caplog.messages == ["lxcfs connection 63: swapped mounts=34 seconds=0.02"]
    assert os.stat(path).st_mode & 0o777 == 0o640


def test_numbers_go_on_in_the_next_life(make: Make, path: str) -> None:
    make().add("a")
    make().add("b")
    log = make()
    log.add("c")
    assert [(e.number, e.what) for e in log.since()] == [(1, "a"), (2, "b"), (3, "c")]
    assert [e.what for e in log.since(2)] == ["c"] and log.since(3) == []


def test_a_line_that_a_death_cut_off_costs_only_itself(make: Make, path: str) -> None:
    make().add("a")
    with open(path, "ab") as file:
        file.write(b'{"number":2,"what":"ha')
    make().add("b")
    assert [e.what for e in read(path)] == ["a", "b"]


def test_the_files_stay_below_the_bound_and_the_end_is_there(make: Make, path: str) -> None:
    log = make(20000)
    for number in range(1000):
        log.add("x", data=number)
        assert sum(os.stat(f).st_size for f in (path, path + ".1") if os.path.exists(f)) <= 20000
    numbers = [e.number for e in log.since()]
    assert numbers == list(range(numbers[0], 1001)) and len(numbers) > 60
    with open(path + ".1") as older:
        assert Event.from_json(older.readline()).number == numbers[0]
    assert make(20000).add("y").number == 1001


def test_data_that_is_too_long_is_left_out_and_said_so(make: Make, path: str) -> None:
    make().add("x", "lxcfs", 5, text="y" * 20000)
    (event,) = read(path)
    assert event.what == "x" and event.connection == 5 and event.data["left_out"] > 20000
    assert os.stat(path).st_size < events.MAX_LINE


def test_lines_that_are_none_are_passed_over(make: Make, path: str) -> None:
    log = make()
    log.add("a")
    with open(path, "ab") as file:
        file.write(b'\xff\xfe\n[]\n{}\n"x"\n{"number":"x"}\n')
    log.add("b")
    assert [e.what for e in read(path)] == ["a", "b"]


def test_a_subscriber_gets_what_was_and_what_comes_without_a_gap(make: Make) -> None:
    log = make()
    for what in "abc":
        log.add(what)
    with log.subscribe(since=1) as past, log.subscribe() as now:
        log.add("d")
        assert [past.get(5).what for _ in range(3)] == ["b", "c", "d"]  # type: ignore[union-attr]
        assert now.get(5).what == "d"  # type: ignore[union-attr]
        with pytest.raises(TimeoutError):
            now.get(0.01)
    assert past.get(5) is None
    log.add("e")
    assert log._subscribers == []


def test_one_that_does_not_read_is_thrown_out_and_holds_nobody_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_WAITING", 5)
    log = make()
    slow, fast = log.subscribe(), log.subscribe()
    for number in range(20):
        log.add("x")
        assert fast.get(5).number == number + 1  # type: ignore[union-attr]
    assert [e.number for e in slow] == [1, 2, 3, 4, 5] and slow.overrun and not fast.overrun
    assert log._subscribers == [fast]


def test_closing_the_log_ends_the_subscriptions(make: Make) -> None:
    log = make()
    subscription = log.subscribe()
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.extend(e.what for e in subscription))
    thread.start()
    log.add("a")
    log.close()
    thread.join(10)
    assert not thread.is_alive() and seen == ["a"]


def test_a_reader_beside_a_writer_misses_nothing(make: Make, path: str) -> None:
    """Rotations happen all the time here; what is read is always one piece up to the newest."""
    log = make(60000)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            log.add("x")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        last = rounds = 0
        end = time.monotonic() + 60
        while rounds < 200 or last <= 1000:
            assert time.monotonic() < end, f"the writer has got to {last}"
            rounds += 1
            numbers = [e.number for e in read(path)]
            if numbers:
                assert numbers == list(range(numbers[0], numbers[-1] + 1)) and numbers[-1] >= last
                last = numbers[-1]
    finally:
        stop.set()
        thread.join(10)


def test_a_full_disk_is_a_warning_and_over_when_there_is_room(
    make: Make, path: str, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    log = make()
    subscription = log.subscribe()
    write = os.write

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    expect_log("events.jsonl: No space left")
    log.add("a")
    monkeypatch.setattr(os, "write", write)
    log.add("b")
    assert [e.what for e in read(path)] == ["b"]
    assert [subscription.get(5).what for _ in range(2)] == ["a", "b"]  # type: ignore[union-attr]


def test_parallel_writers_get_numbers_of_their_own(make: Make, path: str) -> None:
    log = make()
    threads = [threading.Thread(target=lambda: [log.add("x") for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [e.number for e in read(path)] == list(range(1, 201))
