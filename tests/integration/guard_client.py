# SPDX-License-Identifier: Apache-2.0
"""A client of a file system that does what it is told, and goes on in between as any program would.

Each line of stdin is JSON, ``{"run": CODE}`` or ``{"value": EXPRESSION}``; each is answered by a line of stdout:
``{"value": ...}`` or ``{"errno": N, "text": ...}``. Names live on from line to line; ``mount`` is the mount point.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any


class Loop:
    """Calls something again and again in a thread; counts, keeps the values and the errors."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.count = 0
        self.errors: list[str] = []
        self.values: set[Any] = set()
        self.ending = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.ending:
            try:
                self.values.add(self.call())
            except OSError as error:
                self.errors.append(f"{os.strerror(error.errno or 0)}: {error.filename}")
            self.count += 1

    def stop(self) -> dict[str, Any]:
        self.ending = True
        self.thread.join(10)
        return {
            "count": self.count,
            "errors": self.errors[:5],
            "values": sorted(map(str, self.values))[:20],
            "stuck": self.thread.is_alive(),
        }


def read_file(path: str, size: int = 1 << 20) -> str:
    with open(path, "rb", buffering=0) as file:
        return file.read(size).decode()


def main() -> None:
    names: dict[str, Any] = {"mount": sys.argv[1], "Loop": Loop, "read_file": read_file, "os": os, "contextlib": contextlib}
    for line in sys.stdin:
        wanted = json.loads(line)
        answer: dict[str, Any] = {"value": None}
        try:
            if "run" in wanted:
                exec(wanted["run"], names)
            else:
                answer["value"] = eval(wanted["value"], names)
        except OSError as error:
            answer = {"errno": error.errno, "text": str(error)}
        print(json.dumps(answer, default=repr), flush=True)


if __name__ == "__main__":
    main()
