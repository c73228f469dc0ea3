#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Starts and stops the unmodified FUSE daemons that the tests, the demo and the benchmark carry around.

``daemons.py start KIND MOUNTPOINT [--backing DIR] [--state DIR] [-o OPTIONS]`` returns when the mount
answers and prints JSON (``kind``, ``mountpoint``, ``pid`` of the process with the /dev/fuse fd, ``pids`` of
all, ``device``); ``daemons.py stop --state DIR`` unmounts and ends them; ``daemons.py missing KIND`` says
what is not installed; ``daemons.py build PROGRAM OUTPUT`` compiles one of libfuse's own examples as a static
binary, which runs in any container. Kinds:

============== ======================================================================================
bindfs         libfuse of the distribution, high-level
sshfs          with its server in the same container: a real sshd on 127.0.0.1, key authentication
sshfs_pipe     the same with one sshd (``-i``) at the other end of a pipe: no internet socket
memfs          examples/memfs.py (pyfuse3), has no backing directory
passthrough_ll libfuse's example: multi-threaded, node ids are pointers, inodes keyed by st_dev and st_ino
passthrough_fh libfuse's example: multi-threaded, high-level, file handle is an fd
============== ======================================================================================

Stdlib only, one file (memfs.py and the compiled examples are looked for beside it, then where the repository
has them), so that it can be pushed into a container. Needs root (of a user namespace at least).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EXAMPLES = Path("/usr/share/doc/libfuse3-dev/examples")
PROGRAMS = ("passthrough_ll", "passthrough_fh")
HAVE = ("-DHAVE_UTIMENSAT", "-DHAVE_SETXATTR", "-DHAVE_FSTATAT")  # what libfuse's own build finds out
SFTP_SERVER = "/usr/lib/openssh/sftp-server"


class DaemonError(Exception):
    """What could not be started or stopped, and why."""


def find(name: str, *places: Path) -> Path | None:
    return next((place / name for place in (HERE, *places) if (place / name).exists()), None)


def python_with_pyfuse3() -> str | None:
    """An interpreter that has pyfuse3: this one, else the distribution's."""
    for python in (sys.executable, "/usr/bin/python3"):
        command = [python, "-c", "import pyfuse3, trio"]
        if os.path.exists(python) and subprocess.run(command, capture_output=True).returncode == 0:
            return python
    return None


def program(name: str) -> Path | None:
    """A compiled example: beside this file, or in $PATH."""
    found = find(name)
    on_path = shutil.which(name)
    return found or (Path(on_path) if on_path else None)


def missing(kind: str) -> list[str]:
    """What KIND needs and this machine lacks, each with the Debian package that has it."""
    ssh = {"sshfs": "sshfs", "sshd": "openssh-server", "ssh-keygen": "openssh-client"}
    commands = {"bindfs": {"bindfs": "bindfs"}, "sshfs": ssh, "sshfs_pipe": ssh}.get(kind, {})
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lacks = [f"command {c} (package {p})" for c, p in commands.items() if not shutil.which(c, path=path)]
    if kind in ("sshfs", "sshfs_pipe") and not os.path.exists(SFTP_SERVER):
        lacks.append(f"{SFTP_SERVER} (package openssh-sftp-server)")
    if kind == "memfs" and python_with_pyfuse3() is None:
        lacks.append("Python module pyfuse3 (package python3-pyfuse3)")
    if kind in PROGRAMS and program(kind) is None:
        lacks.append(f"compiled {kind} ({sys.argv[0]} build {kind})")
    if not os.path.exists("/dev/fuse"):
        lacks.append("/dev/fuse")
    return lacks


def build(name: str, output: Path) -> None:
    """Compile an example that libfuse3-dev ships, statically.

    :raises DaemonError: with the compiler's output
    """
    source = EXAMPLES / f"{name}.c"
    if not source.exists():
        raise DaemonError(f"build of {name}: no {source} (package libfuse3-dev)")
    flags = run(["pkg-config", "--static", "--cflags", "--libs", "fuse3"], "flags of libfuse3").split()
    # the linker warns of getpwnam() and dlopen() in a static libfuse; only outside modules need them
    command = ["gcc", "-O2", *HAVE, "-static", "-o", str(output), str(source), *flags]
    run(command, f"build of {name}", timeout=120)


