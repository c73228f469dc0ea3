# SPDX-License-Identifier: Apache-2.0
"""A directory bound to itself, as an incusd that is killed leaves it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from incus_fusecr.agent.leftmount import bound_to_themselves, take_away
from incus_fusecr.linux.fd import Fd
from incus_fusecr.linux.mount import MNT_DETACH, mountinfo, umount2
from incus_fusecr.linux.mountapi import MOUNT_ATTR_NOSYMFOLLOW, clone_at, mount_setattr, move_mount

pytestmark = pytest.mark.requires_root
NAME = "fusecr-test-left"


def bind(path: Path) -> None:
    with clone_at(str(path)) as tree, Fd(os.open(path, os.O_PATH | os.O_CLOEXEC), str(path)) as place:
        mount_setattr(tree, MOUNT_ATTR_NOSYMFOLLOW)
        move_mount(tree, place)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "storage-pools/pool/containers" / NAME
    made.mkdir(parents=True)
    yield made
    while str(made) in {m.mountpoint for m in mountinfo("self")}:
        umount2(str(made), MNT_DETACH)


def test_it_can_be_removed_then(directory: Path, expect_log: Callable[[str], None]) -> None:
    expect_log("unmounted")
    bind(directory)
    bind(directory)
    with pytest.raises(OSError, match="busy"):
        directory.rmdir()
    assert take_away(NAME)
    directory.rmdir()
    assert not take_away(NAME)


def test_what_is_in_use_stays(directory: Path, expect_log: Callable[[str], None]) -> None:
    expect_log("has ended: Device or resource busy")
    expect_log("unmounted")
    (directory / "file").touch()
    bind(directory)
    with (directory / "file").open():
        assert not take_away(NAME)
        assert bound_to_themselves(mountinfo("self"), NAME) == [str(directory)]
    assert take_away(NAME)
