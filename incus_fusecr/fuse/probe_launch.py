# SPDX-License-Identifier: Apache-2.0
"""Starts a daemon's copy inside the daemon's container: four processes, each forked for one reason.

entrant   enters cgroups and namespaces (all but pid take effect at once)
inner     is in the container's pid namespace; makes a new pid namespace below it
init      pid 1 of that: when it dies the kernel kills whatever the copy forked, however it daemonized
copy      takes the daemon's limits, ids, capabilities, filter and label, then execs the daemon

A copy that is to stay (recovery/) is one of the container's own processes instead: in its mount namespace and pid namespace,
a child of its init, with its /dev/null, and nothing that leads out of it. There is no ``init`` then.

Until the exec none of them is dumpable and their memory belongs to the host's user namespace (ptrace(2)):
root of the container can kill them, no more. After setns(2) no Python module may be imported: the path leads
into the container.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from ..linux import caps, ns, seccomp
from ..linux.libc import (
    AT_EMPTY_PATH,
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    SYS_close_range,
    check,
    libc,
    prctl,
    syscall,
)
from ..linux.mount import MNT_DETACH, MS_PRIVATE, MS_REC
from ..linux.seccomp import SYSCALLS, machine
from .probe_facts import MAX_MOUNTINFO, Daemon, fuse_mounts
from .probe_mounts import DENIED_IOCTLS

KEYCTL_JOIN_SESSION_KEYRING = 1
CLOSE_RANGE_CLOEXEC = 4
UMOUNT_NOFOLLOW = 8
DETACH_ROUNDS = 8
KILL_AFTER = 1.0  # seconds
STAY_SECONDS = 15  # at most until the exec of a copy that stays
MAX_MESSAGE = 8192  # bytes
NULL_DEVICE = os.makedev(1, 3)


# To make the pid namespace, to install the filter and to become the daemon's user.
_NEEDED = 1 << caps.CAP_SETGID | 1 << caps.CAP_SETUID | 1 << caps.CAP_SETPCAP | 1 << caps.CAP_SYS_ADMIN


class Launch:
    """What the four processes need; made in the helper before the first fork.

    :param control: SEQPACKET socket to the helper: errors, pidfds, the seccomp listener, exit states
    :param output: write end of the pipe for stdout and stderr
    :param empty: read end of a pipe without writer, for stdin. Not /dev/null: through a descriptor of the
        host's node root of a privileged container could change its mode.
    :param sockets: descriptor number -> socket, for daemons whose command line names ``/dev/fd/N``
    :param pidfd: of a process whose namespaces are the daemon's; ``daemon.pid`` is that process
    :param exe: O_PATH descriptor of the program, which this object owns from here on; None: that of ``daemon.pid``
    :param stay: the copy is to live in the container, and mounts for itself: ``hook`` and ``sockets`` mean nothing
    """

    def __init__(
        self,
        daemon: Daemon,
        pidfd: int,
        directory: bytes,
        hook: dict[str, int],
        control: socket.socket,
        output: int,
        empty: int,
        sockets: dict[int, int],
        *,
        exe: int | None = None,
        stay: bool = False,
    ) -> None:
        self.daemon = daemon
        self.pidfd = pidfd
        self.directory = directory
        self.hook = hook
        self.control = control
        self.output = output
        self.empty = empty
        self.sockets = sockets
        self.stay = stay
        self.proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.root = os.open(f"/proc/{daemon.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.exe = os.open(f"/proc/{daemon.pid}/exe", os.O_PATH | os.O_CLOEXEC) if exe is None else exe
        self.last_cap = caps.last_cap()
        self.machine = machine()  # uname(2), asked before the uts namespace is the container's

    def start(self) -> int:
        """Fork the entrant; returns its pid."""
        pid = os.fork()
        if pid == 0:
            self._guarded(self._entrant)
        os.close(self.proc)
        os.close(self.root)
        os.close(self.exe)
        return pid

    def tell(self, fds: tuple[int, ...] = (), **message: Any) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.control.sendmsg([json.dumps(message).encode()[:MAX_MESSAGE]], ancillary)

    def _guarded(self, body: Callable[[], None]) -> NoReturn:
        """Run one of the four; it never returns into the helper's code."""
        try:
            prctl(PR_SET_DUMPABLE, 0)
            body()
            os._exit(0)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            self._fail(f"{where}{error.strerror or error}")
        except BaseException as error:
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, why: str) -> NoReturn:
        try:
            self.tell(error=why[:1000])
        finally:
            os._exit(1)

    # --- entrant
    # ---------------------------------------------------------------------------------------------

    def _entrant(self) -> None:
        self._close_others()
        sys.meta_path.clear()
        sys.path.clear()
        os.setsid()
        os.setgroups([])
        for directory in self.daemon.cgroups:
            with open(f"{directory}/cgroup.procs", "wb", buffering=0) as file:
                file.write(b"0")
        # The first to go when memory is short in the container is the copy, not the workload.
        with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
            file.write(b"%d" % (self.daemon.oom_score_adj if self.stay else 1000))
        self._raise_hard_limits()
        if self.daemon.namespaces:
            ns.setns(self.pidfd, self.daemon.namespaces)
        prctl(PR_SET_DUMPABLE, 0)  # a change of credentials resets it to fs.suid_dumpable
        os.fchdir(self.root)
        os.chroot(".")
        if not self.stay:
            ns.unshare(ns.CLONE_NEWNS)  # moves root and cwd over to the copies of their mounts
            self._detach_mounts()
        # Root of a privileged container can ptrace what it sees, and must not gain a capability by that.
        keep = self.daemon.caps.bounding | _NEEDED
        caps.limit_bounding(keep, self.last_cap)
        keep &= caps.capget()[0]
        caps.capset(keep, keep, 0)
        # The agent's session keyring must not be searchable from the container.
        syscall(SYSCALLS[self.machine]["keyctl"], KEYCTL_JOIN_SESSION_KEYRING, 0, what="session keyring")
        pid = os.fork()
        if pid == 0:
            self._guarded(self._leave_behind if self.stay else self._inner)
        inner = os.pidfd_open(pid)
        self.tell((inner,), pidfd="inner")
        self._outlast(inner)
        os.waitpid(pid, 0)

    def _outlast(self, inner: int) -> None:
        """Until inner has ended. When the helper dies, init sees it and ends; if it was stopped, it is
        killed.

        No PDEATHSIG here: inner would be left to the host's init, and the container's pid namespace could not
        end before that has reaped it.
        """
        poll = select.poll()
        poll.register(inner, select.POLLIN)
        poll.register(self.control.fileno(), 0)
        if inner not in dict(poll.poll()):
            poll.unregister(self.control.fileno())
            if not poll.poll(KILL_AFTER * 1000):
                signal.pidfd_send_signal(inner, signal.SIGKILL)

    def _close_others(self) -> None:
        """The helper's own ends above all: while a copy of one is open here, nobody sees that the helper died."""
        kept = {self.control.fileno(), self.output, self.empty, self.proc, self.root, self.exe, self.pidfd, *self.sockets.values()}
        for number in (0, 1, 2):
            os.dup2(self.empty if number == 0 else self.output, number)
        for name in os.listdir("/proc/self/fd"):
            number = int(name)
            if number > 2 and number not in kept:
                try:
                    os.close(number)
                except OSError:
                    continue  # the one of this listing

    def _raise_hard_limits(self) -> None:
        """Later there is no CAP_SYS_RESOURCE."""
        for kind, _soft, hard in self.daemon.limits:
            soft_now, hard_now = resource.getrlimit(kind)
            if _higher(hard, hard_now):
                try:
                    resource.setrlimit(kind, (soft_now, hard))
                except ValueError:  # the agent itself may not: the copy gets what there is
                    continue

    def _detach_mounts(self) -> None:
        """Uncover what is below the daemon's mount, in this private copy of the mount namespace only."""
        # Private first: the copy of a shared mount is its peer, and an umount propagates.
        check(
            int(libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)),
            "make mounts private",
        )
        for _ in range(DETACH_ROUNDS):
            mounts = self._proc_self("mountinfo")
            if not mounts:
                raise OSError(errno.EXDEV, "the daemon's root directory is not in its mount namespace")
            targets = fuse_mounts(mounts, self.daemon.connections, self.daemon.mountpoint)
            if not targets:
                return
            for target in targets:
                if libc.umount2(os.fsencode(target), MNT_DETACH | UMOUNT_NOFOLLOW) < 0:
                    num = ctypes.get_errno()
                    if num not in (errno.EINVAL, errno.ENOENT):  # went with its parent
                        raise OSError(num, os.strerror(num), f"detach {target}")
        raise OSError(errno.EBUSY, "cannot be detached in a copy of the mount namespace", targets[0])

    def _proc_self(self, name: str) -> bytes:
        """A file of this process in the host's /proc: the container's may be anything."""
        fd = os.open(f"self/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.proc)
        out = b""
        with open(fd, "rb", buffering=0) as file:
            while (chunk := file.read(1 << 16)) and len(out) < MAX_MOUNTINFO:
                out += chunk
        return out

    # --- inner
    # -----------------------------------------------------------------------------------------------

    def _inner(self) -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        ns.unshare(ns.CLONE_NEWPID)
        told, telling = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            os.close(telling)
            self._guarded(lambda: self._init(told))
        os.close(told)
        self.tell((os.pidfd_open(pid),), pidfd="init")
        os.close(telling)
        os.waitpid(pid, 0)

    def _leave_behind(self) -> None:
        """The copy's parent ends at once: it is the child of the container's init then."""
        told, telling = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            os.close(telling)
            os.read(told, 1)  # so it is not reaped before somebody can tell that it ended
            os.close(told)
            # Nobody waits for it any more should a file system of the container's hold it up before it is the daemon.
            signal.alarm(STAY_SECONDS)
            self._guarded(self._copy)
        self.tell((os.pidfd_open(pid),), pidfd="copy")

    # --- init
    # ------------------------------------------------------------------------------------------------

    def _init(self, told: int) -> None:
        """Reap, report, and end when the helper does.

        :param told: at its end once the helper knows of this process: what the copy does is judged by it
        """
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.read(told, 1)
        os.close(told)
        wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        copy = os.fork()
        if copy == 0:
            signal.set_wakeup_fd(-1)
            self._guarded(self._copy)
        os.close(self.output)
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        poll.register(self.control.fileno(), 0)  # POLLHUP: the helper is gone
        while True:
            try:
                while (reaped := os.waitpid(-1, os.WNOHANG))[0]:
                    if reaped[0] == copy:
                        self.tell(exited=os.waitstatus_to_exitcode(reaped[1]))
            except ChildProcessError:
                self.tell(empty=True)
                return
            for fd, _events in poll.poll():
                if fd != wake:
                    return
                os.read(wake, 4096)

    # --- copy
    # ------------------------------------------------------------------------------------------------

    def _copy(self) -> None:
        daemon = self.daemon
        os.setsid()
        _default_signals()
        os.umask(daemon.umask)
        try:
            os.chdir(self.directory)
        except OSError:
            os.chdir(b"/")
        if daemon.label:
            # A file of the writer itself, opened by it (proc_pid_attr_write()); takes effect at exec.
            fd = os.open("self/attr/exec", os.O_WRONLY | os.O_CLOEXEC, dir_fd=self.proc)
            os.write(fd, b"exec " + os.fsencode(daemon.label))
            os.close(fd)
        exe = self._executable()
        if self.stay:
            self._take_null()
        self._drop_privileges()
        argv, envp = _vector(daemon.argv), _vector(daemon.environ)
        self._place_fds()
        self._set_limits()
        signal.alarm(0)
        self._filter()
        if exe is not None:
            libc.execve(exe, argv, envp)
        else:
            execveat = SYSCALLS[self.machine]["execveat"]
            libc.syscall(ctypes.c_long(execveat), self.exe, b"", argv, envp, AT_EMPTY_PATH)
        num = ctypes.get_errno()
        raise OSError(num, os.strerror(num), f"exec {daemon.exe}")

    def _executable(self) -> bytes | None:
        """The path of the daemon's program if it still leads there; None to use the open file (it was
        replaced).
        """
        path = os.fsencode(self.daemon.exe)
        try:
            there, want = os.stat(path), os.fstat(self.exe)
        except OSError:
            return None
        return path if (there.st_dev, there.st_ino) == (want.st_dev, want.st_ino) else None

    def _take_null(self) -> None:
        """Standard streams of the container's own, or else none: what leads to a process outside could not be dumped by CRIU."""
        try:
            found = os.open("/dev/null", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            if os.fstat(found).st_rdev != NULL_DEVICE:
                return
            opened = os.open(f"self/fd/{found}", os.O_RDWR | os.O_CLOEXEC, dir_fd=self.proc)
        except OSError:
            return
        os.close(found)
        self.output = self.empty = opened

    def _drop_privileges(self) -> None:
        daemon, sets = self.daemon, self.daemon.caps
        # At exec root gets its whole bounding set (capabilities(7)): a daemon that runs as root with fewer
        # must not have a copy with more.
        bounding = sets.bounding & (sets.permitted | sets.inheritable) if daemon.uids[1] == 0 else sets.bounding
        prctl(caps.PR_SET_KEEPCAPS, 1)
        caps.limit_bounding(bounding, self.last_cap)
        try:
            os.setgroups(daemon.groups)
        except PermissionError:  # setgroups "deny" in a user namespace without privileges: it stays empty
            pass
        os.setresgid(*daemon.gids)
        os.setresuid(*daemon.uids)
        permitted, _effective, inheritable = caps.capget()
        caps.capset(permitted, permitted, inheritable)
        prctl(PR_SET_DUMPABLE, 0)
        if daemon.no_new_privs:
            prctl(caps.PR_SET_NO_NEW_PRIVS, 1)

    def _filter(self) -> None:
        """The last steps before exec: a filter of the daemon may forbid what the earlier ones need."""
        for program in self.daemon.filters:
            seccomp.install(program, listener=False)
        if not self.stay:
            # Of two filters that ask for a notification, the newer one gets it (seccomp(2)).
            listener = seccomp.install(seccomp.build_filter(self.hook, DENIED_IOCTLS), listener=True)
            self.tell((listener,), listener=True)
            os.close(listener)
        sets = self.daemon.caps
        permitted = caps.capget()[0]
        caps.capset(sets.permitted & permitted, sets.effective & permitted, sets.inheritable & permitted)
        caps.set_ambient(sets.ambient & sets.inheritable & sets.permitted & permitted, self.last_cap)
        prctl(PR_SET_DUMPABLE, 0)

    def _set_limits(self) -> None:
        for kind, soft, hard in self.daemon.limits:
            most = resource.getrlimit(kind)[1]
            hard = most if _higher(hard, most) else hard
            soft = hard if _higher(soft, hard) else soft
            no_core = kind == resource.RLIMIT_CORE and not self.stay
            resource.setrlimit(kind, (0, 0) if no_core else (soft, hard))

    def _place_fds(self) -> None:
        """Nothing survives the exec but stdio and the sockets that the command line names."""
        high = 1 + max([2, *self.sockets, self.output, self.empty, self.exe, self.control.fileno()])
        moved = {number: _dup_above(sock, high) for number, sock in self.sockets.items()}
        self.exe = _dup_above(self.exe, high)
        self.control = socket.socket(fileno=_dup_above(self.control.detach(), high))
        os.dup2(self.output, 1)
        os.dup2(self.output, 2)
        os.dup2(self.empty, 0)
        for number, sock in moved.items():
            os.dup2(sock, number)
        syscall(SYS_close_range, 3, 0xFFFFFFFF, CLOSE_RANGE_CLOEXEC, what="close_range")
        for number in moved:
            os.set_inheritable(number, True)


def _higher(one: int, other: int) -> bool:
    """Whether resource limit ``one`` allows more than ``other``."""
    return other != resource.RLIM_INFINITY and (one == resource.RLIM_INFINITY or one > other)


def _dup_above(fd: int, low: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, low)


def _vector(strings: list[bytes]) -> Any:
    return (ctypes.c_char_p * (len(strings) + 1))(*strings, None)


def _default_signals() -> None:
    for signum in signal.valid_signals():
        if signum not in (signal.SIGKILL, signal.SIGSTOP):
            try:
                signal.signal(signum, signal.SIG_DFL)
            except OSError:
                continue  # reserved by libc
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def receive(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """One message of the four processes and its descriptors; None at the end."""
    data, ancillary, _flags, _address = control.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, raw in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += struct.unpack(f"<{len(raw) // 4}i", raw[: len(raw) // 4 * 4])
    return (json.loads(data), fds) if data else None
