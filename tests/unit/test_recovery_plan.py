# SPDX-License-Identifier: Apache-2.0
"""What is decided about the mounts of one namespace, from mountinfo alone."""

from __future__ import annotations

from typing import Any

import pytest

from incus_fusecr.linux.fd import Fd
from incus_fusecr.linux.mount import Mount, parse_mountinfo
from incus_fusecr.linux.mountapi import (
    MOUNT_ATTR_NOATIME,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MOUNT_ATTR_STRICTATIME,
)
from incus_fusecr.recovery.families import Visit, families
from incus_fusecr.recovery.namespaces import Namespace, relevant
from incus_fusecr.recovery.plan import Beneath, Collect, Later, Leave, StackOnTop, Step, UmountOnly, View, peer_group, plan
from incus_fusecr.recovery.trees import attrs

OLD, OLDER, NEW = (0, 41), (0, 40), (0, 50)
FSTYPE = {"41": "fuse.lxcfs", "40": "fuse.lxcfs", "50": "fuse.lxcfs"}


def table(text: str) -> list[Mount]:
    """Lines of ``id parent device root mountpoint [options [propagation]]``; device 0:N."""
    lines = ["1 0 8:1 / / rw - ext4 /dev/sda1 rw"]
    for line in text.strip().splitlines():
        number, parent, minor, root, where, *more = line.split()
        options, *fields = more or ["rw,nosuid,nodev,relatime"]
        words = [number, parent, f"0:{minor}", root, where, options, *fields, "-", FSTYPE.get(minor, "tmpfs"), "x", "rw"]
        lines.append(" ".join(words))
    return parse_mountinfo("\n".join(lines).encode())


def lines(mounts: list[Mount]) -> bytes:
    return b"\n".join(f"{m.id} {m.parent} {m.major}:{m.minor} {m.root} {m.mountpoint} rw - x x rw".encode() for m in mounts)


def steps(text: str, **more: Any) -> dict[int, Step]:
    found = plan(View(table(text)), {OLD, OLDER}, NEW, **more)
    assert all(step.describe() for step in found)
    return {step.mount.id: step for step in found}


PROC = "2 1 5 / /proc\n"


def test_nothing_to_do() -> None:
    assert steps(PROC + "3 2 50 /proc/stat /proc/stat") == {}


def test_a_bind_is_swapped() -> None:
    step = steps(PROC + "3 2 41 /proc/stat /proc/stat")[3]
    assert isinstance(step, Beneath) and not step.children and not step.shared_parent
    assert step.describe() == "swap /proc/stat (mount 3 of 0:41, root /proc/stat)"


def test_the_kernel_shares_what_is_put_on_a_shared_parent() -> None:
    step = steps("2 1 5 / /proc rw shared:7\n3 2 41 / /proc/stat rw master:3")[3]
    assert isinstance(step, Beneath) and step.shared_parent
    assert not isinstance(steps("2 1 5 / /proc rw master:7\n3 2 41 / /proc/stat")[3], Leave)
    assert (peer_group(step.mount), peer_group(step.mount, "master"), peer_group(None)) == (0, 3, 0)


@pytest.mark.parametrize("user", [3, 4, 5], ids=["itself", "on-it", "deeper"])
def test_a_working_directory_keeps_its_mount(user: int) -> None:
    text = "3 1 41 / /var/lib/lxcfs\n4 3 7 / /var/lib/lxcfs/sys\n5 4 8 / /var/lib/lxcfs/sys/x"
    step = steps(text, busy={user})[3]
    assert isinstance(step, StackOnTop) and "working directory" in step.why
    assert [child.id for child in step.children] == [4]
    assert isinstance(steps(text, busy={1})[3], Beneath)


def test_a_locked_mount_is_stacked_on() -> None:
    step = steps(PROC + "3 2 41 / /proc/stat", locked={3})[3]
    assert isinstance(step, StackOnTop) and "locked" in step.describe()


def test_an_earlier_run_was_cut_short() -> None:
    assert isinstance(steps(PROC + "3 2 50 /a /proc/stat\n4 3 41 /a /proc/stat")[4], UmountOnly)


@pytest.mark.parametrize("below", ["50 /b /proc/stat", "51 /a /proc/stat", "50 /a /proc"], ids=["root", "device", "place"])
def test_what_is_below_has_to_be_the_same(below: str) -> None:
    assert isinstance(steps(PROC + f"3 2 {below}\n4 3 41 /a /proc/stat")[4], Beneath)


def test_what_is_below_has_to_be_complete() -> None:
    text = "3 1 50 / /m\n4 3 41 / /m\n5 4 9 / /m/x\n"
    step = steps(text)[4]
    assert isinstance(step, Beneath) and [child.id for child in step.children] == [5]
    assert isinstance(steps(text + "6 3 9 / /m/x")[4], UmountOnly)


def test_foreign_overmounts_are_left() -> None:
    step = steps(PROC + "3 2 41 /a /proc/stat\n4 3 9 / /proc/stat")[3]
    assert isinstance(step, Leave) and not step.done and "foreign tmpfs" in step.why


def test_covered_by_a_fresh_one() -> None:
    text = PROC + "3 2 41 /a /proc/stat\n4 3 50 /a /proc/stat"
    step = steps(text)[3]
    assert isinstance(step, Leave) and step.done
    collected = steps(text, collect=True)[3]
    assert isinstance(collected, Collect) and collected.top is not None and collected.top.id == 4


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ("", {"busy": {3}}),
        ("", {"busy": {4}}),
        ("", {"locked": {3}}),
        ("", {"missing": {"/a"}}),
        ("\n5 4 9 / /proc/stat", {}),
    ],
    ids=["busy-below", "busy-top", "locked", "root-missing", "covered"],
)
def test_not_collected(more: str, options: dict[str, Any]) -> None:
    step = steps(PROC + "3 2 41 /a /proc/stat\n4 3 50 /a /proc/stat" + more, collect=True, **options)[3]
    assert isinstance(step, Leave)


