# SPDX-License-Identifier: Apache-2.0
"""The mount calls that work on descriptors: open_tree(2), move_mount(2), mount_setattr(2), fspick(2), openat2(2).

But for :func:`reconfigure`, none of them asks a file system anything when its path is empty. Errors are OSError with errno
and what was meant.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable

from .fd import Fd
from .libc import AT_EMPTY_PATH, AT_FDCWD, SYS_openat2, check, libc
from .mount import MNT_DETACH

# Numbers of the unified table: the same on x86_64 and aarch64.
SYS_open_tree = 428
SYS_move_mount = 429
SYS_fsconfig = 431
SYS_fspick = 433
SYS_mount_setattr = 442

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
AT_RECURSIVE = 0x8000

MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
MOVE_MOUNT_SET_GROUP = 0x100  # since Linux 5.15: not moved, it joins the peer group
MOVE_MOUNT_BENEATH = 0x200  # since Linux 6.5

FSPICK_CLOEXEC = 0x1
FSPICK_EMPTY_PATH = 0x8
FSCONFIG_CMD_RECONFIGURE = 7

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR__ATIME = 0x70
MOUNT_ATTR_RELATIME = 0x0
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_NOSYMFOLLOW = 0x200000

RESOLVE_NO_MAGICLINKS = 0x2
RESOLVE_NO_SYMLINKS = 0x4
RESOLVE_BENEATH = 0x8
RESOLVE_IN_ROOT = 0x10
RESOLVE_CACHED = 0x20  # since Linux 5.12: EAGAIN instead of asking a file system

CLONE_FS = 0x200

_ATTR = struct.Struct("<QQQQ")  # struct mount_attr
_HOW = struct.Struct("<QQQ")  # struct open_how


def _prototype(number: int, *types: type) -> Callable[..., int]:
    """syscall(2) with one number and with types: these calls are made by the thousand, and conversions cost more than they do."""
    call = libc["syscall"]  # a function object of its own
    call.argtypes = (ctypes.c_long, *types)
    call.restype = ctypes.c_long
    return lambda *args: int(call(number, *args))


_open_tree = _prototype(SYS_open_tree, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_move_mount = _prototype(SYS_move_mount, ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_mount_setattr = _prototype(SYS_mount_setattr, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_char_p, ctypes.c_size_t)
_fspick = _prototype(SYS_fspick, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_fsconfig = _prototype(SYS_fsconfig, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int)
_openat2 = _prototype(SYS_openat2, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)


def open_tree(fd: Fd, flags: int = 0) -> Fd:
    """A descriptor of the mount behind ``fd``; with OPEN_TREE_CLONE of a detached copy of it.

    :raises OSError: EINVAL if the caller is in another mount namespace than the one ``fd`` is attached in, or was made in
    """
    return Fd(check(_open_tree(fd.fileno(), b"", flags | AT_EMPTY_PATH | OPEN_TREE_CLOEXEC), f"open_tree {fd.name}"), fd.name)


def clone_at(path: str) -> Fd:
    """A detached copy of what is at ``path`` in the caller's mount namespace.

    :raises OSError: with the path
    """
    return Fd(check(_open_tree(AT_FDCWD, os.fsencode(path), OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC), path), path)


def move_mount(tree: Fd, to: Fd, flags: int = 0) -> None:
    """Attach ``tree`` on the directory or file ``to`` (O_PATH), or with MOVE_MOUNT_BENEATH below the mount whose root it is.

    :raises OSError: EINVAL for BENEATH: before Linux 6.5; the mount is locked, has something on top, or is no longer there
    """
    flags |= MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    check(_move_mount(tree.fileno(), b"", to.fileno(), b"", flags), f"move_mount to {to.name}")


def mount_setattr(tree: Fd, set_: int = 0, clear: int = 0, propagation: int = 0) -> None:
    """Change flags (MOUNT_ATTR_*) and propagation (one of MS_SHARED, ...) of one mount (since Linux 5.12)."""
    attr = _ATTR.pack(set_, clear, propagation, 0)
    check(_mount_setattr(tree.fileno(), b"", AT_EMPTY_PATH, attr, _ATTR.size), f"mount_setattr {tree.name}")


def reconfigure(root: Fd) -> None:
    """Remount the file system whose mount's root is ``root``, as it is: what the kernel remembers of it and nobody uses is dropped
    (fs/super.c reconfigure_super(), shrink_dcache_sb()).

    Writes dirty pages back first, which may wait for its daemon for ever.

    :raises OSError: EPERM without CAP_SYS_ADMIN in the file system's user namespace
    """
    with Fd(check(_fspick(root.fileno(), b"", FSPICK_CLOEXEC | FSPICK_EMPTY_PATH), f"fspick {root.name}"), root.name) as context:
        check(_fsconfig(context.fileno(), FSCONFIG_CMD_RECONFIGURE, None, None, 0), f"fsconfig {root.name}")


def open_beneath(base: Fd, path: str, resolve: int = 0) -> Fd:
    """O_PATH descriptor of ``path`` below ``base``: no symbolic link is followed, nothing leads out; mounts are crossed.

    :param resolve: RESOLVE_CACHED to be refused (EAGAIN) where a file system would have to be asked
    :raises OSError: ELOOP at a symbolic link
    """
    resolve |= RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
    how = _HOW.pack(os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW, 0, resolve)
    return Fd(check(_openat2(base.fileno(), os.fsencode(path), how, _HOW.size), path), path)


def open_in_root(root: Fd, path: str) -> Fd:
    """O_PATH descriptor of what ``path`` is for who has ``root`` as its root directory; links of procfs are not followed.

    May wait for a file system that is on the way.
    """
    how = _HOW.pack(os.O_PATH | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    return Fd(check(_openat2(root.fileno(), os.fsencode(path), how, _HOW.size), path), path)


def detach(mount: Fd) -> None:
    """umount2(MNT_DETACH) of exactly the mount whose root ``mount`` is, whatever its path leads to by now.

    umount2(2) has no descriptor argument: the caller's working directory has to be a procfs in which it has an entry.

    :raises OSError: EINVAL if the mount is locked (mount_namespaces(7)) or of another namespace
    """
    check(int(libc.umount2(f"self/fd/{mount.fileno()}".encode(), MNT_DETACH)), f"umount {mount.name}")
