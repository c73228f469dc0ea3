# SPDX-License-Identifier: Apache-2.0
"""What nobody uses is forgotten, by the kernel and by a real daemon; what is in use stays as it is."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sandbox import Daemon, wait_for

from incus_fusecr.checkpoint import scan, trim
from incus_fusecr.fuse import connection
from incus_fusecr.linux import proc
from incus_fusecr.linux.pidfd import pidfd_getfd, pidfd_open
from incus_fusecr.linux.zygote import Zygote

pytestmark = [pytest.mark.requires_root, pytest.mark.requires_fuse, pytest.mark.requires_daemon("passthrough_ll")]

FILES = 300


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


def nodes(daemon: Daemon) -> int:
    """passthrough_ll has an O_PATH descriptor for each node that it remembers, and one more for each open file."""
    found = 0
    for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(link).startswith(str(daemon.backing))
    return found


def walked(daemon: Daemon) -> None:
    """Look up many files."""
    script = f"mkdir -p deep/er && seq -f f%g {FILES} | xargs touch && echo x > deep/er/file && ls -l > /dev/null"
    done = daemon.sandbox.run(["sh", "-c", f"cd {daemon.mountpoint} && {script}"])
    assert done.returncode == 0, done.stderr
    assert nodes(daemon) > FILES


def device(daemon: Daemon, seen: scan.Scan) -> tuple[int, int]:
    return next((p.pid, fd) for p in seen.processes for fd, n in p.devices if n == daemon.connection)


@pytest.mark.parametrize("options", ["", "allow_other"], ids=["own", "allow_other"])
@pytest.mark.parametrize("user", [False, True], ids=["root", "userns"])
def test_the_daemon_remembers_what_is_in_use(
    fuse_daemon: Callable[..., Daemon], zygote: Zygote, user: bool, options: str
) -> None:
    daemon = fuse_daemon("passthrough_ll", user=user, options=options)
    walked(daemon)
    opened = f"cd {daemon.mountpoint}/deep/er && exec 3< file && exec 4>> {daemon.mountpoint}/log && echo ready"
    used = "read go && cat <&3 && pwd -P && echo y >&4"
    client = daemon.sandbox.popen(["sh", "-c", f"{opened} && {used}"], stdin=-1, stdout=-1)
    assert client.stdout and client.stdout.readline() == b"ready\n"
    seen = scan.scan(zygote, daemon.sandbox.init)
    assert [p.pid for p in seen.processes if p.path_fds] == [daemon.pid]
    trim.trim(zygote, seen, daemon.connection, device(daemon, seen))
    # the root, deep, deep/er; file and log twice, for they are open
    wait_for(lambda: nodes(daemon) == 7, "the daemon forgets the rest")
    assert not zygote.hangs(connection.label(daemon.connection))
    output, _ = client.communicate(b"go\n", 20)
    assert output.decode() == f"x\n{daemon.mountpoint}/deep/er\n"
    names = daemon.sandbox.run(["sh", "-c", f"ls {daemon.mountpoint}; cat {daemon.mountpoint}/log"]).stdout.split()
    assert len(names) == FILES + 3 and names[-1] == "y"


def test_a_daemon_that_does_not_read_is_waited_for_only_so_long(
    fuse_daemon: Callable[..., Daemon], zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trim, "READ_SECONDS", 0.1)
    daemon = fuse_daemon("passthrough_ll")
    sandbox = daemon.sandbox
    monkeypatch.setattr(connection, "FUSECTL", f"/proc/{sandbox.process.pid}/root{sandbox.directory}/ctl")
    walked(daemon)
    seen = scan.scan(zygote, sandbox.init)
    where = device(daemon, seen)
    os.kill(daemon.pid, signal.SIGSTOP)
    wait_for(lambda: set(proc.thread_states(daemon.pid)) == {"T"}, "stop of its threads")
    trim.trim(zygote, seen, daemon.connection, where)
    assert nodes(daemon) > FILES
    with pidfd_open(where[0]) as pidfd, pidfd_getfd(pidfd, where[1]) as copy:
        assert connection.unread(copy)
        assert connection.waiting(daemon.connection) == 0  # it does not know of FORGETs
        os.kill(daemon.pid, signal.SIGCONT)
        wait_for(lambda: not connection.unread(copy), "the daemon reads on")
    wait_for(lambda: nodes(daemon) == 1, "the daemon forgets all but the root")
