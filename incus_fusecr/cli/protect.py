# SPDX-License-Identifier: Apache-2.0
"""``incus-fusecr protect``."""

from __future__ import annotations

import click

from .common import App, common, format_option
from .output import Format, choose, document, render
from .status import COLUMNS


@click.command("protect", short_help="Protect a daemon of this host again.")
@click.argument("name", metavar="[NAME]", default="")
@format_option
@common
def command(app: App, name: str, form: Format) -> None:
    """Protect daemons of this host: the one called NAME in /etc/incus-fusecr/daemons.conf, or all that are to be.

    The agent does that by itself at its start; this undoes incus-fusecr unprotect.
    """
    from ..recovery.control import ask

    units = ask({"op": "protect", "name": name})["units"]
    click.echo(document(units, form) if form.is_document else render(units, choose(COLUMNS, ""), form), nl=False)
