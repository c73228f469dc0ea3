# SPDX-License-Identifier: Apache-2.0
"""Migrations whose id is bound to an instance here, and what their clients leave behind when they die."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from ..errors import FusecrError
from ..incus.ask import REPORT_KEY, REQUEST_KEY, read_object
from ..incus.client import Server
from ..incus.mailbox import ProfileMailbox
from ..incus.names import lxc_name
from ..linux import proc
from . import leftmount

log = logging.getLogger(__name__)

SNAPSHOT_PREFIX = "fusecr-"
SNAPSHOT_ID = 12
_SNAPSHOT = re.compile(rf"{SNAPSHOT_PREFIX}[0-9a-f]{{{SNAPSHOT_ID}}}")
DELETE_SECONDS = 30.0
STOP_SECONDS = 10.0
# Whoever may bind ids to one instance, or to those of one project, displaces none but his own.
MAX_PER_INSTANCE = 8
MAX_PER_PROJECT = 1000
# Role of an instance about which something was asked; who asked may have died before he took his keys away.
ASKED = "asked"
# Operations that a migration's client waits for (internal/server/db/operationtype).
OURS = ("Migrating", "Creating", "Copying", "Starting", "Transferring", "Snapshotting")
# What Incus shows for an instance that was never started.
NEVER = ("", "0001-01-01T00:00:00Z", "1970-01-01T00:00:00Z")


@dataclass
class Binding:
    """One end of a migration, or a question about an instance.

    :ivar role: ``source``, ``target``, or :data:`ASKED`
    :ivar uuid: of the instance, which a new one of the same name has not; empty where it may change
    :ivar touched: ``time.monotonic()`` of the client's last sign
    :ivar mark: seq and beat of that
    """

    migration: str
    role: str
    project: str
    instance: str
    uuid: str = ""
    touched: float = field(default_factory=time.monotonic)
    mark: tuple[int, int] = (0, 0)

    @property
    def place(self) -> tuple[str, str]:
        return self.project, self.instance


class Bindings:
    """All of this host.

    The newest of an instance counts at once: its client may already copy while a hold of the one before it, whose client
    died, is about to be given up. Older ones stay until what they left is removed, and one that something here
    still belongs to is never displaced.

    :param server: a connection to the local server, for a project
    :param live: whether a migration has something here: a hold, an expected or restored container
    :param dropped: called for each migration that is forgotten
    """

    def __init__(
        self,
        server: Callable[[str], Server],
        live: Callable[[str], bool] = lambda _migration: False,
        dropped: Callable[[str], None] = lambda _migration: None,
    ) -> None:
        self._server = server
        self._live = live
        self._dropped = dropped
        self._lock = threading.Lock()
        self._all: dict[str, Binding] = {}

    def bind(self, binding: Binding) -> None:
        """A key binds an id to an instance. The first one does: copies of an instance have its keys."""
        with self._lock:
            if self._all.setdefault(binding.migration, binding) is not binding:
                return
        self._trim(self._like(binding), MAX_PER_INSTANCE if binding.role != ASKED else 1)
        self._trim(self._of_project(binding.project), MAX_PER_PROJECT)

    def beat(self, migration: str, place: tuple[str, str], mark: tuple[int, int]) -> None:
        """A request was read. It is a sign of life only if it is newer than the last one, whatever made us read it.

        :param mark: seq and beat
        """
        with self._lock:
            known = self._all.get(migration)
            if known is not None and known.place == place and mark > known.mark:
                known.mark, known.touched = mark, time.monotonic()

    def touch(self, migration: str) -> None:
        """The client may count from now."""
        with self._lock:
            if migration in self._all:
                self._all[migration].touched = time.monotonic()

    def _like(self, binding: Binding) -> list[Binding]:
        """All of its instance, the oldest first; questions and migrations know nothing of each other."""
        same = [b for b in self._of_project(binding.project) if b.instance == binding.instance]
        return [b for b in same if (b.role == ASKED) == (binding.role == ASKED)]

    def _of_project(self, project: str) -> list[Binding]:
        with self._lock:
            return [b for b in self._all.values() if b.project == project]

    def _trim(self, same: list[Binding], most: int) -> None:
        """Forget the oldest ones; without the lock, for ``live`` takes those of others."""
        over = len(same) - most
        if over > 0:
            for binding in [b for b in same[:-1] if not self._live(b.migration)][:over]:
                self.forget(binding.migration)

    def idle(self, seconds: float) -> list[Binding]:
        """Those whose client has not been heard of for so long."""
        now = time.monotonic()
        with self._lock:
            return [b for b in self._all.values() if now - b.touched > seconds]

    def contended(self, binding: Binding, seconds: float) -> bool:
        """Whether the client of another migration of its instance was heard of in this time: it must not be disturbed."""
        now = time.monotonic()
        return any(b is not binding and now - b.touched <= seconds for b in self._like(binding))

    def last(self, migration: str) -> float | None:
        """When the client was last heard of."""
        with self._lock:
            found = self._all.get(migration)
            return found.touched if found else None

    def get(self, migration: str) -> Binding | None:
        with self._lock:
            return self._all.get(migration)

    def instance_of(self, migration: str) -> tuple[str, str] | None:
        """The instance that a migration's id is bound to: (project, name)."""
        found = self.get(migration)
        return found.place if found else None

    def exists(self, binding: Binding) -> bool:
        """Whether its instance is still there.

        :raises FusecrError: the local server does not answer
        """
        with self._server(binding.project) as server:
            return server.instance(binding.instance) is not None

    def end_second_life(self, binding: Binding) -> None:
        """Stop a source that is committed, and runs again.

        An incusd that is killed after its end, and before it has noted that, starts it anew when it comes up: a second one beside
        the one on the target (measured: 9 of 9 times when it dies 0.05 to 0.2 s later).

        :raises FusecrError: the local server does not answer, or does not stop it; try again
        """
        with self._server(binding.project) as server:
            instance = server.instance(binding.instance)
            if instance is None or instance.get("status") != "Running":
                return
            if bound_to(instance) != binding.migration or not _same(binding, instance):
                return
            # While the hook of the first one's end holds Incus' lock, that shows as running, too: with no process, or a dead one.
            pid = int(server.get(f"instances/{quote(binding.instance, safe='')}/state").get("pid") or 0)
            if pid <= 0 or proc.dying(pid):
                return
            log.warning("%s: Incus has started it again, and it runs on its target: it is stopped", binding.instance)
            server.put_state(binding.instance, "stop", STOP_SECONDS, force=True)

    def forget(self, migration: str) -> None:
        with self._lock:
            self._all.pop(migration, None)
        self._dropped(migration)

    def busy(self, binding: Binding) -> bool:
        """Whether an operation of the instance runs: during a pass the client has nothing to say."""
        with self._server(binding.project) as server:
            for operation in server.operations():
                paths = (operation.get("resources") or {}).get("instances") or []
                if not str(operation.get("description")).startswith(OURS):
                    continue  # a command or console in a frozen container lasts as long as that is frozen
                if operation.get("status") == "Running" and any(
                    str(path).split("?")[0].rsplit("/", 1)[-1] == binding.instance for path in paths
                ):
                    return True
        return False

    def clean(self, binding: Binding, *, delete: bool) -> None:
        """Remove what a dead client left: keys, mailbox, snapshots, and on a target the half-made instance.

        Snapshots also of migrations that nobody here knows: they came with the instance, or were displaced by a later one.

        :param delete: the target's container was never let run here, or the source's has gone to its target; even then the
            instance goes only if this migration is bound to it and it is stopped
        :raises FusecrError: something is in the way; try again
        """
        with self._server(binding.project) as server:
            instance = server.instance(binding.instance)
            mine = instance is not None and bound_to(instance) == binding.migration and _same(binding, instance)
            if mine and delete:
                assert instance is not None
                if instance.get("status") != "Stopped":
                    raise FusecrError(f"instance {binding.instance}", f"is {instance.get('status')}, not stopped")
                self._delete(server, binding)
                log.warning("%s: removed what was left of migration %s", binding.instance, binding.migration)
            elif instance is not None:
                for name in self._left_over(binding, instance, server.snapshots(binding.instance)):
                    server.delete_snapshot(binding.instance, name, DELETE_SECONDS)
                    log.warning("%s: removed the snapshot %s", binding.instance, name)
                if mine:
                    server.patch_instance_config(binding.instance, {REQUEST_KEY: "", REPORT_KEY: ""})
                    log.warning("%s: removed the keys of migration %s", binding.instance, binding.migration)
            ProfileMailbox(binding.migration).clear(server)
        self.forget(binding.migration)

    def free(self, binding: Binding) -> None:
        """Take away what an incusd that died in the middle left mounted; nothing while another one works there."""
        name = lxc_name(binding.project, binding.instance)
        if leftmount.there(name) and not self.busy(binding):
            leftmount.take_away(name)

    def _delete(self, server: Server, binding: Binding) -> None:
        try:
            server.delete_instance(binding.instance, DELETE_SECONDS)
        except FusecrError:
            if self.busy(binding) or not leftmount.take_away(lxc_name(binding.project, binding.instance)):
                raise
            server.delete_instance(binding.instance, DELETE_SECONDS)

    def take_question(self, binding: Binding) -> None:
        """The keys of a question whose asker died. :raises FusecrError: try again"""
        with self._server(binding.project) as server:
            instance = server.instance(binding.instance)
            if instance is not None and bound_to(instance) == binding.migration:
                server.patch_instance_config(binding.instance, {REQUEST_KEY: "", REPORT_KEY: ""})
                log.info("%s: removed the keys of question %s", binding.instance, binding.migration)
        self.forget(binding.migration)

    def _left_over(self, binding: Binding, instance: dict[str, Any], snapshots: list[str]) -> list[str]:
        """The snapshots of migrations of which none but this one, which is over, may still be under way."""
        with self._lock:
            others = {*self._all, bound_to(instance)} - {binding.migration}
        kept = {SNAPSHOT_PREFIX + migration[:SNAPSHOT_ID] for migration in others}
        return [name for name in snapshots if _SNAPSHOT.fullmatch(name) and name not in kept]

    def never_started(self, binding: Binding) -> bool:
        """Whether the instance of a target was never started: it holds nothing that is not on the source."""
        with self._server(binding.project) as server:
            instance = server.instance(binding.instance)
        return instance is None or str(instance.get("last_used_at", "?")) in NEVER


def _same(binding: Binding, instance: dict[str, Any]) -> bool:
    return binding.uuid in ("", (instance.get("config") or {}).get("volatile.uuid"))


def bound_to(instance: dict[str, Any]) -> str:
    """The migration that an instance's key names."""
    found = (read_object((instance.get("config") or {}).get(REQUEST_KEY)) or {}).get("id")
    return found if isinstance(found, str) else ""
