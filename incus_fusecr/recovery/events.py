# SPDX-License-Identifier: Apache-2.0
"""What happened: a bounded log in ``/run/incus-fusecr/events.jsonl``, subscribers, and the journal.

One JSON object a line. At half of the bound the file becomes ``events.jsonl.1``, in place of the one before, so the two
together stay below the bound and a reader has at least half of it. Numbers grow by one from the first event of a boot on:
a reader that was told N asks for what came after N, and sees by a gap what it has missed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, BinaryIO

log = logging.getLogger(__name__)

PATH = "/run/incus-fusecr/events.jsonl"
ATTEMPTS = 10
MAX_BYTES = 4 << 20  # both files together
MAX_LINE = 8192
MAX_WAITING = 1024  # events that a subscriber may leave unread


@dataclass(frozen=True)
class Event:
    """``daemon``: its name in the configuration, "" if it is about none; ``connection``: of the kernel, 0 for none.

    :ivar time: seconds since the epoch
    """

    number: int
    time: float
    what: str
    daemon: str = ""
    connection: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line, at most :data:`MAX_LINE` bytes: data that is too long is left out, and said so."""
        text = json.dumps(asdict(self), separators=(",", ":"), default=str)
        if len(text) < MAX_LINE:
            return text
        return json.dumps({**asdict(self), "data": {"left_out": len(text)}}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Event:
        """
        :raises ValueError: it is none
        """
        raw = json.loads(text)
        try:
            return cls(
                int(raw["number"]), float(raw["time"]), str(raw["what"]), str(raw["daemon"]), int(raw["connection"]),
                dict(raw["data"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no event: {error}") from None

    def __str__(self) -> str:
        where = " ".join(filter(None, (self.daemon, f"connection {self.connection}" if self.connection else "")))
        data = " ".join(f"{key}={value}" for key, value in self.data.items())
        return ": ".join(filter(None, (where, " ".join(filter(None, (self.what, data))))))


class Subscription:
    """Iterate over it until it is closed; one that reads too slowly is closed, and has to read the file again.

    :ivar overrun: it was closed for that
    """

    def __init__(self, forget: Callable[[Subscription], None]) -> None:
        self._queue: queue.Queue[Event | None] = queue.Queue(MAX_WAITING + 1)  # one place is the end's
        self._past: deque[Event] = deque()
        self._forget = forget
        self.overrun = False

    def _give(self, event: Event | None) -> bool:
        if event is not None and self._queue.qsize() >= MAX_WAITING:
            self.overrun = True
            event = None
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            pass
        return event is not None

    def get(self, seconds: float | None = None) -> Event | None:
        """The next event; None when it is closed.

        :raises TimeoutError: none came within the seconds
        """
        if self._past:
            return self._past.popleft()
        try:
            return self._queue.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError("no event") from None

    def __iter__(self) -> Iterator[Event]:
        while (event := self.get()) is not None:
            yield event

    def close(self) -> None:
        self._forget(self)
        self._give(None)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class EventLog:
    """Written by one process; threads may share it.

    :param clock: seconds since the epoch
    """

    def __init__(self, path: str = PATH, max_bytes: int = MAX_BYTES, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._subscribers: list[Subscription] = []
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._fd = self._open()
        self._number = max((event.number for event in read(path)), default=0)

    def add(self, what: str, daemon: str = "", connection: int = 0, *, level: int = logging.INFO, **data: Any) -> Event:
        """One event: into the file, to the subscribers, into the journal with the given level. Never fails: a full file
        system costs the line in the file and nothing else."""
        with self._lock:
            self._number += 1
            event = Event(self._number, self._clock(), what, daemon, connection, data)
            try:
                self._write(event.to_json().encode() + b"\n")
            except OSError as error:
                log.warning("%s: %s", self.path, error.strerror)
            self._subscribers = [s for s in self._subscribers if s._give(event)]
        log.log(level, "%s", event, extra={"event": event})
        return event

    def since(self, number: int = 0) -> list[Event]:
        """What the files have of the events after that number."""
        return [event for event in read(self.path) if event.number > number]

    def subscribe(self, since: int | None = None) -> Subscription:
        """What happens from now on; with a number also what came after it, without a gap between the two."""
        with self._lock:
            subscription = Subscription(self._unsubscribe)
            if since is not None:
                subscription._past.extend(self.since(since))
            self._subscribers.append(subscription)
            return subscription

    def close(self) -> None:
        """Ends the subscriptions, too."""
        with self._lock:
            for subscription in self._subscribers:
                subscription._give(None)
            self._subscribers = []
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    def _unsubscribe(self, subscription: Subscription) -> None:
        with self._lock:
            if subscription in self._subscribers:
                self._subscribers.remove(subscription)

    def _open(self) -> int:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":  # a death in the middle of a line
            os.write(fd, b"\n")
        return fd

    def _write(self, line: bytes) -> None:
        if self._fd >= 0 and os.fstat(self._fd).st_size + len(line) > self._max_bytes // 2:
            os.rename(self.path, self.path + ".1")
            os.close(self._fd)
            self._fd = -1
        if self._fd < 0:
            self._fd = self._open()
        os.write(self._fd, line)


def read(path: str = PATH) -> Iterator[Event]:
    """All events of the files, the oldest first; lines that are none are passed over. For any process."""
    seen = 0
    for line in _lines(path):
        try:
            event = Event.from_json(line)
        except ValueError:
            continue
        if event.number > seen:
            seen = event.number
            yield event


def _lines(path: str) -> Iterator[bytes]:
    """The files may be rotated between any two steps; in this order nothing is missed, but some may come twice."""
    for attempt in range(ATTEMPTS):
        with contextlib.ExitStack() as stack:
            now, before, later = (_opened(stack, name) for name in (path, path + ".1", path))
            # Rotated twice between two openings, a file in the middle is missing.
            whole = now is None or later is None or _same(now, later) or _is_now(now, path + ".1")
            if whole or attempt == ATTEMPTS - 1:
                for file in filter(None, (before, now, later)):
                    yield from file
                return


def _opened(stack: contextlib.ExitStack, name: str) -> BinaryIO | None:
    try:
        return stack.enter_context(open(name, "rb"))
    except FileNotFoundError:
        return None


def _same(one: BinaryIO, other: BinaryIO) -> bool:
    return os.path.sameopenfile(one.fileno(), other.fileno())


def _is_now(file: BinaryIO, name: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(name))
    except FileNotFoundError:
        return False
