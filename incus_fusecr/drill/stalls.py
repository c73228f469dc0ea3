# SPDX-License-Identifier: Apache-2.0
"""How long clients waited: the longest operation of each client in each window, and quantiles of these. Pure.

A *stall* is the longest operation of one client that was under way in a window of fixed length. Those of windows in which
something was done to the daemon are compared with those of as long windows in which nothing was: the longest of many
operations is never short on a busy machine, whatever happens to the daemon.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Operation = tuple[int, int]  # when it began, how long it took: nanoseconds of CLOCK_MONOTONIC
Window = tuple[int, int]  # begin and end


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least a share ``q`` is not above; 0 of nothing."""
    if not values:
        return 0.0
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def longest(operations: Sequence[Operation], window: Window) -> int | None:
    """Nanoseconds of the longest operation of one client that was under way in a window; None if there was none.

    :param operations: one after another
    """
    begin, end = window
    last = bisect_left(operations, (end, 0))
    found = None
    for start, took in reversed(operations[:last]):
        if start + took <= begin:
            break
        found = max(found or 0, took)
    return found


def split(window: Window, length: int) -> list[Window]:
    """Windows of the same length, one after another; what is left over at the end goes with the last."""
    begin, end = window
    count = max(1, (end - begin) // length)
    return [(begin + n * length, begin + (n + 1) * length) for n in range(count)]


@dataclass(frozen=True)
class Stalls:
    """
    :ivar windows: windows times clients that did something in them
    :ivar idle: windows times clients that did nothing at all
    :ivar p50: milliseconds, as p99 and max
    """

    windows: int = 0
    idle: int = 0
    p50: float = 0.0
    p99: float = 0.0
    max: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def stalls(clients: Iterable[Sequence[Operation]], windows: Sequence[Window]) -> Stalls:
    """Of all clients in all windows."""
    found = [longest(operations, window) for operations in clients for window in windows]
    taken = [value / 1e6 for value in found if value is not None]
    p50, p99 = (round(quantile(taken, q), 2) for q in (0.5, 0.99))
    return Stalls(len(taken), len(found) - len(taken), p50, p99, round(max(taken, default=0.0), 2))


def ratio(part: float, whole: float) -> float | None:
    """None where there is nothing to compare with."""
    return round(part / whole, 2) if part and whole else None
