# SPDX-License-Identifier: Apache-2.0
"""The manifest comes from another host: whatever is in it, reading it ends in a Manifest or in a ManifestError."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incus_fusecr.checkpoint import dump, manifest
from incus_fusecr.checkpoint.manifest import Manifest, ManifestError, Name, Node
from incus_fusecr.errors import Refused
from incus_fusecr.fuse import wire

ATTR = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0o40755, 1, 0, 0, 0, 4096, 0]


def good() -> dict[str, Any]:
    return {
        "format": manifest.FORMAT,
        "version": manifest.VERSION,
        "product": "0.1.0",
        "migration": "",
        "tasks": [1, 7, 9],
        "first": [7],
        "stopped": [],
        "cgroups": [{"path": ".", "mode": 0o775, "uid": 0, "gid": 0, "files": ["cgroup.procs"]}],
        "connections": [
            {
                "key": "fusecr0",
                "number": 57,
                "daemons": [7],
                "mountpoint": "/mnt/f",
                "fstype": "fuse.sshfs",
                "source": "host:/srv",
                "mount_options": "rw,nosuid,nodev,relatime",
                "super_options": "rw,user_id=0,group_id=0,allow_other,max_read=65536",
                "init_reply": "07000000" * 16,
                "pointer_nodeids": False,
                "statfs": [1, 2, 3, 4, 5, 6, 7, 8],
                "nodes": [
                    {"nodeid": 1, "generation": 0, "attr": list(ATTR)},
                    {"nodeid": 2, "generation": 3, "attr": [2, *ATTR[1:]]},
                ],
                "names": [{"parent": 1, "name": "a\udcff", "nodeid": 2}],
                "handles": [
                    {"pid": 9, "fd": 3, "nodeid": 2, "fh": 1 << 63, "flags": 0o100002, "open_flags": 2, "path": "/mnt/f/a"}
                ],
            }
        ],
    }


def parse(raw: dict[str, Any]) -> Manifest:
    return manifest.parse(json.dumps(raw).encode())


def test_round_trip_keeps_strange_names(tmp_path: Path) -> None:
    first = parse(good())
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        first.write(fd)
        assert manifest.read(fd) == first
    finally:
        os.close(fd)
    assert os.fsencode(first.connections[0].names[0].name) == b"a\xff"
    assert os.listdir(tmp_path) == [manifest.FILE_NAME]


def test_no_manifest(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert manifest.read(fd) is None
    finally:
        os.close(fd)


def test_a_symlink_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text(json.dumps(good()))
    (tmp_path / manifest.FILE_NAME).symlink_to("real")
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(ManifestError):
            manifest.read(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("cut", [0, 1, 10, 200])
def test_truncated(cut: int) -> None:
    data = json.dumps(good()).encode()
    with pytest.raises(ManifestError, match="truncated"):
        manifest.parse(data[: len(data) - 1 - cut])


def change(path: list[Any], value: Any) -> dict[str, Any]:
    raw = good()
    here: Any = raw
    for step in path[:-1]:
        here = here[step]
    here[path[-1]] = value
    return raw


C = ["connections", 0]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["version"], 2),
        (["format"], "other"),
        (["tasks"], [1]),
        (["first"], [8]),
        (["migration"], "../x"),
        (["cgroups", 0, "path"], "../../etc"),
        (["cgroups", 0, "path"], "/abs"),
        (["cgroups", 0, "mode"], 0o4755),
        (["cgroups", 0, "files"], ["../cgroup.procs"]),
        (["cgroups", 0, "files"], ["a/b"]),
        ([*C, "key"], "other"),
        ([*C, "mountpoint"], "relative"),
        ([*C, "mountpoint"], "/"),
        ([*C, "mountpoint"], "/a\0b"),
        ([*C, "fstype"], "ext4"),
        ([*C, "fstype"], "fuseblk"),
        ([*C, "super_options"], "rw,fd=3"),
        ([*C, "super_options"], "rw,rootcontext=x"),
        ([*C, "super_options"], "user_id=-1"),
        ([*C, "mount_options"], "rw,allow_other"),
        ([*C, "init_reply"], "zz"),
        ([*C, "init_reply"], "00" * 65),
        ([*C, "statfs"], [1] * 7),
        ([*C, "nodes"], []),
        ([*C, "nodes", 0, "attr"], [1] * 15),
        ([*C, "nodes", 0, "attr"], [1] * 15 + [1 << 32]),
        ([*C, "nodes", 0, "nodeid"], True),
        ([*C, "names", 0, "name"], ".."),
        ([*C, "names", 0, "name"], "a/b"),
        ([*C, "names", 0, "name"], "x" * 256),
        ([*C, "names", 0, "parent"], 99),
        ([*C, "handles", 0, "nodeid"], 99),
        ([*C, "handles", 0, "pid"], 12),
        ([*C, "handles", 0, "fd"], -2),
        ([*C, "handles", 0, "fh"], 1 << 64),
    ],
)
def test_refused_by_name(path: list[Any], value: Any) -> None:
    with pytest.raises(ManifestError):
        parse(change(path, value))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, ""),
        ({"fstype": "fuse.a/b"}, "fstype is out of bounds"),
        ({"names": [Name(1, "x" * 300, 2)]}, "names.name is out of bounds"),
        ({"nodes": [Node(1, 0, ATTR), Node(2, 0, [*ATTR[:9], 1 << 32, *ATTR[10:]])]}, "attribute is out of bounds"),
    ],
)
def test_what_a_dump_would_write_is_judged_as_what_a_restore_reads(changes: dict[str, Any], text: str) -> None:
    (connection,) = parse(good()).connections
    found = manifest.fault_of(replace(connection, **changes))
    assert text in found and bool(text) == bool(found)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"first": [7, 99]}, "task 99 is used but not listed"),
        ({"connections": []}, ""),
        ({"connections": 65}, "connections is not a list of at most 64"),
        ({"migration": "XYZ"}, "migration is not an id"),
    ],
)
def test_a_dump_refuses_before_criu_begins_what_no_restore_would_accept(changes: dict[str, Any], text: str) -> None:
    whole = parse(good())
    if changes.get("connections") == 65:
        changes = {"connections": whole.connections * 65}
    made = replace(whole, **changes)
    if not text:
        assert dump._acceptable("c1", made) == made
        return
    with pytest.raises(Refused, match=f"c1 cannot be carried over: no restore would accept it: .*{text}"):
        dump._acceptable("c1", made)


def test_files_from_before_1970_are_carried(tmp_path: Path) -> None:
    file = tmp_path / "old"
    file.touch()
    os.utime(file, ns=(-1, -5_000_000_000))
    attr = wire.attr_of_stat(file.stat())
    assert attr[3:5] == [(1 << 64) - 1, (1 << 64) - 5] and attr[6:8] == [999_999_999, 0]
    raw = change([*C, "nodes", 1, "attr"], attr)
    assert parse(raw).connections[0].nodes[1].attr == attr


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        for key, item in value.items():
            found += places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += places(item, (*path, index))
    return found


@given(place=st.sampled_from(places(good())), value=JSON)
def test_any_value_at_any_place(place: tuple[Any, ...], value: Any) -> None:
    try:
        found = parse(change(list(place), value))
    except ManifestError:
        return
    # What is let through is whole: it can be written again and means the same.
    assert manifest.parse(found.dump()) == found


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(ManifestError):
        manifest.parse(data)
