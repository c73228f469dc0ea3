# SPDX-License-Identifier: Apache-2.0
"""One dump: bring the container to rest, record, answer for its daemons, and let it go on when CRIU is gone."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from .. import __version__
from ..errors import FusecrError, Refused
from ..fuse import connection
from ..linux import mount, ns, proc, ptrace
from ..linux.fd import Fd
from ..linux.pidfd import pidfd_getfd, pidfd_open, wait_exit
from ..linux.zygote import JobError, JobTimeout, Zygote
from . import manifest, paths, peers, quiesce, record, scan, sessions, survive
from .answers import Answers
from .cgroup import Cgroup
from .journal import Journal
from .knob import Knob
from .manifest import Connection, Manifest
from .quiesce import Stopper
from .scan import Scan
from .standin import StandIn, leave
from .trim import trim

log = logging.getLogger(__name__)

KIND = "dump"
ATTEMPTS = 5
# How long exiting tasks may take to close their FUSE files; the stand-ins answer meanwhile.
END_SECONDS = 10.0
# Characters that CRIU's --external mnt[PATH]:KEY or our line protocol could not carry.
_UNSAFE = "]\n\r\0"
# In the place of a reply where that does not matter.
_ANY_REPLY = "00" * 64
# Incus' mount through which it passes mounts into a running container, and the key under which CRIU gets it from us.
SHMOUNTS = "/dev/.incus-mounts"
SHMOUNTS_KEY = "fusecr-shmounts"

InitProbe = Callable[[int], bytes]


@dataclass
class Tools:
    """What a session works with; one set per agent.

    :ivar leave: lets go of the protected daemons in the container with this init; what it returns takes them up again
    :ivar outside: what is served from outside of that container, and so could not be dumped: (what, why, hint) each
    """

    zygote: Zygote
    journal: Journal
    knob: Knob
    init_probe: InitProbe
    leave: Callable[[int], Callable[[], None]] = lambda _init: lambda: None
    outside: Callable[[int], list[tuple[str, str, str]]] = lambda _init: []


@dataclass
class Dump:
    """A container at rest, its daemons answered for. Ends with :meth:`finish`."""

    tools: Tools
    name: str
    init: int
    criu: int = 0
    stopper: Stopper = field(default_factory=Stopper)
    standins: list[StandIn] = field(default_factory=list)
    recordings: list[record.Recording] = field(default_factory=list)
    manifest: Manifest | None = None
    began: float = 0.0
    quiet: float = 0.0
    undo: ExitStack = field(default_factory=ExitStack)
    initfd: Fd | None = None

    @property
    def answer(self) -> str:
        """The plugin's orders."""
        assert self.manifest is not None
        lines = [f"ext mnt[{c.mountpoint}]:{c.key}" for c in self.manifest.connections]
        if lines and not ns.same_ns(self.init, "user"):
            uid, gid = ns.IdMaps(self.init).outside(0, 0)
            lines.append(f"fsuid {uid} {gid}")
        if self.manifest.migration and any(m.mountpoint == SHMOUNTS for m in mount.mountinfo(self.init)):
            # Left to itself CRIU records the host's path, which has the container's name in it: it may get another one.
            lines.append(f"ext mnt[{SHMOUNTS}]:{SHMOUNTS_KEY}")
        return "\n".join(["ok", *lines])

    def _alive(self) -> bool:
        """By the pidfd: once init is reaped, another process may have its number."""
        if self.initfd is not None and not self.initfd.closed and wait_exit(self.initfd, 0):
            return False
        return not proc.dying(self.init)

    def finish(self) -> bool:
        """CRIU is gone. If the tree lives, daemons and then clients go on; if it was killed, answer until the
        connections have ended.

        :returns: whether the tree lives
        """
        alive = self._alive()
        if not alive:
            for recording in self.recordings:
                recording.close()
            deadline = time.monotonic() + END_SECONDS
            for standin in self.standins:
                standin.ended.wait(max(0.0, deadline - time.monotonic()))
            self.stopper.forget()
        self.undo.close()
        if not alive:
            for standin in self.standins:
                standin.abort()
        log.info(
            "%s: %s; frozen %.3f s, answered %s",
            self.name,
            "runs on" if alive else "gone",
            time.monotonic() - self.began,
            {s.answers.connection.key: dict(s.answers.counts) for s in self.standins},
        )
        return alive


