# SPDX-License-Identifier: Apache-2.0
"""``incus-fusecr checkpoint``."""

from __future__ import annotations

import click

from .common import App, common, complete_instance, format_option
from .output import Format
from .result import operation_progress, print_result


@click.command("checkpoint", short_help="Save the running state of a container.")
@click.argument("instance", metavar="[REMOTE:]INSTANCE", shell_complete=complete_instance)
@click.argument("snapshot", metavar="[SNAPSHOT]", default="")
@click.option("--stop", is_flag=True, help="Stop the instance; without SNAPSHOT its state is kept beside it.")
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
def command(app: App, instance: str, snapshot: str, stop: bool, timeout: float, form: Format) -> None:
    """Save the running state of a container, its FUSE mounts and their daemons included.

    The state goes into a stateful snapshot, named after the time unless SNAPSHOT is given, and the container runs on.
    With --stop it is stopped; then, without SNAPSHOT, the state stays beside the instance, as after
    incus stop --stateful. Continue from it with incus-fusecr restore.

    The agent is asked first; if something in the container cannot be saved, nothing is touched (exit code 3).
    """
    from ..migration.snapshot import checkpoint

    config = app.config()
    ref = config.parse_instance(instance)
    with app.server(config, ref.remote) as server, operation_progress(app, f"Saving {ref}") as progress:
        result = checkpoint(server, ref.name, snapshot, stop=stop, deadline=timeout, progress=progress)
    print_result(result, form)
