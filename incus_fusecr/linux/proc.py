# SPDX-License-Identifier: Apache-2.0
"""What /proc and the cgroup file system tell about processes; none of these reads waits for a FUSE daemon."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

STOPPED_OR_GONE = frozenset("TtZX")
GONE = frozenset("ZX")
SIGKILL_BIT = 1 << 8


def read_text(path: str, limit: int = 1 << 20) -> str:
    """A small /proc or /sys file, undecodable bytes kept as surrogates."""
    with open(path, "rb") as file:
        return os.fsdecode(file.read(limit))


def lines(text: str) -> list[str]:
    """Lines of a /proc file, without the empty end. Only ``\\n`` ends one: the kernel escapes it in names, and nothing else at
    which ``str.splitlines`` would split.
    """
    return text.removesuffix("\n").split("\n") if text else []


def thread_states(pid: int) -> list[str]:
    """State letters of all threads (proc_pid_stat(5)); empty when the process is gone."""
    states = []
    try:
        for tid in os.listdir(f"/proc/{pid}/task"):
            try:
                states.append(read_text(f"/proc/{pid}/task/{tid}/stat").rpartition(")")[2].split()[0])
            except (FileNotFoundError, ProcessLookupError):
                continue
    except (FileNotFoundError, ProcessLookupError):
        return []
    return states


def start_time(pid: int) -> int:
    """Start time in clock ticks since boot: with the pid it names a process for good."""
    return int(read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[19])


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status as a mapping."""
    pairs = (line.partition(":") for line in lines(read_text(f"/proc/{pid}/status")))
    return {key: value.strip() for key, _, value in pairs}


def ns_pids(pid: int) -> list[int]:
    """The process's ids from the reader's pid namespace down to its own (NSpid)."""
    return [int(word) for word in status(pid)["NSpid"].split()]


def dying(pid: int) -> bool:
    """Gone, a zombie, or about to be: CRIU's SIGKILL may be pending on a task that is still stopped."""
    try:
        fields = status(pid)
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
    return fields["State"][:1] in GONE or bool(pending & SIGKILL_BIT)


PF_EXITING = 0x4  # include/linux/sched.h


def exiting(pid: int) -> bool:
    """In exit(2), or gone. The init of a pid namespace stays so until all others in it have ended.

    :raises FileNotFoundError, ProcessLookupError: it is gone
    """
    return bool(int(read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[6]) & PF_EXITING)


def comm(pid: int) -> str:
    """The process's name, made printable: its bytes are the container's."""
    try:
        raw = read_text(f"/proc/{pid}/comm", 64).rstrip("\n")
    except (FileNotFoundError, ProcessLookupError):
        return "?"
    return printable(raw)


def printable(text: str) -> str:
    """``text`` with control characters and undecodable bytes escaped, for messages and logs."""
    return "".join(c if c.isprintable() else c.encode("utf-8", "surrogateescape").hex(" ").join("<>") for c in text)


def fds(pid: int) -> list[int]:
    """Open descriptor numbers; empty when the process is gone."""
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, ProcessLookupError):
        return []


def fdinfo(pid: int | str, fd: int) -> dict[str, str]:
    """/proc/PID/fdinfo/FD; the first of repeated keys."""
    fields: dict[str, str] = {}
    for line in lines(read_text(f"/proc/{pid}/fdinfo/{fd}")):
        key, _, value = line.partition(":")
        fields.setdefault(key, value.strip())
    return fields


@dataclass(frozen=True)
class Mapping:
    """One file mapping of /proc/PID/maps."""

    start: int
    end: int
    perms: str
    major: int
    minor: int
    inode: int
    path: str

    @property
    def shared(self) -> bool:
        return self.perms[3] == "s"

    @property
    def writable(self) -> bool:
        return self.perms[1] == "w"


def file_mappings(pid: int) -> Iterator[Mapping]:
    """The mappings that have a device number."""
    yield from parse_maps(read_text(f"/proc/{pid}/maps", 64 << 20))


def parse_maps(text: str) -> Iterator[Mapping]:
    """Those of a whole /proc/PID/maps."""
    for line in lines(text):
        words = line.split(None, 5)
        major, minor = (int(n, 16) for n in words[3].split(":"))
        if (major or minor) and len(words) == 6:
            start, end = (int(n, 16) for n in words[0].split("-"))
            yield Mapping(start, end, words[1], major, minor, int(words[4]), words[5].replace("\\012", "\n"))


def children_of_cgroup(path: str) -> list[str]:
    """A cgroup directory and all below it."""
    return [directory for directory, _, _ in os.walk(path)]


def cgroup_pids(path: str) -> list[int]:
    """All processes in a cgroup and below (as seen from the caller's pid namespace; 0 = outside it)."""
    pids: set[int] = set()
    for directory in children_of_cgroup(path):
        try:
            pids.update(int(word) for word in read_text(f"{directory}/cgroup.procs", 16 << 20).split())
        except OSError:  # the cgroup was removed meanwhile, or is threaded (EOPNOTSUPP)
            continue
    pids.discard(0)
    return sorted(pids)


def pids_in_pidns(pid: int) -> list[int]:
    """The processes whose pid namespace is the one of ``pid``."""
    want = os.readlink(f"/proc/{pid}/ns/pid")
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            if os.readlink(f"/proc/{name}/ns/pid") == want:
                found.append(int(name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return sorted(found)
