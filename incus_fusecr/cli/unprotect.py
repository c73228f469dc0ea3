# SPDX-License-Identifier: Apache-2.0
"""``incus-fusecr unprotect``."""

from __future__ import annotations

import click

from .common import App, common
from .output import clean_long


@click.command("unprotect", short_help="Give a daemon of this host back as it is.")
@click.argument("name", metavar="NAME")
@common
def command(app: App, name: str) -> None:
    """Protect the daemon called NAME no longer. It runs on, and no mount is changed.

    Files that are open on connections of former daemons are served on until they are closed.
    """
    from ..recovery.control import ask

    for text in ask({"op": "unprotect", "name": name})["kept"]:
        click.echo(f"Kept: {clean_long(text)}")
