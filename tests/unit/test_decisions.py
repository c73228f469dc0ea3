# SPDX-License-Identifier: Apache-2.0
"""The parts that decide: stacking, closure of helpers, verdicts, journal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from incus_fusecr.checkpoint import peers, survive
from incus_fusecr.checkpoint.journal import Journal
from incus_fusecr.checkpoint.manifest import MAX_CONNECTIONS
from incus_fusecr.checkpoint.quiesce import NotQuiet, stacking_order
from incus_fusecr.checkpoint.scan import FuseMount, Process, Ref, Scan
from incus_fusecr.linux.mount import parse_mountinfo


def test_the_upper_of_two_stacked_daemons_stops_first() -> None:
    # 20 (bindfs, connection 2) reads from connection 1, which 10 (sshfs) serves.
    assert stacking_order({1: [10], 2: [20]}, {1: {20, 99}, 2: {98}}) == [(2, [20]), (1, [10])]


def test_daemons_that_are_each_others_clients_are_refused() -> None:
    with pytest.raises(NotQuiet, match="clients of each other"):
        stacking_order({1: [10], 2: [20]}, {1: {20}, 2: {10}})


def test_helpers_are_found_through_pipes_and_sockets() -> None:
    # sshfs - ssh - sshd session - sftp-server; a client apart
    partners = {10: {11}, 11: {10, 12}, 12: {11, 13}, 13: {12}, 50: {51}, 51: {50}}
    assert peers.closure([10], partners) == [11, 12, 13]


def test_a_hub_is_reached_and_not_passed_through() -> None:
    # 30 is a journal: connected to everything
    partners: dict[int, set[int]] = {10: {30}, 30: {10, *range(100, 120)}}
    partners.update({n: {30} for n in range(100, 120)})
    assert peers.closure([10], partners) == [30]


def process(pid: int, **changes: Any) -> Process:
    values: dict[str, Any] = {
        "pid": pid,
        "ns_pid": pid - 1000,
        "start": 1,
        "ppid": 1001,
        "comm": "x",
        "states": "S",
        "tracer": 0,
        "outside": "",
        "devices": [],
        "mntns": "mnt:[1]",
    }
    return Process(**{**values, **changes})


def mount(**changes: Any) -> FuseMount:
    values: dict[str, Any] = {
        "mntns": "mnt:[1]",
        "id": 30,
        "parent": 20,
        "connection": 57,
        "root": "/",
        "mountpoint": "/mnt/f",
        "fstype": "fuse",
        "source": "x",
        "options": "rw",
        "super_options": "rw,user_id=0,group_id=0,allow_other",
    }
    return FuseMount(**{**values, **changes})


def scan(mounts: list[FuseMount], refs: list[Ref], locks: list[str] | None = None, **changes: Any) -> Scan:
    processes = [process(1001), process(1007, devices=[(3, 57)], comm="bindfs"), process(1009, comm="client", **changes)]
    return Scan(1001, processes, mounts, refs, locks or [], False)


def why(found: list[survive.Verdict]) -> str:
    return " | ".join(str(v) for v in found)


def test_a_former_lxcfs_that_somebody_stands_in() -> None:
    here: dict[str, Any] = {"fstype": "fuse.lxcfs", "root": "/sys/devices/system/cpu", "mountpoint": "/sys/devices/system/cpu"}
    one, top = mount(id=40, parent=20, connection=90, **here), mount(id=41, parent=40, connection=91, **here)
    assert survive.verdicts(scan([mount(), top], []), unprivileged=True) == []
    (found,) = survive.verdicts(scan([mount(), one, top], []), unprivileged=True)
    assert "/sys/devices/system/cpu" in found.what and "former lxcfs" in found.why


def test_a_daemon_that_may_know_files_by_their_numbers_is_noted() -> None:
    seen = scan([mount()], [])
    assert survive.notes(seen) == []
    seen.processes[1] = process(1007, devices=[(3, 57)], comm="passthrough_ll", path_fds=True)
    (note,) = survive.notes(seen)
    assert note.what == "pid 7 (passthrough_ll)" and "inode numbers" in note.why and note.hint
    assert survive.verdicts(seen, unprivileged=True) == []


def test_an_ordinary_container_survives() -> None:
    refs = [Ref(1009, "fd", 3, 57, 2, "a", "/mnt/f/a"), Ref(1009, "cwd", -1, 57, 0, "", "/mnt/f")]
    assert survive.verdicts(scan([mount()], refs), unprivileged=True) == []


@pytest.mark.parametrize(
    ("seen", "text"),
    [
        (scan([mount(root="/sub")], []), "whole tree is not mounted"),
        (scan([mount(mntns="mnt:[2]")], []), "whole tree is not mounted"),
        (scan([mount(super_options="rw,user_id=1000,group_id=1000")], []), "belongs to uid 1000 alone"),
        (scan([mount(), mount(id=31, parent=30)], []), "hidden below another mount"),
        (scan([mount()], [], ["1009 57 POSIX"]), "pid 9 (client): holds a POSIX lock"),
        (scan([mount()], [], tracer=4), "is being traced"),
        (scan([mount()], [], outside="session leader"), "session leader outside"),
        (scan([mount()], [Ref(1009, "watch", 4, 57, 0, "", "inode 5", "inotify watch")]), "pid 9 (client) fd 4"),
        (
            scan([mount()], [Ref(1009, "map", -1, 57, 0, "a", "/mnt/f/a", "shared writable mapping")]),
            "shared writable mapping",
        ),
    ],
)
def test_what_cannot_go_is_named(seen: Scan, text: str) -> None:
    found = survive.verdicts(seen, unprivileged=True)
    assert text in why(found)
    assert all(v.hint for v in found)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fstype": "fuse.portal:x"}, "fstype is out of bounds"),
        ({"fstype": "fuse.my fs"}, "fstype is out of bounds"),
        ({"fstype": "fuse.a/b"}, "fstype is out of bounds"),
        ({"super_options": "rw,seclabel,user_id=0,group_id=0"}, "option 'seclabel' is not known"),
        ({"options": "rw,context=x"}, "option 'context' is not known"),
    ],
)
def test_a_mount_that_no_restore_would_take_is_refused_while_it_runs(changes: dict[str, str], text: str) -> None:
    (found,) = survive.verdicts(scan([mount(**changes)], []), unprivileged=True)
    assert "/mnt/f of pid 7 (bindfs)" in found.what and text in found.why


@pytest.mark.parametrize(("count", "refused"), [(MAX_CONNECTIONS, 0), (MAX_CONNECTIONS + 1, 1)])
def test_more_connections_than_a_manifest_takes_are_refused_while_it_runs(count: int, refused: int) -> None:
    numbers = range(57, 57 + count)
    processes = [process(1001), *(process(2000 + n, devices=[(3, n)], comm="bindfs") for n in numbers)]
    mounts = [mount(id=1000 + n, connection=n, mountpoint=f"/mnt/{n}") for n in numbers]
    found = survive.verdicts(Scan(1001, processes, mounts, [], [], False), unprivileged=True)
    assert len(found) == refused
    assert not refused or "serve 65 connections, more than 64" in why(found)


def test_a_users_mount_is_fine_in_a_privileged_container() -> None:
    seen = scan([mount(super_options="rw,user_id=1000,group_id=1000")], [])
    assert survive.verdicts(seen, unprivileged=False) == []


def test_hostile_names_are_printable_in_messages() -> None:
    ref = Ref(1009, "map", -1, 57, 0, "a", "/mnt/f/\x1b[2J\udcff\n", "shared writable mapping")
    text = why(survive.verdicts(scan([mount()], [ref]), unprivileged=True))
    assert text.isprintable()


def test_mountinfo_escapes() -> None:
    line = b"36 35 0:57 /a\\040b /mnt/x\\012y rw,nosuid master:1 - fuse.s\\040x u\\134v rw,user_id=0\n"
    (found,) = parse_mountinfo(line)
    assert (found.root, found.mountpoint, found.source) == ("/a b", "/mnt/x\ny", "u\\v")
    assert (found.minor, found.propagation, found.fstype) == (57, ("master:1",), "fuse.s x")


def test_journal_replaces_and_forgets(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "j"))
    journal.write("dump", "12", {"a": 1})
    journal.write("dump", "12", {"a": 2})
    journal.write("hold", "12", {"a": 3})
    assert [e["a"] for e in journal.entries("dump")] == [2]
    journal.remove("dump", "12")
    journal.remove("dump", "12")
    assert journal.read("dump", "12") is None
    assert [e["a"] for e in journal.entries("hold")] == [3]
    assert (tmp_path / "j").stat().st_mode & 0o077 == 0


def test_a_journal_name_cannot_leave_its_directory(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "j"))
    journal.write("gate", "../../x", {})
    assert len(list((tmp_path / "j").iterdir())) == 1
    assert not (tmp_path / "x").exists()
