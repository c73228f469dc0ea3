# SPDX-License-Identifier: Apache-2.0
"""Medians and tables of what was measured. Reads no clock and no host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

MIGRATE, PLAIN = 0, 2  # positions in the list of ways: ours, and what it is compared with
# What FUSE adds to the time that the container stands still. The rest of a migration is the same without.
FUSE_PARTS = ("quiesce and record FUSE", "of it waiting at the gate")


def summarize(runs: Sequence[dict[str, Any]], ways: Sequence[str]) -> dict[str, Any]:
    """Medians per (driver, size, way); ratios per (driver, size)."""
    rows, ratios = [], []
    for driver, size in dict.fromkeys((r["driver"], r["size"]) for r in runs):
        here = [r for r in runs if (r["driver"], r["size"]) == (driver, size)]
        frozen: dict[int, float] = {}
        for index, way in enumerate(ways):
            mine = [r for r in here if r["way"] == way]
            good = [r for r in mine if not r["failed"]]
            if not mine:
                continue
            row: dict[str, Any] = {"driver": driver, "size": size, "way": way, "runs": len(mine), "failed": len(mine) - len(good)}
            if good:
                row |= _medians(good)
                frozen[index] = row["frozen"]
            rows.append(row)
        if MIGRATE in frozen and PLAIN in frozen:
            ratios.append({"driver": driver, "size": size, "ratio": round(frozen[MIGRATE] / frozen[PLAIN], 4)})
    return {"rows": rows, "ratios": ratios}


def _medians(good: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for r in good for name in r["parts"])
    parts = {name: round(median(r["parts"].get(name, 0.0) for r in good), 4) for name in names}
    reported = [r["reported"] for r in good if r["reported"] is not None]
    row: dict[str, Any] = {
        "frozen": round(median(r["frozen"] for r in good), 4),
        "frozen_min": round(min(r["frozen"] for r in good), 4),
        "frozen_max": round(max(r["frozen"] for r in good), 4),
        "total": round(median(r["total"] for r in good), 4),
        "root_bytes": max(r["root_bytes"] for r in good),
        "reported": round(median(reported), 4) if reported else None,
        "parts": parts,
        "client_errors": sum(r["clients"].get("errors", 0) for r in good),
        "client_operations": sum(r["clients"].get("operations", 0) for r in good),
    }
    if any(name in parts for name in FUSE_PARTS):
        row["fuse_part"] = round(median(sum(r["parts"].get(name, 0.0) for name in FUSE_PARTS) for r in good), 4)
    return row


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Text columns; numbers to the right."""
    lines = [list(map(str, titles)), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]

    def fit(text: str, width: int) -> str:
        return text.rjust(width) if text[:1].isdigit() else text.ljust(width)

    return "\n".join("  ".join(fit(t, w) for t, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def text(summary: dict[str, Any]) -> str:
    """Three tables: times, parts of the reported frozen time, ratios."""
    times = table(
        ("driver", "MiB", "way", "runs", "failed", "frozen s", "min", "max", "reported", "of it FUSE", "total s", "client errors"),
        [
            (
                r["driver"], r["size"], r["way"], r["runs"], r["failed"], _seconds(r.get("frozen")), _seconds(r.get("frozen_min")),
                _seconds(r.get("frozen_max")), _seconds(r.get("reported")), _seconds(r.get("fuse_part")), _seconds(r.get("total")),
                f"{r['client_errors']} of {r['client_operations']}" if r.get("client_operations") else "",
            )
            for r in summary["rows"]
        ],
    )  # fmt: skip
    parts = table(
        ("driver", "MiB", "way", "part", "s"),
        [(r["driver"], r["size"], r["way"], name, _seconds(value)) for r in summary["rows"]
         for name, value in (r.get("parts") or {}).items()],
    )
    lines = [
        f"{x['driver']}, {x['size']} MiB: the migration with sshfs inside freezes for {x['ratio']:.3f} of plain incus move's time "
        "without FUSE"
        for x in summary["ratios"]
    ]
    return "\n".join(["Medians; frozen: as a process in the container saw it.", times, "", "Parts:", parts, "", *lines])
