# SPDX-License-Identifier: Apache-2.0
"""A server that speaks as much of the Incus API as a test scripts, on a unix socket or with TLS on the loopback."""

from __future__ import annotations

import json
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

DROP = object()  # end the connection instead of answering

Reply = tuple[int, Any]
Script = Callable[["Request"], Any]


class Request:
    """What arrived."""

    def __init__(self, method: str, target: str, body: Any, headers: dict[str, str]) -> None:
        parts = urlsplit(target)
        self.method = method
        self.path = parts.path
        self.query = dict(parse_qsl(parts.query))
        self.body = body
        self.headers = headers

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def sync(metadata: Any) -> Reply:
    return 200, {"type": "sync", "status": "Success", "status_code": 200, "metadata": metadata}


def started(identifier: str, metadata: Any = None) -> Reply:
    return 202, {
        "type": "async",
        "status_code": 100,
        "operation": f"/1.0/operations/{identifier}",
        "metadata": {"id": identifier, "metadata": metadata or {}},
    }


def refused(code: int, text: str) -> Reply:
    return code, {"type": "error", "error": text, "error_code": code, "metadata": None}


def operation(code: int, err: str = "", **metadata: Any) -> dict[str, Any]:
    return {"status_code": code, "status": "?", "err": err, "metadata": metadata}


SERVER_INFO: dict[str, Any] = {
    "auth": "trusted",
    "api_extensions": ["projects"],
    "config": {},
    "environment": {"server_version": "6.0.4", "addresses": ["192.0.2.1:8443"], "certificate": "PEM"},
}


class FakeIncus:
    """Answers with ``script``; ``GET /1.0`` works without it.

    :ivar requests: all that arrived, in order
    """

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or (lambda request: None)
        self.requests: list[Request] = []
        self.path = ""
        self.port = 0
        self._server: socketserver.ThreadingMixIn | None = None
        self._open: set[socket.socket] = set()

    def listen_unix(self, path: Path) -> FakeIncus:
        fake = self

        class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True

        self.path = str(path)
        return self._start(UnixServer(str(path), fake._handler()))

    def listen_tls(self, certificate: Path, key: Path, minimum: ssl.TLSVersion | None = None) -> FakeIncus:
        fake = self
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if minimum is not None:
            context.maximum_version = minimum
        context.load_cert_chain(certificate, key)

        class TLSServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
            daemon_threads = True

            def get_request(self) -> tuple[socket.socket, Any]:
                raw, address = super().get_request()
                raw.settimeout(10)
                return context.wrap_socket(raw, server_side=True), address

            def handle_error(self, request: Any, client_address: Any) -> None:
                return  # a client that does not like our certificate

        server = TLSServer(("127.0.0.1", 0), fake._handler())
        self.port = server.server_address[1]
        return self._start(server)

    def seen(self, *methods: str) -> list[str]:
        """What arrived after the first contact."""
        return [str(r) for r in self.requests if not methods or r.method in methods]

    def close(self) -> None:
        server: Any = self._server
        if server is None:
            return
        server.shutdown()
        server.server_close()
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self._thread.join(10)

    def __enter__(self) -> FakeIncus:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _start(self, server: Any) -> FakeIncus:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = False

            def setup(self) -> None:
                super().setup()
                fake._open.add(self.connection)

            def finish(self) -> None:
                fake._open.discard(self.connection)
                super().finish()

            def log_message(self, *args: Any) -> None:
                return

            def address_string(self) -> str:
                return "client"

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                request = Request(self.command, self.path, body, dict(self.headers))
                fake.requests.append(request)
                reply = fake.script(request)
                if reply is None:
                    reply = sync(SERVER_INFO) if request.path == "/1.0" else refused(404, "not found")
                if reply is DROP:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                code, data = reply
                payload = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(payload)))
                self.send_header("ETag", "abc")
                self.end_headers()
                self.wfile.write(payload)

            do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = answer

        return Handler
