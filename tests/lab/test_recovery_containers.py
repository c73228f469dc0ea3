# SPDX-License-Identifier: Apache-2.0
"""Containers of all kinds, and what happens to containers, while lxcfs is killed: nested, frozen, started, restarted, deleted, and
with mounts of their own making on lxcfs' files.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import lxcfs_source
import pytest
from reclab import LAB, NAME, Host, documents, host_of, on, run_killer, wait_for
from test_recovery import nothing_left, pytestmark  # noqa: F401

MEMORY = 192  # MiB
SEED = random.randrange(1000)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with host_of(tmp_path_factory) as made:
        yield made


@pytest.fixture(autouse=True)
def readers(host: Host) -> Iterator[None]:
    before = host.problems()
    yield
    assert [problem for problem in host.problems() if problem not in before] == []


def launch(name: str, *options: str) -> None:
    words = " ".join(f"-c {option}" for option in (f"limits.memory={MEMORY}MiB", "limits.cpu=1", *options))
    on(f"incus launch -q busybox {name} {words} </dev/null; incus file push -q /root/lxreader {name}/root/lxreader")


def sh(name: str, script: str, code: int | None = 0) -> str:
    return on(f"incus exec {name} -- sh -c {shlex.quote(script)}", code=code)


def reader(mode: str, name: str) -> str:
    """The command of a reader with its own report."""
    return f"/root/lxreader {mode} /root/{name}.json /root/stop --mem {MEMORY * 1024} --cpus 1 --detach"


def texts(name: str) -> list[str]:
    """What its readers have noticed; each has worked."""
    reports = documents(sh(name, "for f in /root/*.json; do cat $f; done"))
    assert reports and all(report["operations"] for report in reports)
    return [f"{report['mode']}: {text}" for report in reports for text in report["texts"]]


def killer(count: int) -> subprocess.Popen[bytes]:
    """Kills in the background."""
    command = [str(LAB), "exec", "h1", "--", "/opt/incus-fusecr/bin/python", "/root/killer.py", str(SEED), "--kills", str(count)]
    return subprocess.Popen(command, env={**os.environ, "FUSECR_LAB": NAME}, stdout=subprocess.PIPE)


def ended(process: subprocess.Popen[bytes], count: int) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and json.loads(output)["kills"] == count


def test_a_nested_mount_namespace_of_its_own_user_namespace(host: Host) -> None:
    """Its lxcfs mounts are locked there: the fresh ones go on top."""
    launch("nested", "security.nesting=true")
    inner = "; ".join(reader(mode, f"inner-{mode}") for mode in ("loop", "held", "cwd"))
    sh("nested", f"unshare -U -r -m sh -c {shlex.quote(f'mkdir -p /root/m; mount --bind /root /root/m; {inner}')}")
    sh("nested", reader("loop", "outer"))
    run_killer(SEED, "--kills", "15", seconds=90)
    host.settled()
    assert texts("nested") == []

    def current() -> bool:
        pid = sh("nested", "pidof lxreader").split()[-1]
        rows = [line.split() for line in sh("nested", f"cat /proc/{pid}/mountinfo").splitlines() if " fuse.lxcfs " in line]
        tops = {row[2] for row in rows if row[0] not in {other[1] for other in rows}}
        return tops == {f"0:{host.unit()['connection']}"}

    wait_for("the inner one has the current connection", current, 40)
    on("incus delete -f nested")


def test_a_frozen_container(host: Host) -> None:
    launch("frozen")
    for mode in ("loop", "held", "cwd", "dirs"):
        sh("frozen", reader(mode, mode))
    wait_for("work", lambda: sh("frozen", "ls /root/*.json | wc -l") == "4")
    on("incus pause frozen")
    run_killer(SEED, "--kills", "10", seconds=60)
    wait_for("its mounts", lambda: host.devices_of_init("frozen") == {host.unit()["connection"]}, 40)
    on("incus resume frozen 2>/dev/null || incus start frozen")
    before = len(texts("frozen"))
    run_killer(SEED, "--kills", "5", seconds=60)
    assert before == 0 and texts("frozen") == []
    on("incus pause frozen; incus delete -f frozen")


def left_alone(table: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """A mount that is covered stays on its connection; whoever it received from may end with the host's mount of that time."""
    return sorted(tuple(word for word in row if (row[0], word) != ("/proc/meminfo", "master")) for row in table)


