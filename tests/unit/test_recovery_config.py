# SPDX-License-Identifier: Apache-2.0
"""The configuration of protected daemons: its defaults, its drop-ins, and FILE:LINE of whatever is wrong."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from incus_fusecr.recovery import config, ini
from incus_fusecr.recovery.config import Config, ConfigError, Daemon, Limits, Match


def build(text: str) -> Config:
    return config.build(ini.parse("f.conf", text))


def test_lxcfs_is_protected_without_any_file(tmp_path: Path) -> None:
    found = config.load(str(tmp_path / "daemons.conf"), str(tmp_path / "daemons.d"))
    (lxcfs,) = found.daemons
    assert (lxcfs.name, lxcfs.protect, lxcfs.standby, lxcfs.attempts, lxcfs.unserved) == ("lxcfs", True, "warm", 3, "wait")
    assert found.files == ()
    assert found.find(exe="/usr/bin/lxcfs", fstype="fuse.lxcfs", mountpoint="/var/lib/lxcfs") is lxcfs
    assert found.find(exe="/usr/bin/sshfs", fstype="fuse.sshfs", mountpoint="/mnt") is None


def test_every_key() -> None:
    found = build(
        """
        # a comment
        [daemon backup]
        exe = sshfs
        fstype = fuse.sshfs
        mountpoint = /srv/back up
        standby = warm
        restart-burst = 7
        restart-interval = 2min
        backoff = 250ms
        backoff-max = 5
        breaker-failures = 4
        breaker-cooldown = 1h
        attempts = 2
        unserved = fail
        deadline = 1.5 s
        durability = relaxed
        where = everywhere
        instances = web-* db1
        ; another comment
        """
    )
    assert found.get("backup") == Daemon(
        "backup", Match("sshfs", "fuse.sshfs", "/srv/back up"), standby="warm", attempts=2, unserved="fail", deadline=1.5,
        limits=Limits(burst=7, interval=120, backoff=0.25, backoff_max=5, breaker=4, cooldown=3600), durability="relaxed",
        where="everywhere", instances=("web-*", "db1"),
    )
    assert len(config._KEYS) == 17  # a new key belongs into this test


def test_other_daemons_are_cold_and_strict() -> None:
    daemon = build("[daemon x]\nexe=x").get("x")
    assert daemon == Daemon("x", Match("x"), standby="cold", durability="strict", attempts=3, deadline=60)


def test_a_file_changes_single_keys_of_what_is_built_in() -> None:
    lxcfs = build("[daemon lxcfs]\ndeadline = 0\nprotect = no").get("lxcfs")
    assert lxcfs and (lxcfs.deadline, lxcfs.protect, lxcfs.standby, lxcfs.match.fstype) == (0, False, "warm", "fuse.lxcfs")
    assert build("[daemon lxcfs]\nprotect=no").find(exe="lxcfs", fstype="fuse.lxcfs", mountpoint="/") is None


def test_dropins_are_sorted_whatever_the_directory_says(tmp_path: Path) -> None:
    numbers = list(range(10, 50))
    random.Random(3).shuffle(numbers)
    for number in numbers:
        (tmp_path / f"{number}.conf").write_text(f"[daemon x]\nexe = x\nattempts = {number}\n")
    assert ini.files(str(tmp_path / "none"), str(tmp_path)) == [f"{tmp_path}/{number}.conf" for number in range(10, 50)]
    assert (x := config.load(str(tmp_path / "none"), str(tmp_path)).get("x")) and x.attempts == 49


def test_dropins_come_after_the_file_in_sorted_order(tmp_path: Path) -> None:
    main, directory = tmp_path / "daemons.conf", tmp_path / "daemons.d"
    directory.mkdir()
    main.write_text("[daemon x]\nexe = x\ndeadline = 1\nattempts = 1\nstandby = warm\n")
    (directory / "20.conf").write_text("[daemon x]\ndeadline = 3\n")
    (directory / "10.conf").write_text("[daemon x]\ndeadline = 2\nattempts = 2\n[daemon y]\nexe = y\n")
    for name in ("90.conf.dpkg-old", ".99.conf", "README"):
        (directory / name).write_text("rubbish")
    found = config.load(str(main), str(directory))
    x = found.get("x")
    assert x and (x.deadline, x.attempts, x.standby) == (3, 2, "warm")
    assert [d.name for d in found.daemons] == ["lxcfs", "x", "y"]
    assert [os.path.basename(f) for f in found.files] == ["daemons.conf", "10.conf", "20.conf"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[daemon x]\nexe=x\nstandbye = warm", "f.conf:3: unknown key standbye; standby is meant?"),
        ("[daemon x]\nqqq = 1", "f.conf:2: unknown key qqq; known: protect, exe"),
        ("\n[daemon x]\nstandby = hot", "f.conf:3: standby: 'hot' is neither warm nor cold"),
        ("[daemon x]\nexe=x\ndeadline = 5 weeks", "f.conf:3: deadline: '5 weeks' has a unit that is none of ms, s, min, h"),
        ("[daemon x]\ndeadline = soon", "f.conf:2: deadline: 'soon' is no time span"),
        ("[daemon x]\ndeadline = -1s", "f.conf:2: deadline: '-1s' is no time span"),
        ("[daemon x]\ndeadline = 25h", "f.conf:2: deadline: '25h' is longer than a day"),
        ("[daemon x]\nrestart-interval = 0", "f.conf:2: restart-interval: 0 is too short"),
        ("[daemon x]\nattempts = 0", "f.conf:2: attempts: '0' is no number from 1 to 1000"),
        ("[daemon x]\nattempts = ²", "f.conf:2: attempts: '²' is no number"),
        ("[daemon x]\nattempts = 99999999999999999999", "f.conf:2: attempts"),
        ("[daemon x]\nprotect = maybe", "f.conf:2: protect: 'maybe' is neither yes nor no"),
        ("[daemon x]\nexe = /usr/bin/x", "f.conf:2: exe: '/usr/bin/x' is no file name"),
        ("[daemon x]\nfstype = ext4", "f.conf:2: fstype: 'ext4' is no FUSE file system"),
        ("[daemon x]\nmountpoint = srv", "f.conf:2: mountpoint: 'srv' is no absolute path"),
        ("[daemon x]\nmountpoint = /srv/", "f.conf:2: mountpoint: '/srv/' is no absolute path"),
        ("[daemon x]\nexe = x\nexe = y", "f.conf:3: exe is there already, in line 2"),
        ("[daemon x]\nexe = x\n[daemon  x]", "f.conf:3: [daemon x] is there already, in line 1"),
        ("[daemon x]\nexe = x\nbackoff = 20s", "f.conf:3: backoff: backoff-max is shorter than backoff"),
        ("[daemon x]\ndeadline = 1", "f.conf:1: daemon x has none of exe, fstype, mountpoint"),
        ("[daemon x]\nfstype = fuse.lxcfs", "f.conf:1: daemons lxcfs and x have the same match"),
        ("[daemon X!]\nexe = x", "f.conf:1: 'X!' is no name"),
        ("[daemons x]\nexe = x", "f.conf:1: [daemons x]: only sections [daemon NAME] are known"),
        ("[daemon]\nexe = x", "f.conf:1: [daemon]: only sections"),
        ("exe = x", "f.conf:1: exe stands before the first section"),
        ("[daemon x\nexe = x", "f.conf:1: '[daemon x' is no section"),
        ("[daemon x]\nwhere = inside", "f.conf:2: where: 'inside' is neither host nor containers nor everywhere"),
        ("[daemon x]\nexe = x\ninstances = a", "f.conf:3: instances: means nothing without where = containers, or everywhere"),
        ("[daemon x]\ninstances =", "f.conf:2: instances: '' names no instance"),
        ("[daemon x]\ninstances = a/b c", "f.conf:2: instances: 'a/b' is like no instance's name"),
        (
            "[daemon x]\nexe = x\nwhere = containers\n[daemon y]\nexe = x\nwhere = everywhere",
            "f.conf:4: daemons x and y have the same match",
        ),
        ("[daemon x]\n\nnonsense", "f.conf:3: 'nonsense' is neither a section nor KEY = VALUE"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(text)
    assert str(error.value).startswith(message)


def test_the_place_is_of_the_file_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.conf").write_text("[daemon x]\nexe = x\n")
    (tmp_path / "b.conf").write_text("# nothing\n[daemon x]\nbackoff-max = 1ms\n")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/b\.conf:3: backoff-max: "):
        config.load(str(tmp_path / "none"), str(tmp_path))


@pytest.mark.parametrize("kind", ["binary", "directory", "big", "dangling"])
def test_files_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.conf"
    expected = {"binary": "x.conf:2: is not UTF-8", "directory": "x.conf: Is a directory", "big": "x.conf: has more than",
                "dangling": "x.conf: No such file"}[kind]
    if kind == "binary":
        path.write_bytes(b"# x\n\xff\n")
    elif kind == "directory":
        path.mkdir()
    elif kind == "big":
        path.write_bytes(b"#" * (ini.MAX_BYTES + 1))
    else:
        path.symlink_to("nowhere")
    with pytest.raises(ConfigError) as error:
        config.load(str(tmp_path / "none"), str(tmp_path))
    assert expected in str(error.value)


def test_the_most_exact_match_wins_and_a_replaced_binary_fits() -> None:
    found = build("[daemon some]\nfstype=fuse.sshfs\n[daemon this]\nfstype=fuse.sshfs\nmountpoint=/srv\n[daemon exe]\nexe=bindfs")
    one = found.find(exe="/usr/bin/sshfs", fstype="fuse.sshfs", mountpoint="/srv")
    other = found.find(exe="/usr/bin/sshfs", fstype="fuse.sshfs", mountpoint="/mnt")
    assert one and other and (one.name, other.name) == ("this", "some")
    replaced = found.find(exe="/usr/bin/bindfs (deleted)", fstype="fuse", mountpoint="/x")
    assert replaced and replaced.name == "exe"
    assert not Match().fits(exe="x", fstype="fuse", mountpoint="/")


def test_where_a_daemon_is_protected() -> None:
    found = build(
        """
        [daemon sshfs]
        fstype = fuse.sshfs
        [daemon web]
        fstype = fuse.sshfs
        where = containers
        instances = web-* proj_db[12]
        [daemon bindfs]
        exe = bindfs
        where = everywhere
        """
    )

    def name(fstype: str, exe: str, instance: str = "") -> str:
        daemon = found.find(exe=exe, fstype=fstype, mountpoint="/mnt", instance=instance)
        return daemon.name if daemon else ""

    assert [name("fuse.sshfs", "sshfs", where) for where in ("", "web-1", "web", "proj_db2", "proj_db3")] == [
        "sshfs", "web", "", "web", "",
    ]  # fmt: skip
    assert [name("fuse", "/usr/bin/bindfs", where) for where in ("", "anything")] == ["bindfs", "bindfs"]
    assert name("fuse.lxcfs", "lxcfs", "c1") == ""  # one inside of a container is its own affair
