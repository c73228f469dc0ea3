# SPDX-License-Identifier: Apache-2.0
"""One pass of an instance from server to server: the pull copy of ``incus copy``, with the deadline and the
choices that a pre-copy of a running container and its later refreshes need.

The client talks to both servers and may itself be neither of them; the data goes from the source's listener
to the target.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import FusecrError, UsageError
from .client import BUSY_SECONDS, Json, Progress, Server, unless_busy
from .deadline import Deadline
from .failures import ApiError, OperationBusy, OperationFailed, OutcomeUnknown, is_busy

OWN_KEYS = "user.fusecr."
# What `incus move` leaves out (cmd/incus/copy.go): every other volatile key travels, so that addresses stay.
_LEFT_BEHIND = frozenset({"volatile.last_state.power"})
SOURCE_SECONDS = 30.0  # in which the source's operation ends after the target's
CLEAN_SECONDS = 30.0
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_PROGRESS = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([kMGTPE]?B) \(")
# Texts of Go's net package in the target's answer: the source was not reached under this address.
_UNREACHED = (
    "dial tcp",
    "connection refused",
    "no route to host",
    "network is unreachable",
    "i/o timeout",
    "no such host",
    "unable to connect",
    "deadline exceeded",
)


@dataclass(frozen=True)
class Pass:
    """A finished copy.

    :ivar seconds: from the offer to the end of the target's operation
    :ivar address: the source's URL that the target could reach; give it to the next pass
    :ivar bytes: what the target received, to three digits as Incus says it; 0 if it took less than a second
    """

    seconds: float
    address: str
    bytes: int


def travelling_config(
    config: Mapping[str, str], overrides: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The instance's own configuration as the target gets it: without this program's requests and reports.

    :param overrides: added at the end; an empty value takes a key out
    """
    kept = {k: v for k, v in config.items() if k not in _LEFT_BEHIND and not k.startswith(OWN_KEYS)}
    kept.update(overrides or {})
    return {k: v for k, v in kept.items() if v != ""}


def devices_in_pool(instance: Json, pool: str) -> dict[str, dict[str, str]]:
    """The instance's own devices, with its root disk in another pool.

    :raises UsageError: it has no root disk
    """
    devices = {name: dict(device) for name, device in (instance.get("devices") or {}).items()}
    if not pool:
        return devices
    for name, device in (instance.get("expanded_devices") or {}).items():
        if device.get("type") == "disk" and device.get("path") == "/" and not device.get("source"):
            devices[name] = {**device, "pool": pool}
            return devices
    raise UsageError(f'cannot place {instance.get("name")} in the pool "{pool}"', "it has no root disk")


def transferred(text: str) -> int:
    """Bytes in an operation's ``fs_progress``, as in ``web: 45.77MB (45.76MB/s)``; 0 if it holds none."""
    found = _PROGRESS.search(text)
    return round(float(found[1]) * 1000 ** _UNITS.index(found[2])) if found else 0


