# SPDX-License-Identifier: Apache-2.0
"""Makes the namespaces of a test and stays as long as its standard input is open.

``nsinit.py DIRECTORY [--user BASE]``: a private mount and a new pid namespace, with ``--user`` also a user
namespace (BASE.. of the host is 0..65535 inside). Prints ``{"init": PID}`` when all is there. DIRECTORY/ctl
then is a fusectl mount, in the mount namespace of this process only, and DIRECTORY/exits has a line for each orphan that
ended. A program, as it must be single-threaded.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import stat
import sys
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
PR_SET_PDEATHSIG = 1
IDS = 65536

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), what)


def unshare(flags: int) -> None:
    check(libc.unshare(flags), f"unshare({flags:#x})")


def mount(source: str, target: str, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    check(libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), target)


def fuse_node_for_all(directory: Path) -> None:
    """/dev/fuse is 0600 on some machines; a tmpfs, as DIRECTORY may be on a nodev mount."""
    where = directory / "dev"
    where.mkdir(exist_ok=True)
    mount("tmpfs", str(where), "tmpfs", 0, "mode=0755")
    node = where / "fuse"
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(10, 229))
    os.chmod(node, 0o666)
    mount(str(node), "/dev/fuse", None, MS_BIND)


def map_ids(pid: int, base: int) -> None:
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{name}").write_text(f"0 {base} {IDS}\n")


def new_user_namespace(base: int) -> None:
    """A process cannot map more than itself, so the maps come from one that stayed outside."""
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()
    me = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            os.read(ready_read, 1)
            map_ids(me, base)
            os.write(done_write, b"+")
        finally:
            os._exit(0)
    os.close(done_write)
    unshare(CLONE_NEWUSER)
    os.write(ready_write, b"+")
    if os.read(done_read, 1) != b"+":
        raise OSError(0, "the user namespace was not mapped")
    os.waitpid(child, 0)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def reap(exits: int) -> None:
    """Orphans come to us: how each ended is noted, as nobody else can tell of a daemon."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None:
            return
        name = Path(f"/proc/{found.si_pid}/comm").read_text().strip()
        how = "exit code" if found.si_code == os.CLD_EXITED else "signal"
        os.write(exits, f"{name} (pid {found.si_pid} inside): {how} {found.si_status}\n".encode())
        os.waitpid(found.si_pid, 0)


def unlock_root(shadow: Path) -> None:
    """sshd lets no locked account in, and so is root to nss-systemd where /etc/shadow cannot be read."""
    shadow.write_text("root:*:1::::::\n")
    if os.path.exists("/etc/shadow"):
        mount(str(shadow), "/etc/shadow", None, MS_BIND)


def init(base: int | None, ready: int, exits: int) -> None:
    """Pid 1 of the test."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    mount("proc", "/proc", "proc")
    if base is not None:
        mount("tmpfs", "/run", "tmpfs", 0, "mode=0755")  # /run/sshd has to belong to this namespace's root
        unlock_root(Path("/run/shadow"))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    os.chdir("/")
    os.write(ready, b"+")
    os.close(ready)
    while True:
        signal.sigwait([signal.SIGCHLD])
        reap(exits)


def in_fork(base: int | None, exits: int) -> int:
    """Enter the new namespaces in a child and return the pid of init there, as this pid namespace sees it."""
    ready_read, ready_write = os.pipe()
    pid_read, pid_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if base is not None:
                new_user_namespace(base)
                unshare(CLONE_NEWNS)  # one that the user namespace owns: only there it may mount
                mount("none", "/", None, MS_REC | MS_PRIVATE)
            unshare(CLONE_NEWPID)
            grandchild = os.fork()
            if grandchild == 0:
                init(base, ready_write, exits)
            os.write(pid_write, f"{grandchild}".encode())
            os.close(ready_write)
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.waitpid(grandchild, 0)
        except OSError as error:
            print(f"Error: namespaces: {error}", file=sys.stderr)
        finally:
            os._exit(1)
    os.close(ready_write)
    os.close(pid_write)
    if os.read(ready_read, 1) != b"+":
        raise OSError(0, "the namespaces did not come up")
    return int(os.read(pid_read, 32))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--user", type=int)
    options = parser.parse_args()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    unshare(CLONE_NEWNS)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    (options.directory / "ctl").mkdir(exist_ok=True)
    mount("fusectl", str(options.directory / "ctl"), "fusectl")
    fuse_node_for_all(options.directory)
    # opened here: root of a user namespace could not
    exits = os.open(options.directory / "exits", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    pid = in_fork(options.user, exits)
    print(json.dumps({"init": pid}), flush=True)
    sys.stdin.read()  # until the test ends, however it does
    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
