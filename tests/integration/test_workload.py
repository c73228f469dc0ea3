# SPDX-License-Identifier: Apache-2.0
"""The measuring instruments: no false error on an undisturbed system, none missed on a broken one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from check import append_holes, summary
from clientlib import append_line
from sandbox import Daemon, alive, wait_for

FuseDaemon = Callable[..., Daemon]
KINDS = [
    pytest.param(k, marks=pytest.mark.requires_daemon(k)) for k in ("bindfs", "sshfs", "sshfs_pipe", "memfs", "passthrough_fh")
]
LL = pytest.param("passthrough_ll", marks=pytest.mark.requires_daemon("passthrough_ll"))
FILE_MODES = ("reader", "writer", "append", "dirs", "cwd", "mapper", "bind", "meta", "idle", "unlinked")


@pytest.mark.parametrize("user", [False, True], ids=["root", "userns"])
@pytest.mark.parametrize("kind", [*KINDS, LL])
def test_no_false_errors(fuse_daemon: FuseDaemon, kind: str, user: bool) -> None:
    daemon = fuse_daemon(kind, user=user)
    pace = {"idle": ("--pace-ms", "100")}
    clients = [daemon.client(mode, *pace.get(mode, ()), wait=False) for mode in FILE_MODES]
    for client in clients:
        client.advance(60)
    found = summary([client.stop() for client in clients])
    assert found.clean, found.problems
    assert found.reports == len(FILE_MODES)
    assert alive(daemon.pid) and daemon.connection in daemon.sandbox.connections()  # or it was all on the bare directory
    log = daemon.sandbox.run(["cat", f"{daemon.mountpoint}/append/log"]).stdout
    copy = daemon.sandbox.directory / "copied-log"
    copy.write_text(log)
    assert append_holes(str(copy), clients[2].report()["detail"]["lines"]) == (0, 0, 0)


@pytest.mark.requires_daemon("bindfs")
def test_a_dead_daemon_is_an_error(fuse_daemon: FuseDaemon) -> None:
    """The same clients on a connection that was aborted: every one of them has to say so."""
    daemon = fuse_daemon("bindfs")
    modes = [mode for mode in FILE_MODES if mode not in ("mapper", "bind")]  # mapper gets SIGBUS, bind cannot leave
    clients = [daemon.client(mode, *(["--pace-ms", "20"] if mode == "idle" else [])) for mode in modes]
    assert all(client.report()["errors"] == 0 for client in clients)
    daemon.sandbox.abort(daemon.connection)
    for client in clients:
        wait_for(lambda client=client: client.report()["errors"] > 0, f"an error of {client.mode}")
        assert client.report()["first_errors"], client.mode
    assert not summary([client.stop() for client in clients]).clean


@pytest.mark.requires_daemon("bindfs")
def test_lines_that_the_backing_lost_show(fuse_daemon: FuseDaemon) -> None:
    daemon = fuse_daemon("bindfs")
    client = daemon.client("append")
    client.advance(50)
    lines = client.stop()["detail"]["lines"]
    log = daemon.backing / "append" / "log"
    assert append_holes(str(log), lines) == (0, 0, 0)
    size = len(append_line(0, 0.0))
    os.truncate(log, size * (lines - 3))
    assert append_holes(str(log), lines).holes == 3


@pytest.mark.requires_daemon("memfs")
def test_memfs_is_a_file_system(fuse_daemon: FuseDaemon) -> None:
    """What no client mode does: links, exchange, extended attributes, limits, what rm -rf leaves."""
    daemon = fuse_daemon("memfs", options="size=1M")
    script = """
import ctypes, errno, os, sys
os.chdir(sys.argv[1])
def refused(wanted, call, *arguments, **more):
    try:
        call(*arguments, **more)
    except OSError as error:
        assert error.errno == wanted, error
    else:
        raise AssertionError(f"{call} was not refused with {wanted}")
