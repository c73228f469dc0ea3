# SPDX-License-Identifier: Apache-2.0
"""What a migration is asked to do, what it says on the way, and what it reports at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

REPORT_VERSION = 1


@dataclass(frozen=True)
class MigrateRequest:
    """A migration as the command line asks for it.

    :ivar source_remote: the remote that has the instance
    :ivar instance: its name there
    :ivar target_remote: the remote it goes to
    :ivar target_name: its name there
    :ivar project: of the source; ``""`` for what the client's configuration says
    :ivar target_project: of the target; ``""`` for the source's
    :ivar timeout: seconds for the whole migration
    :ivar max_frozen: seconds that the container may stand still before it is let go on where it was
    :ivar dry_run: preflight only; the report holds the plan and the verdicts
    :ivar keep_source: leave the source there, stopped, instead of deleting it after the commit
    :ivar storage: pool of the root disk on the target; ``""`` for the one that its devices name
    :ivar profiles: instead of the source's profiles; None to keep them
    """

    source_remote: str
    instance: str
    target_remote: str
    target_name: str
    project: str = ""
    target_project: str = ""
    timeout: float = 600.0
    max_frozen: float = 60.0
    dry_run: bool = False
    keep_source: bool = False
    storage: str = ""
    profiles: tuple[str, ...] | None = None

    @property
    def source(self) -> str:
        return f"{self.source_remote}:{self.instance}"

    @property
    def target(self) -> str:
        return f"{self.target_remote}:{self.target_name}"


@dataclass(frozen=True)
class Progress:
    """One step on the way.

    :ivar phase: the name of the phase, e.g. ``precopy``
    :ivar text: for people, e.g. ``45.77MB (45.76MB/s)``
    :ivar frozen: whether the container stands still
    :ivar bytes: received by the target in this phase so far
    :ivar seconds: since the migration began
    """

    phase: str
    text: str = ""
    frozen: bool = False
    bytes: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "type": "progress",
            "phase": self.phase,
            "text": self.text,
            "frozen": self.frozen,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Phase:
    """One phase that is over.

    :ivar frozen: whether the container stood still in it
    """

    name: str
    seconds: float
    frozen: bool = False
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "seconds": round(self.seconds, 3),
            "frozen": self.frozen,
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class Carried:
    """What went along for one FUSE connection, as the agent reports it.

    :ivar daemon: the process name of its daemon
    :ivar handles: open files and directories of its clients
    :ivar nodes: files and directories that the kernel held by number: those, working directories, mappings
    """

    daemon: str
    mountpoint: str
    handles: int
    nodes: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "daemon": self.daemon,
            "mountpoint": self.mountpoint,
            "handles": self.handles,
            "nodes": self.nodes,
        }


@dataclass(frozen=True)
class Verdict:
    """One finding of the preflight.

    :ivar level: ``ok``, ``warn`` or ``refuse``
    :ivar where: ``source``, ``target`` or ``both``
    """

    level: str
    where: str
    what: str
    why: str = ""
    hint: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "where": self.where,
            "what": self.what,
            "why": self.why,
            "hint": self.hint,
        }


@dataclass
class Report:
    """A migration, or with ``dry_run`` its plan. Filled in as it goes, so a failed one has its part.

    :ivar id: of the migration; agents and journals carry it too
    :ivar outcome: ``done``, ``failed``, ``refused``, ``uncertain`` or ``planned``
    :ivar frozen_seconds: between the last instruction on the source and the first one on the target
    :ivar frozen_parts: name of a part of that time -> seconds
    :ivar plan: the steps, in words
    """

    id: str
    source: str
    target: str
    outcome: str = "planned"
    seconds: float = 0.0
    frozen_seconds: float = 0.0
    frozen_parts: dict[str, float] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    carried: list[Carried] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    plan: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: dict[str, str] | None = None

    @property
    def bytes(self) -> int:
        """Received by the target in all phases."""
        return sum(phase.bytes for phase in self.phases)

    @property
    def handles(self) -> int:
        """Carried in all, over all daemons."""
        return sum(daemon.handles for daemon in self.carried)

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": REPORT_VERSION,
            "type": "report",
            "id": self.id,
            "source": self.source,
            "target": self.target,
            "outcome": self.outcome,
            "seconds": round(self.seconds, 3),
            "frozen_seconds": round(self.frozen_seconds, 3),
            "frozen_parts": {name: round(seconds, 3) for name, seconds in self.frozen_parts.items()},
            "bytes": self.bytes,
            "handles": self.handles,
            "phases": [phase.to_dict() for phase in self.phases],
            "carried": [daemon.to_dict() for daemon in self.carried],
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
            "plan": list(self.plan),
            "warnings": list(self.warnings),
            "error": self.error,
        }
