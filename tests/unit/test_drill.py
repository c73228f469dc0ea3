# SPDX-License-Identifier: Apache-2.0
"""The drill's decisions: what a stall is, what counts as a problem, which features of a kernel are said to be there."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from incus_fusecr.cli.drill import text_of
from incus_fusecr.cli.output import parse_format
from incus_fusecr.drill import clients, features, outcome
from incus_fusecr.drill.stalls import Stalls, longest, quantile, ratio, split, stalls
from incus_fusecr.errors import Refused, UsageError

MS = 1_000_000


# -- stalls


def test_quantile_is_a_value_that_was_seen() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert quantile([3.0], 0.01) == 3.0 and quantile([], 0.5) == 0.0


def test_longest_counts_what_was_under_way() -> None:
    operations = [(0, 5), (10, 2), (20, 30), (60, 1)]
    assert longest(operations, (11, 15)) == 2, "began before, ended within"
    assert longest(operations, (30, 40)) == 30, "began before, ended after: all of it"
    assert longest(operations, (10, 60)) == 30
    assert longest(operations, (60, 100)) == 1, "the end of the window before does not belong to it"
    assert longest(operations, (13, 20)) is None
    assert longest([], (0, 10)) is None


def test_split_makes_windows_of_one_length() -> None:
    assert split((0, 25), 10) == [(0, 10), (10, 20)]
    assert split((5, 8), 10) == [(5, 15)]


def test_stalls_are_the_longest_of_each_client_and_window() -> None:
    one = [(0, 2 * MS), (5 * MS, 4 * MS), (100 * MS, 1 * MS)]
    other: list[tuple[int, int]] = []
    found = stalls([one, other], [(0, 50 * MS), (90 * MS, 150 * MS)])
    assert found == Stalls(windows=2, idle=2, p50=1.0, p99=4.0, max=4.0)


def test_ratio_of_nothing_is_none() -> None:
    assert ratio(3.0, 2.0) == 1.5 and ratio(3.0, 0.0) is None and ratio(0.0, 2.0) is None


# -- outcome


def report(**more: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"name": "reader 0 in namespace 0", "operations": [], "wrong": [], "texts": [], "moments": 0}
    return {**empty, **more}


def record(**more: Any) -> outcome.Record:
    kill = outcome.Done("kill", (0, 10 * MS), (10 * MS, 40 * MS), 20 * MS, 1.5)
    upgrade = outcome.Done("upgrade", (50 * MS, 60 * MS), (60 * MS, 90 * MS), 80 * MS)
    return outcome.Record(10 * MS, [kill, upgrade], **more)


def test_summary_tells_phases_apart() -> None:
    operations = [(5 * MS, 1 * MS), (11 * MS, 3 * MS), (55 * MS, 1 * MS), (62 * MS, 2 * MS), (71 * MS, 4 * MS)]
    wrong = [11 * MS, 62 * MS, 62 * MS, 95 * MS]
    found = outcome.summary(record(reports=[report(operations=operations, wrong=wrong)]))
    control, kills, upgrades = found["phases"]
    assert (control["windows"], control["max"], control["errors"]) == (2, 1.0, 1)
    assert (kills["windows"], kills["max"], kills["errors"], kills["ratio_p99"]) == (1, 3.0, 1, 3.0)
    assert (upgrades["windows"], upgrades["max"], upgrades["errors"]) == (2, 4.0, 2)
    assert found["operations"] == 5 and found["errors"] == 4
    assert found["serving_ms"] == {"kills": 1, "p50": 1.5, "p99": 1.5, "max": 1.5}


def test_no_problem_when_all_was_well() -> None:
    events = [{"what": "daemon-died", "data": {}}, {"what": "swapped", "data": {"swapped": 3, "errors": []}}]
    assert outcome.problems(record(reports=[report()], events=events)) == []


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (
            {"reports": [report(wrong=[1, 2], texts=[(11 * MS, "by_path: [Errno 5]")])]},
            "by_path: [Errno 5] (kill, the drill's event 1)",
        ),
        ({"reports": [report(wrong=[1, 2], texts=[(45 * MS, "names")])]}, "names (nothing was done to the daemon)"),
        ({"reports": [report(wrong=[1, 2, 3], texts=[(1, "names")])]}, "2 more"),
        ({"events": [{"what": "guard-failed", "data": {"why": "ended with code 1"}}]}, "guard-failed: ended with code 1"),
        ({"events": [{"what": "guard-deadline", "data": {"seconds": "60"}}]}, "guard-deadline: seconds=60"),
        ({"events": [{"what": "swapped", "data": {"errors": ["EPERM"]}}]}, "swap: EPERM"),
        ({"problems": ["process 5 is left"]}, "process 5 is left"),
    ],
)
def test_problems(more: dict[str, Any], text: str) -> None:
    found = outcome.problems(record(**more))
    assert any(text in line for line in found), found


def test_problems_are_bounded() -> None:
    found = outcome.problems(record(problems=[f"problem {n}" for n in range(outcome.MAX_PROBLEMS + 7)]))
    assert len(found) == outcome.MAX_PROBLEMS + 1 and found[-1] == "7 more"


def test_what_differs() -> None:
    before = [("/a", "/", "rw"), ("/b", "/x", "rw")]
    assert outcome.what_differs(before, list(before)) == ""
    assert "/x rw" in outcome.what_differs(before, before[:1])
    assert outcome.what_differs(before, [*before, before[0]]) == "was 2, is 3", "the same mount twice"


# -- features


def test_findings_of_kernels() -> None:
    states = {f.feature: f.state for f in features.findings("6.12.1-amd64", {"MOVE_MOUNT_BENEATH": "9 mounts"})}
    assert states["MOVE_MOUNT_BENEATH"] == "used" and states["FUSE_NOTIFY_RESEND"] == "available"
    assert states["fdinfo fuse_connection"] == states["FUSE_NOTIFY_INC_EPOCH"] == "missing"
    assert states["statmount, listmount"] == "not used"
    states = {f.feature: f.state for f in features.findings("6.18.0", {"FUSE_NOTIFY_RESEND": ""}, {"FUSE_NOTIFY_RESEND"})}
    assert states["FUSE_NOTIFY_RESEND"] == "missing", "what the kernel refused is not there, whatever its version"


def test_used_is_what_happened() -> None:
    events = [
        {"what": "guard-serving", "data": {}},
        {"what": "swapped", "data": {"swapped": 6, "stacked": 1}},
        {"what": "swapped", "data": {"swapped": 2}},
    ]
    used, absent = features.used_in(events)
    assert used["MOVE_MOUNT_BENEATH"].startswith("8 mounts, 1 more") and "1 times" in used["FUSE_NOTIFY_RESEND"] and not absent
    used, absent = features.used_in([{"what": "swapped", "data": {"stacked": 3}}, {"what": "guard-no-resend", "data": {}}])
    assert "MOVE_MOUNT_BENEATH" not in used and absent == {"FUSE_NOTIFY_RESEND"}


def test_refusals_name_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UsageError, match="sudo"):
        features.require("/bin/true")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    uname = os.uname()
    monkeypatch.setattr(os, "uname", lambda: type(uname)((*uname[:2], "6.8.0", *uname[3:])))
    with pytest.raises(Refused, match="FUSE_NOTIFY_RESEND"):
        features.require("/bin/true")
    monkeypatch.setattr(os, "uname", lambda: type(uname)((*uname[:2], "6.18.0", *uname[3:])))
    with pytest.raises(Refused, match="make -C incus_fusecr/guard install"):
        features.require(str(tmp_path / "none"))
    monkeypatch.setattr(features, "DEVICE", str(tmp_path / "fuse"))
    with pytest.raises(Refused, match="modprobe"):
        features.require("/bin/true")
    monkeypatch.setattr(features, "DEVICE", "/dev/null")
    monkeypatch.setattr(features, "PYTHONS", (str(tmp_path / "python"), "/bin/false"))
    with pytest.raises(Refused, match="python3-pyfuse3"):
        features.require("/bin/true")
    monkeypatch.setattr(features, "PYTHONS", ("/bin/true",))
    assert features.require("/bin/true") == "/bin/true"


# -- clients, on a directory that is no FUSE mount


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """As a container's bind mounts show it."""
    clients.fill(str(tmp_path / "tree"), 1)
    (tmp_path / "directory").symlink_to(tmp_path / "tree" / "files")
    (tmp_path / "file").symlink_to(tmp_path / "tree" / "files" / "0")
    return tmp_path


