# SPDX-License-Identifier: Apache-2.0
"""Answers the mount calls of a daemon's copy: a FUSE mount gets a socket in place of /dev/fuse, nothing is
mounted.

mount(2) has the descriptor in its data (``fd=N``); the mount API of 5.2 has it in fsconfig(2). In both cases
the descriptor N of the caller becomes the socket and the call is reported as done. Everything else that would
change mounts fails, or is reported as done where daemons do it in passing (bind mounts, propagation,
remounts).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable

from ..linux.mount import MS_BIND, MS_PRIVATE, MS_REMOUNT, MS_SLAVE
from ..linux.seccomp import SECCOMP_RET_USER_NOTIF, Listener, Notification, number, read_string, ret_errno

MS_MOVE = 8192
MS_UNBINDABLE = 1 << 17
MS_SHARED = 1 << 20
_NO_NEW_FILE_SYSTEM = MS_BIND | MS_MOVE | MS_REMOUNT | MS_PRIVATE | MS_SLAVE | MS_SHARED | MS_UNBINDABLE

FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_STRING = 1
FSCONFIG_SET_FD = 5
FSCONFIG_CMD_CREATE = 6
FSCONFIG_CMD_CREATE_EXCL = 8

# _IO(229, 3), since 6.18: INIT is read by another thread while mount(2) waits. A thread that sits in read(2) of the device
# would not notice that its descriptor has become a socket. Without the request the daemon asks for the classic way.
FUSE_DEV_IOC_SYNC_INIT = 0xE503
DENIED_IOCTLS = {FUSE_DEV_IOC_SYNC_INIT: ret_errno(errno.ENOTTY)}

_MOUNT_CALLS = ("mount", "fsopen", "fsconfig", "fsmount", "move_mount")
_OPEN_CALLS = ("open", "openat", "openat2")

# The module calls, kexec and open_by_handle_at are what liblxc's default filter denies (common.seccomp, with Incus' ENOSYS).
# The copy has the daemon's own filters besides, but a daemon that came in by nsenter has none.
# umount2: a daemon's copy must not take away the real mount; EINVAL is "not a mount point".
_DENIED = {
    "kexec_load": errno.ENOSYS,
    "open_by_handle_at": errno.ENOSYS,
    "init_module": errno.ENOSYS,
    "finit_module": errno.ENOSYS,
    "delete_module": errno.ENOSYS,
    "kexec_file_load": errno.ENOSYS,
    "umount2": errno.EINVAL,
    "pivot_root": errno.EPERM,
    "open_tree": errno.EPERM,
    "open_tree_attr": errno.EPERM,
    "fspick": errno.EPERM,
    "mount_setattr": errno.EPERM,
}

_FD_OPTION = re.compile(rb"(?:^|,)fd=(\d{1,7})(?=,|$)")


def filter_actions(hook_open: bool) -> dict[str, int]:
    """The copy's filter: system call -> seccomp value.

    :param hook_open: also be asked about every open(): for daemons whose mount(2) comes from a forked child,
        where replacing the child's descriptor does not help the daemon (glusterfs), or that read from it
        before (SYNC_INIT)
    """
    actions = {name: ret_errno(num) for name, num in _DENIED.items()}
    for name in _MOUNT_CALLS + (_OPEN_CALLS if hook_open else ()):
        actions[name] = SECCOMP_RET_USER_NOTIF
    return actions


class MountElsewhere(Exception):
    """mount(2) comes from one process, and another one has the device open: start again with hooked open()."""


class MountCalls:
    """The answers for one copy. Runs in the disposable helper: reading the caller's memory may wait.

    :param socket: makes the descriptor that takes the place of /dev/fuse; called for each mount
    :param elsewhere: whether a process of the copy other than that of a thread id has /dev/fuse open
    """

    def __init__(self, listener: Listener, socket: Callable[[], int], elsewhere: Callable[[int], bool]) -> None:
        self._listener = listener
        self._socket = socket
        self._elsewhere = elsewhere
        self._contexts: dict[int, int] = {}  # fsopen() descriptor -> fd that fsconfig() named
        self._opened = False
        self.mounts = 0
        self._handlers = {
            number(name): getattr(self, f"_{name}") for name in (*_MOUNT_CALLS, *_OPEN_CALLS) if number(name) is not None
        }
        # What fsopen() and fsmount() return: something harmless to hold and to read messages from (end of
        # file).
        self._dummy, other = os.pipe2(os.O_CLOEXEC)
        os.close(other)

    def close(self) -> None:
        os.close(self._dummy)

    def answer(self) -> None:
        """Answer the notification that is waiting.

        :raises MountElsewhere: the copy has to be started anew
        """
        note = self._listener.receive()
        if note is None:
            return
        try:
            self._handlers[note.nr](note)
        except OSError:
            # The caller died, or named memory or a descriptor that is not there.
            self._listener.fail(note, errno.EFAULT)

    def _string(self, note: Notification, index: int) -> bytes:
        return read_string(note.pid, note.args[index])

    def _give(self, note: Notification, fd: int) -> None:
        if not self._opened:
            if self._elsewhere(note.pid):
                raise MountElsewhere
            self._listener.replace_fd(note, self._socket(), fd)
        self.mounts += 1
        self._listener.succeed(note)

    def _mount(self, note: Notification) -> None:
        flags = note.args[3] & 0xFFFFFFFF
        if flags & _NO_NEW_FILE_SYSTEM:
            self._listener.succeed(note)
            return
        fds = _FD_OPTION.findall(self._string(note, 4))
        if is_fuse(self._string(note, 2)) and fds:
            self._give(note, int(fds[-1]))
        else:
            self._listener.fail(note, errno.EPERM)

    def _fsopen(self, note: Notification) -> None:
        if is_fuse(self._string(note, 0)):
            self._listener.succeed_with_fd(note, self._dummy, cloexec=bool(note.args[1] & FSOPEN_CLOEXEC))
        else:
            self._listener.fail(note, errno.EPERM)

    def _fsconfig(self, note: Notification) -> None:
        context, command = note.args[0] & 0xFFFFFFFF, note.args[1] & 0xFFFFFFFF
        if command in (FSCONFIG_SET_STRING, FSCONFIG_SET_FD) and self._string(note, 2) == b"fd":
            value = str(note.args[4]).encode() if command == FSCONFIG_SET_FD else self._string(note, 3)
            if value.isdigit() and len(value) <= 7 and len(self._contexts) < 1024:
                self._contexts[context] = int(value)
        if command in (FSCONFIG_CMD_CREATE, FSCONFIG_CMD_CREATE_EXCL):
            if context not in self._contexts:
                self._listener.fail(note, errno.EINVAL)
                return
            self._give(note, self._contexts.pop(context))
        else:
            self._listener.succeed(note)

    def _fsmount(self, note: Notification) -> None:
        self._listener.succeed_with_fd(note, self._dummy, cloexec=bool(note.args[1] & FSMOUNT_CLOEXEC))

    def _move_mount(self, note: Notification) -> None:
        self._listener.succeed(note)

    def _opened_device(self, note: Notification, path: bytes, flags: int) -> None:
        if path != b"/dev/fuse":
            self._listener.let(note)
            return
        self._opened = True
        self._listener.succeed_with_fd(note, self._socket(), cloexec=bool(flags & os.O_CLOEXEC))

    def _open(self, note: Notification) -> None:
        self._opened_device(note, self._string(note, 0), note.args[1])

    def _openat(self, note: Notification) -> None:
        self._opened_device(note, self._string(note, 1), note.args[2])

    def _openat2(self, note: Notification) -> None:
        self._opened_device(note, self._string(note, 1), os.O_CLOEXEC)


def is_fuse(fstype: bytes) -> bool:
    """fuse, fuseblk, and both with a subtype."""
    return fstype.partition(b".")[0] in (b"fuse", b"fuseblk")
