# SPDX-License-Identifier: Apache-2.0
"""inotify(7), to be woken by files that change. What the events say is not read: whoever is woken looks at the files."""

from __future__ import annotations

import os
from contextlib import suppress

from .fd import Fd
from .libc import check, libc

IN_MODIFY = 0x2
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_ONLYDIR = 0x1000000
IN_NONBLOCK = os.O_NONBLOCK
IN_CLOEXEC = os.O_CLOEXEC


class Inotify:
    """One inotify instance; each path is watched once.

    :raises OSError: EMFILE: too many instances of this user (fs.inotify.max_user_instances)
    """

    def __init__(self) -> None:
        self._fd = Fd(check(int(libc.inotify_init1(IN_NONBLOCK | IN_CLOEXEC)), "inotify_init1"), "inotify")
        self._watches: dict[str, int] = {}

    def fileno(self) -> int:
        return self._fd.fileno()

    def watch(self, path: str, mask: int) -> None:
        """Be woken by IN_* events of ``path``; once it is gone it is to be given up by :meth:`forget`.

        :raises OSError: ENOENT; ENOSPC: too many watches of this user (fs.inotify.max_user_watches)
        """
        if path not in self._watches:
            self._watches[path] = check(int(libc.inotify_add_watch(self.fileno(), os.fsencode(path), mask)), path)

    def forget(self, path: str) -> None:
        """kernfs keeps the watch of a file that is gone until it is taken away."""
        watch = self._watches.pop(path, None)
        if watch is not None:
            libc.inotify_rm_watch(self.fileno(), watch)

    @property
    def watched(self) -> list[str]:
        return list(self._watches)

    def drain(self) -> None:
        """Forget what has happened up to now."""
        with suppress(BlockingIOError):
            while os.read(self.fileno(), 1 << 16):
                pass

    def close(self) -> None:
        self._fd.close()
