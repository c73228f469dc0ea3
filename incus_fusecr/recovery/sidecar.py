# SPDX-License-Identifier: Apache-2.0
"""The sidecar of a daemon in a container: a second copy of it in the container, with the guard's socket for its /dev/fuse.

The guard starts this as its sidecar, and kills it as such. What it starts is as in fuse/probe_launch.py: a pid namespace of its
own, a private copy of the container's mounts without the daemon's, and nothing of the host.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time

from ..errors import FusecrError
from ..fuse.init import InitRequest
from ..fuse.probe_facts import Daemon, printable
from ..fuse.probe_helper import Attempt
from ..linux.libc import PR_SET_DUMPABLE, prctl
from . import facts

OUTPUT = 64 << 10  # bytes of the daemon's output that are passed on
MAX_LOG = 1 << 20  # bytes
NOT_ASKED = InitRequest(raw=b"", unique=0, major=0, minor=0, max_readahead=0, flags=0)


class Sidecar(Attempt):
    """Serves until it, or who started it, ends."""

    def __init__(self, daemon: Daemon, init: int, directory: bytes, hook_open: bool, device: int, exe: int) -> None:
        self._device, self._passed = device, 0
        super().__init__(daemon, init, directory, hook_open, NOT_ASKED, exe=exe)

    def _new_socket(self) -> int:
        """The guard's, whenever it is asked for: a helper may open the device more than once."""
        device = socket.socket(fileno=os.dup(self._device))
        self._given.append(device)
        return device.fileno()

    def _on_output(self) -> None:
        chunk = os.read(self._out, 65536)
        if not chunk:
            self._forget(self._out)
        self._output = (self._output + chunk)[-4096:]
        if self._passed < OUTPUT:  # what follows is read, and thrown away: who cannot write would stand still
            os.write(1, chunk[: OUTPUT - self._passed])
            self._passed += len(chunk)

    def serve(self) -> None:
        """Until it has ended, or is to be started in another way."""
        while not self.why and not self._out_of_grace():
            for fd, events in self._poll.poll(500):
                self._handle(fd, events)

    def _out_of_grace(self) -> bool:
        """One that failed at its start may have children, which serve."""
        return not self.mounted and self._grace is not None and time.monotonic() > self._grace


def run(path: str, connection: int, device: int) -> str:
    """Start it, in each directory that it may have been started in, until one serves. :returns: why it ended"""
    found = facts.load(path)
    init = found.open_init()
    # Its mount, and what is there by now, its successor's above all: the copy is to see what the daemon saw when it started.
    daemon = dataclasses.replace(found.there(), mountpoint=found.mountpoint, connections=frozenset((connection,)))
    starts = [(directory, False) for directory in daemon.directories]
    why = ""
    while starts:
        directory, hook_open = starts.pop(0)
        sidecar = Sidecar(daemon, init, directory, hook_open, device, found.open_exe())
        try:
            sidecar.serve()
        finally:
            sidecar.close()
        why = why or sidecar.why + (f"; it said: {sidecar.last_line}" if sidecar.last_line else "")
        if sidecar.elsewhere:
            starts = [(directory, True)]
        elif sidecar.mounted:
            return sidecar.why
    return why or "it could not be started"


def main() -> None:
    """``PARENT FACTS CONNECTION FD``: entry point of the process that the guard starts."""
    prctl(PR_SET_DUMPABLE, 0)
    path, connection, device = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    os.set_inheritable(device, False)
    if os.fstat(1).st_size > MAX_LOG:  # one that talks, and dies of everything it is asked, fills it again and again
        os.ftruncate(1, 0)
    try:
        why = run(path, connection, device)
    except (FusecrError, OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
    os.write(2, (printable(why.encode(errors="replace"), 400) + "\n").encode())
    sys.exit(1)
