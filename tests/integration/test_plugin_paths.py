# SPDX-License-Identifier: Apache-2.0
"""The table by which CRIU is kept from walking below FUSE mounts, from the agent that writes it to the imports of a program."""

from __future__ import annotations

import errno
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from criu_box import run_in_box
from fake_agent import FakeAgent
from test_plugin_compat import REDIRECTED, SESSION_LEADER, Box, with_criu

import incus_fusecr
from incus_fusecr.checkpoint import paths, scan
from incus_fusecr.checkpoint.manifest import Node
from incus_fusecr.checkpoint.record import Recording
from incus_fusecr.linux import proc

SOURCE = Path(incus_fusecr.__file__).parent / "criu"
HERE = Path(__file__).parent
NUMBER = 77  # of the connection
SPACE = "mnt:[1]"
ODD = "odd\udcff\nname"
OTHER_ROOT = 1 << 40  # no mount has this id
MADE_UP = [5, 6, 8, -9, 10, 11, 12, 13, 14, 0o100640, 3, os.getuid(), os.getgid(), os.makedev(7, 300), 512, 0]
SHOWN = "{} 5 100640 3 {} {} {} 6 512 8 -9.000000012 10.000000013 11.000000014"

pytestmark = pytest.mark.requires_command("cc")


@dataclass
class Program:
    """A program that stats and opens as CRIU does."""

    path: Path
    library: Path
    images: Path
    root: Path

    def run(self, *looked_at: str) -> tuple[str, list[str], list[str], str]:
        """What paths_dump() returned, the lines with the plugin's functions, those without, and the log."""
        command = [self.path, self.library, self.images, self.root, *looked_at]
        done = subprocess.run(command, capture_output=True, timeout=30, check=False)
        out, err = os.fsdecode(done.stdout), os.fsdecode(done.stderr)
        assert done.returncode == 0, err
        result, rest = out.split("\n", 1)
        lines = rest.replace(ODD, "ODD").splitlines()
        half = len(lines) // 2
        return result, lines[:half], lines[half:], err

    def write(self, content: bytes) -> None:
        fd = os.open(self.images, os.O_RDONLY | os.O_DIRECTORY)
        try:
            paths.write(fd, content)
        finally:
            os.close(fd)

    def left(self) -> list[str]:
        return sorted(os.listdir(self.images))


@pytest.fixture
def program(tmp_path: Path) -> Program:
    found = Program(tmp_path / "walks", tmp_path / "paths.so", tmp_path / "images", tmp_path / "root")
    warn = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    for arguments in (
        ["-fPIC", "-shared", "-o", str(found.library), *(str(SOURCE / name) for name in ("paths.c", "redirect.c"))],
        ["-Wl,-z,now,-z,relro", "-rdynamic", "-o", str(found.path), str(HERE / "walks.c"), "-ldl"],
    ):
        subprocess.run(["cc", *warn, *arguments], check=True, timeout=120)
    found.images.mkdir()
    found.root.mkdir()
    return found


def mount_of(path: Path) -> int:
    fd = os.open(path, os.O_PATH)
    try:
        return int(proc.fdinfo("self", fd)["mnt_id"])
    finally:
        os.close(fd)


def table(root: Path, mount: int) -> bytes:
    """The agent's table of a connection with a file open at two places, one of them below a bind mount."""
    init, st_dev = os.getpid(), os.stat(root).st_dev
    process = scan.Process(
        pid=init, ns_pid=1, start=0, ppid=0, comm="init", states="S", tracer=0, outside="", devices=[], mntns=SPACE
    )

    def ref(shown: str, kind: str = "fd") -> scan.Ref:
        return scan.Ref(init, kind, 3, NUMBER, 0, "d/file", shown)

    seen = scan.Scan(
        init,
        [process],
        [scan.FuseMount(SPACE, 9, 1, NUMBER, "/d", "/bind", "fuse", "x", "rw", "rw")],
        [ref("/mnt/d/file"), ref("/bind/file"), ref(f"/{ODD}", "map"), ref("/gone (deleted)"), ref("/watched", "watch")],
        [],
        False,
        {SPACE: mount},
    )
    recording = Recording(NUMBER, [], seen.mounts[0], [], {1: Node(1, 0, MADE_UP), 2: Node(2, 0, MADE_UP)}, {})
    recording.ids = {"d": [1, st_dev, 5], "d/file": [2, st_dev, 5]}
    return paths.table(seen, [recording])


