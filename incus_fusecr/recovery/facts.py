# SPDX-License-Identifier: Apache-2.0
"""All that starts a container's daemon a second time, in a file of the host's root: the daemon itself is dead by then.

All of it comes from the container, and goes back into it with the rights that it had there.
"""

from __future__ import annotations

import base64
import dataclasses
import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..fuse.probe_facts import NAMESPACES, Daemon, cgroup_directories, named_device_fds, read_daemon
from ..linux import ns, proc
from ..linux.caps import CapSets
from ..linux.fd import Fd
from ..linux.mountapi import open_in_root
from ..linux.statx import mount_id_at

RUN = "/run/incus-fusecr"
MAX_FILE = 8 << 20  # bytes
_OF_ITS_MANAGER = (b"NOTIFY_SOCKET=", b"LISTEN_", b"WATCHDOG_")
NONEMPTY = (b"-o", b"nonempty")
LIBFUSE2 = "libfuse.so.2"
_BYTES = ("argv", "environ", "filters", "directories")


class Unfit(Exception):
    """No copy of this daemon could take its place; the text says why."""


@dataclass(frozen=True)
class Facts:
    """A daemon of a container.

    :ivar daemon: as it was when it was met; its ``pid`` means nothing any more
    :ivar instance: liblxc's name of the container
    :ivar init: pid and start time of the container's init
    :ivar name: of the daemon in the configuration
    :ivar covers: it has to be told that it mounts on what is not empty: libfuse 2 refuses that, libfuse 3 knows no such option
    """

    daemon: Daemon
    instance: str
    init: tuple[int, int]
    mountpoint: str
    name: str
    covers: bool = False

    def fresh(self) -> Daemon:
        """As it is started next to the mount of the dead one, which is still there."""
        daemon = self.there()
        return dataclasses.replace(daemon, argv=[*daemon.argv, *NONEMPTY]) if self.covers else daemon

    def there(self) -> Daemon:
        """The same as its copy needs it: all is entered by way of the container's init, and cgroups that are gone are its."""
        pid = self.init[0]
        pairs = zip(self.daemon.cgroups, cgroup_directories(pid), strict=False)
        cgroups = [path if os.path.isdir(path) else mine for path, mine in pairs]
        return dataclasses.replace(self.daemon, pid=pid, cgroups=cgroups)

    def open_init(self) -> int:
        """A pidfd. :raises ProcessLookupError: the container has ended"""
        pid, start = self.init
        pidfd = os.pidfd_open(pid)
        if proc.start_time(pid) != start or proc.dying(pid):
            os.close(pidfd)
            raise ProcessLookupError(errno.ESRCH, "the container has ended", self.instance)
        return pidfd

    def open_exe(self) -> int:
        """O_PATH descriptor of its program as it is on disk now. May wait for a file system of the container."""
        with Fd(os.open(f"/proc/{self.init[0]}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), "root") as root:
            return open_in_root(root, self.daemon.exe).release()

    def save(self, path: str) -> None:
        """In one step; readable by root alone."""
        raw = dataclasses.asdict(self)
        daemon = raw["daemon"]
        for key in _BYTES:
            daemon[key] = [base64.b64encode(part).decode() for part in daemon[key]]
        daemon["connections"] = sorted(daemon["connections"])
        temporary = f"{path}.new"
        with open(temporary, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            json.dump(raw, file)
        os.rename(temporary, path)


def path_of(unit: str) -> str:
    """Where the facts of a unit's daemon are."""
    return f"{RUN}/facts-{unit}.json"


def load(path: str) -> Facts:
    """
    :raises OSError, ValueError, KeyError, TypeError: there is none, or it is none of ours
    """
    raw: dict[str, Any] = json.loads(proc.read_text(path, MAX_FILE))
    daemon = dict(raw["daemon"])
    for key in _BYTES:
        daemon[key] = [base64.b64decode(part) for part in daemon[key]]
    for key in ("uids", "gids"):
        daemon[key] = tuple(daemon[key])
    daemon["limits"] = [tuple(limit) for limit in daemon["limits"]]
    daemon["caps"] = CapSets(**daemon["caps"])
    daemon["connections"] = frozenset(daemon["connections"])
    pid, start = raw["init"]
    place = str(raw["instance"]), (int(pid), int(start)), str(raw["mountpoint"])
    return Facts(Daemon(**daemon), *place, str(raw["name"]), bool(raw["covers"]))


def userns(path: str) -> Fd:
    """The user namespace of the container of these facts.

    :raises OSError: it has ended
    """
    try:
        found = load(path)
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(errno.EINVAL, f"no facts of ours: {error!r}", path) from None
    with Fd(found.open_init(), "init"):
        return Fd(os.open(f"/proc/{found.init[0]}/ns/user", os.O_RDONLY | os.O_CLOEXEC), "user namespace")


def read(pid: int, instance: str, init: tuple[int, int], mountpoint: str, connection: int, name: str) -> Facts:
    """Of a living daemon; stops it for less than a millisecond if it has seccomp filters. May wait for it: for children only.

    :raises Unfit: no copy could take its place
    :raises FusecrError, OSError: it has ended, or is frozen
    """
    for kind in NAMESPACES:
        if ns.ns_id(pid, kind) != ns.ns_id(init[0], kind):
            raise Unfit(f"its {kind} namespace is not the container's")
    if not _same_root(pid, init[0]):
        raise Unfit("its root directory is not the container's")
    daemon = read_daemon(pid, frozenset((connection,)))
    if len(daemon.connections) > 1:
        raise Unfit(f"it serves {len(daemon.connections)} mounts, and a copy would mount all of them")
    if named_device_fds(daemon):
        raise Unfit("it was given its /dev/fuse by who mounted it (/dev/fd/N)")
    if why := unfit_words(daemon.argv, mountpoint, daemon.directories):
        raise Unfit(why)
    environ = [word for word in daemon.environ if not word.startswith(_OF_ITS_MANAGER)]
    covers = not any(b"nonempty" in word for word in daemon.argv) and any(
        os.path.basename(mapping.path).startswith(LIBFUSE2) for mapping in proc.file_mappings(pid)
    )
    return Facts(dataclasses.replace(daemon, environ=environ), instance, init, mountpoint, name, covers)


def unfit_words(argv: Sequence[bytes], mountpoint: str, directories: Sequence[bytes]) -> str:
    """Why a daemon with this command line could not be started a second time; empty if it may be."""
    if any(b"auto_unmount" in word for word in argv):
        return "its helper unmounts when it dies (auto_unmount)"
    inside = [word for word in argv[1:] if _is_inside(word, mountpoint, directories)]
    if len(inside) > 1:
        return "it serves what lies below its own mount, which a copy would not find there"
    return ""


def _is_inside(word: bytes, mountpoint: str, directories: Sequence[bytes]) -> bool:
    place = os.fsencode(mountpoint)
    paths = {os.path.normpath(os.path.join(directory, word)) for directory in (*directories, b"/")} if word[:1] != b"-" else set()
    return any(path == place or path.startswith(place.rstrip(b"/") + b"/") for path in paths)


def _same_root(one: int, other: int) -> bool:
    proc_fd = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        same = mount_id_at(proc_fd, f"{one}/root") == mount_id_at(proc_fd, f"{other}/root")
    finally:
        os.close(proc_fd)
    return same and os.readlink(f"/proc/{one}/root") == os.readlink(f"/proc/{other}/root")
