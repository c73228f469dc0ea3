# SPDX-License-Identifier: Apache-2.0
"""One protected mountpoint of the host: its daemons one after another, and what is to be done about them.

Everything is decided by level: :meth:`Unit.settle` looks at what is, and does what is missing. So it does not matter which
events came, in which order, and which agent began something. What is to be done is in the holder before it is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

from ..errors import FusecrError
from ..linux.fd import Fd
from ..linux.zygote import JobError
from . import acquaint, fresh, hostmount, keepwarm, recipe, warmup
from .config import Daemon
from .context import Context
from .fresh import StartError
from .hostmount import State
from .link import Link, hold, hold_clones, servers
from .locked import zygote_locker
from .opener import zygote_opener
from .plan import Device
from .policy import Restarts
from .recipe import Recipe
from .swap import Host, Report, Swapper
from .trees import Fresh

log = logging.getLogger(__name__)

SOON = 0.3  # seconds after somebody's daemon was adopted until its spare is started
# Both take a processor from the clients, and one after the other they notice half as much of it (ADR 0012); seconds after a death
SETTLE = 0.6  # until the mounts are swapped; the sidecar serves meanwhile
CALM = 1.2  # until the next spare is started
PROBATION = 60.0  # seconds in which the executable of an upgrade may turn out to be bad
STEADY = 0.3
PASSES = (0.3, 1.0, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0)  # seconds between looks for mounts of old connections that came meanwhile
UNKNOWN_SECONDS = 1.0  # a connection that nobody serves for so long has died before it could be held


class Unit:
    """
    :ivar current: the connection that everybody is to have; ``warm``: the spare
    :ivar candidate: what an upgrade has started and nobody uses yet
    :ivar due: when to settle again even if nothing happens; None: not at all
    :ivar instance: the container that it is in, by liblxc's name; empty: the host
    """

    instance = ""

    def __init__(self, context: Context, key: str, config: Daemon, mountpoint: str) -> None:
        self.context, self.key, self.config = context, key, config
        self.host = Host(context.host, mountpoint)
        self.links: dict[int, Link] = {}
        self.current: int | None = None
        self.warm: int | None = None
        self.candidate: int | None = None
        self.recipe: Recipe | None = None
        self.paused = self._proven = False
        self.restarts = Restarts(config.limits, lambda: time.monotonic())
        self.due: float | None = None
        self.warm_again = 0.0
        self.problem = ""
        self._began = time.monotonic()  # of the current one's service
        self._mourned: int | None = None
        self._unknown: tuple[int, float] | None = None
        self._refused: tuple[int, int] | None = None
        self._swap_at: float | None = None
        self._died_at: float | None = None
        self._pass, self._warm_at, self._warm_failures = 0, 0.0, 0
        self._fallback: tuple[Recipe, float] | None = None
        self._swapper = Swapper(zygote_opener(context.zygote), zygote_locker(context.zygote), self._record)

    # -- what is

    @property
    def mountpoint(self) -> str:
        return self.host.mountpoint

    def meta(self) -> dict[str, Any]:
        """For the holder."""
        return {
            "name": self.config.name,
            "mountpoint": self.mountpoint,
            "paused": self.paused,
            "recipe": self.recipe.to_json() if self.recipe else None,
        }

    def put(self) -> None:
        self.context.keeping.put(f"unit-{self.key}", self.meta())

    def put_all(self) -> None:
        """Into a new holder."""
        keeping = self.context.keeping
        self.put()
        for link in self.links.values():
            keeping.put_link(link)
            if link.tree is not None:
                keeping.put_tree(link)
            if link.guard is not None:
                keeping.put_guard(link.number, link.guard)
            if link.roots:
                keeping.put_roots(link)
        keeping.put_role("current", self.key, self.link(self.current))
        keeping.put_role("warm", self.key, self.link(self.warm))

    def link(self, number: int | None) -> Link | None:
        return self.links.get(number) if number is not None else None

    def olds(self) -> list[Link]:
        return [link for link in self.links.values() if link.number not in (self.current, self.warm, self.candidate)]

    def fresh(self) -> Fresh | None:
        """The current connection for those that mount it."""
        link = self.link(self.current)
        if link is None or link.tree is None:
            return None
        return Fresh(link.tree, self.context.own() if link.tree_in == "ns" else self.context.host, link.device)

    def event(self, what: str, number: int = 0, level: int = logging.INFO, **data: Any) -> None:
        self.context.events.add(what, self.key, number, level=level, **data)

    def wake(self, at: float) -> None:
        self.due = at if self.due is None else min(self.due, at)

    def resume(self) -> None:
        """After an agent that may have died anywhere: whatever it began is looked for."""
        self._swap_at = time.monotonic()
        if self.recipe is None and (current := self.link(self.current)) is not None:
            self.recipe = current.recipe

    def servers(self) -> dict[int, int]:
        """Who serves the connections of where this is, see link.py."""
        return servers()

    def watched(self) -> Iterator[Fd]:
        """Pidfds of those whose end is to be seen at once."""
        for link in self.links.values():
            for process in (link.daemon, link.guard.process if link.guard else None):
                if process is not None and process.pidfd is not None:
                    yield process.pidfd

    # -- settling

    def settle(self) -> None:
        """Do what is to be done now; sets :attr:`due`.

        :raises FusecrError, OSError, JobError: it could not be done; to be called again
        """
        self.due = None
        self._forget_gone()
        if self.paused:
            for link in self.olds():
                self.guard(link)
            return
        current = self.link(self.current)
        if current is not None and not current.alive():
            self._recover()
        top = self._look()
        if self._uncover(top) or self._adopt_unknown(top):
            top = self._look()
        current = self.link(self.current)
        if current is None and self.recipe is not None:
            self._recover()
            current = self.link(self.current)
        if current is not None and current.alive():
            self._mount_on_host(current, top)
        for link in list(self.links.values()):
            self.guard(link)
        self._swap_if_due()
        self._prepare()
        keepwarm.tick(self)
        self._prove()

    def _look(self) -> hostmount.HostMount:
        return hostmount.look(self.mountpoint, (0, self.current or 0))

    def _forget_gone(self) -> None:
        for link in [link for link in self.links.values() if link.gone()]:
            self.context.guards.heard(link)
            self.event("connection-gone", link.number)
            self.remove(link)

    def remove(self, link: Link) -> None:
        del self.links[link.number]
        for role in ("current", "warm"):
            if getattr(self, role) == link.number:
                setattr(self, role, None)
                self.context.keeping.put_role(role, self.key, None)
        self.context.keeping.forget(link)
        link.close()
        fresh.tidy(f"sidecar-{link.number}.pid", f"guard-{link.number}.sock", f"roots-{link.number}")

    def guard(self, link: Link) -> None:
        if self.context.guards.ensure(link, self.config):
            link.unserved_since = None
            if hold_clones(link):
                self.context.keeping.put_link(link)
            acquaint.once(self.context, link, self.config.preload)
            return
        now = time.monotonic()
        self.wake(link.guard_not_before)
        if link.alive():
            return
        link.unserved_since = link.unserved_since or now
        if self.config.deadline and now - link.unserved_since > self.config.deadline:
            self.abort(link)

    def abort(self, link: Link) -> None:
        """The last resort: nothing serves it, and tasks wait in D."""
        from ..fuse import connection

        self.event("aborted", link.number, level=logging.ERROR, why="nothing could serve it within the deadline")
        connection.abort(link.number)

    # -- daemons

    def add(self, link: Link) -> None:
        """A connection that is held from here on."""
        before = self.links.get(link.number)
        if before is not None:  # it is gone, and nobody has seen it yet
            self.remove(before)
        self.links[link.number] = link
        self.context.keeping.put_link(link)
        self.context.keeping.put_tree(link)

    def promote(self, link: Link, settle: float = 0.0) -> None:
        """:param settle: seconds until the mounts are swapped, if that does not wait already"""
        keeping = self.context.keeping
        self.current = link.number
        self.recipe, self.problem = link.recipe, ""
        keeping.put_role("current", self.key, link)
        if self.warm == link.number:
            self.warm = None
            keeping.put_role("warm", self.key, None)
        self.put()
        self._began, self._proven, self._mourned = time.monotonic(), False, None
        if self._pass or self._swap_at is None:  # else deaths one after another would put it off for ever
            self._swap_at = self._began + settle
        self._pass, self._warm_at = 0, self._began + (CALM if settle else SOON)

    def _recover(self) -> None:
        """The current daemon is dead, or there is none."""
        now = time.monotonic()
        if self._mourned != (self.current or 0):
            self._mourned, self._died_at = self.current or 0, now
            lived = now - self._began
            if self.current:
                daemon = self.links[self.current].daemon
                self.event("daemon-died", self.current, level=logging.WARNING, lived=round(lived, 3), end=daemon.end or "unknown")
                if lived < self.config.limits.interval and (not daemon.told_to_end or (lived < STEADY and not daemon.status)):
                    self.restarts.failed()
                if not daemon.killed:
                    self._fall_back()
        warm = self.link(self.warm)
        verdict = self.restarts.ask()
        if not verdict.allowed and not (warm and warm.alive() and verdict.reason == "backoff"):
            if self.problem != verdict.reason:
                self.event("restart-waits", self.current or 0, level=logging.WARNING, why=verdict.reason,
                            seconds=round(verdict.seconds, 3))
            self.problem = verdict.reason
            self.wake(now + verdict.seconds)
            return
        self.problem = ""
        self.restarts.started()
        if warm is None or not warm.alive():
            self.discard(warm)
            try:
                warm = self.start(self.recipe)
            except StartError as error:
                self.restarts.failed()
                self.problem = str(error)
                self.event("start-failed", self.current or 0, level=logging.ERROR, why=str(error))
                self.wake(now + self.restarts.ask().seconds)
                return
        self.promote(warm, SETTLE)

    def fall_back_to(self, before: Recipe) -> None:
        """After an upgrade: if the new daemon ends by itself soon, the old executable serves again."""
        self._fallback = before, time.monotonic() + PROBATION

    def _fall_back(self) -> None:
        before, self._fallback = self._fallback, None
        if before is None or time.monotonic() > before[1] or self.recipe is None:
            return
        self.event("upgrade-undone", self.current or 0, level=logging.ERROR, exe=self.recipe.exe, back=before[0].exe)
        self.recipe = before[0]
        self.restarts.served()  # the failure is not this one's
        self.discard(self.link(self.warm))
        self.put()

    def start(self, wanted: Recipe | None) -> Link:
        """A fresh daemon that is held. :raises StartError: why not"""
        if wanted is None:
            raise StartError("no daemon was seen yet that it could be a copy of")
        context = self.context
        started = fresh.start(context.zygote, context.own(), wanted, self.key, context.next_serial())
        try:
            daemon, fds = hold(started.pid, started.connection)
        except OSError as error:
            started.tree.close()
            raise StartError(f"it ended at once ({error})") from None
        link = Link(started.connection, self.key, daemon, wanted, True, fds, started.tree, "ns")
        self.add(link)
        return link

    def discard(self, link: Link | None) -> None:
        """A spare that is not wanted. Without its tree the kernel ends it, unless it was current once and somebody uses it."""
        if link is None:
            return
        if self.warm == link.number:
            self.warm = None
            self.context.keeping.put_role("warm", self.key, None)
        link.drop_tree()
        self.context.keeping.put_tree(link)
        self.wake(time.monotonic() + 0.05)

    def _prepare(self) -> None:
        current = self.link(self.current)
        warm = self.link(self.warm)
        if warm is not None and not warm.alive():
            self.event("spare-died", warm.number, level=logging.WARNING)
            self.discard(warm)
            warm = None
        if self.config.standby != "warm" or warm is not None or current is None or not current.alive():
            return
        now = time.monotonic()
        if now < self._warm_at:
            self.wake(self._warm_at)
            return
        try:
            link = self.start(current.recipe)
        except StartError as error:
            self._warm_failures += 1
            self._warm_at = now + min(60.0, 0.5 * 2.0 ** min(self._warm_failures, 10))
            self.wake(self._warm_at)
            self.event("spare-failed", level=logging.WARNING, why=str(error))
            return
        self._warm_failures = 0
        self.warm = link.number
        self.context.keeping.put_role("warm", self.key, link)
        self.guard(link)
        self.event("spare-ready", link.number, pid=link.daemon.pid)

    def _prove(self) -> None:
        """A daemon that has served for long enough makes the failures before it forgotten."""
        current = self.link(self.current)
        if self._proven or current is None or not current.alive():
            return
        at = self._began + self.config.limits.interval
        if time.monotonic() < at:
            self.wake(at)
            return
        self._proven = True
        self.restarts.served()

    # -- the host's own mount

    def _adopt_unknown(self, top: hostmount.HostMount) -> bool:
        """systemd, or whoever, has started a daemon of its own there."""
        if top.state is not State.OTHER or top.device is None or top.device[0] != 0:
            return False
        number = top.device[1]
        if number in self.links:
            self._swap_at = self._swap_at or time.monotonic()
            return False
        pid = self.servers().get(number)
        if pid is None:
            now = time.monotonic()
            if self._unknown is None or self._unknown[0] != number:
                self._unknown = number, now
            if now - self._unknown[1] < UNKNOWN_SECONDS:
                self.wake(now + 0.05)
                return False
            self.event("dead-mount", number, level=logging.WARNING, why="nobody serves it, and nobody held it")
            fresh.detach_host_mount(self.context.zygote, self.context.host, self.mountpoint, number)
            return True
        self._unknown = None
        return self._refused != (pid, number) and self.adopt(pid, number)

    def _uncover(self, top: hostmount.HostMount) -> bool:
        """A daemon that was started in the very moment in which we put our mount there: it is below, and is to be seen."""
        if top.state is not State.PRESENT or top.device is None:
            return False
        unknown = [number for major, number in hostmount.buried(self.mountpoint) if major == 0 and number not in self.links]
        serving = self.servers() if unknown else {}
        for number in unknown:
            pid = serving.get(number)
            if pid is not None and self._refused != (pid, number):
                self.event("uncovered", number, pid=pid)
                fresh.detach_host_mount(self.context.zygote, self.context.host, self.mountpoint, top.device[1])
                return self.adopt(pid, number)
        return False

    def adopt(self, pid: int, number: int) -> bool:
        """A daemon that somebody else has started becomes the current one."""
        context = self.context
        try:
            daemon, fds = hold(pid, number)
        except OSError:
            self.wake(time.monotonic() + 0.02)  # it has just ended
            return False
        tree: Fd | None = None
        try:
            wanted = recipe.read(pid, self.mountpoint)
            found, tree = fresh.clone_host_mount(context.zygote, context.host, self.mountpoint)
            if found != number:
                raise JobError("another mount has come meanwhile")
        except (ValueError, OSError, JobError) as error:
            for fd in (*fds, *([tree] if tree else [])):
                fd.close()
            daemon.close()
            if isinstance(error, ValueError):
                self._refused = pid, number
                self.problem = str(error)
                self.event("cannot-protect", number, level=logging.ERROR, pid=pid, why=str(error))
            else:
                self.wake(time.monotonic() + 0.05)
            return False
        before = self.link(self.current)
        link = Link(number, self.key, daemon, wanted, False, fds, tree, "host")
        self.add(link)
        self.promote(link)
        if before is not None and before.alive() and before.ours and self.warm is None:
            self.warm = before.number  # it can serve again: its tree is there, whoever has it open stays with it
            context.keeping.put_role("warm", self.key, before)
        self.event("adopted", number, pid=pid, exe=wanted.exe)
        return True

    def _mount_on_host(self, current: Link, top: hostmount.HostMount) -> None:
        made = self.fresh()
        if made is None:  # agent and holder died together
            if top.state is not State.PRESENT:
                raise FusecrError(f"{self.key}: the mount of connection {current.number}", "is lost")
            number, tree = fresh.clone_host_mount(self.context.zygote, self.context.host, self.mountpoint)
            if number != current.number:
                tree.close()
                raise FusecrError(f"{self.key}: {self.mountpoint}", "another mount has come meanwhile")
            current.tree, current.tree_in = tree, "host"
            self.context.keeping.put_tree(current)
        elif top.state is State.ABSENT and hostmount.attach(made, self.host):
            self.event("host-mount-attached", current.number)

    # -- swapping

    def _record(self, device: Device, roots: dict[int, str]) -> None:
        link = self.links.get(device[1])
        if link is not None:
            link.roots.update(roots)
            self.context.keeping.put_roots(link)
            self.context.guards.tell_roots(link, roots)

    def _swap_if_due(self) -> None:
        now = time.monotonic()
        if self._swap_at is None:
            return
        if now < self._swap_at:
            self.wake(self._swap_at)
            return
        if len(self.links) < 2 and self.current in self.links:
            self._swap_at = None  # there is nothing else
            return
        made, current = self.fresh(), self.link(self.current)
        if made is None or current is None or not current.alive():
            return
        self.swap(made)

    def swap(self, made: Fresh) -> Report:
        """All mounts of other connections of ours become the current one's."""
        self.context.guards.look(self.olds())
        if self.config.warmup and not self._pass:
            warmup.warm(self.context.zygote, made.tree, made.device[1], self.config.warmup)
        old = {link.device: link.fuse[0] for link in self.links.values() if link.device != made.device}
        report = self._swapper.swap(old, made, self.host, collect=True)
        now = time.monotonic()
        if report.done or report.errors:
            more: dict[str, Any] = {}
            if self._died_at is not None:
                more["after_death_ms"] = round((now - self._died_at) * 1000, 1)
                self._died_at = None
            self.event(
                "swapped", made.device[1], level=logging.WARNING if report.errors else logging.INFO,
                namespaces=report.namespaces, **report.done, left=report.left, errors=report.errors[:5],
                ms=round(report.seconds.get("total", 0) * 1000, 1), **more,
            )
        if report.finished and not report.errors:
            for link in self.olds():
                if link.tree is not None:
                    link.drop_tree()
                    self.context.keeping.put_tree(link)
        if self.olds() or report.errors or not report.finished:
            self._swap_at = now + PASSES[min(self._pass, len(PASSES) - 1)]
            self._pass += 1
            self.wake(self._swap_at)
        else:
            self._swap_at = None
        return report
