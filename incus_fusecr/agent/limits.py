# SPDX-License-Identifier: Apache-2.0
"""How much is done at once for those who may ask for it as often as they like."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import Refused


class Limits:
    """Slots: ``each`` for one who asks, ``total`` for all."""

    def __init__(self, each: int, total: int) -> None:
        self._each, self._total = each, total
        self._taken: Counter[str] = Counter()
        self._news = threading.Condition()

    @contextmanager
    def slot(self, who: str, what: str, seconds: float) -> Iterator[None]:
        """Wait for a slot and keep it.

        :param who: for whom
        :param what: for the message
        :raises Refused: there was none in time
        """
        end = time.monotonic() + seconds
        with self._news:
            while self._taken[who] >= self._each or self._taken.total() >= self._total:
                if not self._news.wait(max(0.0, end - time.monotonic())) and time.monotonic() >= end:
                    raise Refused(what, "the agent has too many of these to do", "try again in a while")
            self._taken[who] += 1
        try:
            yield
        finally:
            with self._news:
                self._taken[who] -= 1
                self._taken += Counter()  # drops those that are at zero
                self._news.notify_all()
