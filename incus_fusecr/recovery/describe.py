# SPDX-License-Identifier: Apache-2.0
"""What there is to tell of a protected daemon."""

from __future__ import annotations

from typing import Any

from ..linux import proc
from .link import Link
from .unit import Unit


def describe(unit: Unit) -> dict[str, Any]:
    """What there is to tell of a unit."""
    current, warm = unit.link(unit.current), unit.link(unit.warm)
    links = [_describe_link(unit, link) for link in unit.links.values()]
    state = "unprotected" if unit.paused else "protected"
    if not unit.paused and (current is None or not current.alive()):
        state = "recovering" if unit.links or unit.recipe else "waiting"
    elif not unit.paused and (current is None or current.guard is None or not current.guard.alive()):
        state = "unguarded"
    return {
        "name": unit.key,
        "instance": unit.instance,
        "mountpoint": proc.printable(unit.mountpoint),
        "state": state,
        "pid": current.daemon.pid if current else 0,
        "connection": unit.current or 0,
        "exe": proc.printable(unit.recipe.exe) if unit.recipe else "",
        "spare": warm.daemon.pid if warm else 0,
        "failures": unit.restarts.failures,
        "problem": unit.problem,
        "connections": links,
    }


def _describe_link(unit: Unit, link: Link) -> dict[str, Any]:
    roles = {unit.current: "current", unit.warm: "spare"}
    found = unit.context.guards.status(link)
    counted = ("nodes", "handles", "pending", "requests", "respawns")
    numbers: dict[str, Any] = {key: int(found[key]) for key in counted if key in found}
    return {
        "connection": link.number,
        "role": roles.get(link.number, "old"),
        "daemon": link.daemon.pid,
        "alive": link.alive(),
        "guard": link.guard.process.pid if link.guard else 0,
        "phase": found.get("phase", "none"),
        "sidecar": int(found.get("sidecar", 0)),
        **numbers,
    }
