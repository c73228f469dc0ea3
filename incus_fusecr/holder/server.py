# SPDX-License-Identifier: Apache-2.0
"""The holder's event loop: one thread, nothing in it waits for a client or for systemd."""

from __future__ import annotations

import _socket
import errno
import fcntl
import os
import select
import struct
import time

from . import tinyjson
from .store import BUFFER, CMSG, Store, received, rights, warn
from .table import MAX_ALL_FDS, MAX_FDS, MAX_MESSAGE, Bad, Entry, Missing, Request, Table, close_all, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

SOCKET = "/run/incus-fusecr/holder.sock"
MAX_CLIENTS = 64
BACKLOG = 128
SO_PEERPIDFD = 77  # Linux 6.5
NO_ROOM = (errno.EMFILE, errno.ENFILE)
_UCRED = struct.Struct("3i")
OK = '{"ok":true}'
# What /proc/PID/fd shows for files that are no file of a file system.
_PATHLESS = ("anon_inode:", "pipe:[", "socket:[", "mnt:[", "user:[", "pid:[", "/memfd:")


def refuse_reason(fd: int) -> str:
    """Why this fd must not be held; empty if it may be.

    The last close of a file of a FUSE file system asks its daemon (FLUSH), and a holder that waits for a daemon holds
    nothing any more. stat(2) would ask the daemon, too; these two questions do not.
    """
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
        return ""
    link = os.readlink(f"/proc/self/fd/{fd}")
    if link.startswith(_PATHLESS) or os.path.basename(link.removesuffix(" (deleted)")) == "fuse":
        return ""
    return f"an open file ({link:.200}); /dev/fuse, O_PATH and what has no path may be held"


def peer_reason(sock: _socket.socket) -> str:
    """Why the peer is not root of this host; empty if it is. A container's root may own a bind mount of the socket.

    :raises OSError: no fd is left to find it out with
    """
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _UCRED.size))
    who = f"pid {pid} uid {uid}"
    if uid != 0 or pid == 0:
        return f"{who} is not root of this host"
    pidfd = -1
    try:
        pidfd = sock.getsockopt(_socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):  # an older kernel
            return f"{who}: {error.strerror}"
    try:
        for kind in ("user", "pid"):
            if os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"):
                return f"{who} is in another {kind} namespace"
        if pidfd >= 0 and _ended(pidfd):
            return f"{who} has ended"  # whose namespaces we saw is not known then
    except OSError as error:
        return f"{who}: {error.strerror}"
    finally:
        if pidfd >= 0:
            os.close(pidfd)
    return ""


def _ended(pidfd: int) -> bool:
    poll = select.poll()  # select(2) ends at descriptor 1023
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


class Client:
    """One connection. ``held_back``: an answer, and the number that the store's ``sent`` has to reach before."""

    __slots__ = ("held_back", "sock", "used")

    def __init__(self, sock: _socket.socket, used: float) -> None:
        self.sock = sock
        self.used = used
        self.held_back: tuple[int, str] | None = None


