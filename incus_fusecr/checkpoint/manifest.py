# SPDX-License-Identifier: Apache-2.0
"""The manifest: what a restore must give back, as ``fusecr.json`` in CRIU's image directory.

It arrives from another host, so it is read as hostile input: every field has a type and a bound, nothing else is taken.
Paths and names are bytes to the kernel; they stand here as surrogateescape strings.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import FusecrError
from ..fuse.wire import FUSE_ROOT_ID
from .cgroup import Delegated

FILE_NAME = "fusecr.json"
FORMAT = "incus-fusecr manifest"
VERSION = 1
KEY = "fusecr"

MAX_BYTES = 64 << 20
MAX_CONNECTIONS = 64
MAX_HANDLES = 65536
MAX_NODES = 200_000
MAX_TASKS = 65536
MAX_CGROUPS = 4096
MAX_CGROUP_FILES = 256
MAX_DEPTH = 32
NAME_MAX = 255
PATH_MAX = 4096

_ID = re.compile(r"[0-9a-f-]{1,64}")
_CGROUP_FILE = re.compile(r"[a-z0-9_]{1,32}(\.[A-Za-z0-9_]{1,48}){1,4}")
_FSTYPE = re.compile(r"fuse(\.[A-Za-z0-9_.+#-]{1,64})?")
_NUMERIC_OPTIONS = {"user_id", "group_id", "max_read", "blksize", "rootmode"}
_FLAG_OPTIONS = {"default_permissions", "allow_other"}
_MOUNT_OPTIONS = {
    "rw", "ro", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "sync", "dirsync", "noatime", "atime",
    "nodiratime", "diratime", "relatime", "strictatime", "nosymfollow", "lazytime", "idmapped",
}  # fmt: skip


class ManifestError(FusecrError):
    """The manifest of an image cannot be used."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"manifest {FILE_NAME} in the image directory",
            why,
            "the image is damaged, forged, or of another version of incus-fusecr",
        )


@dataclass(frozen=True)
class Node:
    """An inode as the daemon knows it: its number, generation and attributes (struct fuse_attr)."""

    nodeid: int
    generation: int
    attr: list[int]


@dataclass(frozen=True)
class Name:
    """A directory entry: ``name`` in ``parent`` is ``nodeid``."""

    parent: int
    name: str
    nodeid: int


@dataclass(frozen=True)
class Handle:
    """An open file: descriptor ``fd`` of task ``pid`` (in the container's pid namespace), or -1 for a file mapping."""

    pid: int
    fd: int
    nodeid: int
    fh: int
    flags: int
    open_flags: int
    path: str


@dataclass(frozen=True)
class Connection:
    """One FUSE connection: its mount, its daemon, what its kernel side knew."""

    key: str
    number: int
    daemons: list[int]
    mountpoint: str
    fstype: str
    source: str
    mount_options: str
    super_options: str
    init_reply: str
    pointer_nodeids: bool
    statfs: list[int]
    nodes: list[Node]
    names: list[Name]
    handles: list[Handle]


@dataclass(frozen=True)
class Manifest:
    """All connections of a container, and the order in which its tasks go on.

    ``first`` are daemons and what they depend on, in order; ``stopped`` were stopped by their users before the dump and
    stay so. ``cgroups`` are the container's own and all below it: CRIU re-creates only those with tasks, but an init watches
    empty ones. ``migration`` is the id of the migration whose gate a restore has to pass, or empty.
    """

    product: str
    connections: list[Connection]
    first: list[int]
    tasks: list[int]
    stopped: list[int]
    cgroups: list[Delegated]
    migration: str = ""
    format: str = FORMAT
    version: int = VERSION

    def dump(self) -> bytes:
        """As bytes of ``fusecr.json``."""
        return json.dumps(asdict(self)).encode()

    def write(self, dirfd: int) -> None:
        """Write into an image directory, whole or not at all."""
        temporary = FILE_NAME + ".new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dirfd)
        with open(fd, "wb") as file:
            file.write(self.dump())
        os.rename(temporary, FILE_NAME, src_dir_fd=dirfd, dst_dir_fd=dirfd)