def test_known_paths_are_answered_and_no_others(program: Program) -> None:
    program.write(table(program.root, mount_of(program.root)))
    (program.root / "real").touch()
    expected = SHOWN.format(os.stat(program.root).st_dev, os.getuid(), os.getgid(), os.makedev(7, 300))
    known = ["./mnt/d/file", "bind/file", "./bind", f"./{ODD}"]
    unknown = ["./mnt/d", "./mnt/d/file2", "./gone (deleted)", "./watched", "./gone", "/mnt/d/file"]
    result, with_it, without, log = program.run(*known, *unknown, "./real")
    assert result == "0", log
    assert with_it[:4] == [f"{path.replace(ODD, 'ODD')}: {expected}" for path in known]
    missing = [f"{path}: {errno.ENOENT}" for path in unknown]
    assert with_it[4:10] == missing
    assert with_it[10] == without[10] != f"./real: {errno.ENOENT}"
    assert without[:4] == [f"{path.replace(ODD, 'ODD')}: {errno.ENOENT}" for path in known]
    # a file of that file system is opened by its path alone, without its daemon
    assert (with_it[11], without[11]) == ("path only: 1", "path only: 0")
    assert program.left() == []


def test_the_same_path_of_another_mount_namespace(program: Program) -> None:
    program.write(table(program.root, OTHER_ROOT))
    result, with_it, _, log = program.run("./mnt/d/file")
    assert (result, with_it[0]) == ("0", f"./mnt/d/file: {errno.ENOENT}"), log


def test_without_a_table_no_path_is_known(program: Program) -> None:
    """Opening goes through the plugin all the same: a watched symbolic link may be in any container."""
    program.write(b"")
    assert program.left() == []
    result, with_it, without, log = program.run("./mnt/d/file")
    assert (result, with_it) == ("0", without)
    assert with_it[1] == "path only: 0"
    assert REDIRECTED.format("openat64") in log and "fstatat64" not in log


@pytest.mark.parametrize("damage", ["magic", "cut", "length", "empty path"])
def test_a_damaged_table_ends_the_dump(program: Program, damage: str) -> None:
    good = table(program.root, mount_of(program.root))
    length = len(paths.MAGIC) + 19 * 8  # of the first path
    content = {
        "magic": b"F" + good[1:],
        "cut": good[:-1],
        "length": good[:length] + b"\xff" * 8 + good[length + 8 :],
        "empty path": good[:length] + bytes(8) + good[length + 8 :],
    }[damage]
    program.write(content)
    result, with_it, without, log = program.run("./mnt/d/file")
    assert result == "-1" and with_it == without
    assert "Error (fusecr): cannot use fusecr.paths" in log


class TableBox(Box):
    """CRIU, and an agent that leaves a table in the image directory before it answers."""

    def _run(self, script: str, env: dict[str, str]) -> int:
        with FakeAgent(self.shared / "agent.sock", self._leave):
            run_in_box(self.tree, self.shared, script, {"FUSECR_SOCKET": "/t/agent.sock"} | env)
        return int((self.shared / "rc").read_text())

    def _leave(self, message: str, fds: list[int]) -> str:
        if message.startswith("dump "):
            paths.write(fds[0], table(self.shared, OTHER_ROOT))
        return self._say(message)


@with_criu
def test_criu_goes_through_the_table_to_its_end(tree: Path, tmp_path: Path) -> None:
    # CRIU opens files (its statistics) after it has unloaded its plugins
    box = TableBox(tree, tmp_path)
    assert box.dump("exec sleep 900", f"grep -q sleep /proc/{SESSION_LEADER}/comm") == 0, box.errors("dump.log")
    log = box.text("dump.log")
    assert "fusecr: 4 paths below FUSE mounts are known" in log
    for function in ("fstatat64", "openat64"):
        assert REDIRECTED.format(function) in log
    assert "Dumping finished successfully" in log
    assert (tmp_path / "img/stats-dump").exists()
    assert not (tmp_path / "img" / paths.FILE_NAME).exists()