def look(tools: Tools, init: int, *, adopting: bool = False) -> tuple[Scan, list[survive.Verdict]]:
    """The container as it runs, and what speaks against a checkpoint. Touches nothing.

    :param adopting: what ``incus exec`` left behind will be given sessions before the dump
    :raises FusecrError: it could not be looked at
    """
    try:
        seen = scan.scan(tools.zygote, init)
    except JobError as error:
        raise FusecrError(f"looking at the container of pid {init}", str(error), "try again") from None
    found = survive.verdicts(seen, unprivileged=not ns.same_ns(init, "user"), adopting=adopting)
    for number in seen.connections:
        root = survive.root_mount(seen, number)
        if root is not None and any(c in root.mountpoint for c in _UNSAFE):
            found.append(
                survive.Verdict(
                    f"mount {proc.printable(root.mountpoint)}",
                    "has a name that CRIU cannot be told",
                    "mount it at a place without brackets and line breaks",
                )
            )
    return seen, found


def look_twice(tools: Tools, init: int) -> tuple[Scan, list[survive.Verdict]]:
    """:func:`look` at what is to be dumped, with only those verdicts that are there again a moment later: short commands
    come and go."""
    adopting = ptrace.can_make_calls()
    seen, found = look(tools, init, adopting=adopting)
    if found:
        time.sleep(0.3)
        seen, again = look(tools, init, adopting=adopting)
        found = [v for v in again if v.what in {f.what for f in found}]
    return seen, found


def paths_verdicts(tools: Tools, seen: Scan) -> list[survive.Verdict]:
    """What recording would refuse, while the container runs: only what is there twice, for files come and go."""
    found = _paths_verdicts(tools, seen)
    if found:
        time.sleep(0.1)
        again = _paths_verdicts(tools, scan.scan(tools.zygote, seen.init))
        found = [v for v in again if v.what in {f.what for f in found}]
    return found


def _paths_verdicts(tools: Tools, seen: Scan) -> list[survive.Verdict]:
    found = []
    for number in seen.connections:
        if survive.root_mount(seen, number) is None:
            continue
        try:
            recording = record.record(tools.zygote, seen, number, spares=False, sync=False)
        except JobError as error:
            found.append(_unreachable(seen, number, str(error)))
            continue
        found += recording.verdicts
        if fault := manifest.fault_of(record.to_connection(seen, recording, 0, _ANY_REPLY, [])):
            daemon = survive.owner(seen, seen.connections[number][0])
            hint = "rename such files, or close what is below them"
            found.append(survive.Verdict(f"FUSE connection {number} of {daemon}", f"no restore would accept it: {fault}", hint))
    return found


def _unreachable(seen: Scan, number: int, why: str) -> survive.Verdict:
    daemon = survive.owner(seen, seen.connections[number][0])
    return survive.Verdict(f"FUSE connection {number} of {daemon}", f"does not answer: {why}", _repair(number))


def _repair(number: int) -> str:
    control = f"{connection.FUSECTL}/{number}/abort"
    return f"repair or unmount it first; the last resort, with errors for all who use it: echo 1 > {control}"


def _unanswered(seen: Scan, number: int, why: str) -> FusecrError:
    """Not one to try again: each time, clients stand still for as long as it takes."""
    verdict = _unreachable(seen, number, why)
    return FusecrError(verdict.what, verdict.why, verdict.hint)


def refuse(name: str, found: list[survive.Verdict]) -> None:
    """:raises Refused: with every verdict, if there is one"""
    if found:
        text = "; ".join(f"{v.what}: {v.why}" for v in found[:20])
        more = f"; and {len(found) - 20} more" if len(found) > 20 else ""
        hints = list(dict.fromkeys(v.hint for v in found))
        raise Refused(f"{name} cannot be carried over", text + more, "; ".join(hints[:5]))


