# SPDX-License-Identifier: Apache-2.0
"""fuse.allow_sys_admin_access: CRIU, as root of the host, may look at a mount of a container's user namespace.

The parameter (fs/fuse/dir.c fuse_allow_current_process(), Linux 6.0) is one for the whole host, so it is on only while
a dump needs it, and the value it had is in the journal first.
"""

from __future__ import annotations

import logging
import threading

from ..errors import FusecrError
from ..linux.proc import read_text
from .journal import Journal

log = logging.getLogger(__name__)

PARAMETER = "/sys/module/fuse/parameters/allow_sys_admin_access"


class Knob:
    """Counts who needs it."""

    def __init__(self, journal: Journal, path: str = PARAMETER) -> None:
        self._journal = journal
        self._path = path
        self._lock = threading.Lock()
        self._users = 0

    def acquire(self) -> None:
        """Turn it on.

        :raises FusecrError: the kernel has no such parameter
        """
        with self._lock:
            if self._users == 0:
                try:
                    before = read_text(self._path).strip()
                except FileNotFoundError:
                    raise FusecrError(
                        f"kernel parameter {self._path}", "is missing", "needs Linux 6.0 or later with the fuse module"
                    ) from None
                if self._journal.read("knob", "fuse") is None:
                    self._journal.write("knob", "fuse", {"before": before})
                self._set("Y")
            self._users += 1

    def release(self) -> None:
        """Turn it back when the last user is gone."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._restore()

    def recover(self) -> None:
        """After the recovered sessions have acquired it: undo what a former agent left when nobody needs it."""
        with self._lock:
            if self._users == 0:
                try:
                    self._restore()
                except (OSError, KeyError, TypeError) as error:
                    log.error("kernel parameter %s could not be set back: %r", self._path, error)

    def _restore(self) -> None:
        entry = self._journal.read("knob", "fuse")
        if entry is not None:
            self._set(entry["before"])
            self._journal.remove("knob", "fuse")

    def _set(self, value: str) -> None:
        with open(self._path, "w") as file:
            file.write(value)
