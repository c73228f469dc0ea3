# SPDX-License-Identifier: Apache-2.0
"""What the agent must remember when it dies: one JSON file per session, on a file system that ends with the boot.

Written before the deed, replaced atomically; the next agent reads them and finishes the job.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

RUN = "/run/incus-fusecr"


class Journal:
    """Files ``PREFIX-NAME.json`` in a directory of mode 0700. One that cannot be read becomes ``PREFIX-NAME.json.bad``."""

    def __init__(self, directory: str = f"{RUN}/journal") -> None:
        self.directory = directory
        self._count = itertools.count()
        os.makedirs(directory, mode=0o700, exist_ok=True)
        for name in os.listdir(directory):
            if name.endswith(".new"):  # of an agent that died while it wrote
                os.unlink(os.path.join(directory, name))

    def _path(self, kind: str, name: str) -> str:
        return os.path.join(self.directory, f"{kind}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.json")

    def write(self, kind: str, name: str, entry: dict[str, Any]) -> None:
        """Write or replace an entry.

        :raises OSError: it is not on disk; the deed must not be done
        """
        # A name of its own: two threads that write the same entry must not take each other's half.
        temporary = os.path.join(self.directory, f".{os.getpid()}-{next(self._count)}.new")
        try:
            with open(temporary, "w") as file:
                os.fchmod(file.fileno(), 0o600)
                json.dump({**entry, "kind": kind, "name": name}, file)
            os.rename(temporary, self._path(kind, name))
        except BaseException:
            _unlink(temporary)
            raise

    def remove(self, kind: str, name: str) -> None:
        """Forget an entry; none is fine."""
        _unlink(self._path(kind, name))

    def set_aside(self, kind: str, name: str) -> None:
        """Keep an entry for people to look at; the agent does not see it any more."""
        self._set_aside(self._path(kind, name))

    def read(self, kind: str, name: str) -> dict[str, Any] | None:
        """One entry; None if there is none that can be read."""
        return self._load(self._path(kind, name))

    def entries(self, kind: str) -> list[dict[str, Any]]:
        """All entries of a kind."""
        found = []
        for file_name in sorted(os.listdir(self.directory)):
            if file_name.startswith(f"{kind}-") and file_name.endswith(".json"):
                entry = self._load(os.path.join(self.directory, file_name))
                if entry is not None:
                    found.append(entry)
        return found

    def each(self, kind: str, take: Callable[[dict[str, Any]], None]) -> None:
        """``take`` every entry of a kind. One with which it fails is logged and set aside: a bad entry of one container must
        not keep the agent from the others.
        """
        for entry in self.entries(kind):
            try:
                take(entry)
            except Exception:
                log.exception("journal entry %s %s cannot be taken over; it is set aside", kind, entry["name"])
                self.set_aside(kind, entry["name"])

    def _load(self, path: str) -> dict[str, Any] | None:
        try:
            with open(path, encoding="utf-8") as file:
                entry = json.load(file)
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                raise ValueError("it is not an entry")
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            log.error("%s cannot be read (%s); it is set aside", path, error)
            self._set_aside(path)
            return None
        return entry

    def _set_aside(self, path: str) -> None:
        try:
            os.rename(path, path + ".bad")
        except FileNotFoundError:
            pass


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
