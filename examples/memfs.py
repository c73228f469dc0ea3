#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A file system that lives in the memory of its daemon: ``python3 memfs.py MOUNTPOINT [-o allow_other]``.

Everything that is stored here is lost with the process, so it shows best that a migration carries the daemon
itself: files, directories, symbolic and hard links, renames, extended attributes, unlinked-but-open files.
Written for pyfuse3 (3.2 of Debian 12, 3.4 of Debian 13, and later) and trio. Runs in the foreground until it
is unmounted or gets SIGTERM.

Inode numbers are given out once and never again. An inode goes when it has no name left, the kernel has
forgotten it and no open file refers to it.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import stat
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyfuse3
import trio
from pyfuse3 import FUSEError

BLOCK = 4096
NAME_MAX = 255
XATTR_MAX = 65536  # XATTR_SIZE_MAX of linux/limits.h
TIMEOUT = 1.0  # seconds for which the kernel may keep names and attributes: the daemon is their only source


@dataclass
class Inode:
    number: int
    mode: int
    uid: int
    gid: int
    parent: int = 0  # of a directory, for ".."
    rdev: int = 0
    links: int = 1
    data: bytearray = field(default_factory=bytearray)
    target: bytes = b""
    names: dict[bytes, int] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    atime: int = 0
    mtime: int = 0
    ctime: int = 0
    lookups: int = 0  # references that the kernel holds
    opens: int = 0

    def touch(self, *, content: bool = False) -> None:
        self.ctime = time.time_ns()
        if content:
            self.mtime = self.ctime

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)


