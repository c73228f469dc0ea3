# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a command to end: sometimes now, sometimes after what must not be left half done."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """While the block lasts, the signals raise KeyboardInterrupt, until :meth:`hold`: from then on they are noted only.

    Belongs to the main thread; in another one it does nothing, as signals do not come there (signal(3)).

    :ivar noted: whether one came after :meth:`hold`
    """

    def __init__(self) -> None:
        self.noted = False
        self._holding = False
        self._before: dict[int, signal.Handlers | int | object | None] = {}

    def hold(self) -> None:
        """What follows must come to its end."""
        self._holding = True

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._came)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # whatever was there

    def _came(self, number: int, frame: FrameType | None) -> None:
        if not self._holding:
            raise KeyboardInterrupt
        self.noted = True