os.mkdir("d"); os.mkdir("d/e"); open("f", "w").write("text"); os.link("f", "d/g"); os.symlink("d/g", "s")
assert os.stat("f").st_nlink == 2 and open("s").read() == "text" and os.stat(".").st_nlink == 3
os.setxattr("f", "user.a", b"1")
assert os.getxattr("d/g", "user.a") == b"1" and os.listxattr("f") == ["user.a"]
os.removexattr("f", "user.a"); refused(errno.ENODATA, os.getxattr, "f", "user.a")
libc = ctypes.CDLL(None, use_errno=True)
assert libc.renameat2(-100, b"f", -100, b"d", 2) == 0 and os.path.isdir("f") and os.path.isfile("d")
assert libc.renameat2(-100, b"f", -100, b"d", 1) == -1 and ctypes.get_errno() == errno.EEXIST
refused(errno.ENOTEMPTY, os.rmdir, "f"); refused(errno.EISDIR, os.rename, "d", "f")
fd = os.open("d", os.O_RDWR); os.unlink("d"); os.unlink("f/g"); assert os.fstat(fd).st_nlink == 0
os.pwrite(fd, b"more", 100000); assert os.pread(fd, 9, 99998) == b"\\0\\0more"
os.ftruncate(fd, 2); os.close(fd)
open("big", "w").close(); refused(errno.ENOSPC, os.truncate, "big", 1 << 21)
for n in range(3000): open(f"f/{n}", "w").close()
assert sorted(map(int, (n for n in os.listdir("f") if n != "e"))) == list(range(3000))
for n in range(3000): os.unlink(f"f/{n}")
os.rmdir("f/e"); os.rmdir("f"); os.unlink("s"); os.unlink("big"); assert os.listdir(".") == []
used = os.statvfs("."); assert used.f_bfree == used.f_blocks, (used.f_bfree, used.f_blocks)
"""
    done = daemon.sandbox.run([daemon.sandbox.python, "-W", "ignore", "-c", script, str(daemon.mountpoint)])
    assert done.returncode == 0, done.stderr


@pytest.mark.requires_root
@pytest.mark.requires_command("sleep")
@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (
            "import subprocess; subprocess.Popen('sleep 300 & sleep 300 &', shell=True).wait()",
            "left behind: process",
        ),
        ("import os; os.system(f'mount -t tmpfs none {tmp_path}')", "left behind: mount"),
        ("import logging; logging.getLogger('x').warning('surprise')", "unexpected log records"),
        ("expect_log('never said')", "expected and missing"),
    ],
    ids=["process", "mount", "log", "missing-log"],
)
def test_a_test_that_leaves_something_fails(tmp_path: Path, body: str, complaint: str) -> None:
    tests = Path(__file__).resolve().parents[1]
    module = tmp_path / "test_it.py"
    module.write_text(f"def test_it(tmp_path, expect_log):\n    {body}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    # namespaces of its own, so that nothing can be left behind by this test itself
    command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider"]
    command += ["--basetemp", f"{tmp_path}/b", str(module)]
    environment = os.environ | {"PYTHONPATH": str(tests)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert complaint in done.stdout
    assert "1 passed" in done.stdout  # it is the teardown that fails


@pytest.mark.requires_daemon("bindfs")
def test_a_stopped_daemon_is_a_gap_and_no_error(fuse_daemon: FuseDaemon) -> None:
    daemon = fuse_daemon("bindfs")
    clients = [daemon.client(mode, wait=False) for mode in ("writer", "append", "dirs", "meta")]
    for client in clients:
        client.advance(20)
    os.kill(daemon.pid, signal.SIGSTOP)
    before = [client.operations() for client in clients]
    time.sleep(0.8)
    os.kill(daemon.pid, signal.SIGCONT)
    for client, operations in zip(clients, before, strict=True):
        wait_for(lambda c=client, n=operations: c.operations() > n + 20, f"{client.mode} going on")
    found = [client.stop() for client in clients]
    assert summary(found).clean
    assert all(report["longest_gap_ms"] >= 700 for report in found)
