# SPDX-License-Identifier: Apache-2.0
"""The drill itself, inside of its namespaces: the agent's own supervisor, holder and guards, on a daemon that may be killed."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import FusecrError
from ..guard.client import Follower
from ..linux import proc
from ..linux.mount import MNT_DETACH, mountinfo, umount2
from ..linux.zygote import JobError, Zygote
from ..recovery.config import Config, Daemon, Limits, Match
from ..recovery.events import EventLog
from ..recovery.fresh import RUN
from ..recovery.supervisor import Supervisor
from ..recovery.unit import Unit
from . import clients, features, outcome
from .box import Tell

T = TypeVar("T")
NAME = "drill"
PLACE = "/run/drill"
TREE = f"{PLACE}/tree"
DATA = f"{PLACE}/data"
REPORTS = f"{PLACE}/reports"
PROGRAM = Path(__file__).with_name("filesystem.py")
READY_SECONDS = 30.0  # until everything stands by again
SERVE_SECONDS = 20.0
END_SECONDS = 20.0
WARM_UP = 1.0
FAILURES = 5  # of a guard one after another: no more are waited for

# Its directory has everything at once, whoever dies: nothing is lost that was acknowledged.
DAEMON = Daemon(
    NAME, Match(mountpoint=TREE), standby="warm", durability="relaxed",
    limits=Limits(burst=1000, breaker=1000, backoff=0.01, backoff_max=0.1),
)  # fmt: skip


class Drill:
    """
    :param options: ``kills``, ``upgrades``, ``containers``, ``readers``, ``window`` (seconds), ``guard``, ``python``, ``debug``
    :param tell: gets ``{"progress": TEXT}`` and at the end ``{"result": ...}``
    """

    def __init__(self, options: Mapping[str, Any], tell: Tell) -> None:
        self.options, self.tell = options, tell
        self.record = outcome.Record(int(float(options["window"]) * 1e9))
        self.crew = clients.crew(int(options["containers"]), int(options["readers"]))
        self.board = clients.Board(len(self.crew))
        self.connections: set[int] = set()
        self.namespaces: list[int] = []
        self.tables: dict[int, list[tuple[str, ...]]] = {}

    def run(self) -> None:
        """Never raises what is a finding: it is in the result."""
        began = time.monotonic()
        os.makedirs(RUN, exist_ok=True)
        self._log()
        try:
            self._mount()
            self._start_clients()
            self._supervise()
        except (FusecrError, OSError, JobError, TimeoutError) as error:
            self.record.problems.append(str(error) or type(error).__name__)
        with contextlib.suppress(OSError):
            self._leftovers()
        self.record.events = [vars(event) for event in self._events()]
        used, absent = features.used_in(self.record.events)
        release = os.uname().release
        self.tell({"result": {
            "kernel": release,
            "seconds": round(time.monotonic() - began, 1),
            **outcome.summary(self.record),
            "features": [f.to_dict() for f in features.findings(release, used, absent)],
            "problems": outcome.problems(self.record),
            "connections": sorted(self.connections),
        }})  # fmt: skip

    def _log(self) -> None:
        """What a healthy drill logs are deaths: for those who ask."""
        handler = logging.StreamHandler() if self.options["debug"] else logging.FileHandler(f"{PLACE}.log")
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logging.basicConfig(level=logging.DEBUG if self.options["debug"] else logging.WARNING, handlers=[handler], force=True)

    @staticmethod
    def _events() -> list[Any]:
        from ..recovery.events import read

        return list(read())

    # -- what it is done to

    def _mount(self) -> None:
        for directory in (TREE, DATA, REPORTS):
            os.makedirs(directory)
        clients.fill(DATA, int(self.options["containers"]))
        output = f"{PLACE}/daemon.log"
        with open(output, "wb") as file:
            process = subprocess.Popen(
                [self.options["python"], "-P", str(PROGRAM), DATA, TREE], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True, cwd="/",
            )  # fmt: skip

        def mounted() -> bool:
            if process.poll() is not None:
                raise FusecrError("the drill's file system", f"ended with code {process.returncode}: {_tail(output)}")
            return any(m.mountpoint == TREE and m.is_fuse for m in mountinfo("self"))

        _wait("the drill's file system is not mounted", mounted, READY_SECONDS)
        # Of no use but to be killed; who ends it is not to be waited for.
        threading.Thread(target=process.wait, daemon=True).start()

    def _start_clients(self) -> None:
        for number in range(int(self.options["containers"])):
            mine = [client for client in self.crew if client.container == number]
            place = f"{PLACE}/namespace{number}"
            self.namespaces.append(clients.start_container(number, mine, TREE, place, self.board, REPORTS))

        def at_work() -> bool:
            return all(self.board.slot(client.number)[0] > 3 for client in self.crew)

        _wait("the clients do not begin to work", at_work, READY_SECONDS)
        self.tables = {pid: table(pid) for pid in [*self.namespaces, os.getpid()]}

    # -- what is done

    def _supervise(self) -> None:
        zygote = Zygote()
        events = EventLog()
        supervisor = Supervisor(zygote, Config((DAEMON,)), events, self.options["guard"])
        thread = threading.Thread(target=supervisor.run, daemon=True, name="recovery")
        thread.start()
        stopped = False
        try:
            self._ready(supervisor, events)
            time.sleep(WARM_UP)
            for number in range(int(self.options["kills"])):
                self._say(f"kill {number + 1} of {self.options['kills']}")
                self._one("kill", supervisor, events)
            for number in range(int(self.options["upgrades"])):
                self._say(f"upgrade {number + 1} of {self.options['upgrades']}")
                self._one("upgrade", supervisor, events)
            self._say("the clients end")
            self._end_clients()
            self._drained(supervisor)
            self._look_at_tables(supervisor)
            self._end_namespaces()
            kept = supervisor.stop(True, END_SECONDS)
            stopped = True
            self.record.problems += [f"left behind: {text}" for text in kept]
        finally:
            if not self.record.reports:
                self._end_clients()
            self.board.end_namespaces()
            if not stopped:
                with contextlib.suppress(FusecrError, TimeoutError):
                    supervisor.stop(True, END_SECONDS)
            with contextlib.suppress(OSError):
                umount2(TREE, MNT_DETACH)
            zygote.close()
            events.close()

    def _one(self, kind: str, supervisor: Supervisor, events: EventLog) -> None:
        window = self.record.window
        begin = time.monotonic_ns()
        time.sleep(window / 1e9)
        control = begin, begin + window
        serving = None
        start = time.monotonic_ns()
        if kind == "kill":
            serving = self._kill(supervisor)
            _sleep_until(start + window)
            until = start + window
        else:
            supervisor.upgrade(NAME, "")
            until = time.monotonic_ns()
        self._ready(supervisor, events)
        self.record.done.append(outcome.Done(kind, control, (start, time.monotonic_ns()), until, serving))

    def _kill(self, supervisor: Supervisor) -> float:
        """:returns: milliseconds until the guard served, to 1 ms"""

        def who() -> tuple[int, str]:
            current = _current(supervisor.unit(NAME))
            assert current is not None and current.guard is not None
            return current.daemon.pid, current.guard.control

        pid, control = supervisor.call(who)
        with Follower(control) as follower:
            now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            os.kill(pid, signal.SIGKILL)
            event = follower.wait_for("serving", SERVE_SECONDS)
        return max(0.0, round(event.boottime_ms - now / 1e6, 2))

    def _ready(self, supervisor: Supervisor, events: EventLog) -> None:
        """Wait until the daemon and its spare serve, each with a guard whose sidecar is ready.

        :raises FusecrError: not in time, with the last reason that was given
        """

        def ready() -> bool:
            if sum(event.what == "guard-failed" for event in events.since()) > FAILURES:
                raise FusecrError("the drill's file system", "it cannot be protected")
            return bool(supervisor.call(look))

        def look() -> bool:
            unit = supervisor.units.get(NAME)
            if unit is None:
                return False
            self.connections |= set(unit.links)
            links = [unit.link(unit.current), unit.link(unit.warm)]
            if any(link is None or not link.alive() or link.guard is None for link in links):
                return False
            found = [supervisor.guard_status(link) for link in links if link is not None]
            return all((one.get("phase"), one.get("ready")) == ("standby", "1") for one in found)

        try:
            _wait("the drill's file system is not protected", ready, READY_SECONDS)
        except FusecrError as error:
            unit = supervisor.units.get(NAME)
            hint = unit.problem if unit is not None else "nobody is seen to serve its mount"
            raise FusecrError(error.what, error.why, hint) from None

    # -- the end

    def _end_clients(self) -> None:
        self.board.end_clients()
        end = time.monotonic() + END_SECONDS
        while len(glob.glob(f"{REPORTS}/*[0-9]")) < len(self.crew) and time.monotonic() < end:
            time.sleep(0.02)
        self._collect_reports()

    def _collect_reports(self) -> None:
        now = time.monotonic_ns()
        for client in self.crew:
            try:
                with open(f"{REPORTS}/{client.number}") as file:
                    self.record.reports.append(json.load(file))
            except (OSError, ValueError):
                began = self.board.slot(client.number)[2]
                why = f"waits in an operation since {(now - began) / 1e9:.1f} s" if began else "has ended without a report"
                self.record.problems.append(f"{client.name}: {why}")

    def _drained(self, supervisor: Supervisor) -> None:
        """Nobody uses a former daemon any more: their connections end."""

        def drained() -> bool:
            unit = supervisor.unit(NAME)
            made = unit.fresh()
            if unit.olds() and made is not None:
                unit.swap(made)  # what was stacked for a working directory is put in order
            return not unit.olds()

        with contextlib.suppress(FusecrError):
            _wait("", lambda: supervisor.call(drained, END_SECONDS), END_SECONDS, pause=0.2)
            return
        olds = supervisor.call(lambda: [link.number for link in supervisor.unit(NAME).olds()])
        self.record.problems.append(f"connections of former daemons do not end: {', '.join(map(str, olds))}")

    def _look_at_tables(self, supervisor: Supervisor) -> None:
        number = supervisor.call(lambda: supervisor.unit(NAME).current)
        for index, pid in enumerate([*self.namespaces, os.getpid()]):
            where = f"mount namespace {index}" if pid in self.namespaces else "the host's mount namespace"
            others = {m.minor for m in mountinfo(pid) if m.is_fuse and m.mountpoint.startswith(PLACE)} - {number}
            if others:
                self.record.problems.append(f"{where}: mounts of connections {sorted(others)}, not {number}")
            if text := outcome.what_differs(self.tables[pid], table(pid)):
                self.record.problems.append(f"{where}: {text}")

    def _end_namespaces(self) -> None:
        self.board.end_namespaces()
        left = set(self.namespaces)

        def ended() -> bool:
            for pid in list(left):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    left.discard(pid)
            return not left

        _wait("the mount namespaces do not end", ended, END_SECONDS)

    def _leftovers(self) -> None:
        """Daemons and guards end with what they served."""

        def left() -> list[str]:
            ours = {self.options["guard"], str(PROGRAM)}
            return [f"{pid} {' '.join(words)}" for pid, words in processes() if ours & set(words)]

        with contextlib.suppress(FusecrError):
            _wait("", lambda: not left(), END_SECONDS)
        self.record.problems += [f"process {text[:120]} is left" for text in left()]

    def _say(self, text: str) -> None:
        operations, errors = self.board.totals(len(self.crew))
        self.tell({"progress": f"{text}; {operations} operations, {errors} errors"})


def table(pid: int) -> list[tuple[str, ...]]:
    """The mounts of the drill that a process sees, without ids and devices."""
    found = []
    for m in mountinfo(pid):
        if m.mountpoint.startswith(PLACE + "/"):
            found.append((m.mountpoint, m.root, m.options, *(word.split(":")[0] for word in m.propagation), m.fstype))
    return sorted(found)


def processes() -> list[tuple[int, list[str]]]:
    """(pid, command line) of all in this pid namespace that are not dead."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and (text := proc.read_text(f"/proc/{name}/cmdline", 4096)):
                found.append((int(name), text.split("\0")))
    return found


def _current(unit: Unit) -> Any:
    return unit.link(unit.current)


def _wait(what: str, holds: Callable[[], bool], seconds: float, pause: float = 0.03) -> None:
    """:raises FusecrError: not in time"""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise FusecrError("drill", f"{what} within {seconds:g} s")
        time.sleep(pause)


def _sleep_until(moment: int) -> None:
    time.sleep(max(0, moment - time.monotonic_ns()) / 1e9)


def _tail(path: str) -> str:
    with open(path, errors="replace") as file:
        return proc.printable(file.read()[-300:].strip().replace("\n", "; "))
