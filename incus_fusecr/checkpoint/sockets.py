# SPDX-License-Identifier: Apache-2.0
"""TCP sockets of a container, from outside, through copies of its descriptors in a disposable child.

CRIU sets TCP_REPAIR on what it dumps and clears it when it lets go (soccr.c). Until then, recv(2) and send(2) fail with EPERM.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..linux import proc
from ..linux.fd import Fd
from ..linux.pidfd import pidfd_getfd, pidfd_open
from ..linux.zygote import JobError, Zygote
from . import scan

log = logging.getLogger(__name__)

TCP_REPAIR = 19
JOB_SECONDS = 10.0
ESTABLISHED = 1  # include/net/tcp_states.h


def repair_off(zygote: Zygote, init: int) -> int:
    """Take sockets out of repair mode which a killed CRIU left in it; returns how many."""
    return _run(zygote, init, probe=False)


def probe(zygote: Zygote, init: int) -> int:
    """Let each connection send a window probe, as leaving repair mode does: the one that CRIU made it send met a shut door,
    and a restored socket waits a whole second (TCP_TIMEOUT_INIT) before it tries again.

    All tasks must be stopped: while it is in repair mode a socket refuses them.

    :returns: how many connections
    """
    return _run(zygote, init, probe=True)


def _run(zygote: Zygote, init: int, *, probe: bool) -> int:
    try:
        args = {"pids": scan.container_pids(init), "probe": probe}
        count, _ = zygote.run(f"{__name__}:repair_job", args, deadline=JOB_SECONDS)
    except (JobError, OSError) as error:
        log.warning("TCP sockets of the container of pid %d: %s", init, error)
        return 0
    if count and not probe:
        log.info("took %d TCP sockets of the container of pid %d out of repair mode", count, init)
    return int(count)


def repair_job(args: dict[str, Any], _fds: list[int]) -> tuple[Any, list[int]]:
    """args: pids; probe: set repair mode first; the result is the number of sockets"""
    count = 0
    # A path starts with a slash: what is linked so is a socket.
    for copy in copies(args["pids"], lambda _pid, _fd, link: link.startswith("socket:[")):
        with socket.socket(fileno=copy.release()) as sock:
            if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.proto != socket.IPPROTO_TCP:
                continue
            if args["probe"]:
                reuse = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
                if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO) & 0xFF != ESTABLISHED:
                    continue
                sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
            elif sock.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR):
                # What it was is lost. A listener can bind the port again only if its connections allow it, and they inherit
                # that from the listener, which nearly always does.
                reuse = 1
            else:
                continue
            sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
            # Repair mode uses the field for itself and clears it at its end (net/ipv4/tcp.c do_tcp_setsockopt()).
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            count += 1
    return count, []


def copies(pids: Iterable[int], wanted: Callable[[int, int, str], bool]) -> Iterator[Fd]:
    """Copies of the descriptors for which ``wanted(pid, fd, link)`` holds; those that are gone meanwhile are skipped."""
    for pid in pids:
        try:
            with pidfd_open(pid) as pidfd:
                for fd in proc.fds(pid):
                    try:
                        if wanted(pid, fd, os.readlink(f"/proc/{pid}/fd/{fd}")):
                            yield pidfd_getfd(pidfd, fd)
                    except (FileNotFoundError, ProcessLookupError):
                        continue
        except ProcessLookupError:
            continue
