# SPDX-License-Identifier: Apache-2.0
"""``incus-fusecr completion``."""

from __future__ import annotations

import click

from .common import App, common


@click.command("completion", short_help="Print the completion script for a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common
def command(app: App, shell: str) -> None:
    """Print the completion script for a shell.

    \b
    bash:  incus-fusecr completion bash > /etc/bash_completion.d/incus-fusecr
    zsh:   incus-fusecr completion zsh > "${fpath[1]}/_incus-fusecr"
    fish:  incus-fusecr completion fish > ~/.config/fish/completions/incus-fusecr.fish
    """
    from click.shell_completion import get_completion_class

    from .main import PROGRAM, cli

    variable = f"_{PROGRAM}_COMPLETE".replace("-", "_").upper()
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, PROGRAM, variable).source(), nl=False)
