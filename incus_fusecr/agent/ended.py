# SPDX-License-Identifier: Apache-2.0
"""The end of the agent, which a signal or one of its threads asks for."""

from __future__ import annotations

import os
import select
import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Ended:
    """To be made in the main thread, whose handlers of :data:`SIGNALS` it becomes.

    The kernel gives a process' signal to any of its threads (complete_signal() in kernel/signal.c prefers the main one, if that
    has no other just then), and Python runs the handler in the main thread only. If that waits for a lock, as
    ``threading.Event.wait`` does, nothing ever wakes it. A descriptor does, whichever thread writes to it.
    """

    def __init__(self) -> None:
        self._set = False
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: self.set())

    def set(self) -> None:
        """End it. From any thread."""
        self._set = True
        try:
            os.write(self._wake, b"\0")
        except BlockingIOError:
            return  # it is full: who waits is woken

    def is_set(self) -> bool:
        return self._set

    def wait(self) -> None:
        """Until it is set; in the main thread."""
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        while not self._set:
            poll.poll()
            try:
                os.read(self._woken, 4096)
            except BlockingIOError:
                continue
