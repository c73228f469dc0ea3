# SPDX-License-Identifier: Apache-2.0
"""What all commands share: the options that may stand before or after a command's name, and completion."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import FusecrError, UsageError
from .output import KINDS, Format, clean_long, parse_format

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ..incus.client import Server
    from ..incus.config import Config

F = TypeVar("F", bound=Callable[..., Any])
_COMPLETION_SECONDS = 1.5


@dataclass
class App:
    """The global options, and what every command gets from them."""

    project: str = ""
    quiet: bool = False
    debug: bool = False

    def config(self) -> Config:
        """The incus client's configuration, read when it is needed."""
        from ..incus.config import Config

        return Config.load(self.project)

    def server(self, config: Config, remote: str, project: str = "") -> Server:
        """A connection to the server of a remote."""
        from ..incus.client import Server

        return Server.open(config, remote, project)


def common(command: F) -> F:
    """``--project``, ``--quiet`` and ``--debug``, also after the command's name; the command gets ``app`` first."""

    def with_app(ctx: click.Context, /, project: str, quiet: bool, debug: bool, **kwargs: Any) -> Any:
        app = ctx.ensure_object(App)
        app.project = project or app.project
        app.quiet = quiet or app.quiet
        app.debug = debug or app.debug
        start_logging(app.debug)
        return ctx.invoke(command, app, **kwargs)

    # The command's own options and its help text are attributes of the function.
    functools.update_wrapper(with_app, command)
    wrapped: Any = functools.update_wrapper(click.pass_context(with_app), command)
    for option in (
        click.option(
            "--debug", is_flag=True, help="Log on standard error what is done; show a fault's origin."
        ),
        click.option("-q", "--quiet", is_flag=True, help="No progress."),
        click.option(
            "--project", default="", metavar="PROJECT", help="Project to use instead of the default one."
        ),
    ):
        wrapped = option(wrapped)
    result: F = wrapped
    return result


def format_option(command: F) -> F:
    """``-f``; the command gets a :class:`Format` as ``form``."""

    def convert(ctx: click.Context, param: click.Parameter, value: str) -> Format:
        try:
            return parse_format(value)
        except UsageError as e:
            raise click.BadParameter(str(e), ctx, param) from e

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        return [kind for kind in KINDS if kind.startswith(incomplete)]

    option = click.option(
        "-f",
        "--format",
        "form",
        default="table",
        show_default=True,
        callback=convert,
        shell_complete=complete,
        metavar="FORMAT",
        help="table, compact, csv, json or yaml; add ,noheader or ,header for rows without or with titles.",
    )
    return option(command)


def start_logging(debug: bool) -> None:
    """Warnings, or everything, on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _OneLine("%(levelname)s: %(message)s" if not debug else "%(levelname)s %(name)s: %(message)s")
    )
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if not isinstance(h.formatter, _OneLine)] + [handler]
    root.setLevel(logging.DEBUG if debug else logging.WARNING)
    for chatty in ("urllib3", "websockets", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.INFO if debug else logging.ERROR)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        record.levelname = record.levelname.capitalize()
        return super().format(record) if record.exc_info else clean_long(super().format(record))


def complete_remote(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """``REMOTE:`` for the shell."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(name) for name in _remotes(ctx) if name.startswith(incomplete)]


def complete_instance(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """``[REMOTE:]INSTANCE`` for the shell: remotes, and the instances of the one that is typed already."""
    from click.shell_completion import CompletionItem

    remote, colon, _ = incomplete.partition(":")
    found = [] if colon else _remotes(ctx)
    try:
        from ..incus.client import Server

        config = App().config()
        endpoint = config.endpoint(remote if colon else config.default_remote)
        with Server(
            endpoint, connect_seconds=_COMPLETION_SECONDS, read_seconds=_COMPLETION_SECONDS
        ) as server:
            prefix = f"{remote}:" if colon else ""
            found += [prefix + str(instance["name"]) for instance in server.instances()]
    except FusecrError:
        pass
    return [CompletionItem(name) for name in found if name.startswith(incomplete)]


def _remotes(ctx: click.Context) -> list[str]:
    try:
        config = App().config()
    except FusecrError:
        return []
    return [
        f"{name}:" for name, remote in sorted(config.remotes.items()) if remote.protocol != "simplestreams"
    ]
