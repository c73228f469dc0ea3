# SPDX-License-Identifier: Apache-2.0
"""``incus-fusecr``: the group of commands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from .. import __version__
from ..errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, FusecrError
from .common import App, start_logging
from .output import error_line

PROGRAM = "incus-fusecr"

# Command -> module of this package; imported when used, since each knows what it needs.
_COMMANDS = {
    "migrate": "migrate",
    "checkpoint": "checkpoint",
    "restore": "restore",
    "check": "check",
    "list": "list",
    "status": "status",
    "protect": "protect",
    "unprotect": "unprotect",
    "upgrade": "upgrade",
    "events": "events",
    "drill": "drill",
    "agent": "agent",
    "completion": "completion",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f".{_COMMANDS[cmd_name]}", __package__)
        command: click.Command = module.command
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Exit codes:
  0    done
  1    failed; the source runs on unharmed
  2    usage: the command line names something that does not exist or does not fit
  3    refused before anything was touched
  4    the state is uncertain; the message names where to look
  130  interrupted; what was begun was taken back, the source runs on
""",
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.option("--project", default="", metavar="PROJECT", help="Project to use instead of the default one.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--debug", is_flag=True, help="Log on standard error what is done; show a fault's origin.")
@click.pass_context
def cli(ctx: click.Context, project: str, quiet: bool, debug: bool) -> None:
    """Checkpoint and live-migrate Incus containers that have FUSE daemons inside.

    An instance is written [REMOTE:]INSTANCE, as for the incus client; remotes, certificates and projects are
    taken from its configuration.
    """
    ctx.obj = App(project=project, quiet=quiet, debug=debug)
    start_logging(debug)


def main(args: Sequence[str] | None = None) -> None:
    """The program. Does not return.

    SIGTERM and SIGHUP end it as ctrl-C does: a migration under way is taken back first.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        code = run(arguments)
    except SystemExit:
        raise
    except BaseException as e:
        if debug:
            traceback.print_exc()
        code = explain(e, debug=debug)
    _flush()
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """The program without its handling of errors."""
    result = cli.main(args=list(arguments), prog_name=PROGRAM, standalone_mode=False)
    return result if isinstance(result, int) else 0


def explain(error: BaseException, *, debug: bool = False) -> int:
    """Say on standard error what went wrong. :returns: the exit code"""
    if isinstance(error, FusecrError):
        _say(error_line(error))
        return error.exit_code
    if isinstance(error, (KeyboardInterrupt, click.exceptions.Abort)):
        _say(error_line("interrupted"))
        return EXIT_INTERRUPTED
    # click before 8.2 prints the help by itself
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        assert isinstance(error, click.ClickException)
        _say(error.format_message())
        return EXIT_USAGE
    if isinstance(error, click.ClickException):
        _say(error_line(error.format_message()))
        context: Any = getattr(error, "ctx", None)
        if context is not None:
            _say(f"Try: {context.command_path} --help")
        return EXIT_USAGE
    if isinstance(error, BrokenPipeError):
        return EXIT_FAILED
    text = f"unexpected {type(error).__name__}: {error}"
    _say(error_line(text if debug else f"{text}; run with --debug and report it"))
    return EXIT_FAILED


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        # A reader such as head that has left: the interpreter would complain about it at its end.
        sys.stdout = None


if __name__ == "__main__":
    main()
