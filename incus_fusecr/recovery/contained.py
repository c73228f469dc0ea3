# SPDX-License-Identifier: Apache-2.0
"""A protected mountpoint inside of a container.

What differs from the host's: its mounts, its daemons and their files belong to the container's root. Nothing of ours is kept
mounted, so that what is unmounted there is gone; there is no spare; the fresh daemon is one of the container's processes; and
all ends with the container, at once: a task that waits for an answer keeps the kernel from ending it.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Collection, Iterator
from typing import Any

from ..errors import Refused
from ..linux import proc
from ..linux.fd import Fd
from ..linux.pidfd import send_signal
from ..linux.zygote import JobError
from . import cover, facts, fresh, hostmount, inside
from .config import Daemon
from .context import Context
from .fresh import StartError
from .hostmount import State
from .link import Link, Process, hold
from .locked import zygote_locker
from .opener import zygote_opener
from .plan import Device
from .recipe import Recipe
from .seek import Container
from .swap import Host, Report, Swapper
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
        opener = zygote_opener(context.zygote, facts_path=self.facts)
        self._swapper = Swapper(opener, zygote_locker(context.zygote), self._record)
        self._opened: list[Fd] = []
        self._peer: tuple[int, Fd] | None = None  # a mount that has left its peer group, and who keeps its place

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

    def event(self, what: str, number: int = 0, level: int = logging.INFO, **data: Any) -> None:
        """Paths and messages are the container's: an operator's terminal is to get nothing of them that it would obey."""
        shown = {key: proc.printable(value) if isinstance(value, str) else value for key, value in data.items()}
        super().event(what, number, level, **shown)

    # -- settling

    def settle(self) -> None:
        self.due = None
        if not self.init.alive() or self.container.ending():
            self.end()
            return
        self._forget_gone()
        if self.paused:
            for link in list(self.links.values()):
                if link.alive() and self.context.guards.stop(link):
                    self.remove(link)
                else:
                    self.guard(link)
            self.over = not self.links and not self._mounted()
            return
        try:
            self._settle()
        except JobError as error:
            self.problem = proc.printable(str(error))
            self.wake(time.monotonic() + AGAIN)
        except OSError:
            if not self.container.ending():
                raise
            self.end()
        finally:
            self._close_opened()

    def resume(self) -> None:
        super().resume()
        kept = self.context.keeping.get(f"peer-{self.key}")
        if kept is not None and kept[1]:
            self._peer = int(kept[0]["connection"]), kept[1][0]

    def put_all(self) -> None:
        super().put_all()
        if self._peer is not None:
            self.context.keeping.put(f"peer-{self.key}", {"connection": self._peer[0]}, [self._peer[1]])

    def _settle(self) -> None:
        top = self._look()
        if top.state is State.OTHER and self._adopt_unknown(top):
            top = self._look()
        if self._peer is not None:  # an agent before us died at the start of a daemon
            self._uncover_fresh(top)
            top = self._look()
        if self.current is None and top.device is not None and (link := self.links.get(top.device[1])):
            self.current = link.number  # holder and agent have died together
            self.context.keeping.put_role("current", self.key, link)
        current = self.link(self.current)
        if self.recipe is None and current is not None:
            self.recipe = current.recipe
        if current is not None and current.alive():
            self.problem = ""
        elif current is not None:
            self.wake(time.monotonic() + MOURNING)
            if top.device is not None and top.device[1] in self.links:
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
        where = self.container.name, self.container.identity, self.mountpoint
        try:
            exe, unfit = inside.read(self.context.zygote, self.facts, pid, *where, number, self.config.name)
        except JobError as error:  # frozen, or stopped by somebody
            exe, unfit = "", ""
            log.debug("%s: %s", self.key, error)
            self.wake(time.monotonic() + AGAIN)
        if unfit:
            self._refused, self.problem = (pid, number), unfit
            self.event("cannot-protect", number, level=logging.WARNING, pid=pid, why=unfit)
        if not exe:
            for fd in fds:
                fd.close()
            daemon.close()
            return False
        link = Link(number, self.key, daemon, Recipe(exe, (), facts=self.facts), False, fds)
        self.add(link)
        self.promote(link)
        self.event("adopted", number, pid=pid, exe=exe)
        return True

    def start(self, wanted: Recipe | None) -> Link:
        if wanted is None or not wanted.facts:
            raise StartError("no daemon was seen yet that it could be a copy of")
        zygote, keeping = self.context.zygote, self.context.keeping
        top, before = self._look(), {device[1] for device in self._there()}
        try:
            if top.device is not None and (peer := cover.peer(zygote, self._namespace(), self.mountpoint, top.device[1])):
                self._peer = top.device[1], peer
                keeping.put(f"peer-{self.key}", {"connection": top.device[1]}, [peer])
                cover.part(zygote, self._namespace(), self.mountpoint, top.device[1])
            number = inside.start(zygote, wanted.facts)
            daemon, fds = hold(self.servers()[number], number)
            link = Link(number, self.key, daemon, wanted, False, fds)
            self.add(link)
        except JobError as error:
            raise StartError(proc.printable(str(error).removeprefix("JobError: "))) from None
        except (OSError, KeyError) as error:
            raise StartError(f"it ended at once ({error})") from None
        finally:
            self._uncover_fresh(self._look(), before)
        return link

    def _there(self) -> list[Device]:
        """FUSE connections that are mounted at the place, whatever is on top."""
        top = self._look()
        return [*hostmount.buried(self.mountpoint, self.container.init), *([top.device] if top.device else [])]

    def _uncover_fresh(self, top: hostmount.HostMount, before: Collection[int] | None = None) -> None:
        """What a fresh daemon has mounted on the dead one's mount is taken off, and kept until the swap.

        :param before: connections that were mounted there before it was started; None: nobody knows
        """
        zygote, number = self.context.zygote, top.device[1] if top.device else 0
        link = self.links.get(number)
        if number and any(device[1] in self.links for device in hostmount.buried(self.mountpoint, self.container.init)):
            if link is not None and link.tree is None and link.alive():
                link.tree, link.tree_in = cover.uncover(zygote, self._namespace(), self.mountpoint, number), "inside"
                self.context.keeping.put_tree(link)
            elif link is None and before is not None and number not in before and number not in self.servers():
                cover.uncover(zygote, self._namespace(), self.mountpoint, number).close()  # of one that died at its start
            top = self._look()
        if self._peer is None:
            return
        old, copy = self._peer
        try:
            if top.device is not None and top.device[1] == old:
                cover.join(zygote, self._namespace(), self.mountpoint, old, copy)
        finally:
            self._peer = None
            copy.close()
            self.context.keeping.drop(f"peer-{self.key}")

    def _namespace(self) -> Fd:
        """The container's mount namespace, until this turn is over: it keeps all that is mounted there in use."""
        if not self._opened:
            path = f"/proc/{self.container.init}/ns/mnt"
            namespace = Fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC), "the container's mount namespace")
            if self.container.ending():  # it might be another's
                namespace.close()
                raise JobError(f"container {self.container.name} ends")
            self._opened.append(namespace)
        return self._opened[0]

    def _prepare(self) -> None:
        """No spare: it would have to be mounted."""

    # -- swapping

    def fresh(self) -> Fresh | None:
        """For one swap: nothing of it is kept."""
        current = self.link(self.current)
        if current is None:
            return None
        namespace, tree = self._namespace(), current.tree
        if tree is None:
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
        report = super().swap(made)
        current = self.link(self.current)
        if report.finished and not report.errors and current is not None and current.tree is not None:
            current.drop_tree()  # it is mounted: who unmounts it is to find that it is gone
            self.context.keeping.put_tree(current)
        return report

    # -- the end

    def end(self) -> None:
        """The container ends: nobody is to wait for an answer of its daemons, and nothing of it is to be kept."""
        for link in list(self.links.values()):
            if link.guard is not None and link.guard.process.pidfd is not None:
                send_signal(link.guard.process.pidfd, signal.SIGKILL)
            self.remove(link)  # the last descriptor of a connection whose daemon is dead ends it
        if self._peer is not None:
            self._peer[1].close()
            self._peer = None
            self.context.keeping.drop(f"peer-{self.key}")
        self.over = True

    def outside(self) -> tuple[str, str, str] | None:
        """What a sidecar serves, why, and what to do about it; None if none does."""
        dead = next((link for link in list(self.links.values()) if not link.alive() and not link.gone()), None)
        if dead is None:
            return None
        told = self.context.guards.status(dead)
        return (
            f"{self.mountpoint} in {self.container.name}",
            f"its daemon died, and what was open then ({told.get('handles', 'some')} files) is served by a process from outside",
            "end the processes that have it open since then (lsof), or restart the container",
        )

    def release(self) -> None:
        """Before the container is dumped: it is to be as if we had never been there.

        :raises Refused: a daemon of it is dead, and a sidecar serves what is still open
        """
        self._forget_gone()
        for link in list(self.links.values()):
            if link.gone() or (link.alive() and self.context.guards.stop(link)):
                self.remove(link)
        if self.links:
            refused = self.outside() or (f"{self.mountpoint} in {self.container.name}", "its guard does not end", "try again")
            raise Refused(*refused)
        self.over = not self.paused

    def dismiss(self) -> None:
        """Forget it; nothing of it is left anywhere."""
        self.context.keeping.drop(f"unit-{self.key}")
        self.init.close()
        fresh.tidy(os.path.basename(self.facts), f"sidecar-{self.key}.log")