def test_what_its_root_has_done_to_the_files_stays(host: Host) -> None:
    """Mounted over one, unmounted another, bound a third elsewhere."""
    launch("odd", "security.privileged=true")
    sh("odd", "echo mine > /root/mine; mount --bind /root/mine /proc/meminfo; umount /proc/uptime")
    sh("odd", "touch /root/swaps; mount --bind /proc/swaps /root/swaps; mount -o remount,bind,ro /root/swaps")
    table = host.table("odd")
    places = {row[0] for row in table if row[-1] == "fuse.lxcfs"}
    assert "/root/swaps" in places and "/proc/uptime" not in places
    run_killer(SEED, "--kills", "10", seconds=60)
    host.settled()
    assert left_alone(host.table("odd")) == left_alone(table) and sh("odd", "cat /proc/meminfo") == "mine"
    assert sh("odd", "head -c 8 /root/swaps") == "Filename"
    # under what it mounted, the file is that of a dead connection for as long as it likes; nobody sees it
    sh("odd", "umount /proc/meminfo")
    wait_for("the file below", lambda: "MemTotal:" in sh("odd", "head -n 1 /proc/meminfo"), 40)
    on("incus delete -f odd")


def test_started_restarted_stopped_and_deleted_during_kills(host: Host) -> None:
    run_killer(SEED, "--kills", "1", seconds=30)  # the program is there
    count = 60
    background = killer(count)
    try:
        for _ in range(2):
            launch("brief", "security.idmap.isolated=true")
            stop = "incus stop -f brief; incus start brief"
            for step in ("true", "incus restart -f brief", stop, "incus pause brief; incus resume brief"):
                on(step)
                assert sh("brief", "head -n 1 /proc/meminfo").split()[1] == str(MEMORY * 1024), step
            on("incus delete -f brief")
    finally:
        ended(background, count)
    host.settled()
    host.calm()


PREPARE = r"""
printf '#!/bin/sh\nexec grep -q " $2 " /proc/self/mounts\n' > /usr/bin/mountpoint
printf '#!/bin/sh\ncat /proc/sys/kernel/random/uuid\n' > /usr/bin/uuidgen
chmod 755 /usr/bin/mountpoint /usr/bin/uuidgen
mount -t tmpfs none /sys/fs/cgroup
for c in memory cpuset freezer; do mkdir /sys/fs/cgroup/$c; mount -t cgroup -o $c cgroup /sys/fs/cgroup/$c; done
"""


def test_its_own_tests_before_and_after_kills(host: Host, tmp_path: Path) -> None:
    """In a container with all of lxcfs on /var/lib/lxcfs, by way of a disk device."""
    try:
        tests = lxcfs_source.fetch(tmp_path)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"needs the source package lxcfs: {error}")
    # without a limit of processors: test_proc wants to set one to processor 0
    on("incus launch -q busybox own -c security.privileged=true </dev/null")
    on("incus config device add own lxcfs disk source=/var/lib/lxcfs path=/var/lib/lxcfs")
    sh("own", "mkdir -p /root/lxcfs/tests")
    for path in tests.iterdir():
        on(f"incus file push -q --mode 755 - own/root/lxcfs/tests/{path.name}", stdin=path.read_bytes())
    sh("own", PREPARE)
    said = {}
    for kills in (0, 5, 5):
        if kills:
            run_killer(SEED, "--kills", str(kills), seconds=60)
            host.settled()
        for name in lxcfs_source.SCRIPTS:

            def passes(name: str = name) -> bool:
                """test_proc wants to see an uptime below a second: too much for a machine that has other things to do."""
                script = f"unshare -f -m -p --mount-proc sh /root/lxcfs/tests/{name} 2>&1; echo code $?"
                said[name] = sh("own", script)
                return said[name].endswith("code 0") and "Testing" in said[name]

            assert passes() or passes() or passes(), f"{name} after {kills} kills: {said[name]}"
    on("incus delete -f own")
