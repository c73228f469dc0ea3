# SPDX-License-Identifier: Apache-2.0
"""``incus-fusecr status``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ..errors import EXIT_DONE, EXIT_FAILED
from .common import App, common, format_option
from .output import Column, Format, choose, columns_help, document, render

Row = Mapping[str, Any]


def _or_dash(key: str) -> Any:
    return lambda row: row.get(key) or "-"


def _old(row: Row) -> int:
    return sum(link.get("role") == "old" for link in row.get("connections", ()))


COLUMNS: list[Column[Row]] = [
    Column("n", "NAME", lambda row: row["name"]),
    Column("i", "INSTANCE", _or_dash("instance"), default=False),
    Column("s", "STATE", lambda row: row["state"]),
    Column("p", "PID", _or_dash("pid"), right=True),
    Column("c", "CONNECTION", _or_dash("connection"), right=True),
    Column("S", "SPARE", _or_dash("spare"), right=True),
    Column("o", "OLD", _old, right=True),
    Column("f", "FAILURES", lambda row: row["failures"], default=False, right=True),
    Column("e", "EXECUTABLE", _or_dash("exe"), default=False),
    Column("m", "MOUNTPOINT", lambda row: row["mountpoint"]),
    Column("w", "PROBLEM", lambda row: row["problem"]),
]


@click.command("status", short_help="Show the daemons that are protected.")
@click.option("-c", "--columns", default="", metavar="LETTERS", help=columns_help(COLUMNS))
@format_option
@common
def command(app: App, columns: str, form: Format) -> int:
    """Show the daemons of this host, and of its containers, that are protected against their own death and upgrade.

    SPARE is the pid of the daemon that takes over at once; OLD counts connections of former daemons that somebody still has
    files open on. As JSON or YAML each connection is shown, with its guard.

    Exit code 0: all is well; 1: a daemon is being recovered, or has a problem.
    """
    from ..recovery.control import ask

    chosen = choose(COLUMNS, columns)
    units = ask({"op": "status"})["units"]
    click.echo(document(units, form) if form.is_document else render(units, chosen, form), nl=False)
    well = all(unit["state"] in ("protected", "unprotected") and not unit["problem"] for unit in units)
    return EXIT_DONE if well else EXIT_FAILED
