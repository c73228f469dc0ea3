# SPDX-License-Identifier: Apache-2.0
"""The socket that ``incus-fusecr status`` and its like talk to: one request, a line of JSON, a connection.

``{"op": "status"}``, ``{"op": "protect"|"unprotect"|"upgrade", "name": N, "exec": PATH, "watch": SECONDS}`` are answered by one
line, ``{"ok": true, ...}`` or ``{"error": {"what", "why", "hint"}, "code": N}``; ``{"op": "events", "since": N,
"follow": BOOL}`` by a line for each event, and a last one when it is over.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from ..errors import EXIT_FAILED, FusecrError, UsageError
from ..linux import ns
from .events import EventLog
from .supervisor import REQUEST_SECONDS, Supervisor

log = logging.getLogger(__name__)

SOCKET = "/run/incus-fusecr/control.sock"
MAX_LINE = 65536
MAX_CLIENTS = 32
READ_SECONDS = 5.0
SHORT_PAUSE = 0.1
MAX_WATCH = 600.0
_UCRED = struct.Struct("3i")


class Server:
    """Accepts until :meth:`close`."""

    def __init__(self, supervisor: Supervisor, events: EventLog, path: str = SOCKET, more: Sequence[Supervisor] = ()) -> None:
        self._supervisors, self._events, self.path = (supervisor, *more), events, path
        self._room = threading.BoundedSemaphore(MAX_CLIENTS)
        self._closing = False
        unlink(path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        before = os.umask(0o177)
        try:
            self._sock.bind(path)
        finally:
            os.umask(before)
        self._sock.listen(16)

    def run(self) -> None:
        """One thread a connection. What the machine is short of now it may have again a moment later.

        :raises OSError: the socket is of no use any more
        """
        while True:
            try:
                client, _ = self._sock.accept()
            except OSError as error:
                if self._closing:
                    return
                if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                    raise
                log.error("control socket: %s", error.strerror)
                time.sleep(SHORT_PAUSE)
                continue
            if not self._room.acquire(blocking=False):
                client.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(client,), daemon=True, name="a control client").start()
            except (RuntimeError, MemoryError) as error:
                self._room.release()
                client.close()
                log.error("control socket: a connection was dropped: %s", error)
                time.sleep(SHORT_PAUSE)

    def close(self) -> None:
        """Stop accepting."""
        self._closing = True
        unlink(self.path)
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._sock.close()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock:
                check_peer(sock)
                sock.settimeout(READ_SECONDS)
                request = json.loads(_line(sock))
                if not isinstance(request, dict):
                    raise ValueError("a request is a JSON object")
                self._answer(sock, request)
        except (OSError, ValueError) as error:
            log.debug("control: %s", error)
        except FusecrError as error:
            log.warning("refused a connection: %s", error)
        finally:
            self._room.release()

    def _answer(self, sock: socket.socket, request: dict[str, Any]) -> None:
        try:
            if request.get("op") == "events":
                self._give_events(sock, int(request.get("since", 0)), bool(request.get("follow")))
                answer: dict[str, Any] = {"ok": True}
            else:
                answer = {"ok": True, **self._do(request)}
        except FusecrError as error:
            answer = {"error": error.to_dict(), "code": error.exit_code}
        except TimeoutError:
            why = f"no answer of the agent's supervisor within {REQUEST_SECONDS:g} s"
            answer = _failed(request, why, "journalctl -u incus-fusecr")
        except Exception as error:
            log.exception("control: %s", request.get("op"))
            answer = _failed(request, f"{type(error).__name__}: {error}", "see the agent's log")
        sock.settimeout(READ_SECONDS)
        sock.sendall(json.dumps(answer).encode() + b"\n")

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        op, name, exe = request.get("op"), str(request.get("name", "")), str(request.get("exec", ""))
        if op == "upgrade":
            return self._owner(name).upgrade(name, exe, min(MAX_WATCH, max(0.0, float(request.get("watch", 0)))))
        if op == "unprotect":
            owner = self._owner(name)
            return dict(owner.call(lambda: owner.unprotect(name)))
        if op not in ("status", "protect"):
            raise UsageError(f"request {op!r}", "is not known to this agent")
        asked = [self._owner(name)] if name else self._supervisors
        answers = [one.call(one.status if op == "status" else partial(one.protect, name)) for one in asked]
        return {**answers[0], "units": [unit for answer in answers for unit in answer["units"]]}

    def _owner(self, name: str) -> Supervisor:
        """Who has that daemon; the host's if nobody has: it may be about to find it."""
        return next((one for one in self._supervisors if name in one.units), self._supervisors[0])

    def _give_events(self, sock: socket.socket, since: int, follow: bool) -> None:
        if not follow:
            for event in self._events.since(since):
                sock.sendall(event.to_json().encode() + b"\n")
            return
        with self._events.subscribe(since) as subscription:
            while True:
                try:
                    found = subscription.get(1.0)
                except TimeoutError:
                    sock.setblocking(False)
                    try:
                        if not sock.recv(1):
                            return
                    except BlockingIOError:
                        pass
                    sock.settimeout(READ_SECONDS)
                    continue
                if found is None:
                    return
                sock.sendall(found.to_json().encode() + b"\n")


def _failed(request: dict[str, Any], why: str, hint: str) -> dict[str, Any]:
    return {"error": FusecrError(str(request.get("op")), why, hint).to_dict(), "code": EXIT_FAILED}


def unlink(path: str) -> None:
    """Remove a socket that may not be there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def check_peer(sock: socket.socket) -> None:
    """
    :raises FusecrError: it is not root of this host (a container's root may own a bind mount of the socket)
    """
    pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid != 0 or pid == 0 or not (ns.same_ns(pid, "user") and ns.same_ns(pid, "pid")):
        raise FusecrError(f"peer pid {pid} uid {uid}", "is not root of this host")


def _line(sock: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        if len(data) > MAX_LINE:
            raise ValueError("a request that is too long")
        part = sock.recv(4096)
        if not part:
            raise ValueError("the client hung up")
        data += part
    return data


# -- for commands


def ask(request: dict[str, Any], seconds: float = REQUEST_SECONDS + 10, path: str = SOCKET) -> dict[str, Any]:
    """One request, its answer. :raises FusecrError: the agent refuses, or there is none"""
    for line in lines(request, seconds, path):
        return checked(json.loads(line))
    raise FusecrError(str(request.get("op")), "the agent hung up", "only root of the host is answered")


def checked(answer: dict[str, Any]) -> dict[str, Any]:
    """:raises FusecrError: what it says of an error"""
    if "error" in answer:
        told = answer["error"]
        error = FusecrError(str(told.get("what")), str(told.get("why", "")), str(told.get("hint", "")))
        error.exit_code = int(answer.get("code", EXIT_FAILED))
        raise error
    return answer


def lines(request: dict[str, Any], seconds: float | None, path: str = SOCKET) -> Iterator[bytes]:
    """The lines of the answer. :raises FusecrError: no agent that protects daemons runs here, or it does not answer"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.settimeout(seconds)
            sock.connect(path)
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as file:
                yield from file
        except TimeoutError:
            raise FusecrError(f"the agent's {path}", f"no answer within {seconds:g} s", "journalctl -u incus-fusecr") from None
        except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
            hint = "systemctl status incus-fusecr; its log says why if it runs without recovery"
            raise FusecrError(f"the agent's {path}", "nobody answers", hint) from None
        except PermissionError:
            raise FusecrError(f"the agent's {path}", "only root may ask", "use sudo") from None
