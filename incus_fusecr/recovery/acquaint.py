# SPDX-License-Identifier: Apache-2.0
"""A guard is told beforehand which inode is which name.

An OPEN tells the inode and no name. A client that has found its name with the old daemon, and asks for it when that is dead,
uses one that no descriptor and no mount leads to: the guard could only answer ESTALE. The kernel then looks the name up anew,
but once: should the next daemon die just then, too, the client has the error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from ..fuse import connection
from ..guard.client import COUNTED, Node
from ..linux.handle import fuse_handle
from ..linux.zygote import JobError
from .context import Context
from .link import Link

SECONDS = 2.0
MAX_NODES = 256


def once(context: Context, link: Link, directories: Sequence[str]) -> None:
    """Ask the daemon of ``link`` for the entries of ``directories`` and tell its guard, if that was not done.

    What goes wrong costs a search when an inode is used.
    """
    if not directories or link.nodes is not None or link.tree is None or not link.alive():
        return
    link.nodes = []
    args, on = {"directories": list(directories)}, connection.label(link.number)
    try:
        found, _ = context.zygote.run(f"{__name__}:job_names", args, [link.tree.fileno()], deadline=SECONDS, on=on)
    except JobError:
        return
    link.nodes = [(int(node), int(generation), str(path)) for node, generation, path in found if int(node) < COUNTED]
    context.guards.tell_nodes(link)


def job_names(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """(nodeid, generation, path) of the directories in the tree ``fds[0]`` and of what is in them."""
    found: list[Node] = []
    for directory in args["directories"]:
        try:
            at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fds[0])
        except OSError:
            continue  # this daemon has none
        try:
            found.append((*fuse_handle(at), f"/{directory}"))
            for name in os.listdir(at)[: MAX_NODES - len(found)]:
                with contextlib.suppress(OSError):  # it has gone meanwhile
                    entry = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
                    try:
                        found.append((*fuse_handle(entry), f"/{directory}/{name}"))
                    finally:
                        os.close(entry)
        finally:
            os.close(at)
    return found, []
