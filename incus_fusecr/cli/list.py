# SPDX-License-Identifier: Apache-2.0
"""``incus-fusecr list``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from .common import App, common, complete_instance, format_option
from .output import Column, Format, choose, columns_help, document, render

Row = Mapping[str, Any]
_SECONDS = 20.0


def _of(key: str) -> Any:
    return lambda row: row.get(key, "")


COLUMNS: list[Column[Row]] = [
    Column("p", "PROJECT", _of("project"), default=False),
    Column("i", "INSTANCE", _of("instance")),
    Column("n", "CONNECTION", _of("connection"), right=True),
    Column("d", "DAEMON", _of("daemon")),
    Column("P", "PID", _of("pid"), right=True),
    Column("H", "HOST PID", _of("host_pid"), default=False, right=True),
    Column("t", "TYPE", _of("fstype")),
    Column("m", "MOUNTPOINT", _of("mountpoint")),
    Column("M", "MOUNTS", _of("mounts"), right=True),
    Column("h", "HANDLES", _of("handles"), right=True),
    Column("r", "REFERENCES", _of("references"), default=False, right=True),
]


@click.command("list", short_help="List the FUSE connections in containers.")
@click.argument("where", metavar="[REMOTE:][INSTANCE]", default="", shell_complete=complete_instance)
@click.option("-c", "--columns", default="", metavar="LETTERS", help=columns_help(COLUMNS))
@click.option("--all-projects", is_flag=True, help="Instances of all projects, not only of the one in use.")
@format_option
@common
def command(app: App, where: str, columns: str, all_projects: bool, form: Format) -> None:
    """List the FUSE connections in the running containers of a host.

    One line for each connection: the daemon and its pid as the container's own ps shows it, where it is mounted
    first, how many mounts there are of it, and how many files and directories are open on them. The agent of the
    host is asked, which takes the right to edit the server.
    """
    from ..incus.ask import ask_host

    chosen = choose(COLUMNS, columns)
    config = app.config()
    remote, instance = config.parse_optional_instance(where)
    with app.server(config, remote) as server:
        if instance:
            server.require_instance(instance)
        elif not all_projects:
            server.check_project()
        data = all_of(lambda args: ask_host(server, "list", args, _SECONDS))
        rows = rows_of(data, "" if all_projects else server.project, instance)
    click.echo(document(rows, form) if form.is_document else render(rows, chosen, form), nl=False)


def all_of(ask: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The agent's answers to one question after the other, until it has no more, as one.

    :param ask: one question, with these arguments
    """
    found: list[Any] = []
    after: list[Any] = []
    while True:
        page = ask({"after": after} if after else {})
        fresh = page.get("connections") if isinstance(page.get("connections"), list) else []
        found += fresh
        last = fresh[-1] if fresh and isinstance(fresh[-1], dict) else {}
        before, after = after, [last.get("container"), last.get("connection")]
        if page.get("more") is not True or not fresh or after == before:
            return {"connections": found}


def rows_of(data: object, project: str, instance: str) -> list[dict[str, Any]]:
    """The agent's answer as rows.

    :param project: only of this one; ``""`` for all
    :param instance: only of this one; ``""`` for all
    """
    from ..incus.names import split_lxc_name

    found = data.get("connections") if isinstance(data, dict) else None
    rows = []
    for entry in found if isinstance(found, list) else ():
        if not isinstance(entry, dict):
            continue
        its_project, its_instance = split_lxc_name(str(entry.get("container", "")))
        if project in ("", its_project) and instance in ("", its_instance):
            rest = {k: v for k, v in entry.items() if k != "container"}
            rows.append({"project": its_project, "instance": its_instance, **rest})
    return sorted(
        rows, key=lambda row: (row["project"], row["instance"], str(row.get("connection", "")).zfill(12))
    )