@pytest.mark.parametrize("role", clients.ROLES)
def test_clients_are_content_with_what_is_right(place: Path, role: str) -> None:
    before = os.getcwd()
    made = clients.KINDS[role](str(place), 0)
    try:
        for _ in range(3):
            for operation in made.operations():
                operation()
    finally:
        made.end()
        os.chdir(before)


@pytest.mark.parametrize("role", ["reader", "holder"])
def test_clients_notice_other_contents(place: Path, role: str) -> None:
    before = os.getcwd()
    made = clients.KINDS[role](str(place), 0)
    try:
        for number in range(clients.FILES):
            with open(place / "tree" / "files" / str(number), "r+b") as file:
                file.write(b"x")
        (place / "tree" / "files" / "more").touch()
        for operation in made.operations()[:3]:
            with pytest.raises(clients.Wrong):
                operation()
    finally:
        made.end()
        os.chdir(before)


def test_the_writer_notices_a_lost_record(place: Path) -> None:
    made = clients.Writer(str(place), 0)
    for _ in range(3):
        made.append()
    os.truncate(place / "tree" / "writer0" / "journal", clients.RECORD.size)
    with pytest.raises(clients.Wrong, match="records in the journal"):
        made.end()


def test_crew_has_places_of_its_own() -> None:
    crew = clients.crew(2, 3)
    assert [c.number for c in crew] == list(range(10)) and [c.role for c in crew if c.container == 1].count("reader") == 3
    board = clients.Board(len(crew))
    board.slot(9)[0] = 7
    board.slot(0)[1] = 2
    assert board.totals(len(crew)) == (7, 2) and not board.stop
    board.end_clients()
    assert board.stop and not board.leave


# -- output


def result(**more: Any) -> dict[str, Any]:
    found = outcome.summary(record(reports=[report(operations=[(11 * MS, 3 * MS)])]))
    listed = [f.to_dict() for f in features.findings("6.18.0", {})]
    return {**found, "kernel": "6.18.0", "seconds": 12.3, "features": listed, "problems": [], **more}


def test_text_has_all_that_is_asked_for() -> None:
    text = text_of(result(), parse_format("table"))
    for word in (
        "PHASE",
        "control",
        "kills",
        "upgrades",
        "P99 MS",
        "ERRORS",
        "MOVE_MOUNT_BENEATH",
        "0 errors, nothing is left",
        "6.18.0",
    ):
        assert word in text
    text = text_of(result(problems=["one\nline"], getcwd_moments=2), parse_format("table"))
    assert "Problem: one line\n" in text and "1 problems" in text and "ENOENT 2 times" in text


def test_csv_has_rows_only() -> None:
    lines = text_of(result(), parse_format("csv")).splitlines()
    assert len(lines) == 3 + len(features.FEATURES) and lines[0].startswith("control,-,")


def test_pythons_are_tried_in_order() -> None:
    assert features.PYTHONS[0] == sys.executable
