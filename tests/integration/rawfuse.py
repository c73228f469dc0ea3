# SPDX-License-Identifier: Apache-2.0
"""A FUSE daemon without any library, that behaves in its first life and does what MODE says in its second.

``rawfuse.py MODE MOUNTPOINT NOTES``: serves a directory with one file ``hello`` until it is unmounted. NOTES
is a directory: the first life leaves ``facts-1`` there (what it is: ids, capabilities, namespaces,
descriptors), any later one ``facts-2``, and ``did-NAME`` for what it tried. Modes that concern how it mounts
apply to both lives.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import signal
import stat
import struct
import sys
import threading
import time
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
IN = struct.Struct("<IIQQIIIHH")
OUT = struct.Struct("<IiQ")
REPLY = struct.pack("<IIIIHHIIHHII", 7, 31, 65536, 0x31, 7, 5, 131072, 1, 32, 0, 0, 0).ljust(64, b"\0")
TEXT = b"hello\n"
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 0, 1, 6
SYS_move_mount, SYS_fsopen, SYS_fsconfig, SYS_fsmount = 429, 430, 431, 432
MNT_FORCE, MNT_DETACH = 1, 2
CLONE_NEWNS = 0x20000
CAP_MKNOD = 27


def errno_of(ret: int) -> int:
    return ctypes.get_errno() if ret < 0 else 0


def options(device: int) -> dict[str, str]:
    return {"fd": str(device), "rootmode": "40000", "user_id": "0", "group_id": "0"}


def mount_classic(device: int, where: str) -> None:
    data = ",".join(f"{key}={value}" for key, value in options(device).items())
    if libc.mount(b"raw", where.encode(), b"fuse.raw", 0, data.encode()):
        raise OSError(ctypes.get_errno(), "mount", where)


def mount_new(device: int, where: str) -> None:
    """fsopen(2) and its relatives, as libfuse has them since 3.18."""

    def call(number: int, *args: object) -> int:
        ret = libc.syscall(ctypes.c_long(number), *args)
        if ret < 0:
            raise OSError(ctypes.get_errno(), f"system call {number}", where)
        return int(ret)

    context = call(SYS_fsopen, b"fuse", 1)
    for key, value in options(device).items():
        call(SYS_fsconfig, context, FSCONFIG_SET_STRING, key.encode(), value.encode(), 0)
    call(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, None, None, 0)
    mounted = call(SYS_fsmount, context, 1, 0)
    call(SYS_move_mount, mounted, b"", -100, where.encode(), 4)


def mount_in_child(device: int, where: str) -> None:
    """As glusterfs does: the process that reads requests is not the one that mounts."""
    pid = os.fork()
    if pid == 0:
        try:
            mount_classic(device, where)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def drop_permitted(capability: int) -> None:
    header, data = struct.pack("<Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    libc.capget(header, data)
    words = list(struct.unpack("<6I", data))
    words[0] &= ~(1 << capability)
    words[1] &= ~(1 << capability)
    if libc.capset(header, struct.pack("<6I", *words)):
        raise OSError(ctypes.get_errno(), "capset")


def descriptors() -> dict[int, str]:
    """Number -> kind, without the one of this listing itself."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            mode = os.fstat(int(name)).st_mode
        except OSError:
            continue
        found[int(name)] = "fifo" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "other"
    return found


