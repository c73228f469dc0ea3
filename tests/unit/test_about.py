# SPDX-License-Identifier: Apache-2.0
"""What the agent tells of a running container, and to whom it answers without one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from incus_fusecr.agent import about
from incus_fusecr.agent.requests import Request, Requests
from incus_fusecr.incus.config import Config
from incus_fusecr.linux import ns
from incus_fusecr.linux.mount import parse_mountinfo

MOUNTS = parse_mountinfo(
    b"21 20 0:40 / /srv rw - xfs /dev/sdb rw\n"
    b"22 21 0:41 / /srv/share rw - nfs4 server:/x rw\n"
    b"23 20 0:42 / /mnt rw - ext4 /dev/sdc rw\n"
    b"24 20 0:43 / /mnt rw - ceph mon:/ rw\n"
    b"20 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
)


@pytest.mark.parametrize(
    ("source", "system"),
    [
        ("/opt/x", "ext4"),
        ("/srv", "xfs"),
        ("/srv/shared", "xfs"),
        ("/srv/share/a", "nfs4"),
        ("/srv/share/../b", "xfs"),
        ("/mnt/a", "ceph"),
    ],
)
def test_file_systems_below_disk_devices(source: str, system: str) -> None:
    devices = {
        "root": {"type": "disk", "path": "/", "pool": "default"},
        "eth0": {"type": "nic", "source": "/srv"},
        "volume": {"type": "disk", "path": "/v", "pool": "default", "source": "v"},
        "data": {"type": "disk", "path": "/d", "source": source},
    }
    assert about.disks({"expanded_devices": devices}, MOUNTS) == {"data": system}


def test_memory_by_the_cgroup(tmp_path: Path) -> None:
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 900000\nshmem 200\n")
    (tmp_path / "memory.swap.current").write_text("30\n")
    assert about.memory([os.getpid()], str(tmp_path)) == 1230


def test_memory_by_the_tasks(tmp_path: Path) -> None:
    """A machine without the controller. This process has at least what is written here; one that is gone has none."""
    written = bytearray(os.urandom(1)) * (32 << 20)
    assert 32 << 20 < about.memory([os.getpid(), 1 << 22], str(tmp_path)) < 4 << 30
    assert len(written) and about.memory([], str(tmp_path)) == 0


def test_a_restored_container_has_a_time_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not about.restored(os.getpid(), {})
    monkeypatch.setattr(ns, "ns_id", lambda pid, kind: f"{kind}:[{pid}]")
    assert about.restored(os.getpid(), {})
    assert not about.restored(os.getpid(), {"expanded_config": {"raw.lxc": "lxc.time.offset.boot = 7d"}}), "its own"


@pytest.mark.parametrize(("op", "answered"), [("facts", ["facts"]), ("check", []), ("hold", []), ("abort", []), ("bind", [])])
def test_a_profile_of_no_instance_may_ask_for_facts_alone(op: str, answered: list[str]) -> None:
    """The right to make profiles gives nothing else (docs/adr/0003)."""
    asked: list[str] = []

    def handle(request: Request) -> tuple[str, Any]:
        raise AssertionError

    config = Config.load("", {"HOME": "/nonexistent"})
    requests = Requests(config, handle, lambda request: None, lambda op, args: None, lambda identifier: None)
    server: Any = None  # of a bound instance's project only
    requests._dispatch = lambda request, config: asked.append(request.op)  # type: ignore[method-assign]
    key = json.dumps({"v": 1, "id": "ab12", "seq": 1, "op": op})
    requests._look_at_profile(server, "default", {"name": "fusecr-ab12", "config": {"user.fusecr.request": key}})
    assert asked == answered
    requests._look_at_profile(server, "default", {"name": "fusecr-other", "config": {"user.fusecr.request": key}})
    assert asked == answered
