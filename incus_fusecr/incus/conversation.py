# SPDX-License-Identifier: Apache-2.0
"""Requests about one instance to the agent of its host, and its reports.

::

    user.fusecr.request  {"v": 1, "id": ID, "seq": N, "op": OP, "beat": N, ...ARGS}
    user.fusecr.report   {"v": 1, "id": ID, "seq": N, "phase": PHASE, "data": ..., "error": null|{...}}
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from ..errors import FusecrError
from .ask import (
    AGENT_HINT,
    FIRST_SIGN_SECONDS,
    MAX_TEXT,
    POLL_SECONDS,
    REPORT_KEY,
    REQUEST_KEY,
    VERSION,
    AgentReport,
    AgentSilent,
    is_count,
    new_id,
    parse_report,
    read_object,
)
from .client import Server
from .deadline import Deadline
from .failures import ApiError, NotDelivered, OutcomeUnknown
from .mailbox import InstanceMailbox, Mailbox, ProfileMailbox

log = logging.getLogger(__name__)

# A write takes 4 to 40 ms; while one hangs, a container may be standing still.
WRITE_SECONDS = 5.0


class Conversation:
    """Requests about one instance to the agent of the host it is on.

    The request key has one writer, this object; :meth:`send` and :meth:`beat` may come from two threads, each
    with its own :class:`Server`.

    :param server: used by the thread that makes this object
    :param name: the instance
    :param identifier: of the migration; a report that carries another one is not for us
    :param mailbox: where to write; the instance's own configuration by default
    """

    def __init__(
        self,
        server: Server,
        name: str,
        identifier: str,
        *,
        mailbox: Mailbox | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.server = server
        self.name = name
        self.id = identifier
        self.mailbox: Mailbox = mailbox or InstanceMailbox(name)
        self.seq = 0
        self._sleep = sleep
        self._lock = threading.Lock()
        self._request: dict[str, Any] = {}

    def __str__(self) -> str:
        return f"{self.server}:{self.name}" if self.name else str(self.server)

    def send(self, op: str, args: Mapping[str, Any] | None = None, *, timeout: float | None = None) -> int:
        """Write the next request.

        A request that failed is never written later by a beat: after :class:`NotDelivered` the caller may act as
        if it had not been made, and one that nobody knows about must not come true by itself.

        :param timeout: seconds for the answer of the server
        :returns: its ``seq``
        :raises NotDelivered: it certainly was not written; beats go on with the request before it
        :raises OutcomeUnknown: it may have been; no beats until the next request
        """
        with self._lock:
            self.seq += 1
            before = self._request
            head = {"v": VERSION, "id": self.id, "seq": self.seq, "op": op}
            request = {**(args or {}), **head, "beat": before.get("beat", 0) + 1}
            self._request = {}
            try:
                self._write(self.server, request, timeout)
            except (NotDelivered, ApiError):
                self._request = before
                raise
            self._request = request
            return self.seq

    def beat(self, server: Server | None = None, *, timeout: float | None = None) -> None:
        """Renew the lease: the same request with a higher ``beat``.

        :param server: of the calling thread, if it is not the one that made this object
        """
        with self._lock:
            if not self._request:
                return
            self._request["beat"] += 1
            self._write(server or self.server, self._request, timeout)

    def report(self, *, timeout: float | None = None) -> AgentReport | None:
        """The agent's last report for this conversation. A request that one undid (agent/reports.py) is written again.

        :raises NotFound: the instance, or the mailbox, is gone
        """
        config = self.mailbox.read(self.server, timeout)
        there = read_object(config.get(REQUEST_KEY))
        if there and there.get("id") == self.id and is_count(seq := there.get("seq")) and seq < self.seq:
            with suppress(FusecrError):
                self.beat(timeout=timeout)
        report = parse_report(str(config.get(REPORT_KEY) or ""))
        return report if report and report.id == self.id else None

    def wait(
        self,
        phases: Collection[str],
        deadline: Deadline | float,
        *,
        seq: int | None = None,
        first_sign: float | None = FIRST_SIGN_SECONDS,
        poll: float = POLL_SECONDS,
        each: Callable[[AgentReport], None] | None = None,
    ) -> AgentReport:
        """Wait for a report with one of ``phases``.

        :param seq: of the request that must have been handled; the last one by default
        :param first_sign: seconds until a report must have come at all; None for no such limit
        :param each: called with each new report on the way
        :raises AgentError: the agent reports an error for this request
        :raises AgentSilent: no report in time
        :raises OutcomeUnknown: the server could not be reached for :attr:`Connection.lost_seconds`
        """
        end = Deadline.of(deadline)
        lost: Deadline | None = None
        sign = end.within(first_sign) if first_sign is not None else end
        wanted = self.seq if seq is None else seq
        last: AgentReport | None = None
        what = f"{self._request.get('op', 'request')} of {self}"
        while True:
            try:
                found = self.report(timeout=max(1.0, min(end.left, WRITE_SECONDS)))
                lost = None
            except (NotDelivered, OutcomeUnknown) as e:
                # The request is with the agent; only its answer is out of reach.
                lost = lost or end.within(self.server.lost_seconds)
                if lost.passed:
                    raise OutcomeUnknown(what, e.why, e.hint) from e
                self._sleep(poll)
                continue
            if found and found.seq >= wanted:
                if found.error:
                    raise found.as_error(what)
                if each and found != last:
                    each(found)
                last = found
                if found.phase in phases:
                    return found
            if end.passed or (last is None and sign.passed):
                raise AgentSilent(
                    what,
                    f"the agent stays in the phase {last.phase}"
                    if last
                    else "no incus-fusecr agent answers there",
                    AGENT_HINT.format(self.server),
                )
            self._sleep(poll)

    def close(self) -> None:
        """Take the request and the report away."""
        with self._lock:
            self._request = {}
            self.mailbox.clear(self.server)

    def _write(self, server: Server, request: Mapping[str, Any], timeout: float | None) -> None:
        text = json.dumps(request)
        if len(text) > MAX_TEXT:
            raise ApiError(f"request for {self}", f"it is longer than {MAX_TEXT} bytes")
        self.mailbox.write(server, {REQUEST_KEY: text}, WRITE_SECONDS if timeout is None else timeout)


class Beater:
    """Raises ``beat`` of a conversation in a thread of its own while the caller waits for something else.

    :param seconds: between two beats
    """

    def __init__(self, conversation: Conversation, seconds: float = 1.0) -> None:
        self._conversation = conversation
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fusecr-beat", daemon=True)
        self.failure: FusecrError | None = None

    def __enter__(self) -> Beater:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        server: Server | None = None
        while not self._stop.wait(self._seconds):
            try:
                if server is None:
                    server = self._conversation.server.clone()
                self._conversation.beat(server, timeout=3.0)
                self.failure = None
            except FusecrError as e:
                # The agent's lease decides what a lost link means, not this thread.
                self.failure = e
                log.debug("beat of %s: %s", self._conversation, e)
        if server is not None:
            server.close()


def ask_instance(
    server: Server,
    name: str,
    op: str,
    args: Mapping[str, Any] | None = None,
    deadline: Deadline | float = 30.0,
    *,
    phases: Collection[str],
    identifier: str = "",
    poll: float = POLL_SECONDS,
) -> AgentReport:
    """One request about an instance, its report, and the keys removed again; for ``check`` and the like."""
    talk = Conversation(server, name, identifier or new_id())
    talk.send(op, args)
    try:
        return talk.wait(phases, deadline, poll=poll)
    finally:
        try:
            talk.close()
        except FusecrError as e:
            log.warning("the keys %s and %s stay behind on %s: %s", REQUEST_KEY, REPORT_KEY, talk, e)


def ask_without_instance(server: Server, op: str, deadline: Deadline | float) -> AgentReport:
    """One question to the agent of a host by a profile that belongs to no migration: ``facts``, for a client that may not write
    the server's keys. A migration speaks by such a profile, too, so who may not write one need not begin.

    :raises Forbidden: this client may not write profiles of this project
    """
    identifier = new_id()
    mailbox = ProfileMailbox(identifier)
    talk = Conversation(server, "", identifier, mailbox=mailbox)
    written = True
    try:
        try:
            talk.send(op)
        except ApiError:
            written = False
            raise
        return talk.wait((op,), deadline)
    finally:
        try:
            if written:
                talk.close()
        except FusecrError as e:
            log.warning("%s stays behind on %s: %s", mailbox.where, server, e)
