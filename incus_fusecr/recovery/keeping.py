# SPDX-License-Identifier: Apache-2.0
"""What the agent has to find again after its own death, in the holder: keys as in docs/adr/0012-recovery.md.

A holder that is gone is started again and gets everything anew, from the agent's own copies.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from ..holder import client as holder_client
from ..holder.client import HolderClient, HolderError, NoEntry
from ..linux.fd import Fd
from .link import Guard, Link

log = logging.getLogger(__name__)

T = TypeVar("T")
SYSTEMD_SECONDS = 2.0  # its unit restarts within 20 ms
ROOTS = 500  # of one entry: 48 KiB of JSON
CALL_SECONDS = 1.0
_STARTING = threading.Lock()  # the agent has a supervisor for the host and one for containers: one of them starts the holder


class Keeping:
    """The agent's side of the holder.

    :param everything: puts all that has to be there, through this object
    """

    def __init__(self, everything: Callable[[], None], path: str = holder_client.SOCKET) -> None:
        self.path = path
        self._everything = everything
        self._client = HolderClient(path, CALL_SECONDS)
        self._watch: socket.socket | None = None
        self._reviving = False
        self.restarts = 0

    # -- the holder itself

    def ensure(self) -> bool:
        """Start a holder if none answers, and watch it. :returns: whether another one answers than before"""
        if self._watch is not None:
            poll = select.poll()  # select(2) ends at descriptor 1023
            poll.register(self._watch, select.POLLIN)
            if not poll.poll(0):
                return False
        self._unwatch()
        with _STARTING:
            self._connect()
        return True

    def _connect(self) -> None:
        end = time.monotonic() + (SYSTEMD_SECONDS if os.environ.get("INVOCATION_ID") else 0.0)
        launched = False
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
            try:
                sock.settimeout(CALL_SECONDS)
                sock.connect(self.path)
                self._watch = sock
                self._client.close()
                return
            except OSError as error:
                sock.close()
                if time.monotonic() > end:
                    if launched:
                        raise HolderError("start a holder", str(error)) from None
                    holder_client.launch(self.path)
                    launched, end = True, time.monotonic() + holder_client.SECONDS
            time.sleep(0.005)

    def fileno(self) -> int:
        """Readable when the holder has hung up; -1 when there is none."""
        return self._watch.fileno() if self._watch is not None else -1

    def revive(self) -> None:
        """After it hung up."""
        if not self.ensure():
            return
        self.restarts += 1
        self._reviving = True
        try:
            self._everything()
        finally:
            self._reviving = False

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = None

    def _do(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except NoEntry:
            raise
        except HolderError as error:
            if self._reviving:
                raise
            log.warning("%s", error)
            self.revive()
            return call()

    def close(self) -> None:
        self._unwatch()
        self._client.close()

    # -- entries

    def entries(self) -> dict[str, dict[str, Any]]:
        """Meta of all keys."""
        return self._do(lambda: {entry.key: entry.meta for entry in self._client.entries()})

    def get(self, key: str) -> tuple[dict[str, Any], list[Fd]] | None:
        with contextlib.suppress(NoEntry):
            return self._do(lambda: self._client.get(key))
        return None

    def put(self, key: str, meta: dict[str, Any], fds: Iterable[Fd] = ()) -> None:
        copies = list(fds)
        self._do(lambda: self._client.put(key, meta, copies))

    def drop(self, *keys: str) -> None:
        for key in keys:
            self._do(lambda key=key: self._client.drop(key))  # type: ignore[misc]

    def put_link(self, link: Link) -> None:
        self.put(f"conn-{link.number}", link.meta(), link.fuse)

    def put_tree(self, link: Link) -> None:
        if link.tree is None:
            self.drop(f"tree-{link.number}")
        else:
            self.put(f"tree-{link.number}", {"in": link.tree_in}, [link.tree])

    def put_guard(self, number: int, guard: Guard | None) -> None:
        if guard is None:
            self.drop(f"guard-{number}")
        else:
            process = guard.process
            self.put(f"guard-{number}", {"pid": process.pid, "start": process.start, "control": guard.control})

    def put_role(self, role: str, unit: str, link: Link | None) -> None:
        """``role``: ``current`` or ``warm``."""
        if link is None:
            self.drop(f"{role}-{unit}")
        else:
            self.put(f"{role}-{unit}", {"connection": link.number, "pid": link.daemon.pid, "start": link.daemon.start})

    def put_roots(self, link: Link) -> None:
        """All of them, in entries of :data:`ROOTS`."""
        pairs = sorted(link.roots.items())
        for index in range(0, max(1, len(pairs)), ROOTS):
            part = {str(mount_id): root for mount_id, root in pairs[index : index + ROOTS]}
            self.put(f"roots-{link.number}" + (f".{index // ROOTS}" if index else ""), part)

    def forget(self, link: Link) -> None:
        """Everything of a connection that is gone, or given back."""
        number = link.number
        more = range(1, len(link.roots) // ROOTS + 1)
        self.drop(
            f"conn-{number}", f"guard-{number}", f"tree-{number}", f"roots-{number}", *(f"roots-{number}.{i}" for i in more)
        )
