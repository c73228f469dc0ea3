# SPDX-License-Identifier: Apache-2.0
"""Namespaces."""

from __future__ import annotations

import os

from .libc import check, libc

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000


def setns(fd: int, kinds: int) -> None:
    """setns(2): into the namespaces of kind ``kinds`` of a pidfd, or into the one of an ns fd."""
    check(int(libc.setns(fd, kinds)), f"setns {kinds:#x}")


def unshare(kinds: int) -> None:
    """unshare(2)."""
    check(int(libc.unshare(kinds)), f"unshare {kinds:#x}")


def ns_id(pid: int | str, kind: str) -> str:
    """Identity of a namespace, e.g. ``user:[4026531837]``; ``kind`` as in /proc/PID/ns."""
    return os.readlink(f"/proc/{pid}/ns/{kind}")


def same_ns(pid: int, kind: str) -> bool:
    """Whether ``pid`` is in the caller's namespace of that kind."""
    return ns_id(pid, kind) == ns_id("self", kind)


OVERFLOW_ID = 65534  # what the kernel shows for an id that a user namespace does not map (user_namespaces(7))


class IdMaps:
    """uid_map and gid_map of a process's user namespace, relative to the caller's."""

    def __init__(self, pid: int) -> None:
        self._maps: dict[str, list[tuple[int, int, int]]] = {}
        for what in ("uid", "gid"):
            with open(f"/proc/{pid}/{what}_map") as lines:
                self._maps[what] = [(int(a), int(b), int(c)) for a, b, c in (line.split() for line in lines)]

    def inside(self, uid: int, gid: int) -> tuple[int, int]:
        """Ids of the caller's namespace as the process sees them; :data:`OVERFLOW_ID` where they are not mapped."""
        return self._in("uid", uid), self._in("gid", gid)

    def outside(self, uid: int, gid: int) -> tuple[int, int]:
        """Ids inside as the caller sees them; :data:`OVERFLOW_ID` where they are not mapped."""
        return self._out("uid", uid), self._out("gid", gid)

    def _in(self, what: str, number: int) -> int:
        return next((a + number - b for a, b, n in self._maps[what] if b <= number < b + n), OVERFLOW_ID)

    def _out(self, what: str, number: int) -> int:
        return next((b + number - a for a, b, n in self._maps[what] if a <= number < a + n), OVERFLOW_ID)
