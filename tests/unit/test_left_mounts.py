# SPDX-License-Identifier: Apache-2.0
"""Which mounts an incusd that was killed has left on an instance's directory."""

from __future__ import annotations

from typing import Any

import pytest

from incus_fusecr.agent.leftmount import bound_to_themselves
from incus_fusecr.linux.mount import Mount

PLACE = "/var/lib/incus/storage-pools/default/containers/c1"


def mount(number: int, parent: int, mountpoint: str, **changes: Any) -> Mount:
    values: dict[str, Any] = {
        "major": 254, "minor": 0, "root": "/srv" + mountpoint.removeprefix("/var/lib/incus"), "options": "rw,relatime,nosymfollow",
        "propagation": (), "fstype": "ext4", "source": "/dev/vda", "super_options": "rw",
    }  # fmt: skip
    return Mount(number, parent, mountpoint=mountpoint, **{**values, **changes})


HOME = mount(10, 1, "/var/lib/incus", root="/srv", options="rw")


def test_a_directory_bound_to_itself() -> None:
    assert bound_to_themselves([HOME, mount(11, 10, PLACE)], "c1") == [PLACE]
    twice = [HOME, mount(11, 10, PLACE), mount(12, 11, PLACE)]
    assert bound_to_themselves(twice, "c1") == [PLACE, PLACE]


def test_on_the_root_file_system() -> None:
    root = mount(1, 0, "/", root="/", options="rw")
    assert bound_to_themselves([root, mount(11, 1, PLACE, root=PLACE)], "c1") == [PLACE]


@pytest.mark.parametrize(
    "other",
    [
        mount(11, 10, PLACE, options="rw,relatime"),
        mount(11, 10, PLACE, root="/srv/storage-pools/default/containers/c2"),
        mount(11, 10, PLACE, minor=7),
        mount(11, 99, PLACE),
        mount(11, 10, PLACE + "/rootfs"),
        mount(11, 10, "/var/lib/incus/storage-pools/default/containers/c2"),
        mount(11, 10, "/var/lib/incus/storage-pools/default/custom/c1"),
        mount(11, 10, "/srv/containers/c1"),
        mount(11, 10, "/c1"),
    ],
)
def test_anything_else_is_somebody_elses(other: Mount) -> None:
    assert bound_to_themselves([HOME, other], "c1") == []
