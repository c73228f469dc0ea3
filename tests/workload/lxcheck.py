#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Judges what lxreader left: ``lxcheck.py REPORT... [--mem KB] [--cpus N] [--between FROM TO]`` prints JSON; exit code 1
when something is wrong. Stdlib only, one file.

Times are seconds of CLOCK_MONOTONIC, which containers have in common with their host.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


def load(path: str) -> dict[str, Any]:
    """One report. :raises OSError, ValueError: it cannot be read or is none"""
    with open(path, "rb") as file:
        report = json.load(file)
    if not isinstance(report, dict) or "histogram" not in report:
        raise ValueError(f"{path}: no report of lxreader")
    return report


@dataclass
class Summary:
    """Of several reports. ``problems``: texts, one for each thing that must not be; empty if all was well."""

    reports: int = 0
    operations: int = 0
    errors: int = 0
    wrong: int = 0
    p50_us: float = 0.0
    p99_us: float = 0.0
    max_us: float = 0.0
    values: dict[str, list[int]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    unsupported: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.problems


def quantile(histogram: Sequence[tuple[float, int]], q: float) -> float:
    """Of (upper bound, count) pairs; 0 if there are none."""
    wanted, seen = math.ceil(q * sum(count for _, count in histogram)), 0
    for upper, count in sorted(histogram):
        seen += count
        if seen >= wanted:
            return upper
    return 0.0


def summary(reports: Iterable[dict[str, Any]], mem: int | None = None, cpus: int | None = None, finished: bool = True) -> Summary:
    """
    :param mem: MemTotal in kB that every reader of it has to have seen
    :param cpus: likewise for processors
    :param finished: a report whose reader did not come to its own end is a problem
    """
    found = Summary()
    histogram: Counter[float] = Counter()
    values: dict[str, set[int]] = {}
    for report in reports:
        who = f"{report['mode']} (pid {report['pid']})"
        found.reports += 1
        found.operations += report["operations"]
        found.errors += report["errors"]
        found.wrong += report["wrong"]
        found.max_us = max(found.max_us, report["max_us"])
        for upper, count in report["histogram"]:
            histogram[upper] += count
        for key, value in report["values"].items():
            values.setdefault(key, set()).add(value)
        for key, count in report["notes"].items():
            found.notes[key] = found.notes.get(key, 0) + count
        if report["unsupported"]:
            found.unsupported.append(f"{who}: {report['unsupported']}")
        elif not report["operations"]:
            found.problems.append(f"{who}: did nothing")
        found.problems += [f"{who}: {text}" for text in report["texts"]]
        more = report["errors"] + report["wrong"] - len(report["texts"])
        if more > 0:
            found.problems.append(f"{who}: {more} more")
        if finished and not report["finished"]:
            found.problems.append(f"{who}: did not come to its end")
    if not found.reports:
        found.problems.append("no reports")
    found.values = {key: sorted(seen) for key, seen in sorted(values.items())}
    for key, seen in found.values.items():
        if len(seen) > 1:
            found.problems.append(f"readers differ: {key} is {', '.join(map(str, seen))}")
    for key, wanted in (("mem", mem), ("cpus", cpus)):
        if wanted is not None and found.values.get(key) != [wanted]:
            found.problems.append(f"{key}: {found.values.get(key, 'nobody looked')}, not {wanted}")
    pairs = sorted(histogram.items())
    found.p50_us, found.p99_us = quantile(pairs, 0.5), min(quantile(pairs, 0.99), found.max_us)
    return found


def longest_between(reports: Iterable[dict[str, Any]], start: float, end: float) -> float:
    """Longest operation in us of the windows (0.2 s each) that touch this time; 0 if nothing was done."""
    longest = 0.0
    for report in reports:
        before = report["started"]
        for window_end, _operations, _errors, max_us in report["windows"]:
            if window_end >= start and before <= end:
                longest = max(longest, max_us)
            before = window_end
    return longest


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="judge reports of lxreader")
    parser.add_argument("report", nargs="+")
    parser.add_argument("--mem", type=int, metavar="KB")
    parser.add_argument("--cpus", type=int, metavar="N")
    parser.add_argument("--between", type=float, nargs=2, metavar=("FROM", "TO"), help="also the longest operation then")
    parser.add_argument("--running", action="store_true", help="the readers need not have ended")
    options = parser.parse_args(argv)
    try:
        reports = [load(path) for path in options.report]
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    found = summary(reports, options.mem, options.cpus, not options.running)
    result = asdict(found)
    if options.between:
        result["longest_between_us"] = longest_between(reports, *options.between)
    print(json.dumps(result, indent=1))
    return 0 if found.clean else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
