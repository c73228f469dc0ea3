# SPDX-License-Identifier: Apache-2.0
"""Which daemons are protected, and how: ``/etc/incus-fusecr/daemons.conf`` and ``/etc/incus-fusecr/daemons.d/*.conf``.

Without any file lxcfs is protected. A later file changes single keys of a daemon that an earlier one named.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from . import ini
from .ini import ConfigError, Section, Value

PATH = "/etc/incus-fusecr/daemons.conf"
DIRECTORY = "/etc/incus-fusecr/daemons.d"
MAX_SECONDS = 86400.0
MAX_COUNT = 1000

Standby = Literal["warm", "cold"]
Unserved = Literal["wait", "fail"]
Durability = Literal["strict", "relaxed"]
Where = Literal["host", "containers", "everywhere"]
MAX_PATTERNS = 100


@dataclass(frozen=True)
class Match:
    """What tells a daemon: all of them that are not empty have to fit.

    :ivar exe: the file name of its executable
    :ivar fstype: as mountinfo shows it, e.g. ``fuse.lxcfs``
    :ivar mountpoint: where the host has mounted it
    """

    exe: str = ""
    fstype: str = ""
    mountpoint: str = ""

    def fits(self, *, exe: str, fstype: str, mountpoint: str) -> bool:
        """Whether a daemon is meant.

        :param exe: the path behind /proc/PID/exe; of a file that was replaced it ends in " (deleted)"
        """
        name = os.path.basename(exe.removesuffix(" (deleted)"))
        pairs = ((self.exe, name), (self.fstype, fstype), (self.mountpoint, mountpoint))
        return any(wanted for wanted, _ in pairs) and all(wanted in ("", found) for wanted, found in pairs)


@dataclass(frozen=True)
class Limits:
    """How often a daemon is started anew, see policy.py; seconds.

    :ivar burst: so many starts within ``interval`` are let through
    :ivar backoff: pause before a start that follows a failed one, doubled each time up to ``backoff_max``
    :ivar breaker: so many failed starts one after another, and none is tried for ``cooldown``
    """

    burst: int = 10
    interval: float = 10.0
    backoff: float = 0.1
    backoff_max: float = 10.0
    breaker: int = 10
    cooldown: float = 60.0


@dataclass(frozen=True)
class Daemon:
    """One protected daemon.

    :ivar where: daemons of the ``host``, of ``containers``, or ``everywhere``
    :ivar instances: of containers those whose name is like one of these, as in a shell; ``PROJECT_NAME`` in projects
    :ivar standby: ``warm``: its sidecar and the fresh daemon run beforehand; ``cold``: they are started at its death. In a
        container ``warm`` means the sidecar alone
    :ivar attempts: so many daemons may die of one request; then it is answered with EIO
    :ivar unserved: what a request meets while nothing can serve it: ``wait``, or ``fail`` (EIO)
    :ivar deadline: seconds without service after which requests fail with ENOTCONN, or the connection is aborted where no guard
        runs, so that no task stays in D; divided by ``attempts``, how long a sidecar may be silent; 0: never
    :ivar durability: ``strict``: what was acknowledged and not yet synced at a death is told with EIO at the next fsync;
        ``relaxed``: the next fsync goes to the new daemon, which knows of nothing
    :ivar warmup: file that a fresh daemon is asked for before it gets any mount, see warmup.py; empty: none
    :ivar preload: directories whose entries are always the same, for acquaint.py
    """

    name: str
    match: Match
    protect: bool = True
    where: Where = "host"
    instances: tuple[str, ...] = ("*",)
    standby: Standby = "cold"
    limits: Limits = field(default_factory=Limits)
    attempts: int = 3
    unserved: Unserved = "wait"
    deadline: float = 60.0
    durability: Durability = "strict"
    warmup: str = ""
    preload: tuple[str, ...] = ()

    @property
    def on_host(self) -> bool:
        return self.where != "containers"

    def in_container(self, name: str) -> bool:
        """Whether daemons of the container with liblxc's name ``name`` are meant."""
        return self.where != "host" and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.instances)


