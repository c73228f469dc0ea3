# SPDX-License-Identifier: Apache-2.0
"""File descriptors that have an owner."""

from __future__ import annotations

import array
import os
import socket
from types import TracebackType


class Fd:
    """Owns one file descriptor: closed once, and never used after that.

    :param fd: the number; the object owns it from here on
    :param name: what it is, for messages
    """

    def __init__(self, fd: int, name: str = "fd") -> None:
        self._fd = fd
        self.name = name

    def fileno(self) -> int:
        """The number; raises ValueError after :meth:`close`."""
        if self._fd < 0:
            raise ValueError(f"{self.name} is closed")
        return self._fd

    def close(self) -> None:
        """Close; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def release(self) -> int:
        """Give the number away without closing it."""
        fd, self._fd = self.fileno(), -1
        return fd

    def dup(self) -> Fd:
        """A second owner of the same open file description (CLOEXEC)."""
        return Fd(os.dup(self.fileno()), self.name)

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def __enter__(self) -> Fd:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.name} {self._fd}>"


def receive(sock: socket.socket, size: int, count: int) -> tuple[bytes, list[int]]:
    """A message with descriptors, which no child of ours inherits: :func:`socket.recv_fds` ignores its flags.

    :param size: bytes at most
    :param count: descriptors at most
    """
    message, ancillary, _flags, _address = sock.recvmsg(size, socket.CMSG_SPACE(count * 4), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % 4])
    return message, list(fds)
