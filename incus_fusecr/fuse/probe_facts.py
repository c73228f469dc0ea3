# SPDX-License-Identifier: Apache-2.0
"""What a second copy of a running daemon has to be like: read from /proc of the daemon, in the disposable
helper.

The container controls all of it (its process may rewrite its own argv, environment and names), so every read
is bounded and nothing is interpreted here: it all goes back into the same container with the same rights.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import stat
from dataclasses import dataclass

from ..errors import FusecrError
from ..linux import caps, ns, proc, ptrace
from ..linux.mount import mountinfo, parse_mountinfo
from .connection import CONNECTION_KEY

FUSE_DEVICE = os.makedev(10, 229)  # misc major, FUSE_MINOR of include/linux/miscdevice.h
MAX_STRINGS = 1 << 20  # bytes of argv or of the environment; execve(2) takes 128 KiB a string, 6 MiB in all
MAX_GROUPS = 65536  # NGROUPS_MAX
STOP_SECONDS = 2.0
MAX_MOUNTINFO = 16 << 20  # bytes

# The order of setns(2) does not matter with a pidfd: the kernel checks all kinds before it switches.
NAMESPACES = {
    "user": ns.CLONE_NEWUSER,
    "mnt": ns.CLONE_NEWNS,
    "pid": ns.CLONE_NEWPID,
    "net": ns.CLONE_NEWNET,
    "ipc": ns.CLONE_NEWIPC,
    "uts": ns.CLONE_NEWUTS,
    "cgroup": ns.CLONE_NEWCGROUP,
}

_DEV_FD = re.compile(rb"/dev/fd/(\d{1,7})")


class CopyError(FusecrError):
    """The daemon cannot be copied; ``what`` names the step."""


@dataclass(frozen=True)
class Daemon:
    """A running daemon as its copy needs it; ids are those of its own user namespace."""

    pid: int
    command: str
    argv: list[bytes]
    environ: list[bytes]
    exe: str
    namespaces: int
    mapped: bool
    uids: tuple[int, int, int]
    gids: tuple[int, int, int]
    groups: list[int]
    umask: int
    no_new_privs: bool
    caps: caps.CapSets
    label: str
    filters: list[bytes]
    limits: list[tuple[int, int, int]]
    cgroups: list[str]
    connections: frozenset[int]
    device_fds: list[int]
    directories: list[bytes]
    oom_score_adj: int = 0
    mountpoint: str = ""  # whatever FUSE is mounted there is not to be seen by a copy, besides its connections


def strings(raw: bytes) -> list[bytes]:
    """The NUL-terminated strings of /proc/PID/cmdline or environ."""
    parts = raw.split(b"\0")
    return parts[:-1] if parts and not parts[-1] else parts


def printable(raw: bytes, limit: int = 160) -> str:
    """Bytes of the container for a message: one line, escaped, at most ``limit`` characters."""
    text = proc.printable(os.fsdecode(raw))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _read(path: str, limit: int) -> bytes:
    """A /proc file; raises CopyError when it is longer than ``limit`` bytes (a cut one would be another
    command).
    """
    with open(path, "rb", buffering=0) as file:
        out = b""
        while chunk := file.read(min(1 << 16, limit + 1 - len(out))):
            out += chunk
            if len(out) > limit:
                raise CopyError(f"read {path}", f"longer than {limit} bytes")
    return out


def id_inside(pid: int, kind: str, outside: int) -> int:
    """An id of the caller's user namespace in that of ``pid`` (user_namespaces(7), uid_map).

    :param kind: ``uid`` or ``gid``
    :raises CopyError: it is not mapped there
    """
    for line in proc.read_text(f"/proc/{pid}/{kind}_map").splitlines():
        first_inside, first_outside, count = map(int, line.split())
        if first_outside <= outside < first_outside + count:
            return outside - first_outside + first_inside
    raise CopyError(f"{kind} {outside} of process {pid}", "not mapped in its user namespace")


def _groups(pid: int, line: str) -> list[int]:
    found = []
    for word in line.split()[:MAX_GROUPS]:
        try:
            found.append(id_inside(pid, "gid", int(word)))
        except CopyError:
            continue  # the daemon cannot name it either
    return found


def cgroup_directories(pid: int) -> list[str]:
    """The directory of every cgroup that ``pid`` is in, by the caller's own cgroup mounts.

    :raises CopyError: a hierarchy is not mounted here
    """
    version2: str | None = None
    version1: dict[str, str] = {}
    for mount in mountinfo("self"):
        if mount.root != "/":
            continue
        if mount.fstype == "cgroup2":
            version2 = mount.mountpoint
        elif mount.fstype == "cgroup":
            for option in mount.super_options.split(","):
                version1[option] = mount.mountpoint
    found = []
    for line in proc.lines(proc.read_text(f"/proc/{pid}/cgroup")):
        _id, controllers, path = line.split(":", 2)
        base = version1.get(controllers.split(",")[0]) if controllers else version2
        if base is None:
            if not controllers or path == "/":
                continue  # v1 host without the unified hierarchy, or nothing that could limit the copy
            raise CopyError(f"join cgroup {controllers}:{path}", "this hierarchy is not mounted on the host")
        found.append(base + path)
    return found


def _frozen(directory: str) -> bool:
    """Whether a task that enters this cgroup would stand still (v1: not even SIGKILL ends it)."""
    for name, value in (
        ("cgroup.events", "frozen 1"),
        ("freezer.state", "FREEZING"),
        ("freezer.state", "FROZEN"),
    ):
        try:
            if value in proc.read_text(f"{directory}/{name}").splitlines():
                return True
        except FileNotFoundError:
            continue
    return False


def _filters(pid: int, status: dict[str, str]) -> list[bytes]:
    """The daemon's seccomp filters: liblxc's, with what the administrator denies, and those of its service manager.

    Without them a container could run what it likes unfiltered, by having a hostile program probed.
    """
    if status.get("Seccomp") == "0":
        return []
    try:
        return ptrace.seccomp_filters(pid, STOP_SECONDS)
    except OSError as error:
        what = f"read the seccomp filters of process {pid}"
        hints = {
            errno.EPERM: "is it being traced? end strace or the debugger",
            errno.EACCES: "the agent must not run under a seccomp filter (SystemCallFilter= and its like in its unit)",
        }
        raise CopyError(what, error.strerror or str(error), hints.get(error.errno or 0, "")) from None


def _label(pid: int) -> str:
    """The AppArmor label for attr/exec; empty when unconfined or without AppArmor."""
    if not os.path.isdir("/sys/module/apparmor"):
        return ""
    for path in (f"/proc/{pid}/attr/apparmor/current", f"/proc/{pid}/attr/current"):
        try:
            text = proc.read_text(path).strip("\0\n ")
        except OSError:
            continue
        label = re.sub(r" \([a-z]+\)$", "", text)
        return "" if label == "unconfined" else label
    raise CopyError(f"AppArmor label of process {pid}", "cannot be read")


_LIMIT_NAMES = {
    "Max cpu time": resource.RLIMIT_CPU,
    "Max file size": resource.RLIMIT_FSIZE,
    "Max data size": resource.RLIMIT_DATA,
    "Max stack size": resource.RLIMIT_STACK,
    "Max core file size": resource.RLIMIT_CORE,
    "Max resident set": resource.RLIMIT_RSS,
    "Max processes": resource.RLIMIT_NPROC,
    "Max open files": resource.RLIMIT_NOFILE,
    "Max locked memory": resource.RLIMIT_MEMLOCK,
    "Max address space": resource.RLIMIT_AS,
    "Max pending signals": resource.RLIMIT_SIGPENDING,
    "Max msgqueue size": resource.RLIMIT_MSGQUEUE,
    "Max nice priority": resource.RLIMIT_NICE,
    "Max realtime priority": resource.RLIMIT_RTPRIO,
    "Max realtime timeout": resource.RLIMIT_RTTIME,
}


def _limits(pid: int) -> list[tuple[int, int, int]]:
    """(RLIMIT_ number, soft, hard) from /proc/PID/limits; prlimit(2) would need CAP_SYS_RESOURCE."""
    found = []
    for line in proc.read_text(f"/proc/{pid}/limits").splitlines()[1:]:
        name, words = line[:26].strip(), line[26:].split()
        if name in _LIMIT_NAMES:
            soft, hard = (resource.RLIM_INFINITY if w == "unlimited" else int(w) for w in words[:2])
            found.append((_LIMIT_NAMES[name], soft, hard))
    return found


def _devices(pid: int) -> tuple[list[int], frozenset[int]]:
    """Numbers of the daemon's /dev/fuse descriptors, and of their connections where fdinfo names them (6.18 does)."""
    numbers, connections = [], set()
    # stat() of a descriptor on a FUSE mount would be a request to that daemon.
    safe = {mount.id for mount in mountinfo(pid) if not mount.is_fuse}
    for fd in proc.fds(pid):
        try:
            info = proc.fdinfo(pid, fd)
            if CONNECTION_KEY in info:
                connections.add(int(info[CONNECTION_KEY]))
            elif int(info.get("mnt_id", "-1")) not in safe:
                continue
            else:
                found = os.stat(f"/proc/{pid}/fd/{fd}")
                if not stat.S_ISCHR(found.st_mode) or found.st_rdev != FUSE_DEVICE:
                    continue
        except FileNotFoundError:
            continue
        numbers.append(fd)
    return numbers, frozenset(connections)


