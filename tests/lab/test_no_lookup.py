# SPDX-License-Identifier: Apache-2.0
"""A daemon that goes on after a dump is told to forget and to close only what it gave: nobody may look up or open below its
mount meanwhile. libfuse aborts a daemon that is told more (lib/fuse.c, forget_node() and fuse_do_release()).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from conftest import AGENT_LOG
from fusecontainer import Container, sh, wait_for

pytestmark = pytest.mark.requires_root

COUNTED = {"LOOKUP", "OPEN", "OPENDIR", "CREATE", "MKNOD", "LINK", "READDIRPLUS"}
# No validity: every step of a walk is a LOOKUP at once, not only in a dump that takes longer than a second.
# By the unit of each; the other one has libfuse's default.
BINDFS = {
    "none": "bindfs -f -o entry_timeout=0,attr_timeout=0 /back/none /none",
    "short": "bindfs -f /back/short /short",
}
# An open file, a working directory, a program and its mapping: all that has a path.
PLACES = "cd {0}/d/e; exec ./prog 100000 >{0}/d/$(printf open\\\\377) <{0}/d/e"
# Below a bind mount of a part, the same of it in a mount namespace of its own.
BOUND = "mount --bind {0}/d/e /bound; exec /bound/prog 100000 </bound/in"
# fsopen(2): CRIU 4.2 knows no such descriptor. The youngest task is dumped last, after the files of the others.
UNDUMPABLE = "import ctypes, time; assert ctypes.CDLL(None).syscall(430, b'tmpfs', 0) > 0; time.sleep(1e6)"


@pytest.fixture
def used(debian: Callable[..., Container], request: pytest.FixtureRequest) -> Iterator[Container]:
    """Two bindfs, and tasks with every kind of path into both."""
    # A name for each test: Incus may still be deleting the last one's container.
    box = debian(f"nolookup-{len(request.node.name)}")
    box.sh("mkdir -p /none /short /bound /back/none/d/e /back/short/d/e")
    box.sh("for d in /back/*; do cp /bin/sleep $d/d/e/prog; echo data > $d/d/e/in; done")
    for unit, command in BINDFS.items():
        box.run("systemd-run", "-q", "--collect", "--unit", unit, *command.split())
        wait_for("the mount", partial(box.sh, f"mountpoint -q /{unit} && echo yes", None))
    for number, mount in enumerate(("/none", "/short")):
        box.run("systemd-run", "-q", "--collect", "--unit", f"use{number}", "sh", "-c", PLACES.format(mount))
        private = ["-p", "PrivateMounts=yes", "sh", "-c", BOUND.format(mount)]
        box.run("systemd-run", "-q", "--collect", "--unit", f"bound{number}", *private)
    wait_for("the users", lambda: box.sh("pgrep -c prog", code=None) == "4")
    yield box
    box.sh("systemctl stop use0 use1 bound0 bound1 bad; umount /none; umount /short; rm -rf /back", code=None)


def answered(box: Container) -> list[dict[str, dict[str, int]]]:
    """What stand-ins of this container answered, by connection, for each dump."""
    found = re.findall(rf" {box.name}: \S+ ?\S*; frozen .* answered (.*)", sh(box.host, f"cat {AGENT_LOG}"))
    return [ast.literal_eval(text) for text in found]


def pids(box: Container) -> list[str]:
    return [box.sh(f"systemctl show -P MainPID {unit}") for unit in BINDFS]


def forget_all(box: Container) -> None:
    """Make the kernel send every FORGET and RELEASE that it owes, and wait until the daemons have had them."""
    box.sh("systemctl stop use0 use1 bound0 bound1 bad", code=None)
    sh(box.host, "sync; echo 2 > /proc/sys/vm/drop_caches")
    box.sh("rm -r /none/d /short/d; ls /none /short")
    sh(box.host, "echo 2 > /proc/sys/vm/drop_caches")
    box.sh("ls -la /none /short; touch /none/new /short/new; rm /none/new /short/new")


def judge(box: Container, before: list[str], dumps: int) -> None:
    done = answered(box)[dumps:]
    assert len(done) == 1 and len(done[0]) == 2, done
    # CRIU asks for it with each open file: the stand-ins were there
    assert all(counts.get("STATFS") for counts in done[0].values()), done
    assert not [set(counts) & COUNTED for counts in done[0].values() if set(counts) & COUNTED], done
    forget_all(box)
    assert pids(box) == before, box.sh("journalctl --no-pager -n 20 -u none -u short", code=None)


def test_after_a_snapshot(used: Container) -> None:
    before, dumps = pids(used), len(answered(used))
    used.incus("snapshot create --stateful", used.name, "still")
    judge(used, before, dumps)


def test_after_a_stop_that_failed(used: Container) -> None:
    used.run("systemd-run", "-q", "--collect", "--unit", "bad", "python3", "-c", UNDUMPABLE)
    wait_for("its descriptor", lambda: used.sh("ls -l /proc/$(systemctl show -P MainPID bad)/fd | grep fscontext", None))
    before, dumps = pids(used), len(answered(used))
    used.incus("stop --stateful", used.name, code=1)
    assert used.status() == "RUNNING"
    judge(used, before, dumps)