def pull(
    source: Server,
    target: Server,
    name: str,
    target_name: str,
    *,
    deadline: Deadline | float,
    stall: float | None = None,
    refresh: bool = False,
    stateful: bool = True,
    snapshots: bool = False,
    allow_inconsistent: bool = True,
    config_overrides: Mapping[str, str] | None = None,
    pool: str = "",
    profiles: list[str] | None = None,
    address: str = "",
    instance: Json | None = None,
    progress: Progress | None = None,
) -> Pass:
    """Copy ``name`` of ``source`` to ``target_name`` of ``target`` and wait for it.

    The running state does not travel by itself (``live`` is false): a dump in the instance's ``state``
    directory does, being part of the volume, and ``stateful`` in the first pass is what lets the target start
    from it; Incus ignores it in a refresh and in any later PUT.

    :param stall: give up after so many seconds without news of its progress; None to wait for the deadline
    :param refresh: the target exists already; send only what differs
    :param snapshots: send snapshots too; with a common one, btrfs and zfs send only the difference
    :param allow_inconsistent: without it Incus freezes a running source while it copies
    :param config_overrides: keys to set on the target, empty ones to leave out; only a first pass heeds them
    :param pool: storage pool for the root disk on the target
    :param profiles: instead of the source's
    :param address: the source's URL of an earlier pass; without it all are tried
    :param instance: the source as just read, to save a request
    :param progress: called with the operation's metadata, e.g. ``{"fs_progress": "..."}``
    :raises OperationFailed, ApiError: a server refused or failed; a half-made target is gone
    :raises OutcomeUnknown: a connection ended, or the deadline passed; both operations were asked to stop
    """
    end = Deadline.of(deadline)
    began = time.monotonic()
    found = instance if instance is not None else source.require_instance(name)
    certificate = str(source.environment.get("certificate") or "")
    urls = [address] if address else source.addresses()
    if not urls:
        raise FusecrError(
            f"copy of {source}:{name} to {target}",
            f"{source} does not listen on the network",
            f"on it: incus config set core.https_address :8443; other servers pull from {source} through it",
        )
    options = {"live": False, "instance_only": not snapshots, "allow_inconsistent": allow_inconsistent}
    body: dict[str, Any] = {
        "name": target_name,
        "architecture": found.get("architecture", ""),
        "type": found.get("type", "container"),
        "config": travelling_config(found.get("config") or {}, config_overrides),
        "devices": devices_in_pool(found, pool),
        "profiles": profiles if profiles is not None else found.get("profiles"),
        "ephemeral": bool(found.get("ephemeral")),
        "description": found.get("description", ""),
        "stateful": stateful,
        "source": {
            "type": "migration",
            "mode": "pull",
            "certificate": certificate,
            "base-image": (found.get("config") or {}).get("volatile.base_image", ""),
            "refresh": refresh,
            **options,
        },
    }
    # A change of either instance's configuration, 10 ms long, keeps a pass from beginning; nothing was sent.
    received = 0

    def listen(metadata: Json) -> None:
        nonlocal received
        received = transferred(str(metadata.get("fs_progress") or "")) or received
        if progress:
            progress(metadata)

    used = unless_busy(
        lambda: _offer_and_pull(source, target, name, body, options, urls, end, listen, stall),
        end.within(BUSY_SECONDS),
    )
    return Pass(time.monotonic() - began, used, received)


def _offer_and_pull(
    source: Server,
    target: Server,
    name: str,
    body: dict[str, Any],
    options: Json,
    urls: list[str],
    end: Deadline,
    progress: Progress,
    stall: float | None,
) -> str:
    offer = source.post(f"instances/{name}", {"name": name, "migration": True, **options})
    secrets = offer.metadata.get("metadata") if isinstance(offer.metadata, dict) else None
    if not offer.operation or not isinstance(secrets, dict):
        raise ApiError(f"copy of {source}:{name}", "the source offered no migration")
    body["source"]["secrets"] = secrets
    what = f"copy of {source}:{name} to {target}"
    try:
        url = _first_that_works(target, body, urls, offer.operation, end, progress, stall)
    except BaseException as e:
        text = _source_says(source, offer.operation)
        source.cancel_operation(offer.operation)
        if isinstance(e, OperationFailed) and text and text not in e.why:
            kind = OperationBusy if is_busy(text) else type(e)
            raise kind(what, f"{e.why}; {source} says: {text}") from e
        raise
    try:
        source.wait_operation(offer.operation, end.within(SOURCE_SECONDS), what=what)
    except OperationFailed:
        # A target calls a transfer a success that has failed this very moment: it looks for an error before that is noted
        # (MigrateReceive() in driver_lxc.go: fsTransferDone is closed ahead of the error group's context). What it has received is
        # incomplete, or gone already.
        if not body["source"]["refresh"]:
            with contextlib.suppress(FusecrError):  # what failed before is what has to be said
                target.delete_instance(body["name"], CLEAN_SECONDS)
        raise
    return url


def _first_that_works(
    target: Server,
    body: dict[str, Any],
    urls: list[str],
    operation: str,
    end: Deadline,
    progress: Progress,
    stall: float | None,
) -> str:
    tried = []
    for url in urls:
        body["source"]["operation"] = f"{url}/1.0/operations/{operation}"
        pulling = ""
        try:
            pulling = target.post("instances", body).operation
            target.wait_operation(pulling, end, progress, what="copy", stall=stall)
            return url
        except OperationFailed as e:
            if not any(text in e.why.lower() for text in _UNREACHED):
                raise
            tried.append(f"{url}: {e.why}")
        except (OutcomeUnknown, KeyboardInterrupt):
            if pulling:
                target.cancel_operation(pulling)
            raise
    raise OperationFailed(
        f"copy to {target}",
        "the source was not reached under any of its addresses: " + "; ".join(tried),
        "the target must reach the source's core.https_address",
    )


def _source_says(source: Server, operation: str) -> str:
    """The source's own reason for a failed copy, which tends to say more than the target's."""
    try:
        found = source.operation(operation)
    except FusecrError:
        return ""
    return str(found.get("err") or "") if found else ""
