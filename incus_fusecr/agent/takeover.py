# SPDX-License-Identifier: Apache-2.0
"""The held dumps of an agent that died: the next one takes them over from the journal."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ..checkpoint import scan
from ..checkpoint.cgroup import Cgroup
from ..checkpoint.dump import Dump, Tools
from ..linux.pidfd import pidfd_open
from .hold import KIND, Hold, start_time_of
from .network import Fence

log = logging.getLogger(__name__)


def recover(
    tools: Tools,
    sessions: list[tuple[Dump, dict[str, Any]]],
    released: Callable[[Hold], None],
) -> list[Hold]:
    """Holds of an agent that died, to be registered, and then decided with :meth:`Hold.settle`.

    :param sessions: what :func:`incus_fusecr.checkpoint.dump.recover` found
    """
    found: list[Hold] = []
    by_init = {dump.init: dump for dump, _ in sessions}

    def take(entry: dict[str, Any]) -> None:
        dump = by_init.get(entry["init"])
        if dump is None and (start_time_of(entry["init"]) or -1) != entry["start"]:
            tools.journal.remove(KIND, entry["name"])
            return
        try:
            if dump is None:
                # Its dump was finished, or could not be taken over; the tree is there, and what was decided still has to be done.
                dump = Dump(tools, entry["container"], entry["init"])
                dump.initfd = pidfd_open(dump.init)
                dump.undo.callback(dump.initfd.close)
            found.append(_take_over(tools, dump, entry, released))
        except Exception:
            _let_go_unknown(entry)
            raise

    tools.journal.each(KIND, take)
    return found


def _take_over(tools: Tools, dump: Dump, entry: dict[str, Any], released: Callable[[Hold], None]) -> Hold:
    hold = Hold(tools, entry["container"], entry["migration"], entry["init"], dump, released=released)
    hold.criu, hold.phase, hold.target = entry["criu"], entry["phase"], entry["target"]
    hold.fence = Fence.from_dict(entry["fence"])
    path, identity = entry.get("cgroup") or (scan.payload_cgroup(dump.init), 0)
    hold.cgroup = Cgroup(path, identity) if path else None
    if hold.criu:
        try:
            hold.criufd = pidfd_open(hold.criu)
            if entry.get("criu_start") and start_time_of(hold.criu) != entry["criu_start"]:
                hold.criufd.close()  # another process has its number now
        except ProcessLookupError:
            pass
    log.warning("%s: took over a hold in phase %s", hold.name, hold.phase)
    return hold


def _let_go_unknown(entry: dict[str, Any]) -> None:
    """An entry that makes no hold: unless its target may run, the source goes on, as far as it can be told how. Its CRIU asks
    for a verdict on a hold that nobody has, and lets go."""
    name = str(entry.get("container"))
    if entry.get("phase") not in ("dumping", "held", "aborted"):
        log.error("%s: the hold cannot be taken over, and its target may run: the source stays frozen", name)
        return
    try:
        Fence.from_dict(entry["fence"]).open()
    except Exception as error:
        log.error("%s: its network devices may be shut: %r", name, error)
    path = scan.payload_cgroup(entry["init"])
    if path is not None:
        Cgroup(path).write("cgroup.freeze", "0")
