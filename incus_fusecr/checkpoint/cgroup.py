# SPDX-License-Identifier: Apache-2.0
"""The cgroup v2 freezer (Documentation/admin-guide/cgroup-v2.rst, "cgroup.freeze")."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..linux.ns import OVERFLOW_ID
from ..linux.proc import cgroup_pids, children_of_cgroup, read_text

PAYLOADS = "/sys/fs/cgroup"
POLL = 0.001
# What liblxc gives to a container of its own cgroup (cgroups/cgfsng.c chown_cgroup()): the others hold its limits.
DELEGATED = ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads")


@dataclass(frozen=True)
class Delegated:
    """A cgroup directory: path below the container's, permission bits, owner in the container's numbers, and the names of
    the files in it that are the container's, too (the kernel gives a cgroup's files to who makes it; liblxc a few of the first).
    """

    path: str
    mode: int
    uid: int
    gid: int
    files: list[str]


class Cgroup:
    """One cgroup directory.

    :param identity: that of the very directory that is meant, for :meth:`write`; 0: whatever has the name
    """

    def __init__(self, path: str, identity: int = 0) -> None:
        self.path = path
        self.identity = identity

    def identify(self) -> Cgroup:
        """The directory that has the name now, and no later one of that name: kernfs never gives an inode number again.

        :raises FileNotFoundError: there is none
        """
        return Cgroup(self.path, os.stat(self.path).st_ino)

    def write(self, name: str, text: str) -> bool:
        """Write one of its files; False if this very cgroup is gone.

        :raises OSError: it could not be written
        """
        try:
            directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if self.identity and os.fstat(directory).st_ino != self.identity:
                    return False
                file = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
                try:
                    os.write(file, text.encode())
                finally:
                    os.close(file)
            finally:
                os.close(directory)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                return False
            raise
        return True

    @property
    def frozen_wanted(self) -> bool:
        """Whether somebody wrote 1 to cgroup.freeze."""
        return read_text(f"{self.path}/cgroup.freeze").strip() == "1"

    @property
    def frozen(self) -> bool:
        """Whether all tasks in it are frozen."""
        return "frozen 1" in read_text(f"{self.path}/cgroup.events")

    def write_freeze(self, on: bool) -> None:
        """Freeze or thaw; returns at once.

        :raises OSError: with path
        """
        with open(f"{self.path}/cgroup.freeze", "w") as file:
            file.write("1" if on else "0")

    def wait_frozen(self, seconds: float) -> bool:
        """Wait until all tasks are frozen; False at the deadline."""
        deadline = time.monotonic() + seconds
        while not self.frozen:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL)
        return True

    def pids(self) -> list[int]:
        """Processes in it and below."""
        return cgroup_pids(self.path)

    def exists(self) -> bool:
        return os.path.isdir(self.path)

    def tree(self, inside: Callable[[int, int], tuple[int, int]]) -> list[Delegated]:
        """This cgroup (path ``.``) and all below it, parents first.

        :param inside: (uid, gid) of this host -> in the container
        """
        found = []
        for path in sorted(children_of_cgroup(self.path)):
            info = os.stat(path)
            uid, gid = inside(info.st_uid, info.st_gid)
            files = [e.name for e in os.scandir(path) if e.is_file() and _mapped(*inside(e.stat().st_uid, e.stat().st_gid))]
            found.append(Delegated(os.path.relpath(path, self.path), stat.S_IMODE(info.st_mode), uid, gid, sorted(files)))
        return found

    def restore(self, entries: list[Delegated], outside: Callable[[int, int], tuple[int, int]]) -> None:
        """Make cgroups that are missing, and give all the owners and modes they had: liblxc delegates a new container's
        cgroup to its root, a restored one's it does not.

        :param outside: (uid, gid) in the container -> of this host
        :raises OSError: with path
        """
        for entry in entries:
            path = os.path.normpath(os.path.join(self.path, entry.path))
            try:
                os.mkdir(path)
            except FileExistsError:
                pass
            # An id that is not of the container is the host's root here as there.
            uid, gid = (
                number if _mapped(inside) else -1
                for number, inside in zip(outside(entry.uid, entry.gid), (entry.uid, entry.gid), strict=True)
            )
            os.chown(path, uid, gid)
            os.chmod(path, entry.mode)
            for name in entry.files:
                if entry.path == "." and name not in DELEGATED:
                    continue
                file = os.path.join(path, name)
                try:
                    os.chown(file, uid, gid)
                    if uid == -1:
                        os.chmod(file, stat.S_IMODE(os.stat(file).st_mode) | stat.S_IWGRP)
                except FileNotFoundError:  # of a controller or kernel feature that is not here
                    continue


def _mapped(*ids: int) -> bool:
    """Whether one of the numbers, as a container sees them, is of the container."""
    return any(number != OVERFLOW_ID for number in ids)
