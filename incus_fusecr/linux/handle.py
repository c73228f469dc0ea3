# SPDX-License-Identifier: Apache-2.0
"""name_to_handle_at(2) on FUSE: nodeid and generation of an inode without asking its daemon.

fs/fuse/inode.c fuse_encode_fh(): three 32 bit words (nodeid high, nodeid low, generation), type 0x81.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from .libc import AT_EMPTY_PATH, AT_HANDLE_FID, libc, oserror

MAX_HANDLE_SZ = 128
FILEID_INO64_GEN = 0x81


def name_to_handle_at(dirfd: int, path: bytes, flags: int) -> tuple[int, bytes]:
    """Type and bytes of a file handle.

    :raises OSError: with errno and path
    """
    buf = ctypes.create_string_buffer(8 + MAX_HANDLE_SZ)
    struct.pack_into("<Ii", buf, 0, MAX_HANDLE_SZ, 0)
    mount_id = ctypes.c_int()
    if libc.name_to_handle_at(dirfd, path, buf, ctypes.byref(mount_id), flags) < 0:
        raise oserror(path)
    size, kind = struct.unpack_from("<Ii", buf, 0)
    return kind, buf.raw[8 : 8 + size]


def fuse_handle(fd: int) -> tuple[int, int]:
    """(nodeid, generation) of the FUSE inode behind ``fd`` (O_PATH is enough); sends no request.

    :raises OSError: EOPNOTSUPP if it is not a FUSE inode
    """
    try:
        kind, data = name_to_handle_at(fd, b"", AT_EMPTY_PATH)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        # Since 6.6 a file system without full export support answers AT_HANDLE_FID only.
        kind, data = name_to_handle_at(fd, b"", AT_EMPTY_PATH | AT_HANDLE_FID)
    if kind != FILEID_INO64_GEN or len(data) != 12:
        raise OSError(errno.EOPNOTSUPP, f"not a FUSE handle (type {kind:#x})")
    high, low, generation = struct.unpack("<III", data)
    return (high << 32) | low, generation
