# SPDX-License-Identifier: Apache-2.0
"""A daemon that shows a directory and misbehaves as told: ``fake_fuse.py BACKING (--mount WHERE | --fd N) [RULE ...]``.

A rule is ``OPCODE:NAME:ACTION``, NAME being the last part of a path (``*``: any). Actions:

``swallow``  do it and do not answer         ``die``    exit instead of doing it
``ignore``   neither do it nor answer        ``short``, ``long``, ``giant``, ``tiny``, ``error``   malformed answers
``counted``  append a line to BACKING.log    ``noise``  notifications full of rubbish before the answer
``late``     answer half a second later        ``hang``   never do anything any more

``--base N`` is what node ids count from, ``--ready-after SECONDS`` delays the answer to INIT.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import select
import socket
import stat
import struct
import sys
import time
from typing import Any

from incus_fusecr.fuse import wire

ENTRY = struct.Struct("<4QII")
INIT_OUT = struct.pack("<IIIIHHIIHHII", 7, 31, 65536, 0x21, 7, 5, 131072, 1, 32, 0, 0, 0).ljust(64, b"\0")
NAMES = {
    1: "LOOKUP", 2: "FORGET", 3: "GETATTR", 4: "SETATTR", 5: "READLINK", 6: "SYMLINK", 8: "MKNOD", 9: "MKDIR",
    10: "UNLINK", 11: "RMDIR", 12: "RENAME", 13: "LINK", 14: "OPEN", 15: "READ", 16: "WRITE", 17: "STATFS",
    18: "RELEASE", 20: "FSYNC", 25: "FLUSH", 26: "INIT", 27: "OPENDIR", 28: "READDIR", 29: "RELEASEDIR", 35: "CREATE",
    36: "INTERRUPT", 40: "POLL", 42: "BATCH_FORGET", 44: "READDIRPLUS", 45: "RENAME2", 46: "LSEEK",
}  # fmt: skip
UNANSWERED = {"FORGET", "BATCH_FORGET", "INTERRUPT"}


def attributes(path: str, ino: int) -> bytes:
    fields = wire.attr_of_stat(os.lstat(path))
    fields[0] = ino
    return wire.ATTR.pack(*fields)


class FakeFuse:
    def __init__(self, options: argparse.Namespace) -> None:
        self.backing = options.backing
        self.rules = [tuple(rule.split(":")) for rule in options.rules]
        self.base = options.base
        self.delay = options.ready_after
        self.paths: dict[int, str] = {1: self.backing}
        self.counts: dict[int, int] = {}
        self.handles: dict[int, int] = {}
        self.waiting: list[tuple[str, int]] = []  # (path, the kernel's number of the handle)
        self.told: list[bytes] = []  # notifications that follow the answer
        self.descriptor = -1
        self.sock: socket.socket | None = None

    # -- node ids

    def entry(self, path: str) -> bytes:
        os.lstat(path)
        number = next((n for n, known in self.paths.items() if known == path), 0)
        if not number:
            number = self.base = self.base + 1
            self.paths[number] = path
        self.counts[number] = self.counts.get(number, 0) + 1
        return ENTRY.pack(number, 0, 0, 0, 0, 0) + attributes(path, number)

    def forget(self, number: int, count: int) -> None:
        left = self.counts.get(number, 0) - count
        if left < 0:
            os._exit(99)  # as libfuse does: who forgets more than there was has lost count
        self.counts[number] = left
        if not left:
            self.paths.pop(number)
            self.counts.pop(number)

    # -- operations: the body of the answer, or OSError

    def handle(self, name: str, request: wire.Request) -> bytes:
        body = request.body
        path = self.paths.get(request.nodeid)
        if path is None and name not in UNANSWERED | {"INIT"}:
            os._exit(98)  # an id that was never given out
        method = getattr(self, f"do_{name.lower()}", None)
        if method is None:
            raise OSError(errno.ENOSYS, name)
        return bytes(method(path, body, request) or b"")

    def do_init(self, path: str, body: bytes, request: Any) -> bytes:
        time.sleep(self.delay)
        return INIT_OUT

    def do_forget(self, path: str, body: bytes, request: Any) -> None:
        self.forget(request.nodeid, struct.unpack_from("<Q", body)[0])

    def do_batch_forget(self, path: str, body: bytes, request: Any) -> None:
        for i in range(struct.unpack_from("<I", body)[0]):
            self.forget(*struct.unpack_from("<QQ", body, 8 + 16 * i))

    def do_interrupt(self, path: str, body: bytes, request: Any) -> None:
        pass

    def do_lookup(self, path: str, body: bytes, request: Any) -> bytes:
        return self.entry(f"{path}/{text(body)}")

    def do_getattr(self, path: str, body: bytes, request: Any) -> bytes:
        return wire.ATTR_OUT.pack(0, 0, 0) + attributes(path, request.nodeid)

    def do_setattr(self, path: str, body: bytes, request: Any) -> bytes:
        valid = struct.unpack_from("<I", body)[0]
        if valid & 1 << 3:
            os.truncate(path, struct.unpack_from("<Q", body, 16)[0])
        return self.do_getattr(path, body, request)

    def do_mkdir(self, path: str, body: bytes, request: Any) -> bytes:
        os.mkdir(f"{path}/{text(body[8:])}")
        return self.entry(f"{path}/{text(body[8:])}")

    def do_symlink(self, path: str, body: bytes, request: Any) -> bytes:
        name, target = body.split(b"\0")[:2]
        os.symlink(target.decode(), f"{path}/{name.decode()}")
        return self.entry(f"{path}/{name.decode()}")

    def do_link(self, path: str, body: bytes, request: Any) -> bytes:
        os.link(self.paths[struct.unpack_from("<Q", body)[0]], f"{path}/{text(body[8:])}")
        return self.entry(f"{path}/{text(body[8:])}")

    def do_unlink(self, path: str, body: bytes, request: Any) -> None:
        os.unlink(f"{path}/{text(body)}")

    def do_rmdir(self, path: str, body: bytes, request: Any) -> None:
        os.rmdir(f"{path}/{text(body)}")

    def do_rename(self, path: str, body: bytes, request: Any) -> None:
        old, new = body[8:].split(b"\0")[:2]
        source, target = f"{path}/{old.decode()}", f"{self.paths[struct.unpack_from('<Q', body)[0]]}/{new.decode()}"
        os.rename(source, target)
        self.paths = {n: target if known == source else known for n, known in self.paths.items()}

    def do_create(self, path: str, body: bytes, request: Any) -> bytes:
        name = f"{path}/{text(body[16:])}"
        flags, mode = struct.unpack_from("<II", body)
        fd = os.open(name, flags | os.O_CREAT, mode & 0o7777)
        return self.entry(name) + self.opened(fd)

    def opened(self, fd: int) -> bytes:
        number = self.base = self.base + 1
        self.handles[number] = fd
        return wire.OPEN_OUT.pack(number, 0, 0)

    def do_open(self, path: str, body: bytes, request: Any) -> bytes:
        return self.opened(os.open(path, struct.unpack_from("<I", body)[0]))

    def do_opendir(self, path: str, body: bytes, request: Any) -> bytes:
        return self.opened(os.open(path, os.O_RDONLY | os.O_DIRECTORY))

    def fd(self, body: bytes) -> int:
        number = struct.unpack_from("<Q", body)[0]
        if number not in self.handles:
            os._exit(97)  # as libfuse's daemons do: their handles are pointers
        return self.handles[number]

    def do_read(self, path: str, body: bytes, request: Any) -> bytes:
        _, offset, size = wire.READ_IN.unpack_from(body)
        return os.pread(self.fd(body), size, offset)

    def do_write(self, path: str, body: bytes, request: Any) -> bytes:
        _, offset, size = wire.READ_IN.unpack_from(body)
        for one in [one for one in self.waiting if one[0] == path]:
            self.waiting.remove(one)
            self.told.append(wire.notify(1, struct.pack("<Q", one[1])))
        return struct.pack("<II", os.pwrite(self.fd(body), body[40 : 40 + size], offset), 0)

    def do_flush(self, path: str, body: bytes, request: Any) -> None:
        self.fd(body)

    def do_fsync(self, path: str, body: bytes, request: Any) -> None:
        os.fsync(self.fd(body))

    def do_release(self, path: str, body: bytes, request: Any) -> None:
        os.close(self.fd(body))
        del self.handles[struct.unpack_from("<Q", body)[0]]

    do_releasedir = do_release

    def do_readdir(self, path: str, body: bytes, request: Any) -> bytes:
        _, offset, size = wire.READ_IN.unpack_from(body)
        self.fd(body)
        out = b""
        for index, name in enumerate([".", "..", *sorted(os.listdir(path))]):
            raw = name.encode()
            record = struct.pack("<QQII", 1, index + 1, len(raw), 0) + raw
            record += bytes(-len(record) % 8)
            if index >= offset and len(out) + len(record) <= size:
                out += record
        return out

    def do_statfs(self, path: str, body: bytes, request: Any) -> bytes:
        return bytes(wire.STATFS_OUT.size)

    def do_poll(self, path: str, body: bytes, request: Any) -> bytes:
        """Readable is what is not empty; who waits for that is told when somebody writes."""
        _, kh, flags, _ = struct.unpack_from("<QQII", body)
        ready = os.path.getsize(path) > 0
        if flags & 1 and not ready:
            self.waiting.append((path, kh))
        return struct.pack("<II", select.POLLIN if ready else 0, 0)

    # -- messages

    def action(self, name: str, request: wire.Request) -> str:
        path = self.paths.get(request.nodeid, "")
        offset = {"MKDIR": 8, "CREATE": 16, "LINK": 8, "RENAME": 8}.get(name, 0)
        named = name in ("LOOKUP", "MKDIR", "CREATE", "UNLINK", "RMDIR", "RENAME", "SYMLINK", "LINK")
        what = text(request.body[offset:]) if named else os.path.basename(path)
        return next((rule[2] for rule in self.rules if rule[0] == name and rule[1] in ("*", what)), "")

    def send(self, data: bytes) -> None:
        if self.sock is None:
            os.write(self.descriptor, data)
        else:
            self.sock.send(data)

    def serve_one(self, data: bytes) -> None:
        request = wire.parse_request(data)
        name = NAMES.get(request.opcode, str(request.opcode))
        action = self.action(name, request)
        if action:
            with open(f"{self.backing}.log", "a") as log:
                log.write(f"{name} {action} {os.getpid()} {request.pid}\n")
        if action == "die":
            os._exit(1)
        if action == "ignore":
            return
        if action == "hang":
            time.sleep(3600)
        if action == "late":
            time.sleep(0.5)
        try:
            body, error = self.handle(name, request), 0
        except OSError as failure:
            body, error = b"", failure.errno or errno.EIO
        if action != "swallow" and name not in UNANSWERED:
            self.answer(action, request.unique, error, body)
        while self.told:
            self.send(self.told.pop())

    def answer(self, action: str, unique: int, error: int, body: bytes) -> None:
        data = wire.reply(unique, error, body)
        if action == "short":
            data = data[:-1] if body else data[:15]
        elif action == "tiny":
            data = data[:7]
        elif action == "long":
            data += b"x" * 5000
        elif action == "giant":
            data = wire.OUT_HEADER.pack(3 << 20, 0, unique) + bytes((3 << 20) - 16)
        elif action == "error":
            data = wire.OUT_HEADER.pack(16, 99999, unique)
        elif action == "noise":
            for code in range(1, 12):
                for size in (0, 8, 24, 40):
                    self.send(wire.notify(code, b"\xff" * size))
        self.send(data)
        if action == "tiny":
            os._exit(1)

    def run(self) -> None:
        while True:
            try:
                data = self.sock.recv(1 << 21) if self.sock else os.read(self.descriptor, 1 << 21)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue
                return
            if not data:
                return
            self.serve_one(data)


def text(body: bytes) -> str:
    return body.split(b"\0")[0].decode()


def mount(where: str) -> int:
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={device},rootmode={stat.S_IFDIR:o},user_id=0,group_id=0,allow_other,default_permissions"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"fake", where.encode(), b"fuse.fake", 0, data.encode()):
        raise OSError(ctypes.get_errno(), "mount", where)
    return device


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backing")
    parser.add_argument("--mount")
    parser.add_argument("--fd", type=int)
    parser.add_argument("--base", type=int, default=1)
    parser.add_argument("--ready-after", type=float, default=0)
    parser.add_argument("rules", nargs="*")
    options = parser.parse_intermixed_args()
    daemon = FakeFuse(options)
    if options.mount:
        daemon.descriptor = mount(options.mount)
    else:
        daemon.sock = socket.socket(fileno=options.fd)
    daemon.run()


if __name__ == "__main__":
    sys.setrecursionlimit(200)
    main()
