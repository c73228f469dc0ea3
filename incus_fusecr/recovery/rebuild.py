# SPDX-License-Identifier: Apache-2.0
"""Holder and agent died together: guards have the descriptors, too, and their command lines tell the rest."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
from collections.abc import Callable, Collection

from ..linux import proc
from ..linux.fd import Fd
from ..linux.pidfd import pidfd_getfd
from . import recipe
from .fresh import RUN
from .guards import read_roots
from .link import Guard, Link, Process, guard_at
from .recipe import Recipe
from .unit import Unit

log = logging.getLogger(__name__)

_SOCKET = re.compile(r"guard-(\d+)\.sock")
_LOG = re.compile(r"sidecar-(.+)\.log")


def from_guards(unit_for: Callable[[str], Unit | None], known: Collection[int], inside: bool = False) -> list[Link]:
    """Connections that guards hold and nobody else knows of; they belong to their units then.

    :param known: connections that need not be looked for
    :param inside: those of containers' daemons, else those of the host's
    """
    found = []
    serving: dict[str, dict[int, int]] = {}
    for path in sorted(glob.glob(f"{RUN}/guard-*.sock")):
        match = _SOCKET.fullmatch(os.path.basename(path))
        if match is None or int(match[1]) in known:
            continue
        number = int(match[1])
        guard = guard_at(path, number)
        if guard is None:
            continue
        try:
            words, command = options(proc.read_text(f"/proc/{guard.process.pid}/cmdline").split("\0")[:-1])
            made_of = recipe.of_sidecar(command)
            if bool(made_of.facts) != inside:
                guard.close()
                continue
            link = _link(guard, number, words, made_of, unit_for, serving)
        except (OSError, ValueError, KeyError) as error:
            log.warning("guard %d of connection %d: %s", guard.process.pid, number, error)
            guard.close()
            continue
        if link is None:  # its unit knows it by now
            guard.close()
        else:
            found.append(link)
    return found


def options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options and the sidecar's command of a guard's command line."""
    end = words.index("--")
    return dict(zip(words[1:end:2], words[2:end:2], strict=False)), words[end + 1 :]


def _link(
    guard: Guard,
    number: int,
    words: dict[str, str],
    made_of: Recipe,
    unit_for: Callable[[str], Unit | None],
    serving: dict[str, dict[int, int]],
) -> Link | None:
    match = _LOG.fullmatch(os.path.basename(words.get("--log", "")))
    unit = unit_for(match[1]) if match else None
    if unit is None:
        raise ValueError("it names no daemon that is protected here")
    if number in unit.links:
        return None
    assert guard.process.pidfd is not None
    fuse: list[Fd] = []
    for word in words["--fuse-fd"].split(","):
        with contextlib.suppress(OSError):
            fuse.append(pidfd_getfd(guard.process.pidfd, int(word)))
    if not fuse:
        raise ValueError("it holds nothing any more")
    if unit.instance not in serving:
        serving[unit.instance] = unit.servers()
    pid = serving[unit.instance].get(number)
    daemon = Process.of(pid) if pid else Process(0, 0)
    link = Link(number, unit.key, daemon, made_of, False, fuse, guard=guard, roots=read_roots(number))
    unit.add(link)
    if link.roots:
        unit.context.keeping.put_roots(link)
    unit.context.keeping.put_guard(number, guard)
    return link
