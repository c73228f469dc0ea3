# SPDX-License-Identifier: Apache-2.0
"""Requests that arrive as keys of instances and of the server, and the reports that go back (docs/adr/0001).

Whoever may edit an instance may write its keys. They get here what ``incus stop`` and ``incus move`` give them: the
container is stopped with its state beside it, or goes on. Nothing in a request names a path, a process or a command.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from ..checkpoint.guarded import guarded
from ..errors import EXIT_REFUSED, FusecrError
from ..incus.ask import (
    ANSWER_KEY,
    ASK_KEY,
    REPORT_KEY,
    REQUEST_KEY,
    VERSION,
    is_count,
    parse_report,
    read_object,
)
from ..incus.client import Server
from ..incus.config import Config
from ..incus.events import CONNECTED, follow
from ..incus.failures import NotFound
from ..incus.mailbox import PROFILE_PREFIX
from .agenda import Agenda
from .loop import Loop
from .reports import Report, Reports, report_text

log = logging.getLogger(__name__)

BIND = "bind"
# The one thing that may be asked in a profile without an instance: by a client that may not write the server's keys.
FACTS = "facts"
# A sign that somebody is there, before what may take longer than the client waits for such a sign.
WORKING = "working"
SLOW = ("check",)
# Seconds after an event at which what it is about is read again.
AGAIN = (0.01, 0.04, 0.2)
MAX_ASKED = 1000
# Requests of one instance that are being done: a hold, and what may have to be said to it.
MAX_DOING = 4
MAX_SERVERS = 16
_ID = re.compile(r"[0-9a-f]{1,64}")
_OP = re.compile(r"[a-z-]{1,32}")


class Request:
    """One request about an instance, as written by its client; checked for form only.

    :ivar mailbox: path of the object that carries it, below ``/1.0``, and its project; the report goes there
    :ivar uuid: of the instance, if it carries the request itself
    """

    def __init__(self, raw: dict[str, Any], project: str, name: str, mailbox: tuple[str, str]) -> None:
        self.mailbox = mailbox
        self.uuid = ""
        self.id: str = raw["id"]
        self.seq: int = raw["seq"]
        self.beat: int = raw.get("beat", 0)
        self.op: str = raw["op"]
        self.args = raw
        self.project = project
        self.name = name

    @property
    def place(self) -> tuple[str, str]:
        """The instance that it is about: (project, name)."""
        return self.project, self.name

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """A number of the request, forced into bounds."""
        value = self.args.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            return default
        return float(min(max(value, low), high))

    @classmethod
    def parse(cls, text: object, project: str, name: str, mailbox: tuple[str, str] = ("", "")) -> Request | None:
        """None if there is none, or it is not one."""
        raw = read_object(text)
        if raw is None:
            return None
        identifier, op = raw.get("id"), raw.get("op")
        counts = (raw.get("v"), raw.get("seq"), raw.get("beat", 0))
        if not all(is_count(n) for n in counts) or counts[0] != VERSION:
            return None
        if not (isinstance(identifier, str) and _ID.fullmatch(identifier) and isinstance(op, str) and _OP.fullmatch(op)):
            return None
        return cls(raw, project, name, mailbox)


class Requests:
    """Follows the events of the local server; one thread of its own, one for each request.

    A conversation begins with a key of the instance, which binds its random id to that instance: only who may edit the
    instance can do that. Later requests may come by a profile named after the id, which, other than the instance, can be
    written while an operation of the instance runs.

    :param handle: does an instance's request and returns ``(phase, data)``; raises FusecrError
    :param touch: called with every sighting of a request, for leases
    :param ask: does a server's request
    :param bound: the instance (project, name) that a migration's id is bound to here, if it is
    """

    def __init__(
        self,
        config: Config,
        handle: Callable[[Request], tuple[str, Any]],
        touch: Callable[[Request], None],
        ask: Callable[[str, dict[str, Any]], Any],
        bound: Callable[[str], tuple[str, str] | None],
    ) -> None:
        self.config = config
        self._handle = handle
        self._touch = touch
        self._ask = ask
        self._lock = threading.Lock()
        self._bound = bound
        self._seen: dict[tuple[str, str], tuple[str, int]] = {}
        self._asked: set[str] = set()
        self._doing: dict[threading.Thread, tuple[str, str]] = {}
        self._turned_away: dict[tuple[str, str], tuple[str, str]] = {}
        self._reports = Reports(lambda project: self.server(project))
        self._instances: Agenda[tuple[str, str]] = Agenda()
        self._others: Agenda[tuple[str, str]] = Agenda()
        self.stop = threading.Event()

    def server(self, project: str = "default") -> Server:
        """A connection for the calling thread; the caller closes it."""
        return Server(self.config.endpoint("local", project))

    def run(self) -> None:
        """Until :attr:`stop`; survives restarts of incusd."""
        Loop(self._read_instances, "instances").start()
        Loop(self._read_others, "others").start()
        while not self.stop.is_set():
            with guarded(log, "events of incus"):
                self._follow()
            self.stop.wait(0.5)
        self._instances.close()
        self._others.close()

    def _follow(self) -> None:
        server: Server | None = None
        try:
            for event in follow(self.config.endpoint("local"), all_projects=True, stop=self.stop):
                with guarded(log, f"event {event.get('type')} of incus"):
                    if server is None or event.get("type") == CONNECTED:
                        if server is not None:
                            server.close()
                        server = self.server()
                    self._event(server, event)
        finally:
            if server is not None:
                server.close()

    def _event(self, server: Server, event: dict[str, Any]) -> None:
        if event.get("type") == CONNECTED:
            self._look_at_all(server)
            return
        metadata = event.get("metadata") or {}
        action, source = str(metadata.get("action")), urlsplit(str(metadata.get("source") or ""))
        parts = source.path.split("/")
        project = (parse_qs(source.query).get("project") or [str(event.get("project") or "default")])[0]
        # Incus 6.0 sends some events before the change can be read: read once more a little later.
        if action in ("instance-updated", "instance-created") and len(parts) == 4:
            # Incus asks the container's monitor for its status, which may take a second: not in this thread.
            self._instances.put((project, parts[3]), (0.0, *AGAIN))
        elif action == "config-updated":
            self._others.put(("", ""), AGAIN)
            self._look_at_asks(server)
        elif action in ("profile-updated", "profile-created") and parts[-1].startswith(PROFILE_PREFIX):
            self._others.put((project, parts[-1]), AGAIN)
            self._read_profile(server, project, parts[-1])
        elif action in ("instance-deleted", "profile-deleted") and len(parts) == 4:
            mailbox = f"{parts[2]}/{parts[3]}", project
            self._reports.forget(mailbox)
            with self._lock:
                self._seen.pop(mailbox, None)

    def _read_instances(self) -> None:
        """Thread: read the instances that changed."""
        servers = _Servers(self.server)
        while (key := self._instances.get()) is not None:
            project, name = key
            with guarded(log, f"instance {name}"), suppress(NotFound), servers.of(project) as server:
                self._look(project, dict(server.get(f"instances/{name}")))
        servers.close()

    def _read_others(self) -> None:
        """Thread: read profiles and the server's keys that may not have been there when their event came."""
        servers = _Servers(self.server)
        while (key := self._others.get()) is not None:
            project, name = key
            with guarded(log, f"profile {name}" if name else "the server's keys"), servers.of("default") as server:
                if name:
                    self._read_profile(server, project, name)
                else:
                    self._look_at_asks(server)
        servers.close()

    def _read_profile(self, server: Server, project: str, name: str) -> None:
        try:
            self._look_at_profile(server, project, dict(server.get(f"profiles/{name}", {"project": project})))
        except NotFound:
            pass

    def _look_at_all(self, server: Server) -> None:
        there = set()
        for instance in server.instances(all_projects=True):
            with guarded(log, f"instance {instance.get('name')}"):
                project = str(instance.get("project") or "default")
                there.add((_path("instances", str(instance["name"])), project))
                self._look(project, instance)
        for profile in server.get("profiles", {"recursion": "1", "all-projects": "true"}) or ():
            name = str(profile.get("name", ""))
            if name.startswith(PROFILE_PREFIX):
                with guarded(log, f"profile {name}"):
                    project = str(profile.get("project") or "default")
                    there.add((_path("profiles", name), project))
                    self._look_at_profile(server, project, profile)
        self._reports.keep(there)
        with self._lock:
            self._seen = {mailbox: last for mailbox, last in self._seen.items() if mailbox in there}
        self._look_at_asks(server)

    # Instances

    def _look(self, project: str, instance: dict[str, Any]) -> None:
        config = instance.get("config") or {}
        name = str(instance["name"])
        request = Request.parse(config.get(REQUEST_KEY), project, name, (_path("instances", name), project))
        if request is not None:
            request.uuid = str(config.get("volatile.uuid") or "")
            self._dispatch(request, config)

    def _look_at_profile(self, server: Server, project: str, profile: dict[str, Any]) -> None:
        """Only one in the project of the instance counts: who may make profiles elsewhere may not speak for it."""
        name = str(profile["name"])
        bound = self._bound(name.removeprefix(PROFILE_PREFIX))
        if bound is not None and project != bound[0] and project != _profiles_of(server, bound[0]):
            return
        config = profile.get("config") or {}
        request = Request.parse(config.get(REQUEST_KEY), *(bound or (project, "")), (_path("profiles", name), project))
        # Facts are for a client that may not write the server's keys, and binds nothing.
        if request is not None and PROFILE_PREFIX + request.id == name and (bound is not None or request.op == FACTS):
            self._dispatch(request, config)

    def _dispatch(self, request: Request, config: dict[str, Any]) -> None:
        self._touch(request)
        with self._lock:
            known = self._seen.get(request.mailbox)
            if known is not None and known[0] == request.id and known[1] >= request.seq:
                # Seen; or a late beat of an earlier request.
                undone = self._reports.undone(request.mailbox, request.id, config)
                if undone is not None:
                    threading.Thread(target=self._reports.write, args=(undone,), daemon=True, name=f"again-{request.name}").start()
                return
            self._doing = {t: place for t, place in self._doing.items() if t.is_alive()}
            if list(self._doing.values()).count(request.place) >= MAX_DOING:
                self._turned_away[request.mailbox] = request.place  # read again when one of these has ended
                return
            self._seen[request.mailbox] = (request.id, request.seq)
            report = parse_report(str(config.get(REPORT_KEY) or ""))
            if report is not None and report.id == request.id and report.seq >= request.seq and report.phase != WORKING:
                return
            if request.op != BIND:
                name = f"{request.op}-{request.name}"
                thread = threading.Thread(target=self._do, args=(request,), daemon=True, name=name)
                self._doing[thread] = request.place
                thread.start()

    def drain(self, seconds: float) -> None:
        """After :attr:`stop`: let those that are about to end write their report."""
        end = time.monotonic() + seconds
        with self._lock:
            doing = list(self._doing)
        for thread in doing:
            thread.join(max(0.0, end - time.monotonic()))

    def _do(self, request: Request) -> None:
        log.info("%s: %s of migration %s", request.name, request.op, request.id)
        error: FusecrError | None = None
        phase, data = "failed", None
        if request.op in SLOW:
            self._report(request, WORKING)
        try:
            phase, data = self._handle(request)
        except FusecrError as failure:
            error = failure
            phase = "refused" if failure.exit_code == EXIT_REFUSED else "failed"
        except Exception:
            log.exception("%s: %s failed", request.name, request.op)
            error = FusecrError(f"{request.op} of {request.name}", "the agent failed", "see the agent's log")
        if error is not None:
            log.warning("%s: %s: %s", request.name, request.op, error)
        self._report(request, phase, data, error)
        with self._lock:
            self._doing.pop(threading.current_thread(), None)
            waiting = [mailbox for mailbox, place in self._turned_away.items() if place == request.place]
            for mailbox in waiting:
                del self._turned_away[mailbox]
        for path, project in waiting:
            kind, _, name = path.partition("/")
            (self._instances if kind == "instances" else self._others).put((project, name))

    def tell(self, request: Request, phase: str) -> None:
        """Report what has become of it since it was answered."""
        self._report(request, phase)

    def _report(self, request: Request, phase: str, data: Any = None, error: FusecrError | None = None) -> None:
        text = report_text(request.id, request.seq, phase, data, error)
        what = f"{request.op} of {request.name}"
        self._reports.write(Report(request.mailbox, request.id, request.seq, phase, text, what))

    # The server

    def _look_at_asks(self, server: Server) -> None:
        config = server.get("").get("config") or {}
        with self._lock:
            fresh = [k for k in config if k.startswith(ASK_KEY) and k not in self._asked]
            self._asked.update(fresh)
            if len(self._asked) > MAX_ASKED:
                self._asked = {k for k in self._asked if k in config}
        for key in fresh:
            threading.Thread(target=self._answer, args=(key, str(config[key])), daemon=True, name="ask").start()

    def _answer(self, key: str, text: str) -> None:
        identifier = key.removeprefix(ASK_KEY)
        error: FusecrError | None = None
        data: Any = None
        self._say(identifier, WORKING, None, None)
        raw = read_object(text) or {}
        op, args = raw.get("op"), raw.get("args") or {}
        try:
            if not isinstance(op, str) or not isinstance(args, dict):
                raise FusecrError("a request of this server's configuration", "is malformed", f"remove the key {key}")
            data = self._ask(op, args)
        except FusecrError as failure:
            error = failure
        except Exception:
            log.exception("ask %s failed", identifier)
            error = FusecrError("a request to the agent", "the agent failed", "see the agent's log")
        self._say(identifier, "done", data, error)

    def _say(self, identifier: str, phase: str, data: Any, error: FusecrError | None) -> None:
        text = report_text(identifier, 0, phase, data, error)
        try:
            with self.server() as server:
                server.patch_server_config({ANSWER_KEY + identifier: text})
        except FusecrError as failure:
            log.warning("answer to %s: %s", identifier, failure)


class _Servers:
    """Connections of one thread, kept while they work: one for each project that is looked at."""

    def __init__(self, connect: Callable[[str], Server]) -> None:
        self._connect = connect
        self._all: dict[str, Server] = {}

    @contextmanager
    def of(self, project: str) -> Iterator[Server]:
        if project not in self._all and len(self._all) >= MAX_SERVERS:
            self.close()
        if project not in self._all:
            self._all[project] = self._connect(project)
        try:
            yield self._all[project]
        except NotFound:
            raise
        except BaseException:
            self._all.pop(project).close()
            raise

    def close(self) -> None:
        while self._all:
            self._all.popitem()[1].close()


def _path(kind: str, name: str) -> str:
    return f"{kind}/{quote(name, safe='')}"


def _profiles_of(server: Server, project: str) -> str:
    """The project in which a project's profiles are: another one may have none of its own."""
    config = server.get(f"projects/{quote(project, safe='')}").get("config") or {}
    return project if str(config.get("features.profiles", "")).lower() == "true" else "default"
