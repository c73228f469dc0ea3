# SPDX-License-Identifier: Apache-2.0
"""The process that runs one probe: single-threaded, disposable, killed by its parent when it overruns.

Reads one JSON request from stdin, writes one JSON answer to stdout, and gives up when stdin is closed.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from ..errors import FusecrError
from ..linux import ns, proc
from ..linux.libc import PR_SET_DUMPABLE, PR_SET_PDEATHSIG, prctl
from ..linux.mount import MS_PRIVATE, MS_REC, mount
from ..linux.seccomp import Listener
from .connection import CONNECTION_KEY
from .init import InitError, InitReply, InitRequest, parse_reply, parse_request
from .probe_facts import CopyError, Daemon, named_device_fds, printable, read_daemon
from .probe_launch import Launch, receive
from .probe_mounts import MountCalls, MountElsewhere, filter_actions
from .wire import OUT_HEADER

SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
SOCKET_BUFFER = 2 << 20  # bytes: a whole request of the largest size must fit into one message

MAX_OUTPUT = 1 << 20  # bytes of the copy's output that are read at all
KEEP_OUTPUT = 4096  # bytes of it that are kept for the message
MAX_DATAGRAMS = 16  # messages before the reply (notifications have unique 0)
MAX_SOCKETS = 64
MAX_PROCESSES = 1000
CHILDREN_SECONDS = 0.3  # seconds after the copy failed in which its children may still answer
KILL_SECONDS = 2.0
FAILED = "the copy of the daemon {} before it answered FUSE_INIT"


class Attempt:
    """One start of a copy, from fork to the last process' end.

    :param exe: see :class:`Launch`
    """

    def __init__(
        self, daemon: Daemon, pidfd: int, directory: bytes, hook_open: bool, request: InitRequest, exe: int | None = None
    ) -> None:
        self.daemon = daemon
        self.request = request
        self.replies: list[InitReply] = []
        self.why = ""
        self.elsewhere = False
        self.mounts: MountCalls | None = None
        # One that serves several mounts from one process mounts all of them at its start, or cannot be copied.
        self._wanted = max(1, len(daemon.connections))
        self._output = bytearray()
        self._output_total = 0
        self._datagrams = 0
        self._exit: int | None = None
        self._grace: float | None = None
        self._pidfds: dict[str, int] = {}
        self._poll = select.poll()
        self._ready: dict[int, Callable[[], None]] = {}
        self._sockets: list[socket.socket] = []
        self._given: list[socket.socket] = []

        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._out, out = os.pipe2(os.O_CLOEXEC)
        empty, writer = os.pipe2(os.O_CLOEXEC)
        os.close(writer)
        named = {number: self._new_socket() for number in named_device_fds(daemon)}
        launch = Launch(daemon, pidfd, directory, filter_actions(hook_open), theirs, out, empty, named, exe=exe)
        self._entrant = launch.start()
        theirs.close()
        os.close(out)
        os.close(empty)
        self._watch(self._control.fileno(), self._on_control)
        self._watch(self._out, self._on_output)

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._ready[fd] = handler
        self._poll.register(fd, select.POLLIN)

    def _forget(self, fd: int) -> None:
        if self._ready.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _new_socket(self) -> int:
        """A stand-in for /dev/fuse with the kernel's FUSE_INIT already in it."""
        if len(self._sockets) >= MAX_SOCKETS:
            raise OSError("too many mounts")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
                end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        ours.send(self.request.raw)
        self._sockets.append(ours)
        self._given.append(theirs)
        self._watch(ours.fileno(), lambda: self._on_reply(ours))
        return theirs.fileno()

    def _on_control(self) -> None:
        message = receive(self._control)
        if message is None:
            self._fail(FAILED.format("ended"))
            self._forget(self._control.fileno())
            return
        fields, fds = message
        if "pidfd" in fields:
            self._pidfds[str(fields["pidfd"])] = fds[0]
        elif "listener" in fields:
            listener = Listener(fds[0])
            self.mounts = MountCalls(listener, self._new_socket, self._open_elsewhere)
            self._listener = listener
            self._watch(fds[0], self._on_notification)
        elif "error" in fields:
            self._fail(printable(str(fields["error"]).encode(errors="replace"), 400))
        elif "exited" in fields:
            self._exit = int(fields["exited"])
            if self._exit:
                self._grace = time.monotonic() + CHILDREN_SECONDS
        elif "empty" in fields:
            self._fail(FAILED.format(self._how()))

    def _how(self) -> str:
        if self._exit is None:
            return "ended"
        return f"was killed by signal {-self._exit}" if self._exit < 0 else f"exited with status {self._exit}"

    def _on_notification(self) -> None:
        assert self.mounts is not None
        try:
            self.mounts.answer()
        except MountElsewhere:
            self.elsewhere = True
            self._fail("a child of the daemon's copy mounts")

    @property
    def mounted(self) -> bool:
        return bool(self.mounts and self.mounts.mounts)

    def _open_elsewhere(self, tid: int) -> bool:
        """Whether a process of the copy, but not that of thread ``tid``, has /dev/fuse open."""
        todo = [int(proc.fdinfo("self", self._pidfds["init"])["Pid"])]
        mounter = proc.status(tid)["Tgid"]
        seen = 0
        while todo and seen < MAX_PROCESSES:
            pid = todo.pop()
            seen += 1
            try:
                for task in os.listdir(f"/proc/{pid}/task"):
                    todo += map(int, proc.read_text(f"/proc/{pid}/task/{task}/children").split())
                links = [] if str(pid) == mounter else [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in proc.fds(pid)]
            except FileNotFoundError:
                continue
            if any(link.endswith("/dev/fuse") for link in links):
                return True
        return False

    def _on_output(self) -> None:
        chunk = os.read(self._out, 65536)
        self._output_total += len(chunk)
        self._output = (self._output + chunk)[-KEEP_OUTPUT:]
        if not chunk or self._output_total > MAX_OUTPUT:
            self._forget(self._out)

    def _on_reply(self, sock: socket.socket) -> None:
        message = sock.recv(4096, socket.MSG_DONTWAIT)  # a longer one is cut: its header tells
        self._datagrams += 1
        if not message:
            self._forget(sock.fileno())
            return
        if len(message) >= OUT_HEADER.size and OUT_HEADER.unpack_from(message)[2] == 0:
            if self._datagrams >= MAX_DATAGRAMS:
                self._fail("the copy of the daemon sends notifications and does not answer FUSE_INIT")
            return
        try:
            self.replies.append(parse_reply(message, self.request.unique))
        except InitError as error:
            self._fail(f"{error.what}: {error.why}")
            return
        self._forget(sock.fileno())
        if self.replies[-1].raw != self.replies[0].raw:
            self._fail("the daemon has several mounts, and answered FUSE_INIT differently for them")

    def _fail(self, why: str) -> None:
        if not self.why:
            self.why = why

    @property
    def last_line(self) -> str:
        """The last line that the copy printed, made printable."""
        lines = [line for line in bytes(self._output).replace(b"\r", b"\n").split(b"\n") if line.strip()]
        return printable(lines[-1].strip(), 300) if lines else ""

    def run(self, end: float, stopped: Callable[[], bool]) -> None:
        """Serve the copy until it answered, failed, or ``end`` (time.monotonic()) came."""
        while len(self.replies) < self._wanted and not self.why:
            now = time.monotonic()
            if now >= end or stopped():
                answered = f" for {len(self.replies)} of its {self._wanted} mounts only" if self.replies else ""
                self._fail(f"the copy of the daemon did not answer FUSE_INIT in time{answered}")
            elif self._grace is not None and now >= self._grace:
                self._fail(FAILED.format(self._how()))
            else:
                until = end if self._grace is None else min(end, self._grace)
                for fd, events in self._poll.poll(max(1, min(500, (until - now) * 1000))):
                    self._handle(fd, events)
        if self._out in self._ready and self.why:
            os.set_blocking(self._out, False)
            try:
                self._on_output()
            except BlockingIOError:
                pass

    def _handle(self, fd: int, events: int) -> None:
        handler = self._ready.get(fd)
        if handler is None or self.why:
            return
        if events & select.POLLIN:
            handler()
        elif events & (select.POLLHUP | select.POLLERR):
            self._forget(fd)
            if fd == self._control.fileno():
                self._fail(FAILED.format(self._how()))

    def close(self) -> None:
        """Kill everything and wait.

        :raises CopyError: something did not die in time
        """
        init = self._pidfds.get("init")
        if init is not None:
            _kill(init)
        deadline = time.monotonic() + KILL_SECONDS
        if not self._reap(deadline if init is not None else time.monotonic()):
            for pidfd in reversed(self._pidfds.values()):
                _kill(pidfd)
            os.kill(self._entrant, signal.SIGKILL)
            if not self._reap(time.monotonic() + KILL_SECONDS):
                raise CopyError("kill the copy of the daemon", f"process {self._entrant} does not die (state D?)")
        gone = select.poll()
        for name, pidfd in self._pidfds.items():
            gone.register(pidfd, select.POLLIN)
            if not gone.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise CopyError("kill the copy of the daemon", f"its {name} process does not die (state D?)")
            gone.unregister(pidfd)
            os.close(pidfd)
        for sock in (*self._sockets, *self._given, self._control):
            sock.close()
        os.close(self._out)
        if self.mounts is not None:
            self.mounts.close()
            self._listener.close()

    def _reap(self, deadline: float) -> bool:
        """Whether the entrant, and with it the whole chain below it, has ended."""
        pidfd = os.pidfd_open(self._entrant)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return False
            os.waitpid(self._entrant, 0)
            return True
        finally:
            os.close(pidfd)