def run(command: Sequence[str], what: str, timeout: float = 30) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DaemonError(f"{what}: {error}") from None
    if done.returncode:
        raise DaemonError(f"{what}: {' '.join(command)}: rc {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout


# -- one function a kind: what to run for the mount (and what before it)

Launch = Callable[[Sequence[str], str], int]  # command, name of the log -> pid


def bindfs(backing: Path, mountpoint: Path, state: Path, options: list[str], launch: Launch) -> list[str]:
    return ["bindfs", "-f", *options, str(backing), str(mountpoint)]


def memfs(backing: Path, mountpoint: Path, state: Path, options: list[str], launch: Launch) -> list[str]:
    script = find("memfs.py", HERE.parent.parent / "examples")
    if script is None:
        raise DaemonError(f"memfs: no memfs.py beside {__file__}")
    return [python_with_pyfuse3() or sys.executable, str(script), str(mountpoint), *options]


def passthrough_ll(backing: Path, mountpoint: Path, state: Path, options: list[str], launch: Launch) -> list[str]:
    return [str(program("passthrough_ll")), "-f", "-o", f"source={backing}", *options, str(mountpoint)]


def passthrough_fh(backing: Path, mountpoint: Path, state: Path, options: list[str], launch: Launch) -> list[str]:
    subdir = ["-o", f"modules=subdir,subdir={backing}"]
    return [str(program("passthrough_fh")), "-f", *subdir, *options, str(mountpoint)]


def sshfs(backing: Path, mountpoint: Path, state: Path, options: list[str], launch: Launch) -> list[str]:
    port = free_port()
    sshd = sshd_command(state, f"[127.0.0.1]:{port}", f"Port {port}\nListenAddress 127.0.0.1\n")
    launch([*sshd, "-D", "-e"], "sshd")
    until(lambda: listening(port), f"sshd on 127.0.0.1:{port}", 10, state / "sshd.log")
    return sshfs_command(state, backing, mountpoint, {"Port": str(port)}, options)


def sshfs_pipe(backing: Path, mountpoint: Path, state: Path, options: list[str], launch: Launch) -> list[str]:
    sshd = sshd_command(state, "127.0.0.1", "")
    proxy = {"ProxyCommand": " ".join([*sshd, "-i", "-e"])}  # -e: its messages go to the log of sshfs
    return sshfs_command(state, backing, mountpoint, proxy, options)


def sshd_command(state: Path, host: str, listen: str) -> list[str]:
    """Make the keys and the configuration; returns the server's command."""
    for key in ("host_key", "user_key"):
        if not (state / key).exists():
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(state / key)], "ssh-keygen")
    (state / "authorized_keys").write_text((state / "user_key.pub").read_text())
    host_key = " ".join((state / "host_key.pub").read_text().split()[:2])
    (state / "known_hosts").write_text(f"{host} {host_key}\n")
    (state / "sshd_config").write_text(
        f"{listen}HostKey {state}/host_key\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {state}/authorized_keys\nStrictModes no\nPermitRootLogin prohibit-password\n"
        f"PasswordAuthentication no\nSubsystem sftp {SFTP_SERVER}\n"
    )
    os.makedirs("/run/sshd", exist_ok=True)  # where sshd's unprivileged child is locked in
    # by its full path, as it executes itself again
    return [shutil.which("sshd") or "/usr/sbin/sshd", "-f", f"{state}/sshd_config"]


def sshfs_command(state: Path, backing: Path, mountpoint: Path, more: dict[str, str], options: list[str]) -> list[str]:
    given = more | {
        "IdentityFile": f"{state}/user_key",
        "UserKnownHostsFile": f"{state}/known_hosts",
        "StrictHostKeyChecking": "yes",
        "PasswordAuthentication": "no",
    }
    ssh = [word for key, value in given.items() for word in ("-o", f"{key}={value}")]
    return ["sshfs", "-f", "-F", "/dev/null", *ssh, *options, f"root@127.0.0.1:{backing}", str(mountpoint)]


KINDS = {
    "bindfs": bindfs,
    "sshfs": sshfs,
    "sshfs_pipe": sshfs_pipe,
    "memfs": memfs,
    "passthrough_ll": passthrough_ll,
    "passthrough_fh": passthrough_fh,
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def until(holds: Callable[[], bool], what: str, timeout: float, log: Path) -> None:
    """Wait for a condition. :raises DaemonError: not within timeout seconds; with the log's end"""
    deadline = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-600:].strip() if log.exists() else "no log"
            raise DaemonError(f"{what}: not there after {timeout:g} s: {tail}")
        time.sleep(0.02)


def fuse_device(mountpoint: Path) -> str | None:
    """``MAJOR:MINOR`` of the topmost mount there, from mountinfo (no path of the mount is touched)."""
    wanted = str(mountpoint).replace("\\", "\\134").replace(" ", "\\040")
    found = None
    with open("/proc/self/mountinfo") as file:
        for line in file:
            fields = line.split()
            if fields[4] == wanted:
                kind = fields[fields.index("-") + 1]
                found = fields[2] if kind == "fuse" or kind.startswith("fuse.") else None
    return found


def answers(mountpoint: Path, timeout: float) -> bool:
    """Whether somebody answers there; asked by a child, which may hang."""
    command = ["stat", "-c", "%s", str(mountpoint)]  # of what the format does not name the kernel asks nothing
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return child.wait(timeout) == 0
    except subprocess.TimeoutExpired:
        child.kill()
        return False


