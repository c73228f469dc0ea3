# SPDX-License-Identifier: Apache-2.0
"""What an instance's configuration must say, here and as the target will have it. Decides; asks nobody."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from .model import Verdict

Config = Mapping[str, str]
Devices = Mapping[str, Mapping[str, str]]
# The last liblxc that cannot dump a container which it has restored (lxc commit f30cbb86f is the fix).
DUMPS_ONCE_UNTIL = (7, 0, 0)
_TRUE = ("true", "1", "yes", "on")


def is_true(value: object) -> bool:
    """As Incus reads a boolean of a configuration."""
    return str(value if value is not None else "").lower() in _TRUE


def version(text: object) -> tuple[int, ...]:
    """``6.0.4`` as numbers; what is none ends it."""
    return tuple(int(part) for part in str(text or "").split(".")[:3] if part.isdigit())


def expand(
    profiles: Iterable[Mapping[str, Any]], config: Config, devices: Devices
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """An instance's configuration and devices with those of its profiles below them, as Incus does it: the later
    profile wins, then the instance's own; a device is replaced as a whole, and one of the type ``none`` is no device.

    :param profiles: as the server has them, in the instance's order
    """
    all_config: dict[str, str] = {}
    all_devices: dict[str, dict[str, str]] = {}
    for profile in profiles:
        all_config.update(profile.get("config") or {})
        all_devices.update({name: dict(d) for name, d in (profile.get("devices") or {}).items()})
    all_config.update(config)
    all_devices.update({name: dict(device) for name, device in devices.items()})
    return all_config, {name: d for name, d in all_devices.items() if d.get("type") != "none"}


def root_disk(devices: Devices) -> Mapping[str, str] | None:
    """The device of the root file system."""
    return next(
        (d for d in devices.values() if d.get("type") == "disk" and d.get("path") == "/" and not d.get("source")), None
    )


def to_dump(config: Config, instance: str, *, side: str = "source", how: str = "") -> list[Verdict]:
    """What keeps Incus and CRIU from saving and continuing the running state.

    :param instance: ``REMOTE:NAME``
    :param how: what to do about it, instead of adding the profile to the instance
    """
    hint = how or f"incus profile add {instance} fusecr, then restart the instance once"
    found = []
    if not is_true(config.get("migration.stateful")):
        found.append(Verdict("refuse", side, "migration.stateful", "is not true", hint))
    if "lxc.console.path=none" not in ["".join(line.split()) for line in str(config.get("raw.lxc", "")).splitlines()]:
        why = "does not have lxc.console.path=none: a restore has no console to give back"
        found.append(Verdict("refuse", side, "raw.lxc", why, hint))
    return found


def to_migrate(config: Config, instance: str, *, side: str = "source", how: str = "") -> list[Verdict]:
    """What keeps an instance from going to another server: :func:`to_dump`, and what spoils the change-over.

    :param how: as there; also how to unset a key, instead of on the instance
    """
    found = to_dump(config, instance, side=side, how=how)
    if is_true(config.get("boot.autorestart")):
        why = (
            "would start the source again when it has gone to the target"
            if side == "source"
            else "would start the target again when a migration that failed at its end takes it back"
        )
        hint = how or f"incus config set {instance} boot.autorestart=false"
        found.append(Verdict("refuse", side, "boot.autorestart", why, hint))
    if is_true(config.get("security.protection.delete")):
        why = "keeps the source from being deleted at the end, and the target when the migration fails"
        hint = how or f"for the time: incus config set {instance} security.protection.delete=false"
        found.append(Verdict("refuse", side, "security.protection.delete", why, hint))
    return found


def restored_once(environment: Mapping[str, Any], instance: str) -> Verdict | None:
    """Against a dump by Incus of a container that was restored; of the held dump of a migration this is not true.

    :param environment: of the server
    """
    liblxc = version(environment.get("driver_version"))
    if not liblxc or liblxc > DUMPS_ONCE_UNTIL:
        return None
    return Verdict(
        "refuse",
        "source",
        f"checkpoint of {instance}",
        f"it was restored or migrated, and liblxc {environment.get('driver_version')} saves no such container again",
        f"restart it before (incus restart {instance}), or move it with incus-fusecr migrate, which can",
    )


def idmapped(environment: Mapping[str, Any], config: Config, host: str) -> Verdict | None:
    """Against unprivileged containers on a host whose Incus mounts root file systems idmapped.

    :param config: of the instance; empty for any
    """
    features = environment.get("kernel_features")
    on = isinstance(features, Mapping) and is_true(features.get("idmapped_mounts"))
    if not on or is_true(config.get("security.privileged")):
        return None
    return Verdict(
        "refuse",
        "target",
        f"incusd of {host}",
        "uses idmapped mounts, which a restore does not make again: the files of an unprivileged container would belong to nobody",
        "set INCUS_IDMAPPED_MOUNTS_DISABLE=1 in its environment (packaging/systemd/incus.service.d/fusecr.conf) and restart it",
    )


def same_map(here: Config, there: Config) -> Verdict | None:
    """Whether the dump's uids and gids are those that the target's Incus gives the instance.

    :param here: the running source's configuration
    :param there: the target's, as its Incus has just made it
    """
    if is_true(here.get("security.privileged")) and is_true(there.get("security.privileged")):
        return None
    ours, theirs = _map(here.get("volatile.idmap.current")), _map(there.get("volatile.idmap.next"))
    if ours == theirs and ours:
        return None
    base = here.get("volatile.idmap.base") or "BASE"
    hint = (
        f"give it a range that is free on both hosts, e.g. security.idmap.base={base}, and restart it once"
        if is_true(here.get("security.idmap.isolated"))
        else "make the ranges of root in /etc/subuid and /etc/subgid the same on both hosts, and restart incusd there"
    )
    why = f"is {_ranges(ours)} on the source and would be {_ranges(theirs)} on the target; a restore brings the source's"
    return Verdict("refuse", "target", "map of uids and gids", why, hint)


def _map(text: str | None) -> list[tuple[bool, int, int, int]]:
    """A ``volatile.idmap.*``: (whether of gids, id inside, outside, count), sorted; empty if there is none that can be read."""
    found = []
    try:
        for entry in json.loads(text or "[]"):
            numbers = (int(entry["Nsid"]), int(entry["Hostid"]), int(entry["Maprange"]))
            found += [(gids, *numbers) for gids, there in ((False, entry["Isuid"]), (True, entry["Isgid"])) if there]
    except (ValueError, KeyError, TypeError):
        return []
    return sorted(found)


def _ranges(entries: list[tuple[bool, int, int, int]]) -> str:
    """In short, uids and gids for what they differ in: ``0:1065536+65536``."""
    uids, gids = (" ".join(f"{e[1]}:{e[2]}+{e[3]}" for e in entries if e[0] is which) for which in (False, True))
    return f"{uids} (gids {gids})" if uids != gids else uids or "unknown"


def privileges(here: Config, there: Config, how: str) -> Verdict | None:
    """The image's user namespace, or none, must be what the target's Incus expects."""
    ours, theirs = (is_true(c.get("security.privileged")) for c in (here, there))
    if ours == theirs:
        return None
    words = {True: "privileged", False: "unprivileged"}
    why = f"the instance is {words[ours]} and would be {words[theirs]} on the target"
    return Verdict("refuse", "target", "security.privileged", why, how)