def _directories(pid: int, environ: list[bytes]) -> list[bytes]:
    """Where the copy may have to start, best guess first.

    libfuse's fuse_daemonize() leaves the working directory at / (and bindfs goes into its source), so
    relative arguments need the directory of the start: PWD, where the shell or service manager put it there.
    """
    found = []
    for entry in environ:
        if entry.startswith(b"PWD=/"):
            found.append(entry[4:])
    found.append(os.readlink(f"/proc/{pid}/cwd".encode()))
    found.append(b"/")
    return list(dict.fromkeys(found))


def fuse_mounts(raw: bytes, connections: frozenset[int], mountpoint: str = "") -> list[str]:
    """Mount points in a mountinfo text that belong to one of the connections, the last mounted first.

    :param mountpoint: all FUSE mounts there are meant, too
    """
    every = [m for m in reversed(parse_mountinfo(raw)) if m.major == 0]
    return [m.mountpoint for m in every if m.minor in connections or (m.is_fuse and m.mountpoint == mountpoint)]


def _served_by_argv(pid: int, argv: list[bytes], directories: list[bytes]) -> frozenset[int]:
    """For kernels whose fdinfo names no connection: FUSE mounts at a place that the command line names."""
    named = {os.path.normpath(os.path.join(directory, arg)) for directory in directories for arg in argv if arg}
    return frozenset(m.minor for m in mountinfo(pid) if m.is_fuse and os.fsencode(m.mountpoint) in named)


