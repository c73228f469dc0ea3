# SPDX-License-Identifier: Apache-2.0
"""The held dump: CRIU waits in its post-dump script, the source stands still, frozen and off the network, and intact.

Script exit 0: CRIU kills the tree. Any other: CRIU lets it go on. Phases: ``dumping`` -> ``held`` -> ``going`` ->
``committed`` | ``aborted``. Each change is in the journal before it takes effect. What is decided and what is done of it are
two things: a call that finds the decision made does what is still missing.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..checkpoint import dump as dumping
from ..checkpoint import scan
from ..checkpoint.cgroup import Cgroup
from ..checkpoint.dump import Dump, Tools
from ..checkpoint.guarded import guarded
from ..checkpoint.journal import RUN
from ..checkpoint.restore import ACTION_HELPER
from ..criu import dump_args
from ..errors import FusecrError
from ..linux import proc
from ..linux.fd import Fd
from ..linux.pidfd import pidfd_open, send_signal, wait_exit
from .network import Fence, undo_network_lock

log = logging.getLogger(__name__)

KIND = "hold"
INCUS_DIR = "/var/lib/incus"
FREEZE_SECONDS = 5.0
KILL_SECONDS = 30.0
HOLD_SECONDS = "30"
AGAIN_SECONDS = 2.0


@dataclass
class Hold:
    """One held dump. Methods may come from several threads.

    :ivar phase: what is decided: in the journal first, then here
    :ivar cgroup: the payload's directory, as it was while the tree certainly lived
    :ivar criufd: pidfd of CRIU; None if it is gone, or none was started
    :ivar ended: what was decided is done, too
    """

    tools: Tools
    name: str
    migration: str
    init: int
    dump: Dump
    criu: int = 0
    phase: str = "dumping"
    began: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    fence: Fence = field(default_factory=Fence)
    cgroup: Cgroup | None = None
    criufd: Fd | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    reached: threading.Event = field(default_factory=threading.Event)
    verdict: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    commit_wanted: bool = False
    resolving: bool = False
    released: Callable[[Hold], None] = lambda _hold: None
    tell: Callable[[str], None] = lambda _phase: None  # the client, when nobody has asked
    _deed: threading.Lock = field(default_factory=threading.Lock)
    _done: set[str] = field(default_factory=set)

    @property
    def images(self) -> str:
        return f"{INCUS_DIR}/containers/{self.name}/state"

    def image_bytes(self) -> int:
        """Size of what CRIU wrote."""
        try:
            with os.scandir(self.images) as entries:
                return sum(e.stat(follow_symlinks=False).st_size for e in entries if e.is_file(follow_symlinks=False))
        except OSError:
            return 0

    def write_journal(self) -> None:
        """What the next agent needs to decide.

        :raises FusecrError: it could not be written
        """
        with self.lock:
            self._write(self.phase)

    def _write(self, phase: str) -> None:
        group = self.cgroup
        entry = {
            "migration": self.migration,
            "container": self.name,
            "init": self.init,
            "start": start_time_of(self.init) if self._alive() else 0,
            "criu": self.criu,
            "criu_start": start_time_of(self.criu) if self.criufd is not None else 0,
            "phase": phase,
            "target": self.target,
            "fence": self.fence.to_dict(),
            "cgroup": [group.path, group.identity] if group is not None else None,
        }
        try:
            self.tools.journal.write(KIND, str(self.init), entry)
        except OSError as error:
            raise FusecrError(
                f"journal of the hold of {self.name}", f"cannot be written: {error.strerror}", f"make room on {RUN}"
            ) from None

    def _decide(self, phase: str) -> None:
        """:raises FusecrError: it is not in the journal, so it is not decided"""
        self._write(phase)
        self.phase = phase

    # Called by the plugin server

    def wait_verdict(self) -> bool:
        """In the action helper's post-dump: the hold is reached; returns True when CRIU shall kill the tree."""
        with self.lock:
            if self.phase == "dumping":
                self.reached.set()
        self.verdict.wait()
        return self.commit_wanted

    # Called by requests

    def going(self) -> None:
        """From here the source does not go on by itself.

        :raises FusecrError: it is not held any more
        """
        with self.lock:
            if self.phase == "going":
                return
            if self.phase != "held":
                raise FusecrError(f"going of {self.name}", f"the source is {self.phase}")
            self._decide("going")

    def commit(self) -> None:
        """The target runs: the source dies. Again: what is still to be done of it.

        :raises FusecrError: it is not held any more; or it does not die (it stays frozen, and that is tried again)
        """
        with self.lock:
            if self.phase not in ("held", "going", "committed"):
                raise FusecrError(f"commit of {self.name}", f"the source is {self.phase}")
            if self.phase != "committed":
                try:
                    self._decide("committed")
                except FusecrError as error:
                    if self.phase != "going":
                        raise
                    # An agent that finds "going" asks the target, which runs, and comes to the same.
                    log.error("%s; the source ends all the same", error)
                    self.phase = "committed"
            self.commit_wanted = True
            self.verdict.set()
        self._carry_out()

    def abort(self, *, even_going: bool = False) -> None:
        """The source goes on as if nothing had happened. Again: what is still to be done of it.

        :param even_going: the target is known not to run
        :raises FusecrError: it was committed, or the target may be running; or a part of it failed (and is tried again)
        """
        with self.lock:
            if self.phase == "committed" or (self.phase == "going" and not even_going):
                raise FusecrError(f"abort of {self.name}", f"the source is {self.phase}")
            if self.phase != "aborted":
                try:
                    self._decide("aborted")
                except FusecrError as error:
                    # An agent that finds "held" does the same, one that finds "going" asks the target, which does not run.
                    log.error("%s; the source goes on all the same", error)
                    self.phase = "aborted"
            if not self.verdict.is_set():
                try:
                    # Before CRIU lets the connections go on: what they send first must not be lost.
                    self._let_go()
                except Exception:
                    log.exception("%s: letting it go on", self.name)
                finally:
                    self.commit_wanted = False
                    self.verdict.set()
        self._carry_out()

    def criu_died(self) -> None:
        """CRIU ended without a verdict (killed): the fence holds the tree; nothing was lost."""
        with self.lock:
            if self.phase in ("going", "committed"):
                log.error("%s: CRIU died while the source was %s; it stays frozen", self.name, self.phase)
                return
        self.abort()

    def settle(self) -> None:
        """Finish what a former agent had decided, or had not come to: before ``going`` the source goes on. A hold that was
        ``going`` stays, its target has to be asked. The plugin's socket must be served: CRIU asks it for the verdict."""
        if self.phase == "committed":
            self.commit()
        elif self.phase != "going":
            # A CRIU that is still at work asks for the verdict when it is done, and is told then.
            self.abort()

    # What was decided is done

    def _let_go(self) -> None:
        """Off with what keeps the tree still from outside. Each step is tried, whatever the others do, until it is done.

        :raises Exception: of the last one that failed
        """
        failed: Exception | None = None
        for step in (self.fence.open, self._unlock, self._thaw):
            if step.__name__ in self._done:
                continue
            try:
                step()
                self._done.add(step.__name__)
            except Exception as error:
                failed = error
        if failed is not None:
            raise failed

    def _unlock(self) -> None:
        if self._criu_gone(0):
            self._undo_network_lock()

    def _thaw(self) -> None:
        if self.cgroup is not None:
            self.cgroup.write("cgroup.freeze", "0")

    def _undo_network_lock(self) -> None:
        # A pid that another process has by now is none of ours.
        if self._alive():
            undo_network_lock(self.tools.zygote, self.init)

    def _alive(self) -> bool:
        initfd = self.dump.initfd
        return initfd is not None and not initfd.closed and not wait_exit(initfd, 0)

    def _criu_gone(self, seconds: float) -> bool:
        return self.criufd is None or self.criufd.closed or wait_exit(self.criufd, seconds)

    def _carry_out(self) -> None:
        """CRIU leaves; the tree dies or goes on; then the hold is over.

        :raises FusecrError: a part of it failed; all that is not done yet is tried again
        """
        with self._deed:
            if self.ended.is_set():
                return
            committed = self.phase == "committed"
            failed: Exception | None = None
            steps: tuple[Callable[[], object], ...] = (
                self._end_criu,
                self._kill_tree if committed else self._let_go,
                self.dump.finish,
                self._over,
            )
            for step in steps:
                try:
                    if step != self._over or failed is None:
                        step()
                except Exception as error:
                    log.exception("%s: the source is %s, and that failed", self.name, self.phase)
                    failed = error
                    if committed:
                        break  # nothing of it may go on before it is dead
            if failed is not None:
                timer = threading.Timer(AGAIN_SECONDS, self._again)
                timer.daemon = True
                timer.start()
                raise FusecrError(f"{self.phase} source {self.name}", str(failed), "the agent tries again; see its log")

    def _again(self) -> None:
        try:
            self._carry_out()
        except FusecrError as error:
            log.error("%s", error)

    def _end_criu(self) -> None:
        if self._criu_gone(KILL_SECONDS):
            return
        assert self.criufd is not None
        log.error("%s: CRIU %d does not end, killing it", self.name, self.criu)
        send_signal(self.criufd, signal.SIGKILL)
        wait_exit(self.criufd, 5.0)
        if self.phase != "committed":
            self._undo_network_lock()

    def _kill_tree(self) -> None:
        """CRIU kills each task that it dumped; a tree that outlived it (CRIU was killed) is killed by its cgroup.

        :raises FusecrError: it does not die
        """
        initfd = self.dump.initfd
        if initfd is None or initfd.closed or wait_exit(initfd, 1.0) or proc.dying(self.init):
            return
        log.warning("%s: killing what CRIU left", self.name)
        if self.cgroup is None or not self.cgroup.write("cgroup.kill", "1"):
            send_signal(initfd, signal.SIGKILL)
        if not wait_exit(initfd, KILL_SECONDS):
            raise FusecrError(f"committed source {self.name}", "does not die", "look at its tasks' states")

    def _over(self) -> None:
        if self.phase != "committed":
            shutil.rmtree(self.images, ignore_errors=True)
        self.released(self)
        self.tools.journal.remove(KIND, str(self.init))
        if self.criufd is not None:
            self.criufd.close()
        self.ended.set()


