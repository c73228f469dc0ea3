# SPDX-License-Identifier: Apache-2.0
"""One exception root; its message is what a human reads, its exit code what a script sees.

Exit codes of every command (documented once, here and in the manual page):

=== ====================================================================
0   done
1   failed; the source runs on unharmed
2   usage
3   refused before anything was touched
4   the state is uncertain; the message names where to look
130 interrupted; what was begun was taken back, the source runs on
=== ====================================================================
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REFUSED = 3
EXIT_UNCERTAIN = 4
# As a shell reports a command that ctrl-C ended.
EXIT_INTERRUPTED = 130


class FusecrError(Exception):
    """What failed, on what, why, and what to do about it.

    :param what: the failed step and its object, e.g. ``hold of h1:web``
    :param why: the reason, as found
    :param hint: what the operator can do; may be empty
    """

    exit_code = EXIT_FAILED

    def __init__(self, what: str, why: str = "", hint: str = "") -> None:
        super().__init__(what, why, hint)
        self.what = what
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        text = self.what
        if self.why:
            text += f": {self.why}"
        if self.hint:
            text += f" ({self.hint})"
        return text

    def to_dict(self) -> dict[str, str]:
        """For reports in JSON."""
        return {"what": self.what, "why": self.why, "hint": self.hint}


class UsageError(FusecrError):
    """The command line names something that does not exist or does not fit."""

    exit_code = EXIT_USAGE


class Refused(FusecrError):
    """Preflight found something that cannot be carried over; nothing was touched."""

    exit_code = EXIT_REFUSED


class Uncertain(FusecrError):
    """The state of an instance could not be established; the message says where to look."""

    exit_code = EXIT_UNCERTAIN


class Interrupted(FusecrError):
    """A signal asked for the end of it; what was begun was taken back."""

    exit_code = EXIT_INTERRUPTED
