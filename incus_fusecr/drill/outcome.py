# SPDX-License-Identifier: Apache-2.0
"""What a drill has shown: from what the clients noted and what was done when, to a report and a verdict. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .stalls import Window, quantile, ratio, split, stalls

KINDS = ("kill", "upgrade")
MAX_PROBLEMS = 50
# Events of the supervisor after which something is wrong, whatever the clients saw.
BAD = {
    "aborted", "cannot-protect", "dead-mount", "guard-deadline", "guard-failed", "guard-malformed", "guard-no-resend",
    "guard-poison", "guard-sidecar-failed", "start-failed", "upgrade-refused",
}  # fmt: skip


@dataclass
class Done:
    """Something that was done to the daemon.

    :ivar kind: ``kill`` or ``upgrade``
    :ivar control: the window before it; CLOCK_MONOTONIC in ns
    :ivar span: from the act until all was ready for the next
    :ivar until: what is looked at ends here
    :ivar serving_ms: from the kill until the guard served
    """

    kind: str
    control: Window
    span: Window
    until: int
    serving_ms: float | None = None


@dataclass
class Record:
    """All that a drill collects.

    :ivar reports: of the clients, as clients.work() writes them
    :ivar problems: what was noticed otherwise
    """

    window: int  # ns
    done: list[Done] = field(default_factory=list)
    reports: list[Mapping[str, Any]] = field(default_factory=list)
    events: list[Mapping[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def problems(record: Record) -> list[str]:
    """Texts, one for each thing that must not be; empty if all was well."""
    found = list(record.problems)
    for report in record.reports:
        for began, text in report["texts"]:
            found.append(f"{report['name']}: {text} ({during(record, began)})")
        more = len(report["wrong"]) - len(report["texts"])
        if more > 0:
            found.append(f"{report['name']}: {more} more")
    for event in record.events:
        data = event["data"]
        if event["what"] in BAD:
            found.append(f"{event['what']}: {data.get('why') or ' '.join(f'{k}={v}' for k, v in data.items())}")
        elif event["what"] == "swapped" and data.get("errors"):
            found.append(f"swap: {'; '.join(map(str, data['errors']))}")
    unique = list(dict.fromkeys(found))
    return unique[:MAX_PROBLEMS] + ([f"{len(unique) - MAX_PROBLEMS} more"] if len(unique) > MAX_PROBLEMS else [])


def during(record: Record, moment: int) -> str:
    """What was done to the daemon then."""
    for number, done in enumerate(record.done, 1):
        if done.span[0] <= moment < done.span[1]:
            return f"{done.kind}, the drill's event {number}"
    return "nothing was done to the daemon"


def summary(record: Record) -> dict[str, Any]:
    """Stalls and errors of each phase, and how soon a guard served."""
    clients = [[(int(b), int(t)) for b, t in report["operations"]] for report in record.reports]
    wrong = [int(moment) for report in record.reports for moment in report["wrong"]]
    rows: list[dict[str, Any]] = []
    control = stalls(clients, [done.control for done in record.done])
    seen = 0
    for kind in KINDS:
        mine = [done for done in record.done if done.kind == kind]
        windows = [part for done in mine for part in split((done.span[0], done.until), record.window)]
        found = stalls(clients, windows)
        errors = sum(any(done.span[0] <= moment < done.span[1] for done in mine) for moment in wrong)
        seen += errors
        rows.append({
            "phase": f"{kind}s", "events": len(mine), "errors": errors, **found.to_dict(),
            "ratio_p50": ratio(found.p50, control.p50), "ratio_p99": ratio(found.p99, control.p99),
        })  # fmt: skip
    first = {
        "phase": "control",
        "events": 0,
        "errors": len(wrong) - seen,
        **control.to_dict(),
        "ratio_p50": None,
        "ratio_p99": None,
    }
    served = [done.serving_ms for done in record.done if done.serving_ms is not None]
    return {
        "operations": sum(map(len, clients)),
        "errors": len(wrong),
        "clients": len(clients),
        "getcwd_moments": sum(report["moments"] for report in record.reports),
        "phases": [first, *rows],
        "serving_ms": {
            "kills": len(served),
            "p50": quantile(served, 0.5),
            "p99": quantile(served, 0.99),
            "max": max(served, default=0.0),
        },
    }


def what_differs(before: Sequence[tuple[str, ...]], after: Sequence[tuple[str, ...]]) -> str:
    """Of two mount tables; empty if they are the same."""
    lost = [" ".join(line) for line in before if line not in after]
    new = [" ".join(line) for line in after if line not in before]
    if len(before) == len(after) and not lost and not new:
        return ""
    return f"was {lost or len(before)}, is {new or len(after)}"