class MemFs(pyfuse3.Operations):
    """The operations; pyfuse3 calls them from one thread, so none needs a lock."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, limit: int, uid: int, gid: int) -> None:
        super().__init__()
        self.limit = limit
        self.used = 0
        self.inodes: dict[int, Inode] = {}
        self.next_inode = pyfuse3.ROOT_INODE
        self.handles: dict[int, Inode] = {}
        self.listings: dict[int, list[tuple[bytes, int]]] = {}
        self.next_handle = 1
        root = self._new(stat.S_IFDIR | 0o755, uid, gid)
        root.parent, root.links = root.number, 2
        root.lookups = 1  # the kernel never looks the root up

    # -- the inode table

    def _new(self, mode: int, uid: int, gid: int) -> Inode:
        inode = Inode(self.next_inode, mode, uid, gid)
        inode.touch(content=True)
        inode.atime = inode.mtime
        self.inodes[inode.number] = inode
        self.next_inode += 1
        return inode

    def _get(self, number: int) -> Inode:
        try:
            return self.inodes[number]
        except KeyError:
            raise FUSEError(errno.ESTALE) from None

    def _drop(self, inode: Inode) -> None:
        if inode.links == 0 and inode.lookups == 0 and inode.opens == 0:
            self.used -= len(inode.data)
            del self.inodes[inode.number]

    def _child(self, directory: Inode, name: bytes) -> Inode:
        if name == b".":
            return directory
        if name == b"..":
            return self._get(directory.parent)
        try:
            return self._get(directory.names[name])
        except KeyError:
            raise FUSEError(errno.ENOENT) from None

    def _add(self, number: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> Inode:
        directory = self._get(number)
        self._check_new(directory, name)
        # A set-group-ID directory hands down its group, and the bit itself to directories: inode_init_owner()
        gid = directory.gid if directory.mode & stat.S_ISGID else ctx.gid
        if stat.S_ISDIR(mode) and directory.mode & stat.S_ISGID:
            mode |= stat.S_ISGID
        inode = self._new(mode & ~ctx.umask if not stat.S_ISLNK(mode) else mode, ctx.uid, gid)
        directory.names[name] = inode.number
        directory.touch(content=True)
        if inode.is_dir:
            inode.parent, inode.links = number, 2
            directory.links += 1
        return inode

    def _check_new(self, directory: Inode, name: bytes) -> None:
        if len(name) > NAME_MAX:
            raise FUSEError(errno.ENAMETOOLONG)
        if directory.links == 0:
            raise FUSEError(errno.ENOENT)  # removed, but still somebody's working directory
        if name in directory.names:
            raise FUSEError(errno.EEXIST)

    def _unlink(self, directory: Inode, name: bytes, inode: Inode) -> None:
        del directory.names[name]
        directory.touch(content=True)
        if inode.is_dir:
            inode.links = 0
            directory.links -= 1
        else:
            inode.links -= 1
            inode.touch()
        self._drop(inode)

    def _resize(self, inode: Inode, size: int) -> None:
        grow = size - len(inode.data)
        if self.used + grow > self.limit:
            raise FUSEError(errno.ENOSPC)
        if grow < 0:
            del inode.data[size:]
        else:
            inode.data.extend(bytes(grow))
        self.used += grow

    def _entry(self, inode: Inode, *, counted: bool = False) -> pyfuse3.EntryAttributes:
        if counted:
            inode.lookups += 1
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_mode, entry.st_nlink = inode.number, inode.mode, inode.links
        entry.st_uid, entry.st_gid, entry.st_rdev = inode.uid, inode.gid, inode.rdev
        entry.st_size = len(inode.target) if stat.S_ISLNK(inode.mode) else len(inode.data)
        entry.st_blksize, entry.st_blocks = BLOCK, -(-len(inode.data) // 512)
        entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = inode.atime, inode.mtime, inode.ctime
        entry.generation, entry.entry_timeout, entry.attr_timeout = 0, TIMEOUT, TIMEOUT
        return entry

    def _open(self, inode: Inode) -> int:
        handle = self.next_handle
        self.next_handle += 1
        self.handles[handle] = inode
        inode.opens += 1
        return handle

    def _handle(self, handle: int) -> Inode:
        try:
            return self.handles[handle]
        except KeyError:
            raise FUSEError(errno.EBADF) from None

    # -- names

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry(self._child(self._get(parent_inode), name), counted=True)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, count in inode_list:
            inode = self.inodes.get(number)
            if inode is not None:
                inode.lookups -= count
                self._drop(inode)

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        inode = self._add(parent_inode, name, mode, ctx)
        inode.rdev = rdev
        return self._entry(inode, counted=True)

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry(
            self._add(parent_inode, name, stat.S_IFDIR | stat.S_IMODE(mode), ctx), counted=True
        )

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        inode = self._add(parent_inode, name, stat.S_IFLNK | 0o777, ctx)
        inode.target = target
        return self._entry(inode, counted=True)

    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self._get(inode).target

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        directory, linked = self._get(new_parent_inode), self._get(inode)
        if linked.is_dir:
            raise FUSEError(errno.EPERM)
        if linked.links == 0:
            raise FUSEError(errno.ENOENT)
        self._check_new(directory, new_name)
        directory.names[new_name] = linked.number
        directory.touch(content=True)
        linked.links += 1
        linked.touch()
        return self._entry(linked, counted=True)

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        directory = self._get(parent_inode)
        inode = self._child(directory, name)
        if inode.is_dir:
            raise FUSEError(errno.EISDIR)
        self._unlink(directory, name, inode)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        directory = self._get(parent_inode)
        inode = self._child(directory, name)
        if not inode.is_dir:
            raise FUSEError(errno.ENOTDIR)
        if inode.names:
            raise FUSEError(errno.ENOTEMPTY)
        self._unlink(directory, name, inode)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        # The kernel has checked that no directory goes below itself: it holds s_vfs_rename_mutex.
        old, new = self._get(parent_inode_old), self._get(parent_inode_new)
        moved = self._child(old, name_old)
        replaced = self._get(new.names[name_new]) if name_new in new.names else None
        if flags & ~(pyfuse3.RENAME_EXCHANGE | pyfuse3.RENAME_NOREPLACE):
            raise FUSEError(errno.EINVAL)
        if flags & pyfuse3.RENAME_EXCHANGE:
            if replaced is None:
                raise FUSEError(errno.ENOENT)
            self._place(old, name_old, replaced, leaves=new)
            self._place(new, name_new, moved, leaves=old)
            return
        if replaced is moved:
            return
        if replaced is not None:
            self._check_replace(moved, replaced, flags)
            self._unlink(new, name_new, replaced)
        elif len(name_new) > NAME_MAX:
            raise FUSEError(errno.ENAMETOOLONG)
        del old.names[name_old]
        self._place(new, name_new, moved, leaves=old)

    @staticmethod
    def _check_replace(moved: Inode, replaced: Inode, flags: int) -> None:
        if flags & pyfuse3.RENAME_NOREPLACE:
            raise FUSEError(errno.EEXIST)
        if replaced.is_dir and not moved.is_dir:
            raise FUSEError(errno.EISDIR)
        if moved.is_dir and not replaced.is_dir:
            raise FUSEError(errno.ENOTDIR)
        if replaced.names:
            raise FUSEError(errno.ENOTEMPTY)

    @staticmethod
    def _place(directory: Inode, name: bytes, inode: Inode, *, leaves: Inode) -> None:
        directory.names[name] = inode.number
        if inode.is_dir and directory is not leaves:
            inode.parent = directory.number
            leaves.links -= 1
            directory.links += 1
        for touched in (directory, leaves):
            touched.touch(content=True)
        inode.touch()

    # -- attributes

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(self._get(inode))

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        changed = self._get(inode)
        if fields.update_size:
            if changed.is_dir:
                raise FUSEError(errno.EISDIR)
            self._resize(changed, attr.st_size)
            changed.touch(content=True)
        if fields.update_mode:
            changed.mode = stat.S_IFMT(changed.mode) | stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            changed.uid = attr.st_uid
        if fields.update_gid:
            changed.gid = attr.st_gid
        if fields.update_atime:
            changed.atime = attr.st_atime_ns
        if fields.update_mtime:
            changed.mtime = attr.st_mtime_ns
        changed.touch()
        return self._entry(changed)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        result = pyfuse3.StatvfsData()
        result.f_bsize = result.f_frsize = BLOCK
        result.f_blocks = self.limit // BLOCK
        result.f_bfree = result.f_bavail = (self.limit - self.used) // BLOCK
        result.f_files = result.f_ffree = result.f_favail = 1 << 20
        result.f_namemax = NAME_MAX
        return result

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        changed = self._get(inode)
        used = sum(len(n) + len(v) for n, v in changed.xattrs.items() if n != name)
        if used + len(name) + len(value) > XATTR_MAX:
            raise FUSEError(errno.ENOSPC)
        changed.xattrs[name] = bytes(value)
        changed.touch()

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        try:
            return self._get(inode).xattrs[name]
        except KeyError:
            raise FUSEError(pyfuse3.ENOATTR) from None

    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return list(self._get(inode).xattrs)

    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        if self._get(inode).xattrs.pop(name, None) is None:
            raise FUSEError(pyfuse3.ENOATTR)
        self._get(inode).touch()

    # -- files

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        opened = self._get(inode)
        if flags & os.O_TRUNC:
            self._resize(opened, 0)
            opened.touch(content=True)
        return pyfuse3.FileInfo(fh=self._open(opened))

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        inode = self._add(parent_inode, name, stat.S_IFREG | stat.S_IMODE(mode), ctx)
        return pyfuse3.FileInfo(fh=self._open(inode)), self._entry(inode, counted=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        inode = self._handle(fh)
        inode.atime = time.time_ns()
        return bytes(inode.data[off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        inode = self._handle(fh)
        if off + len(buf) > len(inode.data):
            self._resize(inode, off + len(buf))
        inode.data[off : off + len(buf)] = buf
        inode.touch(content=True)
        return len(buf)

    async def flush(self, fh: int) -> None:
        self._handle(fh)

    async def fsync(self, fh: int, datasync: bool) -> None:
        self._handle(fh)  # memory is as stable as this file system gets

    async def release(self, fh: int) -> None:
        inode = self.handles.pop(fh)
        inode.opens -= 1
        self._drop(inode)

    # -- directories

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return self._open(self._get(inode))

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = self._handle(fh)
        if start_id == 0 or fh not in self.listings:
            # rewinddir has to show what is there now; later calls go on in the same list: offsets hold
            self.listings[fh] = list(directory.names.items())
        listing = self.listings[fh]
        for position in range(start_id, len(listing)):
            name, number = listing[position]
            if directory.names.get(name) != number:
                continue  # unlinked or replaced meanwhile
            inode = self._get(number)
            if not pyfuse3.readdir_reply(token, name, self._entry(inode), position + 1):
                break
            inode.lookups += 1

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        self._handle(fh)

    async def releasedir(self, fh: int) -> None:
        self.listings.pop(fh, None)
        await self.release(fh)

    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True  # default_permissions: the kernel decides


def size_of(text: str) -> int:
    """Bytes of ``64M`` and the like."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    return int(text[:-1] if factor > 1 else text) * factor


