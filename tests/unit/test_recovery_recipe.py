# SPDX-License-Identifier: Apache-2.0
"""Command lines of second copies."""

from __future__ import annotations

import json

import pytest

from incus_fusecr.recovery import rebuild, recipe
from incus_fusecr.recovery.recipe import MOUNT_WORD, Recipe, marked, of_sidecar, with_pidfile


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["lxcfs", "/var/lib/lxcfs"], ["lxcfs", MOUNT_WORD]),
        (["lxcfs", "-f", "/var/lib/lxcfs/"], ["lxcfs", "-f", MOUNT_WORD]),
        (["lxcfs", "lxcfs", "-p", "x"], ["lxcfs", MOUNT_WORD, "-p", "x"]),  # relative to /var/lib
        (["sshfs", "/var/lib/lxcfs", "/var/lib/lxcfs"], ["sshfs", "/var/lib/lxcfs", MOUNT_WORD]),
        (["lxcfs", f"{recipe.FRESH}/lxcfs.17"], ["lxcfs", MOUNT_WORD]),
    ],
)
def test_the_mountpoint_is_found(argv: list[str], wanted: list[str]) -> None:
    assert marked(argv, "/var/lib/lxcfs", "/var/lib") == wanted


@pytest.mark.parametrize("argv", [["/var/lib/lxcfs"], ["lxcfs"], ["lxcfs", "/var/lib/lxcfs2"], []])
def test_a_command_line_without_it_is_refused(argv: list[str]) -> None:
    with pytest.raises(ValueError, match="does not name"):
        marked(argv, "/var/lib/lxcfs", "/")


@pytest.mark.parametrize(
    ("words", "rest"),
    [
        (["lxcfs", "m"], ["m"]),
        (["lxcfs", "-p", "/run/a", "m"], ["m"]),
        (["lxcfs", "-p/run/a", "-l", "m"], ["-l", "m"]),
        (["lxcfs", "--pidfile=/run/a", "m", "--pidfile", "b"], ["m"]),
        (["lxcfs", "--enable-pidfd", "m"], ["--enable-pidfd", "m"]),
    ],
)
def test_each_lxcfs_has_a_pid_file_of_its_own(words: list[str], rest: list[str]) -> None:
    assert with_pidfile(words, "/run/x") == ["lxcfs", "-p", "/run/x", *rest]


def test_only_lxcfs_has_one() -> None:
    made = Recipe("/usr/bin/sshfs", ("sshfs", "-p", "2222", "h:", MOUNT_WORD))
    assert made.command("/m", "/run/x") == ["sshfs", "-p", "2222", "h:", "/m"]


@pytest.mark.parametrize("uid", [0, 1000])
def test_a_sidecars_command_tells_what_it_was_made_of(uid: int) -> None:
    made = Recipe("/usr/bin/sshfs", ("/usr/bin/sshfs", "-o", "a=b", "h:", MOUNT_WORD), ("A=b=c", "PATH=/bin"), "/srv", uid)
    words = made.sidecar("/run/x")
    assert words[-1] == recipe.SIDECAR_MOUNT and ("setpriv" in words) == bool(uid)
    found = of_sidecar(words)
    assert (found.exe, found.argv, found.environ, found.cwd) == (made.exe, made.argv, made.environ, made.cwd)


@pytest.mark.parametrize("words", [[], ["lxcfs"], ["/usr/bin/env", "-C", "/", "-i"], ["/usr/bin/env", "-i", "x"]])
def test_other_commands_do_not(words: list[str]) -> None:
    with pytest.raises(ValueError):
        of_sidecar(words)


def test_json() -> None:
    made = Recipe("/x", ("x", MOUNT_WORD), ("A=\udcff",), "/", 1, 2, (3, 4), 0o77)
    assert Recipe.from_json(json.loads(json.dumps(made.to_json()))) == made
    with pytest.raises((KeyError, TypeError, ValueError)):
        Recipe.from_json({"exe": "/x"})


def test_another_executable() -> None:
    made = Recipe("/usr/bin/lxcfs", ("lxcfs", "-f", MOUNT_WORD)).with_exe("/opt/lxcfs")
    assert (made.exe, made.argv) == ("/opt/lxcfs", ("lxcfs", "-f", MOUNT_WORD))


def test_options_of_a_guard() -> None:
    words = ["fusecr-guard", "--connection", "7", "--fuse-fd", "3,4", "--log", "/run/sidecar-lxcfs.log"]
    words += ["--", "/usr/bin/env", "--", "x"]
    found, command = rebuild.options(words)
    assert found["--fuse-fd"] == "3,4" and found["--connection"] == "7" and command == ["/usr/bin/env", "--", "x"]


def test_what_is_called_lxcfs_gets_a_pidfile_of_its_own_whatever_its_file_is_called() -> None:
    made = Recipe("/usr/bin/lxcfs", ("lxcfs", "-f", "-p", "/run/lxcfs.pid", MOUNT_WORD)).with_exe("/root/new")
    assert made.command("/m", "/run/x.pid") == ["lxcfs", "-p", "/run/x.pid", "-f", "/m"]
    assert Recipe("/usr/bin/sshfs", ("sshfs", "-p", "22", MOUNT_WORD)).command("/m", "/run/x.pid") == ["sshfs", "-p", "22", "/m"]
