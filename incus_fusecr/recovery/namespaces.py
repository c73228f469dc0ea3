# SPDX-License-Identifier: Apache-2.0
"""Every mount namespace that a process is in, and how a thread gets there and back.

Namespaces that only a bind mount, a descriptor or a single thread of a process keeps alive are not found.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from ..linux.fd import Fd
from ..linux.mount import MAX_MOUNTINFO, Mount, parse_mountinfo
from ..linux.mountapi import CLONE_FS
from ..linux.ns import CLONE_NEWNS, setns, unshare
from ..linux.statx import mount_id_at
from .plan import Device

T = TypeVar("T")
DEADLINE = 60.0  # seconds
STUCK = 0.05  # seconds
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)


class Namespace:
    """One mount namespace: ``number`` is the inode of its nsfs file, ``pids`` are who was in it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pids: list[str] = []

    def open(self, proc: Fd) -> Fd | None:
        """Its descriptor; None when all its processes left."""
        for pid in self.pids:
            try:
                number = os.open(f"{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc.fileno())
            except _GONE:
                continue
            fd = Fd(number, f"mount namespace {self.number}")
            if number_of(fd) == self.number:
                return fd
            fd.close()
        return None

    def busy(self, proc: Fd) -> set[int]:
        """Ids of the mounts that its processes have as working directory or root."""
        found = set()
        for pid in self.pids:
            for what in ("cwd", "root"):
                try:
                    found.add(mount_id_at(proc.fileno(), f"{pid}/{what}"))
                except OSError:  # it ended, or is a kernel thread
                    continue
        return found


def number_of(namespace: Fd) -> int:
    """What tells two namespaces apart."""
    return os.fstat(namespace.fileno()).st_ino


def discover(proc: Fd) -> dict[int, Namespace]:
    """All mount namespaces by number. Asks nothing but procfs."""
    found: dict[int, Namespace] = {}
    for pid in os.listdir(proc.fileno()):
        if not pid.isdigit():
            continue
        try:
            number = int(os.readlink(f"{pid}/ns/mnt", dir_fd=proc.fileno())[5:-1])  # mnt:[4026531841]
        except _GONE:
            continue
        found.setdefault(number, Namespace(number)).pids.append(pid)
    return found


class Traveller:
    """Lets one thread visit mount namespaces, with its working directory in the procfs of the caller.

    After the first visit the thread must not open anything by a path of its own: imports and tracebacks read files.

    :param proc: the caller's /proc, see :func:`open_proc`
    :param home: where the thread returns to
    """

    def __init__(self, proc: Fd, home: Fd) -> None:
        self._proc, self._home = proc, home
        self._at = -1

    def __enter__(self) -> Traveller:
        unshare(CLONE_FS)
        self._home_cwd = os.open(".", os.O_PATH | os.O_CLOEXEC)
        return self

    def go(self, namespace: Fd) -> None:
        """setns(2), unless the thread is there already."""
        number = number_of(namespace)
        if number != self._at:
            setns(namespace.fileno(), CLONE_NEWNS)
            self._at = number
            os.fchdir(self._proc.fileno())

    def mountinfo(self) -> bytes:
        """Of the namespace that the thread is in, from its root: that of a process may be a chroot's."""
        file = os.open("thread-self/mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc.fileno())
        try:
            parts = []
            size = 0
            while size < MAX_MOUNTINFO and (part := os.read(file, 1 << 20)):
                parts.append(part)
                size += len(part)
            return b"".join(parts)
        finally:
            os.close(file)

    def mounts(self) -> list[Mount]:
        """The same, parsed as a whole."""
        return parse_mountinfo(self.mountinfo())

    def root(self) -> Fd:
        """O_PATH descriptor of the root of the namespace that the thread is in."""
        return Fd(os.open("/", os.O_PATH | os.O_CLOEXEC), "/")

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        setns(self._home.fileno(), CLONE_NEWNS)
        os.fchdir(self._home_cwd)
        os.close(self._home_cwd)


def relevant(raw: bytes, devices: Iterable[Device]) -> list[Mount]:
    """The mounts of these devices, all that they hang on, all that hangs on them, and what could hide them.

    Tens of thousands of lines are read in one recovery: only those that matter are parsed.
    """
    wanted = {b"%d:%d" % pair for pair in devices}
    if not any(b" %s " % text in raw for text in wanted):
        return []
    lines: dict[bytes, bytes] = {}
    parents: dict[bytes, bytes] = {}
    places: dict[bytes, bytes] = {}
    keep: set[bytes] = set()
    for line in raw.splitlines():
        number, parent, device, _, place, _ = line.split(b" ", 5)
        lines[number], parents[number], places[number] = line, parent, place
        if device in wanted:
            keep.add(number)
    children: dict[bytes, list[bytes]] = {}
    for number, parent in parents.items():
        children.setdefault(parent, []).append(number)
    todo, seen = list(keep), set(keep)
    while todo:
        fresh = [number for number in children.get(todo.pop(), ()) if number not in seen]
        seen.update(fresh)
        todo += fresh
    for number in keep:
        above = parents[number]
        while above in lines and above not in seen:
            seen.add(above)
            above = parents[above]
    above_them = {directory for number in keep for directory in _directories(places[number])}
    seen.update(number for number, place in places.items() if place in above_them)
    return parse_mountinfo(b"\n".join(lines[number] for number in lines if number in seen))


def _directories(path: bytes) -> Iterator[bytes]:
    while (path := path[: path.rfind(b"/")]) and path != b"/":
        yield path


def each(
    items: Sequence[T],
    work: Callable[[Traveller, T], object],
    proc: Fd,
    threads: int,
    deadline: float = DEADLINE,
    stuck: float = STUCK,
) -> None:
    """``work(traveller, item)`` for all items in travelling threads; ends when all are done.

    One thread works: two would take the interpreter's lock from each other around every one of thousands of short system
    calls, which takes half as long again. Another joins in whenever nothing was done for a while, so that a container that
    holds up its thread holds up no other container.

    :param threads: at most
    :param deadline: seconds for all of it
    :param stuck: seconds without an item done until another thread joins in
    :raises BaseException: the first that a ``work`` raised; then not all items were worked on
    :raises TimeoutError: a thread hangs, as the last unmount of a file system may while it writes back. It ends when its
        connection is aborted; until then nothing that it uses may be closed.
    """
    end = time.monotonic() + deadline
    queue, lock, failures, done = iter(items), threading.Lock(), list[BaseException](), list[T]()
    home = Fd(os.open("thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc.fileno()), "own mount namespace")

    def run() -> None:
        try:
            with Traveller(proc, home) as traveller:
                while not failures:
                    with lock:
                        item = next(queue)
                    work(traveller, item)
                    done.append(item)
        except StopIteration:
            pass
        except BaseException as error:  # it is formatted by the caller: here a traceback would read a container's files
            failures.append(error)

    started: list[threading.Thread] = []
    before = 0
    while True:
        if len(done) == before and len(started) < min(threads, len(items)):
            started.append(threading.Thread(target=run, name=f"swap-{len(started)}", daemon=True))
            started[-1].start()
        before = len(done)
        working = next((thread for thread in started if thread.is_alive()), None)
        if working is None:
            break
        if time.monotonic() > end:
            raise TimeoutError(errno.ETIMEDOUT, "threads that work on mounts hang", f"{deadline:g} s")
        working.join(min(stuck, max(0.0, end - time.monotonic())))
    home.close()
    if failures:
        raise failures[0]


def visit(namespace: Fd, work: Callable[[], T], proc: Fd) -> T:
    """What ``work`` returns in a thread of its own in another mount namespace. :raises OSError: what it raised"""
    results: list[T] = []

    def there(traveller: Traveller, where: Fd) -> None:
        traveller.go(where)
        results.append(work())

    each([namespace], there, proc, 1)
    return results[0]


def open_proc() -> Fd:
    """The caller's /proc for all that is asked later, wherever a thread then is."""
    return Fd(os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), "/proc")