def _kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass


def probe(pid: int, connections: frozenset[int], request: InitRequest, seconds: float) -> dict[str, Any]:
    """Try to get the reply: with each directory that the daemon may have been started in, then with hooked
    open().

    :returns: ``{"reply": hex}`` or ``{"error": {...}}``
    """
    end = time.monotonic() + seconds
    command = "?"
    pidfd: int | None = None
    try:
        pidfd = os.pidfd_open(pid)
        daemon = read_daemon(pid, connections)
        command = daemon.command
        signal.pidfd_send_signal(pidfd, 0)  # still the process whose /proc was read
        return _try_all(daemon, pidfd, request, end)
    except ProcessLookupError:
        return _error(pid, command, "the process is gone", "")
    except FusecrError as error:
        return _error(pid, command, f"{error.what}: {error.why}", error.hint)
    except ValueError as error:  # a message that none of ours sent
        return _error(pid, command, printable(f"unexpected message: {error}".encode(errors="replace")), "")
    except OSError as error:
        if pidfd is not None and _readable(pidfd):
            return _error(pid, command, "the daemon ended meanwhile", "")
        where = f"{error.filename}: " if error.filename else ""
        return _error(pid, command, printable(f"{where}{error.strerror or error}".encode(), 400), "")


_HINT = "a second copy of this daemon must be able to start next to the first; unmount it, or let it be recorded when it mounts"


