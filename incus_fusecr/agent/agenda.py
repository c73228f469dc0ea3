# SPDX-License-Identifier: Apache-2.0
"""What is to be read, and when: each object once, however often it changes, so that nobody can fill a queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Agenda(Generic[K]):
    """Objects and the times at which they are due."""

    def __init__(self) -> None:
        self._due: dict[K, list[float]] = {}
        self._news = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._due)

    def put(self, key: K, pauses: Sequence[float] = (0.0,)) -> None:
        """Due after each of ``pauses`` (ascending). What was planned later than these is not needed any more; what is due
        already stays, or a restless object would never be read."""
        now = time.monotonic()
        with self._news:
            old = self._due.get(key, [])[:1]
            self._due[key] = sorted({*old, *(now + pause for pause in pauses)})
            self._news.notify()

    def get(self) -> K | None:
        """Wait for the next one, that which is due first; None after :meth:`close`."""
        with self._news:
            while not self._closed:
                key = min(self._due, key=lambda k: self._due[k][0], default=None)
                if key is None:
                    self._news.wait()
                    continue
                left = self._due[key][0] - time.monotonic()
                if left > 0:
                    self._news.wait(left)
                    continue
                # Once for all times that have passed meanwhile.
                later = [t for t in self._due[key] if t > time.monotonic()]
                if later:
                    self._due[key] = later
                else:
                    del self._due[key]
                return key
        return None

    def close(self) -> None:
        with self._news:
            self._closed = True
            self._news.notify_all()