def facts() -> dict[str, object]:
    own = os.stat("/proc/self/ns/pid").st_ino
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    wanted = ("Uid", "Gid", "Groups", "Umask", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")
    kinds = {name: value for name, value in vars(resource).items() if name.startswith("RLIMIT_")}
    return {
        "status": {key: status[key].strip() for key in wanted},
        "seccomp": (status["Seccomp"].strip(), status.get("Seccomp_filters", "").strip()),
        "swapoff": errno_of(libc.swapoff(b"/nowhere")),
        "pidns": own,
        "pid": os.getpid(),
        "namespaces": {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("user", "net", "ipc", "uts", "cgroup")},
        "cgroup": Path("/proc/self/cgroup").read_text(),
        "limits": {name: resource.getrlimit(kind) for name, kind in kinds.items() if kind != resource.RLIMIT_CORE},
        "fds": descriptors(),
        "argv": sys.argv,
        "environ": dict(os.environ),
        "cwd": os.getcwd(),
        "below": sorted(os.listdir(sys.argv[2])) if not sys.argv[2].startswith("/dev/fd/") else [],
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }


def answer(device: int, mode: str, notes: Path, again: bool) -> None:
    """Serve until the connection ends."""
    attr = struct.pack("<6Q10I", 2, len(TEXT), 0, 0, 0, 0, 0, 0, 0, stat.S_IFREG | 0o444, 1, 0, 0, 0, 4096, 0)
    root = struct.pack("<6Q10I", 1, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 4096, 0)
    while True:
        try:
            message = os.read(device, 1 << 20)
        except OSError:
            return
        if not message:
            return
        _length, opcode, unique, nodeid, *_rest = IN.unpack_from(message)
        body, error = b"", 0
        if opcode == 26:
            if again and (special := SECOND.get(mode)):
                special(device, unique, notes)
            body = REPLY if mode != "two-differ" or threading.current_thread() is threading.main_thread() else REPLY[:24]
        elif opcode == 1:
            name = message[IN.size : -1]
            error = 0 if name == b"hello" else 2
            body = b"" if error else struct.pack("<4QII", 2, 0, 0, 0, 0, 0) + attr
        elif opcode == 3:
            body = struct.pack("<QII", 0, 0, 0) + (root if nodeid == 1 else attr)
        elif opcode in (14, 27):
            body = struct.pack("<QII", 0, 0, 0)
        elif opcode == 15:
            offset = struct.unpack_from("<QQ", message, IN.size)[1]
            body = TEXT[offset:]
        elif opcode in (2, 42):
            continue
        elif opcode in (18, 25, 29):
            pass
        else:
            error = 38
        os.write(device, OUT.pack(OUT.size + len(body), -error, unique) + body)


# --- what the second life does instead of answering
# ------------------------------------------------------------


def silent(device: int, unique: int, notes: Path) -> None:
    time.sleep(3600)


def garbage(device: int, unique: int, notes: Path) -> None:
    os.write(device, b"\xff" * 80)
    time.sleep(3600)


def huge(device: int, unique: int, notes: Path) -> None:
    os.write(device, OUT.pack(1 << 20, 0, unique).ljust(1 << 20, b"\1"))
    time.sleep(3600)


def refuse(device: int, unique: int, notes: Path) -> None:
    os.write(device, OUT.pack(16, -71, unique))
    time.sleep(3600)


def other_major(device: int, unique: int, notes: Path) -> None:
    os.write(device, OUT.pack(80, 0, unique) + struct.pack("<II", 8, 0).ljust(64, b"\0"))
    time.sleep(3600)


def endless_notifications(device: int, unique: int, notes: Path) -> None:
    while True:
        os.write(device, OUT.pack(16, 3, 0))


def endless_output(device: int, unique: int, notes: Path) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    while True:
        try:
            os.write(1, b"\x1b[31mendless \xff " * 1000 + b"\n")
        except OSError:
            time.sleep(3600)


def escape_codes(device: int, unique: int, notes: Path) -> None:
    os.write(2, b"first\n\x1b]0;owned\x07 cannot start: caf\xe9\n")
    os._exit(3)


def crash(device: int, unique: int, notes: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def forks_away(device: int, unique: int, notes: Path) -> None:
    """A tree of daemons, each in a session of its own; the first ones exit."""
    for _ in range(5):
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            os.closerange(0, 64)
            while True:
                time.sleep(60)
    os._exit(0)


def stops(device: int, unique: int, notes: Path) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def attack(device: int, unique: int, notes: Path) -> None:
    """Everything that could touch the mount of the first life or the container's mounts; then answers
    well.
    """
    where = sys.argv[2].encode()
    did = {
        "umount": errno_of(libc.umount2(where, 0)),
        "detach": errno_of(libc.umount2(where, MNT_DETACH)),
        "force": errno_of(libc.umount2(where, MNT_FORCE)),
        "tmpfs": errno_of(libc.mount(b"none", where, b"tmpfs", 0, None)),
        "pivot_root": errno_of(libc.syscall(ctypes.c_long(155 if os.uname().machine == "x86_64" else 41), b".", b".")),
        "open_tree": errno_of(libc.syscall(ctypes.c_long(428), -100, b"/", 1)),
        "mount_setattr": errno_of(libc.syscall(ctypes.c_long(442), -100, b"/", 0, b"\0" * 32, 32)),
    }
    libc.mount(b"/", where, None, 4096, None)  # a bind mount: reported as done
    did["bound"] = "hello" not in os.listdir(where) and not os.path.ismount(where)
    try:
        namespace = os.open("/proc/1/ns/mnt", os.O_RDONLY)
        did["setns"] = errno_of(libc.setns(namespace, CLONE_NEWNS))
    except PermissionError:  # init of the test's user namespace is not dumpable
        did["setns"] = -1
    did["umount-there"] = errno_of(libc.umount2(where, MNT_DETACH))
    (notes / "did-attack").write_text(json.dumps(did))


SECOND = {
    "silent": silent,
    "garbage": garbage,
    "huge": huge,
    "refuse": refuse,
    "other-major": other_major,
    "endless-notifications": endless_notifications,
    "endless-output": endless_output,
    "escape-codes": escape_codes,
    "crash": crash,
    "forks-away": forks_away,
    "stops": stops,
    "attack": attack,
}


def mount_while_reading(device: int, where: str) -> None:
    """As libfuse's synchronous INIT (FUSE_DEV_IOC_SYNC_INIT): where the kernel has it, a thread reads before the mount is there."""
    try:
        fcntl.ioctl(device, 0xE503)
    except OSError:
        mount_classic(device, where)
        return
    notes = Path(sys.argv[3])
    reader = threading.Thread(target=answer, args=(device, "plain", notes, False))
    reader.start()
    mount_classic(device, where)
    reader.join()
    os._exit(0)


def mount_two(device: int, where: str) -> None:
    """A second mount, served by a thread of its own; the last argument of the mode says what that answers."""
    other = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    mount_classic(other, f"{where}-2")
    mount_classic(device, where)
    threading.Thread(target=answer, args=(other, sys.argv[1], Path(sys.argv[3]), False), daemon=True).start()


MOUNTS = {
    "sync-init": mount_while_reading,
    "two": mount_two,
    "two-differ": mount_two,
    "new-api": mount_new,
    "child-mounts": mount_in_child,
}


def main() -> None:
    mode, where, notes = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    again = (notes / "facts-1").exists()
    (notes / f"facts-{2 if again else 1}").write_text(json.dumps(facts()))
    if mode == "fewer-rights":  # a daemon that drops what it does not need, as root
        drop_permitted(CAP_MKNOD)
    if mode == "exit-early" and again:
        print("another instance is running", file=sys.stderr)
        sys.exit(9)
    if where.startswith("/dev/fd/"):
        device = int(where.removeprefix("/dev/fd/"))
    else:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        MOUNTS.get(mode, mount_classic)(device, where)
    answer(device, mode, notes, again)


if __name__ == "__main__":
    main()
