# SPDX-License-Identifier: Apache-2.0
"""What the holder holds, and what it lets in. No system call but close(2)."""

from __future__ import annotations

import bisect
import os

from . import tinyjson

TYPE_CHECKING = False
if TYPE_CHECKING:  # the module typing costs a megabyte
    from collections.abc import Sequence

MAX_MESSAGE = 65536  # bytes of a datagram
MAX_FDS = 64  # of an entry
MAX_META = 48 << 10  # bytes of an entry's meta as ASCII JSON, so that every answer fits into a message
MAX_KEYS = 4096
MAX_ALL_FDS = 8192
MAX_ALL_META = 16 << 20

_KEY = frozenset("abcdefghijklmnopqrstuvwxyz0123456789.-")
MAX_KEY = 100
_MEMBERS = {
    "put": {"op", "key", "meta"},
    "meta": {"op", "key", "meta"},
    "get": {"op", "key"},
    "drop": {"op", "key"},
    "list": {"op", "after"},
}


class Bad(Exception):
    """A message that is refused; the text is for the one who sent it."""

    missing = False


class Missing(Bad):
    """The message is right, its key is not there."""

    missing = True


class Request:
    """A message that was found right. ``meta`` is JSON in ASCII; for ``list``, ``key`` is where it goes on."""

    __slots__ = ("key", "meta", "op")

    def __init__(self, op: str, key: str, meta: str) -> None:
        self.op = op
        self.key = key
        self.meta = meta


class Entry:
    """``generation`` grows with each change, over all keys and lives of the holder."""

    __slots__ = ("fds", "generation", "meta")

    def __init__(self, fds: Sequence[int], meta: str, generation: int) -> None:
        self.fds = tuple(fds)
        self.meta = meta
        self.generation = generation


def load_object(data: bytes) -> dict[str, object]:
    """A JSON object, without NaN and without a member that is there twice.

    :raises Bad: it is none
    """
    try:
        value = tinyjson.loads(data)
    except (ValueError, RecursionError) as error:
        raise Bad(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Bad("not a JSON object")
    return value


def check_key(value: object) -> str:
    """
    :raises Bad: it is no key
    """
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_KEY or not _KEY.issuperset(value):
        raise Bad("key: 1 to 100 of a-z 0-9 . - are allowed")
    return value


def check_meta(value: object) -> str:
    """
    :raises Bad: it is no object, or too long
    """
    if not isinstance(value, dict):
        raise Bad("meta: an object is needed")
    try:
        text = tinyjson.dumps(value)
    except (ValueError, RecursionError) as error:  # 1e999 is read as infinity
        raise Bad(f"meta: {error}") from None
    if len(text) > MAX_META:
        raise Bad(f"meta: {len(text)} bytes as ASCII JSON, {MAX_META} are allowed")
    return text


def parse(data: bytes) -> Request:
    """
    :raises Bad: the message is not exactly one of the protocol's
    """
    if len(data) > MAX_MESSAGE:
        raise Bad(f"a message has at most {MAX_MESSAGE} bytes")
    message = load_object(data)
    op = message.get("op")
    members = _MEMBERS.get(op) if isinstance(op, str) else None
    if members is None:
        raise Bad(f"op: one of {', '.join(_MEMBERS)} is needed")
    if message.keys() != members:
        raise Bad(f"{op}: has the members {', '.join(sorted(members))}, no others")
    if op == "list":
        after = message["after"]
        return Request("list", check_key(after) if after != "" else "", "")
    return Request(str(op), check_key(message["key"]), check_meta(message["meta"]) if "meta" in members else "")


class Table:
    """Bounded, in the order of keys."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._keys: list[str] = []
        self._fds = 0
        self._metas = 0
        self.generation = 0

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def admit(self, key: str, meta: str, fds: Sequence[int]) -> Entry:
        """The entry that :meth:`set` may take.

        :raises Bad: a bound would be broken
        """
        old = self._entries.get(key)
        if old is None and len(self._keys) >= MAX_KEYS:
            raise Bad(f"{MAX_KEYS} keys are held, no more are allowed")
        if self._fds - (len(old.fds) if old else 0) + len(fds) > MAX_ALL_FDS:
            raise Bad(f"more than {MAX_ALL_FDS} fds in all")
        if self._metas - (len(old.meta) if old else 0) + len(meta) > MAX_ALL_META:
            raise Bad(f"more than {MAX_ALL_META} bytes of meta in all")
        return Entry(fds, meta, self.generation + 1)

    def set(self, key: str, entry: Entry) -> Entry | None:
        """Put it in; the one before, whose fds are the caller's now unless both have them."""
        old = self.remove(key)
        self._entries[key] = entry
        bisect.insort(self._keys, key)
        self._fds += len(entry.fds)
        self._metas += len(entry.meta)
        self.generation = max(self.generation, entry.generation)
        return old

    def remove(self, key: str) -> Entry | None:
        """Take it out; its fds are the caller's now."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            del self._keys[bisect.bisect_left(self._keys, key)]
            self._fds -= len(entry.fds)
            self._metas -= len(entry.meta)
        return entry

    def page(self, after: str) -> str:
        """The answer to ``list``: so many entries as one message has room for, at least one."""
        start = bisect.bisect_right(self._keys, after) if after else 0
        parts: list[str] = []
        room = MAX_MESSAGE - 64
        for key in self._keys[start:]:
            entry = self._entries[key]
            part = f'{{"key":"{key}","fds":{len(entry.fds)},"meta":{entry.meta}}}'
            room -= len(part) + 1
            if room < 0:
                break
            parts.append(part)
        more = "true" if start + len(parts) < len(self._keys) else "false"
        return f'{{"ok":true,"entries":[{",".join(parts)}],"more":{more}}}'


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
