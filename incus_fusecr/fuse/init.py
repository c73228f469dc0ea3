# SPDX-License-Identifier: Apache-2.0
"""FUSE_INIT: what the kernel offers, what a daemon answered, and whether another kernel can be given that
answer.

Names and layouts as in include/uapi/linux/fuse.h, protocol 7.45.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..errors import FusecrError
from .wire import FUSE_INIT, IN_HEADER, OUT_HEADER

FUSE_KERNEL_VERSION = 7
FUSE_COMPAT_INIT_OUT_SIZE = 8
FUSE_COMPAT_22_INIT_OUT_SIZE = 24
FUSE_INIT_OUT_SIZE = 64
MAX_REPLY = OUT_HEADER.size + FUSE_INIT_OUT_SIZE  # bytes

# struct fuse_init_in up to 7.35 / since 7.36; struct fuse_init_out
INIT_IN_COMPAT = struct.Struct("<IIII")
INIT_IN = struct.Struct("<IIIII11I")
INIT_OUT = struct.Struct("<IIIIHHIIHHIIH11H")

FUSE_ASYNC_READ = 1 << 0
FUSE_WRITEBACK_CACHE = 1 << 16
FUSE_INIT_EXT = 1 << 30
FUSE_PASSTHROUGH = 1 << 37
FUSE_OVER_IO_URING = 1 << 41

_NAMES = (
    "FUSE_ASYNC_READ FUSE_POSIX_LOCKS FUSE_FILE_OPS FUSE_ATOMIC_O_TRUNC FUSE_EXPORT_SUPPORT "
    "FUSE_BIG_WRITES FUSE_DONT_MASK FUSE_SPLICE_WRITE FUSE_SPLICE_MOVE FUSE_SPLICE_READ FUSE_FLOCK_LOCKS "
    "FUSE_HAS_IOCTL_DIR FUSE_AUTO_INVAL_DATA FUSE_DO_READDIRPLUS FUSE_READDIRPLUS_AUTO FUSE_ASYNC_DIO "
    "FUSE_WRITEBACK_CACHE FUSE_NO_OPEN_SUPPORT FUSE_PARALLEL_DIROPS FUSE_HANDLE_KILLPRIV FUSE_POSIX_ACL "
    "FUSE_ABORT_ERROR FUSE_MAX_PAGES FUSE_CACHE_SYMLINKS FUSE_NO_OPENDIR_SUPPORT FUSE_EXPLICIT_INVAL_DATA "
    "FUSE_MAP_ALIGNMENT FUSE_SUBMOUNTS FUSE_HANDLE_KILLPRIV_V2 FUSE_SETXATTR_EXT FUSE_INIT_EXT "
    "FUSE_INIT_RESERVED FUSE_SECURITY_CTX FUSE_HAS_INODE_DAX FUSE_CREATE_SUPP_GROUP FUSE_HAS_EXPIRE_ONLY "
    "FUSE_DIRECT_IO_ALLOW_MMAP FUSE_PASSTHROUGH FUSE_NO_EXPORT_SUPPORT FUSE_HAS_RESEND FUSE_ALLOW_IDMAP "
    "FUSE_OVER_IO_URING FUSE_REQUEST_TIMEOUT"
)
FLAG_NAMES = {1 << bit: name for bit, name in enumerate(_NAMES.split())}

# Flags of a reply that any kernel takes without having offered them: they only say that the daemon did look
# at them (FUSE_FILE_OPS: daemons of the 2.8 era set it; FUSE_BIG_WRITES: ignored since 4.20).
_HARMLESS = 1 << 2 | 1 << 5

# The last version whose structures differ without a flag that says so (fuse_init_out grew to 64 bytes).
_LAST_LAYOUT_MINOR = 23


class InitError(FusecrError):
    """A FUSE_INIT message that is not one."""


def flag_names(flags: int) -> list[str]:
    """The names of all set flags (64 bits), ``bit N`` for those without one."""
    return [FLAG_NAMES.get(1 << bit, f"bit {bit}") for bit in range(64) if flags >> bit & 1]


@dataclass(frozen=True)
class InitRequest:
    """The kernel's FUSE_INIT: ``raw`` is the whole message with its header; sizes in bytes."""

    raw: bytes
    unique: int
    major: int
    minor: int
    max_readahead: int
    flags: int


@dataclass(frozen=True)
class InitReply:
    """A daemon's struct fuse_init_out: ``raw`` is the body alone as the daemon sent it (8, 24 or 64 bytes).

    ``flags`` holds flags and flags2. Fields that a shorter reply lacks are 0, as the kernel reads them.
    Sizes in bytes, ``time_gran`` in ns, ``request_timeout`` in seconds.
    """

    raw: bytes
    major: int
    minor: int
    max_readahead: int
    flags: int
    max_background: int
    congestion_threshold: int
    max_write: int
    time_gran: int
    max_pages: int
    map_alignment: int
    max_stack_depth: int
    request_timeout: int

    def flag_names(self) -> list[str]:
        return flag_names(self.flags)


