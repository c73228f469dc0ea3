# SPDX-License-Identifier: Apache-2.0
"""What the units of a supervisor share."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..linux.fd import Fd
from ..linux.zygote import Zygote
from .events import EventLog
from .guards import Guards
from .keeping import Keeping


class Context:
    """What all units share.

    :ivar host: the host's mount namespace
    :ivar own: the agent's
    """

    def __init__(
        self, zygote: Zygote, keeping: Keeping, events: EventLog, guards: Guards, host: Fd, own: Callable[[], Fd]
    ) -> None:
        self.zygote, self.keeping, self.events, self.guards, self.host, self.own = zygote, keeping, events, guards, host, own
        self.serial = int(time.time() * 1000)

    def next_serial(self) -> int:
        self.serial += 1
        return self.serial