def read(dirfd: int) -> Manifest | None:
    """The manifest of an image directory, None if there is none.

    :raises ManifestError: it is not valid
    """
    try:
        fd = os.open(FILE_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=dirfd)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ManifestError(f"cannot be opened: {error.strerror}") from None
    with open(fd, "rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise ManifestError(f"is larger than {MAX_BYTES} bytes")
        return parse(file.read(MAX_BYTES + 1))


class _Reader:
    """A JSON object whose fields are taken one by one with type and bound."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ManifestError(f"{where} is not an object")
        self.value: dict[str, Any] = value
        self.where = where

    def _get(self, key: str) -> Any:
        if key not in self.value:
            raise ManifestError(f"{self.where}.{key} is missing")
        return self.value[key]

    def number(self, key: str, low: int = 0, high: int = (1 << 64) - 1) -> int:
        return _number(self._get(key), f"{self.where}.{key}", low, high)

    def numbers(self, key: str, most: int, high: int = (1 << 64) - 1, exactly: int | None = None) -> list[int]:
        items = self.items(key, most)
        if exactly is not None and len(items) != exactly:
            raise ManifestError(f"{self.where}.{key} has {len(items)} numbers, not {exactly}")
        return [_number(n, f"{self.where}.{key}", 0, high) for n in items]

    def flag(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            raise ManifestError(f"{self.where}.{key} is not true or false")
        return value

    def text(self, key: str, most: int = PATH_MAX, pattern: re.Pattern[str] | None = None) -> str:
        value = self._get(key)
        if not isinstance(value, str) or "\0" in value:
            raise ManifestError(f"{self.where}.{key} is not text")
        try:
            size = len(os.fsencode(value))
        except UnicodeEncodeError:
            raise ManifestError(f"{self.where}.{key} is not text of a file name") from None
        if size > most or (pattern is not None and not pattern.fullmatch(value)):
            raise ManifestError(f"{self.where}.{key} is out of bounds")
        return value

    def items(self, key: str, most: int) -> list[Any]:
        value = self._get(key)
        if not isinstance(value, list) or len(value) > most:
            raise ManifestError(f"{self.where}.{key} is not a list of at most {most}")
        return value


def _number(value: Any, where: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ManifestError(f"{where} is not a number from {low} to {high}")
    return value


def _cgroups(top: _Reader) -> list[Delegated]:
    found = []
    for item in top.items("cgroups", MAX_CGROUPS):
        r = _Reader(item, "cgroups")
        path = r.text("path")
        parts = path.split("/")
        if len(parts) > MAX_DEPTH or (path != "." and any(p in ("", ".", "..") or len(p) > NAME_MAX for p in parts)):
            raise ManifestError("cgroups has a path that cannot be")
        files = r.items("files", MAX_CGROUP_FILES)
        if not all(isinstance(name, str) and _CGROUP_FILE.fullmatch(name) for name in files):
            raise ManifestError("cgroups names a file that cannot be")
        mode, uid, gid = r.number("mode", 0, 0o777), r.number("uid", 0, _U32), r.number("gid", 0, _U32)
        found.append(Delegated(path, mode, uid, gid, files))
    return found


_U32 = (1 << 32) - 1
_PID_MAX = 1 << 22


def parse(data: bytes) -> Manifest:
    """Validate.

    :raises ManifestError: with the field and what is wrong with it
    """
    if len(data) > MAX_BYTES:
        raise ManifestError(f"is larger than {MAX_BYTES} bytes")
    try:
        top = _Reader(json.loads(data), "manifest")
    except (ValueError, RecursionError):
        raise ManifestError("is not JSON (truncated?)") from None
    if top.text("format", 64) != FORMAT:
        raise ManifestError("is of another format")
    version = top.number("version")
    if version != VERSION:
        raise ManifestError(f"has version {version}, this agent reads version {VERSION}")
    connections = [
        _connection(_Reader(item, f"connections[{i}]"), i) for i, item in enumerate(top.items("connections", MAX_CONNECTIONS))
    ]
    if len({c.number for c in connections}) != len(connections):
        raise ManifestError("a connection number stands twice")
    tasks = top.numbers("tasks", MAX_TASKS, _PID_MAX)
    known = set(tasks)
    first = top.numbers("first", MAX_TASKS, _PID_MAX)
    stopped = top.numbers("stopped", MAX_TASKS, _PID_MAX)
    for pid in first + stopped + [p for c in connections for p in c.daemons + [h.pid for h in c.handles]]:
        if pid not in known:
            raise ManifestError(f"task {pid} is used but not listed")
    migration = top.text("migration", 64)
    if migration and not _ID.fullmatch(migration):
        raise ManifestError("migration is not an id")
    return Manifest(
        product=top.text("product", 64),
        connections=connections,
        first=first,
        tasks=tasks,
        stopped=stopped,
        cgroups=_cgroups(top),
        migration=migration,
    )


def _connection(r: _Reader, index: int) -> Connection:
    nodes = [
        Node(n.number("nodeid", 1), n.number("generation"), n.numbers("attr", 16, exactly=16))
        for n in (_Reader(x, f"{r.where}.nodes") for x in r.items("nodes", MAX_NODES))
    ]
    known = {n.nodeid for n in nodes}
    if FUSE_ROOT_ID not in known:
        raise ManifestError(f"{r.where}.nodes lacks the root")
    for node in nodes:
        if any(value > _U32 for value in node.attr[6:]):
            raise ManifestError(f"{r.where}.nodes: an attribute is out of bounds")
    names = [
        Name(n.number("parent", 1), n.text("name", NAME_MAX), n.number("nodeid", 1))
        for n in (_Reader(x, f"{r.where}.names") for x in r.items("names", MAX_NODES))
    ]
    for name in names:
        if name.name in ("", ".", "..") or "/" in name.name or not {name.parent, name.nodeid} <= known:
            raise ManifestError(f"{r.where}.names has an entry that cannot be")
    handles = [
        Handle(
            pid=h.number("pid", 1, _PID_MAX),
            fd=h.number("fd", -1, 1 << 30),
            nodeid=h.number("nodeid", 1),
            fh=h.number("fh"),
            flags=h.number("flags", 0, _U32),
            open_flags=h.number("open_flags", 0, _U32),
            path=h.text("path"),
        )
        for h in (_Reader(x, f"{r.where}.handles") for x in r.items("handles", MAX_HANDLES))
    ]
    if any(h.nodeid not in known for h in handles):
        raise ManifestError(f"{r.where}.handles names an unknown node")
    init = r.text("init_reply", 256)
    if not re.fullmatch(r"([0-9a-f]{2}){8,64}", init):
        raise ManifestError(f"{r.where}.init_reply is not a FUSE_INIT reply")
    mounted = _mounted(r)
    key = r.text("key", 32)
    if key != f"{KEY}{index}":
        raise ManifestError(f"{r.where}.key is not {KEY}{index}")
    return Connection(
        key=key,
        number=r.number("number", 0, _U32),
        daemons=r.numbers("daemons", MAX_TASKS, _PID_MAX),
        **mounted,
        init_reply=init,
        pointer_nodeids=r.flag("pointer_nodeids"),
        statfs=r.numbers("statfs", 8, exactly=8),
        nodes=nodes,
        names=names,
        handles=handles,
    )


def _mounted(r: _Reader) -> dict[str, str]:
    mountpoint = r.text("mountpoint")
    if not mountpoint.startswith("/") or mountpoint == "/":
        raise ManifestError(f"{r.where}.mountpoint is not below the root")
    return {
        "mountpoint": mountpoint,
        "fstype": r.text("fstype", 80, _FSTYPE),
        "source": r.text("source"),
        "mount_options": _options(r, "mount_options", _MOUNT_OPTIONS, frozenset()),
        "super_options": _options(r, "super_options", _MOUNT_OPTIONS | _FLAG_OPTIONS, frozenset(_NUMERIC_OPTIONS)),
    }


def fault_of_mount(mounted: dict[str, str]) -> str:
    """Why a mount could not be restored from a manifest; empty if it could.

    :param mounted: mountpoint, fstype, source, mount_options, super_options
    """
    try:
        _mounted(_Reader(mounted, "mount"))
    except ManifestError as error:
        return error.why
    return ""


def fault_of(connection: Connection) -> str:
    """Why a connection could not be restored from a manifest; empty if it could."""
    try:
        _connection(_Reader(asdict(connection), "connection"), int(connection.key.removeprefix(KEY)))
    except ManifestError as error:
        return error.why
    return ""


def _options(r: _Reader, key: str, flags: set[str], numeric: frozenset[str]) -> str:
    """Mount options by an allow-list: they are passed to mount(2), where ``fd=`` or ``rootcontext=`` must not slip in."""
    text = r.text(key)
    for option in filter(None, text.split(",")):
        name, equals, value = option.partition("=")
        if not (option in flags if not equals else name in numeric and re.fullmatch(r"[0-9]{1,10}", value)):
            raise ManifestError(f"{r.where}.{key}: option {name[:64]!r} is not known")
    return text
