# SPDX-License-Identifier: Apache-2.0
"""Progress and result of ``checkpoint`` and ``restore``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from .common import App
from .output import Column, Format, Reporter, document, render

if TYPE_CHECKING:
    from ..migration.snapshot import Result

COLUMNS: list[Column[Any]] = [
    Column("i", "INSTANCE", lambda r: r.instance),
    Column("a", "ACTION", lambda r: r.action),
    Column("s", "SNAPSHOT", lambda r: r.snapshot),
    Column("S", "STATUS", lambda r: r.status),
    Column("t", "SECONDS", lambda r: f"{r.seconds:.2f}", right=True),
]


@contextmanager
def operation_progress(app: App, text: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A line that shows what an Incus operation reports."""
    with Reporter(quiet=app.quiet) as reporter:
        reporter.update(text)

        def update(metadata: Mapping[str, Any]) -> None:
            shown = [str(v) for k, v in metadata.items() if k.endswith("progress") and isinstance(v, str)]
            reporter.update(f"{text}: {shown[-1]}" if shown else text)

        yield update


def print_result(result: Result, form: Format) -> None:
    """The one line or document."""
    text = document(result.to_dict(), form) if form.is_document else render([result], COLUMNS, form)
    click.echo(text, nl=False)