def parse_request(message: bytes) -> InitRequest:
    """The kernel's FUSE_INIT as read from /dev/fuse.

    :raises InitError: it is something else
    """
    if len(message) < IN_HEADER.size + INIT_IN_COMPAT.size:
        raise InitError("FUSE_INIT request", f"{len(message)} bytes are too short")
    length, opcode, unique, *_rest = IN_HEADER.unpack_from(message)
    if opcode != FUSE_INIT or length != len(message):
        raise InitError("FUSE_INIT request", f"opcode {opcode}, length {length} of {len(message)} bytes")
    body = message[IN_HEADER.size :]
    major, minor, readahead, flags = INIT_IN_COMPAT.unpack_from(body)
    if flags & FUSE_INIT_EXT and len(body) >= INIT_IN.size:
        flags |= INIT_IN.unpack_from(body)[4] << 32
    return InitRequest(message, unique, major, minor, readahead, flags)


def parse_init_out(body: bytes) -> InitReply:
    """A daemon's reply without its header. The daemon is hostile: whatever passes here may be given to a
    kernel.

    The kernel (fs/fuse/inode.c process_init_reply()) takes any value of the numbers and clamps them; it ends
    the connection when ``major`` is not 7. Only lengths that exist are let through: 8 (minor < 5), 24 (< 23)
    and 64.

    :raises InitError: why it is none
    """
    if len(body) not in (FUSE_COMPAT_INIT_OUT_SIZE, FUSE_COMPAT_22_INIT_OUT_SIZE, FUSE_INIT_OUT_SIZE):
        raise InitError("FUSE_INIT reply", f"{len(body)} bytes; a reply has 8, 24 or 64")
    (
        major,
        minor,
        readahead,
        flags,
        background,
        congestion,
        max_write,
        gran,
        pages,
        alignment,
        flags2,
        stack,
        timeout,
        *_unused,
    ) = INIT_OUT.unpack(body.ljust(FUSE_INIT_OUT_SIZE, b"\0"))
    if major != FUSE_KERNEL_VERSION:
        raise InitError("FUSE_INIT reply", f"protocol {major}.{minor}; the kernel speaks {FUSE_KERNEL_VERSION}")
    if flags & FUSE_INIT_EXT:
        flags |= flags2 << 32
    return InitReply(
        raw=bytes(body),
        major=major,
        minor=minor,
        max_readahead=readahead,
        flags=flags,
        max_background=background,
        congestion_threshold=congestion,
        max_write=max_write,
        time_gran=gran,
        max_pages=pages,
        map_alignment=alignment,
        max_stack_depth=stack,
        request_timeout=timeout,
    )


def parse_reply(message: bytes, unique: int) -> InitReply:
    """A reply as a daemon writes it to /dev/fuse, header included.

    :param unique: of the request
    :raises InitError: not an answer to that request, an errno instead of an answer, or malformed
    """
    if len(message) < OUT_HEADER.size:
        raise InitError("FUSE_INIT reply", f"{len(message)} bytes are shorter than a header")
    length, error, answered = OUT_HEADER.unpack_from(message)
    if length != len(message):
        raise InitError("FUSE_INIT reply", f"its header says {length} bytes, it has {len(message)}")
    if answered != unique:
        raise InitError("FUSE_INIT reply", f"answers request {answered}, asked was {unique}")
    if error:
        raise InitError("FUSE_INIT reply", f"the daemon answered with error {error}")
    return parse_init_out(message[OUT_HEADER.size :])


def compare(reply: InitReply, offered: InitRequest) -> list[str]:
    """Why a recorded reply cannot be given to the kernel that sends ``offered``; empty if it can.

    A kernel ignores flags that it does not know (process_init_reply()): the daemon would rely on a feature
    that is not there. Numbers need no comparison, each kernel clamps them to its own limits.
    """
    reasons = []
    if reply.major != offered.major:
        reasons.append(f"the daemon speaks FUSE {reply.major}.{reply.minor}, the kernel {offered.major}.{offered.minor}")
    if offered.minor < min(reply.minor, _LAST_LAYOUT_MINOR):
        reasons.append(
            f"messages of FUSE {reply.major}.{reply.minor} have another layout than the kernel's {offered.major}.{offered.minor}"
        )
    missing = reply.flags & ~offered.flags & ~_HARMLESS
    reasons += [f"the kernel does not offer {name}" for name in flag_names(missing)]
    return reasons
