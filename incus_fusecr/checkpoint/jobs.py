# SPDX-License-Identifier: Apache-2.0
"""The jobs of disposable children that do system calls on FUSE paths (see linux/zygote.py)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import stat
import struct
import threading
from contextlib import ExitStack
from typing import Any

from ..fuse import wire
from ..linux import libc, mount, ns
from ..linux.fd import Fd, receive
from ..linux.handle import fuse_handle
from ..linux.libc import SYS_openat2
from ..linux.mountapi import reconfigure
from ..linux.pidfd import pidfd_getfd, pidfd_open
from ..linux.statx import mount_id

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08

DELETED = " (deleted)"
MAX_CACHED = 64 << 20  # bytes of each mapped file


def openat2(dirfd: int, path: str, flags: int, resolve: int) -> int:
    """openat2(2)."""
    how = ctypes.create_string_buffer(struct.pack("<QQQ", flags | os.O_CLOEXEC, 0, resolve))
    return libc.syscall(SYS_openat2, dirfd, os.fsencode(path), how, 24, what=path)


def enter(pidfd: int, pid: int, kinds: int) -> None:
    """Into namespaces of the process behind ``pidfd``; the user namespace only where it is another one."""
    if ns.same_ns(pid, "user"):
        kinds &= ~ns.CLONE_NEWUSER
    if kinds:
        ns.setns(pidfd, kinds)


def become(uid: int, gid: int) -> None:
    """The mount's owner: without allow_other FUSE serves only processes whose ids all are those of the mount
    (fs/fuse/dir.c fuse_allow_current_process())."""
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def record_job(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """Nodes, names and attributes along paths of one connection, while its daemon still answers.

    args: pid (the init), mountpoint, mount_id, uid, gid, paths (below the superblock's root), sync; fds[0]: its pidfd
    """
    root = _enter_mount(args, fds[0])
    nodes: dict[int, tuple[int, list[int]]] = {}
    names: set[tuple[int, str, int]] = set()
    ids: dict[str, list[int]] = {}
    missing: dict[str, str] = {}
    root_id = _node(root, nodes)
    if args.get("sync"):
        _syncfs(root)
    for path in args["paths"]:
        try:
            ids[path] = _walk(root, root_id, path, nodes, names)
        except OSError as error:
            missing[path] = error.strerror or str(error)
    st = os.fstatvfs(root)
    return {
        "nodes": [[n, gen, attr] for n, (gen, attr) in nodes.items()],
        "names": sorted(names),
        "ids": ids,
        "missing": missing,
        "statfs": [
            st.f_blocks, st.f_bfree, st.f_bavail, st.f_files, st.f_ffree, st.f_bsize, st.f_namemax, st.f_frsize,
        ],
    }, []  # fmt: skip


def _enter_mount(args: dict[str, Any], pidfd: int) -> int:
    """Into the container, as the mount's owner; an O_PATH descriptor of the mount's root."""
    enter(pidfd, args["pid"], ns.CLONE_NEWUSER | ns.CLONE_NEWNS)
    become(args["uid"], args["gid"])
    root = os.open(args["mountpoint"], os.O_PATH | os.O_CLOEXEC)
    if mount_id(root) != args["mount_id"]:
        raise OSError(errno.ESTALE, "another mount came on top of it", args["mountpoint"])
    return root


def trim_job(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """Let the kernel forget what it remembers of a mount and nobody uses, and tell the daemon so.

    args: pid (the init), mountpoint, mount_id; fds[0]: its pidfd
    """
    enter(fds[0], args["pid"], ns.CLONE_NEWUSER | ns.CLONE_NEWNS)
    with Fd(os.open(args["mountpoint"], os.O_PATH | os.O_CLOEXEC), args["mountpoint"]) as root:
        if mount_id(root.fileno()) != args["mount_id"]:
            raise OSError(errno.ESTALE, "another mount came on top of it", args["mountpoint"])
        reconfigure(root)
    return None, []


def spares_job(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """Open a spare handle for each opening that CRIU will do for a file mapping, through the live daemon.

    They stay with a *keeper*, a process that ends when the socket fds[1] is closed: the agent itself must not own them.

    args as for :func:`record_job`, with ``paths`` of the mapped files; the result is the keeper's pid and its descriptors
    """
    root = _enter_mount(args, fds[0])
    resolve = RESOLVE_BENEATH | RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS
    opened = [openat2(root, path or ".", os.O_RDONLY | os.O_NONBLOCK, resolve) for path in args["paths"]]
    for fd in opened:
        _into_page_cache(fd)
    keeper = os.fork()
    if keeper == 0:
        stay = {*opened, fds[1]}
        for number in range(1 << 12):
            if number not in stay:
                try:
                    os.close(number)
                except OSError:
                    pass
        try:
            while os.read(fds[1], 1):
                pass
        finally:
            os._exit(0)
    return {"pid": keeper, "fds": opened}, []


def _node(fd: int, nodes: dict[int, tuple[int, list[int]]]) -> int:
    nodeid, generation = fuse_handle(fd)
    nodes[nodeid] = (generation, wire.attr_of_stat(os.fstat(fd)))
    return nodeid


def _walk(
    root: int, root_id: int, path: str, nodes: dict[int, tuple[int, list[int]]], names: set[tuple[int, str, int]]
) -> list[int]:
    """Component by component, never through a symlink or another mount that the container put in the way."""
    with ExitStack() as stack:
        here, nodeid = root, root_id
        for name in filter(None, path.split("/")):
            fd = openat2(here, name, os.O_PATH | os.O_NOFOLLOW, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV)
            stack.callback(os.close, fd)
            parent, nodeid = nodeid, _node(fd, nodes)
            names.add((parent, name, nodeid))
            here = fd
        st = os.fstat(here)
        return [nodeid, st.st_dev, st.st_ino]


def _syncfs(root: int) -> None:
    """Dirty pages (writeback cache, mappings) go to the daemon before it is stopped."""
    fd = os.open(".", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=root) if _is_dir(root) else -1
    if fd >= 0:
        libc.check(int(libc.libc.syncfs(fd)), "syncfs")
        os.close(fd)


def _into_page_cache(fd: int) -> None:
    """CRIU runs code inside the tasks: a page fault on a mapped file then must not need the frozen daemon."""
    size, offset = min(os.fstat(fd).st_size, MAX_CACHED), 0
    while offset < size:
        count = len(os.pread(fd, 1 << 20, offset))
        if not count:
            break
        offset += count


def _is_dir(fd: int) -> bool:
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def handles_job(args: dict[str, Any], _fds: list[int]) -> tuple[Any, list[int]]:
    """nodeid, generation and attributes of open descriptors, from the descriptors themselves.

    args: pid, uid, gid (whose user namespace and owner to take), fds: [[pid, fd]]; null for one that was closed meanwhile
    """
    pidfd = pidfd_open(args["pid"])
    copies = [_copy_if_open(pid, fd) for pid, fd in args["fds"]]
    enter(pidfd.fileno(), args["pid"], ns.CLONE_NEWUSER)
    become(args["uid"], args["gid"])
    result: list[Any] = []
    for fd in copies:
        if fd is None:
            result.append(None)
            continue
        nodeid, generation = fuse_handle(fd)
        st = os.fstat(fd)
        result.append([nodeid, generation, wire.attr_of_stat(st), st.st_dev, st.st_nlink])
    return result, []


def _copy(pid: int, fd: int) -> int:
    with pidfd_open(pid) as pidfd:
        return pidfd_getfd(pidfd, fd).release()


def _copy_if_open(pid: int, fd: int) -> int | None:
    try:
        return _copy(pid, fd)
    except OSError as error:
        if error.errno in (errno.EBADF, errno.ESRCH):
            return None
        raise


def probe_job(args: dict[str, Any], _fds: list[int]) -> tuple[Any, list[int]]:
    """Send the probe ioctl through handles, so that the stand-in sees nodeid and fh of each; find out their open flags.

    args: pid (whose user namespace), uid, gid, fds: [[pid, fd]]; cookies count from ``base``
    """
    pidfd = pidfd_open(args["pid"])
    copies = [_copy(pid, fd) for pid, fd in args["fds"]]
    enter(pidfd.fileno(), args["pid"], ns.CLONE_NEWUSER)
    become(args["uid"], args["gid"])
    result = []
    for number, fd in enumerate(copies):
        code = 0
        try:
            fcntl.ioctl(fd, wire.PROBE_IOCTL, args["base"] + number)
        except OSError as error:
            code = error.errno or 0
        result.append([code, _open_flags(fd)])
    return result, []


def _open_flags(fd: int) -> int:
    """What OPEN had answered, as far as it can be seen from outside (fs/fuse/file.c fuse_finish_open())."""
    flags = wire.FOPEN_KEEP_CACHE  # harmless: the restored kernel has an empty page cache
    if _is_dir(fd):
        return flags
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if access != os.O_WRONLY:
        try:
            # Direct I/O without FUSE_DIRECT_IO_ALLOW_MMAP: a shared mapping is refused (fuse_file_mmap()).
            mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ).close()
        except (OSError, ValueError) as error:
            if getattr(error, "errno", 0) == errno.ENODEV:
                flags |= wire.FOPEN_DIRECT_IO
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
    except OSError as error:
        if error.errno == errno.ESPIPE:
            flags |= wire.FOPEN_NONSEEKABLE
    return flags


def farewell_job(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """Write notifications to connections, of each by a thread of its own: one that waits must not keep the others.

    args: notes: for each of fds; the result is [[index, error]]. A descriptor is closed as soon as its notes are written.
    """
    failed: list[list[Any]] = []

    def say(index: int, fd: int, notes: list[str]) -> None:
        for note in notes:
            try:
                os.write(fd, bytes.fromhex(note))
            except OSError as error:
                # ENOENT: the kernel no longer has the dentry or inode, which is as good.
                if error.errno != errno.ENOENT:
                    failed.append([index, error.strerror])
                    break
        os.close(fd)

    threads = [
        threading.Thread(target=say, args=(index, fd, notes), daemon=True)
        for index, (fd, notes) in enumerate(zip(fds, args["notes"], strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed, []


def mount_job(args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """Mount a FUSE file system inside a new container and send the /dev/fuse descriptor.

    /dev/fuse must be opened in the mount's user namespace (fs/fuse/inode.c fuse_fill_super()), and the mounting process
    must be in the container's pid namespace, for the kernel translates the pids of requests into that (fc->pid_ns).

    args: pid, staging, source, fstype, flags, options; fds[0]: pidfd
    """
    enter(fds[0], args["pid"], ns.CLONE_NEWUSER | ns.CLONE_NEWNS | ns.CLONE_NEWPID)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        _mount_in_pidns(args, theirs)
    theirs.close()
    message, received = receive(ours, 4096, 1)
    os.waitpid(child, 0)
    if not received:
        code, _, text = message.decode(errors="replace").partition(" ")
        raise OSError(int(code or 0), text or "the mounting child died", args["staging"])
    return None, received


def _mount_in_pidns(args: dict[str, Any], sock: socket.socket) -> None:
    try:
        become(0, 0)
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = ",".join([f"fd={fd}", *filter(None, [args["options"]])])
        mount.mount(args["source"], args["staging"], args["fstype"], args["flags"], options)
        socket.send_fds(sock, [b"ok"], [fd])
    except OSError as error:
        sock.send(f"{error.errno} {error.filename}: {error.strerror}".encode(errors="replace")[:4000])
    finally:
        os._exit(0)
