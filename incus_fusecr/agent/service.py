# SPDX-License-Identifier: Apache-2.0
"""The agent: what it does for each request, and what it does by itself."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from ..checkpoint import dump as dumping
from ..checkpoint import manifest, restore, scan, survive
from ..checkpoint.cgroup import Cgroup
from ..checkpoint.dump import Dump, Tools
from ..checkpoint.freezer import FreezeGuard
from ..checkpoint.guarded import guarded
from ..errors import FusecrError, Refused, UsageError
from ..incus import arrival
from ..incus.ask import is_count
from ..incus.config import Config
from ..incus.failures import NotFound
from ..incus.names import lxc_name
from ..linux import ns, proc
from . import about, brief, inventory, nics, snapshots, takeover
from . import hold as holding
from .bindings import ASKED, Binding, Bindings
from .facts import NAMES_CONNECTIONS, facts, finds_daemons
from .gate import Expected, MigrationGate
from .hold import Hold
from .holds import Holds
from .ledger import ABORTED, RUNNING, GateJournal, Ledger
from .limits import Limits
from .loop import Loop
from .plugin import Server as PluginServer
from .requests import BIND, FACTS, Request, Requests
from .upkeep import Upkeep

log = logging.getLogger(__name__)

HOLD_SECONDS = 600.0
BUSY_SECONDS = 15.0
GO_SECONDS = 60.0
# Less than what supervisors wait for before they kill.
STOP_SECONDS = 15.0
REPORT_SECONDS = 2.0
# Each reads all of a container, and starts a copy of each of its daemons.
CHECKS_OF_PROJECT = 2
CHECKS = 8
CHECK_SECONDS = 40.0


class Service:
    """One agent. :meth:`start` takes over what a former one left, then serves."""

    def __init__(self, tools: Tools, config: Config, criu_options: list[str]) -> None:
        self.tools = tools
        self.criu_options = criu_options
        self.stopping = threading.Event()
        self.requests = Requests(config, self.handle, self.touch, self.ask, self._place_of)
        self.ledger = Ledger(live=self._live)
        self.gate = MigrationGate(tools.zygote, GateJournal(tools.journal, self.ledger), self._changed)
        # Between the look at what is expected and the decision about what is not.
        self._deciding = threading.Lock()
        self._checks = Limits(each=CHECKS_OF_PROJECT, total=CHECKS)
        self.plugin = PluginServer(tools, self.gate)
        self.holds = Holds(tools.journal, self.plugin.held)
        self.plugin.post_dump = self.holds.post_dump
        self.plugin.before_going_on = self._before_going_on
        self.guard = FreezeGuard(tools.zygote, tools.journal)
        self.bindings = Bindings(self.requests.server, self._live, self.gate.forget)
        self.upkeep = Upkeep(self.holds, self.gate, self.bindings, tools.journal, self.stopping, Config.load)

    # Life

    def start(self) -> None:
        """Recover, then start all threads."""
        sessions = dumping.recover(self.tools)
        holds = takeover.recover(self.tools, sessions, self.holds.released)
        for hold in holds:
            self.holds.adopt(hold)
        restored = [session for session, _ in restore.recover(self.tools.zygote, self.tools.journal)]
        plain = self.gate.recover(restored)
        self.tools.knob.recover()
        self.plugin.listen()
        for name, target in (
            ("plugin", self.plugin.run),
            ("requests", self.requests.run),
            ("freezer", self.guard.run),
            ("leases", self.upkeep.watch),
            ("tidy", self.upkeep.tidy),
        ):
            Loop(target, name).start()
        # Only now: CRIU may be waiting for the socket, and ends when it is told what to do.
        of_holds = {h.dump.init for h in holds}
        for hold in holds:
            threading.Thread(target=self._settle, args=(hold,), daemon=True, name=f"settle-{hold.name}").start()
        for dump, entry in sessions:
            if dump.init not in of_holds:
                threading.Thread(target=self._finish_when_gone, args=(dump, entry), daemon=True).start()
        for session in plain:
            threading.Thread(target=self._hand_over_when_gone, args=(session,), daemon=True).start()

    def _settle(self, hold: Hold) -> None:
        with guarded(log, hold.name):
            hold.settle()
        if hold.phase == "going":
            self.upkeep.resolve_later(hold)

    def _finish_when_gone(self, dump: Dump, entry: dict[str, Any]) -> None:
        if entry.get("criu"):
            dumping.wait_gone(entry["criu"], 3600)
        self._before_going_on(dump)
        dump.finish()

    def _before_going_on(self, dump: Dump) -> None:
        if not proc.dying(dump.init):
            snapshots.wait_copied(self.requests.server, dump.name)

    @staticmethod
    def _hand_over_when_gone(session: restore.Restore) -> None:
        dumping.wait_gone(session.criu, 60)
        session.hand_over()

    def close(self) -> None:
        """Stop serving: nobody can say when the next agent comes. What is held goes on, but for what only the target can
        decide; frozen containers are let go by the guard."""
        self.requests.stop.set()
        self.holds.close(STOP_SECONDS)
        self.requests.drain(REPORT_SECONDS)
        self.stopping.set()
        self.guard.close()
        self.plugin.close()

    def _live(self, migration: str) -> bool:
        """Whether something here still belongs to a migration."""
        expected = self.gate.get(migration)
        return (expected is not None and expected.live) or self.holds.has(migration)

    # Requests of instances

    def touch(self, request: Request) -> None:
        """A request was read: perhaps a sign of its client's life."""
        role, args = request.args.get("role"), request.args
        if request.op == BIND and role in ("source", "target"):
            # A copy of the instance has a copy of the key, which names the instance that it was written for.
            if (args.get("project", request.project), args.get("instance", request.name)) != request.place:
                return
            # A target gets its uuid with the first pass.
            self.bindings.bind(Binding(request.id, role, *request.place, uuid=request.uuid if role == "source" else ""))
        elif request.op == "check":
            self.bindings.bind(Binding(request.id, ASKED, *request.place))
        self.bindings.beat(request.id, request.place, (request.seq, request.beat))

    def _place_of(self, migration: str) -> tuple[str, str] | None:
        """The instance that a migration is about here, or was: one in doubt may ask when everything else is gone."""
        return self.bindings.instance_of(migration) or self.ledger.place_of(migration)

    def handle(self, request: Request) -> tuple[str, Any]:
        """Do one request; returns (phase, data).

        :raises FusecrError: why not
        """
        operations = {
            "check": self._check,
            FACTS: lambda _request: (FACTS, facts()),
            "hold": self._hold,
            "going": self._going,
            "commit": self._commit,
            "abort": self._abort,
            "expect": self._expect,
            "go": self._go,
            "status": self._status,
        }
        operation = operations.get(request.op)
        if operation is None:
            raise UsageError(f"request {request.op!r}", "is not known to this agent", "are both sides of one version?")
        return operation(request)

    def _init_of(self, request: Request) -> int:
        name = lxc_name(request.project, request.name)
        group = Cgroup(f"/sys/fs/cgroup/lxc.payload.{name}")
        init = scan.init_of(group.pids()) if group.exists() else None
        if init is None:
            raise Refused(f"instance {request.name}", "is not running", "start it, or move it with incus move")
        return init

    def _check(self, request: Request) -> tuple[str, Any]:
        init = self._init_of(request)
        self._not_held(init, request)
        with self._checks.slot(request.project, f"check of {request.name}", CHECK_SECONDS):
            with self.requests.server(request.project) as server:
                devices = nics.look(self.tools.zygote, init, server, request.name)
                more = about.look(init, lxc_name(request.project, request.name), server.instance(request.name) or {})
            return "checked", {**self.check(init, request.name, devices), **more}

    def check(self, init: int, name: str, more: Sequence[survive.Verdict] = ()) -> dict[str, Any]:
        """Verdicts and INIT replies of a running container; touches nothing."""
        seen, found = dumping.look_twice(self.tools, init)
        if not found:
            found = dumping.paths_verdicts(self.tools, seen)
        if not finds_daemons():
            found.insert(0, survive.Verdict(NAMES_CONNECTIONS, "is missing: no daemon can be found", "Linux 6.16 or later"))
        found += [survive.Verdict(*words) for words in self.tools.outside(init)]
        replies: dict[str, str] = {}
        # More than can be carried over are not asked one by one; a verdict says so already.
        for number, pids in sorted(seen.connections.items())[: manifest.MAX_CONNECTIONS]:
            try:
                replies[str(number)] = self.tools.init_probe(pids[0]).hex()
            except FusecrError as error:
                who = survive.owner(seen, pids[0])
                found.append(survive.Verdict(f"INIT of {who}", f"{error.what}: {error.why}", error.hint or "see the agent's log"))
        connections = inventory.connections(seen)
        shown = brief.fitting(connections)
        return {
            "name": name,
            "connections": shown,
            "connections_left_off": len(connections) - len(shown),
            "verdicts": brief.verdicts([*found, *more]),
            "notes": brief.verdicts(survive.notes(seen)),
            "init_replies": replies,
            "unprivileged": not ns.same_ns(init, "user"),
            "tasks": len(seen.processes),
        }

    def _not_held(self, init: int, request: Request) -> None:
        """:raises Refused: a migration holds the container, and does not let go: its client lives"""
        deadline = time.monotonic() + BUSY_SECONDS
        while (other := self.holds.on(init)) is not None:
            if time.monotonic() > deadline:
                raise Refused(f"{request.op} of {request.name}", f"migration {other.migration} holds it", "wait for its end")
            time.sleep(0.1)  # a former client's lease may be about to end

    def _hold(self, request: Request) -> tuple[str, Any]:
        self._bound_as("source", request)
        init = self._init_of(request)
        name = lxc_name(request.project, request.name)
        self._not_held(init, request)
        with self.holds.starting(request.id, request.name):
            hold = self._start_hold(request, name, init)
        what = hold.dump.manifest
        assert what is not None
        return "held", {
            "parts": hold.parts,
            "frozen_since": time.monotonic() - hold.began,
            "image_bytes": hold.image_bytes(),
            "handles": [
                {
                    "daemon": proc.comm(hold.dump.recordings[i].daemons[0]),
                    "mountpoint": brief.short(proc.printable(c.mountpoint), brief.NAME),
                    "handles": len(c.handles),
                    "nodes": len(c.nodes),
                }
                for i, c in enumerate(what.connections)
            ],
        }

    def _start_hold(self, request: Request, name: str, init: int) -> Hold:
        hold = holding.start(
            self.tools,
            name,
            init,
            request.id,
            links=self._links(request.project, request.name),
            extra=self.criu_options,
            seconds=request.number("seconds", HOLD_SECONDS, 5, 3600),
            holds=self.holds,
        )
        target = request.args.get("target")
        hold.target = {k: str(v)[:200] for k, v in target.items()} if isinstance(target, dict) else {}
        hold.tell = lambda phase: self.requests.tell(request, phase)
        hold.target.update(project_here=request.project, instance_here=request.name)
        hold.write_journal()
        self.bindings.touch(request.id)
        return hold

    def _bound_as(self, role: str, request: Request) -> None:
        """:raises Refused: the instance's key does not say that it is an end of this migration"""
        binding = self.bindings.get(request.id)
        if binding is None or binding.role != role or binding.place != request.place:
            raise Refused(
                f"{request.op} of {request.name}", f"migration {request.id} is not bound to it as its {role}", "migrate it"
            )

    def _hold_of(self, request: Request) -> Hold:
        """:raises FusecrError: there is none, or it is of another instance: who knows an id has no right by that"""
        hold = self.holds.of(request.id)
        if hold is not None and (hold.target.get("project_here"), hold.target.get("instance_here")) == request.place:
            return hold
        ended = self.holds.ended(request.id)
        raise FusecrError(
            f"{request.op} of {request.name}",
            f"migration {request.id} is {ended[0]}" if ended else f"migration {request.id} {arrival.HOLDS_NOTHING}",
            "the instance runs" if ended and ended[0] == "aborted" else "",
        )

    def _going(self, request: Request) -> tuple[str, Any]:
        self._hold_of(request).going()
        return "going", {}

    def _commit(self, request: Request) -> tuple[str, Any]:
        ended = self.holds.ended(request.id)
        if ended and ended[0] == "committed":
            return ended
        hold = self._hold_of(request)
        if hold.phase == "held":
            raise FusecrError(f"commit of {request.name}", "nobody was told that its target goes", "going comes first")
        hold.commit()
        return "committed", {"frozen": time.monotonic() - hold.began}

    def _abort(self, request: Request) -> tuple[str, Any]:
        """On a source: it goes on. On a target: it does not begin."""
        unknown = self.gate.get(request.id) is None and self.ledger.get(request.id) is None
        evidence = self._evidence(request) if unknown else ""
        with self._deciding:
            expected = self._expected_of(request)
            decision = self._decide(request, evidence) if expected is None else ""
        if expected is not None:
            decision = ABORTED if self.gate.abort(request.id, "asked for by the client") else RUNNING
        if decision == RUNNING:
            raise FusecrError(f"abort of {request.name}", arrival.RUNS_HERE, "commit on the source")
        if decision == ABORTED:
            self._free(request)
            return "aborted", {}
        ended = self.holds.ended(request.id)
        if ended and ended[0] == "aborted":
            return ended
        deadline = time.monotonic() + HOLD_SECONDS
        while self.holds.is_starting(request.id) and time.monotonic() < deadline:
            time.sleep(0.01)  # it is being stopped at this moment; it goes on as soon as that is done
        try:
            hold = self._hold_of(request)
        except FusecrError:
            if ended:
                raise
            self._bound_as("source", request)
            return "aborted", {}
        hold.abort(even_going=bool(request.args.get("target_aborted")))
        return "aborted", {"frozen": time.monotonic() - hold.began}

    def _free(self, request: Request) -> None:
        """The client is about to delete a target that is not to run."""
        binding = self.bindings.get(request.id)
        if binding is None or binding.role != "target" or binding.place != request.place:
            return
        try:
            self.bindings.free(binding)
        except (FusecrError, OSError) as error:
            log.warning("%s: %s", request.name, error)

    def _expected_of(self, request: Request) -> Expected | None:
        expected = self.gate.get(request.id)
        if expected is not None and (expected.project, expected.instance) != request.place:
            raise FusecrError(f"{request.op} of {request.name}", f"migration {request.id} is of another instance")
        return expected

    def _evidence(self, request: Request) -> str:
        """What the instance tells of a migration to it that was not even expected: ``running``, ``aborted``, or empty."""
        binding = self.bindings.get(request.id)
        if binding is None or binding.place != request.place or binding.role != "target":
            return ""
        with self.requests.server(request.project) as server:
            if arrival.seen(server, request.name, request.id) == arrival.RUNNING:
                return RUNNING
        if not self.bindings.never_started(binding):
            raise FusecrError(f"abort of {request.name}", "whether it was let run is not known", "look at the instance")
        return ABORTED

    def _decide(self, request: Request, evidence: str) -> str:
        """What became of a migration to this host of which the gate knows nothing (any more): what the ledger says. One that
        is undecided there can no longer be let run when this has said so.

        :returns: ``running``, ``aborted``, or empty: it was none to this host
        """
        record = self.ledger.get(request.id)
        if record is None and evidence != ABORTED:
            return evidence
        if record is None:
            self.ledger.open(request.id, *request.place)
        elif (record.project, record.instance) != request.place:
            raise FusecrError(f"{request.op} of {request.name}", f"migration {request.id} is of another instance")
        return self.ledger.decide(request.id, ABORTED)

    def _mark(self, expected: Expected) -> None:
        """Write into the instance that it was let run: what a source in doubt goes by, when all else is forgotten."""
        while not self.stopping.is_set() and not expected.marked:
            try:
                with self.requests.server(expected.project) as server:
                    server.patch_instance_config(expected.instance, {arrival.ARRIVED_KEY: expected.migration})
                expected.marked = True
            except NotFound:
                expected.marked = True
            except (FusecrError, OSError) as error:
                log.info("%s: %s", expected.instance, error)
                self.stopping.wait(0.1)
            except Exception:
                log.exception("%s: that it runs could not be written into it", expected.instance)
                self.stopping.wait(1.0)

    def _changed(self, expected: Expected) -> None:
        if expected.phase == "running" and not expected.marked:
            threading.Thread(target=self._mark, args=(expected,), daemon=True, name=f"mark-{expected.instance}").start()

    def _expect(self, request: Request) -> tuple[str, Any]:
        self._bound_as("target", request)
        seconds = request.number("go_seconds", GO_SECONDS, 1, 600)
        source = str(request.args.get("source", ""))[:200]
        with self._deciding:
            self.ledger.open(request.id, *request.place)
            self.gate.expect(Expected(request.id, *request.place, seconds, source))
        return "expecting", {}

    def _go(self, request: Request) -> tuple[str, Any]:
        deadline = time.monotonic() + 10
        while True:
            expected = self._expected_of(request)
            if expected is None or expected.phase != "expecting" or time.monotonic() > deadline:
                break
            time.sleep(0.002)
        expected = self.gate.go(request.id)
        while not expected.marked and time.monotonic() < deadline:
            time.sleep(0.002)
        return "running", {"parts": expected.parts}

    def _status(self, request: Request) -> tuple[str, Any]:
        expected = self._expected_of(request)
        if expected is not None:
            return expected.phase, {}
        hold = self.holds.of(request.id)
        if hold is not None:
            return hold.phase, {}
        return self.holds.ended(request.id) or ("unknown", {})

    # Requests of the server

    def ask(self, op: str, args: dict[str, Any]) -> Any:
        """Requests of those who may edit the server."""
        if op == "ping":
            return {"version": facts()["version"]}
        if op == "facts":
            return facts()
        if op == "list":
            return self._list(args.get("after"))
        raise UsageError(f"request {op!r}", "is not known to this agent", "are both sides of one version?")

    def _list(self, after: object) -> dict[str, Any]:
        """A page of connections; ``more`` says that one follows, which is asked for with ``after`` the last entry's
        container and number."""
        last: tuple[str, int] = ("", -1)
        if isinstance(after, list) and len(after) == 2 and isinstance(after[0], str) and is_count(after[1]):
            last = (after[0], after[1])
        found: list[dict[str, Any]] = []
        for group in inventory.payloads():
            if inventory.name_of(group) < last[0]:
                continue
            with guarded(log, group.path):
                init = scan.init_of(group.pids())
                if init is None:
                    continue
                for entry in inventory.connections(scan.scan(self.tools.zygote, init)):
                    if (inventory.name_of(group), entry["connection"]) > last:
                        found.append({"container": inventory.name_of(group), **entry})
            page = brief.fitting(found)
            if len(page) < len(found):
                return {"connections": page, "more": True}
        return {"connections": found, "more": False}

    # The target

    def _links(self, project: str, name: str) -> list[str]:
        with self.requests.server(project) as server:
            return nics.host_names(server.instance(name) or {})
