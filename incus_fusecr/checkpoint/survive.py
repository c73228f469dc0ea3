# SPDX-License-Identifier: Apache-2.0
"""Would it survive? A verdict for every reference into a FUSE mount, before anything is touched. Decides; reads nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..linux.proc import printable
from .manifest import MAX_CONNECTIONS, fault_of_mount
from .scan import ATTACHED, FuseMount, Ref, Scan

DELETED = " (deleted)"
MAX_MOUNTS = 2000


@dataclass(frozen=True)
class Verdict:
    """One reason why a container cannot be carried over, and what the operator can do about it."""

    what: str
    why: str
    hint: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.what}: {self.why} ({self.hint})"


def owner(scan: Scan, pid: int) -> str:
    """``pid 12 (bindfs)`` with the pid that the container's own ps shows."""
    process = scan.process(pid)
    return f"pid {process.ns_pid} ({process.comm})"


def options_of(m: FuseMount) -> dict[str, str]:
    """The superblock's options by name."""
    return dict(option.partition("=")[::2] for option in m.super_options.split(","))


def root_mount(scan: Scan, number: int) -> FuseMount | None:
    """The mount of a connection's whole tree in the init's mount namespace: the others are restored as binds of it."""
    home = scan.process(scan.init).mntns
    whole = [m for m in scan.mounts if m.connection == number and m.mntns == home and m.root == "/"]
    return min(whole, key=lambda m: m.id, default=None)


def mount_fault(m: FuseMount) -> str:
    """Why a restore would not take a mount; empty if it would."""
    return fault_of_mount(
        {
            "mountpoint": m.mountpoint,
            "fstype": m.fstype,
            "source": m.source,
            "mount_options": m.options,
            "super_options": m.super_options,
        }
    )


def verdicts(scan: Scan, *, unprivileged: bool, adopting: bool = False) -> list[Verdict]:
    """All reasons against a checkpoint; empty means that every handle would survive.

    :param unprivileged: the container has a user namespace of its own
    :param adopting: what ``incus exec`` left behind will be given sessions (sessions.py)
    """
    found = [*_container(scan, unprivileged, adopting)]
    for number, daemons in sorted(scan.connections.items()):
        found += _connection(scan, number, daemons, unprivileged)
    found += _stacked(scan)
    served = scan.connections
    for ref in scan.refs:
        if ref.connection in served:
            found += _ref(scan, ref)
    for lock in scan.locks:
        pid, minor, kind = lock.split()
        if int(minor) in served:
            who = next((owner(scan, p.pid) for p in scan.processes if p.pid == int(pid)), f"process {pid}")
            found.append(Verdict(who, f"holds a {kind} lock on a FUSE file", "release the lock, or stop the process, first"))
    return found


def notes(scan: Scan) -> list[Verdict]:
    """What is not in the way, and the operator should know."""
    return [
        Verdict(
            owner(scan, pid),
            "has O_PATH descriptors, so it may know its files by their inode numbers, which are others after a restore: a new file "
            "that gets the number of one that is in use now would be taken for it",
            "if files are made on its mount: close what is open there, or end it, first",
        )
        for pid in sorted({pid for pids in scan.connections.values() for pid in pids})
        if scan.process(pid).path_fds
    ]