def parse(arguments: Sequence[str]) -> tuple[str, set[str], int]:
    parser = argparse.ArgumentParser(description="A file system in the memory of its daemon.")
    parser.add_argument("mountpoint")
    parser.add_argument(
        "-o", dest="options", action="append", default=[], help="mount options: size=64M, allow_other, ..."
    )
    parsed = parser.parse_args(arguments)
    options = set(pyfuse3.default_options) | {"fsname=memfs", "subtype=memfs"}
    limit = 256 << 20
    for option in filter(None, ",".join(parsed.options).split(",")):
        if option.startswith("size="):
            try:
                limit = size_of(option[5:])
            except ValueError:
                parser.error(f"-o {option}: a size is a number, with K, M or G behind it")
        else:
            options.add(option)
    return parsed.mountpoint, options, limit


async def serve() -> None:
    """Answer the kernel until the unmount or SIGTERM, SIGINT."""
    async with trio.open_nursery() as nursery:

        async def stop() -> None:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

        nursery.start_soon(stop)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


def main(arguments: Sequence[str]) -> int:
    mountpoint, options, limit = parse(arguments)
    try:
        above = os.stat(mountpoint)
        pyfuse3.init(MemFs(limit, above.st_uid, above.st_gid), mountpoint, options)
    except (OSError, RuntimeError) as error:
        print(f"Error: mount of memfs on {mountpoint}: {error}", file=sys.stderr)
        return 1
    try:
        trio.run(serve)
    finally:
        pyfuse3.close(unmount=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