class Server:
    """:meth:`run` never returns."""

    def __init__(self, path: str, table: Table, store: Store) -> None:
        self.table = table
        self.store = store
        self.clients: dict[int, Client] = {}
        self._lock, self.listener = listen(path)
        self._epoll = select.epoll()
        self._epoll.register(self.listener.fileno(), select.EPOLLIN)
        self._store_polled = False
        self._refused_at = 0.0

    def run(self, beat: float = 0.0) -> None:
        """Serve. ``beat``: seconds between two signs of life for systemd's watchdog, 0 for none."""
        next_beat = time.monotonic() + beat
        while True:
            timeout = max(0.0, next_beat - time.monotonic()) if beat else None
            for fd, events in self._epoll.poll(timeout):
                self._event(fd, events)
            if beat and time.monotonic() >= next_beat:
                self.store.say("WATCHDOG=1")
                next_beat = time.monotonic() + beat
            self._after_store()

    def _event(self, fd: int, events: int) -> None:
        if fd == self.listener.fileno():
            self._accept()
        elif fd == self.store.fileno():
            self.store.flush()
        else:
            client = self.clients.get(fd)
            if client is not None:  # else it was thrown out by an earlier event of this round
                self._read(client, events)

    def _after_store(self) -> None:
        """Answers that waited for systemd; ask to be woken when it takes messages again."""
        for client in list(self.clients.values()):
            if client.held_back is not None and client.held_back[0] <= self.store.sent:
                text = client.held_back[1]
                client.held_back = None
                self._epoll.modify(client.sock.fileno(), select.EPOLLIN)
                self._answer(client, text)
        if self.store.waiting != self._store_polled:
            self._store_polled = self.store.waiting
            if self._store_polled:
                self._epoll.register(self.store.fileno(), select.EPOLLOUT)
            else:
                self._epoll.unregister(self.store.fileno())

    def _accept(self) -> None:
        try:
            fd, _ = self.listener._accept()  # type: ignore[attr-defined]
        except OSError as error:
            self._make_room(error)
            return
        sock = _socket.socket(fileno=fd)
        sock.setblocking(False)
        try:
            reason = peer_reason(sock)
        except OSError as error:
            sock.close()  # it will try again
            self._make_room(error)
            return
        now = time.monotonic()
        if reason:
            if now - self._refused_at > 1:  # who is refused must not fill the journal
                self._refused_at = now
                warn(f"refused a connection: {reason}")
            sock.close()
            return
        if len(self.clients) >= MAX_CLIENTS:  # the one that was idle for the longest time can connect again
            self._close_idlest()
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, BUFFER)
        self.clients[fd] = Client(sock, now)
        self._epoll.register(fd, select.EPOLLIN)

    def _make_room(self, error: OSError) -> None:
        """Where the limit could not be raised. Other errors: the peer has gone."""
        if error.errno in NO_ROOM and self.clients:
            self._close_idlest()

    def _close_idlest(self) -> None:
        self._close(min(self.clients.values(), key=lambda c: c.used))

    def _close(self, client: Client) -> None:
        del self.clients[client.sock.fileno()]
        client.sock.close()

    def _read(self, client: Client, events: int) -> None:
        if client.held_back is not None:
            if events & (select.EPOLLHUP | select.EPOLLERR):  # it went away without its answer
                self._close(client)
            return
        try:
            data, ancillary, flags, _ = client.sock.recvmsg(MAX_MESSAGE + 1, CMSG, _socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            self._close(client)
            return
        fds = received(ancillary)
        if not data:
            close_all(fds)
            self._close(client)
            return
        client.used = time.monotonic()
        try:
            if flags & _socket.MSG_TRUNC:
                raise Bad(f"a message has at most {MAX_MESSAGE} bytes")
            if flags & _socket.MSG_CTRUNC:
                raise Bad(f"an entry has at most {MAX_FDS} fds")
            request = parse(data)
            if request.op == "put":
                self._put(request, fds)
                self._answer_stored(client)
            elif fds:
                raise Bad(f"{request.op}: takes no fds")
            else:
                self._serve(client, request)
        except Bad as error:
            close_all(fds)
            more = ',"missing":true' if error.missing else ""
            self._answer(client, f'{{"error":{tinyjson.dumps(str(error))}{more}}}')

    def _put(self, request: Request, fds: list[int]) -> None:
        for number, fd in enumerate(fds):
            if reason := refuse_reason(fd):
                raise Bad(f"fd {number} of {len(fds)}: {reason}")
        old = self._replace(request.key, self.table.admit(request.key, request.meta, fds))
        if old is not None:
            close_all(old.fds)

    def _replace(self, key: str, entry: Entry) -> Entry | None:
        """In the store first: what fails there changes nothing."""
        try:
            self.store.replace(key, entry, self.table.get(key))
        except OSError as error:
            raise Bad(f"{key}: cannot be stored: {error.strerror}") from None
        return self.table.set(key, entry)

    def _serve(self, client: Client, request: Request) -> None:
        if request.op == "list":
            self._answer(client, self.table.page(request.key))
            return
        entry = self.table.get(request.key)
        if request.op == "drop":
            if entry is not None:
                self.table.remove(request.key)
                self.store.remove(request.key, entry)
                close_all(entry.fds)
            self._answer_stored(client)
            return
        if entry is None:
            raise Missing(f"{request.key}: there is no such key")
        if request.op == "get":
            self._answer(client, f'{{"ok":true,"meta":{entry.meta}}}', entry)
        else:
            self._replace(request.key, self.table.admit(request.key, request.meta, entry.fds))
            self._answer_stored(client)

    def _answer_stored(self, client: Client) -> None:
        """``ok``, as soon as systemd has the change."""
        if self.store.waiting:
            client.held_back = (self.store.last, OK)
            self._epoll.modify(client.sock.fileno(), 0)
        else:
            self._answer(client, OK)

    def _answer(self, client: Client, text: str, entry: Entry | None = None) -> None:
        try:
            client.sock.sendmsg([text.encode()], rights(entry.fds) if entry else [])
        except OSError:  # gone, or it asks and does not read: nobody is waited for
            self._close(client)


def listen(path: str) -> tuple[int, _socket.socket]:
    """The lock that keeps a second holder out (the kernel releases it with us), and the socket.

    :raises SystemExit: another holder runs
    """
    directory = os.path.dirname(os.path.abspath(path))
    os.makedirs(directory, 0o711, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"fusecr-holder: another one holds {path}") from None
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    before = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(before)
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return lock, sock


def raise_limit() -> None:
    """As many fds as the bounds allow, and some for clients."""
    import resource

    need = MAX_ALL_FDS + 4 * MAX_CLIENTS + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < need:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (need, max(need, hard)))
        except (ValueError, OSError):  # without CAP_SYS_RESOURCE
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(path: str, environ: Mapping[str, str] = os.environ) -> None:
    """Run until killed: any signal will do, for nothing has to be put in order at the end."""
    with open("/proc/self/comm", "w") as comm:
        comm.write("fusecr-holder")
    raise_limit()
    table = Table()
    store = Store(environ)
    server = Server(path, table, store)  # first: who is not the only one must not touch the store
    store.load(table, environ)
    store.say(f"READY=1\nSTATUS={len(table)} entries came back from the store" if len(table) else "READY=1")
    usec = environ.get("WATCHDOG_USEC", "")
    mine = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    server.run(int(usec) / 2e6 if usec.isdecimal() and mine else 0.0)
