# SPDX-License-Identifier: Apache-2.0
"""``incus-fusecr upgrade``."""

from __future__ import annotations

import os

import click

from .common import App, common, format_option
from .output import Column, Format, document, render

_COLUMNS: list[Column[dict[str, object]]] = [
    Column("p", "PID", lambda row: row["pid"], right=True),
    Column("c", "CONNECTION", lambda row: row["connection"], right=True),
    Column("e", "EXECUTABLE", lambda row: row["exe"]),
    Column("o", "OLD CONNECTION", lambda row: f"{row['old_connection']} {'ended' if row['drained'] else 'in use'}"),
    Column("s", "SECONDS", lambda row: row["seconds"], right=True),
]


@click.command("upgrade", short_help="Replace a protected daemon by a new one.")
@click.argument("name", metavar="NAME")
@click.option("--exec", "path", default="", metavar="PATH", help="Executable of the new one instead of the present one's.")
@click.option(
    "--watch", type=click.FloatRange(0, 600), default=6.0, show_default=True, metavar="SECONDS",
    help="So long the new one has to live before anybody gets it.",
)  # fmt: skip
@format_option
@common
def command(app: App, name: str, path: str, watch: float, form: Format) -> None:
    """Replace the protected daemon NAME by a new one, started from the executable as it is on disk now.

    No client notices. If the new one does not start, ends while it is watched, does not answer or negotiates something else
    with the kernel, the old one stays. If it ends by itself within a minute after that, the old executable serves again.
    """
    from ..recovery.control import ask
    from ..recovery.supervisor import REQUEST_SECONDS

    request = {"op": "upgrade", "name": name, "exec": os.path.abspath(path) if path else "", "watch": watch}
    found = ask(request, 2 * REQUEST_SECONDS + watch)
    found.pop("ok", None)
    click.echo(document(found, form) if form.is_document else render([found], _COLUMNS, form), nl=False)