class Registry(Protocol):
    """Where holds are found by those who ask for them (:class:`incus_fusecr.agent.holds.Holds`)."""

    by_criu: dict[int, Hold]
    held: dict[int, Dump]
    stopping: threading.Event

    def released(self, hold: Hold) -> None:
        """One has ended."""


def start(
    tools: Tools,
    name: str,
    init: int,
    migration: str,
    *,
    links: list[str],
    extra: list[str],
    seconds: float,
    holds: Registry,
) -> Hold:
    """Dump ``name`` and hold it.

    :param links: host-side network devices to shut
    :param seconds: until CRIU must have written everything
    :param holds: registered there before CRIU or its plugin can ask for it
    :raises FusecrError: it could not be dumped; the source goes on
    """
    images = f"{INCUS_DIR}/containers/{name}/state"
    payload = scan.payload_cgroup(init)
    if payload is None:
        raise FusecrError(f"hold of {name}", f"process {init} is in no cgroup of liblxc", "is it an Incus container?")
    criu = shutil.which("criu", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if criu is None:
        raise FusecrError(f"hold of {name}", "criu is not installed", "apt install criu")
    with ExitStack() as undo:
        # The directory is new, so what a former dump left is not mixed into this one.
        shutil.rmtree(images, ignore_errors=True)
        undo.callback(shutil.rmtree, images, ignore_errors=True)
        os.mkdir(images, 0o700)
        began = time.monotonic()
        with dumping.image_dir(images) as imgdir:
            session = dumping.begin(tools, name, init, imgdir.fileno(), migration, force=True)
        assert session is not None
        undo.callback(session.finish)
        _unless(holds.stopping, name)
        # The tree lives as long as it is stopped here: what is found by its pid is its own, and is remembered.
        cgroup = Cgroup(payload).identify()
        hold = Hold(tools, name, migration, init, session, began=session.began, cgroup=cgroup, released=holds.released)
        hold.parts["prepare"] = session.began - began
        hold.parts["quiesce"] = session.quiet - session.began
        holds.held[init] = session
        undo.callback(holds.held.pop, init, None)
        undo.callback(tools.journal.remove, KIND, str(init))
        hold.write_journal()
        command = dump_args.held_dump(
            criu=criu, init=init, images=images, cgroup=payload, name=name, action_helper=ACTION_HELPER, extra=extra
        )
        # In a session of its own: it must outlive this agent, the next one tells it what to do.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "FUSECR_HOLD_SECONDS": HOLD_SECONDS},
        )
        hold.criu = process.pid
        holds.by_criu[process.pid] = hold
        undo.callback(holds.by_criu.pop, process.pid, None)
        undo.callback(_stop_criu, hold, process)
        hold.criufd = pidfd_open(process.pid)
        hold.write_journal()
        _until_held(hold, process, time.monotonic() + seconds, holds.stopping)
        undo.callback(cgroup.write, "cgroup.freeze", "0")
        cgroup.write_freeze(True)
        if not cgroup.wait_frozen(FREEZE_SECONDS):
            raise FusecrError(f"hold of {name}", "its cgroup does not freeze", "look at its tasks' states")
        hold.fence.plan_source(links, init)
        hold.write_journal()
        undo.callback(hold.fence.open)
        # After the dump: a route without carrier would be dumped as one, which no restore can set.
        hold.fence.close()
        hold.parts["dump"] = time.monotonic() - session.quiet
        _unless(holds.stopping, name)
        with hold.lock:
            hold._decide("held")
        undo.pop_all()
    threading.Thread(target=_watch, args=(hold, process), daemon=True, name=f"hold-{name}").start()
    return hold


