# SPDX-License-Identifier: Apache-2.0
"""systemd's fd store (sd_notify(3), FDSTORE): what is in it comes back after a kill -9 of the holder.

An entry goes there as a *parcel*: one end of a socket pair in whose queue lies one message, the meta and the fds of the
entry. One FDSTORE is the whole change, so no instant of a death leaves half of it. The fds themselves are not stored:

- systemd keeps the first of two fds of the same open file description and drops the second with its name (kcmp(2)); to
  take the first name away then takes the fd away, and it is the only one.
- ``systemd-analyze fdstore`` lets PID 1 call fstat(2) on each: on a tree of a dead daemon it would never return.
"""

from __future__ import annotations

import _socket  # the module socket costs half a megabyte in a process that uses none of it
import os
import sys
from array import array

from .table import MAX_FDS, MAX_MESSAGE, Bad, Entry, Table, check_key, check_meta, close_all, load_object

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LISTEN_FDS_START = 3
BUFFER = 4 * MAX_MESSAGE
CMSG = _socket.CMSG_SPACE(MAX_FDS * 4)


def warn(text: str) -> None:
    """To the journal, as a warning (sd-daemon(3))."""
    print(f"<4>{text}", file=sys.stderr, flush=True)


def received(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """The fds of a message."""
    fds = array("i")
    for level, kind, data in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def rights(fds: Sequence[int]) -> list[tuple[int, int, array[int]]]:
    """The ancillary data that carries fds."""
    return [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array("i", fds))] if fds else []


def name_of(key: str, entry: Entry) -> str:
    """FDNAME of a parcel; systemd allows neither colons nor more than 255 characters."""
    return f"{key}@{entry.generation}"


def pack(entry: Entry) -> int:
    """A new parcel.

    :raises OSError: the kernel takes no such message
    """
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    try:
        ours.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, BUFFER)
        ours.sendmsg([entry.meta.encode()], rights(entry.fds), _socket.MSG_DONTWAIT)
        return theirs.detach()
    finally:
        ours.close()
        theirs.close()


def unpack(parcel: int) -> tuple[str, list[int]]:
    """Meta and fds; they stay in the parcel, too, and with it in the store.

    :raises Bad, OSError: it is no parcel
    """
    sock = _socket.socket(fileno=parcel)
    fds: list[int] = []
    try:
        flags = _socket.MSG_PEEK | _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC
        data, ancillary, got, _ = sock.recvmsg(MAX_MESSAGE + 1, CMSG, flags)
        fds = received(ancillary)
        if got & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC):
            raise Bad("it is cut off")
        return check_meta(load_object(data)), fds
    except (Bad, OSError):
        close_all(fds)
        raise
    finally:
        sock.detach()


class Store:
    """Without ``NOTIFY_SOCKET`` every call does nothing.

    :ivar sent: how many messages systemd has taken from us
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.sent = 0
        self._queue: list[tuple[bytes, list[int]]] = []
        self._sock: _socket.socket | None = None
        path = environ.get("NOTIFY_SOCKET", "")
        if path:
            self._sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
            self._sock.connect("\0" + path[1:] if path.startswith("@") else path)
            self._sock.setblocking(False)

    @property
    def waiting(self) -> bool:
        """systemd does not take messages just now."""
        return bool(self._queue)

    @property
    def last(self) -> int:
        """The number that :attr:`sent` will have when all that was said by now has been taken."""
        return self.sent + len(self._queue)

    def fileno(self) -> int:
        """-1 without systemd."""
        return self._sock.fileno() if self._sock is not None else -1

    def say(self, text: str, fds: Sequence[int] = ()) -> None:
        """One message in its turn; it never waits."""
        if self._sock is not None:
            # Copies: the numbers may mean something else by the time that the message goes.
            self._queue.append((text.encode(), [os.dup(fd) for fd in fds]))
            self.flush()

    def flush(self) -> None:
        """Send what systemd takes."""
        while self._queue and self._sock is not None:
            data, fds = self._queue[0]
            try:
                self._sock.sendmsg([data], rights(fds))
            except BlockingIOError:
                return
            except OSError as error:
                warn(f"systemd does not take a message: {error.strerror}; after a restart of the holder it will be missing")
            self.sent += 1
            del self._queue[0]
            close_all(fds)

    def replace(self, key: str, new: Entry, old: Entry | None) -> None:
        """
        :raises OSError: the entry cannot be stored, and nothing was changed
        """
        if self._sock is None:
            return
        parcel = pack(new)
        try:
            # FDPOLL=0: else systemd drops an fd as soon as it polls as hung up, and this one does from the start.
            self.say(f"FDSTORE=1\nFDNAME={name_of(key, new)}\nFDPOLL=0", [parcel])
        finally:
            os.close(parcel)
        if old is not None:
            self.remove(key, old)

    def remove(self, key: str, old: Entry) -> None:
        self.say(f"FDSTOREREMOVE=1\nFDNAME={name_of(key, old)}")

    def load(self, table: Table, environ: Mapping[str, str], warn: Callable[[str], None] = warn) -> None:
        """Take back what systemd kept (sd_listen_fds(3)); of two parcels for one key the later counts."""
        if environ.get("LISTEN_PID") != str(os.getpid()) or not environ.get("LISTEN_FDS", "").isdecimal():
            return
        names = environ.get("LISTEN_FDNAMES", "").split(":")
        for number in range(int(environ["LISTEN_FDS"])):
            fd = LISTEN_FDS_START + number
            name = names[number] if number < len(names) else ""
            try:
                self._load_one(table, name, fd)
            except (Bad, OSError) as error:
                warn(f"systemd's store: {name or 'unnamed'!s:.120}: {error}; dropped")
                self.say(f"FDSTOREREMOVE=1\nFDNAME={name}")
            finally:
                os.close(fd)

    def _load_one(self, table: Table, name: str, fd: int) -> None:
        key, _, generation = name.partition("@")
        check_key(key)
        if not generation.isdecimal():
            raise Bad("no name of ours")
        meta, fds = unpack(fd)
        new = Entry(fds, meta, int(generation))
        other = table.get(key)
        if other is not None and other.generation > new.generation:
            table.generation = max(table.generation, new.generation)
            self.remove(key, new)
            close_all(fds)
            return
        old = table.set(key, new)
        if old is not None:
            self.remove(key, old)
            close_all(old.fds)
