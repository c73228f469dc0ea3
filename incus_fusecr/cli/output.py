# SPDX-License-Identifier: Apache-2.0
"""What a command prints: tables as the ``incus`` client draws them, documents, and a line of progress.

Names, paths and process names come out of containers, so whatever could steer a terminal is escaped.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TextIO, TypeVar

from ..errors import UsageError

KINDS = ("table", "compact", "csv", "json", "yaml")
Row = TypeVar("Row")
_MAX_CELL = 400


@dataclass(frozen=True)
class Format:
    """``-f KIND[,header|,noheader]``."""

    kind: str = "table"
    header: bool = True

    @property
    def is_document(self) -> bool:
        """One JSON or YAML document, rather than rows."""
        return self.kind in ("json", "yaml")


def parse_format(text: str) -> Format:
    """``table``, ``csv,header``, ``compact,noheader``... as in ``incus list -f``. A csv has no header unless asked.

    :raises UsageError: it is none of these
    """
    kind, *options = text.split(",")
    if kind not in KINDS:
        raise UsageError(f'unknown format "{kind}"', "", "one of " + ", ".join(KINDS))
    header = kind != "csv"
    for option in options:
        if option not in ("header", "noheader"):
            raise UsageError(f'unknown option "{option}" of the format', "", "header or noheader")
        header = option == "header"
    return Format(kind, header)


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One column that ``-c`` can choose.

    :ivar letter: for ``-c``
    :ivar default: whether it is there without ``-c``
    """

    letter: str
    title: str
    value: Callable[[Row], object]
    default: bool = True
    right: bool = False


def choose(columns: Sequence[Column[Row]], letters: str) -> list[Column[Row]]:
    """The columns for ``-c``. :raises UsageError: an unknown letter"""
    if not letters:
        return [c for c in columns if c.default]
    by_letter = {c.letter: c for c in columns}
    unknown = sorted(set(letters.replace(",", "")) - set(by_letter))
    if unknown:
        known = ", ".join(f"{c.letter} ({c.title.lower()})" for c in columns)
        raise UsageError(f'unknown column "{unknown[0]}"', "", f"one of {known}")
    return [by_letter[letter] for letter in letters if letter != ","]


def columns_help(columns: Sequence[Column[Any]]) -> str:
    """For the help text of ``-c``."""
    listed = ", ".join(f"{c.letter} {c.title.lower()}" for c in columns)
    return f"Columns to show, as letters: {listed}."


def clean(value: object) -> str:
    """A text that is safe on a terminal: what is not printable becomes an escape, what is long is cut."""
    text = str(value)
    if len(text) > _MAX_CELL:
        text = text[: _MAX_CELL - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def render(rows: Sequence[Row], columns: Sequence[Column[Row]], form: Format) -> str:
    """Rows as text, with a line feed at the end; the empty string for nothing at all."""
    cells = [[clean(c.value(row)) for c in columns] for row in rows]
    titles = [c.title for c in columns]
    if form.kind == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(([titles] if form.header else []) + cells)
        return out.getvalue()
    everything = ([titles] if form.header else []) + cells
    widths = [max((len(line[i]) for line in everything), default=0) for i in range(len(titles))]

    def fit(line: list[str]) -> list[str]:
        return [
            text.rjust(width) if column.right else text.ljust(width)
            for text, width, column in zip(line, widths, columns, strict=True)
        ]

    if form.kind == "compact":
        return "".join(("  " + "  ".join(fit(line))).rstrip() + "\n" for line in everything)
    rule = "+" + "+".join("-" * (width + 2) for width in widths) + "+\n"
    lines = ["| " + " | ".join(fit(line)) + " |\n" for line in everything]
    body = lines[1:] if form.header else lines
    return rule + (lines[0] + rule if form.header else "") + "".join(body) + (rule if body else "")


def document(data: object, form: Format) -> str:
    """Data as one JSON or YAML document."""
    if form.kind == "yaml":
        import yaml

        return str(yaml.safe_dump(data, sort_keys=False, default_flow_style=False))
    return json.dumps(data, indent=2, ensure_ascii=True) + "\n"


def human_bytes(count: int) -> str:
    """``45.8MB``, in steps of 1000 as Incus counts."""
    value, units = float(count), ("B", "kB", "MB", "GB", "TB")
    for unit in units:
        if value < 1000 or unit == units[-1]:
            return f"{count}B" if unit == "B" else f"{value:.1f}{unit}"
        value /= 1000
    raise AssertionError


def error_line(text: object) -> str:
    """``Error: ...`` on one line, as the incus client writes it."""
    return f"Error: {clean_long(text)}"


def clean_long(text: object) -> str:
    """Like :func:`clean`, for messages: not cut to a cell's length."""
    flat = " ".join(str(text).split())[:4000]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in flat)


class Reporter:
    """Progress on standard error, so that standard output holds the result alone.

    On a terminal one line is rewritten; in a pipe and with ``quiet`` there is none; ``as_json`` writes each step as
    a line of JSON, wherever it goes and however quiet.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._json = as_json
        self._live = not quiet and not as_json and self._stream.isatty()
        self._width = 0
        self._last = 0.0
        self._text = ""

    def update(self, text: str, data: Mapping[str, Any] | None = None) -> None:
        """Show a step.

        :param text: for people
        :param data: for ``--progress json``
        """
        if self._json:
            if data is not None:
                self._write(json.dumps(data, ensure_ascii=True) + "\n")
            return
        now = time.monotonic()
        if not self._live or (text == self._text and now - self._last < 1):
            return
        self._text, self._last = text, now
        line = clean(text)[: self._columns() - 1]
        self._write("\r" + line + " " * max(0, self._width - len(line)))
        self._width = len(line)

    def done(self) -> None:
        """Take the line away."""
        if self._live and self._width:
            self._write("\r" + " " * self._width + "\r")
        self._width, self._text = 0, ""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.done()

    def _columns(self) -> int:
        try:
            return max(20, os.get_terminal_size(self._stream.fileno()).columns)
        except (OSError, ValueError):
            return 80

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # Whoever watched has gone; what is watched goes on.
            self._live = self._json = False
