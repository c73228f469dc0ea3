# SPDX-License-Identifier: Apache-2.0
"""Look-ups that a FUSE daemon has to answer: in a child with a deadline, never in a thread that swaps."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from typing import Any

from ..linux.fd import Fd
from ..linux.libc import PR_SET_DUMPABLE, prctl
from ..linux.mountapi import RESOLVE_CACHED, open_beneath
from ..linux.ns import CLONE_NEWUSER, setns
from ..linux.zygote import JobError, Zygote
from . import facts

Opener = Callable[[Fd, Sequence[str]], "list[Fd | OSError]"]

BATCH = 100  # descriptors in one message; SCM_MAX_FD is 253
DEADLINE = 2.0  # seconds for one batch


def zygote_opener(zygote: Zygote, deadline: float = DEADLINE, facts_path: str = "") -> Opener:
    """An opener of paths below a descriptor: O_PATH descriptors, or why not, in the order of the paths.

    :param deadline: seconds for 100 paths; then the rest is ETIMEDOUT
    :param facts_path: of a daemon in a container: the user that it runs as asks
    """

    def opener(base: Fd, paths: Sequence[str]) -> list[Fd | OSError]:
        found: list[Fd | OSError] = []
        for start in range(0, len(paths), BATCH):
            some = list(paths[start : start + BATCH])
            try:
                args = {"paths": some, "facts": facts_path}
                numbers, fds = zygote.run(f"{__name__}:open_paths", args, [base.fileno()], deadline=deadline)
            except JobError as error:
                found += [OSError(error.errno or errno.EIO, str(error), path) for path in some]
                continue
            waiting = iter(fds)
            found += [next(waiting) if n == 0 else OSError(n, os.strerror(n), p) for n, p in zip(numbers, some, strict=True)]
        return found

    return opener


def open_paths(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """The job. ``paths`` below the descriptor; an errno (or 0) for each, and descriptors for the zeros."""
    base, numbers, found = Fd(fds[0]), [], []
    if args["facts"]:
        _enter(str(args["facts"]))
    for path in args["paths"]:
        try:
            found.append(open_beneath(base, path).release())
            numbers.append(0)
        except OSError as error:
            numbers.append(error.errno or errno.EIO)
    return numbers, found


def _enter(path: str) -> None:
    """Who is in none of a mount's user namespaces may not walk on it (fs/fuse/dir.c fuse_allow_current_process()), and has no
    user id that a request could name."""
    daemon = facts.load(path).daemon
    with facts.userns(path) as userns:
        if os.fstat(userns.fileno()).st_ino != os.stat("/proc/self/ns/user").st_ino:
            setns(userns.fileno(), CLONE_NEWUSER)
    with contextlib.suppress(PermissionError):  # it may be denied there
        os.setgroups(daemon.groups)
    os.setresgid(*daemon.gids)  # whose mount it is, if it is not everybody's
    os.setresuid(*daemon.uids)
    prctl(PR_SET_DUMPABLE, 0)


def cached_first(opener: Opener, base: Fd, paths: Sequence[str]) -> list[Fd | OSError]:
    """What the kernel has cached without asking; ``opener`` for the rest."""
    found: dict[str, Fd | OSError] = {}
    for path in paths:
        try:
            found[path] = open_beneath(base, path, RESOLVE_CACHED)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EOVERFLOW):  # the latter two say that others may ask
                found[path] = error
    rest = [path for path in paths if path not in found]
    if rest:
        found.update(zip(rest, opener(base, rest), strict=True))
    return [found[path] for path in paths]
