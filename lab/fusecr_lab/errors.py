# SPDX-License-Identifier: Apache-2.0
"""The one error that the lab shows to its user."""

from __future__ import annotations

TAIL_LINES = 20
TAIL_BYTES = 4000


class LabError(Exception):
    """What failed, on what, why and what to do: printed without a traceback."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def tail(text: str) -> str:
    """Return the last lines of a command's output, indented, for an error message."""
    lines = text[-TAIL_BYTES:].rstrip().splitlines()[-TAIL_LINES:]
    return "\n".join("    " + line for line in lines) if lines else "    (no output)"
