# SPDX-License-Identifier: Apache-2.0
"""Record what the kernel knows of each connection, while its daemon answers, and after it stopped."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from typing import Any

from ..fuse import connection
from ..linux import proc
from ..linux.fd import Fd
from ..linux.pidfd import pidfd_open
from ..linux.zygote import Zygote
from . import jobs
from .manifest import KEY, Connection, Handle, Name, Node
from .scan import FuseMount, Ref, Scan
from .survive import DELETED, Verdict, options_of, owner, root_mount

RECORD_SECONDS = 8.0
PROBE_SECONDS = 5.0
_BATCH = 100  # descriptors in one probing child

# Lowest address that a heap can have (vm.mmap_min_addr): smaller node ids are counters.
_POINTER_MIN = 65536


@dataclass
class Recording:
    """One connection while it is being recorded.

    :ivar opened: refs whose handle has to be probed, with their node
    :ivar spares: (pid, descriptor) of the keeper's handles for file mappings, in the order of ``spare_refs``
    :ivar keeper: closing it ends the keeper
    :ivar ids: path below the superblock's root -> nodeid, st_dev, st_ino
    """

    number: int
    daemons: list[int]
    mount: FuseMount
    statfs: list[int]
    nodes: dict[int, Node]
    names: dict[tuple[int, str], int]
    opened: list[tuple[Ref, int]] = field(default_factory=list)
    spare_refs: list[tuple[Ref, int]] = field(default_factory=list)
    spares: list[tuple[int, int]] = field(default_factory=list)
    keeper: socket.socket | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    ids: dict[str, list[int]] = field(default_factory=dict)

    @property
    def uid(self) -> int:
        return int(options_of(self.mount).get("user_id", "0"))

    @property
    def gid(self) -> int:
        return int(options_of(self.mount).get("group_id", "0"))

    def close(self) -> None:
        """Let go of the spare handles; somebody has to answer their FLUSH and RELEASE."""
        if self.keeper is not None:
            self.keeper.close()


def _alive(path: str) -> str:
    return path.removesuffix(DELETED)


def record(zygote: Zygote, scan: Scan, number: int, *, spares: bool, sync: bool) -> Recording:
    """Nodes of every referenced path of a connection, by way of its (running) daemon.

    :param spares: open a handle for each file mapping as well
    :param sync: write dirty pages back first
    :returns: with :attr:`Recording.verdicts` for references that lead nowhere any more
    :raises JobError, JobTimeout: the mount could not be walked
    """
    root = root_mount(scan, number)
    if root is None:
        raise LookupError(f"connection {number} has no root mount")
    refs = [r for r in scan.refs if r.connection == number and r.kind != "watch"]
    mapped = [r for r in refs if r.kind in ("map", "exe")]
    binds = [m.root.strip("/") for m in scan.mounts if m.connection == number]
    paths = sorted({_alive(r.path) for r in refs} | set(binds))
    options = options_of(root)
    where = {
        "pid": scan.init,
        "mountpoint": root.mountpoint,
        "mount_id": root.id,
        "uid": int(options.get("user_id", "0")),
        "gid": int(options.get("group_id", "0")),
    }
    with pidfd_open(scan.init) as pidfd:
        result, _ = zygote.run(
            f"{jobs.__name__}:record_job",
            {**where, "paths": paths, "sync": sync},
            [pidfd.fileno()],
            deadline=RECORD_SECONDS,
            on=connection.label(number),
        )
        recording = Recording(
            number=number,
            daemons=scan.connections[number],
            mount=root,
            statfs=result["statfs"],
            nodes={n: Node(n, generation, attr) for n, generation, attr in result["nodes"]},
            names={(parent, name): nodeid for parent, name, nodeid in result["names"]},
            ids=result["ids"],
        )
        if spares:
            reachable = [r for r in mapped if _alive(r.path) in result["ids"]]
            recording.spare_refs = [(r, result["ids"][_alive(r.path)][0]) for r in reachable]
            _open_spares(zygote, recording, where, pidfd)
    handles = _handles(zygote, scan, recording, [r for r in refs if r.fd >= 0])
    for ref in refs:
        _place(scan, recording, ref, result, handles.get((ref.pid, ref.fd)))
    return recording


def _open_spares(zygote: Zygote, recording: Recording, where: dict[str, Any], pidfd: Fd) -> None:
    if not recording.spare_refs:
        return
    recording.keeper, theirs = socket.socketpair()
    with theirs:
        kept, _ = zygote.run(
            f"{jobs.__name__}:spares_job",
            {**where, "paths": [_alive(r.path) for r, _ in recording.spare_refs]},
            [pidfd.fileno(), theirs.fileno()],
            deadline=RECORD_SECONDS,
            on=connection.label(recording.number),
        )
    recording.spares = [(kept["pid"], fd) for fd in kept["fds"]]


_HandleInfo = tuple[int, int, list[int], int, int]  # nodeid, generation, attr, st_dev, st_nlink


def _handles(zygote: Zygote, scan: Scan, recording: Recording, refs: list[Ref]) -> dict[tuple[int, int], _HandleInfo]:
    """Node and attributes of each open descriptor, from the descriptor and not from a path."""
    found: dict[tuple[int, int], _HandleInfo] = {}
    for start in range(0, len(refs), _BATCH):
        batch = refs[start : start + _BATCH]
        result, _ = zygote.run(
            f"{jobs.__name__}:handles_job",
            {"pid": scan.init, "uid": recording.uid, "gid": recording.gid, "fds": [[r.pid, r.fd] for r in batch]},
            deadline=PROBE_SECONDS,
            on=connection.label(recording.number),
        )
        for ref, info in zip(batch, result, strict=True):
            if info is None:
                continue
            found[ref.pid, ref.fd] = tuple(info)
    return found


def _place(scan: Scan, recording: Recording, ref: Ref, result: dict[str, dict[str, list[int]]], info: _HandleInfo | None) -> None:
    """Match a reference with the node that its path leads to; a verdict where they are different files."""
    path = _alive(ref.path)
    place = f"{owner(scan, ref.pid)} {'fd ' + str(ref.fd) if ref.fd >= 0 else ref.kind}"
    shown = proc.printable(_alive(ref.shown))
    hint = "close it, or stop the process, first"
    if ref.fd >= 0 and info is None:
        # Closed since the scan; while the container stands still nothing is, and a later scan would notice.
        return
    if info is not None and info[4] == 0 and ref.shown.endswith(DELETED):
        recording.verdicts.append(Verdict(f"{place}: {shown}", "is unlinked but still open", hint))
        return
    if path not in result["ids"]:
        why = "is unlinked but still in use" if ref.shown.endswith(DELETED) else "cannot be reached by its path"
        reason = result["missing"].get(path, "")
        recording.verdicts.append(Verdict(f"{place}: {shown}", f"{why} ({reason})" if reason else why, hint))
        return
    nodeid, st_dev, st_ino = result["ids"][path]
    if info is None:
        return
    if info[0] != nodeid:
        if (info[3], info[2][0]) != (st_dev, st_ino):
            recording.verdicts.append(
                Verdict(f"{place}: {shown}", "is open, but another file has its name now (replaced or unlinked)", hint)
            )
            return
        _same_file_other_node(recording, path, nodeid, info)
    if ref.kind == "fd":
        recording.opened.append((ref, info[0]))


def _same_file_other_node(recording: Recording, path: str, nodeid: int, info: _HandleInfo) -> None:
    """A daemon that finds inodes by st_ino gave the file a second node (after an earlier move): the name leads to the
    node of the open handle then, as it is the one that has to be found again at restore."""
    recording.nodes[info[0]] = Node(info[0], info[1], info[2])
    name = path.rsplit("/", 1)[-1]
    for (parent, entry), target in recording.names.items():
        if target == nodeid and entry == name:
            recording.names[parent, entry] = info[0]


def handles_of(
    scan: Scan, recording: Recording, probes: dict[int, tuple[int, int]], open_flags: list[tuple[int, int]]
) -> tuple[list[Handle], list[Verdict]]:
    """Handles from what the stand-in saw; verdicts for those it did not see.

    :param probes: cookie (index into ``opened`` followed by the spares) -> (nodeid, fh)
    :param open_flags: (errno of the probe, open flags) in the same order
    """
    handles, missing = [], []
    for index, (ref, nodeid) in enumerate([*recording.opened, *recording.spare_refs]):
        seen = probes.get(index)
        if seen is None or (seen[0] != nodeid and seen[0] not in recording.nodes):
            missing.append(
                Verdict(
                    f"{owner(scan, ref.pid)} {'fd ' + str(ref.fd) if ref.fd >= 0 else ref.kind}: {proc.printable(ref.shown)}",
                    f"its handle could not be asked for ({os.strerror(open_flags[index][0])})",
                    "close it, or stop the process, first",
                )
            )
            continue
        handles.append(
            Handle(
                pid=scan.process(ref.pid).ns_pid,
                fd=ref.fd,
                nodeid=seen[0],
                fh=seen[1],
                flags=ref.flags & 0xFFFFFFFF,
                open_flags=open_flags[index][1],
                path=_alive(ref.shown)[:4096],
            )
        )
    return handles, missing


def probe(zygote: Zygote, init: int, uid: int, gid: int, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Send the probe ioctl through descriptors; the stand-in keeps what arrives under the cookies 0, 1, ...

    :param places: (pid, descriptor)
    :returns: (errno, open flags) of each
    """
    results: list[tuple[int, int]] = []
    for start in range(0, len(places), _BATCH):
        answer, _ = zygote.run(
            f"{jobs.__name__}:probe_job",
            {"pid": init, "uid": uid, "gid": gid, "fds": places[start : start + _BATCH], "base": start},
            deadline=PROBE_SECONDS,
        )
        results += [(code, flags) for code, flags in answer]
    return results


