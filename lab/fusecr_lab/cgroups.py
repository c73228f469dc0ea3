# SPDX-License-Identifier: Apache-2.0
"""The lab's cgroups: they tell which processes belong to a lab, whatever became of their parents."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import LabError
from .run import progress
from .state import STATE_ROOT, start_time

# of v1, as mount options; the other options of a hierarchy (rw, xattr, clone_children, release_agent=) are no controllers
CONTROLLERS = frozenset(("cpuset", "cpu", "cpuacct", "blkio", "memory", "devices", "freezer", "net_cls", "perf_event",
                         "net_prio", "hugetlb", "pids", "rdma", "misc"))
# controllers that a lab has enabled in the machine's root cgroup
ENABLED = STATE_ROOT / "controllers"


@functools.cache
def hierarchies() -> list[tuple[Path, bool]]:
    """Return the machine's mounted cgroup hierarchies: (mount point, True for cgroup2).

    Asked first outside of the hosts: in their cgroup namespaces the roots of these mounts look different.
    """
    found: list[tuple[Path, bool]] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        fstype = right.split()[0]
        if fstype in ("cgroup", "cgroup2") and left.split()[3] == "/":
            found.append((Path(left.split()[4]), fstype == "cgroup2"))
    return found


def v1_controllers() -> list[str]:
    """Return the names of the machine's cgroup v1 hierarchies as /proc/PID/cgroup shows them."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return [name for line in lines for name in [line.split(":", 2)[1]] if name]


@functools.cache
def v1_mounts() -> list[str]:
    """Return the options that mount the machine's v1 hierarchies again: ``cpu,cpuacct``, ``name=systemd``, ...

    Of the mounted ones only: in these a host has a cgroup of its own. Asked first outside of the hosts, as above.
    """
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        fstype, _, options = right.split()
        if fstype == "cgroup" and left.split()[3] == "/":
            words = options.split(",")
            names = [w for w in words if w.startswith("name=")]
            found.append(",".join(names or [w for w in words if w in CONTROLLERS]))
    return [options for options in dict.fromkeys(found) if options]


def create(lab_group: str, host: str) -> None:
    """Make the cgroups of one host in every hierarchy."""
    for root, v2 in hierarchies():
        group = root / lab_group / host
        group.mkdir(parents=True, exist_ok=True)
        if v2:
            _offer_controllers(root, root / lab_group)
            continue
        for level in (root / lab_group, group):  # an empty cpuset takes no task
            for name in ("cpuset.cpus", "cpuset.mems"):
                if (level / name).exists():
                    (level / name).write_text((level.parent / name).read_text())
            if (level / "cgroup.clone_children").exists() and (level / "cpuset.cpus").exists():
                (level / "cgroup.clone_children").write_text("1")


def _offer_controllers(root: Path, lab_group: Path) -> None:
    """Make at least one cgroup2 controller available in the hosts' cgroup namespaces, as on any real host.

    Without one liblxc passes a bare --cgroup-root lxc.payload.NAME that CRIU applies to every hierarchy and takes
    for a path. The hosts hand none on to their containers: liblxc moves criu into the root of the cgroup
    namespace, which the kernel refuses (EBUSY) when controllers are enabled below it; only a machine's real root
    may have both. pid 1 of a host stays in that root and so keeps liblxc from enabling them.
    """
    if not (root / "cgroup.subtree_control").read_text().split():
        for name in (root / "cgroup.controllers").read_text().split():
            try:
                (root / "cgroup.subtree_control").write_text(f"+{name}")
            except OSError:
                continue
            with open(ENABLED, "a") as record:
                record.write(name + "\n")
            break
        else:
            raise LabError(f"no cgroup2 controller can be enabled in {root}; the lab needs one: boot with cgroup2 "
                           "only (systemd.unified_cgroup_hierarchy=1)")
    for name in (lab_group / "cgroup.controllers").read_text().split():
        with contextlib.suppress(OSError):  # one is enough
            (lab_group / "cgroup.subtree_control").write_text(f"+{name}")


def last_is_gone() -> bool:
    """True if no lab is left on this machine."""
    return not any(list(root.glob("fusecr-lab.*")) for root, _ in hierarchies())


