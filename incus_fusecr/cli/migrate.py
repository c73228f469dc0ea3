# SPDX-License-Identifier: Apache-2.0
"""``incus-fusecr migrate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..errors import FusecrError
from .common import App, common, complete_instance, complete_remote, format_option
from .output import Column, Format, Reporter, clean, document, human_bytes, render

if TYPE_CHECKING:
    from ..migration.model import Carried, Phase, Progress, Report, Verdict

PHASES: list[Column[Phase]] = [
    Column("p", "PHASE", lambda p: p.name),
    Column("s", "SECONDS", lambda p: f"{p.seconds:.2f}", right=True),
    Column("f", "FROZEN", lambda p: "yes" if p.frozen else ""),
    Column("b", "BYTES", lambda p: human_bytes(p.bytes) if p.bytes else "", right=True),
]
FROZEN: list[Column[tuple[str, float]]] = [
    Column("p", "FROZEN FOR", lambda part: part[0]),
    Column("s", "SECONDS", lambda part: f"{part[1]:.3f}", right=True),
]
CARRIED: list[Column[Carried]] = [
    Column("d", "DAEMON", lambda c: c.daemon),
    Column("m", "MOUNTPOINT", lambda c: c.mountpoint),
    Column("h", "HANDLES", lambda c: c.handles, right=True),
    Column("n", "NODES", lambda c: c.nodes, right=True),
]
VERDICTS: list[Column[Verdict]] = [
    Column("l", "VERDICT", lambda v: v.level),
    Column("w", "WHERE", lambda v: v.where),
    Column("t", "WHAT", lambda v: v.what),
    Column("y", "WHY", lambda v: v.why),
    Column("h", "WHAT TO DO", lambda v: v.hint),
]


@click.command("migrate", short_help="Move a running container to another host.")
@click.argument("instance", metavar="[REMOTE:]INSTANCE", shell_complete=complete_instance)
@click.argument("target", metavar="TARGET:[NAME]", shell_complete=complete_remote)
@click.option("--dry-run", is_flag=True, help="Do the preflight only; print the plan and the verdicts.")
@click.option("--keep-source", is_flag=True, help="Leave the source there, stopped, instead of deleting it.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=5),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up then; until the target runs, giving up means that the source runs on.",
)
@click.option(
    "--max-frozen",
    type=click.FloatRange(min=1),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up when the container has stood still for so long; it then runs on where it was.",
)
@click.option(
    "--target-project", default="", metavar="PROJECT", help="Project on the target; the source's by default."
)
@click.option(
    "-s", "--storage", default="", metavar="POOL", help="Storage pool for the root disk on the target."
)
@click.option(
    "-p",
    "--profile",
    "profiles",
    multiple=True,
    metavar="PROFILE",
    help="Profile on the target, instead of all of the source's; may be given again.",
)
@click.option(
    "--progress",
    "progress_form",
    type=click.Choice(["auto", "json", "none"]),
    default="auto",
    show_default=True,
    help="auto: a line on a terminal; json: one JSON object a line on standard error.",
)
@format_option
@common
def command(
    app: App,
    instance: str,
    target: str,
    dry_run: bool,
    keep_source: bool,
    timeout: float,
    max_frozen: float,
    target_project: str,
    storage: str,
    profiles: tuple[str, ...],
    progress_form: str,
    form: Format,
) -> None:
    """Move a running container to another host, while its FUSE mounts are in use.

    The container is copied while it runs, then held still for well under a second while the rest, and the state of
    its processes and of its FUSE connections, goes over; it continues on the target with its open files, addresses
    and established connections. Until the target runs, any failure lets the source run on and cleans the target.

    Both hosts need the incus-fusecr agent; this command needs only what the incus client has for both servers, and
    may run on a third machine. Preflight comes first: as long as it finds something in the way, nothing is touched
    (exit code 3). A container without FUSE mounts is moved the same way.
    """
    from ..migration.model import MigrateRequest

    config = app.config()
    source = config.parse_instance(instance)
    destination = config.parse_target(target, source)
    request = MigrateRequest(
        source_remote=source.remote,
        instance=source.name,
        target_remote=destination.remote,
        target_name=destination.name,
        project=app.project,
        target_project=target_project,
        timeout=timeout,
        max_frozen=max_frozen,
        dry_run=dry_run,
        keep_source=keep_source,
        storage=storage,
        profiles=profiles or None,
    )
    from ..migration.run import migrate

    quiet = app.quiet or progress_form == "none"
    with Reporter(quiet=quiet, as_json=progress_form == "json") as reporter:

        def show(step: Progress) -> None:
            reporter.update(line_of(request.source, step), step.to_dict())

        try:
            report = migrate(request, show)
        except FusecrError as e:
            # A driver that got far enough says what it did, also when it failed.
            partial: Report | None = getattr(e, "report", None)
            reporter.done()
            if partial is not None and (form.is_document or dry_run):
                click.echo(text_of(partial, form), nl=False)
            raise
    click.echo(text_of(report, form), nl=False)


def line_of(what: str, step: Progress) -> str:
    """A step of a migration, for the line of progress."""
    still = " (container held)" if step.frozen else ""
    return f"Migrating {what}: {step.phase}{still}" + (f": {step.text}" if step.text else "")


def text_of(report: Report, form: Format) -> str:
    """The report in the chosen format. A csv holds the phases alone."""
    if form.is_document:
        return document(report.to_dict(), form)
    if form.kind == "csv":
        if report.outcome in ("planned", "refused"):
            return render(report.verdicts, VERDICTS, form)
        return render(report.phases, PHASES, form)
    out = ""
    if report.outcome in ("planned", "refused"):
        out += "".join(f"{n}. {clean(step)}\n" for n, step in enumerate(report.plan, 1))
        if report.verdicts:
            out += render(report.verdicts, VERDICTS, form)
        return out
    out += render(report.phases, PHASES, form)
    if report.frozen_parts:
        out += render(list(report.frozen_parts.items()), FROZEN, form)
    if report.carried:
        out += render(report.carried, CARRIED, form)
    unchecked = [f"{v.what}: {v.why}" for v in report.verdicts if v.level == "warn"]
    out += "".join(f"Warning: {clean(text)}\n" for text in [*unchecked, *report.warnings])
    return out + summary(report) + "\n"


def summary(report: Report) -> str:
    """The last line: what came of it."""
    what = f"{clean(report.source)} -> {clean(report.target)}: {report.outcome}"
    count = f", {human_bytes(report.bytes)} received" if report.bytes else ""
    return f"{what} in {report.seconds:.2f} s, held {report.frozen_seconds:.3f} s, {report.handles} handles{count}"
