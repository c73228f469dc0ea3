# SPDX-License-Identifier: Apache-2.0
"""Clients of the drill's file system, in mount namespaces of their own, as containers have them.

Each notices whatever a user could: errors, contents that are not what they have to be, and how long each operation took.
All are forked before the supervisor has a thread; what they count is in shared memory, what they noted goes to a file at
their end.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..linux.mount import MNT_DETACH, MS_BIND, MS_PRIVATE, MS_REC, MS_SLAVE, mount, umount2
from ..linux.ns import CLONE_NEWNS, unshare

FILES = 6
SIZE = 3000  # bytes of a file: less than a page, so that one READ brings it
PACE = 0.02  # seconds between two operations of a client
MOMENT = 1.0  # seconds
MAX_TEXTS = 20
RECORD = struct.Struct("<QQ")
ROLES = ("reader", "holder", "writer")
_SLOTS = 3  # 64 bit words of a client: operations, problems, when the present operation began (ns, 0: none)


def content(number: int) -> bytes:
    """What is in file ``number``."""
    line = b"file %d of the drill\n" % number
    return (line * (SIZE // len(line) + 1))[:SIZE]


def fill(directory: str, containers: int) -> None:
    """What the file system shows: files that nobody changes, and a directory for each container's writer."""
    os.makedirs(f"{directory}/files")
    for number in range(FILES):
        with open(f"{directory}/files/{number}", "wb") as file:
            file.write(content(number))
    for number in range(containers):
        os.mkdir(f"{directory}/writer{number}")


class Board:
    """Shared memory of all clients: word 0 tells them to end, word 1 the namespaces' first processes."""

    def __init__(self, clients: int) -> None:
        self._map = mmap.mmap(-1, max(mmap.PAGESIZE, 8 * (2 + _SLOTS * clients)))
        self.words = memoryview(self._map).cast("Q")

    @property
    def stop(self) -> bool:
        return bool(self.words[0])

    @property
    def leave(self) -> bool:
        return bool(self.words[1])

    def end_clients(self) -> None:
        self.words[0] = 1

    def end_namespaces(self) -> None:
        self.words[0] = self.words[1] = 1

    def slot(self, client: int) -> memoryview:
        return self.words[2 + _SLOTS * client : 2 + _SLOTS * (client + 1)]

    def totals(self, clients: int) -> tuple[int, int]:
        """(operations, problems) so far."""
        slots = [self.slot(n) for n in range(clients)]
        return sum(s[0] for s in slots), sum(s[1] for s in slots)


@dataclass(frozen=True)
class Client:
    """``number``: its place on the board."""

    number: int
    container: int
    role: str

    @property
    def name(self) -> str:
        return f"{self.role} {self.number} in namespace {self.container}"


def crew(containers: int, readers: int) -> list[Client]:
    """So many readers, a holder and a writer in each container."""
    roles = ["reader"] * readers + ["holder", "writer"]
    return [Client(c * len(roles) + n, c, role) for c in range(containers) for n, role in enumerate(roles)]


class Wrong(Exception):
    """Something is not what it has to be."""


def expect(what: str, found: object, wanted: object) -> None:
    """:raises Wrong: they differ"""
    if found != wanted:
        raise Wrong(f"{what}: {str(found)[:80]!r}, not {str(wanted)[:80]!r}")


# -- roles: each gives operations that are done in turn, and a last one


class Reader:
    """Opens, reads and closes: by a directory and by a file that are mounted each for itself."""

    def __init__(self, place: str, container: int) -> None:
        self.place, self.turn = place, 0

    def operations(self) -> Sequence[Callable[[], None]]:
        return (self.by_path, self.by_file, self.names)

    def by_path(self) -> None:
        self.turn = (self.turn + 1) % FILES
        with open(f"{self.place}/tree/files/{self.turn}", "rb", buffering=0) as file:
            expect(f"files/{self.turn}", file.read(SIZE + 1), content(self.turn))

    def by_file(self) -> None:
        with open(f"{self.place}/file", "rb", buffering=0) as file:
            expect("file 0", file.read(SIZE + 1), content(0))

    def names(self) -> None:
        expect("names", sorted(os.listdir(f"{self.place}/tree/files")), [str(n) for n in range(FILES)])

    def end(self) -> None:
        """Nothing is open."""


class Holder:
    """What it has open stays open until the end: files, a directory stream, a working directory."""

    def __init__(self, place: str, container: int) -> None:
        self.files = [os.open(f"{place}/tree/files/{n}", os.O_RDONLY) for n in range(FILES)]
        self.stream = os.open(f"{place}/tree/files", os.O_RDONLY | os.O_DIRECTORY)
        os.chdir(f"{place}/directory")
        self.cwd = os.getcwd()
        self.turn = self.moments = 0

    def operations(self) -> Sequence[Callable[[], None]]:
        return (self.read, self.rewind, self.relative, self.where)

    def read(self) -> None:
        self.turn = (self.turn + 1) % FILES
        expect(f"open file {self.turn}", os.pread(self.files[self.turn], SIZE + 1, 0), content(self.turn))

    def rewind(self) -> None:
        expect("names in a stream", sorted(os.listdir(self.stream)), [str(n) for n in range(FILES)])

    def relative(self) -> None:
        with open(f"{self.turn}", "rb", buffering=0) as file:
            expect(f"{self.turn} in the working directory", file.read(SIZE + 1), content(self.turn))

    def where(self) -> None:
        """getcwd(2) says ENOENT while somebody else looks the directory up anew: noted, an error only if it stays."""
        end = time.monotonic() + MOMENT
        while True:
            try:
                return expect("working directory", os.getcwd(), self.cwd)
            except FileNotFoundError:
                if time.monotonic() > end:
                    raise
                self.moments += 1
                time.sleep(0.001)

    def end(self) -> None:
        for fd in (*self.files, self.stream):
            os.close(fd)
        os.chdir("/")


