# SPDX-License-Identifier: Apache-2.0
"""``incus-fusecr restore``."""

from __future__ import annotations

import click

from .common import App, common, complete_instance, format_option
from .output import Format
from .result import operation_progress, print_result


@click.command("restore", short_help="Continue a container from a saved running state.")
@click.argument("instance", metavar="[REMOTE:]INSTANCE", shell_complete=complete_instance)
@click.argument("snapshot", metavar="[SNAPSHOT]", default="")
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up then.",
)
@format_option
@common
def command(app: App, instance: str, snapshot: str, timeout: float, form: Format) -> None:
    """Continue a container from a saved running state.

    With SNAPSHOT from that stateful snapshot, also if the container runs now: what it did since is dropped. Without,
    from the state that incus-fusecr checkpoint --stop or incus stop --stateful left beside the stopped instance.

    If there is no running state to continue from, nothing is touched (exit code 3).
    """
    from ..migration.snapshot import restore

    config = app.config()
    ref = config.parse_instance(instance)
    with app.server(config, ref.remote) as server, operation_progress(app, f"Restoring {ref}") as progress:
        result = restore(server, ref.name, snapshot, deadline=timeout, progress=progress)
    print_result(result, form)
