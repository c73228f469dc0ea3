# SPDX-License-Identifier: Apache-2.0
"""INIT replies of daemons that live now, by pid and start time, in the journal.

A daemon that was restored here negotiated with another kernel: its reply is the one of its manifest, not what a fresh copy
of it would answer this kernel.
"""

from __future__ import annotations

from typing import Any

from ..linux import proc
from .journal import Journal

KIND = "init"


def remember(journal: Journal, daemon: int, reply: bytes) -> None:
    """Keep the reply of ``daemon``, a pid here."""
    journal.write(KIND, str(daemon), {"pid": daemon, "start": _start(daemon), "reply": reply.hex()})


def recall(journal: Journal, daemon: int) -> bytes | None:
    """The reply of ``daemon``, None if it is not known."""
    known = journal.read(KIND, str(daemon))
    if known is None or known.get("start") != _start(daemon):
        return None
    return bytes.fromhex(known["reply"])


def forget_the_dead(journal: Journal) -> None:
    """Drop the replies of daemons that are gone."""

    def look(entry: dict[str, Any]) -> None:
        if _start(entry["pid"]) != entry["start"]:
            journal.remove(KIND, str(entry["pid"]))

    journal.each(KIND, look)


def _start(pid: int) -> int:
    try:
        return proc.start_time(pid)
    except (FileNotFoundError, ProcessLookupError):
        return -1
