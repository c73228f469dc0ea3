# SPDX-License-Identifier: Apache-2.0
"""Daemons of containers: which they are, what is remembered of them, and who has to leave them alone."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from incus_fusecr.errors import FusecrError, Refused
from incus_fusecr.fuse.probe_facts import Daemon, fuse_mounts
from incus_fusecr.linux.caps import CapSets
from incus_fusecr.linux.mount import Mount
from incus_fusecr.recovery import control, facts, recipe, seek
from incus_fusecr.recovery.containers import Aside, key_of
from incus_fusecr.recovery.events import EventLog
from incus_fusecr.recovery.facts import Facts, unfit_words
from incus_fusecr.recovery.recipe import Recipe

DAEMON = Daemon(
    pid=7, command="sshfs h: /m", argv=[b"sshfs", b"h:", b"/m\xff"], environ=[b"A=b", b"PWD=/"], exe="/usr/bin/sshfs",
    namespaces=1 << 29, mapped=True, uids=(1, 2, 3), gids=(4, 5, 6), groups=[7], umask=0o27, no_new_privs=True,
    caps=CapSets(1, 2, 3, 4, 5), label="", filters=[b"\x00\x01" * 500], limits=[(7, 1024, -1)], cgroups=["/sys/fs/cgroup/x"],
    connections=frozenset({3, 9}), device_fds=[4], directories=[b"/root", b"/"], oom_score_adj=-5,
)  # fmt: skip


def test_facts_come_back_as_they_were(tmp_path: Path) -> None:
    made = Facts(DAEMON, "proj_c1", (12, 34567), "/mnt/\udcff", "ssh.fs", True)
    path = str(tmp_path / "facts.json")
    made.save(path)
    assert facts.load(path) == made
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600 and os.listdir(tmp_path) == ["facts.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"daemon": {}}'])
def test_what_is_none_of_ours_is_an_error_of_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(text)
    with pytest.raises(OSError, match="no facts of ours"):
        facts.userns(str(path))


def test_only_who_needs_it_is_told_that_it_covers_something() -> None:
    init = (os.getpid(), 0)
    assert Facts(dataclasses.replace(DAEMON, cgroups=[]), "c", init, "/m", "x", True).fresh().argv[-2:] == [b"-o", b"nonempty"]
    assert Facts(dataclasses.replace(DAEMON, cgroups=[]), "c", init, "/m", "x").fresh().argv == DAEMON.argv


@pytest.mark.parametrize(
    ("argv", "directory", "why"),
    [
        ([b"sshfs", b"h:", b"/mnt/a"], b"/", ""),
        ([b"bindfs", b"/srv", b"a"], b"/mnt", ""),
        ([b"bindfs", b"-o", b"allow_other", b"/mnt/ab", b"/mnt/a"], b"/", ""),
        ([b"bindfs", b"/mnt/a", b"/mnt/a"], b"/", "below its own mount"),
        ([b"bindfs", b"/mnt/a/b/../c", b"/mnt/a"], b"/", "below its own mount"),
        ([b"bindfs", b"a", b"a"], b"/mnt", "below its own mount"),
        ([b"sshfs", b"-oauto_unmount", b"h:", b"/mnt/a"], b"/", "auto_unmount"),
    ],
)
def test_whom_no_copy_could_replace(argv: list[bytes], directory: bytes, why: str) -> None:
    found = unfit_words(argv, "/mnt/a", [directory])
    assert why in found and bool(why) == bool(found)


def test_the_instance_of_a_process() -> None:
    assert seek.name_of("1:name=systemd:/lxc.payload.c1/init.scope\n0::/lxc.payload.c1\n") == "c1"
    assert seek.name_of("0::/lxc.payload.proj_web-1/system.slice/x.service\n") == "proj_web-1"
    assert seek.name_of("0::/user.slice\n") is None and seek.name_of("") is None


def test_a_bind_mount_is_not_where_a_daemon_has_mounted() -> None:
    def at(number: int, place: str) -> Mount:
        return Mount(number, 1, 0, 5, "/", place, "rw", (), "fuse.x", "x", "rw")

    assert seek.its_own([at(9, "/mnt/a"), at(3, "/bound")], ["x", "/srv", "/mnt/a/"]).mountpoint == "/mnt/a"
    assert seek.its_own([at(9, "/mnt/a"), at(3, "/bound")], ["x", "a"]).mountpoint == "/bound"  # the first one


def test_names_of_units_fit_the_holder() -> None:
    assert key_of("sshfs", "c1", "/mnt") != key_of("sshfs", "c1", "/mnt2") != key_of("sshfs", "c2", "/mnt2")
    long = key_of("d" * 64, "Proj_" + "x" * 63, "/\udcff" * 2000)
    assert len(f"unit-{long}") <= 100 and set(long) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")


def test_a_copy_sees_nothing_that_is_mounted_at_the_daemons_place() -> None:
    table = (
        b"30 1 0:5 / /mnt/a rw - fuse.x x rw\n31 30 0:6 / /mnt/a rw - fuse.x x rw\n"
        b"32 1 0:5 /d /bound rw - fuse.x x rw\n33 1 0:7 / /mnt/b rw - fuse.x x rw\n34 1 0:8 / /mnt/a rw - tmpfs x rw\n"
    )
    assert fuse_mounts(table, frozenset({5})) == ["/bound", "/mnt/a"]
    assert fuse_mounts(table, frozenset({5}), "/mnt/a") == ["/bound", "/mnt/a", "/mnt/a"]


def test_a_guards_command_tells_the_facts() -> None:
    words = Recipe("/usr/bin/sshfs", (), facts="/run/incus-fusecr/facts-x.json").sidecar("/run/x.pid", 41)
    assert words[-2:] == ["41", "@FD@"]
    assert recipe.of_sidecar(words).facts == "/run/incus-fusecr/facts-x.json"
    assert Recipe.from_json(Recipe("e", ("a",), facts="f").to_json()).facts == "f"
    assert Recipe.from_json({**Recipe("e", ("a",)).to_json()}).facts == ""


class TestAside:
    def test_somebody_else_may_hold_it_still(self) -> None:
        aside, released, changed = Aside(), list[int](), list[str]()
        aside.release, aside.changed = released.append, lambda: changed.append("")
        first, second = aside.leave(5), aside.leave(5)
        assert 5 in aside and 6 not in aside and released == [5, 5]
        first()
        assert 5 in aside
        second()
        assert 5 not in aside and len(changed) == 2

    @pytest.mark.parametrize(("error", "seen"), [(Refused("x", "y"), Refused), (TimeoutError("late"), FusecrError)])
    def test_who_cannot_leave_it_has_not_left_it(self, error: Exception, seen: type[Exception]) -> None:
        aside = Aside()

        def refuse(_init: int) -> None:
            raise error

        aside.release = refuse
        with pytest.raises(seen):
            aside.leave(5)
        assert 5 not in aside

    def test_without_anybody_inside(self) -> None:
        aside = Aside()
        aside.leave(5)()
        assert aside.outside(5) == []


class Some:
    """A supervisor on paper."""

    def __init__(self, *names: str) -> None:
        self.units = dict.fromkeys(names)
        self.said: list[str] = []

    def call(self, work: Any) -> Any:
        return work()

    def status(self) -> dict[str, Any]:
        return {"units": [{"name": name} for name in self.units], "holder_restarts": len(self.units)}

    def protect(self, name: str) -> dict[str, Any]:
        self.said.append(f"protect {name}")
        return {"units": [{"name": each} for each in self.units]}

    def unprotect(self, name: str) -> dict[str, Any]:
        self.said.append(f"unprotect {name}")
        return {"kept": []}

    def upgrade(self, name: str, exe: str, watch: float) -> dict[str, Any]:
        self.said.append(f"upgrade {name} {exe} {watch}")
        return {}


def test_each_daemon_is_asked_of_who_has_it(tmp_path: Path) -> None:
    host, inside = Some("lxcfs"), Some("sshfs.c1.0")
    log = EventLog(str(tmp_path / "events"))
    pair: Any = (host, [inside])
    server: Any = control.Server(pair[0], log, str(tmp_path / "sock"), pair[1])
    try:
        status = server._do({"op": "status"})
        assert [unit["name"] for unit in status["units"]] == ["lxcfs", "sshfs.c1.0"] and status["holder_restarts"] == 1
        server._do({"op": "unprotect", "name": "sshfs.c1.0"})
        server._do({"op": "upgrade", "name": "sshfs.c1.0", "exec": "/x", "watch": 3})
        server._do({"op": "protect", "name": "sshfs.c1.0"})
        server._do({"op": "protect"})
        server._do({"op": "unprotect", "name": "nobody's"})
        assert inside.said == ["unprotect sshfs.c1.0", "upgrade sshfs.c1.0 /x 3.0", "protect sshfs.c1.0", "protect "]
        assert host.said == ["protect ", "unprotect nobody's"]
    finally:
        server.close()
        log.close()