def begin(
    tools: Tools, name: str, init: int, imgdir: int | None, migration: str = "", force: bool = False, criu: int = 0
) -> Dump | None:
    """Bring the container to rest; on return everything in it is stopped and its daemons are answered for.

    :param name: for messages and the journal
    :param init: the container's first process
    :param imgdir: descriptor of CRIU's image directory
    :param migration: id for the manifest: a restore has to pass the gate of this migration
    :param force: also for a container without FUSE
    :param criu: the CRIU that asked; its end is the dump's (0: somebody else knows when it ends)
    :returns: None if nothing inside serves FUSE (and not ``force``)
    :raises Refused: something cannot be carried over; nothing was touched, or everything runs again
    :raises FusecrError: it could not be brought to rest; everything runs again
    """
    back = tools.leave(init)
    try:
        dump = _begin(tools, name, init, imgdir, migration, force, criu)
    except BaseException:
        back()
        raise
    if dump is None:
        back()
    else:
        dump.undo.callback(back)
    return dump


def _begin(tools: Tools, name: str, init: int, imgdir: int | None, migration: str, force: bool, criu: int) -> Dump | None:
    seen, found = look_twice(tools, init)
    if not seen.connections and not force:
        return None
    refuse(name, found)
    for number in seen.connections:
        if tools.zygote.hangs(connection.label(number)):
            raise _unanswered(seen, number, "a former request still waits for an answer")
    sessions.adopt(tools.zygote, seen, name)
    for number in seen.connections:
        # The bulk of it while all run; _rest() does what comes after.
        try:
            trim(tools.zygote, seen, number, _device_of(seen, number))
        except JobTimeout as error:
            raise _unanswered(seen, number, str(error)) from None
    replies = {n: tools.init_probe(pids[0]).hex() for n, pids in seen.connections.items()}
    refused: Refused | None = None
    for attempt in range(ATTEMPTS):
        dump = Dump(tools, name, init, criu=criu)
        try:
            if _rest(dump, replies, imgdir, migration):
                dump.quiet = time.monotonic()
                log.info("%s: quiet after %.1f ms", name, 1e3 * (dump.quiet - dump.began))
                return dump
        except Refused as error:
            # Temporary files and short commands come and go; what stays is refused in the end.
            refused = error
        except OSError as error:
            dump.undo.close()
            why = error.strerror or str(error)
            raise FusecrError(f"stopping {name}", why, "it runs on; see the agent's log") from error
        except BaseException:
            dump.undo.close()
            raise
        dump.undo.close()
        log.info("%s: attempt %d to stop it: %s", name, attempt + 1, refused or "its references changed meanwhile")
        time.sleep(0.05 if refused is None else 0.2)
    raise refused or FusecrError(
        f"stopping {name}", "its references into FUSE mounts keep changing", "try again when it is idle"
    )