def test_generations_in_a_stack() -> None:
    """The second died before the users of the first were gone: only the topmost is swapped, the first stays covered."""
    text = PROC + "3 2 40 /a /proc/stat\n4 3 41 /a /proc/stat"
    found = steps(text, busy={3})
    assert isinstance(found[4], Beneath) and isinstance(found[3], Leave) and not found[3].done
    stacked = steps(text + "\n5 4 50 /a /proc/stat", busy={4}, collect=True)
    assert isinstance(stacked[3], Leave) and isinstance(stacked[4], Leave) and stacked[4].done


@pytest.mark.parametrize("root", ["/gone", "/a//deleted"])
def test_roots_that_the_fresh_one_lacks(root: str) -> None:
    step = steps(PROC + f"3 2 41 {root} /proc/stat", missing={"/gone"})[3]
    assert isinstance(step, Leave) and root in step.why


def test_what_cannot_be_swapped() -> None:
    assert "idmapped" in steps(PROC + "3 2 41 / /proc/stat rw,idmapped")[3].describe()
    found = plan(View(parse_mountinfo(b"9 8 0:41 / / rw - fuse x rw")), {OLD}, NEW)
    assert isinstance(found[0], Leave) and "root of its namespace" in found[0].why


@pytest.mark.parametrize(
    "text",
    [
        "2 1 5 / /a\n3 2 41 / /a/b/m\n4 2 9 / /a/b",
        "2 1 5 / /a\n3 2 41 / /a/b/m\n4 2 9 / /a",
        "2 1 5 / /a/b/c\n3 2 41 / /a/b/c/m\n4 1 9 / /a",
    ],
    ids=["between", "on-the-parent", "further-up"],
)
def test_hidden(text: str) -> None:
    step = steps(text)[3]
    assert isinstance(step, Leave) and step.why == "a tmpfs hides it"
    assert isinstance(steps(text.rpartition("\n")[0])[3], Beneath)
    assert {m.id for m in relevant(lines(table(text)), {OLD})} == {1, 2, 3, 4}


def test_children_first() -> None:
    found = plan(View(table("3 1 41 / /m\n4 3 41 /x /m/x\n5 3 9 / /m/y\n6 5 41 / /m/y/z")), {OLD}, NEW)
    assert [(step.mount.id, type(step)) for step in found] == [(6, Beneath), (4, Beneath), (3, Later)]
    later = found[2]
    assert isinstance(later, Later) and later.nested is not None and later.nested.id in (4, 6)


def test_children_that_are_left_hold_nothing_up() -> None:
    found = steps("3 1 41 / /m\n4 3 41 /x /m/x\n5 4 9 / /m/x")
    assert isinstance(found[4], Leave)
    assert isinstance(found[3], Beneath) and [child.id for child in found[3].children] == [4]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("rw,relatime", 0),
        ("rw", MOUNT_ATTR_STRICTATIME),
        ("ro,nosuid,relatime", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID),
        ("rw,nodev,noexec,noatime", MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NOATIME),
    ],
)
def test_flags(options: str, expected: int) -> None:
    assert attrs(options) == expected


def test_only_what_matters_is_parsed() -> None:
    many = "\n".join(f"{n} 1 9 / /other{n}" for n in range(100, 200))
    text = "2 1 5 / /a\n3 2 41 / /a/m\n4 3 9 / /a/m/x\n5 4 9 / /a/m/x/y\n6 2 9 / /a/other\n" + many
    raw = lines(table(text))
    assert [m.id for m in relevant(raw, {OLD})] == [1, 2, 3, 4, 5]
    assert relevant(raw, {(0, 4)}) == [] and relevant(raw, {(1, 41)}) == []


def visited(number: int, *parent_propagation: str) -> Visit:
    parents = "\n".join(f"{10 + n} 1 5 / /p{n} rw {words.replace('+', ' ')}" for n, words in enumerate(parent_propagation))
    olds = "\n".join(f"{20 + n} {10 + n} 41 / /p{n}/old" for n in range(len(parent_propagation)))
    mounts = table(f"{parents}\n{olds}")
    return Visit(Namespace(number), Fd(-1), View(mounts), [m for m in mounts if m.minor == 41])


def test_namespaces_that_propagate_are_worked_on_in_order() -> None:
    receiver = visited(1, "master:2")
    between = visited(2, "shared:2+master:1")
    sender, peer = visited(3, "shared:1"), visited(4, "shared:1")
    alone, other = visited(5, "", ""), visited(6, "shared:9")
    found = families([receiver, between, sender, peer, alone, other], host=0)
    numbers = sorted([v.namespace.number for v in family] for family in found)
    assert sorted(numbers[0][:2]) == [3, 4] and numbers[0][2:] == [2, 1] and numbers[1:] == [[5], [6]]
    found = families([receiver, between, sender, peer, alone, other], host=4)
    assert [4, 3, 2, 1] in [[v.namespace.number for v in family] for family in found]


def test_families_grow_together() -> None:
    """The last one belongs to both of the first."""
    last = visited(4, "master:1", "master:2")
    found = families([visited(1, "shared:1"), visited(2, "shared:2"), visited(3, "shared:3"), last], 0)
    assert sorted([v.namespace.number for v in family] for family in found) == [[1, 2, 4], [3]]
