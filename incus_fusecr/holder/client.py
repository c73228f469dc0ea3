# SPDX-License-Identifier: Apache-2.0
"""The agent's side of the holder: every call has a deadline, and all may be repeated, so a holder that dies is waited for."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FusecrError
from ..linux.fd import Fd
from .store import CMSG, received
from .table import MAX_FDS, MAX_MESSAGE

SOCKET = "/run/incus-fusecr/holder.sock"
SECONDS = 5.0
PAUSE = 0.01  # between two tries to reach a holder that is not there
PYTHON = "/usr/bin/python3"
SNDBUF = 4 * MAX_MESSAGE
_GONE = frozenset({errno.ECONNREFUSED, errno.ENOENT, errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN, errno.EAGAIN})


class HolderError(FusecrError):
    """The holder refused, or did not answer in time."""


class NoEntry(HolderError):
    """The holder has no such key."""


@dataclass(frozen=True)
class Entry:
    """What :meth:`HolderClient.entries` tells of a key; ``fds`` is their number."""

    key: str
    meta: dict[str, Any]
    fds: int


class HolderClient:
    """One connection, made when it is needed; threads may share it.

    :param path: the holder's socket
    :param seconds: the deadline of a call, the wait for a holder that is just being started included
    """

    def __init__(self, path: str = SOCKET, seconds: float = SECONDS) -> None:
        self.path = path
        self.seconds = seconds
        self._sock: socket.socket | None = None
        self._lock = threading.Lock()

    def put(self, key: str, meta: Mapping[str, Any], fds: Sequence[Fd | int] = ()) -> None:
        """Replace fds and meta of a key in one step; the fds remain the caller's.

        :raises HolderError: refused, or no answer within the deadline (the entry is then the old or the new one)
        """
        numbers = [fd if isinstance(fd, int) else fd.fileno() for fd in fds]
        if len(numbers) > MAX_FDS:
            raise HolderError(f"put {key}", f"{len(numbers)} fds, an entry has at most {MAX_FDS}")
        self._call({"op": "put", "key": key, "meta": dict(meta)}, numbers)

    def meta(self, key: str, meta: Mapping[str, Any]) -> None:
        """Replace the meta of a key.

        :raises NoEntry: there is none
        :raises HolderError: as :meth:`put`
        """
        self._call({"op": "meta", "key": key, "meta": dict(meta)})

    def get(self, key: str) -> tuple[dict[str, Any], list[Fd]]:
        """Meta and fds, copies that the caller owns.

        :raises NoEntry: there is none
        :raises HolderError: no answer within the deadline
        """
        answer, fds = self._call({"op": "get", "key": key})
        return dict(answer["meta"]), fds

    def drop(self, key: str) -> None:
        """Let go; fine if there is none.

        :raises HolderError: no answer within the deadline
        """
        self._call({"op": "drop", "key": key})

    def entries(self) -> Iterator[Entry]:
        """All keys in their order; what changes meanwhile may or may not be among them.

        :raises HolderError: no answer within the deadline, which each page has for itself
        """
        after, more = "", True
        while more:
            answer, _ = self._call({"op": "list", "after": after})
            for entry in answer["entries"]:
                after = entry["key"]
                yield Entry(after, entry["meta"], entry["fds"])
            more = answer["more"]

    def close(self) -> None:
        """Close the connection; a later call makes another one."""
        with self._lock:
            self._disconnect()

    def __enter__(self) -> HolderClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, message: dict[str, Any], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[Fd]]:
        what = f"holder: {message['op']} {message.get('key', '')}".rstrip()
        data = json.dumps(message, allow_nan=False).encode()
        if len(data) > MAX_MESSAGE:
            raise HolderError(what, f"{len(data)} bytes, a message has at most {MAX_MESSAGE}")
        end = time.monotonic() + self.seconds
        if not self._lock.acquire(timeout=self.seconds):
            raise HolderError(what, "another call of this process is not finished")
        try:
            answer, numbers = self._repeat(what, data, fds, end)
        finally:
            self._lock.release()
        owned = [Fd(number, f"{message.get('key')}[{i}]") for i, number in enumerate(numbers)]
        if answer.get("ok") is True:
            return answer, owned
        for fd in owned:
            fd.close()
        raise (NoEntry if answer.get("missing") else HolderError)(what, str(answer.get("error", "an answer of no meaning")))

    def _repeat(self, what: str, data: bytes, fds: Sequence[int], end: float) -> tuple[dict[str, Any], list[int]]:
        while True:
            try:
                return self._once(data, fds, end)
            except TimeoutError:
                self._disconnect()  # the answer to this call must not be taken for the next one's
                raise HolderError(what, f"no answer from {self.path} within {self.seconds:g} s") from None
            except OSError as error:
                self._disconnect()
                if error.errno not in _GONE or time.monotonic() + PAUSE > end:
                    raise HolderError(
                        what, f"{self.path}: {error.strerror}", "systemctl status incus-fusecr-holder"
                    ) from None
            except BaseException:
                self._disconnect()
                raise
            time.sleep(PAUSE)

    def _once(self, data: bytes, fds: Sequence[int], end: float) -> tuple[dict[str, Any], list[int]]:
        if self._sock is None:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SNDBUF)
            self._left(end)
            self._sock.connect(self.path)
        self._left(end)
        socket.send_fds(self._sock, [data], fds)
        self._left(end)
        # Not recv_fds(): it ignores its flags, and the fds would go to every child.
        reply, ancillary, _, _ = self._sock.recvmsg(MAX_MESSAGE + 1, CMSG, socket.MSG_CMSG_CLOEXEC)
        if not reply:
            raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return json.loads(reply), received(ancillary)

    def _left(self, end: float) -> None:
        assert self._sock is not None
        self._sock.settimeout(max(0.001, end - time.monotonic()))

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def launch(path: str = SOCKET) -> None:
    """Start a holder where no systemd does; it outlives the caller. One that runs already stays, the second ends at once."""
    program = Path(__file__).with_name("main.py")
    python = PYTHON if os.access(PYTHON, os.X_OK) else "python3"
    # The shell in between leaves it to init, so that nobody has to wait for it.
    command = ["/bin/sh", "-c", '"$@" </dev/null >/dev/null & ', "sh", python, "-I", "-S", str(program), path]
    subprocess.run(command, start_new_session=True, check=True, timeout=SECONDS)
