# SPDX-License-Identifier: Apache-2.0
"""A thread that reads requests of one connection and writes what :mod:`.answers` decides.

It shares the open file description with the daemon (pidfd_getfd(2)), so it never sets O_NONBLOCK, and lives with a
description on which the daemon has set it.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterable

from ..errors import FusecrError
from ..fuse import connection, wire
from ..linux import proc
from ..linux.fd import Fd
from ..linux.zygote import Zygote
from . import jobs
from .answers import Answers

log = logging.getLogger(__name__)

# ENOENT: the request was interrupted before it was read, or the reply's request was; both are usual.
_AGAIN = (errno.ENOENT, errno.EINTR, errno.EAGAIN)
LEAVE_SECONDS = 5.0
FAREWELL_SECONDS = 2.0
_BATCH = 100  # connections of one child


class StandIn(threading.Thread):
    """Owns ``device`` until it leaves (:func:`leave`), or until the connection ends (:attr:`ended`)."""

    def __init__(self, device: Fd, answers: Answers) -> None:
        super().__init__(name=f"standin-{answers.connection.key}", daemon=True)
        self.device = device
        self.answers = answers
        self.ready = threading.Event()
        self.ended = threading.Event()
        self.left = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        # Who still uses the descriptors: whoever leaves them last closes them, so that no number is used after that.
        self._users = 1
        self._count = threading.Lock()
        # Held from the decision on an answer until it is written.
        self._answering = threading.Lock()

    def start(self) -> None:
        self._users += 1
        try:
            super().start()
        except BaseException:
            self._users -= 1
            raise

    def run(self) -> None:
        poll = select.poll()
        poll.register(self.device.fileno(), select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        try:
            while True:
                events = dict(poll.poll())
                if self._wake in events:
                    return
                if not self._serve_one():
                    self.ended.set()
                    return
        except Exception:
            log.exception("stand-in of connection %d failed", self.answers.connection.number)
            self.ended.set()
        finally:
            self._release()

    def _serve_one(self) -> bool:
        """Answer one request; False when the connection has ended (ENODEV: unmounted or aborted)."""
        try:
            data = os.read(self.device.fileno(), wire.READ_BUFFER)
        except OSError as error:
            return error.errno in _AGAIN
        if len(data) < wire.IN_HEADER.size:
            return False
        request = wire.parse_request(data)
        with self._answering:
            reply = self.answers.answer(request)
            if reply is not None:
                try:
                    os.write(self.device.fileno(), reply)
                except OSError as error:
                    if error.errno not in _AGAIN:
                        log.debug("reply to %s: %s", request.name, error.strerror)
                        return error.errno != errno.ENODEV
        if self.answers.initialised:
            self.ready.set()
        return True

    def give_out_no_more(self) -> None:
        """On return nothing is given out any more that would have to be expired."""
        self.answers.leaving = True
        # What was decided before is written now. That waits for nothing; the bound is for the case that it does.
        if self._answering.acquire(timeout=LEAVE_SECONDS):
            self._answering.release()

    def wake(self) -> None:
        """Tell the thread to end."""
        os.eventfd_write(self._wake, 1)

    def part(self, seconds: float) -> None:
        """Wait for the thread, and close the descriptors. A thread that does not end closes them when it does."""
        if self.is_alive():
            self.join(seconds)
        self.left = True
        self._release()
        if self.is_alive():
            log.error("stand-in of connection %d does not end; its descriptor stays open", self.answers.connection.number)

    def abort(self) -> None:
        """End the connection if the thread still hangs on it, and keeps it alive though its daemon is gone: ADR 0006."""
        if not self.is_alive():
            return
        try:
            number = int(proc.fdinfo("self", self.device.fileno())["fuse_connection"])
            log.warning("aborting FUSE connection %d: its daemon is gone, and only its stand-in keeps it", number)
            connection.abort(number)
        except (OSError, KeyError, ValueError) as error:
            log.error("stand-in of connection %d: %r", self.answers.connection.number, error)

    def _release(self) -> None:
        with self._count:
            self._users -= 1
            if self._users:
                return
        self.device.close()
        os.close(self._wake)


def leave(standins: Iterable[StandIn], zygote: Zygote | None = None) -> None:
    """Stop answering and close the descriptors. Each one leaves whatever becomes of the others, and nothing is raised: tasks
    wait to go on.

    :param zygote: first expire what was answered
    """
    present = [s for s in standins if not s.left]
    if zygote is not None:
        _each(present, StandIn.give_out_no_more)
        # They still answer: whoever holds the lock of a directory gets his answer, and the note its lock.
        with_notes = [s for s in present if s.is_alive() and not s.ended.is_set()]
        deadline = time.monotonic() + FAREWELL_SECONDS
        for start in range(0, len(with_notes), _BATCH):
            _say_farewell(zygote, with_notes[start : start + _BATCH], deadline)
    _each(present, StandIn.wake)
    deadline = time.monotonic() + LEAVE_SECONDS
    _each(present, lambda s: s.part(max(0.0, deadline - time.monotonic())))


def _each(standins: list[StandIn], deed: Callable[[StandIn], None]) -> None:
    for standin in standins:
        try:
            deed(standin)
        except Exception:
            log.exception("stand-in of connection %d", standin.answers.connection.number)


def _say_farewell(zygote: Zygote, standins: list[StandIn], deadline: float) -> None:
    """In a child: a note waits for the lock of its directory, unkillably, and somebody else may hold that for as long as he
    likes. Then entries stay valid for longer than they should, and nobody hangs but a process that nobody needs.
    """
    names = ", ".join(str(s.answers.connection.number) for s in standins)
    try:
        notes = [[note.hex() for note in s.answers.farewell()] for s in standins]
        fds = [s.device.fileno() for s in standins]
        seconds = max(0.1, deadline - time.monotonic())
        failed, _ = zygote.run(f"{jobs.__name__}:farewell_job", {"notes": notes}, fds, deadline=seconds)
    except (FusecrError, OSError) as error:
        log.warning("connections %s: answers may not have been expired: %s", names, error)
        return
    for index, why in failed:
        log.warning("connection %d: an answer could not be expired: %s", standins[index].answers.connection.number, why)
