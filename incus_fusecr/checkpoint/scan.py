# SPDX-License-Identifier: Apache-2.0
"""What a container's processes have of FUSE: daemons, mounts, and every reference into them.

Only reads of /proc that never wait for a daemon; still it runs in a disposable child (job :func:`scan_job`), because it
takes O_PATH descriptors of working directories on FUSE.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..fuse import connection
from ..linux import mount, ns, proc
from ..linux.zygote import Zygote

MAX_REFS = 65536
MAX_GENERATIONS = 64
ATTACHED = "parent"  # Process.outside of an `incus exec` that goes on, and of what it began
SCAN_SECONDS = 10.0
SIDECAR = "incus_fusecr.recovery.sidecar"


@dataclass(frozen=True)
class Ref:
    """Something of a process that leads into a FUSE mount.

    :ivar kind: ``fd``, ``path`` (an O_PATH descriptor), ``cwd``, ``root``, ``map``, ``exe``
    :ivar path: below the superblock's root, without leading slash (as the kernel shows it, `` (deleted)`` included)
    :ivar shown: as the process sees it
    """

    pid: int
    kind: str
    fd: int
    connection: int
    flags: int
    path: str
    shown: str
    detail: str = ""


@dataclass(frozen=True)
class Process:
    """A process of the container; ``ns_pid`` is its id in the container's pid namespace.

    :ivar devices: (descriptor, connection) of each /dev/fuse
    :ivar path_fds: whether it is a daemon that has O_PATH descriptors
    :ivar outside: what of its kin is outside of the container (:data:`ATTACHED`, ``session leader``, ``group leader``), or empty
    """

    pid: int
    ns_pid: int
    start: int
    ppid: int
    comm: str
    states: str
    tracer: int
    outside: str
    devices: list[tuple[int, int]]
    mntns: str
    path_fds: bool = False


@dataclass(frozen=True)
class FuseMount:
    """A FUSE mount in one mount namespace of the container."""

    mntns: str
    id: int
    parent: int
    connection: int
    root: str
    mountpoint: str
    fstype: str
    source: str
    options: str
    super_options: str


@dataclass(frozen=True)
class Scan:
    """One look at the container with init process ``init``.

    :ivar roots: mount namespace -> id of the mount that is its root; one whose tasks all are in a chroot is missing
    """

    init: int
    processes: list[Process]
    mounts: list[FuseMount]
    refs: list[Ref]
    locks: list[str]
    root_idmapped: bool
    roots: dict[str, int] = field(default_factory=dict)

    @property
    def connections(self) -> dict[int, list[int]]:
        """Connections served from inside: number -> daemon pids."""
        served: dict[int, list[int]] = {}
        for process in self.processes:
            for _fd, number in process.devices:
                if process.pid not in served.setdefault(number, []):
                    served[number].append(process.pid)
        return {n: pids for n, pids in served.items() if any(m.connection == n for m in self.mounts)}

    def process(self, pid: int) -> Process:
        return next(p for p in self.processes if p.pid == pid)


def payload_cgroup(init: int, root: str = "/sys/fs/cgroup") -> str | None:
    """The container's cgroup directory: the ``lxc.payload.NAME`` above its init, None if it is not one of liblxc's."""
    for line in proc.lines(proc.read_text(f"/proc/{init}/cgroup")):
        hierarchy, _, path = line.split(":", 2)
        if hierarchy == "0":
            parts = path.split("/")
            for depth, part in enumerate(parts):
                if part.startswith("lxc.payload."):
                    base = root if os.path.exists(f"{root}/cgroup.controllers") else f"{root}/unified"
                    return os.path.join(base, *parts[: depth + 1])
    return None


def init_of(pids: Iterable[int]) -> int | None:
    """The first process of the outermost pid namespace among ``pids``."""
    best: tuple[int, int] | None = None
    for pid in pids:
        try:
            chain = proc.ns_pids(pid)
        except (FileNotFoundError, ProcessLookupError, KeyError):
            continue
        if chain[-1] == 1 and (best is None or len(chain) < best[0]):
            best = (len(chain), pid)
    return best[1] if best else None


def container_name(init: int) -> str:
    """liblxc's name of a container (``PROJECT_NAME`` outside of the default project), from its cgroup."""
    group = payload_cgroup(init)
    return os.path.basename(group).removeprefix("lxc.payload.") if group else f"pid {init}"


def container_pids(init: int) -> list[int]:
    """All processes of a container: of its pid namespace, and of its cgroup (nested pid namespaces)."""
    pids = set(proc.pids_in_pidns(init))
    group = payload_cgroup(init)
    if group:
        pids.update(proc.cgroup_pids(group))
    return sorted(pids)


def scan(zygote: Zygote, init: int) -> Scan:
    """Scan in a disposable child."""
    raw, _ = zygote.run(f"{__name__}:scan_job", {"init": init}, deadline=SCAN_SECONDS)
    return from_dict(raw)