def _error(pid: int, command: str, why: str, hint: str) -> dict[str, Any]:
    what = f"learn the FUSE_INIT reply of daemon {pid} ({command})"
    return {"error": {"what": what, "why": why, "hint": hint}, "command": command}


def _try_all(daemon: Daemon, pidfd: int, request: InitRequest, end: float) -> dict[str, Any]:
    first = ""
    starts = [(directory, False) for directory in daemon.directories]
    while starts and (now := time.monotonic()) < end and not _orphaned():
        directory, hook_open = starts.pop(0)
        attempt = Attempt(daemon, pidfd, directory, hook_open, request)
        try:
            # A copy that fails does so at once; one that hangs must leave time for the next start.
            attempt.run(now + (end - now) / 2 if starts else end, _orphaned)
        finally:
            attempt.close()
        if attempt.replies and not attempt.why:
            return {"reply": attempt.replies[0].raw.hex()}
        why = attempt.why + (f"; it said: {attempt.last_line}" if attempt.last_line else "")
        if attempt.elsewhere:
            starts = [(directory, True)]
        elif attempt.mounted:
            return _error(daemon.pid, daemon.command, why, _HINT)  # it started well: another directory changes nothing
        first = first or why
    return _error(daemon.pid, daemon.command, first or "no time was left to start a copy", _HINT)


def _readable(pidfd: int) -> bool:
    """Whether the process has exited."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _orphaned() -> bool:
    """Whether the parent gave up: it closed our stdin."""
    poll = select.poll()
    poll.register(0, 0)
    return bool(poll.poll(0))


def read_kernel() -> dict[str, Any]:
    """The FUSE_INIT that this kernel sends, and whether fdinfo names a descriptor's connection (Linux 6.16).

    Of a mount that exists only in a private mount namespace, in a child.
    """
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            ns.unshare(ns.CLONE_NEWNS)
            mount("none", "/", "none", MS_REC | MS_PRIVATE, "")
            device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            sender.sendmsg([b"open"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [device]))])
            # Nobody resolves a path there any more: this process pauses, and ends with its namespace.
            mount("fusecr-init", "/proc", "fuse", 0, f"fd={device},rootmode=40000,user_id=0,group_id=0")
            sender.send(b"mounted")
            signal.pause()
        except OSError as error:
            sender.send(f"{error.filename or 'FUSE_INIT'}: {error.strerror}".encode())
        finally:
            os._exit(1)
    sender.close()
    try:
        return _read_init(receiver)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        receiver.close()


def _read_init(receiver: socket.socket) -> dict[str, Any]:
    receiver.settimeout(5)
    text, ancillary, _flags, _address = receiver.recvmsg(1000, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    if not ancillary:
        raise CopyError("read this kernel's FUSE_INIT", text.decode(), "modprobe fuse; see that /dev/fuse is there")
    device = array.array("i", ancillary[0][2])[0]
    try:
        text = receiver.recv(1000)
        if text != b"mounted":
            raise CopyError("read this kernel's FUSE_INIT", text.decode())
        poll = select.poll()
        poll.register(device, select.POLLIN)
        if not poll.poll(5000):
            raise CopyError("read this kernel's FUSE_INIT", "the kernel sent none within 5 s")
        message = os.read(device, 1 << 16)
        return {"request": message.hex(), "names_connections": CONNECTION_KEY in proc.fdinfo("self", device)}
    finally:
        os.close(device)  # ends the connection before the namespace goes: nobody waits for an answer


def main() -> None:
    """Entry point of the helper process."""
    prctl(PR_SET_DUMPABLE, 0)
    request = json.loads(sys.stdin.readline())
    answer: dict[str, Any]
    if request["op"] == "kernel":
        try:
            answer = read_kernel()
        except FusecrError as error:
            answer = {"error": error.to_dict()}
        except OSError as error:
            answer = {"error": CopyError("read this kernel's FUSE_INIT", str(error)).to_dict()}
    else:
        answer = probe(
            int(request["pid"]),
            frozenset(request["connections"]),
            parse_request(bytes.fromhex(request["request"])),
            float(request["seconds"]),
        )
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
