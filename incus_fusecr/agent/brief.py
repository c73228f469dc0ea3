# SPDX-License-Identifier: Apache-2.0
"""Lists and texts as short as a report may be (:data:`incus_fusecr.incus.ask.MAX_TEXT`), and never silently shorter.

A container decides how many there are and how long their names are: paths of 4096 bytes, each of which may take six
characters in JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from ..checkpoint.survive import Verdict
from ..errors import FusecrError

T = TypeVar("T")
MAX_VERDICTS = 100
TEXT = 400  # characters
NAME = 200
ERROR_TEXT = 4000
ROOM = 96 << 10  # bytes of one list


def short(text: str, most: int = TEXT) -> str:
    """``text`` with its middle left out where it is longer."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 3]}...{text[-tail:]}"


def fitting(items: Iterable[T], room: int = ROOM) -> list[T]:
    """The first ones, as many as take no more than ``room`` bytes of JSON."""
    kept = []
    for item in items:
        room -= len(json.dumps(item)) + 2
        if room < 0:
            break
        kept.append(item)
    return kept


def verdicts(found: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The first verdicts, and one that says how many more there are."""
    texts = ({key: short(text) for key, text in v.to_dict().items()} for v in found[:MAX_VERDICTS])
    kept: list[dict[str, Any]] = fitting(texts)
    left = len(found) - len(kept)
    if left:
        kept.append(Verdict(f"and {left} more", "are not listed here", "put these right, then check again").to_dict())
    return kept


def error(failure: FusecrError) -> dict[str, str]:
    """An error's texts."""
    return {key: short(text, ERROR_TEXT) for key, text in failure.to_dict().items()}
