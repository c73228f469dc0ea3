# SPDX-License-Identifier: Apache-2.0
"""statx(2) for what os.stat(3) lacks, or would ask a file system for."""

from __future__ import annotations

import ctypes
import os
import struct

from .libc import AT_EMPTY_PATH, check, libc

AT_NO_AUTOMOUNT = 0x800
AT_STATX_DONT_SYNC = 0x4000
STATX_NLINK = 0x4
_STX_NLINK = 0x10  # offsets in struct statx (include/uapi/linux/stat.h)
_STX_DEV = 0x88
_STX_MNT_ID = 0x90


def mount_id(fd: int) -> int:
    """The id of the mount that ``fd`` (O_PATH is enough) is on; asks no file system (since Linux 5.8)."""
    return _mount_id(fd, "", AT_EMPTY_PATH)


def mount_id_at(dirfd: int, path: str) -> int:
    """The same for a path, such as PID/cwd below a procfs: links of procfs lead there without a look-up."""
    return _mount_id(dirfd, path, 0)


def device(fd: int) -> tuple[int, int]:
    """Major and minor of the file system that ``fd`` is on, without asking it."""
    major, minor = struct.unpack_from("<II", _statx(fd, "", AT_EMPTY_PATH), _STX_DEV)
    return int(major), int(minor)


def links(fd: int) -> int:
    """st_nlink as the kernel has it, without asking the file system."""
    return int(struct.unpack_from("<I", _statx(fd, "", AT_EMPTY_PATH, STATX_NLINK), _STX_NLINK)[0])


def _mount_id(dirfd: int, path: str, flags: int) -> int:
    return int(struct.unpack_from("<Q", _statx(dirfd, path, flags), _STX_MNT_ID)[0])


def _statx(dirfd: int, path: str, flags: int, mask: int = 0) -> bytes:
    # Device and mount id are there whatever is asked for (fs/stat.c vfs_statx_path()), and who asks for nothing may ask: FUSE
    # refuses those that do not own a mount without allow_other (fs/fuse/dir.c fuse_getattr()).
    buf = ctypes.create_string_buffer(256)
    flags |= AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC
    check(int(libc.statx(dirfd, os.fsencode(path), flags, mask, buf)), path or "statx")
    return buf.raw
