#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Judges what fsclient (Python or C) left: reports and append logs.

``check.py summary REPORT...`` and ``check.py append LOG [--lines N]`` print JSON; exit code 1 when something
is wrong. Stdlib only, one file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

LINE = re.compile(rb"([0-9]{12}) [0-9 ]{10}\.[0-9]{6} ([0-9a-f]{8})")


class AppendResult(NamedTuple):
    """holes: numbers that are missing; repeats: lines whose number was there already or went back;
    torn: pieces that are no whole line."""

    holes: int
    repeats: int
    torn: int


def append_holes(path: str, lines: int | None = None) -> AppendResult:
    """Look at an append log.

    :param path: the log that mode ``append`` wrote
    :param lines: lines that were acknowledged (``detail.lines`` of its report): so many at least have to be
        there, the numbers from 0 on; without it only gaps between found numbers show
    :raises OSError: the log cannot be read
    """
    with open(path, "rb") as file:
        data = file.read()
    pieces = data.split(b"\n")
    torn = 1 if pieces.pop() else 0  # text behind the last newline
    holes = repeats = 0
    wanted = 0
    for piece in pieces:
        match = LINE.fullmatch(piece)
        if match is None or zlib.crc32(piece[: match.start(2) - 1]) != int(match[2], 16):
            torn += 1
            continue
        number = int(match[1])
        if number < wanted:
            repeats += 1
        else:
            holes += number - wanted
            wanted = number + 1
    if lines is not None:
        holes += max(0, lines - wanted)
    return AppendResult(holes, repeats, torn)


@dataclass
class Summary:
    """Of several reports; ``problems`` are texts, one for each error and each report that says nothing."""

    reports: int = 0
    operations: int = 0
    errors: int = 0
    longest_gap_ms: float = 0.0  # of clients that pause up to 100 ms by themselves
    longest_gap_of: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.errors and not self.problems


def load(path: str) -> dict[str, Any]:
    """One report. :raises OSError, ValueError: it cannot be read or is none"""
    with open(path) as file:
        data = json.load(file)
    if not isinstance(data, dict) or data.get("v") != 1:
        raise ValueError(f"{path}: not a report of fsclient")
    return data


def summary(reports: Iterable[str | dict[str, Any]], max_age: float | None = 10.0) -> Summary:
    """Add up reports.

    :param reports: paths, or reports that were loaded already
    :param max_age: seconds; a client whose report is older and not ``stopped`` is taken for dead or stuck;
        None: a report of a running client may be of any age
    """
    result = Summary()
    for item in reports:
        try:
            data = load(item) if isinstance(item, str) else item
        except (OSError, ValueError) as error:
            result.errors += 1
            result.problems.append(f"no report: {error}")
            continue
        name = f"{data['mode']} on {data['target']} (pid {data['pid']})"
        result.reports += 1
        result.operations += data["operations"]
        result.errors += data["errors"]
        result.problems += [f"{name}: {text}" for text in data["first_errors"]]
        if not data["operations"]:
            result.errors += 1
            result.problems.append(f"{name}: not one successful operation")
        age = time.time() - data["updated"]
        if max_age is not None and data["state"] != "stopped" and age > max_age:
            result.errors += 1
            result.problems.append(f"{name}: silent for {age:.1f} s")
        if data["longest_gap_ms"] > result.longest_gap_ms and data["pace_ms"] <= 100:
            result.longest_gap_ms, result.longest_gap_of = data["longest_gap_ms"], name
    if not result.reports and not result.problems:
        result.errors += 1
        result.problems.append("no reports at all")
    return result


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Judge reports and logs of fsclient.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("summary")
    one.add_argument("reports", nargs="+", metavar="REPORT")
    one.add_argument("--max-age", type=float, default=10.0, help="seconds since the last sign of a client that is not stopped (10)")
    two = commands.add_parser("append")
    two.add_argument("log", metavar="LOG")
    two.add_argument("--lines", type=int, help="lines that the client knows as written")
    options = parser.parse_args(arguments)
    if options.command == "summary":
        found = summary(options.reports, options.max_age)
        print(json.dumps(asdict(found)))
        return 0 if found.clean else 1
    try:
        result = append_holes(options.log, options.lines)
    except OSError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result._asdict()))
    return 1 if any(result) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
