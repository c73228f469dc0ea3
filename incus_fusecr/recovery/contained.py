# SPDX-License-Identifier: Apache-2.0
"""A protected mountpoint inside of a container.

What differs from the host's: its mounts, its daemons and their files belong to the container's root. Nothing of ours is kept
mounted, so that what is unmounted there is gone; there is no spare; the fresh daemon is one of the container's processes; and
all ends with the container, at once: a task that waits for an answer keeps the kernel from ending it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from ..errors import Refused
from ..linux.fd import Fd
from ..linux.pidfd import send_signal
from ..linux.zygote import JobError
from . import facts, fresh, hostmount, inside
from .config import Daemon
from .context import Context
from .fresh import StartError
from .hostmount import State
from .link import Link, Process, hold
from .recipe import Recipe
from .seek import Container
from .swap import Host, Report
from .trees import Fresh
from .unit import Unit

log = logging.getLogger(__name__)

AGAIN = 1.0  # seconds until a container that could not be looked into is looked into again
MOURNING = 0.05  # seconds after which a container whose daemon died with it shows that it is ending


class Contained(Unit):
    """
    :ivar container: where it is
    :ivar over: there is nothing to protect any more
    """

    def __init__(self, context: Context, key: str, config: Daemon, mountpoint: str, container: Container) -> None:
        super().__init__(context, key, config, mountpoint)
        self.container, self.over, self.instance = container, False, container.name
        self.init = Process.find(*container.identity)
        self._opened: list[Fd] = []

    @property
    def facts(self) -> str:
        return facts.path_of(self.key)

    def servers(self) -> dict[int, int]:
        return self.container.servers()

    def watched(self) -> Iterator[Fd]:
        yield from super().watched()
        if self.init.pidfd is not None:
            yield self.init.pidfd

    def meta(self) -> dict[str, Any]:
        return {**super().meta(), "instance": self.container.name, "init": self.container.identity}

    # -- settling

    def settle(self) -> None:
        self.due = None
        if not self.init.alive() or self.container.ending():
            self.end()
            return
        self._forget_gone()
        if self.paused:
            for link in self.olds():
                self.guard(link)
            self.over = not self.links and not self._mounted()
            return
        try:
            self._settle()
        except JobError as error:
            self.problem = str(error)
            self.wake(time.monotonic() + AGAIN)
        finally:
            self._close_opened()

    def _settle(self) -> None:
        top = self._look()
        if top.state is State.OTHER and self._adopt_unknown(top):
            top = self._look()
        current = self.link(self.current)
        if current is not None and not current.alive():
            self.wake(time.monotonic() + MOURNING)
            if top.state is State.PRESENT:
                self._recover()
        for link in list(self.links.values()):
            self.guard(link)
        if not self.links:
            self.over = True
            return
        self._swap_if_due()
        self._prove()

    def _look(self) -> hostmount.HostMount:
        return hostmount.look(self.mountpoint, (0, self.current or 0), self.container.init)

    def _mounted(self) -> bool:
        return self._look().state in (State.OTHER, State.PRESENT)

    def _adopt_unknown(self, top: hostmount.HostMount) -> bool:
        """Somebody in the container has mounted there anew."""
        if top.device is None or top.device[0] != 0 or top.device[1] in self.links:
            return False
        number = top.device[1]
        pid = self.servers().get(number)
        return pid is not None and self._refused != (pid, number) and self.adopt(pid, number)

    def adopt(self, pid: int, number: int) -> bool:
        try:
            daemon, fds = hold(pid, number)
        except OSError:
            self.wake(time.monotonic() + MOURNING)  # it has just ended
            return False
        try:
            exe, unfit = inside.read(
                self.context.zygote, self.facts, pid, self.container.name, self.container.identity, self.mountpoint, number
            )
        except JobError as error:  # frozen, or stopped by somebody
            for fd in fds:
                fd.close()
            daemon.close()
            log.debug("%s: %s", self.key, error)
            self.wake(time.monotonic() + AGAIN)
            return False
        if unfit:
            for fd in fds:
                fd.close()
            daemon.close()
            self._refused, self.problem = (pid, number), unfit
            self.event("cannot-protect", number, level=logging.WARNING, pid=pid, why=unfit)
            return False
        link = Link(number, self.key, daemon, Recipe(exe, (), facts=self.facts), False, fds)
        self.add(link)
        self.promote(link)
        self.event("adopted", number, pid=pid, exe=exe)
        return True

    def start(self, wanted: Recipe | None) -> Link:
        if wanted is None or not wanted.facts:
            raise StartError("no daemon was seen yet that it could be a copy of")
        try:
            number = inside.start(self.context.zygote, wanted.facts)
        except JobError as error:
            raise StartError(str(error)) from None
        try:
            daemon, fds = hold(self.servers()[number], number)
        except (OSError, KeyError) as error:
            raise StartError(f"it ended at once ({error})") from None
        link = Link(number, self.key, daemon, wanted, False, fds)
        self.add(link)
        return link

    def _prepare(self) -> None:
        """No spare: it would have to be mounted."""

    # -- swapping

    def fresh(self) -> Fresh | None:
        """For one swap: nothing of it is kept."""
        current = self.link(self.current)
        if current is None:
            return None
        path = f"/proc/{self.container.init}/ns/mnt"
        namespace = Fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC), "the container's mount namespace")
        self._opened.append(namespace)
        if self.container.ending():  # it might be another's
            return None
        number, tree = fresh.clone_host_mount(self.context.zygote, namespace, self.mountpoint)
        self._opened.append(tree)
        if number != current.number:
            self.wake(time.monotonic() + MOURNING)
            return None
        self.host = Host(namespace, self.mountpoint)
        return Fresh(tree, namespace, current.device)

    def _close_opened(self) -> None:
        self.host = Host(self.context.host, self.mountpoint)
        while self._opened:
            self._opened.pop().close()

    def swap(self, made: Fresh) -> Report:
        if not self.olds():
            return Report(finished=True)
        return super().swap(made)

    # -- the end

    def end(self) -> None:
        """The container ends: nobody is to wait for an answer of its daemons, and nothing of it is to be kept."""
        for link in list(self.links.values()):
            if link.guard is not None and link.guard.process.pidfd is not None:
                send_signal(link.guard.process.pidfd, signal.SIGKILL)
            self.remove(link)  # the last descriptor of a connection whose daemon is dead ends it
        self.over = True

    def release(self) -> None:
        """Before the container is dumped: it is to be as if we had never been there.

        :raises Refused: a daemon of it is dead, and a sidecar serves what is still open
        """
        self._forget_gone()
        for link in list(self.links.values()):
            if link.gone() or (link.alive() and self.context.guards.stop(link)):
                self.remove(link)
        if self.links:
            number = next(iter(self.links))
            what = self.context.guards.status(self.links[number])
            raise Refused(
                f"{self.mountpoint} in {self.container.name}",
                f"its daemon died, and {what.get('handles', 'some')} files that were open then are served from outside",
                "end the processes that have them open (lsof), or restart the container",
            )
        self.over = True

    def dismiss(self) -> None:
        """Forget it; nothing of it is left anywhere."""
        self.context.keeping.drop(f"unit-{self.key}")
        self.init.close()
        with contextlib.suppress(OSError):
            os.unlink(self.facts)