def _container(scan: Scan, unprivileged: bool, adopting: bool) -> list[Verdict]:
    found = []
    if unprivileged and scan.root_idmapped:
        found.append(
            Verdict(
                "root file system of the container",
                "is an idmapped mount, which a restore does not re-create",
                "start incusd with INCUS_IDMAPPED_MOUNTS_DISABLE=1 and restart the container once",
            )
        )
    for process in scan.processes:
        if process.tracer:
            found.append(Verdict(owner(scan, process.pid), "is being traced", "detach the debugger from it first"))
        if process.outside == ATTACHED or (process.outside and not adopting):
            found.append(
                Verdict(
                    owner(scan, process.pid),
                    f"has its {process.outside} outside of the container (begun by incus exec)",
                    "end that incus exec; begin what shall stay with: incus exec NAME -- setsid --fork COMMAND, or as a service",
                )
            )
    if len(scan.mounts) > MAX_MOUNTS:
        found.append(
            Verdict(
                "mount tables of the container",
                f"hold {len(scan.mounts)} FUSE mounts, more than {MAX_MOUNTS}",
                "unmount what is not needed",
            )
        )
    if len(scan.connections) > MAX_CONNECTIONS:
        found.append(
            Verdict(
                "FUSE daemons of the container",
                f"serve {len(scan.connections)} connections, more than {MAX_CONNECTIONS}",
                "end what is not needed",
            )
        )
    return found


def _stacked(scan: Scan) -> list[Verdict]:
    """Mounts of the host's daemons that recovery had to put on top of former ones (recovery/plan.py): CRIU binds one each."""
    home = scan.process(scan.init).mntns
    outer = {m.id: m for m in scan.mounts if m.mntns == home and m.connection not in scan.connections}
    stacked = [m for m in outer.values() if m.parent in outer and outer[m.parent].mountpoint == m.mountpoint]
    return [
        Verdict(
            f"mount {printable(m.mountpoint)}",
            f"covers that of a former {m.fstype.removeprefix('fuse.')}, in which a process has its working directory",
            "let the process leave it, or stop it; the former mount goes within half a minute",
        )
        for m in stacked
    ]


def _connection(scan: Scan, number: int, daemons: list[int], unprivileged: bool) -> list[Verdict]:
    who = " and ".join(owner(scan, pid) for pid in daemons)
    root = root_mount(scan, number)
    if root is None:
        return [
            Verdict(
                f"FUSE connection {number} of {who}",
                "its whole tree is not mounted in the mount namespace of the container's init",
                "mount it there, not only in a service's private namespace or as a part",
            )
        ]
    found = []
    options = options_of(root)
    if unprivileged and "allow_other" not in options and options.get("user_id", "0") != "0":
        found.append(
            Verdict(
                f"mount {printable(root.mountpoint)} of {who}",
                f"belongs to uid {options.get('user_id')} alone, so that a restore cannot open its files",
                "mount it with -o allow_other",
            )
        )
    if root.fstype == "fuseblk":
        found.append(Verdict(f"mount {printable(root.mountpoint)}", "is backed by a block device", "unmount it"))
    elif fault := mount_fault(root):
        found.append(
            Verdict(
                f"mount {printable(root.mountpoint)} of {who}",
                f"is of a kind that no restore accepts: {fault} ({printable(root.fstype)}, {printable(root.super_options)})",
                "mount it with another subtype and without that option, or unmount it",
            )
        )
    hidden = [m for m in scan.mounts if m.mntns == root.mntns and m.parent == root.id and m.mountpoint == root.mountpoint]
    if hidden:
        found.append(
            Verdict(f"mount {printable(root.mountpoint)} of {who}", "is hidden below another mount", "unmount the upper one")
        )
    return found


def _ref(scan: Scan, ref: Ref) -> list[Verdict]:
    who = owner(scan, ref.pid)
    place = f"{who} fd {ref.fd}" if ref.fd >= 0 else f"{who} {ref.kind}"
    shown = printable(ref.shown.removesuffix(DELETED))
    if ref.kind == "watch":
        return [Verdict(f"{place} on {shown}", "inotify watch on a FUSE file", "stop the watcher first")]
    if ref.kind == "map" and ref.detail == "shared writable mapping":
        return [Verdict(f"{place} {shown}", "shared writable mapping of a FUSE file", "unmap it, or stop the process, first")]
    if ref.kind in ("map", "exe") and ref.detail:
        return [Verdict(f"{place} {shown}", ref.detail, "stop the process first")]
    return []


def refused(found: list[Verdict]) -> list[dict[str, Any]]:
    """For reports."""
    return [v.to_dict() for v in found]