def _restore_controllers() -> None:
    """Take back what _offer_controllers enabled in the machine's root, with the last lab."""
    if not ENABLED.exists() or not last_is_gone():
        return
    for name in ENABLED.read_text().split():
        for root, v2 in hierarchies():
            if v2:
                with contextlib.suppress(OSError):  # somebody else uses it by now
                    (root / "cgroup.subtree_control").write_text(f"-{name}")
    ENABLED.unlink(missing_ok=True)


def join(lab_group: str, host: str) -> None:
    """Move the calling process into a host's cgroups."""
    for root, _ in hierarchies():
        (root / lab_group / host / "cgroup.procs").write_text(str(os.getpid()))


def _groups(lab_group: str) -> Iterator[Path]:
    """All cgroups of a lab, deepest first."""
    for root, _ in hierarchies():
        top = root / lab_group
        if top.is_dir():
            for path, _, _ in os.walk(top, topdown=False):
                yield Path(path)


def processes(lab_group: str) -> set[int]:
    """Return the pids of all processes of a lab, as the machine numbers them."""
    pids: set[int] = set()
    for group in _groups(lab_group):
        try:
            pids.update(int(p) for p in (group / "cgroup.procs").read_text().split())
        except OSError:
            continue
    return {p for p in pids - {0} if start_time(p) is not None}


def exists(lab_group: str) -> bool:
    """True if the lab has a cgroup in any hierarchy."""
    return any((root / lab_group).is_dir() for root, _ in hierarchies())


def fuse_connections(pids: set[int]) -> set[int]:
    """Return the ids of the FUSE connections mounted in the mount namespaces of these processes."""
    ids: set[int] = set()
    seen: set[str] = set()
    for pid in pids:
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in seen or namespace == os.readlink("/proc/self/ns/mnt"):
                continue
            seen.add(namespace)
            lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            left, _, right = line.partition(" - ")
            if right.startswith("fuse"):
                major, minor = left.split()[2].split(":")
                ids.add(int(major) << 20 | int(minor))
    return ids


def _abort_connections(ids: set[int]) -> None:
    """Abort FUSE connections by fusectl, mounted in a child's private mount namespace."""
    from . import linux
    pid = os.fork()
    if pid == 0:
        try:
            linux.unshare(linux.CLONE_NEWNS)
            linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
            linux.mount("fusectl", "/mnt", "fusectl")
            for ident in ids:
                with contextlib.suppress(OSError):
                    Path(f"/mnt/{ident}/abort").write_text("1")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def kill_all(lab_group: str, timeout: float = 30) -> None:
    """Kill every process of a lab and wait until they are gone.

    Raises:
        LabError: some process is still there after the timeout (seconds).
    """
    pids = processes(lab_group)
    connections = fuse_connections(pids)
    deadline = time.monotonic() + timeout
    next_abort = time.monotonic() + 3
    while pids:
        for group in _groups(lab_group):
            for name, value in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
                with contextlib.suppress(OSError):  # a v1-frozen task dies only after the thaw
                    if (group / name).exists():
                        (group / name).write_text(value)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for _ in range(20):
            time.sleep(0.02)
            pids = processes(lab_group)
            if not pids:
                return
        if time.monotonic() > next_abort and connections:
            progress(f"aborting {len(connections)} FUSE connections: processes wait for them")
            _abort_connections(connections)
            next_abort = time.monotonic() + 3
        if time.monotonic() > deadline:
            names = [f"{p} ({_describe(p)})" for p in sorted(pids)[:5]]
            raise LabError(f"processes survive SIGKILL: {', '.join(names)}; look at their kernel stack, "
                           "then run `lab down` again")


def _describe(pid: int) -> str:
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return "gone"
    fields = dict(line.split(":\t", 1) for line in status if ":\t" in line)
    return f"{fields.get('Name', '?')}, state {fields.get('State', '?')}"


def remove(lab_group: str, timeout: float = 10) -> None:
    """Remove the lab's cgroups, deepest first."""
    deadline = time.monotonic() + timeout
    while exists(lab_group):
        last: OSError | None = None
        for group in _groups(lab_group):
            try:
                group.rmdir()
            except FileNotFoundError:
                continue
            except OSError as err:
                last = err
        if last and time.monotonic() > deadline:
            raise LabError(f"cannot remove the lab's cgroups: {last}")
        if last:
            time.sleep(0.05)
    _restore_controllers()
