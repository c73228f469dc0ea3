# SPDX-License-Identifier: Apache-2.0
"""openat2(2) as the swap uses it: nothing in a path that a container controls leads anywhere else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from incus_fusecr.linux.fd import Fd
from incus_fusecr.linux.mountapi import open_beneath
from incus_fusecr.linux.statx import mount_id, mount_id_at


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base" / "real").mkdir(parents=True)
    (tmp_path / "base" / "real" / "file").write_text("text")
    (tmp_path / "base" / "link").symlink_to("real")
    (tmp_path / "base" / "real" / "link").symlink_to("file")
    (tmp_path / "outside").mkdir()
    return tmp_path / "base"


def opened(base: Path, path: str) -> os.stat_result:
    with Fd(os.open(base, os.O_PATH | os.O_CLOEXEC)) as fd, open_beneath(fd, path) as found:
        return os.fstat(found.fileno())


def test_below(base: Path) -> None:
    assert opened(base, "real/file").st_ino == (base / "real" / "file").stat().st_ino


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("link/file", errno.ELOOP),
        ("real/link", 0),  # O_NOFOLLOW with O_PATH: the link itself, on which nothing can be mounted
        ("../outside", errno.EXDEV),
        ("/etc", errno.EXDEV),
        ("none", errno.ENOENT),
        ("real/file/x", errno.ENOTDIR),
    ],
)
def test_not_elsewhere(base: Path, path: str, number: int) -> None:
    if number == 0:
        assert opened(base, path).st_ino == os.lstat(base / path).st_ino
        return
    with pytest.raises(OSError) as caught:
        opened(base, path)
    assert caught.value.errno == number and caught.value.filename == path


def test_no_magic_links() -> None:
    with pytest.raises(OSError) as caught:
        opened(Path("/proc/self"), "cwd/x")
    assert caught.value.errno == errno.ELOOP


def test_mount_ids() -> None:
    with Fd(os.open(".", os.O_PATH | os.O_CLOEXEC)) as here, Fd(os.open("/proc", os.O_RDONLY | os.O_CLOEXEC)) as proc:
        assert mount_id_at(proc.fileno(), f"{os.getpid()}/cwd") == mount_id(here.fileno()) != mount_id(proc.fileno())
        with pytest.raises(OSError) as caught:
            mount_id_at(proc.fileno(), "none")
    assert caught.value.errno == errno.ENOENT
