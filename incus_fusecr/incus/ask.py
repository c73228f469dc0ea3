# SPDX-License-Identifier: Apache-2.0
"""Questions to a host's agent, and reports of agents, as ``user.fusecr.*`` keys through the Incus API.

Of a server (``PATCH /1.0``)::

    user.fusecr.ask-ID     {"v": 1, "id": ID, "op": OP, "args": {...}, "time": UNIX_SECONDS}
    user.fusecr.answer-ID  {"v": 1, "id": ID, "phase": "working"|"done", "data": ..., "error": null|{...}}

Whoever may edit the object can write these, so an answer is checked like any foreign input.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from ..errors import FusecrError, Refused
from .client import Server
from .deadline import Deadline
from .failures import ApiError

log = logging.getLogger(__name__)

VERSION = 1
ASK_KEY = "user.fusecr.ask-"
ANSWER_KEY = "user.fusecr.answer-"
REQUEST_KEY = "user.fusecr.request"
REPORT_KEY = "user.fusecr.report"
MAX_TEXT = 256 * 1024
FIRST_SIGN_SECONDS = 2.5
POLL_SECONDS = 0.015
SLOW_POLL_SECONDS = 0.1
MAX_COUNT = (1 << 53) - 1  # what every JSON reader keeps exactly
MAX_MESSAGE = 4000
# In the place of data that is longer than a report may be.
TRUNCATED = "truncated"
TOO_LONG = {"what": "", "why": "its report is longer than a report may be, so it tells nothing", "hint": "see the agent's log"}
AGENT_HINT = "on the host of {}: systemctl status incus-fusecr"


class AgentError(FusecrError):
    """The agent did what it was asked, failed at it, and says why."""


class AgentSilent(Refused):
    """No agent answers on a host."""


@dataclass(frozen=True)
class AgentReport:
    """A report or an answer, checked."""

    id: str
    seq: int
    phase: str
    error: Mapping[str, str] | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def as_error(self, what: str) -> AgentError:
        """The report's error as an exception; ``what`` where it names nothing itself."""
        e = self.error or {}
        return AgentError(e.get("what") or what, e.get("why", ""), e.get("hint", ""))


def new_id() -> str:
    """For a migration or a question; unique, and safe in a key."""
    return uuid.uuid4().hex


def read_object(text: object) -> dict[str, Any] | None:
    """The JSON object of a key that anybody may have written; None if there is none, whatever it is instead."""
    if not isinstance(text, str) or not text or len(text) > MAX_TEXT:
        return None
    try:
        raw = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    return raw if isinstance(raw, dict) else None


def _no_number(text: str) -> None:
    """NaN and Infinity, which Python takes for JSON: no deadline comes after them."""
    raise ValueError(text)


def is_count(value: object) -> TypeGuard[int]:
    """A ``seq`` or ``beat``: JSON also has true, 1e999, and numbers of thousands of digits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def parse_report(text: str) -> AgentReport | None:
    """A report, or None if there is none or it is malformed (someone else may have written it).

    One whose data was left out, since it was longer than a report may be, is an error: no data would read as "nothing found".
    """
    raw = read_object(text)
    if raw is None or not is_count(raw.get("v")) or raw["v"] != VERSION:
        return None
    identifier, seq, phase = raw.get("id"), raw.get("seq", 0), raw.get("phase")
    data, error = raw.get("data"), _error(raw.get("error"))
    if not isinstance(identifier, str) or not is_count(seq) or not isinstance(phase, str):
        return None
    if not isinstance(data, dict):
        data = {}
    if error is None and data.get(TRUNCATED):
        error = TOO_LONG
    return AgentReport(id=identifier[:128], seq=seq, phase=phase[:64], error=error, data=data)


def ask_host(
    server: Server,
    op: str,
    args: Mapping[str, Any] | None = None,
    deadline: Deadline | float = 10.0,
    *,
    first_sign: float = FIRST_SIGN_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Any:
    """Ask the agent of a host: ``ping``, ``facts`` or ``list``. Both keys are removed at the end.

    :param deadline: for the whole answer
    :param first_sign: seconds until the agent must have shown that it works on it
    :returns: the answer's ``data``
    :raises Forbidden: this client may not write the server's keys
    :raises AgentSilent: nothing came in time
    :raises AgentError: the agent reports an error
    """
    end = Deadline.of(deadline)
    sign = end.within(first_sign)
    identifier = new_id()
    ask, answer = ASK_KEY + identifier, ANSWER_KEY + identifier
    request = {"v": VERSION, "id": identifier, "op": op, "args": dict(args or {}), "time": int(time.time())}
    working, written = False, True
    try:
        try:
            server.patch_server_config({ask: json.dumps(request)})
        except ApiError:
            written = False
            raise
        while True:
            config = server.get("", timeout=max(1.0, min(end.left, 5.0))).get("config") or {}
            found = parse_report(str(config.get(answer) or ""))
            if found and found.id == identifier:
                if found.error:
                    raise found.as_error(f"{op} on {server}")
                if found.phase == "done":
                    return found.data
                working = True
            if end.passed or (not working and sign.passed):
                raise AgentSilent(
                    f"{op} on {server}",
                    "the agent began and did not finish"
                    if working
                    else "no incus-fusecr agent answers there",
                    AGENT_HINT.format(server),
                )
            sleep(POLL_SECONDS if not working else SLOW_POLL_SECONDS)
    finally:
        try:
            if written:
                server.patch_server_config({ask: "", answer: ""})
        except FusecrError as e:
            log.warning("the keys %s and %s stay behind on %s: %s", ask, answer, server, e)


def _error(value: object) -> Mapping[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        return {"what": str(value)[:MAX_MESSAGE], "why": "", "hint": ""}
    return {key: str(value.get(key) or "")[:MAX_MESSAGE] for key in ("what", "why", "hint")}
