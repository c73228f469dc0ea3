#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A client of a file system (or of a TCP echo server) that notices everything a migration could spoil.

``python3 fsclient.py MODE DIR REPORT [options]`` works in ``DIR/NAME`` (NAME: the mode unless ``--name`` is
given) until SIGTERM, ``--duration`` or ``--rounds``, and keeps rewriting REPORT, which has to lie outside of
the file system under test. Exit code: 0 without errors, 1 with, 2 when it could not start. Stdlib only; needs
``clientlib.py`` and ``tcpecho.py`` beside it, nothing else, so that it can be pushed into a container.

REPORT is JSON, replaced by rename, at most every 0.2 s and at the end:

================== ==========================================================================================
operations, errors  counts; any errno, wrong content, wrong position, wrong path is an error
first_errors        the texts of the first 20, each after its CLOCK_REALTIME
longest_gap_ms      between two successful operations: the greater of the differences of CLOCK_MONOTONIC and
                    CLOCK_REALTIME, as CRIU's time namespace lets CLOCK_MONOTONIC go on from the dump's value
                    and so hides the time between dump and restore (longest_gap_monotonic_ms)
longest_gap_realtime  when it began
stalls              the newest 100 gaps beyond ``--stall-ms`` plus the pace: ``{"realtime", "ms"}``
pace_ms             what the client waits by itself between two rounds
state, pid          ``running`` or ``stopped``; pid as the client sees it
started, updated    CLOCK_REALTIME
detail              of the mode: ``log`` and ``lines`` acknowledged of append, ``bytes``, ``connections``,
                    ``resets`` of the TCP modes
================== ==========================================================================================
"""

from __future__ import annotations

import argparse
import mmap
import os
import subprocess
import sys
import time
from typing import Any

from clientlib import RECORD, Client, append_line, check, compare, pattern, run
from tcpecho import TcpClient, TcpServer

PAGE = mmap.PAGESIZE


def drop_pages(fd: int) -> None:
    """Make the next read ask the daemon and not the page cache."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


class Reader(Client):
    """Re-reads a file through one open fd; every second pass is made with dropped pages."""

    CHUNK = 32768

    def setup(self) -> None:
        super().setup()
        self.size = self.options.size
        self.fd = os.open(self.known_file("content", self.size), os.O_RDONLY)
        self.at = 0
        self.passes = 0

    def round(self) -> None:
        # The position is the kernel's, not given by lseek: a restore that loses it shows at once.
        wanted = pattern(self.at, min(self.CHUNK, self.size - self.at))
        compare(os.read(self.fd, self.CHUNK), wanted, f"read at {self.at}")
        self.at += len(wanted)
        found = os.lseek(self.fd, 0, os.SEEK_CUR)
        check(found == self.at, f"position {found} instead of {self.at}")
        self.ok()
        if self.at >= self.size:
            check(os.read(self.fd, 1) == b"", "no end of file at the end")
            self.resync()
            self.passes += 1
            if self.passes % 2:
                drop_pages(self.fd)

    def resync(self) -> None:
        self.at = os.lseek(self.fd, 0, os.SEEK_SET)


