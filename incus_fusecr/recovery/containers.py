# SPDX-License-Identifier: Apache-2.0
"""Daemons inside of containers, in a thread of their own: what a container does, or fails to do, delays nothing of the host's.

Nobody tells when a container mounts something, so the kernel's list of connections is read every other second; that of
the container's mounts cannot be waited for, as an open mountinfo keeps a mount namespace, and with it a disk, in use.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import FusecrError, UsageError
from . import facts, seek
from .config import Daemon
from .contained import Contained
from .seek import Container, Found
from .supervisor import IDLE_SECONDS, RETRY, Supervisor
from .unit import Unit

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
RELEASE_SECONDS = 20.0


class Aside:
    """Containers that are being dumped, or held: nothing of ours may be in them. Told by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inits: Counter[int] = Counter()
        self.release: Callable[[int], None] = lambda _init: None
        self.changed: Callable[[], None] = lambda: None
        self.outside: Callable[[int], list[tuple[str, str, str]]] = lambda _init: []

    def leave(self, init: int) -> Callable[[], None]:
        """Let go of all daemons of the container with init ``init``. :returns: what takes them up again

        :raises FusecrError: that cannot be done
        """
        with self._lock:
            self._inits[init] += 1
        back = partial(self._back, init)
        try:
            self.release(init)
        except TimeoutError as error:
            back()
            raise FusecrError(f"letting go of the daemons in the container of pid {init}", str(error), "try again") from None
        except BaseException:
            back()
            raise
        return back

    def _back(self, init: int) -> None:
        with self._lock:
            self._inits[init] -= 1
            self._inits = +self._inits
        self.changed()

    def __contains__(self, init: object) -> bool:
        with self._lock:
            return init in self._inits


class ContainerSupervisor(Supervisor):
    """As its parent; its units are :class:`Contained`."""

    inside = True
    longest = LOOK_SECONDS

    def __init__(self, *args: Any, aside: Aside | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self._aside = aside or Aside()
        self._connections: frozenset[str] = frozenset()
        self._look_at = 0.0
        self._unfit: set[tuple[int, int]] = set()
        self._aside.release = self._release_soon
        self._aside.changed = self._look_again
        self._aside.outside = self._outside

    def _look_again(self) -> None:
        self._look_at = 0.0
        self._wake()

    def _load(self) -> None:
        super()._load()
        for path in glob.glob(facts.path_of("*")):  # of an agent that was stopped, and of containers that have ended since
            if path not in {facts.path_of(key) for key in self.units}:
                os.unlink(path)

    def _turn(self) -> None:
        now = time.monotonic()
        found = seek.connections()
        if now >= self._look_at or found != self._connections or not found:
            self._look_for_units = True
            self._all = self._all or now >= self._look_at
            self._connections, self._look_at = found, now + IDLE_SECONDS
        super()._turn()
        for unit in list(self.units.values()):
            if isinstance(unit, Contained) and unit.over:
                self._dismiss(unit)

    def _dismiss(self, unit: Contained) -> None:
        del self.units[unit.key]
        self._not_before.pop(unit.key, None)
        unit.dismiss()

    def _make_unit(self, key: str, config: Daemon, meta: dict[str, Any]) -> Unit:
        pid, start = meta["init"]
        container = Container(str(meta["instance"]), int(pid), int(start))
        return Contained(self._context, key, config, str(meta["mountpoint"]), container)

    def _load_unit(self, key: str, meta: dict[str, Any]) -> None:
        super()._load_unit(key, meta)
        unit = self.units[key]
        unit.paused = unit.paused or not unit.config.in_container(unit.instance)  # it was named in the configuration before

    def _unit_for(self, key: str) -> Unit | None:
        """Holder and agent have died together: the file of facts tells what the guard belongs to."""
        if key in self.units:
            return self.units[key]
        try:
            found = facts.load(facts.path_of(key))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.error("%s: %s", facts.path_of(key), error)
            return None
        config = self.config.get(found.name)
        if config is None:
            return None
        made = Contained(self._context, key, config, found.mountpoint, Container(found.instance, *found.init))
        self.units[key] = made
        made.put()
        return made

    # -- which

    def _discover(self) -> None:
        self._look_for_units = False
        held = {link.number for unit in self.units.values() for link in unit.links.values()}
        taken = {(unit.instance, unit.mountpoint) for unit in self.units.values()}
        count = Counter(unit.instance for unit in self.units.values())
        for container in seek.containers(self.config):
            if container.init in self._aside or container.ending():
                continue
            if container.held():
                self._look_at = min(self._look_at, time.monotonic() + RETRY)
                continue
            for found in seek.daemons(container, self.config):
                number, place = found.mount.minor, (container.name, found.mount.mountpoint)
                if number in held or place in taken or (found.pid, number) in self._unfit:
                    continue
                if count[container.name] >= seek.MOST:
                    log.warning("%s: more than %d daemons; %s is not protected", container.name, seek.MOST, found.mount.mountpoint)
                    self._unfit.add((found.pid, number))
                    continue
                self._take(found)
                held.add(number)
                count[container.name] += 1
                taken.add(place)

    def _take(self, found: Found) -> None:
        key = key_of(found.config.name, found.container.name, found.mount.mountpoint)
        unit = Contained(self._context, key, found.config, found.mount.mountpoint, found.container)
        if unit.adopt(found.pid, found.mount.minor):
            self.units[key] = unit
            unit.put()
            if found.container.init in self._aside:  # meanwhile
                self._release(found.container.init)
            else:
                unit.settle()
            return
        unit.dismiss()
        if unit.problem:
            self._unfit.add((found.pid, found.mount.minor))
        else:
            self._look_at = min(self._look_at, time.monotonic() + RETRY)

    # -- requests, in the thread

    def _release_soon(self, init: int) -> None:
        """From any thread. Who has nothing there does not wait for what this thread may be doing in another container."""
        if self._units_of(init):
            self.call(partial(self._release, init), RELEASE_SECONDS)

    def _units_of(self, init: int) -> list[Contained]:
        return [unit for unit in list(self.units.values()) if isinstance(unit, Contained) and unit.container.init == init]

    def _outside(self, init: int) -> list[tuple[str, str, str]]:
        """From any thread."""
        if not self._units_of(init):
            return []
        try:
            told = self.call(lambda: [unit.outside() for unit in self._units_of(init)], RELEASE_SECONDS)
        except TimeoutError as error:
            raise FusecrError(f"daemons in the container of pid {init}", str(error), "try again") from None
        return [words for words in told if words is not None]

    def _release(self, init: int) -> None:
        """See :class:`Aside`. :raises Refused: somebody is served from outside"""
        for unit in self._units_of(init):
            unit.release()
            if unit.over:
                self._dismiss(unit)

    def upgrade(self, name: str, exe: str, watch: float = 0.0) -> dict[str, Any]:
        raise UsageError(
            f"upgrade of {name}", "it runs in a container",
            "upgrade it there, and kill the daemon: the next one is started from the executable as it is then",
        )  # fmt: skip


def key_of(daemon: str, instance: str, mountpoint: str) -> str:
    """Name of a unit, and of its files and its entries in the holder."""
    place = re.sub(r"[^a-z0-9-]", "-", instance.lower())
    return f"{daemon[:32]}.{place[:40]}.{zlib.crc32(f'{daemon}/{instance}{mountpoint}'.encode(errors='surrogateescape')):08x}"
