# SPDX-License-Identifier: Apache-2.0
"""Copies whose flags a container cannot take away.

When a mount comes into a mount namespace of a less privileged user namespace, the kernel locks its flags: root there cannot
remount ``ro`` as ``rw`` (mount_namespaces(7), "Restrictions on mount namespaces"). A mount that the host moves there is not
locked, and there is no call that locks one. But copying a namespace does, and clones keep it: so the copies are taken from
a mount namespace that belongs to a fresh user namespace, in which nothing else is and nobody runs.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from typing import Any

from ..linux.fd import Fd
from ..linux.libc import check, libc
from ..linux.mount import MNT_DETACH, MS_PRIVATE, MS_REC, mount, umount2
from ..linux.mountapi import move_mount
from ..linux.ns import CLONE_NEWNS, CLONE_NEWUSER, unshare
from ..linux.zygote import MAX_FDS, JobError, Zygote

NS_GET_USERNS = 0xB701
ROOM = MAX_FDS - 1  # copies in one namespace: they and its own descriptor go into one message

Locker = Callable[[Sequence[Fd]], tuple[Fd, list[Fd]]]


def owner(namespace: Fd) -> int:
    """Inode of the user namespace that a namespace belongs to (ioctl_nsfs(2))."""
    with Fd(fcntl.ioctl(namespace.fileno(), NS_GET_USERNS), "user namespace") as user:
        return os.fstat(user.fileno()).st_ino


def zygote_locker(zygote: Zygote, deadline: float = 5.0) -> Locker:
    """What makes of up to :data:`ROOM` detached trees, which it uses up, (mount namespace, O_PATH descriptors of them there).

    :param deadline: seconds; OSError after that
    """

    def locker(trees: Sequence[Fd]) -> tuple[Fd, list[Fd]]:
        try:
            _, (namespace, *places) = zygote.run(f"{__name__}:lock", {}, [tree.fileno() for tree in trees], deadline=deadline)
        except JobError as error:
            raise OSError(error.errno or 5, str(error), "namespace of locked copies") from None
        return namespace, places

    return locker


def lock(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """The job."""
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE, "")
    mount("tmpfs", "/proc", "tmpfs", 0, "mode=700")  # any directory would do
    os.chdir("/proc")
    check(int(libc.pivot_root(b".", b".")), "pivot_root")
    umount2(".", MNT_DETACH)  # the copies of all other mounts, old connections among them
    for number, fd in enumerate(fds):
        _attach(Fd(fd, "copy"), f"/{number}")
    unshare(CLONE_NEWUSER | CLONE_NEWNS)
    namespace = os.open("self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    return {}, [namespace, *(os.open(f"/{number}", os.O_PATH | os.O_CLOEXEC) for number in range(len(fds)))]


def _attach(tree: Fd, path: str) -> None:
    """On a directory or on a file, as it is one: asking which would be a request."""
    os.mkdir(path)
    try:
        with Fd(os.open(path, os.O_PATH | os.O_CLOEXEC), path) as place:
            move_mount(tree, place)
    except OSError:
        os.rmdir(path)
        os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC))
        with Fd(os.open(path, os.O_PATH | os.O_CLOEXEC), path) as place:
            move_mount(tree, place)
    tree.close()
