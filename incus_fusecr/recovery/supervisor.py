# SPDX-License-Identifier: Apache-2.0
"""The thread of the agent that keeps protected daemons of the host: it waits for events, and lets units settle."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import select
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ..errors import FusecrError, UsageError
from ..guard.client import PROGRAM
from ..linux.fd import Fd
from ..linux.mount import Mount, mountinfo
from ..linux.pidfd import wait_exit
from ..linux.zygote import JobError, Zygote
from . import changes, fresh, rebuild
from .config import Config, Daemon, Match
from .context import Context
from .describe import describe
from .events import EventLog
from .guards import Guards
from .keeping import Keeping
from .link import Link, Process, guard_at, servers
from .plan import View
from .recipe import FRESH, Recipe
from .unit import Unit

log = logging.getLogger(__name__)

IDLE_SECONDS = 60.0  # nothing is expected to happen; all is looked at all the same
RETRY = 0.5
FAILURES = 20  # turns one after another: this agent will not get over it
REQUEST_SECONDS = 90.0


def missing(release: str = "", program: str = PROGRAM) -> str:
    """Why daemons cannot be protected here; empty if they can."""
    words = (release or os.uname().release).split(".")
    try:
        version = (int(words[0]), int("".join(c for c in words[1] if c.isdigit()) or 0))
    except (IndexError, ValueError):
        return f"kernel {release}: no version"
    if version < (6, 9):
        return f"kernel {version[0]}.{version[1]}: FUSE_NOTIFY_RESEND is there from 6.9 on"
    if version < (6, 16):
        return f"kernel {version[0]}.{version[1]}: fdinfo tells the connection of a /dev/fuse descriptor from 6.16 on"
    if not os.access(program, os.X_OK):
        return f"{program} is missing: make -C incus_fusecr/guard install"
    return ""


def host_mounts() -> list[Mount]:
    """FUSE mounts of the host that may be protected: whole file systems, each the topmost at its place."""
    view = View(mountinfo(1))
    whole = [m for m in view.by_id.values() if m.is_fuse and m.root == "/" and not m.mountpoint.startswith(FRESH)]
    return list({m.mountpoint: m for m in whole if view.over(m) is None}.values())


class Supervisor:
    """:meth:`run` in a thread of its own; everything else may be called by others.

    :cvar inside: whether it is for daemons inside of containers, see containers.py
    :cvar longest: seconds for which it may wait without looking for what tells nobody that it happened
    :param guard: path of the guards' program
    """

    inside = False
    longest = IDLE_SECONDS

    def __init__(self, zygote: Zygote, config: Config, events: EventLog, guard: str = PROGRAM) -> None:
        self.config, self.events = config, events
        self.units: dict[str, Unit] = {}
        self._zygote = zygote
        self._keeping = Keeping(self._put_all)
        self._own: Fd | None = None
        self._host = Fd(os.open("/proc/1/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), "the host's mount namespace")
        guards = Guards(self._keeping, events, guard)
        self._context = Context(zygote, self._keeping, events, guards, self._host, self._own_namespace)
        self._mounts = Fd(os.open("/proc/1/mountinfo", os.O_RDONLY | os.O_CLOEXEC), "mountinfo")
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._requests: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._ignored: set[tuple[int, int]] = set()
        self._not_before: dict[str, float] = {}
        self._look_for_units = True
        self._stopping = self._failed = False
        self._all, self._stirred = True, set[str]()  # whom to settle in the next turn
        self.ready = threading.Event()

    # -- for others

    def call(self, work: Callable[[], Any], seconds: float = REQUEST_SECONDS) -> Any:
        """``work`` in the thread of the supervisor, from any other thread: what it returns or raises.

        :raises TimeoutError: not in time
        :raises FusecrError: the thread has failed
        """
        future: Future[Any] = Future()
        self._requests.put((work, future))
        self._wake()
        if self._failed:
            self._refuse_requests()
        try:
            return future.result(seconds)
        except TimeoutError:
            if future.done():
                raise  # what the work itself raised
            raise TimeoutError(f"the supervisor's thread did not come to it in {seconds:g} s") from None

    def stop(self, hand_back: bool, seconds: float = 20.0) -> list[str]:
        """End the thread.

        :param hand_back: give the daemons back as they are, as far as that is possible
        :returns: what goes on without us
        """
        kept: list[str] = []
        if hand_back:
            kept = self.call(self._hand_all_back, seconds)
        self.call(self._end, seconds)
        return kept

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_w, b"!")

    # -- the thread

    def run(self) -> None:
        """Until :meth:`stop`. Raises what it cannot get over: the next agent takes over what is in the holder."""
        try:
            self._run()
        except BaseException:
            self._failed = True
            self._refuse_requests()
            raise

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._load()
                break
            except (FusecrError, OSError, JobError) as error:
                log.error("recovery does not come up: %s", error)
                self._answer_requests(RETRY)
        self.ready.set()
        failures = 0
        while not self._stopping:
            try:
                self._turn()
                failures = 0
            except Exception:
                failures += 1
                if failures == FAILURES:
                    raise
                log.exception("recovery")
                time.sleep(RETRY)

    def _turn(self) -> None:
        if self._look_for_units:
            self._attempt("", self._discover)
        everybody, stirred, now = self._all, self._stirred, time.monotonic()
        self._all, self._stirred = False, set()
        for unit in list(self.units.values()):
            # Not everybody each time something happens to one: there may be hundreds.
            if not self._stopping and (everybody or unit.key in stirred or self._due(unit) <= now):
                self._attempt(unit.key, unit.settle)
        self._wait()

    def _due(self, unit: Unit) -> float:
        return self._not_before.get(unit.key, unit.due if unit.due is not None else math.inf)

    def _attempt(self, key: str, work: Callable[[], None]) -> None:
        now = time.monotonic()
        if self._not_before.get(key, 0.0) > now:
            return
        self._not_before.pop(key, None)
        try:
            work()
        except (FusecrError, OSError, JobError) as error:
            log.error("%s: %s", key or "recovery", error)
            self._not_before[key] = now + RETRY
        except Exception:
            log.exception("%s", key or "recovery")
            self._not_before[key] = now + RETRY

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._wake_r, select.POLLIN)
        if not self.inside:
            poll.register(self._mounts.fileno(), select.POLLPRI)
        followers: dict[int, Link] = {}
        unit_of: dict[int, str] = {}
        if self._keeping.fileno() >= 0:
            poll.register(self._keeping.fileno(), select.POLLIN)
        for unit in self.units.values():
            for pidfd in unit.watched():
                poll.register(pidfd.fileno(), select.POLLIN)
                unit_of[pidfd.fileno()] = unit.key
            for link in unit.links.values():
                if link.guard is not None and link.guard.follower is not None:
                    followers[link.guard.follower.fileno()] = link
                    unit_of[link.guard.follower.fileno()] = unit.key
                    poll.register(link.guard.follower.fileno(), select.POLLIN)
        dues = [self._due(unit) for unit in self.units.values()] + list(self._not_before.values())
        timeout = min(IDLE_SECONDS, max(0.0, min(dues, default=IDLE_SECONDS + time.monotonic()) - time.monotonic()))
        happened = poll.poll(min(timeout, self.longest) * 1000 + 0.5)
        self._all = not happened and min(timeout, self.longest) == IDLE_SECONDS
        for fd, _ in happened:
            if fd in unit_of:
                self._stirred.add(unit_of[fd])
            else:
                self._all = True
            if fd == self._mounts.fileno():
                self._look_for_units = True
            elif fd in followers:
                self._context.guards.heard(followers[fd])
            elif fd == self._keeping.fileno():
                self._attempt("holder", self._revive)
        if self._keeping.fileno() < 0:
            self._attempt("holder", self._revive)
        self._answer_requests(0)

    def _answer_requests(self, seconds: float) -> None:
        if seconds:
            poll = select.poll()
            poll.register(self._wake_r, select.POLLIN)
            poll.poll(seconds * 1000)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_r, 4096)
        while True:
            try:
                work, future = self._requests.get_nowait()
            except queue.Empty:
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def _refuse_requests(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                _, future = self._requests.get_nowait()
                future.set_exception(FusecrError("recovery", "its thread has failed", "see the agent's log"))

    def _end(self) -> None:
        """Everything that lives on is in the holder."""
        self._stopping = True
        for unit in self.units.values():
            for link in unit.links.values():
                link.close()
        self.units.clear()
        self._keeping.close()

    # -- from one agent to the next

    def _own_namespace(self) -> Fd:
        if self._own is None:
            self._own = fresh.make_namespace(self._zygote)
            self._keeping.put("ns", {}, [self._own])
        return self._own

    def _put_all(self) -> None:
        if self._own is not None:
            self._keeping.put("ns", {}, [self._own])
        for unit in self.units.values():
            unit.put_all()

    def _revive(self) -> None:
        self._keeping.revive()
        if not self.inside:
            self.events.add("holder-rebuilt", level=logging.WARNING)

    def _load(self) -> None:
        """Take over from the agent before; without a holder, from its guards."""
        self._keeping.ensure()
        entries = self._keeping.entries()
        if "ns" in entries and not self.inside and (found := self._keeping.get("ns")) and found[1]:
            self._own = found[1][0]
        for key, meta in entries.items():
            if key.startswith("unit-") and ("instance" in meta) == self.inside:
                self._load_entry(key, lambda key=key, meta=meta: self._load_unit(key[5:], meta))  # type: ignore[misc]
        names = [key for key in entries if key.startswith("conn-")]
        links = [self._load_entry(key, lambda key=key: self._load_link(key, entries)) for key in names]  # type: ignore[misc]
        loaded = [link for link in links if link is not None]
        loaded += rebuild.from_guards(self._unit_for, {link.number for link in loaded}, self.inside)
        for unit in self.units.values():
            for role in ("current", "warm"):
                meta = entries.get(f"{role}-{unit.key}", {})
                link = unit.links.get(int(meta.get("connection", -1)))
                if link is not None and (link.daemon.pid, link.daemon.start) == (meta.get("pid"), meta.get("start")):
                    setattr(unit, role, link.number)
            if unit.warm == unit.current:
                unit.warm = None
            unit.resume()
        known = {link.daemon.pid for link in loaded}
        if entries and not self.inside:
            fresh.kill_strays(FRESH, known)
        if loaded:
            self.events.add("taken-over", connections=len(loaded))

    @staticmethod
    def _load_entry(key: str, load: Callable[[], Link | None]) -> Link | None:
        """One that cannot be read must not end this agent, and the next, and the next."""
        try:
            return load()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            log.error("the holder's entry %s is not understood: %r", key, error)
            return None

    def _unit_for(self, key: str) -> Unit | None:
        """The unit that a guard of an agent before names; its mountpoint is the configuration's, or learnt when it is seen."""
        if key not in self.units:
            self._discover()
        return self.units.get(key)

    def _load_unit(self, key: str, meta: dict[str, Any]) -> Link | None:
        config = self.config.get(str(meta.get("name", "")))
        if config is None:
            config = Daemon(str(meta.get("name", key)), Match(), protect=False)
        unit = self._make_unit(key, config, meta)
        unit.paused = bool(meta.get("paused")) or not config.protect
        with contextlib.suppress(KeyError, TypeError, ValueError):
            unit.recipe = Recipe.from_json(meta["recipe"])
        self.units[key] = unit
        return None

    def _make_unit(self, key: str, config: Daemon, meta: dict[str, Any]) -> Unit:
        return Unit(self._context, key, config, str(meta["mountpoint"]))

    def _load_link(self, key: str, entries: dict[str, dict[str, Any]]) -> Link | None:
        number = int(key[5:])
        found = self._keeping.get(key)
        if found is None or not found[1]:
            return None
        meta, fds = found
        unit = self.units.get(str(meta.get("unit")))
        if unit is None:
            for fd in fds:
                fd.close()
            return None
        try:
            link = Link.from_meta(number, meta, fds)
        except (KeyError, TypeError, ValueError):
            for fd in fds:
                fd.close()
            raise
        if f"tree-{number}" in entries and (tree := self._keeping.get(f"tree-{number}")) and tree[1]:
            link.tree, link.tree_in = tree[1][0], str(tree[0].get("in", "ns"))
        guard = entries.get(f"guard-{number}")
        if guard is not None:
            process = Process.find(int(guard["pid"]), int(guard["start"]))
            if process.pidfd is not None:
                process.close()
                link.guard = guard_at(str(guard["control"]), number)
        for name, roots in entries.items():
            if name == f"roots-{number}" or name.startswith(f"roots-{number}."):
                link.roots.update({int(mount_id): str(root) for mount_id, root in roots.items()})
        unit.links[number] = link
        return link

    # -- which daemons

    def _discover(self) -> None:
        """Mounts of the host that the configuration names and no unit has yet."""
        self._look_for_units = False
        taken = {unit.mountpoint for unit in self.units.values()}
        held = {link.number for unit in self.units.values() for link in unit.links.values()}
        new = [m for m in host_mounts() if m.mountpoint not in taken and m.minor not in held]
        new = [m for m in new if (m.id, m.minor) not in self._ignored]
        if not new:
            return
        serving = servers()
        for mount in new:
            pid = serving.get(mount.minor)
            config = self._config_of(mount, pid)
            if config is None or pid is None:
                self._ignored.add((mount.id, mount.minor))
                continue
            key = self._key(config.name, mount.mountpoint)
            unit = self.units[key] = Unit(self._context, key, config, mount.mountpoint)
            unit.put()
            unit.adopt(pid, mount.minor)

    def _config_of(self, mount: Mount, pid: int | None) -> Daemon | None:
        exe = ""
        with contextlib.suppress(OSError):
            exe = os.readlink(f"/proc/{pid}/exe") if pid else ""
        return self.config.find(exe=exe, fstype=mount.fstype, mountpoint=mount.mountpoint)

    def _key(self, name: str, mountpoint: str) -> str:
        return name if name not in self.units else f"{name}.{zlib.crc32(os.fsencode(mountpoint)):08x}"

    # -- requests, in the thread

    def unit(self, name: str) -> Unit:
        """:raises UsageError: there is none"""
        found = self.units.get(name)
        if found is None:
            known = ", ".join(sorted(self.units)) or "none; see /etc/incus-fusecr/daemons.conf"
            raise UsageError(f"daemon {name}", "is not known here", f"known: {known}")
        return found

    def protect(self, name: str) -> dict[str, Any]:
        """Protect what the configuration names; with a name also what it does not want protected."""
        for unit in [self.unit(name)] if name and name in self.units else list(self.units.values()):
            if unit.paused and (name or unit.config.protect):
                unit.paused = False
                unit.put()
                self.events.add("protected", unit.key)
                unit.settle()
        self._ignored.clear()
        self._discover()
        if name:
            self.unit(name).settle()
        return {"units": [describe(unit) for unit in self.units.values() if name in ("", unit.key)]}

    def unprotect(self, name: str) -> dict[str, Any]:
        """Give a daemon back."""
        return {"kept": changes.hand_back(self.unit(name))}

    def upgrade(self, name: str, exe: str, watch: float = 0.0) -> dict[str, Any]:
        """See changes.py. Not in the thread of the supervisor, which has other things to do meanwhile.

        :param watch: seconds that the new daemon has to live before anybody gets it
        """
        began = time.monotonic()

        def begin() -> tuple[Link, Fd | None]:
            new = changes.begin(self.unit(name), exe)
            return new, new.daemon.pidfd.dup() if new.daemon.pidfd is not None else None

        new, pidfd = self.call(begin)
        if pidfd is not None:
            with pidfd:
                wait_exit(pidfd, watch)
        result: dict[str, Any] = self.call(lambda: changes.finish(self.unit(name), new, began))
        return result

    def _hand_all_back(self) -> list[str]:
        kept: list[str] = []
        for unit in list(self.units.values()):
            try:
                kept += [f"{unit.key}: {text}" for text in changes.hand_back(unit)]
                if not unit.links:
                    self._keeping.drop(f"unit-{unit.key}")
                else:  # the next agent protects it again
                    self._keeping.put(f"unit-{unit.key}", {**unit.meta(), "paused": False})
            except FusecrError as error:
                kept.append(str(error))
        if not kept:
            self._keeping.drop("ns")
        return kept

    def guard_status(self, link: Link) -> dict[str, str]:
        """What a link's guard says of itself; empty if it does not answer."""
        return self._context.guards.status(link)

    def status(self) -> dict[str, Any]:
        """For ``incus-fusecr status``."""
        return {"units": [describe(unit) for unit in self.units.values()], "holder_restarts": self._keeping.restarts}