@dataclass(frozen=True)
class Config:
    """All daemons that are known, in the order of their names; those with ``protect = no`` are among them."""

    daemons: tuple[Daemon, ...]
    files: tuple[str, ...] = ()

    def get(self, name: str) -> Daemon | None:
        return next((d for d in self.daemons if d.name == name), None)

    def find(self, *, exe: str, fstype: str, mountpoint: str, instance: str = "") -> Daemon | None:
        """The protected daemon that these facts tell; with several, the one that asks for the most.

        :param instance: the container that it is in, by liblxc's name; empty: it is the host's
        """
        there = [d for d in self.daemons if d.protect and (d.in_container(instance) if instance else d.on_host)]
        fitting = [d for d in there if d.match.fits(exe=exe, fstype=fstype, mountpoint=mountpoint)]
        return max(fitting, key=lambda d: sum(map(bool, (d.match.exe, d.match.fstype, d.match.mountpoint))), default=None)


# Its files hold nothing that could be lost, and every container waits for it. Its mountpoint is not everywhere the same.
# Starting one costs milliseconds, so many may be started at a time.
LXCFS = Daemon(
    "lxcfs", Match(fstype="fuse.lxcfs"), standby="warm", limits=Limits(burst=200), durability="relaxed", warmup="proc/meminfo",
    preload=("proc", "sys/devices/system/cpu"),
)  # fmt: skip
BUILT_IN = (LXCFS,)


# -- values

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,62}[a-z0-9])?")
_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|min|h|)")
_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "min": 60.0, "h": 3600.0}
_YES = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}
_FSTYPE = re.compile(r"fuse(blk)?(\.[A-Za-z0-9_.+-]{1,64})?")


def _span(text: str) -> float:
    match = _SPAN.fullmatch(text)
    if match is None:
        if re.fullmatch(r"[0-9.]+\s*[A-Za-z]+", text):
            raise ValueError(f"{text!r} has a unit that is none of ms, s, min, h")
        raise ValueError(f"{text!r} is no time span; write 500ms, 10s, 2min or 1h")
    seconds = float(match[1]) * _UNITS[match[2]]
    if not math.isfinite(seconds) or seconds > MAX_SECONDS:
        raise ValueError(f"{text!r} is longer than a day")
    return seconds


def _positive(text: str) -> float:
    seconds = _span(text)
    if not seconds:
        raise ValueError("0 is too short")
    return seconds


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= MAX_COUNT:
        raise ValueError(f"{text!r} is no number from 1 to {MAX_COUNT}")
    return int(text)


def _yes_or_no(text: str) -> bool:
    if text.lower() not in _YES:
        raise ValueError(f"{text!r} is neither yes nor no")
    return _YES[text.lower()]


def _one_of(*words: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is neither {' nor '.join(words)}")
        return text

    return check


def _exe(text: str) -> str:
    if text and ("/" in text or not text.isprintable() or len(text) > 255):
        raise ValueError(f"{text!r} is no file name; the last part of the path is what counts")
    return text


def _fstype(text: str) -> str:
    if text and not _FSTYPE.fullmatch(text):
        raise ValueError(f"{text!r} is no FUSE file system; it is called fuse.SOMETHING in /proc/self/mountinfo")
    return text


def _mountpoint(text: str) -> str:
    if text and (not text.startswith("/") or os.path.normpath(text) != text or text.startswith("//")):
        raise ValueError(f"{text!r} is no absolute path without . , .. and a slash at its end")
    return text


def _instances(text: str) -> tuple[str, ...]:
    patterns = tuple(text.split())
    if not patterns or len(patterns) > MAX_PATTERNS:
        raise ValueError(f"{text!r} names no instance, or more than {MAX_PATTERNS}; * means all")
    wrong = next((word for word in patterns if not re.fullmatch(r"[A-Za-z0-9_.*?\[\]!-]{1,200}", word)), None)
    if wrong is not None:
        raise ValueError(f"{wrong!r} is like no instance's name; separate them by spaces, * and ? stand for what is not known")
    return patterns


# key: where it goes (the part of Daemon, its field), and what reads it
_KEYS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "protect": ("", "protect", _yes_or_no),
    "exe": ("match", "exe", _exe),
    "fstype": ("match", "fstype", _fstype),
    "mountpoint": ("match", "mountpoint", _mountpoint),
    "where": ("", "where", _one_of("host", "containers", "everywhere")),
    "instances": ("", "instances", _instances),
    "standby": ("", "standby", _one_of("warm", "cold")),
    "restart-burst": ("limits", "burst", _count),
    "restart-interval": ("limits", "interval", _positive),
    "backoff": ("limits", "backoff", _span),
    "backoff-max": ("limits", "backoff_max", _span),
    "breaker-failures": ("limits", "breaker", _count),
    "breaker-cooldown": ("limits", "cooldown", _positive),
    "attempts": ("", "attempts", _count),
    "unserved": ("", "unserved", _one_of("wait", "fail")),
    "deadline": ("", "deadline", _span),
    "durability": ("", "durability", _one_of("strict", "relaxed")),
}