def _unless(stopping: threading.Event, name: str) -> None:
    """:raises FusecrError: the agent is about to end, and nobody could end the hold"""
    if stopping.is_set():
        raise FusecrError(f"hold of {name}", "the agent is being stopped", "try again when it runs")


def _until_held(hold: Hold, process: subprocess.Popen[bytes], deadline: float, stopping: threading.Event) -> None:
    while not hold.reached.wait(0.002):
        _unless(stopping, hold.name)
        if process.poll() is not None:
            why = "; ".join(dump_args.errors_of(f"{hold.images}/dump.log")) or f"criu ended with {process.returncode}"
            raise FusecrError(f"dump of {hold.name}", why, "the source runs on")
        if time.monotonic() > deadline:
            raise FusecrError(f"dump of {hold.name}", "CRIU did not finish in time", "raise --timeout")


def _stop_criu(hold: Hold, process: subprocess.Popen[bytes]) -> None:
    """CRIU must be gone before the tasks may go on: it still traces them."""
    with hold.lock:
        hold.commit_wanted = False
        hold.phase = "aborted"
        hold.verdict.set()
    try:
        process.wait(5 if hold.reached.is_set() else 0.05)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.returncode < 0:
        hold._undo_network_lock()
    if hold.criufd is not None:
        hold.criufd.close()


def _watch(hold: Hold, process: subprocess.Popen[bytes]) -> None:
    process.wait()
    if not hold.verdict.is_set():
        log.error("%s: CRIU ended with %s while it held the dump", hold.name, process.returncode)
        with guarded(log, hold.name):
            hold.criu_died()


def start_time_of(pid: int) -> int:
    """0 if it is gone."""
    try:
        return proc.start_time(pid)
    except (FileNotFoundError, ProcessLookupError):
        return 0
