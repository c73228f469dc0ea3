# SPDX-License-Identifier: Apache-2.0
"""What would keep a migration from working, found before anything is touched. Reads; changes nothing but the
keys in which it asks the agents."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import FusecrError
from ..fuse.init import compare, parse_init_out, parse_request
from ..incus.client import Server
from ..incus.conversation import ask_instance
from ..incus.failures import Forbidden
from . import settings
from .facts import host_facts
from .findings import Findings
from .instance import require_running_container
from .model import Carried
from .place import Place
from .settings import version

__all__ = ["Findings", "check_idmap", "preflight"]

CHECK_SECONDS = 60.0


def preflight(
    source: Server, target: Server, name: str, target_name: str, *, pool: str, profiles: list[str] | None
) -> Findings:
    """Look at both sides.

    :raises UsageError: the instance does not exist
    :raises Refused: it is not a running container, or an agent does not answer
    """
    instance = require_running_container(source, name)
    found = Findings(instance)
    facts = _both(source, target, lambda server, side: _facts(server, side, found))
    _hosts(found, source, target, facts)
    answer = _container(found, source, name, facts.get("target") or {})
    Place(found, source, target, target_name, pool, profiles, answer).look()
    return found


def check_idmap(source_instance: Mapping[str, Any], target_instance: Mapping[str, Any]) -> None:
    """The dump brings the source's map of uids and gids; Incus makes the target's anew, and gives the files to that.

    To be called between the first copy, which makes the target, and the hold.

    :param source_instance: running, as its server shows it
    :param target_instance: as just made
    :raises FusecrError: they differ: the container would run without any right to its own files
    """
    here, there = (i.get("expanded_config") or i.get("config") or {} for i in (source_instance, target_instance))
    verdict = settings.same_map(here, there)
    if verdict is not None:
        raise FusecrError(verdict.what, verdict.why, verdict.hint)


def _both(source: Server, target: Server, ask: Callable[[Server, str], Any]) -> dict[str, Any]:
    """Ask both at once; the first error of either is raised (the target's first: it is the likelier one)."""
    answers: dict[str, Any] = {}
    errors: dict[str, FusecrError] = {}

    def run(side: str, server: Server) -> None:
        try:
            with server.clone() as own:
                answers[side] = ask(own, side)
        except FusecrError as error:
            errors[side] = error

    threads = [threading.Thread(target=run, args=pair) for pair in (("source", source), ("target", target))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for side in ("target", "source"):
        if side in errors:
            raise errors[side]
    return answers


def _facts(server: Server, side: str, found: Findings) -> dict[str, Any]:
    try:
        return host_facts(server)
    except Forbidden:
        found.warn(side, f"facts of {server}", "this client may not ask for them: versions and what is missing are not compared")
        return {}


def _hosts(found: Findings, source: Server, target: Server, facts: Mapping[str, Any]) -> None:
    ours, theirs = facts.get("source") or {}, facts.get("target") or {}
    for side, server, host in (("source", source, ours), ("target", target, theirs)):
        for missing in host.get("missing") or ():
            found.refuse(side, f"{missing.get('what')} on {server}", "is missing", str(missing.get("hint", "")))
    if not ours or not theirs:
        return
    if ours.get("version") != theirs.get("version"):
        found.refuse(
            "both",
            "incus-fusecr",
            f"is {ours.get('version')} on {source} and {theirs.get('version')} on {target}",
            "install the same version on both",
        )
    # Images of a CRIU are read by the same or a later one.
    if version(theirs.get("criu")) < version(ours.get("criu")):
        found.refuse(
            "both",
            "CRIU",
            f"is {ours.get('criu')} on {source} and {theirs.get('criu')} on {target}",
            "the target needs the same version or a later one",
        )
    if ours.get("machine") != theirs.get("machine"):
        found.refuse(
            "both",
            "machine",
            f"is {ours.get('machine')} on {source} and {theirs.get('machine')} on {target}",
            "processes cannot go to another architecture",
        )


def _container(found: Findings, source: Server, name: str, target_facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The container itself, as its host's agent sees it; the agent's answer."""
    with source.clone() as own:
        data = ask_instance(own, name, "check", deadline=CHECK_SECONDS, phases=("checked",)).data
    for verdict in data.get("verdicts") or ():
        found.refuse("source", str(verdict.get("what")), str(verdict.get("why")), str(verdict.get("hint")))
    for note in data.get("notes") or ():
        found.warn("source", str(note.get("what")), str(note.get("why")), str(note.get("hint")))
    for entry in data.get("connections") or ():
        found.carried.append(
            Carried(
                daemon=str(entry.get("daemon")),
                mountpoint=str(entry.get("mountpoint")),
                handles=int(entry.get("handles") or 0),
                nodes=int(entry.get("references") or 0),
            )
        )
    offered = (target_facts.get("fuse_init") or {}).get("request")
    if offered:
        request = parse_request(bytes.fromhex(offered))
        for number, reply in (data.get("init_replies") or {}).items():
            for reason in compare(parse_init_out(bytes.fromhex(reply)), request):
                found.refuse(
                    "target",
                    f"FUSE connection {number}",
                    reason,
                    "the target needs a kernel with at least the source's FUSE features",
                )
    return data
