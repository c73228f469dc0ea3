# SPDX-License-Identifier: Apache-2.0
"""A scripted agent: the real one gives its answers of trouble only when there is trouble."""

from __future__ import annotations

import array
import os
import selectors
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

FDS_MAX = 4
JOIN_SECONDS = 10

# Given a message and the fds that came with it (closed afterwards), returns the answer to send on the
# connection; "" sends nothing, None closes the connection.
Answer = Callable[[str, list[int]], str | None]


class FakeAgent:
    """Listens on a SOCK_SEQPACKET socket, keeps every message, answers with what a function says."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self.messages: list[str] = []
        self.connections = 0
        self.ended = threading.Event()      # set when a client has closed its connection
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._stop_r, self._stop_w = os.pipe()
        self._path = path
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> FakeAgent:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        os.write(self._stop_w, b"x")
        self._thread.join(JOIN_SECONDS)
        assert not self._thread.is_alive()
        os.close(self._stop_r)
        os.close(self._stop_w)
        self._path.unlink()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._stop_r, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fd == self._stop_r:
                        for open_key in list(selector.get_map().values()):
                            if isinstance(open_key.fileobj, socket.socket):
                                open_key.fileobj.close()
                        return
                    assert isinstance(key.fileobj, socket.socket)
                    if key.fileobj is self._listener:
                        self.connections += 1
                        selector.register(self._listener.accept()[0], selectors.EVENT_READ)
                    elif not self._handle(key.fileobj):
                        selector.unregister(key.fileobj)
                        key.fileobj.close()

    def _handle(self, connection: socket.socket) -> bool:
        try:
            data, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(FDS_MAX * 4))
        except ConnectionError:
            return False
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(payload)
        try:
            if not data:
                self.ended.set()
                return False
            message = data.decode()
            self.messages.append(message)
            answer = self._answer(message, list(fds))
            if answer:
                connection.send(answer.encode("latin-1"))
            return answer is not None
        finally:
            for fd in fds:
                os.close(fd)
