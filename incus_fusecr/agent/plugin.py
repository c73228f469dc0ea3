# SPDX-License-Identifier: Apache-2.0
"""The socket that CRIU's plugin and the action helper talk to (protocol: docs/adr/0001)."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..checkpoint import dump as dumping
from ..checkpoint import manifest, netimages, pressure, restore, scan
from ..checkpoint.dump import Dump, Tools
from ..checkpoint.journal import RUN
from ..checkpoint.restore import Restore, RestoreError
from ..errors import FusecrError
from ..linux import ns
from ..linux.fd import Fd, receive
from ..linux.pidfd import pidfd_open, wait_exit
from .network import undo_network_lock

log = logging.getLogger(__name__)

SOCKET = f"{RUN}/agent.sock"
MAX_MESSAGE = 65536
INCUS_DIR = "/var/lib/incus"
# How long a CRIU may go on after it was given its answer; images of many gigabytes take minutes to write.
CRIU_SECONDS = 3600.0
SHORT_PAUSE = 0.1
_UCRED = struct.Struct("3i")


class Gate:
    """What a restore asks when its manifest names a migration. The default lets nothing through."""

    def enter(self, migration: str) -> tuple[str, bool]:
        """Before CRIU restores anything: close the network here.

        :returns: liblxc's name of the container, and whether it had another one on the source
        :raises FusecrError: no such migration is expected here
        """
        raise FusecrError("restore of a migrated container", f"migration {migration} is not expected on this host")

    def verified(self, session: Restore) -> None:
        """All handles are right; CRIU still holds the tasks."""

    def arrived(self, session: Restore) -> None:
        """CRIU has let go, all tasks are stopped: from here the gate owns the session."""

    def lost(self, session: Restore) -> None:
        """CRIU ended before it had let go."""


@dataclass
class Server:
    """Accepts until :meth:`close`.

    :ivar held: dumps that the agent began itself, by init pid: their CRIU's plugin is answered from them
    :ivar post_dump: blocks until the verdict on a held dump is known, by CRIU's pid; True lets CRIU kill the tree
    :ivar before_going_on: called when CRIU has left the tree of a dump alive, before it goes on
    """

    tools: Tools
    gate: Gate
    path: str = SOCKET
    held: dict[int, Dump] = field(default_factory=dict)
    post_dump: Callable[[int], bool] = lambda _criu: False
    before_going_on: Callable[[Dump], None] = lambda _dump: None
    restores: dict[int, Restore] = field(default_factory=dict)
    _closing: bool = False

    def listen(self) -> None:
        """Bind; connections are accepted from :meth:`run` on."""
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        before = os.umask(0o177)
        try:
            self._sock.bind(self.path)
        finally:
            os.umask(before)
        self._sock.listen(64)

    def run(self) -> None:
        """Accept, one thread a connection. What the machine is short of now it may have again a moment later.

        :raises OSError: the socket is of no use any more
        """
        while True:
            try:
                connection, _ = self._sock.accept()
            except OSError as error:
                if self._closing:
                    return
                if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                    raise
                log.error("plugin socket: %s", error.strerror)
                time.sleep(SHORT_PAUSE)
                continue
            try:
                threading.Thread(target=self._serve, args=(connection,), daemon=True, name="conversation").start()
            except (RuntimeError, MemoryError) as error:
                connection.close()
                log.error("plugin socket: a connection was dropped: %s", error)
                time.sleep(SHORT_PAUSE)

    def close(self) -> None:
        """Stop accepting."""
        self._closing = True
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            try:
                pid = _peer(sock)
                pidfd = pidfd_open(pid)
            except (FusecrError, OSError) as error:
                log.warning("refused a connection: %s", error)
                return
            with pidfd:
                Conversation(self, sock, pid, pidfd).run()


def _peer(sock: socket.socket) -> int:
    """The peer's pid.

    :raises FusecrError: it is not root of this host (a container's root may own a bind mount of the socket)
    """
    pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid != 0 or pid == 0 or not (ns.same_ns(pid, "user") and ns.same_ns(pid, "pid")):
        raise FusecrError(f"peer pid {pid} uid {uid}", "is not root of this host")
    return int(pid)


class Conversation:
    """One connection: of a CRIU's plugin (lives as long as CRIU), or of one call of the action helper."""

    def __init__(self, server: Server, sock: socket.socket, pid: int, pidfd: Fd) -> None:
        self.server = server
        self.sock = sock
        self.pid = pid
        self.pidfd = pidfd
        self.dump: Dump | None = None
        self.restore: Restore | None = None

    def run(self) -> None:
        try:
            while self._one():
                pass
        finally:
            if self.dump is not None or self.restore is not None:
                self._until_criu_ends()

    def _one(self) -> bool:
        try:
            message, fds = receive(self.sock, MAX_MESSAGE, 4)
        except OSError:
            return False
        owned = [Fd(number, "from the plugin") for number in fds]
        try:
            if not message:
                return False
            answer = self._handle(message.decode("utf-8", "replace").split(), owned)
        except (FusecrError, OSError) as error:
            log.error("%s", error)
            answer = f"error {error}"
        except Exception:
            log.exception("a message of CRIU %d failed", self.pid)
            answer = "error the agent failed; see its log"
        finally:
            for fd in owned:
                fd.close()
        if answer is not None:
            try:
                data = answer.encode("utf-8", "surrogateescape")
                self.sock.send(data if len(data) < MAX_MESSAGE else b"error the answer is longer than a message")
            except OSError:
                return False
        return True

    def _handle(self, words: list[str], fds: list[Fd]) -> str | None:
        if words[:1] == ["dump"] and len(words) == 2 and fds:
            return self._dump(int(words[1]), fds[0])
        if words == ["restore"] and fds:
            return self._restore(fds[0])
        if words[:1] == ["fd"] and len(words) == 2 and fds:
            self._give(int(words[1]), fds[0])
            return None
        if words[:1] == ["act"] and len(words) == 4:
            return self._act(words[1], int(words[2]), int(words[3]))
        if words[:1] == ["exit"]:
            log.debug("CRIU %d: plugin leaves, %s", self.pid, words[1:])
            return None
        raise FusecrError(f"message of pid {self.pid}", "is not of the protocol")

    def _dump(self, init: int, imgdir: Fd) -> str:
        held = self.server.held.get(init)
        if held is not None:
            return held.answer
        name = scan.container_name(init)
        self.dump = dumping.begin(self.server.tools, name, init, imgdir.fileno(), criu=self.pid)
        return "none" if self.dump is None else self.dump.answer

    def _restore(self, imgdir: Fd) -> str:
        restore.open_images(imgdir.fileno())
        what = manifest.read(imgdir.fileno())
        if what is None:
            return "none"
        name, renamed = self.server.gate.enter(what.migration) if what.migration else ("", False)
        netimages.patch(imgdir.fileno())
        session = Restore(self.server.tools.zygote, self.server.tools.journal, what, self.pid, wanted_name=name)
        if name:
            session.external[dumping.SHMOUNTS_KEY] = f"{INCUS_DIR}/shmounts/{name}"
        answer = session.prepare()
        if renamed:
            answer += f"\ncgroup-root /lxc.payload.{name}"
        self.restore = session
        self.server.restores[self.pid] = session
        log.info("restore by CRIU %d: %d connections", self.pid, len(what.connections))
        return answer

    def _give(self, number: int, reply: Fd) -> None:
        """A restored task asks for its /dev/fuse: it has no other way to the agent than CRIU's inherited connection."""
        with socket.socket(fileno=reply.release()) as sock:
            try:
                if self.restore is None:
                    raise RestoreError(f"FUSE connection {number}", "there is no restore here")
                with self.restore.device(number) as device:
                    socket.send_fds(sock, [b"ok"], [device.fileno()])
            except FusecrError as error:
                sock.send(f"error {error}".encode("utf-8", "surrogateescape")[:4000])

    def _act(self, action: str, init: int, criu: int) -> str:
        if action == "post-dump":
            return "ok" if self.server.post_dump(criu) else "error the source runs on"
        session = self.server.restores.get(criu)
        if session is None:
            return "ok"
        if action == "setup-namespaces":
            session.setup_namespaces(init)
        elif action == "post-setup-namespaces":
            session.create_cgroups(init)
        elif action == "post-restore":
            session.name = scan.container_name(init)
            session.verify(init)
            pressure.rearm(self.server.tools.zygote, restore.tasks_by_ns_pid(init).values())
            if session.manifest.migration:
                self.server.gate.verified(session)
        elif action == "post-resume":
            if session.manifest.migration:
                session.done = True
                self.server.gate.arrived(session)
            else:
                session.hand_over()
        return "ok"

    def _until_criu_ends(self) -> None:
        """The connection closes when CRIU exits, or when it closes its plugin; only CRIU's end decides."""
        if not wait_exit(self.pidfd, CRIU_SECONDS):
            log.error("CRIU %d does not end", self.pid)
        if self.dump is not None:
            try:
                self.server.before_going_on(self.dump)
            except Exception:
                log.exception("%s", self.dump.name)
        if self.dump is not None and self.dump.finish():
            # A CRIU that failed or was killed may have left its network lock: the container would be cut off for ever.
            undo_network_lock(self.server.tools.zygote, self.dump.init)
        session = self.restore
        if session is not None:
            self.server.restores.pop(self.pid, None)
            if not session.done:
                log.warning("%s: CRIU %d ended without having restored", session.name or "restore", self.pid)
                if session.manifest.migration:
                    self.server.gate.lost(session)
                session.drop()
