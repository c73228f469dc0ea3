# SPDX-License-Identifier: Apache-2.0
"""mount(2), umount2(2) and /proc/PID/mountinfo."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from .libc import check, libc

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_DIRSYNC = 128
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_REC = 16384
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MNT_DETACH = 2

FLAG_OF_OPTION = {
    "ro": MS_RDONLY,
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": MS_NOEXEC,
    "sync": MS_SYNCHRONOUS,
    "dirsync": MS_DIRSYNC,
    "noatime": MS_NOATIME,
    "nodiratime": MS_NODIRATIME,
    "relatime": MS_RELATIME,
    "strictatime": MS_STRICTATIME,
}

MAX_MOUNTINFO = 64 << 20  # bytes; sysctl fs.mount-max allows 100,000 mounts a namespace


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """mount(2)."""
    check(
        int(libc.mount(os.fsencode(source), os.fsencode(target), fstype.encode(), flags, os.fsencode(data) if data else None)),
        f"mount {fstype} on {target}",
    )


def umount2(target: str, flags: int) -> None:
    """umount2(2)."""
    check(int(libc.umount2(os.fsencode(target), flags)), target)


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo (proc_pid_mountinfo(5)); paths unescaped, bytes as surrogateescape."""

    id: int
    parent: int
    major: int
    minor: int
    root: str
    mountpoint: str
    options: str
    propagation: tuple[str, ...]
    fstype: str
    source: str
    super_options: str

    @property
    def is_fuse(self) -> bool:
        return self.fstype == "fuse" or self.fstype.startswith("fuse.")

    @property
    def flags(self) -> int:
        """The mount(2) flags of the mount and of its superblock."""
        both = self.options.split(",") + self.super_options.split(",")
        return sum(flag for option, flag in FLAG_OF_OPTION.items() if option in both)


_OCTAL = re.compile(rb"\\([0-7]{3})")


def _unescape(text: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda m: bytes([int(m[1], 8)]), text) if b"\\" in text else text)


def parse_mountinfo(raw: bytes) -> list[Mount]:
    """Parse the whole file."""
    mounts = []
    # Only "\n" ends a line: the kernel escapes it in names, but not the other characters at which splitlines() splits.
    for line in filter(None, raw.split(b"\n")):
        left, _, right = line.partition(b" - ")
        words, tail = left.split(b" "), right.split(b" ")
        major, minor = words[2].split(b":")
        mounts.append(
            Mount(
                id=int(words[0]),
                parent=int(words[1]),
                major=int(major),
                minor=int(minor),
                root=_unescape(words[3]),
                mountpoint=_unescape(words[4]),
                options=_unescape(words[5]),
                propagation=tuple(w.decode() for w in words[6:]),
                fstype=_unescape(tail[0]),
                source=_unescape(tail[1]),
                super_options=_unescape(tail[2]) if len(tail) > 2 else "",
            )
        )
    return mounts


def raw_mountinfo(pid: int | str) -> bytes:
    """The file of a process's mount namespace; reading it sends no request to any daemon."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return file.read(MAX_MOUNTINFO)


def mountinfo(pid: int | str) -> list[Mount]:
    """The mounts of a process's mount namespace."""
    return parse_mountinfo(raw_mountinfo(pid))
