# SPDX-License-Identifier: Apache-2.0
"""The preflight of the target's Incus: the name, and the instance as it would be there. Reads only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from ..errors import FusecrError
from ..incus.client import Server
from ..incus.copy import devices_in_pool, travelling_config
from ..incus.failures import Forbidden, NotFound
from . import remains, room, settings
from .findings import Findings

# The first release after the fix of the name that a restore gives to liblxc.
PROJECTS_SINCE = (7, 3)
STATE_SECONDS = 8.0
# Storage drivers and file systems whose contents are the same on every host that has them.
SHARED_DRIVERS = ("ceph", "cephfs", "linstor", "lvmcluster")
SHARED_SYSTEMS = ("9p", "afs", "beegfs", "ceph", "cifs", "gfs2", "lustre", "nfs", "nfs4", "ocfs2", "smb3", "virtiofs")
BRIDGES = ("bridged", "bridge")


@dataclass
class Place:
    """Where an instance is and where it is to go.

    :ivar answer: of the source's agent about the container
    """

    found: Findings
    source: Server
    target: Server
    target_name: str
    pool: str = ""
    profiles: list[str] | None = None
    answer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def here(self) -> tuple[Mapping[str, str], Mapping[str, Mapping[str, str]]]:
        """Configuration and devices of the instance as it is, expanded."""
        instance = self.found.instance
        return instance.get("expanded_config") or {}, instance.get("expanded_devices") or {}

    def look(self) -> None:
        """Everything."""
        self._server()
        self._name()
        root = settings.root_disk(self.here[1])
        if root is None:
            self.found.refuse("source", "root disk", "the instance has none", "add one")
            return
        there = self._expanded()
        if there is None:
            return
        config, devices = there
        self._config(config)
        self._nics(config, devices)
        self._disks(devices)
        self._pools(root, settings.root_disk(devices))

    # The servers

    def _server(self) -> None:
        if not self.source.addresses():
            self.found.refuse(
                "source",
                f"core.https_address of {self.source}",
                f"is not set: {self.target} could not fetch the instance from there",
                "on it: incus config set core.https_address :8443",
            )
        incus = str(self.target.environment.get("server_version", ""))
        if self.target.project != "default" and settings.version(incus) < PROJECTS_SINCE:
            self.found.refuse(
                "target",
                f"project {self.target.project} of {self.target}",
                f"Incus {incus} restores no running container into another project than default (lxc/incus pull request 3692)",
                "migrate with --target-project default, or upgrade Incus there",
            )
        self.found.add(settings.idmapped(self.target.environment, self.here[0], str(self.target)))

    def _name(self) -> None:
        taken = self.target.instance(self.target_name)
        if taken is None:
            return
        key = "certificate_fingerprint"
        if self.source.environment.get(key) != self.target.environment.get(key):
            self.found.remains = remains.left(self.found.instance, taken)
        if self.found.remains is not None:
            return
        what = f"{self.target}:{self.target_name}"
        hint = f"choose another name ({self.target}:NAME), or delete it there"
        self.found.refuse("target", what, "exists already", hint)

    # The instance as it would be

    def _expanded(self) -> tuple[dict[str, str], dict[str, dict[str, str]]] | None:
        """Configuration and devices with the target's profiles; None if they cannot be known."""
        instance, profiles = self.found.instance, []
        names = self.profiles if self.profiles is not None else instance.get("profiles") or ()
        for name in names:
            profile = self._get(self.target, f"profiles/{quote(str(name), safe='')}", f"profile {name}")
            if profile is None:
                hint = f"incus profile copy {self.source}:{name} {self.target}:"
                self.found.refuse("target", f"profile {name}", "does not exist there", hint)
            profiles.append(profile)
        if not all(profiles):
            return None
        own = travelling_config(instance.get("config") or {})
        return settings.expand([p for p in profiles if p], own, devices_in_pool(instance, self.pool))

    def _config(self, config: Mapping[str, str]) -> None:
        here = self.here[0]
        ours = settings.to_migrate(here, f"{self.source}:{self.found.instance.get('name')}")
        self.found.extend(ours)
        names = self.profiles if self.profiles is not None else self.found.instance.get("profiles") or ()
        how = f"change the profiles on {self.target} ({', '.join(names) or 'none'}), or choose others with --profile"
        known = {verdict.what for verdict in ours}
        theirs = settings.to_migrate(config, f"{self.target}:{self.target_name}", side="target", how=how)
        self.found.extend(v for v in theirs if v.what not in known)
        self.found.add(settings.privileges(here, config, how))
        if (
            not settings.is_true(here.get("security.privileged"))
            and settings.is_true(config.get("security.idmap.isolated"))
            and not config.get("security.idmap.base")
        ):
            self.found.warn(
                "target",
                "map of uids and gids",
                f"security.idmap.isolated is set: {self.target} chooses a range when the copy is made; if it is not the one "
                "here, the migration ends there and the source runs on",
                "security.idmap.base fixes a range that is free on both hosts",
            )

    # Devices

    def _nics(self, config: Mapping[str, str], devices: Mapping[str, Mapping[str, str]]) -> None:
        ours, theirs = _nics_inside(*self.here), _nics_inside(config, devices)
        for inside in sorted(set(ours) | set(theirs)):
            if inside not in theirs or inside not in ours:
                side, other = ("source", "target") if inside in ours else ("target", "source")
                why = f"is {'here' if side == 'source' else 'there'} and not on the {other}: a restore needs the same devices"
                hint = "give the profiles there the same device, or the instance itself"
                self.found.refuse("target", f"network device {inside}", why, hint)
        for name, device in sorted(devices.items()):
            if device.get("type") == "nic":
                self._nic(name, device)

    def _nic(self, name: str, device: Mapping[str, str]) -> None:
        managed = device.get("network")
        network = managed or (device.get("parent") if device.get("nictype") == "bridged" else "")
        kind = str(device.get("nictype") or "")
        if network:
            what = f"network {network} (device {name})"
            seen = self._get(self.target, f"networks/{quote(network, safe='')}", what)
            if seen is None:
                hint = "create it there" if managed else "create that bridge on the host, or change the device"
                self.found.refuse("target", what, "does not exist there", hint)
                return
            if not seen:
                return
            kind = kind or str(seen.get("type") or "")
        if kind not in BRIDGES:
            why = f"would be of the kind {kind or 'none'} there, and only bridged ones keep their connections"
            self.found.refuse("target", f"network device {name}", why, "use a bridge there, e.g. with --profile")

    def _disks(self, devices: Mapping[str, Mapping[str, str]]) -> None:
        """Incus copies the root disk alone. What else is mounted is another thing on the other host, and nobody says so."""
        systems = self.answer.get("disks") or {}
        for name, device in sorted(devices.items()):
            source = str(device.get("source") or "")
            if device.get("type") != "disk" or not source or device.get("path") == "/":
                continue
            read_only = settings.is_true(device.get("readonly"))
            if device.get("pool"):
                self._volume(name, str(device["pool"]), source.split("/")[0], read_only)
            elif source.startswith("/"):
                system = str(systems.get(name) or "")
                shared = system in SHARED_SYSTEMS or system.startswith("fuse.")
                self._contents(name, f"{source} is on {system}" if shared else "it is read-only" if read_only else "")

    def _volume(self, name: str, pool: str, volume: str, read_only: bool) -> None:
        what = f"storage volume {volume} in pool {pool} (device {name})"
        path = f"storage-pools/{quote(pool, safe='')}"
        there = self._get(self.target, f"{path}/volumes/custom/{quote(volume, safe='')}", what)
        if there is None:
            hint = f"take it out for the time (incus config device remove), or make it there, with its contents: {volume}"
            self.found.refuse("target", what, "does not exist there", hint)
            return
        driver = str((self._get(self.target, path, what) or {}).get("driver") or "")
        if driver not in SHARED_DRIVERS:
            self._contents(name, "it is read-only" if read_only else "")

    def _contents(self, name: str, fine: str) -> None:
        """:param fine: why nothing is lost if only the target's has the same contents; empty if something is"""
        what = f"disk device {name}"
        if fine:
            self.found.warn("target", what, f"{fine}; that the target has the same contents there is not looked at")
            return
        self.found.refuse(
            "target",
            what,
            "is not copied: the container would go on with what lies there on the target, without what it has written here",
            "take it out for the time, put it on storage that both hosts share, or set readonly=true if both hosts have the same",
        )

    # Storage

    def _pools(self, root: Mapping[str, str], root_there: Mapping[str, str] | None) -> None:
        if root_there is None:
            hint = "add one to the profiles there, or to the instance"
            self.found.refuse("target", "root disk", "the instance would have none there", hint)
            return
        here, there = str(root.get("pool", "")), str(root_there.get("pool", ""))
        ours = self._get(self.source, f"storage-pools/{quote(here, safe='')}", f"storage pool {here}", "source") or {}
        theirs = self._get(self.target, f"storage-pools/{quote(there, safe='')}", f"storage pool {there}")
        if theirs is None:
            hint = "choose another with --storage POOL"
            self.found.refuse("target", f"storage pool {there}", "does not exist there", hint)
            return
        self.found.driver = str(ours.get("driver", "")) if ours.get("driver") == theirs.get("driver") else ""
        self._room(here, there)

    def _room(self, here: str, there: str) -> None:
        name = str(self.found.instance.get("name"))
        memory = self.answer.get("memory")
        device = next((n for n, d in self.here[1].items() if d is settings.root_disk(self.here[1])), "root")
        try:
            state = self.source.get(f"instances/{quote(name, safe='')}/state", timeout=STATE_SECONDS) or {}
        except FusecrError:
            state = {}  # it may be slow at times (docs/adr/0009), and is not worth waiting for
        need = room.Need(room.usage(state, device), memory if isinstance(memory, int) else None)
        ours, theirs = self._resources(self.source, here, "source"), self._resources(self.target, there, "target")
        source_free, target_free = room.free(ours), room.free(theirs)
        self.found.extend(
            room.look(need, source_pool=here, source_free=source_free, target_pool=there, target_free=target_free)
        )
        used = int((ours.get("space") or {}).get("used") or 0)
        self.found.add(room.unknown(need, source_used=used, target_pool=there, target_free=target_free))

    def _resources(self, server: Server, pool: str, side: str) -> Mapping[str, Any]:
        what = f"free space of storage pool {pool}"
        return self._get(server, f"storage-pools/{quote(pool, safe='')}/resources", what, side) or {}

    def _get(self, server: Server, path: str, what: str, side: str = "target") -> dict[str, Any] | None:
        """An object of a server; None if there is none, empty and a warning if this client may not see it."""
        return visible(lambda: server.get(path), lambda: self.found.warn(side, what, "this client may not see it: not checked"))


def visible(get: Callable[[], Any], hidden: Callable[[], None]) -> dict[str, Any] | None:
    """What ``get`` finds, None if that is nothing; empty, after a call of ``hidden``, if this client may not know."""
    try:
        return dict(get() or {})
    except NotFound:
        return None
    except Forbidden:
        hidden()
        return {}


def _nics_inside(config: Mapping[str, str], devices: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Names of the network devices in the container -> device."""
    return {
        str(device.get("name") or config.get(f"volatile.{name}.name") or name): name
        for name, device in devices.items()
        if device.get("type") == "nic"
    }
