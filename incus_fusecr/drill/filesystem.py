# SPDX-License-Identifier: Apache-2.0
"""The drill's file system: ``python3 filesystem.py DIRECTORY MOUNTPOINT`` shows a directory, until it is unmounted or SIGTERM.

For pyfuse3 (3.2 of Debian 12 and later) and trio; it imports nothing else, as the interpreter that has these may be another
one. Inode numbers are those of the directory's files, so two copies of this daemon call the same file the same. Files are
read and written past the page cache: each read asks the daemon.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

import pyfuse3
import trio

TIMEOUT = 1.0  # seconds for which the kernel may keep names and attributes
COPIED = (
    "st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_atime_ns", "st_mtime_ns", "st_ctime_ns",
)  # fmt: skip


class Directory(pyfuse3.Operations):  # type: ignore[misc]
    """``paths``: of each inode that the kernel was told of; a renamed file keeps its number."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.root = os.stat(directory).st_ino
        self.paths: dict[int, str] = {pyfuse3.ROOT_INODE: directory}
        self.listings: dict[int, tuple[str, list[tuple[int, str]]]] = {}
        self.serial = 1 << 32  # handles of directories; those of files are descriptors

    def _path(self, inode: int, name: bytes | None = None) -> str:
        try:
            path = self.paths[inode]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None
        return path if name is None else os.path.join(path, os.fsdecode(name))

    def _entry(self, found: os.stat_result) -> Any:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.ROOT_INODE if found.st_ino == self.root else found.st_ino
        for name in COPIED:
            setattr(entry, name, getattr(found, name))
        entry.st_blksize, entry.st_blocks = 4096, found.st_blocks
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = TIMEOUT
        return entry

    def _at(self, path: str, *, remember: bool = True) -> Any:
        try:
            found = os.lstat(path)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        entry = self._entry(found)
        if remember and entry.st_ino != pyfuse3.ROOT_INODE:
            self.paths[entry.st_ino] = path
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        if name == b".":
            return self._at(self._path(parent_inode))
        path = self._path(parent_inode, name)
        return self._at(os.path.dirname(self._path(parent_inode)) if name == b".." else path)

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        return self._at(self._path(inode), remember=False)

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        path = self._path(inode)
        try:
            if fields.update_size:
                os.truncate(path if fh is None else fh, attr.st_size)
            if fields.update_mode:
                os.chmod(path, attr.st_mode & 0o7777)
            if fields.update_mtime:
                os.utime(path, ns=(os.lstat(path).st_atime_ns, attr.st_mtime_ns))
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        return await self.getattr(inode)

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        try:
            fd = os.open(self._path(inode), flags & ~(os.O_CREAT | os.O_EXCL) | os.O_CLOEXEC)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        return pyfuse3.FileInfo(fh=fd, direct_io=True)

    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> tuple[Any, Any]:
        path = self._path(parent_inode, name)
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, mode)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        return pyfuse3.FileInfo(fh=fd, direct_io=True), self._at(path)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        try:
            return os.pread(fh, size, off)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        try:
            return os.pwrite(fh, buf, off)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    async def flush(self, fh: int) -> None:
        """What was written is in the directory already."""

    async def fsync(self, fh: int, datasync: bool) -> None:
        """Likewise."""

    async def release(self, fh: int) -> None:
        os.close(fh)

    async def opendir(self, inode: int, ctx: Any) -> int:
        self.serial += 1
        self.listings[self.serial] = self._path(inode), []
        return self.serial

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        path, listing = self.listings[fh]
        if start_id == 0 or not listing:
            # In the order of inode numbers, which go on growing: an offset means the same to a copy of this daemon.
            listing = sorted((entry.inode(), entry.name) for entry in os.scandir(path))
            self.listings[fh] = path, listing
        for number, name in listing:
            if number <= start_id:
                continue
            try:
                entry = self._at(os.path.join(path, name))
            except pyfuse3.FUSEError:
                continue
            if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, number):
                break

    async def releasedir(self, fh: int) -> None:
        self.listings.pop(fh, None)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> Any:
        path = self._path(parent_inode, name)
        try:
            os.mkdir(path, mode)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        return self._at(path)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        self._call(os.rmdir, self._path(parent_inode, name))

    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        self._call(os.unlink, self._path(parent_inode, name))

    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes, flags: int, ctx: Any
    ) -> None:
        if flags:
            raise pyfuse3.FUSEError(errno.EINVAL)
        new = self._path(parent_inode_new, name_new)
        self._call(os.rename, self._path(parent_inode_old, name_old), new)
        self._at(new)

    @staticmethod
    def _call(what: Any, *paths: str) -> None:
        try:
            what(*paths)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    async def statfs(self, ctx: Any) -> Any:
        found, result = os.statvfs(self._path(pyfuse3.ROOT_INODE)), pyfuse3.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax"):
            setattr(result, name, getattr(found, name))
        return result

    async def access(self, inode: int, mode: int, ctx: Any) -> bool:
        return True  # default_permissions: the kernel decides


async def serve() -> None:
    """Answer the kernel until the unmount, or SIGTERM."""
    async with trio.open_nursery() as nursery:

        async def stop() -> None:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

        nursery.start_soon(stop)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


def main(directory: str, mountpoint: str) -> int:
    """Returns when it is unmounted."""
    options = set(pyfuse3.default_options) | {"fsname=drill", "subtype=fusecr-drill", "allow_other"}
    try:
        pyfuse3.init(Directory(directory), mountpoint, options)
    except (OSError, RuntimeError) as error:
        print(f"Error: {mountpoint}: {error}", file=sys.stderr)
        return 1
    try:
        trio.run(serve)
    finally:
        pyfuse3.close(unmount=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
