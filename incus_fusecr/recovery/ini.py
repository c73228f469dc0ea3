# SPDX-License-Identifier: Apache-2.0
"""Configuration files that remember where everything stands, so that what is wrong is said with FILE:LINE.

The format is systemd's: ``[section name]``, ``key = value``, whole-line comments with # or ;. Neither configparser nor
tomllib tells the line of a value (docs/adr/0011).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import FusecrError

MAX_BYTES = 1 << 20
_SECTION = re.compile(r"\[([^\[\]]*)\]")


class ConfigError(FusecrError):
    """What is wrong, as ``FILE:LINE: reason``."""


@dataclass(frozen=True)
class Place:
    """A line of a file; line 0 is the file as a whole."""

    path: str
    line: int = 0

    def error(self, reason: str) -> ConfigError:
        return ConfigError(str(self), reason)

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


@dataclass(frozen=True)
class Value:
    """The text behind ``key =``."""

    text: str
    place: Place


@dataclass
class Section:
    """``[title]`` and its keys in their order."""

    title: str
    place: Place
    values: dict[str, Value] = field(default_factory=dict)


def parse(path: str, text: str) -> list[Section]:
    """The sections of a file.

    :raises ConfigError: a line is none of the four kinds; a section or a key is there twice
    """
    sections: dict[str, Section] = {}
    current: Section | None = None
    for number, line in enumerate(text.split("\n"), 1):
        place = Place(path, number)
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            match = _SECTION.fullmatch(line)
            title = " ".join(match[1].split()) if match else ""
            if not title:
                raise place.error(f"{line!r} is no section; write [daemon NAME]")
            if title in sections:
                raise place.error(f"[{title}] is there already, in line {sections[title].place.line}")
            current = sections[title] = Section(title, place)
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not key:
            raise place.error(f"{line!r} is neither a section nor KEY = VALUE")
        if current is None:
            raise place.error(f"{key} stands before the first section")
        if key in current.values:
            raise place.error(f"{key} is there already, in line {current.values[key].place.line}")
        current.values[key] = Value(value, place)
    return list(sections.values())


def files(path: str, directory: str) -> list[str]:
    """The files to read, in their order: ``path``, then ``*.conf`` of the directory by name; absent ones are none.

    :raises ConfigError: the directory cannot be read
    """
    found = [path] if os.path.lexists(path) else []
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".conf") and not name.startswith("."))
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise Place(directory).error(str(error.strerror)) from None
    return found + [os.path.join(directory, name) for name in names]


def read(paths: Sequence[str]) -> list[Section]:
    """All sections of all files, in their order.

    :raises ConfigError: one cannot be read, or is wrong
    """
    sections = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise Place(path).error(str(error.strerror)) from None
        if len(data) > MAX_BYTES:
            raise Place(path).error(f"has more than {MAX_BYTES} bytes")
        try:
            sections += parse(path, data.decode())
        except UnicodeDecodeError as error:
            raise Place(path, data[: error.start].count(b"\n") + 1).error("is not UTF-8") from None
    return sections
