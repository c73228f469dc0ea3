# SPDX-License-Identifier: Apache-2.0
"""What a migration leaves on a server when it is over, and how it goes away."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import FusecrError
from ..incus.arrival import ABORTED, ARRIVED_KEY, RUNNING, settle
from ..incus.ask import REQUEST_KEY, read_object
from ..incus.client import Server
from ..incus.conversation import Conversation
from ..incus.deadline import Deadline
from ..incus.failures import NotFound
from ..incus.mailbox import ProfileMailbox

CLEAN_SECONDS = 60.0
COMMIT_SECONDS = 20.0
# Higher than any number that a migration gives its requests.
LAST_SEQ = 1_000_000
# In a source's binding: it is to stay, stopped, when it has gone.
KEEP = "keep"


@dataclass(frozen=True)
class Remains:
    """An instance that an earlier migration of the same one left on the other side, since its client died.

    :ivar verdict: what its agent has to be told first, for it would wait for a sign of the client: ``abort``, ``commit`` or nothing
    """

    migration: str
    verdict: str = ""


def left(instance: Mapping[str, Any], taken: Mapping[str, Any]) -> Remains | None:
    """What an instance on the target is, if it is nobody's.

    :param instance: the one that is to go there
    :param taken: the one that has its name there
    """
    mine, theirs = instance.get("config") or {}, taken.get("config") or {}
    bound = read_object(theirs.get(REQUEST_KEY)) or {}
    migration, role = bound.get("id"), bound.get("role")
    if not isinstance(migration, str) or not mine.get("volatile.uuid") or theirs.get("volatile.uuid") != mine["volatile.uuid"]:
        return None
    if role == "target":
        return Remains(migration, "abort")
    if role == "source" and mine.get(ARRIVED_KEY) == migration and not bound.get(KEEP):
        # It came from there.
        return Remains(migration, "" if taken.get("status") == "Stopped" else "commit")
    return None


def clear(server: Server, name: str, remains: Remains) -> None:
    """Delete them.

    :raises FusecrError: they turn out to be somebody's, or could not be deleted
    """
    if remains.verdict == "abort":
        outcome = settle(server, name, remains.migration, LAST_SEQ)
        if outcome != ABORTED:
            known = {RUNNING: "an earlier migration let it run"}
            why = known.get(outcome, "what became of an earlier migration is not known yet")
            raise FusecrError(f"{server}:{name} exists already", why, f"look with: incus list {server}:{name}")
    elif remains.verdict == "commit":
        talk = Conversation(server, name, remains.migration, mailbox=ProfileMailbox(remains.migration))
        talk.seq = LAST_SEQ
        talk.send("commit")
        talk.wait(("committed",), COMMIT_SECONDS)
    remove(server, name, remains.migration)
    ProfileMailbox(remains.migration).clear(server)


def forget(server: Server, name: str, migration: str) -> list[str]:
    """Take a migration's keys off an instance, and its mailbox away.

    :returns: warnings of what stays
    """
    steps: list[Callable[[], None]] = [
        lambda: server.patch_instance_config(name, {REQUEST_KEY: "", ARRIVED_KEY: ""}),
        lambda: ProfileMailbox(migration).clear(server),
    ]
    warnings = []
    for step in steps:
        try:
            step()
        except NotFound:
            continue
        except FusecrError as error:
            warnings.append(f"keys of migration {migration} stay on {server}:{name}: {error}")
    return warnings


def remove(server: Server, name: str, migration: str) -> None:
    """Delete an instance if it is the one of this migration.

    :raises FusecrError: it could not be deleted
    """
    end = Deadline(CLEAN_SECONDS)
    while True:
        instance = server.instance(name)
        if instance is None:
            return
        bound = (read_object((instance.get("config") or {}).get(REQUEST_KEY)) or {}).get("id")
        if bound != migration:
            return
        try:
            if instance.get("status") != "Stopped":
                server.put_state(name, "stop", 10.0, force=True)
            server.delete_instance(name, end)
            return
        except FusecrError:
            if end.passed:
                raise
            time.sleep(0.3)
