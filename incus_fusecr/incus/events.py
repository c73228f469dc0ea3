# SPDX-License-Identifier: Apache-2.0
"""The events websocket of a server, followed across restarts of the server and losses of the link."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

from websockets.exceptions import InvalidHandshake, WebSocketException
from websockets.sync.client import ClientConnection, connect

from .config import Endpoint
from .failures import ApiError, NotDelivered
from .transport import dial

log = logging.getLogger(__name__)

CONNECTED = "connected"
_CONNECT_SECONDS = 5.0
_POLL_SECONDS = 0.5
_MAX_EVENT_BYTES = 1 << 20
_PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0)


def follow(
    endpoint: Endpoint,
    types: tuple[str, ...] = ("lifecycle",),
    *,
    all_projects: bool = False,
    stop: threading.Event | None = None,
    connect_seconds: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the events of a server.

    Each time the stream is up (first, and after every loss), ``{"type": "connected"}`` is yielded: what
    happened before it was not seen, so the caller lists again. Incus drops a listener that reads too slowly;
    do work elsewhere.

    :param all_projects: needs a client that may see all of them
    :param stop: ends the iteration within half a second; while idle nothing is yielded
    :param connect_seconds: give up when no stream came up for so long; None: try for ever
    :raises NotDelivered: only with ``connect_seconds``
    :raises ApiError: the server refuses (not trusted, no such project)
    """
    stop = stop or threading.Event()
    failures, waited = 0, 0.0
    while not stop.is_set():
        try:
            connection = _open(endpoint, types, all_projects)
        except (NotDelivered, OSError, WebSocketException) as e:
            if isinstance(e, InvalidHandshake):
                _refused(e, endpoint)
            pause = _PAUSES[min(failures, len(_PAUSES) - 1)]
            if failures == 0:
                log.warning("no events from %s: %s", endpoint.remote, e)
            failures, waited = failures + 1, waited + pause
            if connect_seconds is not None and waited > connect_seconds:
                if isinstance(e, NotDelivered):
                    raise
                raise NotDelivered(f"no events from {endpoint.remote} ({endpoint.where})", str(e)) from e
            stop.wait(pause)
            continue
        failures, waited = 0, 0.0
        with connection:
            yield {"type": CONNECTED}
            yield from _read(connection, stop, endpoint)
        # A server that takes connections and ends them at once must not make this a busy loop.
        stop.wait(_PAUSES[0])


def _open(endpoint: Endpoint, types: tuple[str, ...], all_projects: bool) -> ClientConnection:
    query = {"type": ",".join(types)}
    query.update({"all-projects": "true"} if all_projects else {"project": endpoint.project})
    sock = dial(endpoint, _CONNECT_SECONDS)
    try:
        # ws:// also over TLS: the socket is already encrypted, and its certificate compared.
        return connect(
            f"ws://incus/1.0/events?{urlencode(query)}",
            sock=sock,
            open_timeout=_CONNECT_SECONDS,
            close_timeout=1,
            compression=None,
            max_size=_MAX_EVENT_BYTES,
        )
    except BaseException:
        sock.close()
        raise


def _read(
    connection: ClientConnection, stop: threading.Event, endpoint: Endpoint
) -> Iterator[dict[str, Any]]:
    while not stop.is_set():
        try:
            text = connection.recv(timeout=_POLL_SECONDS)
        except TimeoutError:
            continue
        except (WebSocketException, OSError) as e:
            log.info("events of %s ended: %s", endpoint.remote, e)
            return
        try:
            event = json.loads(text)
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict):
            yield event


def _refused(error: InvalidHandshake, endpoint: Endpoint) -> None:
    response = getattr(error, "response", None)
    code = int(getattr(response, "status_code", 0))
    if 400 <= code < 500:
        body = getattr(response, "body", None) or b""
        try:
            why = str(json.loads(body)["error"])
        except (ValueError, KeyError, TypeError):
            why = f"HTTP status {code}"
        raise ApiError(f"events of {endpoint.remote} ({endpoint.where})", why, code=code) from error