def from_dict(raw: dict[str, Any]) -> Scan:
    """The inverse of :func:`dataclasses.asdict`."""
    return Scan(
        init=raw["init"],
        processes=[Process(**{**p, "devices": [tuple(d) for d in p["devices"]]}) for p in raw["processes"]],
        mounts=[FuseMount(**m) for m in raw["mounts"]],
        refs=[Ref(**r) for r in raw["refs"]],
        locks=raw["locks"],
        root_idmapped=raw["root_idmapped"],
        roots=raw["roots"],
    )


def scan_job(args: dict[str, Any], _fds: list[int]) -> tuple[Any, list[int]]:
    """Zygote job of :func:`scan`."""
    init = int(args["init"])
    depth = len(proc.ns_pids(init)) - 1
    processes: list[Process] = []
    ours: set[int] = set()
    for pid in container_pids(init):
        try:
            processes.append(_process(pid, depth, init))
        except IndexError:  # of the host, in the container's cgroup
            ours.update([pid] if _is_sidecar(pid) else [])
        except (FileNotFoundError, ProcessLookupError, KeyError):
            continue
    # Sidecars are taken away before anything is dumped: they, and what they have started, are no processes of the container's.
    while more := {p.pid for p in processes if p.ppid in ours} - ours:
        ours |= more
    processes = [p for p in processes if p.pid not in ours]
    served = {number for p in processes for _fd, number in p.devices}
    tables: dict[str, dict[int, FuseMount]] = {}
    idmapped = False
    for p in processes:
        if p.mntns not in tables:
            try:
                lines = mount.mountinfo(p.pid)
            except (FileNotFoundError, ProcessLookupError, OSError):
                continue
            if p.pid == init:
                idmapped = any(m.mountpoint == "/" and "idmapped" in m.options.split(",") for m in lines)
            tables[p.mntns] = {
                m.id: FuseMount(
                    p.mntns,
                    m.id,
                    m.parent,
                    m.minor,
                    m.root,
                    m.mountpoint,
                    m.fstype,
                    m.source,
                    m.options,
                    m.super_options,
                )
                for m in lines
                if m.is_fuse and m.major == 0 and m.minor in served
            }
    refs: list[Ref] = []
    roots: dict[str, int] = {}
    if served:
        for p in processes:
            if p.mntns not in roots and (root := _root_of(p.pid)) is not None:
                roots[p.mntns] = root
            refs.extend(_refs(p, tables.get(p.mntns, {}), served))
            if len(refs) > MAX_REFS:
                raise OSError(7, f"more than {MAX_REFS} references into FUSE mounts")
    mounts = [m for table in tables.values() for m in table.values()]
    return (
        asdict(Scan(init, processes, mounts, refs, _locks({p.pid for p in processes}, served), idmapped, roots)),
        [],
    )


def _is_sidecar(pid: int) -> bool:
    """Of recovery/sidecar.py; by the command line, which nobody in the container can have, as it is not in its pid namespace."""
    try:
        return SIDECAR in proc.read_text(f"/proc/{pid}/cmdline", 4096)
    except (FileNotFoundError, ProcessLookupError):
        return False


def _outside(pid: int, init: int, depth: int, status: dict[str, str]) -> str:
    """Kin outside of the pid namespace shows as id 0 inside: so it is with what ``incus exec`` began, which CRIU cannot dump."""
    if status["State"][:1] in proc.GONE:
        return ""
    kin = {"session leader": status["NSsid"], "group leader": status["NSpgid"]}
    found = next((name for name, ids in kin.items() if int(ids.split()[depth]) == 0), "")
    # One on a terminal of its own has its session inside: only its parent tells.
    return ATTACHED if _attached(pid, init, depth, MAX_GENERATIONS if found else 1) else found


def _attached(pid: int, init: int, depth: int, generations: int) -> bool:
    """Whether it, or one of its ancestors, is a child of somebody outside: an ``incus exec`` that goes on."""
    for _generation in range(generations):
        if pid == init:
            return False
        try:
            pid = int(proc.status(pid)["PPid"])
            if len(proc.ns_pids(pid)) <= depth:
                return True
        except (FileNotFoundError, ProcessLookupError, KeyError):
            return False
    return False


def _process(pid: int, depth: int, init: int) -> Process:
    status = proc.status(pid)
    devices = [(d.fd, d.connection) for d in connection.device_fds(pid) if d.connection is not None]
    return Process(
        pid=pid,
        ns_pid=[int(n) for n in status["NSpid"].split()][depth],
        start=proc.start_time(pid),
        ppid=int(status["PPid"]),
        comm=proc.comm(pid),
        states="".join(proc.thread_states(pid)),
        tracer=int(status["TracerPid"]),
        outside=_outside(pid, init, depth, status),
        devices=devices,
        mntns=ns.ns_id(pid, "mnt"),
        path_fds=bool(devices) and _has_path_fds(pid),
    )


def _has_path_fds(pid: int) -> bool:
    for fd in proc.fds(pid):
        try:
            if int(proc.fdinfo(pid, fd)["flags"], 8) & os.O_PATH:
                return True
        except (FileNotFoundError, ProcessLookupError, KeyError, ValueError):
            continue
    return False


