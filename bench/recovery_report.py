# SPDX-License-Identifier: Apache-2.0
"""Figures and tables of ``bench/run recovery``, each beside what is wanted of it. Reads no clock and no host."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from .report import table

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least a share ``q`` is not above; 0 of nothing."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)] if values else 0.0


def ratio(run: Mapping[str, Any], q: float, of: str = "stalls") -> float:
    """Of a quantile of stalls to the control's."""
    control = quantile(run["control"], q)
    return quantile(run.get(of, ()), q) / control if control else 0.0


def reads_ratio(run: Mapping[str, Any]) -> float:
    """Median of the ratios of rounds next to each other."""
    took = run["microseconds"]
    return median(a / b for a, b in zip(took["protected"], took["unprotected"], strict=True))


def reads_noise(run: Mapping[str, Any]) -> float:
    """The median of how far rounds without protection are from their median, as a share of it."""
    took = run["microseconds"]["unprotected"]
    middle = median(took)
    return median(abs(one - middle) for one in took) / middle


def megabytes(run: Mapping[str, Any], *kinds: str, key: str = "pss_kb") -> float:
    """Of processes of these kinds together, in steps of 1000."""
    return float(sum(run["kinds"].get(kind, {}).get(key, 0) for kind in kinds)) * 1024 / 1e6


OURS = ("agent", "zygote", "holder", "guards")
# part, what, its unit, how it is got from a run, what is wanted at most (None: only listed)
FIGURES: list[tuple[str, str, str, Callable[[Mapping[str, Any]], float], float | None]] = [
    ("crash", "kills", "", lambda r: r["kills"], None),
    ("crash", "errors of readers", "", lambda r: r["readers"]["errors"], 0),
    ("crash", "stall p50, control", "ms", lambda r: quantile(r["control"], 0.5), None),
    ("crash", "stall p99, control", "ms", lambda r: quantile(r["control"], 0.99), None),
    ("crash", "stall p50", "ms", lambda r: quantile(r["stalls"], 0.5), None),
    ("crash", "stall p99", "ms", lambda r: quantile(r["stalls"], 0.99), None),
    ("crash", "stall p50, ratio", "", lambda r: ratio(r, 0.5), 1.5),
    ("crash", "stall p99, ratio", "", lambda r: ratio(r, 0.99), 1.5),
    ("crash", "while mounts are swapped, spare starts: p50, ratio", "", lambda r: ratio(r, 0.5, "later"), 1.5),
    ("crash", "the same: p99, ratio", "", lambda r: ratio(r, 0.99, "later"), 1.5),
    ("crash", "kill to serving p50", "ms", lambda r: quantile(r["serving_ms"], 0.5), None),
    ("crash", "kill to serving p99", "ms", lambda r: quantile(r["serving_ms"], 0.99), 5),
    ("crash", "kill to all swapped p50", "ms", lambda r: quantile(r["swapped_ms"], 0.5), None),
    ("crash", "kill to all swapped p99", "ms", lambda r: quantile(r["swapped_ms"], 0.99), None),
    ("upgrade", "upgrades", "", lambda r: r["upgrades"], None),
    ("upgrade", "errors of readers", "", lambda r: r["readers"]["errors"], 0),
    ("upgrade", "stall p50, ratio", "", lambda r: ratio(r, 0.5), None),
    ("upgrade", "stall p99, control", "ms", lambda r: quantile(r["control"], 0.99), None),
    ("upgrade", "stall p99", "ms", lambda r: quantile(r["stalls"], 0.99), None),
    ("upgrade", "stall p99, ratio", "", lambda r: ratio(r, 0.99), 1.2),
    ("swap", "namespaces", "", lambda r: r["namespaces"], None),
    ("swap", "all of it", "s", lambda r: median(r["seconds"]), 0.5),
    ("swap", "the slowest", "s", lambda r: max(r["seconds"]), None),
    ("swap", "errors of a reader", "", lambda r: r["errors"], 0),
    ("swap", "stall of a reader, control", "ms", lambda r: median(r["control"]), None),
    ("swap", "stall of a reader", "ms", lambda r: median(r["stalls"]), None),
    ("reads", "rounds", "", lambda r: len(r["microseconds"]["protected"]), None),
    ("reads", "a read, unprotected", "us", lambda r: median(r["microseconds"]["unprotected"]), None),
    ("reads", "a read, protected", "us", lambda r: median(r["microseconds"]["protected"]), None),
    ("reads", "protected to unprotected, ratio", "", reads_ratio, None),
    ("reads", "noise of rounds without", "", reads_noise, None),
    *(
        (part, f"{kind}: {what}", unit, get, None)
        for part in ("idle", "many")
        for kind in (*OURS, "sidecars", "spares")
        for what, unit, get in (
            ("processes", "", lambda r, k=kind: r["kinds"].get(k, {}).get("processes", 0)),
            ("resident", "MB", lambda r, k=kind: megabytes(r, k, key="rss_kb")),
            ("share", "MB", lambda r, k=kind: megabytes(r, k)),
            ("wake-ups a second", "", lambda r, k=kind: r["kinds"].get(k, {}).get("wakeups_per_second", 0)),
        )
    ),
    ("many", "protected daemons", "", lambda r: r["count"], None),
    ("many", "until all were protected", "s", lambda r: r["settled_seconds"], None),
    # The text of the guards' program is resident in each of them, and in memory once: the shares are what memory is used.
    ("many", "resident without sidecars", "MB", lambda r: megabytes(r, *OURS, key="rss_kb"), None),
    ("many", "share without sidecars", "MB", lambda r: megabytes(r, *OURS), 250),
]  # fmt: skip


def summarize(runs: Runs) -> list[dict[str, Any]]:
    """A row for each figure: median, least and most of the runs, what is wanted, whether the median is that."""
    rows = []
    for part, what, unit, get, wanted in FIGURES:
        values = [round(float(get(run)), 4) for run in runs.get(part, ())]
        if values:
            middle = median(values)
            met = None if wanted is None else middle <= wanted
            rows.append({
                "part": part, "what": what, "unit": unit, "median": middle, "min": min(values), "max": max(values),
                "runs": len(values), "wanted": wanted, "met": met,
            })  # fmt: skip
    return rows


def errors(runs: Runs) -> list[str]:
    """What clients noticed, and readers that did not come to an end."""
    found = []
    for part in ("crash", "upgrade"):
        for run in runs.get(part, ()):
            readers = run["readers"]
            if readers["errors"] or readers["finished"] != readers["readers"]:
                found.append(f"{part}: readers: {readers}")
    found += [f"swap: {run['errors']} errors of a reader" for run in runs.get("swap", ()) if run["errors"]]
    return found


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value == int(value) else f"{value:.2f}"


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """One table."""
    return table(
        ("part", "figure", "unit", "median", "min", "max", "runs", "wanted", ""),
        [
            (
                r["part"], r["what"], r["unit"], _number(r["median"]), _number(r["min"]), _number(r["max"]), r["runs"],
                "" if r["wanted"] is None else f"<= {_number(r['wanted'])}", {None: "", True: "met", False: "MISSED"}[r["met"]],
            )
            for r in rows
        ],
    )  # fmt: skip
