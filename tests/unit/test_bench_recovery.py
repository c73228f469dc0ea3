# SPDX-License-Identifier: Apache-2.0
"""Figures of the recovery bench: what is compared with what, and when a target is missed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import recovery_report as report


def crash(**more: Any) -> dict[str, Any]:
    readers = {"readers": 2, "finished": 2, "errors": 0, "operations": 10, "texts": []}
    run = {"control": [10.0] * 98 + [20.0] * 2, "stalls": [12.0] * 98 + [40.0] * 2, "serving_ms": [1.0, 7.0],
           "swapped_ms": [30.0], "kills": 2, "readers": readers}  # fmt: skip
    return {**run, **more}


def row(rows: list[dict[str, Any]], what: str) -> dict[str, Any]:
    (found,) = (r for r in rows if r["what"] == what)
    return found


def test_ratios_are_of_quantiles() -> None:
    rows = report.summarize({"crash": [crash()]})
    assert row(rows, "stall p50, ratio")["median"] == 1.2 and row(rows, "stall p50, ratio")["met"] is True
    assert row(rows, "stall p99, ratio")["median"] == 2.0 and row(rows, "stall p99, ratio")["met"] is False
    assert row(rows, "kill to serving p99")["met"] is False
    assert row(rows, "kills")["met"] is None
    assert "MISSED" in report.text(rows)


def test_medians_of_runs() -> None:
    rows = report.summarize({"crash": [crash(serving_ms=[n]) for n in (1.0, 2.0, 9.0)]})
    found = row(rows, "kill to serving p99")
    assert (found["median"], found["min"], found["max"], found["runs"], found["met"]) == (2.0, 1.0, 9.0, 3, True)


def test_errors_are_told_whatever_the_medians() -> None:
    bad = crash(readers={"readers": 2, "finished": 2, "errors": 1, "operations": 3, "texts": ["x"]})
    hung = crash(readers={"readers": 2, "finished": 1, "errors": 0, "operations": 3, "texts": []})
    assert report.errors({"crash": [crash()]}) == []
    assert len(report.errors({"crash": [crash(), bad, hung]})) == 2
    assert len(report.errors({"swap": [{"errors": 3}]})) == 1


def test_reads_are_compared_with_their_neighbours() -> None:
    run = {"microseconds": {"protected": [101.0, 202.0, 150.0], "unprotected": [100.0, 200.0, 150.0]}}
    assert report.reads_ratio(run) == pytest.approx(1.01)
    assert report.reads_noise(run) == pytest.approx(1 / 3)


def test_memory_is_without_sidecars() -> None:
    kinds = {"agent": {"pss_kb": 1000, "rss_kb": 2000}, "guards": {"pss_kb": 500, "rss_kb": 9000}, "sidecars": {"pss_kb": 10**6}}
    run = {"kinds": kinds, "count": 200, "settled_seconds": 1.0}
    rows = report.summarize({"many": [run]})
    assert row(rows, "share without sidecars")["median"] == pytest.approx(1.536)
    assert row(rows, "resident without sidecars")["median"] == pytest.approx(11.264)