def read_daemon(pid: int, connections: frozenset[int]) -> Daemon:
    """Everything about a running daemon that its copy needs.

    :param connections: connection numbers that the daemon is known to serve, besides those its fdinfo names
    :raises CopyError: it has exited, is frozen, or is something that cannot be copied
    :raises OSError: a /proc file
    """
    argv = strings(_read(f"/proc/{pid}/cmdline", MAX_STRINGS))
    if not argv:
        raise CopyError(f"read the command line of process {pid}", "empty: a zombie or a kernel thread")
    environ = strings(_read(f"/proc/{pid}/environ", MAX_STRINGS))
    status = proc.status(pid)
    mapped = not ns.same_ns(pid, "user")
    namespaces = sum(flag for kind, flag in NAMESPACES.items() if not ns.same_ns(pid, kind))
    uids = [id_inside(pid, "uid", int(word)) for word in status["Uid"].split()[:3]]
    gids = [id_inside(pid, "gid", int(word)) for word in status["Gid"].split()[:3]]
    groups = _groups(pid, status["Groups"])
    cgroups = cgroup_directories(pid)
    for directory in cgroups:
        if _frozen(directory):
            raise CopyError(f"join {printable(directory.encode())}", "this cgroup is frozen")
    device_fds, served = _devices(pid)
    directories = _directories(pid, environ)
    return Daemon(
        pid=pid,
        command=printable(b" ".join(argv)),
        argv=argv,
        environ=environ,
        exe=os.readlink(f"/proc/{pid}/exe"),
        namespaces=namespaces,
        mapped=mapped,
        uids=(uids[0], uids[1], uids[2]),
        gids=(gids[0], gids[1], gids[2]),
        groups=groups,
        umask=int(status["Umask"], 8),
        no_new_privs=status["NoNewPrivs"] == "1",
        caps=caps.of_status(status),
        label=_label(pid),
        filters=_filters(pid, status),
        limits=_limits(pid),
        cgroups=cgroups,
        connections=served | connections or _served_by_argv(pid, argv, directories),
        device_fds=device_fds,
        directories=directories,
        oom_score_adj=int(proc.read_text(f"/proc/{pid}/oom_score_adj")),
    )


def named_device_fds(daemon: Daemon) -> list[int]:
    """Descriptors that the command line names as ``/dev/fd/N`` (mount.fuse3 drop_privileges) and that are
    /dev/fuse.
    """
    found = [int(match[1]) for arg in daemon.argv if (match := _DEV_FD.fullmatch(arg))]
    return [fd for fd in found if fd in daemon.device_fds]
