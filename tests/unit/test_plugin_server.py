# SPDX-License-Identifier: Apache-2.0
"""The plugin's socket when the agent is short of descriptors or threads."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from incus_fusecr.agent import plugin
from incus_fusecr.agent.plugin import Gate, Server


class Listener:
    """A socket whose accept fails so often."""

    def __init__(self, sock: socket.socket, failures: list[int]) -> None:
        self.sock, self.failures = sock, failures

    def accept(self) -> Any:
        if self.failures:
            number = self.failures.pop(0)
            raise OSError(number, "accept")
        return self.sock.accept()

    def shutdown(self, how: int) -> None:
        self.sock.shutdown(how)

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(plugin, "SHORT_PAUSE", 0.0)
    made = Server(None, Gate(), str(tmp_path / "s"))  # type: ignore[arg-type]
    made.listen()
    yield made


def served(server: Server) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(5)
        sock.connect(server.path)
        try:
            sock.send(b"nonsense")
            return sock.recv(1000).startswith(b"error")
        except ConnectionError:
            return False


def test_it_accepts_again_after_it_was_short_of_something(
    server: Server, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("plugin socket: accept")
    expect_log("a connection was dropped: can't start new thread")
    expect_log("is not of the protocol|refused a connection")
    failures = [errno.EMFILE, errno.ECONNABORTED, errno.ENFILE, errno.ENOMEM]
    server._sock = Listener(server._sock, failures)  # type: ignore[assignment]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    served(server)
    assert not failures
    start = threading.Thread.start

    def none_left(self: threading.Thread) -> None:
        if self.name == "conversation":
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        assert served(server) is False
    served(server)
    assert thread.is_alive()
    server.close()
    thread.join(5)
    assert not thread.is_alive()


def test_a_socket_of_no_use_is_not_waited_for(server: Server) -> None:
    server._sock.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        server.run()