def to_connection(scan: Scan, recording: Recording, index: int, init_reply: str, handles: list[Handle]) -> Connection:
    """The manifest's entry."""
    m = recording.mount
    return Connection(
        key=f"{KEY}{index}",
        number=recording.number,
        daemons=[scan.process(pid).ns_pid for pid in recording.daemons],
        mountpoint=m.mountpoint,
        fstype=m.fstype,
        source=m.source,
        mount_options=m.options,
        super_options=m.super_options,
        init_reply=init_reply,
        pointer_nodeids=pointer_nodeids(recording),
        statfs=recording.statfs,
        nodes=list(recording.nodes.values()),
        names=[Name(parent, name, nodeid) for (parent, name), nodeid in recording.names.items()],
        handles=handles,
    )


def pointer_nodeids(recording: Recording) -> bool:
    """Whether node ids are addresses inside the daemon (lookups by st_dev and st_ino), not counters or inode numbers."""
    others = [n for n in recording.nodes if n != 1]
    if not others:
        return False
    ranges = []
    for pid in recording.daemons:
        for line in proc.lines(proc.read_text(f"/proc/{pid}/maps", 64 << 20)):
            start, end = (int(x, 16) for x in line.split(None, 1)[0].split("-"))
            ranges.append((max(start, _POINTER_MIN), end))
    return all(any(start <= n < end for start, end in ranges) for n in others)
