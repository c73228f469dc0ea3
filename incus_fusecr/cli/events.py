# SPDX-License-Identifier: Apache-2.0
"""``incus-fusecr events``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import click

from .common import App, common, format_option
from .output import Column, Format, clean_long, document, render

_SECONDS = 20.0


def _time(row: dict[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"])) + f".{int(row['time'] % 1 * 1000):03d}"


def _data(row: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in row["data"].items())


COLUMNS: list[Column[dict[str, Any]]] = [
    Column("n", "NUMBER", lambda row: row["number"], right=True),
    Column("t", "TIME", _time),
    Column("d", "DAEMON", lambda row: row["daemon"]),
    Column("c", "CONNECTION", lambda row: row["connection"] or "", right=True),
    Column("w", "WHAT", lambda row: row["what"]),
    Column("x", "DATA", _data),
]


@click.command("events", short_help="Show what happened to protected daemons.")
@click.option("--since", type=click.IntRange(0), default=0, metavar="NUMBER", help="Only what came after this event.")
@click.option("--follow", is_flag=True, help="Go on with what happens from now on; with -f json one object a line.")
@format_option
@common
def command(app: App, since: int, follow: bool, form: Format) -> None:
    """Show what happened to the protected daemons of this host: deaths, recoveries, upgrades, and what could not be done."""
    found = _ask(since, follow)
    if not follow:
        rows = list(found)
        click.echo(document(rows, form) if form.is_document else render(rows, COLUMNS, form), nl=False)
        return
    for row in found:
        if form.kind == "json":
            click.echo(json.dumps(row))
        elif form.kind == "yaml":
            click.echo("---\n" + document(row, form), nl=False)
        elif form.kind == "csv":
            click.echo(render([row], COLUMNS, Format("csv", False)), nl=False)
        else:
            click.echo(clean_long("  ".join(str(column.value(row)) for column in COLUMNS if column.value(row) != "")))


def _ask(since: int, follow: bool) -> Iterator[dict[str, Any]]:
    from ..recovery.control import checked, lines

    for line in lines({"op": "events", "since": since, "follow": follow}, None if follow else _SECONDS):
        row = checked(json.loads(line))
        if "number" in row:
            yield row