def _rest(dump: Dump, replies: dict[int, str], imgdir: int | None, migration: str) -> bool:
    """One attempt; False if the container changed meanwhile and all has to be undone."""
    tools, undo = dump.tools, dump.undo
    dump.initfd = pidfd_open(dump.init)
    undo.callback(dump.initfd.close)
    unprivileged = not ns.same_ns(dump.init, "user")
    if unprivileged and replies:
        tools.knob.acquire()
        undo.callback(tools.knob.release)
    undo.callback(tools.journal.remove, KIND, str(dump.init))
    before = scan.scan(tools.zygote, dump.init)
    was_stopped = {p.pid for p in before.processes if p.states and set(p.states) <= proc.STOPPED_OR_GONE}
    tools.journal.write(KIND, str(dump.init), {**_identity(dump), "was_stopped": sorted(was_stopped), "phase": "stopping"})
    undo.callback(_let_go_on, dump)
    group = scan.payload_cgroup(dump.init)
    if group is not None and Cgroup(group).frozen_wanted:
        # Whoever froze it wants it frozen; tasks can only be stopped one by one while they are not.
        undo.callback(Cgroup(group).write_freeze, True)
        Cgroup(group).write_freeze(False)
    served = before.connections
    if set(served) != set(replies):
        return False
    daemons = {pid for pids in served.values() for pid in pids}
    clients = {r.pid for r in before.refs if r.connection in served} - daemons
    spared = set(peers.helpers(tools.zygote, daemons, [p.pid for p in before.processes])) if daemons else set()
    spared = (spared - clients) | daemons
    dump.began = time.monotonic()
    deadline = dump.began + quiesce.STOP_SECONDS

    def alive() -> list[int]:
        return [p for p in scan.container_pids(dump.init) if p not in was_stopped]

    quiesce.stop_all(dump.stopper, lambda: [p for p in alive() if p not in spared], deadline)
    seen, found = look(tools, dump.init)
    refuse(dump.name, found)
    if seen.connections != served:
        return False
    for number in served:
        try:
            trim(tools.zygote, seen, number, _device_of(seen, number))
            dump.recordings.append(record.record(tools.zygote, seen, number, spares=True, sync=True))
        except JobTimeout as error:
            raise _unanswered(seen, number, str(error)) from None
        except JobError as error:
            refuse(dump.name, [_unreachable(seen, number, str(error))])
    refuse(dump.name, [v for r in dump.recordings for v in r.verdicts])
    clients_of = {n: {r.pid for r in seen.refs if r.connection == n} for n in served}
    order = quiesce.stacking_order(served, clients_of)
    quiesce.stop_daemons(dump.stopper, order, alive, time.monotonic() + quiesce.DRAIN_SECONDS)
    after = scan.scan(tools.zygote, dump.init)
    if _references(after) != _references(seen):
        return False
    # Handles are asked for one by one through the stand-ins: daemons above others first would wait for those below.
    connections = _handles(dump, after, replies)
    first = [p for p in reversed(dump.stopper.pids) if p in spared]
    # A helper may have ended since, and is not restored.
    ns_pid = {p.pid: p.ns_pid for p in after.processes if set(p.states) - proc.GONE}
    dump.manifest = _acceptable(
        dump.name,
        Manifest(
            product=__version__,
            connections=connections,
            first=[ns_pid[p] for p in first if p in ns_pid],
            tasks=list(ns_pid.values()),
            stopped=[ns_pid[p] for p in was_stopped if p in ns_pid],
            cgroups=Cgroup(group).tree(ns.IdMaps(dump.init).inside) if group is not None else [],
            migration=migration,
        ),
    )
    tools.journal.write(
        KIND,
        str(dump.init),
        {
            **_identity(dump),
            "phase": "quiet",
            "knob": unprivileged and bool(replies),
            "stopped": dump.stopper.pids,
            "devices": {str(n): _device_of(after, n) for n in served},
            "manifest": dump.manifest.dump().decode(),
        },
    )
    if imgdir is not None:
        dump.manifest.write(imgdir)
        paths.write(imgdir, paths.table(seen, dump.recordings))
    return True


def _acceptable(name: str, what: Manifest) -> Manifest:
    """What a restore, and the next agent, would read. Now CRIU has not begun.

    :raises Refused: they would not take it
    """
    try:
        return manifest.parse(what.dump())
    except manifest.ManifestError as error:
        raise Refused(f"{name} cannot be carried over", f"no restore would accept it: {error.why}") from None


def _identity(dump: Dump) -> dict[str, Any]:
    return {"init": dump.init, "start": proc.start_time(dump.init), "container": dump.name, "criu": dump.criu}


def _references(seen: Scan) -> set[tuple[Any, ...]]:
    return {(r.pid, r.kind, r.fd, r.connection, r.flags, r.path) for r in seen.refs}


def _device_of(seen: Scan, number: int) -> tuple[int, int]:
    """(pid, fd) of a /dev/fuse descriptor of a connection."""
    return next((p.pid, fd) for p in seen.processes for fd, n in p.devices if n == number)


