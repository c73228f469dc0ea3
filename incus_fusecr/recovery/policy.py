# SPDX-License-Identifier: Apache-2.0
"""When a daemon may be started anew: a limit, a growing pause after failures, a circuit breaker. Pure but for its clock.

A *failure* is a start that came to nothing, or a daemon that ended by itself before it had served for ``Limits.interval``
seconds; the caller says which it was. Deaths of a daemon that had served well, or was killed or told to end, cost no pause,
only their place in the burst: however often lxcfs is killed, the next one is no worse.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .config import Limits

Reason = Literal["", "limit", "backoff", "breaker"]


@dataclass(frozen=True)
class Verdict:
    """``seconds``: how long to wait before asking again, 0 when a start may be made; ``reason`` says why."""

    seconds: float = 0.0
    reason: Reason = ""

    @property
    def allowed(self) -> bool:
        return not self.reason


class Restarts:
    """The restarts of one daemon. Not for several threads at once.

    :param clock: seconds that never go back
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._starts: deque[float] = deque(maxlen=limits.burst)
        self._not_before = 0.0
        self.failures = 0

    def ask(self) -> Verdict:
        """Whether a start may be made now; the longest of the three waits counts. Changes nothing."""
        now = self._clock()
        waits: list[tuple[float, Reason]] = []
        if len(self._starts) == self.limits.burst:
            waits.append((self._starts[0] + self.limits.interval - now, "limit"))
        if self.failures:
            waits.append((self._not_before - now, "breaker" if self.open else "backoff"))
        seconds, reason = max(waits, default=(0.0, ""))
        return Verdict(seconds, reason) if seconds > 0 else Verdict()

    @property
    def open(self) -> bool:
        """Whether the circuit breaker has opened: so many failures that only one try each ``cooldown`` is made."""
        return self.failures >= self.limits.breaker

    def started(self) -> None:
        """A start is being made."""
        self._starts.append(self._clock())

    def failed(self) -> None:
        """It came to nothing."""
        self.failures += 1
        if self.open:
            pause = self.limits.cooldown
        else:
            # 2.0 ** 1024 is an OverflowError; long before that the pause is at its longest.
            pause = min(self.limits.backoff_max, self.limits.backoff * 2.0 ** min(self.failures - 1, 64))
        self._not_before = self._clock() + pause

    def served(self) -> None:
        """It serves: the failures before are forgotten, the starts within the interval are not."""
        self.failures = 0
        self._not_before = 0.0


class Attempts:
    """Requests that daemons died of, by a key of the caller's: after ``attempts`` deaths a request is to fail.

    :param most: so many requests are remembered; the ones that were counted first are forgotten first
    """

    def __init__(self, attempts: int, most: int = 4096) -> None:
        self.attempts = attempts
        self._most = most
        self._deaths: dict[int, int] = {}

    def died(self, request: int) -> bool:
        """One more daemon died of it; True if it is to fail now."""
        deaths = self._deaths.pop(request, 0) + 1
        if deaths >= self.attempts:
            return True
        self._deaths[request] = deaths
        while len(self._deaths) > self._most:
            del self._deaths[next(iter(self._deaths))]
        return False

    def answered(self, request: int) -> None:
        """It was served after all."""
        self._deaths.pop(request, None)
