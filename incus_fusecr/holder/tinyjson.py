# SPDX-License-Identifier: Apache-2.0
"""JSON without the module json, whose regular expressions are a megabyte and a half of every holder.

Both halves are the C ones that json itself uses; :func:`loads` is stricter than json's.
"""

from __future__ import annotations

from _json import encode_basestring_ascii, make_encoder, make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_SPACE = " \t\n\r"


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is there twice")
    return members


def _no_default(value: object) -> NoReturn:
    raise TypeError(type(value).__name__)


class _Context:
    """What json.JSONDecoder is to the scanner."""

    strict = True
    object_hook = None
    object_pairs_hook = staticmethod(_no_repeats)
    parse_float = float
    parse_int = int
    parse_constant = staticmethod(_no_constant)
    memo: dict[str, str] = {}  # noqa: RUF012


_scan = make_scanner(_Context())  # type: ignore[arg-type]
_encode = make_encoder(None, _no_default, encode_basestring_ascii, None, ":", ",", False, False, False)


def loads(data: bytes) -> object:
    """Without NaN, and without a member that is there twice.

    :raises ValueError, RecursionError: it is no JSON
    """
    text = data.decode().strip(_SPACE)
    try:
        value, end = _scan(text, 0)
    except StopIteration as error:
        raise ValueError(f"a value is missing at {error.value}") from None
    if end != len(text):
        raise ValueError(f"more text at {end}")
    return value


def dumps(value: object) -> str:
    """In ASCII, without spaces.

    :raises ValueError, RecursionError: a number that JSON lacks; nested too deep
    """
    return "".join(_encode(value, 0))
