# SPDX-License-Identifier: Apache-2.0
"""What became of a migration on its target, from what is there and from the agent that decided.

The target's agent writes the migration's id into the instance when it lets it run: proof that it runs. Nothing that is missing
proves that it does not: the instance may have been renamed, or have moved on. Only the agent's own record tells that
(agent/ledger.py), and nobody's else.
"""

from __future__ import annotations

from .ask import AgentError
from .client import Server
from .conversation import Conversation
from .deadline import Deadline
from .failures import NotFound
from .mailbox import ProfileMailbox

ARRIVED_KEY = "user.fusecr.arrived"
RUNNING = "running"
ABORTED = "aborted"
# What the agent says of a migration that it let run; part of its protocol.
RUNS_HERE = "it runs here already"
# What the agent of a source says when it has nothing to let go.
HOLDS_NOTHING = "holds nothing here"
ANSWER_SECONDS = 10.0


def seen(server: Server, name: str, migration: str) -> str:
    """``running`` if the instance says so; empty if it does not, or is not there: that tells nothing."""
    config = (server.instance(name) or {}).get("config") or {}
    return RUNNING if config.get(ARRIVED_KEY) == migration else ""


def settle(server: Server, name: str, migration: str, seq: int, deadline: Deadline | float = ANSWER_SECONDS) -> str:
    """Whether the target runs; if that is open, its agent is made to abort, and takes the first of ``go`` and this.

    :param seq: higher than that of any request before
    :returns: ``running``, ``aborted``, or empty if it cannot be told now
    :raises FusecrError: the server or the agent does not answer
    """
    found = seen(server, name, migration)
    if found:
        return found
    talk = Conversation(server, name, migration, mailbox=ProfileMailbox(migration))
    talk.seq = seq
    try:
        talk.send("abort")
        talk.wait((ABORTED,), deadline)
    except NotFound:
        return ""  # the mailbox went away meanwhile: that says nothing
    except AgentError as answer:
        if RUNS_HERE in answer.why:
            return RUNNING
        raise
    return ABORTED
