# SPDX-License-Identifier: Apache-2.0
"""A TCP echo server and its client, both checking that each connection's records come in sequence."""

from __future__ import annotations

import selectors
import socket

from clientlib import RECORD, Client, Mismatch, check, compare


class TcpServer(Client):
    """Echoes 16-byte records and checks that each connection's come in sequence. Target: ADDRESS:PORT."""

    pace = 0.0
    RESTS = 0.5  # seconds in select: how late SIGTERM may be noticed

    def setup(self) -> None:
        self.selector = selectors.DefaultSelector()
        host, port = endpoint(self.options.target)
        self.listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ, None)
        self.report.data["detail"].update(bytes=0, connections=0, open=0, resets=0)

    def round(self) -> None:
        for key, _ in self.selector.select(self.RESTS):
            if key.data is None:
                peer, _ = self.listener.accept()
                peer.settimeout(60)
                self.selector.register(peer, selectors.EVENT_READ, {"next": 0, "rest": b""})
                self.count(connections=1, open=1)
            else:
                self.serve(key)

    def count(self, **more: int) -> None:
        for name, value in more.items():
            self.report.data["detail"][name] += value

    def serve(self, key: selectors.SelectorKey) -> None:
        peer: socket.socket = key.fileobj  # type: ignore[assignment]
        try:
            data = peer.recv(65536)
            if data:
                peer.sendall(data)
        except OSError:
            self.count(resets=1)
            self.drop(peer)
            raise
        if not data:
            self.drop(peer)
            return
        self.count(bytes=len(data))
        key.data["rest"], number = take_records(key.data["rest"] + data, key.data["next"])
        for _ in range(number - key.data["next"]):
            self.ok()
        key.data["next"] = number

    def drop(self, peer: socket.socket) -> None:
        self.selector.unregister(peer)
        peer.close()
        self.count(open=-1)
        self.report.rest()


class TcpClient(Client):
    """One connection, a record each pace, every echo checked; reconnects after a loss, which is an error."""

    WINDOW = 256  # records on their way, so that a stopped server does not fill our memory

    def setup(self) -> None:
        self.report.data["detail"].update(bytes=0, connections=0, resets=0)
        self.connect()

    def connect(self) -> None:
        self.sent = self.echoed = 0
        self.rest = b""
        self.socket = socket.create_connection(endpoint(self.options.target), timeout=5)
        self.report.data["detail"]["connections"] += 1

    def round(self) -> None:
        try:
            if self.sent - self.echoed < self.WINDOW:
                self.socket.settimeout(5)
                self.socket.sendall(b"%015d\n" % self.sent)
                self.sent += 1
            self.socket.settimeout(0.2)
            try:
                data = self.socket.recv(65536)
            except TimeoutError:
                return  # nothing lost yet: shows as a gap
            check(bool(data), "the server closed the connection")
        except (OSError, Mismatch):
            self.report.data["detail"]["resets"] += 1
            raise
        self.report.data["detail"]["bytes"] += len(data)
        self.rest, number = take_records(self.rest + data, self.echoed)
        for _ in range(number - self.echoed):
            self.ok()
        self.echoed = number

    def resync(self) -> None:
        self.socket.close()
        self.connect()


def endpoint(target: str) -> tuple[str, int]:
    host, _, port = target.rpartition(":")
    return host, int(port)


def take_records(data: bytes, number: int) -> tuple[bytes, int]:
    """Check whole records from the given number on; returns what is left over and the next number."""
    whole = len(data) // RECORD
    wanted = b"".join(b"%015d\n" % n for n in range(number, number + whole))
    compare(data[: whole * RECORD], wanted, f"stream from record {number}")
    return data[whole * RECORD :], number + whole
