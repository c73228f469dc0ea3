# SPDX-License-Identifier: Apache-2.0
"""What CRIU would see if it walked to the referenced files of FUSE mounts: a table for the plugin (criu/paths.c).

A walk sends LOOKUPs, which the kernel counts and a daemon that stands still does not (see :mod:`.answers`). The table lies in
the image directory until the plugin has read it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from ..linux import ns
from .manifest import Node
from .record import Recording
from .scan import Scan
from .survive import DELETED

FILE_NAME = "fusecr.paths"
MAGIC = b"fusecr paths 1\n"
# struct entry of criu/paths.c: all u64, the last one the length of the path that follows
_ENTRY = struct.Struct("=20Q")
_U64 = (1 << 64) - 1


def table(scan: Scan, recordings: Iterable[Recording]) -> bytes:
    """The table of all paths that lead into the recorded connections, of each mount namespace.

    :returns: contents of the file; empty if there is no path
    """
    ids = ns.IdMaps(scan.init)
    mntns = {p.pid: p.mntns for p in scan.processes}
    rows: dict[tuple[int, bytes], bytes] = {}
    for recording in recordings:
        for space, shown, path in _places(scan, mntns, recording.number):
            root, name = scan.roots.get(space), os.fsencode(shown).strip(b"/")
            if root is None or not name or path not in recording.ids:
                continue
            nodeid, st_dev, _ = recording.ids[path]
            rows[root, name] = _entry(root, st_dev, recording.nodes[nodeid], ids, len(name)) + name
    return MAGIC + b"".join(rows.values()) if rows else b""


def _places(scan: Scan, mntns: dict[int, str], number: int) -> Iterable[tuple[str, str, str]]:
    """(mount namespace, path in it, path below the superblock's root)"""
    for m in scan.mounts:
        if m.connection == number:
            yield m.mntns, m.mountpoint, m.root.strip("/")
    for ref in scan.refs:
        # CRIU takes the mark at its word and looks for the name with it; such a file has no path
        if ref.connection == number and ref.kind != "watch" and not ref.shown.endswith(DELETED):
            yield mntns[ref.pid], ref.shown, ref.path


def _entry(root: int, st_dev: int, node: Node, ids: ns.IdMaps, length: int) -> bytes:
    """The result of stat(2) as CRIU would get it, outside of the container's user namespace."""
    ino, size, blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, nlink, uid, gid, rdev, blksize, _ = node.attr
    outer_uid, outer_gid = ids.outside(uid, gid)
    fields = [
        root, os.major(st_dev), os.minor(st_dev), ino, mode, nlink, outer_uid, outer_gid, os.major(rdev), os.minor(rdev),
        size, blksize, blocks, atime, atime_ns, mtime, mtime_ns, ctime, ctime_ns, length,
    ]  # fmt: skip
    return _ENTRY.pack(*(value & _U64 for value in fields))


def write(dirfd: int, content: bytes) -> None:
    """Write the table into an image directory, whole or not at all; without content there is none.

    :raises OSError: it could not be written
    """
    temporary = FILE_NAME + ".new"
    if not content:
        return
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dirfd)
    with open(fd, "wb") as file:
        file.write(content)
    os.rename(temporary, FILE_NAME, src_dir_fd=dirfd, dst_dir_fd=dirfd)
