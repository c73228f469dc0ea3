# SPDX-License-Identifier: Apache-2.0
"""A directory descriptor that was put at its end, as CRIU does, lists everything once it is rewound."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from incus_fusecr.checkpoint import directories
from incus_fusecr.linux.mount import mountinfo
from incus_fusecr.linux.zygote import Zygote

NAMES = ("a", "b", "c")
END = 0x7FFFFFFFFFFFFFFF
pytestmark = pytest.mark.requires_root

# Opens DIR, goes to the position, says so, and at a line lists: what is there, after a look at the place and a rewind.
HOLD = """
import ctypes, os, sys
libc, buffer = ctypes.CDLL(None), ctypes.create_string_buffer(1 << 15)
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
os.lseek(fd, int(sys.argv[2]), os.SEEK_SET)
print(fd, flush=True)
sys.stdin.readline()
at = os.lseek(fd, 0, os.SEEK_CUR)
libc.syscall(int(sys.argv[3]), fd, buffer, len(buffer))
os.lseek(fd, 0, os.SEEK_SET)
print(at, libc.syscall(int(sys.argv[3]), fd, buffer, len(buffer)) > 48, flush=True)
"""


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    where = max((m for m in mountinfo("self") if str(tmp_path).startswith(m.mountpoint)), key=lambda m: len(m.mountpoint))
    if where.fstype != "ext4":
        pytest.skip(f"needs ext4 below {tmp_path}, which is on {where.fstype}")
    for name in NAMES:
        (tmp_path / name).touch()
    return tmp_path


def test_one_at_its_end_is_not_empty_when_it_is_rewound(zygote: Zygote, place: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(place), str(END), str(directories.SYS_getdents64)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdin
        number = int(process.stdout.readline())
        assert directories._directories(process.pid) == [(number, END)]
        directories.settle(zygote, [process.pid])
        assert directories._directories(process.pid) == [(number, END)]
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().split() == [str(END), "True"]


def test_one_that_was_removed_keeps_no_other_from_it(zygote: Zygote, place: Path) -> None:
    """getdents64(2) of a removed directory is ENOENT, and lseek(2) there EINVAL."""
    gone = place / "gone"
    gone.mkdir()
    first, second = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (gone, place))
    try:
        for fd in (first, second):
            os.lseek(fd, END, os.SEEK_SET)
        gone.rmdir()
        answer, _ = zygote.run(f"{directories.__name__}:job_settle", {"pids": [1 << 22, os.getpid()]}, deadline=10)
        assert answer == 1
        assert [os.lseek(fd, 0, os.SEEK_CUR) for fd in (first, second)] == [END, END]
    finally:
        os.close(first)
        os.close(second)


def test_what_is_at_its_beginning_or_gone_is_left_alone(zygote: Zygote, place: Path) -> None:
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert directories._directories(os.getpid()) == []
        directories.settle(zygote, [os.getpid(), 1 << 22])
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
    finally:
        os.close(fd)


def test_the_call_is_the_one_of_this_machine(place: Path) -> None:
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    buffer = ctypes.create_string_buffer(1 << 15)
    try:
        assert ctypes.CDLL(None).syscall(directories.SYS_getdents64, fd, buffer, len(buffer)) > 0
    finally:
        os.close(fd)
    assert b"b\0" in buffer.raw
