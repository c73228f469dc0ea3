# SPDX-License-Identifier: Apache-2.0
"""A point in monotonic time that every wait of one job shares."""

from __future__ import annotations

import time


class Deadline:
    """``seconds`` from now. Pass one object down, so that nested waits end together."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that remain, never negative."""
        return max(0.0, self._end - time.monotonic())

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self._end

    def within(self, seconds: float) -> Deadline:
        """The earlier of this deadline and ``seconds`` from now."""
        return Deadline(min(self.left, seconds))

    @classmethod
    def of(cls, value: Deadline | float) -> Deadline:
        """A number of seconds becomes a deadline; a deadline stays what it is."""
        return value if isinstance(value, Deadline) else cls(value)
