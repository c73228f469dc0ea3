# SPDX-License-Identifier: Apache-2.0
"""Disposable children: the only place where a system call may wait for a FUSE daemon.

The zygote is forked from the agent before any thread or /dev/fuse descriptor exists, so forking from it is safe and fast,
and no child ever inherits a /dev/fuse fd: a process that owns one and closes a FUSE file would wait for an answer
that it should itself give. Each job runs in a child of its own, with a deadline; the child is killed when it overruns.
"""

from __future__ import annotations

import array
import ctypes
import errno
import importlib
import json
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

from ..errors import FusecrError
from .fd import Fd
from .libc import PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_PDEATHSIG, libc, prctl
from .pidfd import pidfd_open, send_signal, wait_exit

MAX_FDS = 200  # SCM_MAX_FD is 253
MAX_RESULT = 64 << 20  # bytes
_LENGTH = struct.Struct("<I")
# The machine is short of something for the moment.
_TRANSIENT = (errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.ENOBUFS)
_PAUSE = 0.05


class JobError(FusecrError):
    """A job failed in its child; ``errno`` is that of the OSError there, or 0. Whoever handles failures handles this one."""

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.errno = number


class JobTimeout(JobError):
    """A job overran its deadline; ``stuck`` tells that even SIGKILL did not end it in time."""

    def __init__(self, message: str, stuck: bool) -> None:
        super().__init__(message, errno.ETIMEDOUT)
        self.stuck = stuck


def _send(sock: socket.socket, message: bytes, fds: Sequence[int] = ()) -> None:
    head = _LENGTH.pack(len(message))
    if fds:
        sock.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    else:
        sock.sendall(head)
    sock.sendall(message)


def _recv(sock: socket.socket) -> tuple[bytes, list[int]]:
    head, ancillary, _, _ = sock.recvmsg(_LENGTH.size, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC | socket.MSG_WAITALL)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % 4])
    if len(head) < _LENGTH.size:
        raise EOFError
    (size,) = _LENGTH.unpack(head)
    if size > MAX_RESULT:
        raise EOFError
    parts = bytearray()
    while len(parts) < size:
        chunk = sock.recv(min(1 << 20, size - len(parts)))
        if not chunk:
            raise EOFError
        parts += chunk
    return bytes(parts), list(fds)


