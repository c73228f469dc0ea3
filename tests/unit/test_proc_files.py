# SPDX-License-Identifier: Apache-2.0
"""Names in /proc that a container chose: the kernel escapes a line feed in them, and no other character that ends a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from incus_fusecr.errors import FusecrError
from incus_fusecr.fuse import connection
from incus_fusecr.linux import proc
from incus_fusecr.linux.mount import parse_mountinfo
from incus_fusecr.linux.zygote import JobError

# Where bytes.splitlines() or str.splitlines() split.
ENDS = ["\r", "\x0b", "\x0c", "\x1c", "\x1e", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("end", ENDS)
def test_a_mountpoint(end: str) -> None:
    name = f"/mnt/a{end}b"
    line = f"36 35 0:57 / {name} rw - fuse.x{end}y src rw,user_id=0\n"
    found = parse_mountinfo((line + line).encode())
    assert [(m.mountpoint, m.fstype, m.minor) for m in found] == [(name, f"fuse.x{end}y", 57)] * 2


@pytest.mark.parametrize("end", ENDS)
def test_a_mapped_file(end: str) -> None:
    name = f"/mnt/a{end}b c"
    text = f"7f0000-7f1000 r--s 00000000 00:39 12                     {name}\n7f1000-7f2000 rw-p 00000000 00:00 0 \n"
    assert [m.path for m in proc.parse_maps(text * 2)] == [name] * 2


@pytest.mark.parametrize("end", ENDS)
def test_a_line_of_fdinfo_or_status_cannot_be_forged(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # io_uring lists its files by name there
    text = f"pos:\t0\nflags:\t02\n 0: /tmp/x{end}fuse_connection:\t57\nName:\tx{end}Uid:\t0\n"
    monkeypatch.setattr(proc, "read_text", lambda _path: text)
    assert set(proc.fdinfo(1, 3)) == {"pos", "flags", " 0", "Name"}
    assert "Uid" not in proc.status(1)


def test_lines() -> None:
    assert [proc.lines(t) for t in ("", "\n", "a", "a\n", "a\n\nb\n")] == [[], [""], ["a"], ["a"], ["a", "", "b"]]


def test_a_connection_that_ends_while_it_is_looked_at_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FUSECTL", str(tmp_path))
    (tmp_path / "57").mkdir()
    (tmp_path / "57" / "waiting").write_text("")
    with pytest.raises(FileNotFoundError):
        connection.waiting(57)


def test_a_failed_job_is_a_failure_like_others() -> None:
    error = JobError("mount: no such device", 19)
    assert isinstance(error, FusecrError) and str(error) == "mount: no such device" and error.errno == 19
