# SPDX-License-Identifier: Apache-2.0
"""Reports about requests, as keys of the object that carried the request.

A PATCH in Incus 6.0 reads the object in one transaction and writes all of it in another (cmd/incusd/profiles.go,
``profilePatch``): of a report and a beat of the client that come in the same milliseconds the one that was written first may be
undone by the other. So the agent remembers what it said, and says it again when it reads an object without it: the write that
undid it has an event of its own.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..errors import FusecrError
from ..incus.ask import MAX_TEXT, REPORT_KEY, TOO_LONG, TRUNCATED, VERSION, parse_report
from ..incus.client import Server
from ..incus.failures import ApiError, NotFound
from . import brief

log = logging.getLogger(__name__)

REPORT_SECONDS = 30.0
Mailbox = tuple[str, str]  # path of an object below /1.0, and its project


def report_text(request_id: str, seq: int, phase: str, data: Any, error: FusecrError | None) -> str:
    """``user.fusecr.report``, never longer than a reader takes: one that would be is an error, not a shorter answer."""
    body = {
        "v": VERSION,
        "id": request_id,
        "seq": seq,
        "phase": phase,
        "data": data,
        "error": brief.error(error) if error else None,
    }
    text = json.dumps(body)
    if len(text) > MAX_TEXT:
        log.error("report %d of %s: phase %s, %d bytes are more than a report may have", seq, request_id, phase, len(text))
        text = json.dumps({**body, "data": {TRUNCATED: True}, "error": body["error"] or TOO_LONG})
    return text


@dataclass(frozen=True)
class Report:
    """What was said about a request: :func:`report_text` and where it belongs. ``what`` is for the log."""

    mailbox: Mailbox
    id: str
    seq: int
    phase: str
    text: str
    what: str


class Reports:
    """The last report in each mailbox. Thread-safe.

    :param server: a connection for a project, for the calling thread
    """

    def __init__(self, server: Callable[[str], AbstractContextManager[Server]]) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._said: dict[Mailbox, Report] = {}
        self._writing: list[Mailbox] = []

    def write(self, report: Report) -> None:
        """Write it; Incus refuses while an operation of the instance runs, so it is tried again."""
        with self._lock:
            last = self._said.get(report.mailbox)
            if last is None or last.id != report.id or last.seq <= report.seq:
                self._said[report.mailbox] = report
            self._writing.append(report.mailbox)
        try:
            self._write(report)
        finally:
            with self._lock:
                self._writing.remove(report.mailbox)

    def _write(self, report: Report) -> None:
        path, project = report.mailbox
        deadline = time.monotonic() + REPORT_SECONDS
        while time.monotonic() < deadline:
            try:
                with self._server(project) as server:
                    server.patch(path, {"config": {REPORT_KEY: report.text}})
                return
            except NotFound:
                return
            except (FusecrError, OSError) as error:
                log.debug("report of %s: %s", report.what, error)
                time.sleep(0.02 if isinstance(error, ApiError) else 0.2)
        log.warning("the report of %s could not be written", report.what)

    def undone(self, mailbox: Mailbox, request_id: str, config: dict[str, Any]) -> Report | None:
        """The last report about this conversation, if the object has another one or none, and it is not being written."""
        with self._lock:
            said = self._said.get(mailbox)
            if said is None or said.id != request_id or mailbox in self._writing:
                return None
        there = parse_report(str(config.get(REPORT_KEY) or ""))
        if there is not None and (there.id, there.seq, there.phase) == (said.id, said.seq, said.phase):
            return None
        return said

    def forget(self, mailbox: Mailbox) -> None:
        """The object is gone."""
        with self._lock:
            self._said.pop(mailbox, None)

    def keep(self, there: Collection[Mailbox]) -> None:
        """All other objects are gone."""
        with self._lock:
            self._said = {mailbox: said for mailbox, said in self._said.items() if mailbox in there}