def start(kind: str, mountpoint: Path, backing: Path, state: Path, options: str = "", timeout: float = 15) -> dict[str, Any]:
    """Start a daemon in the background and wait until its mount answers.

    :param options: for the daemon's ``-o``, separated by commas
    :param timeout: seconds
    :returns: what the command line prints
    :raises DaemonError: something is missing, or the mount did not come
    """
    lacks = missing(kind)
    if lacks:
        raise DaemonError(f"start of {kind}: missing: {', '.join(lacks)}")
    mountpoint, backing, state = (Path(os.path.abspath(p)) for p in (mountpoint, backing, state))
    for directory in (mountpoint, backing, state):
        directory.mkdir(parents=True, exist_ok=True)
    started: list[subprocess.Popen[bytes]] = []

    def launch(command: Sequence[str], name: str) -> int:
        with open(state / f"{name}.log", "ab") as log:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/")
        started.append(child)
        return child.pid

    before = fuse_device(mountpoint)
    try:
        command = KINDS[kind](backing, mountpoint, state, ["-o", options] if options else [], launch)
        pid = launch(command, kind)

        def mounted() -> bool:
            if started[-1].poll() is not None:
                tail = (state / f"{kind}.log").read_text(errors="replace")[-600:].strip()
                raise DaemonError(f"{kind} on {mountpoint}: ended with rc {started[-1].returncode}: {tail}")
            return fuse_device(mountpoint) not in (None, before)

        until(mounted, f"{kind} on {mountpoint}", timeout, state / f"{kind}.log")
        # sshfs mounts first and logs in afterwards; if that fails it unmounts, and clients would work on the bare directory
        until(lambda: answers(mountpoint, timeout) and mounted(), f"an answer of {kind}", timeout, state / f"{kind}.log")
    except (DaemonError, OSError):
        for child in started:
            child.kill()
            child.wait()
        raise
    names = {child.pid: Path(f"/proc/{child.pid}/comm").read_text().strip() for child in started}
    result = {
        "kind": kind,
        "mountpoint": str(mountpoint),
        "backing": str(backing),
        "pid": pid,
        "pids": list(names),
        "names": names,
        "device": fuse_device(mountpoint),
    }
    (state / "daemon.json").write_text(json.dumps(result))
    for child in started:
        child.returncode = 0  # it goes on without us: no ResourceWarning
    return result


def stop(state: Path, timeout: float = 10) -> None:
    """Unmount (lazily, when it is in use) and end the daemon's processes. :raises DaemonError: one stays"""
    data = json.loads((state / "daemon.json").read_text())
    mountpoint = data["mountpoint"]
    if fuse_device(Path(mountpoint)) is not None:
        plain = subprocess.run(["umount", mountpoint], capture_output=True, timeout=timeout)
        if plain.returncode:
            run(["umount", "-l", mountpoint], f"unmount of {mountpoint}", timeout)
    alive = {int(pid): name for pid, name in data["names"].items()}
    deadline = time.monotonic() + timeout
    while alive:
        late = time.monotonic() > deadline - timeout / 2
        for pid, name in list(alive.items()):
            if not is_alive(pid, name):
                del alive[pid]
                continue
            os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        if time.monotonic() > deadline:
            raise DaemonError(f"stop of {data['kind']}: still there: {alive}")
        time.sleep(0.05)


def is_alive(pid: int, name: str) -> bool:
    """Whether the pid is still that process (by name: start times change with a restore) and no zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text[text.index("(") + 1 : text.rindex(")")] == name and text[text.rindex(")") + 2] != "Z"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Start and stop real FUSE daemons.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("start")
    one.add_argument("kind", choices=sorted(KINDS))
    one.add_argument("mountpoint", type=Path)
    one.add_argument("--backing", type=Path, help="directory to show (MOUNTPOINT.backing)")
    one.add_argument("--state", type=Path, help="directory for keys, logs, pids (MOUNTPOINT.state)")
    one.add_argument("-o", dest="options", default="")
    two = commands.add_parser("stop")
    two.add_argument("--state", type=Path, required=True)
    three = commands.add_parser("missing")
    three.add_argument("kind", choices=sorted(KINDS))
    four = commands.add_parser("build")
    four.add_argument("program", choices=PROGRAMS)
    four.add_argument("output", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "start":
            base = os.path.abspath(options.mountpoint)
            backing = options.backing or Path(base + ".backing")
            state = options.state or Path(base + ".state")
            print(json.dumps(start(options.kind, options.mountpoint, backing, state, options.options)))
        elif options.command == "stop":
            stop(options.state)
        elif options.command == "build":
            build(options.program, options.output)
        else:
            lacks = missing(options.kind)
            print("\n".join(lacks), end="\n" if lacks else "")
            return 1 if lacks else 0
    except (DaemonError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
