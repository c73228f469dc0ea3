# SPDX-License-Identifier: Apache-2.0
"""A migration in words and numbers: its plan, what a failure of it means, and for how long the container stood still.
Asks nobody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import FusecrError, Interrupted, Refused, Uncertain
from ..incus.failures import OutcomeUnknown
from .model import Carried, MigrateRequest, Report
from .preflight import Findings

COPY_ON_WRITE = ("btrfs", "zfs")
INTERRUPTED = "interrupted"
RUNS_ON = "the source runs on"


def plan(request: MigrateRequest, found: Findings, snapshot: str) -> list[str]:
    """The steps in words, for ``--dry-run``."""
    steps = [f"copy {request.source} to {request.target} while it runs, then once more what changed"]
    if found.remains:
        steps.insert(0, f"delete what an earlier migration left as {request.target}")
    if found.driver in COPY_ON_WRITE:
        steps.insert(0, f"snapshot {snapshot}, so that {found.driver} sends differences only")
    steps += [
        "stop its FUSE clients, then daemons; record their handles; dump with CRIU, which waits",
        "freeze it, take its network devices down; copy the rest and the dump",
        "restore on the target, check every handle there, with its network devices down",
        "let the target run; end the source",
        "keep the source, stopped" if request.keep_source else "delete the source",
    ]
    return steps


def meaning(error: FusecrError | KeyboardInterrupt, in_doubt: list[str], request: MigrateRequest) -> FusecrError:
    """What a failure after the preflight means to the user, now that all that was begun has been undone.

    :param in_doubt: what could not be seen to have been undone
    :returns: :class:`Uncertain` if the source was not seen to go on, or nobody knows about ``go``; never :class:`Refused`
    """
    if isinstance(error, FusecrError):
        what, why = error.what, error.why
    else:
        what, why = f"migration of {request.source} to {request.target}", INTERRUPTED
    if in_doubt:
        return Uncertain(
            what,
            "; ".join([why, *in_doubt]),
            "its agent lets it go on when it has heard nothing of the migration for ten seconds, or when it is started again; "
            f"look with: incus list {request.source}; incus list {request.target}",
        )
    if not isinstance(error, FusecrError):
        return Interrupted(what, why, RUNS_ON)
    if isinstance(error, (OutcomeUnknown, Refused)):
        # Whatever became of that request: it has been undone. Only preflight refuses.
        return FusecrError(what, why, "; ".join(filter(None, [error.hint, RUNS_ON])))
    return error


def frozen(report: Report, held: Mapping[str, Any], gate: Mapping[str, Any], *, since_held: float, ending: float) -> None:
    """Enter frozen time, its parts, and what was carried.

    :param held: the source's agent's report of the hold: times before it by that host's clock
    :param gate: the target's agent's report of ``running``
    :param since_held: seconds from that report to the target's first instruction, by this client's clock
    :param ending: seconds from then until the source had ended; they are part of the phase ``commit``
    """
    parts = {str(k): float(v) for k, v in (held.get("parts") or {}).items()}
    before = float(held.get("frozen_since") or 0.0)
    phases = {p.name: p.seconds for p in report.phases}
    at_gate = gate.get("parts") or {}
    report.frozen_seconds = report.frozen_parts.get("first copy", 0.0) + before + since_held
    report.frozen_parts |= {
        "quiesce and record FUSE": parts.get("quiesce", 0.0),
        "dump": parts.get("dump", 0.0),
        "final copy": phases.get("final copy", 0.0),
        "start (restore)": phases.get("start", 0.0),
        "commit": max(0.0, phases.get("commit", 0.0) - ending),
        "of it CRIU restore": float(at_gate.get("restore", 0.0)),
        "of it waiting at the gate": float(at_gate.get("gate", 0.0)),
    }
    report.carried = [
        Carried(
            daemon=str(entry.get("daemon")),
            mountpoint=str(entry.get("mountpoint")),
            handles=int(entry.get("handles") or 0),
            nodes=int(entry.get("nodes") or 0),
        )
        for entry in held.get("handles") or ()
    ]
