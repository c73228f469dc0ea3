# SPDX-License-Identifier: Apache-2.0
"""Who serves a connection, and how it ended."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_fuse import mount

from incus_fusecr.linux.mount import MNT_DETACH, umount2
from incus_fusecr.linux.pidfd import wait_exit
from incus_fusecr.recovery.link import Process, hold, servers

pytestmark = [pytest.mark.requires_root, pytest.mark.requires_fuse]


class Held:
    """A mount whose device two processes have: a daemon, and a child of it."""

    def __init__(self, where: Path) -> None:
        self.where, self.mounted = str(where), True
        device = mount(self.where)
        # of the mount table: a stat would ask the daemon
        (line,) = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {where} " in line]
        self.number = int(line[2].split(":")[1])
        ready_r, ready_w = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            child = os.fork()
            if child == 0:
                signal.pause()
            os.write(ready_w, b"%d" % child)
            os.waitpid(child, 0)
            os._exit(0)
        os.close(device)
        os.close(ready_w)
        self.child = int(os.read(ready_r, 20))
        os.close(ready_r)

    def unmount(self) -> None:
        if self.mounted:
            umount2(self.where, MNT_DETACH)
        self.mounted = False


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    made = Held(tmp_path)
    yield made
    for pid in (made.child, made.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    made.unmount()
    for pid in (made.child, made.pid):
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            continue


def test_the_eldest_serves_and_who_has_a_dead_one_does_not(held: Held) -> None:
    assert servers()[held.number] == held.pid
    process, fds = hold(held.pid, held.number)
    for fd in fds:
        fd.close()
    process.close()
    held.unmount()
    assert held.pid not in servers().values() and held.child not in servers().values()
    with pytest.raises(ProcessLookupError):
        hold(held.pid, held.number)


@pytest.mark.parametrize(
    ("how", "words", "told"),
    ((signal.SIGKILL, "killed by SIGKILL", True), (signal.SIGSEGV, "killed by SIGSEGV", False), (0, "exit code 0", True),
     (3, "exit code 3", False)),
)  # fmt: skip
@pytest.mark.parametrize("waited", (False, True))
def test_how_a_process_ended_is_known_to_who_is_no_parent(how: int, words: str, told: bool, waited: bool) -> None:
    go_r, go_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(go_r, 1)
        if isinstance(how, signal.Signals):
            faulthandler.disable()
            os.kill(os.getpid(), how)
        os._exit(how)
    process = Process.of(pid)
    os.write(go_w, b"!")
    os.close(go_r)
    os.close(go_w)
    assert process.pidfd is not None and wait_exit(process.pidfd, 5)
    if waited:
        os.waitpid(pid, 0)
    assert not process.alive()
    assert (process.end, process.told_to_end) == (words, told)
    if not waited:
        os.waitpid(pid, 0)