def _root_of(pid: int) -> int | None:
    """The mount that is the root of a task's mount namespace; None where the task has another root."""
    link = f"/proc/{pid}/root"
    try:
        if os.readlink(link) != "/":
            return None
        fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
        try:
            return int(proc.fdinfo("self", fd)["mnt_id"])
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError, KeyError, PermissionError):
        return None


def _relative(m: FuseMount, shown: str) -> str:
    """A path below the superblock's root, from a path that a process sees below mount ``m``."""
    inside = shown[len(m.mountpoint) :] if m.mountpoint != "/" else shown
    return (m.root.rstrip("/") + inside).strip("/")


def _refs(p: Process, table: dict[int, FuseMount], served: set[int]) -> Iterable[Ref]:
    for fd in proc.fds(p.pid):
        try:
            info = proc.fdinfo(p.pid, fd)
            mnt_id = int(info["mnt_id"])
            flags = int(info["flags"], 8)
            shown = os.readlink(f"/proc/{p.pid}/fd/{fd}")
            if shown.startswith("anon_inode:inotify") or "inotify wd" in info:
                yield from _watches(p, fd, served)
            if mnt_id in table:
                m = table[mnt_id]
                kind = "path" if flags & os.O_PATH else "fd"
                yield Ref(p.pid, kind, fd, m.connection, flags, _relative(m, shown), shown)
        except (FileNotFoundError, ProcessLookupError, KeyError, ValueError):
            continue
    for kind in ("cwd", "root"):
        try:
            link = f"/proc/{p.pid}/{kind}"
            fd = os.open(link, os.O_PATH | os.O_CLOEXEC)
            try:
                mnt_id = int(proc.fdinfo("self", fd)["mnt_id"])
            finally:
                os.close(fd)
            if mnt_id in table:
                m, shown = table[mnt_id], os.readlink(link)
                yield Ref(p.pid, kind, -1, m.connection, 0, _relative(m, shown), shown)
        except (FileNotFoundError, ProcessLookupError, KeyError, PermissionError):
            continue
    yield from _maps(p, table, served)


def _maps(p: Process, table: dict[int, FuseMount], served: set[int]) -> Iterable[Ref]:
    try:
        exe = os.readlink(f"/proc/{p.pid}/exe")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        exe = ""
    last: tuple[str, bool] | None = None
    seen_exe = False
    for mapping in proc.file_mappings(p.pid):
        if mapping.major or mapping.minor not in served:
            last = None
            continue
        key = (mapping.path, mapping.shared and mapping.writable)
        if key == last:  # CRIU opens a file once for neighbouring mappings of it
            continue
        last = key
        m = _mount_of(table, mapping.minor, mapping.path)
        path = _relative(m, mapping.path) if m else ""
        detail = "" if m else "no mount of it is visible to the process"
        if mapping.shared and mapping.writable:
            detail = "shared writable mapping"
        yield Ref(p.pid, "map", -1, mapping.minor, os.O_RDONLY, path, mapping.path, detail)
        if mapping.path == exe and not seen_exe:
            seen_exe = True
            yield Ref(p.pid, "exe", -1, mapping.minor, os.O_RDONLY, path, mapping.path, detail)


def _mount_of(table: dict[int, FuseMount], number: int, shown: str) -> FuseMount | None:
    """The mount below which a mapping's path lies (maps shows no mount id): the longest mountpoint that fits."""
    fitting = [
        m
        for m in table.values()
        if m.connection == number and (shown == m.mountpoint or shown.startswith(m.mountpoint.rstrip("/") + "/"))
    ]
    return max(fitting, key=lambda m: len(m.mountpoint), default=None)


def _watches(p: Process, fd: int, served: set[int]) -> Iterable[Ref]:
    for line in proc.lines(proc.read_text(f"/proc/{p.pid}/fdinfo/{fd}")):
        if line.startswith("inotify wd:"):
            fields = dict(word.partition(":")[::2] for word in line.split()[1:])
            device = int(fields.get("sdev", "0"), 16)
            # s_dev as the kernel keeps it: major << 20 | minor (include/linux/kdev_t.h)
            if device >> 20 == 0 and device & 0xFFFFF in served:
                yield Ref(p.pid, "watch", fd, device & 0xFFFFF, 0, "", f"inode {fields.get('ino', '?')}", "inotify watch")


def _locks(pids: set[int], served: set[int]) -> list[str]:
    """Locks on FUSE files held by the container's processes (proc_locks(5)), as ``PID CONNECTION KIND``."""
    found = []
    for line in proc.lines(proc.read_text("/proc/locks", 16 << 20)):
        words = line.split()
        if len(words) < 8 or words[1] == "->":
            continue
        major, minor, _inode = words[5].split(":")
        if int(major, 16) == 0 and int(minor, 16) in served and (int(words[4]) in pids or int(words[4]) <= 0):
            found.append(f"{words[4]} {int(minor, 16)} {words[1]}")
    return found