def _name_of(section: Section) -> str:
    kind, _, name = section.title.partition(" ")
    if kind != "daemon" or not name:
        raise section.place.error(f"[{section.title}]: only sections [daemon NAME] are known")
    if not _NAME.fullmatch(name):
        raise section.place.error(f"{name!r} is no name: up to 64 of a-z 0-9 . - are allowed, a letter or digit at both ends")
    return name


def _apply(daemon: Daemon, section: Section) -> Daemon:
    parts: dict[str, dict[str, Any]] = {"": {}, "match": {}, "limits": {}}
    for key, value in section.values.items():
        part, name, converted = _read(key, value)
        parts[part][name] = converted
    match, limits = replace(daemon.match, **parts["match"]), replace(daemon.limits, **parts["limits"])
    return replace(daemon, match=match, limits=limits, **parts[""])


def _read(key: str, value: Value) -> tuple[str, str, Any]:
    if key not in _KEYS:
        near = difflib.get_close_matches(key, _KEYS, 1)
        raise value.place.error(f"unknown key {key}" + (f"; {near[0]} is meant?" if near else f"; known: {', '.join(_KEYS)}"))
    part, name, convert = _KEYS[key]
    try:
        return part, name, convert(value.text)
    except ValueError as error:
        raise value.place.error(f"{key}: {error}") from None


def build(sections: Iterable[Section], files: Iterable[str] = ()) -> Config:
    """Pure: the daemons that these sections make, over :data:`BUILT_IN`.

    :raises ConfigError: with FILE:LINE and the reason
    """
    daemons = {daemon.name: daemon for daemon in BUILT_IN}
    places = {}
    for section in sections:
        name = _name_of(section)
        daemon = _apply(daemons.get(name) or Daemon(name, Match()), section)
        daemons[name] = daemon
        places[name] = section.place
        if daemon.where == "host" and "instances" in section.values:
            raise section.values["instances"].place.error("instances: means nothing without where = containers, or everywhere")
        if daemon.limits.backoff_max < daemon.limits.backoff:
            key = next((k for k in ("backoff-max", "backoff") if k in section.values), "")
            place = section.values[key].place if key else section.place
            raise place.error(f"{key}: backoff-max is shorter than backoff")
    for name, place in places.items():
        if daemons[name].match == Match():
            raise place.error(f"daemon {name} has none of exe, fstype, mountpoint: nothing would fit")
    seen: dict[tuple[Match, str], str] = {}
    for name, daemon in sorted(daemons.items()):
        sides = [""] if daemon.on_host else []
        sides += daemon.instances if daemon.where != "host" else ()
        for side in sides if daemon.protect else ():
            if (other := seen.setdefault((daemon.match, side), name)) != name:
                raise places.get(name, places.get(other, ini.Place(PATH))).error(f"daemons {other} and {name} have the same match")
    return Config(tuple(daemons[name] for name in sorted(daemons)), tuple(files))


def load(path: str = PATH, directory: str = DIRECTORY) -> Config:
    """Read the files.

    :raises ConfigError: with FILE:LINE and the reason
    """
    found = ini.files(path, directory)
    return build(ini.read(found), found)


__all__ = ["Config", "ConfigError", "Daemon", "Limits", "Match", "build", "load"]
