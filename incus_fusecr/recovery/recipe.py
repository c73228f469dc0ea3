# SPDX-License-Identifier: Apache-2.0
"""How a daemon is started a second time: read from /proc of the living one, kept as JSON, turned into command lines.

Daemons of the host are in the agent's own namespaces but for the mount namespace, and run with the rights of its root. Those of
containers are started by what is in their file of facts (facts.py).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..linux import proc

MOUNT_WORD = "@MOUNT@"
FRESH = "/run/incus-fusecr/fresh"  # mountpoints of fresh daemons, in the agent's own mount namespace
MAX_STRINGS = 16 << 10  # bytes of argv, and of the environment: both go into one entry of the holder
SIDECAR_MOUNT = "/dev/fd/@FD@"  # see guard/client.py
LXCFS = "lxcfs"
# A sidecar in a container. -I and -S: neither the environment nor site-packages decide what root of the host runs.
INSIDE = ["-I", "-S", "-c", "import sys; sys.path.append(sys.argv[1]); from incus_fusecr.recovery.sidecar import main; main()"]
_PARENT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@dataclass(frozen=True)
class Recipe:
    """``argv`` has :data:`MOUNT_WORD` where the mountpoint was; ids and umask as in /proc/PID/status.

    :ivar facts: file of facts of a daemon in a container; then ``exe`` alone means something beside it, to who reads it
    """

    exe: str
    argv: tuple[str, ...]
    environ: tuple[str, ...] = ()
    cwd: str = "/"
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    umask: int = 0o22
    facts: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Recipe:
        """:raises KeyError, TypeError, ValueError: it is none"""
        lists = {key: tuple(map(str, raw[key])) for key in ("argv", "environ")}
        groups = tuple(map(int, raw["groups"]))
        ids = {key: int(raw[key]) for key in ("uid", "gid", "umask")}
        facts = str(raw.get("facts", ""))
        return cls(str(raw["exe"]), lists["argv"], lists["environ"], str(raw["cwd"]), groups=groups, facts=facts, **ids)

    def with_exe(self, path: str) -> Recipe:
        """The same with another executable; it is still called as the first one was."""
        return replace(self, exe=path)

    @property
    def is_lxcfs(self) -> bool:
        """By the name that it is called by, or its executable's: an upgrade's may be lxcfs-6.0.5."""
        return any(os.path.basename(word).startswith(LXCFS) for word in (self.exe, *self.argv[:1]))

    def command(self, mountpoint: str, pidfile: str) -> list[str]:
        """argv for this mountpoint."""
        words = [mountpoint if word == MOUNT_WORD else word for word in self.argv]
        return with_pidfile(words, pidfile) if self.is_lxcfs else words

    def sidecar(self, pidfile: str, connection: int = 0) -> list[str]:
        """A command for the guard, which runs it with its own environment and ids.

        :param connection: that it is to serve
        """
        if self.facts:
            return [sys.executable, *INSIDE, _PARENT, self.facts, str(connection), "@FD@"]
        words = [self.exe, *self.command(SIDECAR_MOUNT, pidfile)[1:]]
        if self.uid or self.gid or self.groups:
            groups = ["--groups", ",".join(map(str, self.groups))] if self.groups else ["--clear-groups"]
            words = ["setpriv", "--reuid", str(self.uid), "--regid", str(self.gid), *groups, "--", *words]
        return ["/usr/bin/env", "-C", self.cwd, "-i", *self.environ, *words]


def of_sidecar(words: Sequence[str]) -> Recipe:
    """What :meth:`Recipe.sidecar` was made of, but for ids.

    :raises ValueError: it is no such command
    """
    if list(words[1 : len(INSIDE) + 1]) == INSIDE and len(words) == len(INSIDE) + 5:
        return Recipe("", (), facts=words[-3])
    if list(words[:2]) != ["/usr/bin/env", "-C"] or words[3:4] != ["-i"]:
        raise ValueError(f"no command of ours: {words[:4]}")
    end = next((i for i in range(4, len(words)) if "=" not in words[i]), len(words))
    command = [MOUNT_WORD if word == SIDECAR_MOUNT else word for word in words[end:]]
    if command[:1] == ["setpriv"]:
        command = command[command.index("--") + 1 :]
    if not command:
        raise ValueError("no command")
    return Recipe(command[0], tuple(command), tuple(words[4:end]), words[2])


def with_pidfile(words: Sequence[str], pidfile: str) -> list[str]:
    """lxcfs locks its pid file: each has one of its own."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in ("-p", "--pidfile"):
            skip = True
        elif not re.match(r"-p.|--pidfile=", word):
            kept.append(word)
    return [kept[0], "-p", pidfile, *kept[1:]]


def read(pid: int, mountpoint: str) -> Recipe:
    """Of a living daemon.

    :raises OSError: it has ended
    :raises ValueError: no copy of it can be started, with the reason
    """
    argv = _strings(f"/proc/{pid}/cmdline")
    environ = _strings(f"/proc/{pid}/environ")
    status = proc.status(pid)
    exe = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    cwd = os.readlink(f"/proc/{pid}/cwd")
    return Recipe(
        exe,
        tuple(marked(argv, mountpoint, cwd)),
        tuple(word for word in environ if "=" in word and not word.startswith(("NOTIFY_SOCKET=", "LISTEN_", "WATCHDOG_"))),
        cwd if cwd.startswith("/") and not cwd.endswith(" (deleted)") else "/",
        int(status["Uid"].split()[1]),
        int(status["Gid"].split()[1]),
        tuple(int(word) for word in status["Groups"].split()),
        int(status["Umask"], 8),
    )


def marked(argv: Sequence[str], mountpoint: str, cwd: str) -> list[str]:
    """``argv`` with :data:`MOUNT_WORD` for the last word that is the mountpoint, or one that the agent had made.

    :raises ValueError: there is none
    """
    for index in range(len(argv) - 1, 0, -1):
        path = os.path.normpath(os.path.join(cwd, argv[index]))
        if path == mountpoint or path.startswith(FRESH + "/"):
            return [*argv[:index], MOUNT_WORD, *argv[index + 1 :]]
    raise ValueError(f"its command line does not name {mountpoint}")


def _strings(path: str) -> list[str]:
    raw = proc.read_text(path, MAX_STRINGS + 1)
    if len(raw) > MAX_STRINGS:
        raise ValueError(f"{path} is longer than {MAX_STRINGS} bytes")
    parts = raw.split("\0")
    return parts[:-1] if parts and not parts[-1] else parts
