# SPDX-License-Identifier: Apache-2.0
"""Stop a container's tasks in an order that leaves no FUSE request in flight, and let them go on in the reverse one.

Clients first, while the daemons answer them; then each daemon once nothing waits for it; then what daemons depend on.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable

from ..errors import FusecrError
from ..fuse import connection
from ..linux import proc
from ..linux.fd import Fd
from ..linux.pidfd import pidfd_open, send_signal

log = logging.getLogger(__name__)

STOP_SECONDS = 5.0
DRAIN_SECONDS = 5.0
# A vfork() parent waits in D for a child that was stopped before it: let all run this long, then try again.
RETRY_AFTER = 0.25
BREATH = 0.02
POLL = 0.0005
# A descriptor for each: the agent serves other containers, too.
MAX_TASKS = 16384


class NotQuiet(FusecrError):
    """The container could not be brought to rest in time; everything runs again."""


class Stopper:
    """The tasks that were stopped here, each by pidfd. :meth:`resume` lets them go on, first those stopped last.

    :param note: called with :attr:`marks`, all that are about to be stopped included, before they are: for a journal
    """

    def __init__(self, note: Callable[[list[tuple[int, int]]], None] = lambda _marks: None) -> None:
        self._held: dict[int, Fd] = {}
        self._start: dict[int, int] = {}
        self._order: list[int] = []
        self._note = note

    def stop(self, pids: Iterable[int]) -> list[int]:
        """SIGSTOP those that are not stopped yet; returns the ones that still exist.

        :raises NotQuiet: they are too many
        """
        # The undo is known before the deed.
        fresh = [pid for pid in pids if pid not in self._held and self._add(pid)]
        if not fresh:
            return []
        self._note(self.marks)
        return [pid for pid in fresh if send_signal(self._held[pid], signal.SIGSTOP)]

    def _add(self, pid: int, start: int = 0) -> bool:
        """Remember a task, if it is there (and is the one that began at ``start``)."""
        if len(self._held) >= MAX_TASKS:
            raise NotQuiet("stopping the container's tasks", f"they are more than {MAX_TASKS}", "set limits.processes")
        try:
            pidfd = pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            began = proc.start_time(pid)
        except (FileNotFoundError, ProcessLookupError):
            began = -1
        if began < 0 or start not in (0, began):
            pidfd.close()
            return False
        self._held[pid], self._start[pid] = pidfd, began
        self._order.append(pid)
        return True

    def adopt(self, pids: Iterable[int]) -> None:
        """Take over tasks that a former agent had stopped, in the order they were stopped in."""
        for pid in pids:
            self._add(pid)

    def adopt_marks(self, marks: Iterable[tuple[int, int]]) -> None:
        """The same, of what was given to ``note``."""
        for pid, start in marks:
            self._add(pid, start)

    @property
    def marks(self) -> list[tuple[int, int]]:
        """(pid, start time), in the order in which they were stopped."""
        return [(pid, self._start[pid]) for pid in self._order]

    @property
    def pids(self) -> list[int]:
        """In the order in which they were stopped."""
        return list(self._order)

    def resume(self, only: Callable[[int], bool] = lambda _pid: True) -> None:
        """SIGCONT, in reverse order."""
        for pid in reversed(self._order.copy()):
            if only(pid):
                self._order.remove(pid)
                # Closed whatever happens; and one that cannot be told must not keep the others.
                with self._held.pop(pid) as pidfd:
                    try:
                        send_signal(pidfd, signal.SIGCONT)
                    except OSError as error:
                        log.error("pid %d could not be told to go on: %s", pid, error.strerror)

    def forget(self) -> None:
        """Drop all pidfds; the tasks are gone, or somebody else lets them go on."""
        for pidfd in self._held.values():
            pidfd.close()
        self._held.clear()
        self._order.clear()


def unstopped(pids: Iterable[int]) -> dict[int, str]:
    """Those with a thread that still runs or waits, and their thread states."""
    running = {}
    for pid in pids:
        states = "".join(proc.thread_states(pid))
        if set(states) - proc.STOPPED_OR_GONE:
            running[pid] = states
    return running


def stop_all(stopper: Stopper, pids: Callable[[], Iterable[int]], deadline: float) -> None:
    """Stop whatever ``pids()`` names until it names nothing new and all have stopped.

    :param pids: called again and again, for tasks fork while they are being stopped
    :param deadline: ``time.monotonic()`` seconds
    :raises NotQuiet: some did not stop; names them
    """
    retry = time.monotonic() + RETRY_AFTER
    mine: set[int] = set()
    while True:
        wanted = list(pids())
        fresh = stopper.stop(wanted)
        mine.update(fresh)
        running = unstopped(wanted)
        if not fresh and not running:
            return
        now = time.monotonic()
        if now > deadline:
            names = ", ".join(f"pid {pid} ({proc.comm(pid)}, {states})" for pid, states in running.items())
            raise NotQuiet("stopping the container's tasks", f"still running: {names}", "try again when they are idle")
        if running and now > retry:
            stopper.resume(lambda pid: pid in mine)
            time.sleep(BREATH)
            retry = time.monotonic() + RETRY_AFTER
        time.sleep(POLL)


def drain(number: int, deadline: float) -> bool:
    """Wait until no request of a connection is unanswered; False at the deadline (``time.monotonic()`` seconds)."""
    while True:
        if _waiting(number) == 0:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)


def _waiting(number: int) -> int:
    """Unanswered requests; none of a connection that has ended."""
    try:
        return connection.waiting(number)
    except FileNotFoundError:
        return 0


def stop_daemons(
    stopper: Stopper, ordered: list[tuple[int, list[int]]], last: Callable[[], Iterable[int]], deadline: float
) -> None:
    """Stop daemons whose clients are stopped already, then the rest of the container.

    :param ordered: (connection number, daemon pids), those that are clients of others first
    :param last: the remaining tasks, called again and again
    :raises NotQuiet: requests do not end; names the connection
    """
    for number, daemons in ordered:
        if not drain(number, deadline):
            names = ", ".join(f"pid {pid} ({proc.comm(pid)})" for pid in daemons)
            raise NotQuiet(
                f"FUSE connection {number} of {names}",
                f"{_waiting(number)} requests are not answered",
                "the daemon, or what it depends on, hangs",
            )
        stop_all(stopper, lambda daemons=daemons: daemons, deadline)  # type: ignore[misc]
    stop_all(stopper, last, deadline)
    for number, daemons in ordered:
        if not drain(number, time.monotonic()):
            raise NotQuiet(
                f"FUSE connection {number} of pid {daemons[0]} ({proc.comm(daemons[0])})",
                "a request arrived while it was being stopped",
                "try again",
            )


def stacking_order(served: dict[int, list[int]], clients_of: dict[int, set[int]]) -> list[tuple[int, list[int]]]:
    """Connections so that each comes before those that its daemons are clients of (bindfs above sshfs: bindfs first).

    :param clients_of: connection -> pids that refer to it
    :raises NotQuiet: two daemons are clients of each other
    """
    left = dict(served)
    order: list[tuple[int, list[int]]] = []
    while left:
        free = [n for n in left if not any(set(left[other]) & clients_of.get(n, set()) for other in left if other != n)]
        if not free:
            raise NotQuiet("FUSE daemons of the container", "are clients of each other", "unmount one of them")
        for n in sorted(free):
            order.append((n, left.pop(n)))
    return order
