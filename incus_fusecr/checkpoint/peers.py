# SPDX-License-Identifier: Apache-2.0
"""Which processes a daemon depends on: whoever is at the other end of its pipes and sockets.

sshfs answers only while its ssh, the sshd behind that and its sftp-server run; stopping those with the clients would
leave requests in flight for ever. So they are stopped after the daemon, and go on before it.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Iterable
from typing import Any

from ..linux import ns, proc
from ..linux.zygote import Zygote

# A process with more partners than this (init, a journal, a bus) serves many: it is kept running, not followed further.
HUB = 8
PEERS_SECONDS = 10.0

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST_DUMP = 0x301
NLMSG_ERROR = 2
NLMSG_DONE = 3
UDIAG_SHOW_PEER = 4
UNIX_DIAG_PEER = 2
TCP_ESTABLISHED = "01"


def helpers(zygote: Zygote, daemons: Iterable[int], pids: Iterable[int]) -> list[int]:
    """The processes among ``pids`` that daemons depend on, nearest first (the daemons not among them)."""
    found, _ = zygote.run(f"{__name__}:peers_job", {"daemons": list(daemons), "pids": list(pids)}, deadline=PEERS_SECONDS)
    return [int(pid) for pid in found]


def closure(daemons: Iterable[int], partners: dict[int, set[int]]) -> list[int]:
    """Everything reachable from ``daemons``; a hub is reached but not passed through."""
    start = list(daemons)
    seen = set(start)
    queue, found = start, []
    while queue:
        following: list[int] = []
        for pid in queue:
            others = partners.get(pid, set())
            if pid not in start and len(others) > HUB:
                continue
            for other in sorted(others - seen):
                seen.add(other)
                following.append(other)
        found += following
        queue = following
    return found


def peers_job(args: dict[str, Any], _fds: list[int]) -> tuple[Any, list[int]]:
    """Zygote job of :func:`helpers`."""
    pids = [int(pid) for pid in args["pids"]]
    sockets: dict[int, set[int]] = {}
    readers: dict[int, set[int]] = {}
    writers: dict[int, set[int]] = {}
    netns: dict[str, int] = {}
    for pid in pids:
        try:
            netns.setdefault(ns.ns_id(pid, "net"), pid)
        except OSError:
            continue
        for fd in proc.fds(pid):
            _sort_fd(pid, fd, sockets, readers, writers)
    links: list[tuple[set[int], set[int]]] = [(writers.get(i, set()), readers[i]) for i in readers]
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    for pid in netns.values():
        try:
            with open(f"/proc/{pid}/ns/net") as file:
                ns.setns(file.fileno(), ns.CLONE_NEWNET)
            pairs = [*_unix_pairs(), *_tcp_pairs("/proc/thread-self/net")]
        except OSError:
            continue
        finally:
            ns.setns(home, ns.CLONE_NEWNET)
        links += [(sockets.get(a, set()), sockets.get(b, set())) for a, b in pairs]
    os.close(home)
    partners: dict[int, set[int]] = {}
    for left, right in links:
        for a in left:
            for b in right:
                if a != b:
                    partners.setdefault(a, set()).add(b)
                    partners.setdefault(b, set()).add(a)
    return closure([int(p) for p in args["daemons"]], partners), []


_LINK = re.compile(r"(socket|pipe):\[(\d+)\]")


def _sort_fd(pid: int, fd: int, sockets: dict[int, set[int]], readers: dict[int, set[int]], writers: dict[int, set[int]]) -> None:
    try:
        match = _LINK.fullmatch(os.readlink(f"/proc/{pid}/fd/{fd}"))
        if match is None:
            return
        inode = int(match[2])
        if match[1] == "socket":
            sockets.setdefault(inode, set()).add(pid)
            return
        access = int(proc.fdinfo(pid, fd)["flags"], 8) & os.O_ACCMODE
    except (OSError, KeyError):
        return
    if access != os.O_WRONLY:
        readers.setdefault(inode, set()).add(pid)
    if access != os.O_RDONLY:
        writers.setdefault(inode, set()).add(pid)


def _unix_pairs() -> Iterable[tuple[int, int]]:
    """(inode, peer's inode) of connected unix sockets of this network namespace (unix_diag, sock_diag(7))."""
    request = struct.pack("<BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, UDIAG_SHOW_PEER, 0xFFFFFFFF, 0xFFFFFFFF)
    header = struct.pack("<IHHII", 16 + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 1, 0)
    pairs: list[tuple[int, int]] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as diag:
        diag.settimeout(5)
        diag.send(header + request)
        while True:
            data = diag.recv(1 << 18)
            offset = 0
            while offset + 16 <= len(data):
                size, kind, *_ = struct.unpack_from("<IHHII", data, offset)
                if kind in (NLMSG_DONE, NLMSG_ERROR) or size < 16:
                    return pairs
                (inode,) = struct.unpack_from("<I", data, offset + 16 + 4)
                peer = _attribute(data[offset + 32 : offset + size], UNIX_DIAG_PEER)
                if peer:
                    pairs.append((inode, peer))
                offset += (size + 3) & ~3


def _attribute(data: bytes, wanted: int) -> int:
    offset = 0
    while offset + 4 <= len(data):
        size, kind = struct.unpack_from("<HH", data, offset)
        if kind == wanted and size >= 8:
            return int(struct.unpack_from("<I", data, offset + 4)[0])
        offset += max(4, (size + 3) & ~3)
    return 0


def _tcp_pairs(net: str) -> Iterable[tuple[int, int]]:
    """(inode, peer's inode) of TCP connections whose both ends are in this network namespace."""
    ends: dict[tuple[str, str], int] = {}
    for table in ("tcp", "tcp6"):
        try:
            lines = proc.read_text(f"{net}/{table}", 16 << 20).splitlines()[1:]
        except FileNotFoundError:
            continue
        for line in lines:
            words = line.split()
            if words[3] == TCP_ESTABLISHED:
                ends[(words[1], words[2])] = int(words[9])
    for (local, remote), inode in ends.items():
        peer = ends.get((remote, local))
        if peer:
            yield inode, peer
