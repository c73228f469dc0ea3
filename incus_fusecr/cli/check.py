# SPDX-License-Identifier: Apache-2.0
"""``incus-fusecr check``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ..errors import EXIT_DONE, EXIT_REFUSED
from .common import App, common, complete_instance, format_option
from .list import COLUMNS as CONNECTION_COLUMNS
from .output import Column, Format, choose, clean_long, document, render

_HOST_SECONDS = 20.0
_INSTANCE_SECONDS = 60.0

Row = Mapping[str, Any]
FACTS: list[Column[tuple[str, object]]] = [
    Column("f", "FACT", lambda row: row[0]),
    Column("v", "VALUE", lambda row: row[1]),
]
VERDICTS: list[Column[Row]] = [
    Column("w", "IN THE WAY", lambda row: row.get("what", "")),
    Column("y", "WHY", lambda row: row.get("why", "")),
    Column("h", "WHAT TO DO", lambda row: row.get("hint", "")),
]


@click.command("check", short_help="Tell what a host or a container can do, and why not.")
@click.argument("where", metavar="[REMOTE:][INSTANCE]", default="", shell_complete=complete_instance)
@format_option
@common
def command(app: App, where: str, form: Format) -> int:
    """Tell what a host, and a container on it, can do, and if not, why and what to do about it.

    Without INSTANCE: the versions on the host and what it lacks. With INSTANCE, which must be running: also its FUSE
    connections, and each setting of it and thing in it that could not be carried over; a note tells what is in the way
    of a checkpoint only, or should be known. Nothing is touched.

    Exit code 0: nothing is in the way; 3: something is.
    """
    config = app.config()
    remote, instance = config.parse_optional_instance(where)
    with app.server(config, remote) as server:
        found = look(server, instance)
    if form.is_document:
        click.echo(document(found, form), nl=False)
    else:
        click.echo(text_of(found, form), nl=False)
    return EXIT_DONE if found["fit"] else EXIT_REFUSED


def look(server: Any, instance: str) -> dict[str, Any]:
    """Ask the agent of a host for its facts, and for those of one of its containers.

    :raises Forbidden: nothing can be told, as this client may ask for nothing
    """
    from ..incus.conversation import ask_instance
    from ..incus.failures import Forbidden
    from ..migration import settings
    from ..migration.facts import host_facts
    from ..migration.instance import require_running_container

    config: dict[str, str] = {}
    if instance:
        config = require_running_container(server, instance).get("expanded_config") or {}
    else:
        server.check_project()
    notes: list[dict[str, str]] = []
    try:
        host = host_facts(server, _HOST_SECONDS)
    except Forbidden:
        if not instance:
            raise
        host = {}
        why = "this client may neither write the server's configuration nor a profile: not checked"
        notes.append({"what": f"facts of {server.name}", "why": why, "hint": ""})
    found: dict[str, Any] = {
        "remote": server.name,
        "server_version": str(server.environment.get("server_version", "")),
        "host": {k: v for k, v in host.items() if k not in ("missing", "fuse_init")},
        "verdicts": [
            {
                "what": _text(m, "what"),
                "why": _text(m, "why") or "missing on the host",
                "hint": _text(m, "hint"),
            }
            for m in _dicts(host.get("missing"))
        ],
        "notes": notes,
    }
    if instance:
        where = f"{server.name}:{instance}"
        report = ask_instance(server, instance, "check", {}, _INSTANCE_SECONDS, phases=("checked",))
        found["instance"] = instance
        found["connections"] = _dicts(report.data.get("connections"))
        verdicts = [v.to_dict() for v in settings.to_migrate(config, where)] + _dicts(report.data.get("verdicts"))
        found["verdicts"] += [_three(v) for v in verdicts]
        notes += [_three(v) for v in _dicts(report.data.get("notes"))]
        once = settings.restored_once(server.environment, where) if report.data.get("restored") is True else None
        if once is not None:
            notes.append(_three(once.to_dict()))
    elif (verdict := settings.idmapped(server.environment, {}, server.name)) is not None:
        found["verdicts"].append(_three(verdict.to_dict()))
    found["fit"] = not found["verdicts"]
    return found


def text_of(found: Mapping[str, Any], form: Format) -> str:
    """The answer as tables."""
    facts: list[tuple[str, object]] = [("incus", found["server_version"])]
    facts += [("incus-fusecr" if k == "version" else k, v) for k, v in found["host"].items()]
    out = render(facts, FACTS, form)
    if found.get("connections"):
        columns = [c for c in choose(CONNECTION_COLUMNS, "ndPtmMh")]
        out += render(found["connections"], columns, form)
    if found["verdicts"]:
        out += render(found["verdicts"], VERDICTS, form)
    if form.kind == "csv":
        return out
    for note in found["notes"]:
        out += f"Note: {clean_long(note['what'])}: {clean_long(note['why'])}" + (
            f" ({clean_long(note['hint'])})\n" if note["hint"] else "\n"
        )
    if found["verdicts"]:
        return out
    who = f"{found['remote']}:{found['instance']}" if found.get("instance") else str(found["remote"])
    return out + f"Nothing is in the way on {who}.\n"


def _dicts(value: object) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _three(entry: Mapping[str, Any]) -> dict[str, str]:
    return {key: _text(entry, key) for key in ("what", "why", "hint")}


def _text(entry: Mapping[str, Any], key: str) -> str:
    return str(entry.get(key) or "")
