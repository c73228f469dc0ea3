# SPDX-License-Identifier: Apache-2.0
"""The FUSE wire format as far as a stand-in speaks it (include/uapi/linux/fuse.h; names as there)."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

FUSE_ROOT_ID = 1

FUSE_LOOKUP = 1
FUSE_FORGET = 2
FUSE_GETATTR = 3
FUSE_SETATTR = 4
FUSE_READLINK = 5
FUSE_OPEN = 14
FUSE_READ = 15
FUSE_WRITE = 16
FUSE_STATFS = 17
FUSE_RELEASE = 18
FUSE_FSYNC = 20
FUSE_GETXATTR = 22
FUSE_LISTXATTR = 23
FUSE_FLUSH = 25
FUSE_INIT = 26
FUSE_OPENDIR = 27
FUSE_READDIR = 28
FUSE_RELEASEDIR = 29
FUSE_FSYNCDIR = 30
FUSE_GETLK = 31
FUSE_SETLK = 32
FUSE_SETLKW = 33
FUSE_ACCESS = 34
FUSE_INTERRUPT = 36
FUSE_DESTROY = 38
FUSE_IOCTL = 39
FUSE_BATCH_FORGET = 42
FUSE_READDIRPLUS = 44
FUSE_SYNCFS = 50

OPCODE_NAMES = {
    value: name[5:]
    for name, value in list(globals().items())
    if name.startswith("FUSE_") and name != "FUSE_ROOT_ID" and isinstance(value, int)
}

FUSE_NOTIFY_INVAL_INODE = 2
FUSE_NOTIFY_INVAL_ENTRY = 3
FUSE_EXPIRE_ONLY = 1

FOPEN_DIRECT_IO = 1
FOPEN_KEEP_CACHE = 2
FOPEN_NONSEEKABLE = 4

# _IO(0xF5, 0x5E): means nothing to the VFS, so the kernel always passes it on with nodeid and fh.
PROBE_IOCTL = 0xF55E

IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")
ATTR = struct.Struct("<6Q10I")  # fuse_attr, flags in place of padding
ATTR_OUT = struct.Struct("<QII")
ENTRY_OUT = struct.Struct("<4QII")
OPEN_IN = struct.Struct("<II")
OPEN_OUT = struct.Struct("<QIi")
READ_IN = struct.Struct("<QQI")  # fh, offset, size; more follows
RELEASE_IN = struct.Struct("<QIIQ")
IOCTL_IN = struct.Struct("<QIIQII")
STATFS_OUT = struct.Struct("<5Q4I6I")
NOTIFY_INVAL_INODE_OUT = struct.Struct("<Qqq")
NOTIFY_INVAL_ENTRY_OUT = struct.Struct("<QII")

# The kernel refuses to hand a request to a shorter buffer than header + max_write (fs/fuse/dev.c); 1 MiB is its cap.
READ_BUFFER = (1 << 20) + 4096


@dataclass(frozen=True)
class Request:
    """One request of the kernel; ``pid`` is in the pid namespace of the mount, 0 if not visible there."""

    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    body: bytes

    @property
    def name(self) -> str:
        return OPCODE_NAMES.get(self.opcode, str(self.opcode))


def parse_request(data: bytes) -> Request:
    """One read of /dev/fuse."""
    length, opcode, unique, nodeid, uid, gid, pid, _ext, _pad = IN_HEADER.unpack_from(data)
    return Request(opcode, unique, nodeid, uid, gid, pid, data[IN_HEADER.size : length])


def reply(unique: int, error: int, body: bytes = b"") -> bytes:
    """One write to /dev/fuse; ``error`` is a positive errno or 0."""
    if error:
        body = b""
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), -error, unique) + body


def notify(code: int, body: bytes) -> bytes:
    """A notification: unique 0, code in place of the error."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), code, 0) + body


def inval_entry(parent: int, name: bytes, flags: int) -> bytes:
    """FUSE_NOTIFY_INVAL_ENTRY; with FUSE_EXPIRE_ONLY (6.2) the dentry stays and is looked up again at its next use."""
    head = NOTIFY_INVAL_ENTRY_OUT.pack(parent, len(name), flags)
    return notify(FUSE_NOTIFY_INVAL_ENTRY, head + name + b"\0")


def inval_attr(nodeid: int) -> bytes:
    """FUSE_NOTIFY_INVAL_INODE for attributes only (offset < 0)."""
    return notify(FUSE_NOTIFY_INVAL_INODE, NOTIFY_INVAL_INODE_OUT.pack(nodeid, -1, 0))


def inval_pages(nodeid: int) -> bytes:
    """FUSE_NOTIFY_INVAL_INODE for attributes and all pages (offset 0, length 0: to the end)."""
    return notify(FUSE_NOTIFY_INVAL_INODE, NOTIFY_INVAL_INODE_OUT.pack(nodeid, 0, 0))


_U64 = (1 << 64) - 1


def attr_of_stat(st: os.stat_result) -> list[int]:
    """The fields of struct fuse_attr, in order. Times before 1970 are negative; on the wire they are unsigned."""
    second = 1_000_000_000
    return [
        st.st_ino,
        st.st_size,
        st.st_blocks,
        st.st_atime_ns // second & _U64,
        st.st_mtime_ns // second & _U64,
        st.st_ctime_ns // second & _U64,
        st.st_atime_ns % second,
        st.st_mtime_ns % second,
        st.st_ctime_ns % second,
        st.st_mode,
        st.st_nlink,
        st.st_uid,
        st.st_gid,
        st.st_rdev,
        st.st_blksize,
        0,
    ]
