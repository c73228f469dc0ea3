# SPDX-License-Identifier: Apache-2.0
"""One host: namespaces, overlay root, /dev, pid 1; and running commands in it."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from . import cgroups, linux, systemd
from .errors import LabError
from .state import Host, Lab, start_time

PATH = "/usr/libexec/incus:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SUPERVISOR = "/usr/local/bin/labctl"
DEVICES = (
    ("null", 0o666, 1, 3), ("zero", 0o666, 1, 5), ("full", 0o666, 1, 7), ("random", 0o666, 1, 8),
    ("urandom", 0o666, 1, 9), ("tty", 0o666, 5, 0), ("fuse", 0o666, 10, 229), ("net/tun", 0o666, 10, 200),
    ("kmsg", 0o600, 1, 11), ("loop-control", 0o600, 10, 237),
)
LOOP_NODES = 128
START_TIMEOUT = 30.0


def start(lab: Lab, name: str, address: str, layers: Sequence[str], files: dict[str, tuple[int, str]]) -> Host:
    """Start pid 1 of a host in new namespaces behind an overlay.

    Args:
        lab: the lab it belongs to.
        name: its host name.
        address: its address on the lab's network (recorded only).
        layers: block devices of squashfs images, topmost first.
        files: contents and modes of files put into its root before pid 1 runs.

    Raises:
        LabError: with the step that failed.
    """
    base = lab.host_dir(name)
    for part in ("upper", "work", "root", "incus", "log", *[f"lower{i}" for i in range(len(layers))]):
        (base / part).mkdir(parents=True, exist_ok=True)
    cgroups.create(lab.cgroup, name)
    cgroups.v1_mounts()
    pid_r, pid_w = os.pipe()
    err_r, err_w = os.pipe()
    middle = os.fork()
    if middle == 0:
        _leave(_middle, lab, name, base, layers, files, pid_w, err_w)
    os.close(pid_w)
    os.close(err_w)
    with os.fdopen(pid_r, "rb") as pids, os.fdopen(err_r, "rb") as errors:
        first = pids.read()
        os.waitpid(middle, 0)
        # pid 1 closes the pipe by its exec, or writes what failed
        if not select.select([errors], [], [], START_TIMEOUT)[0]:
            raise LabError(f"start host {name}: pid 1 is not set up after {START_TIMEOUT:g} s")
        why = errors.read().decode(errors="replace")
    pid = int(first or b"0")
    started = start_time(pid) if pid else None
    if why or started is None:
        raise LabError(f"start host {name} failed: {why or 'its pid 1 ended at once'}")
    return Host(name, address, pid, started)


def _leave(function: object, *args: object) -> None:
    """Run a function in a forked child; never return. Its error goes to the last argument, a pipe."""
    err_w = args[-1]
    assert callable(function) and isinstance(err_w, int)
    try:
        function(*args)
    except BaseException as err:
        os.write(err_w, f"{type(err).__name__}: {err}".encode()[:4000])
    os._exit(1)


def _middle(lab: Lab, name: str, base: Path, layers: Sequence[str], files: dict[str, tuple[int, str]],
            pid_w: int, err_w: int) -> None:
    os.setsid()
    cgroups.join(lab.cgroup, name)
    linux.unshare(linux.HOST_NAMESPACES)  # now the cgroup joined above is the root of the cgroup namespace
    pid = os.fork()
    if pid == 0:
        os.close(pid_w)
        _leave(_first, lab, name, base, layers, files, err_w)
    os.write(pid_w, str(pid).encode())
    os._exit(0)


def _first(lab: Lab, name: str, base: Path, layers: Sequence[str], files: dict[str, tuple[int, str]],
           err_w: int) -> None:
    """Build the host's root and become its supervisor."""
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    root = str(base / "root")
    for i, device in enumerate(layers):
        linux.mount(device, str(base / f"lower{i}"), "squashfs", linux.MS_RDONLY)
    lower = ":".join(str(base / f"lower{i}") for i in range(len(layers)))
    linux.mount("overlay", root, "overlay", 0, f"lowerdir={lower},upperdir={base}/upper,workdir={base}/work")
    for path, part in (("var/lib/incus", "incus"), ("var/log", "log")):
        Path(root, path).mkdir(parents=True, exist_ok=True)
        linux.mount(str(base / part), f"{root}/{path}", None, linux.MS_BIND)
    for path in ("var/log/incus", "var/log/fusecr-lab"):
        Path(root, path).mkdir(parents=True, exist_ok=True)
    for path, (mode, text) in files.items():
        target = Path(root, path.lstrip("/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)
    _mounts(root, lab.cgroups)
    _devices(root)
    os.chdir(root)
    Path(root, ".old").mkdir()
    linux.pivot_root(".", ".old")
    linux.umount2("/.old", linux.MNT_DETACH)
    os.rmdir("/.old")
    os.chdir("/")
    socket.sethostname(name)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # as incus.service has it
    null = os.open("/dev/null", os.O_RDWR)
    log = os.open("/var/log/fusecr-lab/init.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for fd, target_fd in ((null, 0), (log, 1), (log, 2)):
        os.dup2(fd, target_fd)
    if lab.systemd(name):
        os.execve(systemd.INIT, systemd.argv(lab), systemd.ENVIRONMENT)
    os.execve(SUPERVISOR, ["labctl", "init", f"fusecr-lab={lab.name}", f"host={name}"], {"PATH": PATH, "HOME": "/root"})


def apparmor() -> bool:
    """True on a kernel with AppArmor enabled."""
    try:
        return Path("/sys/module/apparmor/parameters/enabled").read_text().strip() == "Y"
    except OSError:
        return False


def _cgroups(root: str, kind: str, flags: int) -> None:
    """cgroup2 alone; or the machine's v1 hierarchies, whose controllers containers can use, and cgroup2 beside them."""
    base = f"{root}/sys/fs/cgroup"
    if kind == "v2":
        linux.mount("cgroup2", base, "cgroup2", flags)
        return
    linux.mount("tmpfs", base, "tmpfs", flags, "mode=755")
    os.mkdir(f"{base}/unified")
    linux.mount("cgroup2", f"{base}/unified", "cgroup2", flags)
    for options in cgroups.v1_mounts():
        name = options.removeprefix("name=")
        os.mkdir(f"{base}/{name}")
        linux.mount("cgroup", f"{base}/{name}", "cgroup", flags, f"none,{options}" if "=" in options else options)
        for alias in name.split(",") if "," in name else ():
            os.symlink(name, f"{base}/{alias}")


def _mounts(root: str, cgroup: str) -> None:
    hardened = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    linux.mount("proc", f"{root}/proc", "proc", hardened)
    linux.mount("sysfs", f"{root}/sys", "sysfs", hardened)
    _cgroups(root, cgroup, hardened)
    if os.path.isdir(f"{root}/sys/fs/fuse/connections"):
        linux.mount("fusectl", f"{root}/sys/fs/fuse/connections", "fusectl", hardened)
    if apparmor():  # CRIU looks here for what liblxc tells it to restore
        linux.mount("securityfs", f"{root}/sys/kernel/security", "securityfs", hardened)
    linux.mount("tmpfs", f"{root}/run", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755")
    linux.mount("tmpfs", f"{root}/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=1777")
    linux.mount("tmpfs", f"{root}/dev", "tmpfs", linux.MS_NOSUID, "mode=755")


def _devices(root: str) -> None:
    dev = Path(root, "dev")
    for name in ("pts", "shm", "net", "mqueue"):
        (dev / name).mkdir()
    loops = [(f"loop{i}", 0o600, 7, i) for i in range(LOOP_NODES)]
    for name, mode, major, minor in (*DEVICES, *loops):
        kind = stat.S_IFBLK if major == 7 else stat.S_IFCHR
        os.mknod(dev / name, kind | mode, os.makedev(major, minor))
        os.chmod(dev / name, mode)
    linux.mount("devpts", str(dev / "pts"), "devpts", linux.MS_NOSUID | linux.MS_NOEXEC,
                "newinstance,ptmxmode=0666,mode=620,gid=5")
    linux.mount("tmpfs", str(dev / "shm"), "tmpfs", linux.MS_NOSUID | linux.MS_NODEV)
    for name, target in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"),
                         ("stderr", "fd/2")):
        (dev / name).symlink_to(target)


def enter(lab: Lab, host: Host) -> None:
    """Move the calling process into a host's cgroups and namespaces (its children into the pid namespace)."""
    try:
        pidfd = os.pidfd_open(host.pid)
    except OSError:
        pidfd = -1
    if pidfd < 0 or not host.alive:
        raise LabError(f"host {host.name} of lab {lab.name!r} is not running (its pid 1 was {host.pid}); "
                       "clean up and start again with: lab down; lab up", 125)
    try:
        cgroups.join(lab.cgroup, host.name)
        linux.setns(pidfd, linux.HOST_NAMESPACES)
    except OSError as err:
        raise LabError(f"cannot enter host {host.name}: {err}", 125) from None
    finally:
        os.close(pidfd)


def execute(lab: Lab, host: Host, argv: Sequence[str]) -> int:
    """Run a command in a host with our stdin, stdout and stderr; return its exit code (128 + signal)."""
    me = os.getpid()
    enter(lab, host)
    child = os.fork()
    if child == 0:
        try:
            linux.set_pdeathsig(signal.SIGKILL)  # who kills `lab exec` wants its command gone, too
            env = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "TERM": os.environ.get("TERM", "dumb")}
            os.chdir("/root")
            os.execvpe(argv[0], list(argv), env)
        except OSError as err:
            os.write(2, f"lab: {host.name}: {argv[0]}: {err.strerror}\n".encode())
            os._exit(127 if isinstance(err, FileNotFoundError) else 126)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, lambda got, _frame: os.kill(child, got) if os.getpid() == me else None)
    if os.isatty(0):  # the terminal sends these to the child, too, which is in our process group
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def wait_gone(hosts: Sequence[Host], timeout: float) -> bool:
    """Wait until the pid 1 of all hosts are gone."""
    deadline = time.monotonic() + timeout
    while any(h.alive for h in hosts):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
