# SPDX-License-Identifier: Apache-2.0
"""``incus-fusecr drill``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click

from ..errors import EXIT_DONE, EXIT_FAILED
from .common import App, common, format_option
from .output import Column, Format, Reporter, clean_long, document, render

Row = Mapping[str, Any]
EVENT_SECONDS = 60.0  # that a kill or an upgrade may take
START_SECONDS = 180.0


def _ms(key: str) -> Any:
    return lambda row: f"{row[key]:.2f}" if row["windows"] else "-"


def _ratio(key: str) -> Any:
    return lambda row: "-" if row[key] is None else f"{row[key]:.2f}"


PHASES: list[Column[Row]] = [
    Column("p", "PHASE", lambda row: row["phase"]),
    Column("e", "EVENTS", lambda row: row["events"] or "-", right=True),
    Column("w", "WINDOWS", lambda row: row["windows"], right=True),
    Column("5", "STALL P50 MS", _ms("p50"), right=True),
    Column("9", "P99 MS", _ms("p99"), right=True),
    Column("m", "MAX MS", _ms("max"), right=True),
    Column("r", "P50 RATIO", _ratio("ratio_p50"), right=True),
    Column("R", "P99 RATIO", _ratio("ratio_p99"), right=True),
    Column("E", "ERRORS", lambda row: row["errors"], right=True),
]
FEATURES: list[Column[Row]] = [
    Column("f", "KERNEL FEATURE", lambda row: row["feature"]),
    Column("l", "SINCE", lambda row: row["since"], right=True),
    Column("s", "STATE", lambda row: row["state"]),
    Column("n", "NOTE", lambda row: row["note"]),
]


@click.command("drill", short_help="Prove on this kernel that a daemon may die and be upgraded.")
@click.option(
    "--kills", type=click.IntRange(0, 100_000), default=20, show_default=True, metavar="N", help="Times it is killed (-9)."
)
@click.option(
    "--upgrades", type=click.IntRange(0, 100_000), default=5, show_default=True, metavar="N", help="Times it is upgraded."
)
@click.option(
    "--containers", type=click.IntRange(1, 50), default=3, show_default=True, metavar="N",
    help="Mount namespaces, each with a writer and a holder of open files.",
)  # fmt: skip
@click.option("--readers", type=click.IntRange(1, 50), default=1, show_default=True, metavar="N", help="Readers in each of them.")
@click.option(
    "--window", type=click.FloatRange(0.05, 60), default=0.5, show_default=True, metavar="SECONDS",
    help="How long is looked at after a kill, and as long before it for comparison.",
)  # fmt: skip
@click.option("--guard", default="", metavar="PATH", help="Guard program instead of the installed one.")
@format_option
@common
def command(app: App, kills: int, upgrades: int, containers: int, readers: int, window: float, guard: str, form: Format) -> int:
    """Prove on this machine's own kernel that a FUSE daemon may die and be upgraded without any client noticing.

    A small file system is mounted, in namespaces of its own, protected as the agent protects lxcfs, and killed and upgraded
    while clients read, write and hold files of it. lxcfs, the agent, containers and the configuration are not touched, and
    need not be there. Takes about a minute.

    A stall is the longest operation of one client within a window; what is shown are quantiles over all clients and windows.
    The control windows are those just before each kill and upgrade. Features of the kernel are shown as used in this run,
    available, or missing.

    Exit code 0: no client saw an error, and nothing is left; 1: else; 3: the kernel or the machine lacks what is named.
    """
    from ..drill import box, features
    from ..guard.client import PROGRAM

    guard = os.path.abspath(guard) if guard else PROGRAM  # the drill has another working directory
    options = {
        "kills": kills, "upgrades": upgrades, "containers": containers, "readers": readers, "window": window,
        "guard": guard, "debug": app.debug, "python": features.require(guard),
    }  # fmt: skip
    result: dict[str, Any] = {}
    seconds = START_SECONDS + (kills + upgrades) * (EVENT_SECONDS + 2 * window)
    with Reporter(quiet=app.quiet) as reporter:
        for told in box.lines(options, seconds):
            reporter.update(str(told.get("progress", "")))
            result = told.get("result", result)
    left = box.left_over(result["connections"])
    result["problems"] += [f"connection {number} is left" for number in left]
    result["outcome"] = "failed" if result["problems"] else "done"
    click.echo(document(result, form) if form.is_document else text_of(result, form), nl=False)
    return EXIT_FAILED if result["problems"] else EXIT_DONE


def text_of(result: Row, form: Format) -> str:
    """Tables of stalls and features, and what they come to."""
    out = render(result["phases"], PHASES, form) + render(result["features"], FEATURES, form)
    if form.kind == "csv":
        return out
    serving = result["serving_ms"]
    if serving["kills"]:
        out += f"Kill to serving: p50 {serving['p50']:.1f} ms, p99 {serving['p99']:.1f} ms, max {serving['max']:.1f} ms.\n"
    if result["getcwd_moments"]:
        out += f"Note: getcwd(2) said ENOENT {result['getcwd_moments']} times while a directory was looked up anew.\n"
    out += "".join(f"Problem: {clean_long(text)}\n" for text in result["problems"])
    verdict = f"{len(result['problems'])} problems" if result["problems"] else "nothing is left"
    return out + (
        f"Linux {result['kernel']}: {result['operations']} operations of {result['clients']} clients in {result['seconds']:.0f} s, "
        f"{result['errors']} errors, {verdict}.\n"
    )