def _handles(dump: Dump, seen: Scan, replies: dict[int, str]) -> list[Connection]:
    """Stand-ins up, every handle asked for; the manifest's connections."""
    connections: list[Connection] = []
    missing: list[survive.Verdict] = []
    for index, recording in enumerate(dump.recordings):
        bare = record.to_connection(seen, recording, index, replies[recording.number], [])
        standin = _stand_in(dump, bare, _device_of(seen, recording.number))
        places = [(r.pid, r.fd) for r, _ in recording.opened] + recording.spares
        flags = record.probe(dump.tools.zygote, dump.init, recording.uid, recording.gid, places)
        handles, lost = record.handles_of(seen, recording, standin.answers.probes, flags)
        missing += lost
        connections.append(record.to_connection(seen, recording, index, replies[recording.number], handles))
    refuse(dump.name, missing)
    return connections


def _stand_in(dump: Dump, what: Connection, device: tuple[int, int]) -> StandIn:
    with pidfd_open(device[0]) as pidfd:
        standin = StandIn(pidfd_getfd(pidfd, device[1]), Answers(what))
    dump.standins.append(standin)
    standin.start()
    return standin


def _let_go_on(dump: Dump) -> None:
    """Undo of everything that was stopped: the stand-ins leave, daemons go on, then clients."""
    try:
        leave(dump.standins)
        for standin in dump.standins:
            if standin.answers.refused:
                log.warning("%s: %d look-ups or openings were refused by %s", dump.name, standin.answers.refused, standin.name)
    finally:
        dump.stopper.resume()
        for recording in dump.recordings:
            recording.close()


def recover(tools: Tools) -> list[tuple[Dump, dict[str, Any]]]:
    """Take over the dumps of an agent that died: tasks it had stopped, connections it answered.

    :returns: sessions at rest with their journal entries; those that had not come to rest were undone
    """
    found: list[tuple[Dump, dict[str, Any]]] = []

    def take(entry: dict[str, Any]) -> None:
        dump = Dump(tools, entry["container"], entry["init"], entry["criu"], began=time.monotonic())
        with ExitStack() as failed:
            failed.callback(dump.undo.close)
            if _take_over(dump, entry):
                found.append((dump, entry))
                failed.pop_all()

    tools.journal.each(KIND, take)
    return found


def _take_over(dump: Dump, entry: dict[str, Any]) -> bool:
    """False if there is nothing (more) to go on with; the caller then closes ``dump.undo``."""
    tools = dump.tools
    dump.undo.callback(tools.journal.remove, KIND, entry["name"])
    try:
        dump.initfd = pidfd_open(dump.init)
    except ProcessLookupError:
        return False
    dump.undo.callback(dump.initfd.close)
    dump.undo.callback(tools.leave(dump.init))
    if proc.dying(dump.init) or proc.start_time(dump.init) != entry["start"]:
        return False
    if entry.get("knob"):
        tools.knob.acquire()
        dump.undo.callback(tools.knob.release)
    dump.undo.callback(_let_go_on, dump)
    if entry["phase"] != "quiet":
        # It died between signals: all that are stopped now, and were not before, go on.
        inside = set(scan.container_pids(dump.init)) - set(entry["was_stopped"])
        dump.stopper.adopt(sorted(p for p in inside if not quiesce.unstopped([p])))
        log.warning("%s: a dump that had not come to rest was undone", dump.name)
        return False
    dump.stopper.adopt(entry["stopped"])
    dump.manifest = manifest.parse(entry["manifest"].encode())
    for one in dump.manifest.connections:
        device = entry["devices"][str(one.number)]
        try:
            _stand_in(dump, one, (device[0], device[1]))
        except (ProcessLookupError, OSError) as error:
            log.warning("%s: connection %d cannot be taken over: %s", dump.name, one.number, error)
    log.info("%s: took over a dump", dump.name)
    return True


def wait_gone(pid: int, seconds: float) -> bool:
    """Wait for a process's end; True if it is gone."""
    try:
        with pidfd_open(pid) as pidfd:
            return wait_exit(pidfd, seconds)
    except ProcessLookupError:
        return True


def image_dir(path: str) -> Fd:
    """An owned descriptor of a directory."""
    return Fd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW), path)