class Writer(Client):
    """Writes slots by pwrite and by write, reads others back and compares with what it knows."""

    SLOTS = 64

    def setup(self) -> None:
        super().setup()
        self.fd = os.open(self.path("slots"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self.generation = [0] * self.SLOTS
        for slot in range(self.SLOTS):
            os.pwrite(self.fd, self.content(slot), slot * PAGE)

    def content(self, slot: int) -> bytes:
        return (b"%04d %010d\n" % (slot, self.generation[slot])) * (PAGE // RECORD)

    def round(self) -> None:
        slot = self.rounds * 7 % self.SLOTS
        before, self.generation[slot] = self.generation[slot], self.rounds + 1
        data = self.content(slot)
        try:
            if self.rounds % 2:
                written = os.pwrite(self.fd, data, slot * PAGE)
            else:
                os.lseek(self.fd, slot * PAGE, os.SEEK_SET)
                written = os.write(self.fd, data)
                position = os.lseek(self.fd, 0, os.SEEK_CUR)
                check(position == (slot + 1) * PAGE, f"position {position} after writing slot {slot}")
        except OSError:
            self.generation[slot] = before
            raise
        check(written == PAGE, f"short write of {written} bytes to slot {slot}")
        self.ok()
        if self.rounds % 64 == 63:
            os.fsync(self.fd)
            self.ok()
        if self.rounds % 4 == 0:
            drop_pages(self.fd)
        other = (self.rounds * 13 + 5) % self.SLOTS
        compare(os.pread(self.fd, PAGE, other * PAGE), self.content(other), f"slot {other}")
        self.ok()


class Append(Client):
    """Numbered lines through one O_APPEND fd; check.append_holes() looks at the log afterwards."""

    pace = 0.004

    def setup(self) -> None:
        super().setup()
        self.fd = os.open(self.path("log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o600)
        self.number = 0
        self.end = 0
        self.report.data["detail"]["log"] = self.path("log")

    def round(self) -> None:
        line = append_line(self.number, time.time())
        written = os.write(self.fd, line)
        check(written == len(line), f"short write of {written} bytes in line {self.number}")
        self.end += written
        # acknowledged: the log must hold this line from now on
        self.report.data["detail"]["lines"] = self.number = self.number + 1
        position = os.lseek(self.fd, 0, os.SEEK_CUR)
        check(position == self.end, f"position {position} instead of {self.end} after line {self.number - 1}")
        self.ok()

    def resync(self) -> None:
        self.end = os.fstat(self.fd).st_size


class Dirs(Client):
    """An open directory fd: listed, and names resolved from it, while entries come, are renamed and go.

    sshfs hands out an sftp directory handle, which cannot be rewound; where a second listing of the same fd
    comes back empty already at the start, the directory is opened anew for each listing (``detail.rewinds``).
    ``.fuse_hidden*`` is libfuse's: RELEASE comes after close() returned, so an unlink may find the file open.
    """

    NAMES = ("a", "b with space", "c-\u00e4\u00f6\u00fc", "d" * 200, "e.txt")

    def setup(self) -> None:
        super().setup()
        for name in os.listdir(self.place):
            (os.rmdir if os.path.isdir(self.path(name)) else os.unlink)(self.path(name))
        for name in self.NAMES:
            self.known_file(name, RECORD)
        self.fd = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        os.listdir(self.fd)
        self.known_file("probe", RECORD)
        self.rewinds = "probe" in os.listdir(self.fd)
        os.unlink(self.path("probe"))
        self.report.data["detail"]["rewinds"] = self.rewinds

    def listing(self, *also: str) -> None:
        fd = self.fd if self.rewinds else os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.fd)
        try:
            with os.scandir(fd) as entries:
                found = {entry.name for entry in entries if not entry.name.startswith(".fuse_hidden")}
        finally:
            if fd != self.fd:
                os.close(fd)
        wanted = {*self.NAMES, *also}
        check(found == wanted, f"listing lacks {wanted - found or '{}'}, has besides {found - wanted or '{}'}")
        self.ok()

    def round(self) -> None:
        number = self.rounds
        new, renamed, sub = f"new-{number}", f"renamed-{number}", f"sub-{number}"
        fd = os.open(self.path(new), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(fd, pattern(0, RECORD))
        finally:
            os.close(fd)
        self.listing(new)
        os.rename(self.path(new), renamed, dst_dir_fd=self.fd)
        self.listing(renamed)
        check(not os.path.lexists(self.path(new)), f"{new} is still there after its rename")
        os.mkdir(sub, dir_fd=self.fd)
        self.listing(renamed, sub)
        with open(self.path(renamed), "rb", buffering=0) as file:
            compare(file.read(RECORD + 1), pattern(0, RECORD), renamed)
        os.unlink(renamed, dir_fd=self.fd)
        os.rmdir(self.path(sub))
        self.listing()

    def resync(self) -> None:
        for name in set(os.listdir(self.place)) - set(self.NAMES):
            if name.startswith(".fuse_hidden"):
                continue
            (os.rmdir if name.startswith("sub-") else os.unlink)(self.path(name))


class Cwd(Client):
    """Lives inside: getcwd, /proc/self/cwd and relative paths."""

    def setup(self) -> None:
        super().setup()
        os.makedirs(self.path("inner"), exist_ok=True)
        self.known_file("up", 64, 1)
        self.known_file("inner/here", 128, 2)
        os.chdir(self.path("inner"))
        self.wanted = os.path.realpath(self.path("inner"))

    def round(self) -> None:
        for name, found in (("getcwd", os.getcwd()), ("/proc/self/cwd", os.readlink("/proc/self/cwd"))):
            check(found == self.wanted, f"{name} is {found} instead of {self.wanted}")
            self.ok()
        for name, wanted in (("here", pattern(0, 128, 2)), ("../up", pattern(0, 64, 1))):
            with open(name, "rb", buffering=0) as file:
                compare(file.read(4096), wanted, name)
            self.ok()
        check(os.listdir(".") == ["here"], f"listing of the working directory: {os.listdir('.')}")
        self.ok()


class Mapper(Client):
    """A MAP_PRIVATE mapping whose pages are faulted in again and again, one of them privately changed."""

    def setup(self) -> None:
        super().setup()
        self.size = max(self.options.size // PAGE, 4) * PAGE
        self.fd = os.open(self.known_file("mapped", self.size), os.O_RDONLY)
        more: dict[str, Any] = {}
        if self.options.no_fd:
            if sys.version_info < (3, 13):
                raise SystemExit("--no-fd: only Python 3.13 and later can map a file without keeping an fd of it")
            more["trackfd"] = False
        self.map = mmap.mmap(self.fd, self.size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, **more)
        self.map[:RECORD] = self.private = b"private 8 bytes\n"  # copy on write: never reaches the file
        if self.options.no_fd:
            os.close(self.fd)
            self.fd = -1
        self.page = 1

    def round(self) -> None:
        wanted = pattern(self.page * PAGE, PAGE)
        compare(self.map[self.page * PAGE : (self.page + 1) * PAGE], wanted, f"page {self.page}")
        compare(self.map[:RECORD], self.private, "the private page")
        self.ok()
        self.page += 1
        if self.page * PAGE >= self.size:
            self.page = 1
            self.map.madvise(mmap.MADV_DONTNEED, PAGE, self.size - PAGE)  # forget all but the private page
            if self.fd >= 0:
                drop_pages(self.fd)


class Bind(Client):
    """Works through a bind mount of a directory of the file system (needs CAP_SYS_ADMIN to make it)."""

    def setup(self) -> None:
        super().setup()
        self.known_file("shared", 4096, 3)
        self.bind = self.options.bind_at
        if not self.bind:
            raise SystemExit("bind: needs --bind-at PATH, where it can bind-mount its directory")
        os.makedirs(self.bind, exist_ok=True)
        subprocess.run(["mount", "--bind", self.place, self.bind], check=True)
        os.chdir(self.bind)
        self.wanted = os.path.realpath(self.bind)
        self.fd = os.open(f"{self.bind}/shared", os.O_RDWR)
        self.link = os.readlink(f"/proc/self/fd/{self.fd}")

    def round(self) -> None:
        check(os.getcwd() == self.wanted, f"getcwd is {os.getcwd()} instead of {self.wanted}")
        link = os.readlink(f"/proc/self/fd/{self.fd}")
        check(link == self.link, f"the open file is {link} instead of {self.link}")
        drop_pages(self.fd)
        compare(os.pread(self.fd, 4097, 0), pattern(0, 4096, 3), "open file")
        self.ok()
        with open(f"{self.bind}/shared", "rb", buffering=0) as file:
            compare(file.read(4097), pattern(0, 4096, 3), "file through the bind mount")
        self.ok()

    def close(self) -> None:
        os.chdir("/")
        os.close(self.fd)
        subprocess.run(["umount", self.bind], check=True)


class Meta(Client):
    """chmod, utime, truncate and what stat and fstat say of them."""

    def setup(self) -> None:
        super().setup()
        self.fd = os.open(self.known_file("meta", 4096, 4), os.O_RDWR)

    def round(self) -> None:
        path = self.path("meta")
        mode, seconds, size = (
            (0o640, 0o600, 0o444)[self.rounds % 3],
            1_500_000_000 + self.rounds,
            self.rounds % 5 * 16,
        )
        os.truncate(path, size)
        os.chmod(path, mode)
        os.utime(path, (seconds, seconds))  # whole seconds: sftp knows no others
        self.ok()
        for name, found in (("stat", os.stat(path)), ("fstat", os.fstat(self.fd))):
            for field, got, wanted in (("mode", found.st_mode & 0o7777, mode), ("size", found.st_size, size),
                                       ("mtime", int(found.st_mtime), seconds)):  # fmt: skip
                check(got == wanted, f"{name}: {field} {got:#o} instead of {wanted:#o}")
            self.ok()
        os.chmod(path, 0o600)
        check(os.statvfs(self.place).f_bsize > 0, "statvfs: no block size")
        self.ok()

    def resync(self) -> None:
        os.chmod(self.path("meta"), 0o600)


class Idle(Client):
    """Holds open files and only looks at what must not change: positions, flags, paths, contents."""

    pace = 1.0

    def setup(self) -> None:
        super().setup()
        self.fds: dict[int, tuple[str, int, int, int | None]] = {}
        for number, flags in enumerate((os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_RDONLY)):
            tag = number % 3
            path = self.known_file(f"held-{tag}", 1024 * (tag + 1), tag)
            fd = os.open(path, flags)
            position = os.lseek(fd, RECORD * (number + 1), os.SEEK_SET)
            readable = flags & os.O_ACCMODE != os.O_WRONLY
            self.fds[fd] = (os.path.realpath(path), self.flags(fd), position, tag if readable else None)
        fd = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        self.fds[fd] = (os.path.realpath(self.place), self.flags(fd), 0, None)

    @staticmethod
    def flags(fd: int) -> int:
        """Without O_DIRECTORY: CRIU opens a directory of any file system without it."""
        with open(f"/proc/self/fdinfo/{fd}") as file:
            text = next(line.split()[1] for line in file if line.startswith("flags:"))
        return int(text, 8) & ~os.O_DIRECTORY

    def round(self) -> None:
        for fd, (path, flags, position, tag) in self.fds.items():
            link = os.readlink(f"/proc/self/fd/{fd}")
            check(link == path, f"fd {fd} is {link} instead of {path}")
            found = self.flags(fd)
            check(found == flags, f"{path}: flags {found:#o} instead of {flags:#o}")
            found = os.lseek(fd, 0, os.SEEK_CUR)
            check(found == position, f"{path}: position {found} instead of {position}")
            check(os.path.samestat(os.stat(path), os.fstat(fd)), f"{path} is no longer the open file")
            if tag is not None:
                drop_pages(fd)
                compare(os.pread(fd, 4096, 0), pattern(0, 1024 * (tag + 1), tag), path)
            self.ok()


class Unlinked(Client):
    """Holds a file without a name."""

    def setup(self) -> None:
        super().setup()
        path = self.known_file("unlinked", 4096, 5)
        self.fd = os.open(path, os.O_RDWR)
        os.unlink(path)

    def round(self) -> None:
        drop_pages(self.fd)
        compare(os.pread(self.fd, 4097, 0), pattern(0, 4096, 5), "unlinked file")
        self.ok()


MODES: dict[str, type[Client]] = {
    "reader": Reader,
    "writer": Writer,
    "append": Append,
    "dirs": Dirs,
    "cwd": Cwd,
    "mapper": Mapper,
    "bind": Bind,
    "meta": Meta,
    "idle": Idle,
    "unlinked": Unlinked,
    "tcpserver": TcpServer,
    "tcpclient": TcpClient,
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A file system client that counts every error.")
    parser.add_argument("mode", choices=sorted(MODES))
    parser.add_argument("target", metavar="DIR", help="directory to work in; ADDRESS:PORT for the TCP modes")
    parser.add_argument("report", metavar="REPORT")
    parser.add_argument("--name", help="subdirectory of DIR to work in (the mode)")
    parser.add_argument("--pace-ms", type=float, help="pause between two rounds")
    parser.add_argument("--stall-ms", type=float, default=100, help="gaps beyond this plus the pace are listed (100)")
    parser.add_argument("--size", type=int, default=1 << 20, help="bytes of the file of reader and mapper (1 MiB)")
    parser.add_argument("--bind-at", help="where the bind mode mounts its directory")
    parser.add_argument("--no-fd", action="store_true", help="mapper: keep the mapping only (Python 3.13)")
    parser.add_argument("--duration", type=float, default=0, help="seconds to run (until SIGTERM)")
    parser.add_argument("--rounds", type=int, default=0, help="rounds to run (until SIGTERM)")
    options = parser.parse_args(arguments)
    options.name = options.name or options.mode
    options.report = os.path.abspath(options.report)  # the cwd mode changes its directory
    if not options.mode.startswith("tcp"):
        options.target = os.path.abspath(options.target)
    options.size = max(options.size // RECORD, 1) * RECORD
    return options


if __name__ == "__main__":
    parsed = parse(sys.argv[1:])
    sys.exit(run(MODES[parsed.mode], parsed))