class Writer:
    """Appends, overwrites, replaces; at its end each record has to be there once, in its order."""

    def __init__(self, place: str, container: int) -> None:
        self.place = f"{place}/tree/writer{container}"
        self.journal = os.open(f"{self.place}/journal", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.page = os.open(f"{self.place}/page", os.O_RDWR | os.O_CREAT, 0o600)
        self.appended = self.turn = 0

    def operations(self) -> Sequence[Callable[[], None]]:
        return (self.append, self.overwrite, self.replace)

    def append(self) -> None:
        record = RECORD.pack(self.appended, ~self.appended & (1 << 64) - 1)
        expect("bytes appended", os.write(self.journal, record), RECORD.size)
        self.appended += 1
        expect("last record", os.pread(self.journal, RECORD.size, (self.appended - 1) * RECORD.size), record)

    def overwrite(self) -> None:
        self.turn += 1
        text = b"%020d" % self.turn
        expect("bytes written", os.pwrite(self.page, text, 0), len(text))
        os.fsync(self.page)
        expect("page", os.pread(self.page, 100, 0), text)

    def replace(self) -> None:
        # By a descriptor of the directory: with two paths the swap may come between them, and rename(2) says EXDEV.
        text = b"%020d" % self.turn
        directory = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            new = os.open("new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=directory)
            try:
                expect("bytes written", os.write(new, text), len(text))
            finally:
                os.close(new)
            os.rename("new", "whole", src_dir_fd=directory, dst_dir_fd=directory)
            whole = os.open("whole", os.O_RDONLY, dir_fd=directory)
            try:
                expect("replaced file", os.read(whole, 100), text)
            finally:
                os.close(whole)
        finally:
            os.close(directory)

    def end(self) -> None:
        os.close(self.page)
        os.close(self.journal)
        with open(f"{self.place}/journal", "rb") as file:
            data = file.read()
        numbers = [RECORD.unpack_from(data, at)[0] for at in range(0, len(data) - RECORD.size + 1, RECORD.size)]
        expect("records in the journal", numbers, list(range(self.appended)))


KINDS: dict[str, Callable[[str, int], Reader | Holder | Writer]] = {"reader": Reader, "holder": Holder, "writer": Writer}


# -- processes


def work(client: Client, place: str, board: Board, report: str) -> None:
    """A client, until the board says so."""
    slot = board.slot(client.number)
    operations: list[tuple[int, int]] = []
    texts: list[tuple[int, str]] = []
    wrong: list[int] = []

    def do(what: Callable[[], Any]) -> Any:
        began = time.monotonic_ns()
        slot[2] = began
        try:
            return what()
        except (OSError, Wrong) as error:
            slot[1] += 1
            wrong.append(began)
            if len(texts) < MAX_TEXTS:
                texts.append((began, f"{getattr(what, '__name__', 'begin')}: {error}"))
            return None
        finally:
            operations.append((began, time.monotonic_ns() - began))
            slot[0] += 1
            slot[2] = 0

    made = do(lambda: KINDS[client.role](place, client.container))
    turn = 0
    while made is not None and not board.stop:
        todo = made.operations()
        do(todo[turn % len(todo)])
        turn += 1
        time.sleep(PACE)
    if made is not None:
        do(made.end)
    with open(report + ".new", "w") as file:
        json.dump(
            {"name": client.name, "operations": operations, "wrong": wrong, "texts": texts, "moments": getattr(made, "moments", 0)},
            file,
        )
    os.rename(report + ".new", report)


def container(number: int, clients: Sequence[Client], tree: str, place: str, board: Board, reports: str) -> None:
    """The first process of a mount namespace: binds, as a container's, then clients, then it keeps the namespace."""
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_SLAVE, "")
    for what, where in ((tree, "tree"), (f"{tree}/files", "directory"), (f"{tree}/files/0", "file")):
        mount(what, f"{place}/{where}", "", MS_BIND, "")
    umount2(tree, MNT_DETACH)
    mount("none", os.path.dirname(os.path.dirname(tree)), "", MS_PRIVATE, "")  # it has a root of its own, as a container
    children = {}
    for client in clients:
        pid = os.fork()
        if pid == 0:
            _finish(lambda client=client: work(client, place, board, f"{reports}/{client.number}"))  # type: ignore[misc]
        children[pid] = client
    while not board.leave:
        if children:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            children.pop(pid, None)
        time.sleep(0.05)


def start_container(number: int, clients: Sequence[Client], tree: str, place: str, board: Board, reports: str) -> int:
    """:returns: pid of its first process"""
    for name in ("tree", "directory"):
        os.makedirs(f"{place}/{name}")
    with open(f"{place}/file", "wb"):
        pass
    pid = os.fork()
    if pid == 0:
        _finish(lambda: container(number, clients, tree, place, board, reports))
    return pid


def _finish(main: Callable[[], None]) -> None:
    """The end of a forked process: nothing of its parent's goes on in it."""
    code = 1
    try:
        for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(which, signal.SIG_DFL)
        main()
        code = 0
    except BaseException as error:
        os.write(2, f"client: {error!r}\n".encode(errors="replace"))
    finally:
        os._exit(code)
