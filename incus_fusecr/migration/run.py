# SPDX-License-Identifier: Apache-2.0
"""The migration as its client drives it: pre-copy, held dump, final pass, start, go, commit.

Until ``go`` has been sent every failure ends with the source running on and the target cleaned. From then on the target's
agent, which took ``go`` or an abort first, decides; what could not be established is said with exit code 4.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ..errors import FusecrError, Interrupted, Refused, Uncertain
from ..incus.arrival import ABORTED, HOLDS_NOTHING, RUNNING, settle
from ..incus.ask import REQUEST_KEY, VERSION, AgentError, new_id
from ..incus.client import Server
from ..incus.config import Config
from ..incus.conversation import Beater, Conversation
from ..incus.copy import pull, transferred
from ..incus.deadline import Deadline
from ..incus.failures import NotDelivered, OperationFailed
from ..incus.mailbox import ProfileMailbox
from ..incus.names import lxc_name
from ..interrupt import Interrupts
from . import account, remains
from .model import MigrateRequest, Phase, Progress, Report
from .preflight import Findings, check_idmap, preflight

log = logging.getLogger(__name__)

GO_SECONDS = 30.0
ANSWER_SECONDS = 15.0
DOUBT_SECONDS = 60.0
# A second pass over the running container pays when the first one took long.
SLOW_PASS_SECONDS = 5.0
MAX_RUNNING_PASSES = 3
# Without news of the final copy for so long the link between the hosts is taken for lost.
STALL_SECONDS = 10.0
VANISH_ATTEMPTS = 5
# rsync(1): 24, a file vanished; 23, a part was not copied, as when a file had become a directory meanwhile.
VANISHED = ("exit status 23", "exit status 24")


def migrate(request: MigrateRequest, progress: Callable[[Progress], None]) -> Report:
    """Migrate, or plan to (``dry_run``).

    :raises FusecrError: with a ``report`` attribute of what was done, where it got so far
    """
    config = Config.load()
    report = Report(new_id(), request.source, request.target)
    began = time.monotonic()
    try:
        with (
            Interrupts() as interrupts,
            Server(config.endpoint(request.source_remote, request.project)) as source,
            Server(config.endpoint(request.target_remote, request.target_project or request.project)) as target,
        ):
            Migration(request, source, target, report, progress, interrupts).run()
    except (FusecrError, KeyboardInterrupt) as reason:
        error = reason if isinstance(reason, FusecrError) else Interrupted(f"migration of {request.source}", account.INTERRUPTED)
        report.error = error.to_dict()
        report.outcome = (
            "refused" if isinstance(error, Refused) else "uncertain" if isinstance(error, Uncertain) else "failed"
        )
        report.seconds = time.monotonic() - began
        error.report = report  # type: ignore[attr-defined]
        raise error from reason.__cause__
    report.seconds = time.monotonic() - began
    return report


class Migration:
    """One migration; its parts share the two servers, the conversations and the report."""

    def __init__(
        self,
        request: MigrateRequest,
        source: Server,
        target: Server,
        report: Report,
        progress: Callable[[Progress], None],
        interrupts: Interrupts,
    ) -> None:
        self.interrupts = interrupts
        self.request = request
        self.source = source
        self.target = target
        self.report = report
        self.progress = progress
        self.id = report.id
        self.name = request.instance
        self.target_name = request.target_name
        self.deadline = Deadline(request.timeout)
        self.began = time.monotonic()
        self.snapshot = f"fusecr-{self.id[:12]}"
        self.address = ""
        self.frozen = False
        self.in_doubt: list[str] = []
        self._gate: dict[str, Any] = {}
        self._ran_at = 0.0
        self._hold_seq = 0
        self.image_bytes = 0
        self.scan_seconds = 0.0
        self.found: Findings | None = None
        self.to_source = Conversation(source, self.name, self.id, mailbox=ProfileMailbox(self.id))
        self.to_target = Conversation(target, self.target_name, self.id, mailbox=ProfileMailbox(self.id))

    # The whole

    def run(self) -> None:
        """:raises FusecrError: see the module"""
        with self.phase("preflight"):
            self.found = preflight(
                self.source,
                self.target,
                self.name,
                self.target_name,
                pool=self.request.storage,
                profiles=list(self.request.profiles) if self.request.profiles is not None else None,
            )
        self.report.verdicts = self.found.verdicts
        self.report.carried = self.found.carried
        self.report.plan = account.plan(self.request, self.found, self.snapshot)
        refused = self.found.refused
        if refused:
            raise Refused(
                f"migration of {self.request.source} to {self.request.target}",
                "; ".join(f"{v.what}: {v.why}" for v in refused[:10]),
                "; ".join(dict.fromkeys(v.hint for v in refused[:10] if v.hint)),
            )
        if self.request.dry_run:
            return
        try:
            with ExitStack() as undo:
                try:
                    self._prepare(undo)
                    self._precopy(undo)
                    self._frozen(undo)
                    undo.pop_all()
                except BaseException:
                    self.interrupts.hold()  # what was begun is taken back to its end
                    raise
        except (FusecrError, KeyboardInterrupt) as error:
            raise account.meaning(error, self.in_doubt, self.request) from error
        self._after()
        if self.interrupts.noted:
            self.report.warnings.append("interrupted when it could not be taken back any more: it was finished")
        self.report.outcome = "done"

    # Before the freeze

    def _prepare(self, undo: ExitStack) -> None:
        """Bind the migration's id to both instances; only who may edit them can."""
        assert self.found is not None
        if self.found.remains is not None:
            with self.phase("clean the target"):
                remains.clear(self.target, self.target_name, self.found.remains)
        undo.callback(self._forget, self.source, self.name)
        self._bind(self.source, self.name)
        if self.found.driver in account.COPY_ON_WRITE:
            undo.callback(self.source.delete_snapshot, self.name, self.snapshot, remains.CLEAN_SECONDS)
            with self.phase("snapshot"):
                self.source.create_snapshot(self.name, self.snapshot, self.deadline)

    def _bind(self, server: Server, name: str) -> None:
        server.patch_instance_config(name, {REQUEST_KEY: self._bind_text("source", server, name)})

    def _bind_text(self, role: str, server: Server, name: str) -> str:
        """It names its instance, for a copy of that has a copy of the key."""
        place = {"project": server.project, "instance": name, remains.KEEP: self.request.keep_source}
        return json.dumps({"v": VERSION, "id": self.id, "seq": 0, "op": "bind", "role": role, **place})

    def _forget(self, server: Server, name: str) -> None:
        self.report.warnings += remains.forget(server, name, self.id)

    def _precopy(self, undo: ExitStack) -> None:
        undo.callback(self._clean_target)
        self.address = self._running_pass("precopy", refresh=False)
        check_idmap(self.source.require_instance(self.name), self.target.require_instance(self.target_name))
        for number in range(MAX_RUNNING_PASSES):
            before = time.monotonic()
            self._running_pass(f"refresh {number + 1}", refresh=True)
            self.scan_seconds = time.monotonic() - before
            if self.scan_seconds < SLOW_PASS_SECONDS:
                break
        self.to_target.send("expect", {"go_seconds": GO_SECONDS, "source": lxc_name(self.source.project, self.name)})
        self.to_target.wait(("expecting",), ANSWER_SECONDS)

    def _running_pass(self, phase: str, *, refresh: bool) -> str:
        """A pass while the container writes. Files that vanish while rsync reads them fail it (Incus takes rsync's exit codes
        23 and 24 for errors): a first pass is repeated then, at last with the container frozen by Incus for as long as it
        takes; a later one may fail, for the last one copies what stands still."""
        for _attempt in range(VANISH_ATTEMPTS - 1):
            try:
                return self._pass(phase, self.deadline, refresh=refresh)
            except OperationFailed as error:
                if not any(status in str(error) for status in VANISHED):
                    raise
                log.info("%s: files vanished while they were copied", phase)
            if refresh:
                return self.address
        self.report.warnings.append("its files came and went too fast: it was frozen during the first copy")
        began, self.frozen = time.monotonic(), True
        try:
            return self._pass(phase, self.deadline, refresh=refresh, consistent=True)
        finally:
            self.frozen = False
            self.report.frozen_parts["first copy"] = time.monotonic() - began

    def _pass(
        self, phase: str, deadline: Deadline, *, refresh: bool, consistent: bool = False, stall: float | None = None
    ) -> str:
        with self.phase(phase) as step:
            done = pull(
                self.source,
                self.target,
                self.name,
                self.target_name,
                deadline=deadline,
                stall=stall,
                refresh=refresh,
                stateful=True,
                snapshots=True,
                allow_inconsistent=not consistent,
                config_overrides={REQUEST_KEY: self._bind_text("target", self.target, self.target_name)},
                pool=self.request.storage,
                profiles=list(self.request.profiles) if self.request.profiles is not None else None,
                address=self.address,
                progress=lambda metadata: self._transferred(phase, metadata),
            )
            # Incus counts once a second. What took less has brought the images at least, once there are any.
            step[0] = done.bytes or self.image_bytes
        return done.address

    def _transferred(self, phase: str, metadata: Any) -> None:
        text = next((str(v) for k, v in dict(metadata).items() if k.endswith("_progress")), "")
        self.say(phase, text, transferred(text))

    # The freeze

    def _frozen(self, undo: ExitStack) -> None:
        """From the hold to the target's first instruction."""
        undo.callback(self._release_source)
        still = self.deadline.within(self.request.max_frozen)
        with self.phase("hold"):
            # Before the request: it counts as frozen when the agent may have begun.
            self._hold_seq = self.to_source.send(
                "hold",
                {
                    "seconds": max(5.0, still.left),
                    "target": {
                        "fingerprint": self.target.environment.get("certificate_fingerprint", ""),
                        "project": self.target.project,
                        "instance": self.target_name,
                        "keep_source": self.request.keep_source,
                    },
                },
            )
            with Beater(self.to_source), Beater(self.to_target):
                held = self.to_source.wait(("held",), still, first_sign=None)
            self.image_bytes = int(held.data.get("image_bytes") or 0)
        self.frozen = True
        held_at = time.monotonic()
        with Beater(self.to_source), Beater(self.to_target):
            # It takes what the pass before took to look through the files, and what the images take, which come at once.
            self._pass("final copy", still, refresh=True, stall=max(STALL_SECONDS, 3 * self.scan_seconds))
            with self.phase("start"):
                self.target.put_state(self.target_name, "start", still, stateful=True)
            with self.phase("commit"):
                self._commit(undo)
        ended = time.monotonic()
        account.frozen(self.report, held.data, self._gate, since_held=self._ran_at - held_at, ending=ended - self._ran_at)

    def _commit(self, undo: ExitStack) -> None:
        self.interrupts.hold()
        self.to_source.send("going")
        self.to_source.wait(("going",), ANSWER_SECONDS, first_sign=None)
        # From here on the target's agent decides, and no failure of ours may let the source go on unasked.
        ways_back = undo.pop_all()
        try:
            self.to_target.send("go")
            running = self.to_target.wait(("running",), ANSWER_SECONDS, first_sign=None)
            self._gate = dict(running.data)
        except NotDelivered:
            # Certainly not sent, by nobody else either: the source may go on.
            undo.callback(ways_back.close)
            raise
        except FusecrError as error:
            self._ask_what_became(error)
        # The target lives: whatever fails from here on, the source must end.
        self.frozen = False
        self._ran_at = time.monotonic()
        self._end_source()

    def _target_refused(self, error: FusecrError) -> None:
        """The target's agent says that it did not let the container run."""
        self._abort_source(target_aborted=True)
        self._clean_target()
        self._drop_bindings()
        raise error

    def _ask_what_became(self, error: FusecrError) -> None:
        """``go`` may have arrived, whatever its agent said: ask until the target answers.

        Returns if it runs; raises if not, or if nobody knows.
        """
        self.say("in doubt", str(error), 0)
        end = Deadline(DOUBT_SECONDS)
        while not end.passed:
            outcome = ""
            try:
                with self.target.clone() as server:
                    outcome = settle(server, self.target_name, self.id, self.to_target.seq + 1000)
            except FusecrError as failure:
                log.debug("%s", failure)
            if outcome == RUNNING:
                return
            if outcome == ABORTED:
                self._target_refused(FusecrError(f"migration of {self.request.source}", str(error), "the source runs on"))
            time.sleep(0.5)
        raise Uncertain(
            f"migration of {self.request.source} to {self.request.target}",
            f"the target was told to run and does not answer any more ({error})",
            "both agents settle it when they reach each other; look with: "
            f"incus list {self.target}:{self.target_name}; incus list {self.source}:{self.name}",
        ) from error

    def _end_source(self) -> None:
        try:
            self.to_source.send("commit")
            self.to_source.wait(("committed",), remains.CLEAN_SECONDS, first_sign=None)
        except FusecrError as error:
            # Its agent finds out by itself that the target runs.
            self.report.warnings.append(f"{self.request.source}: {error}; its agent ends it")

    # Ways back

    def _release_source(self) -> None:
        """Undo of the hold: the source goes on at once, whatever became of the target."""
        self._abort_source(target_aborted=True)

    def _abort_source(self, *, target_aborted: bool) -> None:
        with self.phase("release the source"):
            try:
                with self.source.clone() as server:
                    talk = Conversation(server, self.name, self.id, mailbox=ProfileMailbox(self.id))
                    talk.seq = self.to_source.seq + 1000
                    talk.send("abort", {"target_aborted": target_aborted})
                    talk.wait(("aborted",), ANSWER_SECONDS, first_sign=None)
            except FusecrError as error:
                # The lease of the hold ends without us.
                if not self._was_let_go(error):
                    self.in_doubt.append(f"{self.request.source} was not seen to go on: {error}")
        self.frozen = False

    def _was_let_go(self, error: FusecrError) -> bool:
        """Whether its agent has said so, though not as an answer: it has forgotten, or it was stopped and let it go before."""
        if isinstance(error, AgentError) and HOLDS_NOTHING in error.why:
            return True
        try:
            last = self.to_source.report()
        except FusecrError:
            return False
        failed = last is not None and last.seq == self._hold_seq and last.error is not None
        return failed or (last is not None and last.phase == ABORTED)

    def _clean_target(self) -> None:
        """Undo of the pre-copy: no remains on the target."""
        with self.phase("clean the target"):
            try:
                with self.target.clone() as server:
                    server.lost_seconds = 1.0
                    talk = Conversation(server, self.target_name, self.id, mailbox=ProfileMailbox(self.id))
                    talk.seq = self.to_target.seq + 2000
                    talk.send("abort")
                    try:
                        talk.wait(("aborted",), ANSWER_SECONDS)
                    except FusecrError as error:
                        log.debug("%s", error)
                    remains.remove(server, self.target_name, self.id)
                    ProfileMailbox(self.id).clear(server)
            except FusecrError as error:
                self.report.warnings.append(
                    f"{self.request.target} could not be cleaned: {error}; its agent does it when it can"
                )

    def _drop_bindings(self) -> None:
        self._forget(self.source, self.name)
        if self.found is not None and self.found.driver in account.COPY_ON_WRITE:
            self._try(lambda: self.source.delete_snapshot(self.name, self.snapshot, remains.CLEAN_SECONDS))

    # After the commit

    def _after(self) -> None:
        """The target runs. Failures here are warnings: they must not look like a failed migration."""
        with self.phase("finish"):
            self._try(self._wait_stopped)
            if self.request.keep_source:
                self._try(lambda: self._forget(self.source, self.name))
            else:
                self._try(lambda: self.source.delete_instance(self.name, remains.CLEAN_SECONDS))
            self._try(lambda: ProfileMailbox(self.id).clear(self.source))
            if self.found is not None and self.found.driver in account.COPY_ON_WRITE:
                self._try(lambda: self.target.delete_snapshot(self.target_name, self.snapshot, remains.CLEAN_SECONDS))
                if self.request.keep_source:
                    self._try(lambda: self.source.delete_snapshot(self.name, self.snapshot, remains.CLEAN_SECONDS))
            self._try(lambda: self._forget(self.target, self.target_name))
        try:
            status = (self.target.instance(self.target_name) or {}).get("status")
        except FusecrError as error:
            # Its agent has said that it runs.
            self.report.warnings.append(f"{self.request.target} was not looked at any more: {error}")
            return
        if status != "Running":
            raise Uncertain(
                f"{self.request.target}", f"is {status} after the migration", "look at its console log and at the agent's log"
            )

    def _try(self, step: Callable[[], object]) -> None:
        try:
            step()
        except FusecrError as error:
            self.report.warnings.append(str(error))

    def _wait_stopped(self) -> None:
        """Stopped shows early, then Running again while the stop hook holds its lock: the recorded power state tells."""
        end = Deadline(remains.CLEAN_SECONDS)
        while not end.passed:
            instance = self.source.instance(self.name)
            if instance is None:
                return
            power = (instance.get("config") or {}).get("volatile.last_state.power")
            if instance.get("status") == "Stopped" and power == "STOPPED":
                return
            time.sleep(0.05)
        raise FusecrError(f"end of {self.request.source}", "it does not stop", "its agent's log tells why")

    # Telling

    @contextmanager
    def phase(self, name: str) -> Iterator[list[int]]:
        """Time a phase; yields a cell for the bytes that it transferred."""
        began, frozen, step = time.monotonic(), self.frozen, [0]
        self.say(name, "", 0)
        try:
            yield step
        finally:
            self.report.phases.append(Phase(name, time.monotonic() - began, frozen or name == "hold", step[0]))

    def say(self, phase: str, text: str, transferred: int) -> None:
        self.progress(Progress(phase, text, self.frozen, transferred, time.monotonic() - self.began))
