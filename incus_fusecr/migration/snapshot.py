# SPDX-License-Identifier: Apache-2.0
"""Checkpoint and restore on one host, by Incus' own stateful snapshots and stops.

CRIU's plugin and the agent do the work inside; here the state is looked at before and after, since Incus reports
success for a start from a state that is not there, by booting afresh.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import FusecrError, Refused, Uncertain, UsageError
from ..incus.client import Progress, Server
from ..incus.conversation import ask_instance
from ..incus.deadline import Deadline
from ..incus.failures import ApiError, OutcomeUnknown, reason
from . import settings
from .instance import RUNNING, STOPPED, require_container, require_running_container

CHECK_SECONDS = 60.0


@dataclass(frozen=True)
class Result:
    """What was done.

    :ivar snapshot: its name, or ``""`` for the state of a stopped instance
    :ivar seconds: of the operation on the server
    """

    instance: str
    action: str
    snapshot: str
    status: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": round(self.seconds, 3)}


def checkpoint(
    server: Server,
    name: str,
    snapshot: str = "",
    *,
    stop: bool = False,
    deadline: Deadline | float = 300.0,
    progress: Progress | None = None,
) -> Result:
    """Save the running state: in a snapshot, or with ``stop`` and no snapshot beside the stopped instance.

    :param snapshot: its name; without one, and without ``stop``, one is made from the time
    :raises Refused: the agent finds something that cannot be saved, or does not answer; nothing was touched
    :raises FusecrError: it failed and the instance runs on
    :raises Uncertain: it failed and the instance does not run
    """
    end = Deadline.of(deadline)
    where = f"{server}:{name}"
    _check_snapshot_name(snapshot)
    instance = require_running_container(server, name)
    if not snapshot and not stop:
        snapshot = time.strftime("checkpoint-%Y%m%d-%H%M%S", time.gmtime())
    if snapshot and server.snapshot(name, snapshot) is not None:
        raise UsageError(f'the snapshot "{snapshot}" of {where} exists already')
    _preflight(server, instance, end)
    began = time.monotonic()
    try:
        if snapshot:
            server.create_snapshot(name, snapshot, end, stateful=True, progress=progress)
            if stop:
                server.put_state(name, "stop", end, force=True)
        else:
            server.put_state(name, "stop", end, stateful=True, progress=progress)
    except (ApiError, OutcomeUnknown) as e:
        raise _after_failure(server, name, f"checkpoint of {where}", e, RUNNING) from e
    seconds = time.monotonic() - began
    if snapshot:
        saved = server.snapshot(name, snapshot)
        if saved is None or saved.get("stateful") is not True:
            raise Uncertain(
                f"checkpoint of {where}",
                "Incus reported success, and the snapshot holds no state",
                "see incus info",
            )
    found = require_container(server, name)
    wanted = STOPPED if stop else RUNNING
    if found.get("status") != wanted or (stop and not snapshot and found.get("stateful") is not True):
        raise Uncertain(
            f"checkpoint of {where}",
            f"Incus reported success, and the instance is {found.get('status')}"
            + ("" if found.get("stateful") else " without a saved state"),
            f"see: incus info --show-log {where}",
        )
    return Result(where, "checkpoint", snapshot, wanted, seconds)


def restore(
    server: Server,
    name: str,
    snapshot: str = "",
    *,
    deadline: Deadline | float = 300.0,
    progress: Progress | None = None,
) -> Result:
    """Continue from a saved state: of a snapshot, or of the stopped instance.

    :raises UsageError: there is no such snapshot
    :raises Refused: there is no state to continue from, or the instance runs; nothing was touched
    :raises FusecrError: it failed; the state is still there
    """
    end = Deadline.of(deadline)
    where = f"{server}:{name}"
    found = require_container(server, name)
    if snapshot:
        _check_snapshot_name(snapshot)
        saved = server.snapshot(name, snapshot)
        if saved is None:
            raise UsageError(f'{where} has no snapshot "{snapshot}"', "", f"see: incus info {where}")
        if saved.get("stateful") is not True:
            raise Refused(
                f'restore of {where} from "{snapshot}"',
                "that snapshot holds files only, no running state",
                f"restore the files with: incus snapshot restore {where} {snapshot}",
            )
    elif found.get("status") != STOPPED:
        raise Refused(
            f"restore of {where}", f"it is {found.get('status')}", "name a snapshot to go back to it"
        )
    elif found.get("stateful") is not True:
        raise Refused(
            f"restore of {where}",
            "it was stopped without saving its state; a start would boot it afresh",
            f"boot it with: incus start {where}",
        )
    began = time.monotonic()
    try:
        if snapshot:
            server.run("PUT", f"instances/{name}", {"restore": snapshot, "stateful": True}, end, progress)
        else:
            server.put_state(name, "start", end, stateful=True, progress=progress)
    except (ApiError, OutcomeUnknown) as e:
        raise _after_failure(server, name, f"restore of {where}", e, STOPPED) from e
    status = str(require_container(server, name).get("status"))
    if status != RUNNING:
        raise Uncertain(
            f"restore of {where}",
            f"Incus reported success, and the instance is {status}",
            f"see: incus info --show-log {where}",
        )
    return Result(where, "restore", snapshot, status, time.monotonic() - began)


def _preflight(server: Server, instance: Mapping[str, Any], end: Deadline) -> None:
    """The instance's settings, and the agent's verdicts. :raises Refused: with all of them"""
    name = str(instance["name"])
    where = f"{server}:{name}"
    found = [v.to_dict() for v in settings.to_dump(instance.get("expanded_config") or {}, where)]
    report = ask_instance(server, name, "check", {}, end.within(CHECK_SECONDS), phases=("checked",))
    if report.data.get("restored") is True:
        once = settings.restored_once(server.environment, where)
        found += [once.to_dict()] if once else []
    verdicts = found + [v for v in report.data.get("verdicts") or () if isinstance(v, dict)]
    if verdicts:
        first = verdicts[0]
        more = f"; and {len(verdicts) - 1} more, see: incus-fusecr check {where}" if verdicts[1:] else ""
        raise Refused(str(first.get("what", "")), str(first.get("why", "")), f"{first.get('hint', '')}{more}")


def _check_snapshot_name(snapshot: str) -> None:
    if "/" in snapshot or any(c.isspace() or not c.isprintable() for c in snapshot):
        raise UsageError(f'"{snapshot}" is not a name for a snapshot', "it holds a slash or a space")


def _after_failure(server: Server, name: str, what: str, error: FusecrError, unharmed: str) -> FusecrError:
    """The failure, as one or the other according to what the instance is now."""
    why = reason(error.why or str(error))
    try:
        status = str(require_container(server, name).get("status"))
    except FusecrError as e:
        return Uncertain(what, f"{why}; then its status could not be read: {e}", f"see {server}:{name}")
    if status == unharmed and not isinstance(error, OutcomeUnknown):
        return FusecrError(what, why, f"it is {status.lower()} as before")
    return Uncertain(what, why, f"it is {status} now; see: incus info --show-log {server}:{name}")