class Zygote:
    """Runs functions in fresh children.

    A job is a module-level function ``f(args: dict, fds: list[int]) -> (result, fds)`` of this package, named
    ``module:function``; arguments and result are JSON.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lock = threading.Lock()
        self._pid = os.fork()
        if self._pid == 0:
            ours.close()
            _zygote_main(theirs)
        theirs.close()
        self._sock = ours
        self._pidfd = pidfd_open(self._pid)
        self._hanging: dict[str, list[Fd]] = {}
        self._hanging_lock = threading.Lock()

    @property
    def pid(self) -> int:
        return self._pid

    def wait_gone(self) -> None:
        """Returns when the zygote has ended: then no job can be done any more."""
        poll = select.poll()
        poll.register(self._pidfd.fileno(), select.POLLIN)
        poll.poll()

    def hangs(self, on: str) -> bool:
        """Whether a child that was killed still hangs on this, in state D."""
        with self._hanging_lock:
            left = []
            for child in self._hanging.pop(on, ()):
                if wait_exit(child, 0):
                    child.close()
                else:
                    left.append(child)
            if left:
                self._hanging[on] = left
            return bool(left)

    def run(
        self, job: str, args: dict[str, Any], fds: Sequence[int] = (), *, deadline: float, on: str = ""
    ) -> tuple[Any, list[Fd]]:
        """Run ``job`` in a child.

        :param deadline: seconds until the child is killed
        :param on: what it may hang on; while a former child does, the job is not begun
        :returns: its result, and the descriptors that it sent
        :raises JobTimeout: it overran, or would
        :raises JobError: it raised, or died, or could not be begun
        """
        if on and self.hangs(on):
            raise JobTimeout(f"a former request still waits for an answer of {on}", True)
        end = time.monotonic() + deadline
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with ours:
                with theirs, self._lock:
                    _send(self._sock, json.dumps({"job": job, "args": args}).encode(), [theirs.fileno(), *fds])
                return self._collect(ours, job, end, on)
        except OSError as error:
            raise JobError(f"{job} could not be begun: {error.strerror}", error.errno or 0) from None

    def _collect(self, sock: socket.socket, job: str, end: float, on: str) -> tuple[Any, list[Fd]]:
        child: Fd | None = None
        try:
            sock.settimeout(max(0.001, end - time.monotonic()))
            message, fds = _recv(sock)
            if not fds:
                # Of the zygote, that could not fork; or we had no descriptor free to get the child's pidfd.
                number = int(json.loads(message)["errno"]) if message else errno.EMFILE
                raise JobError(f"{job} could not be begun: {os.strerror(number)}", number)
            (number,) = fds
            child = Fd(number, f"child of {job}")
            while True:
                sock.settimeout(max(0.001, end - time.monotonic()))
                message, fds = _recv(sock)
                break
            # Closing what it had open may take requests to a daemon: they must be on their way when this returns.
            if not wait_exit(child, max(0.0, end - time.monotonic())):
                for number in fds:
                    os.close(number)
                raise TimeoutError
        except TimeoutError:
            stuck = False
            if child is not None:
                send_signal(child, signal.SIGKILL)
                stuck = not wait_exit(child, 1.0)
                if stuck and on:
                    with self._hanging_lock:
                        self._hanging.setdefault(on, []).append(child)
                    child = None
            raise JobTimeout(f"{job} did not finish in time", stuck) from None
        except (EOFError, ValueError, ConnectionError):
            raise JobError(f"the child of {job} died") from None
        finally:
            if child is not None:
                child.close()
        answer = json.loads(message)
        if "error" in answer:
            for number in fds:
                os.close(number)
            raise JobError(answer["error"], answer.get("errno", 0))
        return answer["result"], [Fd(number, f"from {job}") for number in fds]

    def close(self) -> None:
        """End the zygote; its children end with their own deadlines."""
        self._sock.close()
        try:
            os.waitpid(self._pid, 0)
        except ChildProcessError:
            pass
        self._pidfd.close()
        with self._hanging_lock:
            for child in (child for children in self._hanging.values() for child in children):
                child.close()
            self._hanging.clear()


def _zygote_main(sock: socket.socket) -> None:
    """Never returns."""
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # Children enter containers: without this, root there could ptrace them (ptrace(2), "dumpable").
        prctl(PR_SET_DUMPABLE, 0)
        libc.prctl(PR_SET_NAME, ctypes.c_char_p(b"fusecr-zygote"), 0, 0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
        while True:
            try:
                message, fds = _recv(sock)
            except OSError as error:
                if error.errno not in _TRANSIENT:
                    raise
                time.sleep(_PAUSE)
                continue
            pid = _fork_for(fds)
            if pid == 0:
                sock.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _child_main(message, fds)
            for fd in fds:
                os.close(fd)
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)


def _fork_for(fds: list[int]) -> int:
    """fork(2). If it fails, that is told to who asked: the next one may have more luck, and the zygote is everybody's."""
    try:
        if not fds:
            return -1  # none was free to be received; who asked sees the end of the conversation
        return os.fork()
    except (OSError, MemoryError) as error:
        number = getattr(error, "errno", 0) or errno.ENOMEM
        reply = socket.socket(fileno=fds[0])
        try:
            _send(reply, json.dumps({"errno": number}).encode())
        except OSError:
            pass
        finally:
            reply.detach()
        return -1


def _child_main(message: bytes, fds: list[int]) -> None:
    """Never returns."""
    try:
        # The zygote ends with the agent, and a child with the zygote, unless it hangs in D: then its fds must not matter.
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        reply = socket.socket(fileno=fds[0])
        me = os.pidfd_open(os.getpid())
        _send(reply, b"", [me])
        os.close(me)
        sent: list[int] = []
        try:
            request = json.loads(message)
            module, _, name = request["job"].partition(":")
            function = getattr(importlib.import_module(module), name)
            result, sent = function(request["args"], fds[1:])
            answer = {"result": result}
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            answer = {"error": f"{where}{error.strerror or error}", "errno": error.errno or 0}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        _send(reply, json.dumps(answer).encode(), sent)
    except BaseException:
        os._exit(1)
    finally:
        os._exit(0)
