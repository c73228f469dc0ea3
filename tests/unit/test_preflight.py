# SPDX-License-Identifier: Apache-2.0
"""Refusals before anything is touched: each from two hosts on which the migration would go well, but for one thing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_init import KERNEL, SSHFS
from two_hosts import MIB, NAME, Host, idmap, pair

from incus_fusecr.cli import check
from incus_fusecr.cli.output import Format
from incus_fusecr.errors import FusecrError, Refused
from incus_fusecr.incus.ask import AgentSilent
from incus_fusecr.incus.failures import Forbidden
from incus_fusecr.migration import room, settings
from incus_fusecr.migration.model import Verdict
from incus_fusecr.migration.preflight import Findings, check_idmap, preflight
from incus_fusecr.migration.remains import Remains
from incus_fusecr.migration.snapshot import checkpoint

Change = Callable[[Host, Host], Any]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    here, there = pair(tmp_path)
    yield here, there
    here.close()
    there.close()


def look(hosts: tuple[Host, Host], *, pool: str = "", profiles: list[str] | None = None) -> Findings:
    here, there = hosts
    for host in hosts:
        host.server.server()  # what a test has changed
    return preflight(here.server, there.server, NAME, NAME, pool=pool, profiles=profiles)


def told(verdicts: list[Verdict]) -> str:
    return " | ".join(f"{v.level} {v.where} {v.what}: {v.why} ({v.hint})" for v in verdicts)


def test_two_good_hosts(hosts: tuple[Host, Host]) -> None:
    found = look(hosts)
    assert told(found.verdicts) == "" and found.driver == "dir" and not found.remains
    for host in hosts:  # and nothing of the questions stays
        assert not host.keys and not [key for key in host.objects if key.startswith("profiles/fusecr-")]
    assert not [key for key in hosts[0].objects[f"instances/{NAME}"]["config"] if key.startswith("user.")]


def config(host: Host, **values: str) -> None:
    keys = {key.replace("__", "."): value for key, value in values.items()}
    host.objects[f"instances/{NAME}"]["config"].update(keys)


def devices(host: Host, where: str = f"instances/{NAME}", **values: dict[str, str]) -> None:
    host.objects[where].setdefault("devices", {}).update(values)


def facts(host: Host, **values: Any) -> None:
    assert host.facts is not None
    host.facts.update(values)


def nic(here: Host, there: Host, **device: str) -> None:
    """In the instance's own devices, with the source's network there."""
    here.objects["networks/br0"] = {"type": "bridge"}
    devices(here, eth0={"type": "nic", **device})


DISK = {"type": "disk", "path": "/data"}
NFS = {"eth": "", "data": "nfs4"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # hosts
        (lambda h, t: facts(t, version="0.2"), "both incus-fusecr: is 0.1 on h1 and 0.2 on h2"),
        (lambda h, t: facts(t, criu="4.1"), "both CRIU: is 4.1.1 on h1 and 4.1 on h2"),
        (lambda h, t: facts(t, machine="aarch64"), "both machine"),
        (lambda h, t: facts(t, missing=[{"what": "criu", "hint": "apt"}]), "target criu on h2: is missing (apt)"),
        (lambda h, t: facts(h, missing=[{"what": "/dev/fuse", "hint": ""}]), "source /dev/fuse on h1"),
        (
            lambda h, t: t.info["environment"].update(kernel_features={"idmapped_mounts": "true"}),
            "target incusd of h2: uses idmapped mounts",
        ),
        (lambda h, t: h.info["environment"].update(addresses=[]), "source core.https_address of h1: is not set"),
        # the source's settings
        (lambda h, t: config(h, migration__stateful="false"), "source migration.stateful: is not true"),
        (lambda h, t: config(h, raw__lxc="lxc.console.path=nonesuch"), "source raw.lxc: does not have lxc.console.path=none"),
        (lambda h, t: config(h, boot__autorestart="1"), "source boot.autorestart: would start the source again"),
        (lambda h, t: config(h, security__protection__delete="true"), "source security.protection.delete: keeps"),
        # the place
        (lambda h, t: t.instance(config={"volatile.uuid": "u-2"}), "target h2:c1: exists already"),
        (lambda h, t: t.objects.pop("profiles/fusecr"), "does not exist there (incus profile copy h1:fusecr h2:)"),
        (lambda h, t: t.objects.pop("storage-pools/data"), "target storage pool data: does not exist there"),
        (
            lambda h, t: devices(t, "profiles/default", root={"type": "disk", "path": "/", "pool": "fast"}),
            "target storage pool fast: does not exist there",
        ),
        (lambda h, t: t.objects["profiles/default"]["devices"].clear(), "target root disk: the instance would have none there"),
        # the settings that the target's profiles give
        (lambda h, t: t.objects["profiles/fusecr"]["config"].pop("migration.stateful"), "target migration.stateful: is not true"),
        (lambda h, t: t.objects["profiles/fusecr"]["config"].pop("raw.lxc"), "target raw.lxc: does not have"),
        (
            lambda h, t: t.objects["profiles/default"]["config"].update({"boot.autorestart": "true"}),
            "target boot.autorestart: would start the target again",
        ),
        (
            lambda h, t: t.objects["profiles/default"]["config"].update({"security.privileged": "true"}),
            "target security.privileged: the instance is unprivileged and would be privileged on the target",
        ),
        # network devices
        (lambda h, t: nic(h, t, nictype="bridged", parent="br0"), "target network br0 (device eth0): does not exist there"),
        (lambda h, t: nic(h, t, network="br0"), "target network br0 (device eth0): does not exist there"),
        (
            lambda h, t: (nic(h, t, network="br0"), t.objects.update({"networks/br0": {"type": "ovn"}})),
            "target network device eth0: would be of the kind ovn there",
        ),
        (lambda h, t: nic(h, t, nictype="macvlan", parent="br0"), "target network device eth0: would be of the kind macvlan"),
        (
            lambda h, t: devices(h, "profiles/default", eth0={"type": "nic", "nictype": "bridged", "parent": "br0"}),
            "target network device eth0: is here and not on the target",
        ),
        (
            lambda h, t: (t.objects.update({"networks/b": {"type": "bridge"}}),
                          devices(t, "profiles/default", eth0={"type": "nic", "name": "lan0", "network": "b"})),
            "target network device lan0: is there and not on the source",
        ),
        # disks
        (
            lambda h, t: devices(h, data={**DISK, "pool": "data", "source": "vol"}),
            "target storage volume vol in pool data (device data): does not exist there",
        ),
        (
            lambda h, t: (
                devices(h, data={**DISK, "pool": "data", "source": "vol/sub"}),
                t.objects.update({"storage-pools/data/volumes/custom/vol": {"name": "vol"}}),
            ),
            "target disk device data: is not copied",
        ),
        (lambda h, t: devices(h, data={**DISK, "source": "/srv"}), "target disk device data: is not copied"),
        (lambda h, t: devices(t, "profiles/fusecr", data={**DISK, "source": "/srv"}), "target disk device data: is not copied"),
        # room
        (
            lambda h, t: t.objects["storage-pools/data/resources"].update(space={"total": 100 * MIB, "used": 60 * MIB}),
            "target storage pool data: has 40 MiB left, the instance (10 MiB of memory) may need 74 MiB",
        ),
        (
            lambda h, t: h.objects[f"instances/{NAME}/state"].update(disk={"root": {"usage": 20000 * MIB}}),
            "target storage pool data: has 9900 MiB left, the instance (20000 MiB of files, 10 MiB of memory) may need 20074 MiB",
        ),
        (lambda h, t: h.answer.update(memory=9900 * MIB), "source storage pool data: has 9900 MiB left, the dump"),
        # the container, as the agent sees it
        (
            lambda h, t: h.answer.update(verdicts=[{"what": "pid 7", "why": "holds a lock", "hint": "end it"}]),
            "source pid 7: holds a lock (end it)",
        ),
        (
            lambda h, t: (h.answer.update(init_replies={"51": SSHFS.hex()}),
                          facts(t, fuse_init={"request": (KERNEL[:52] + bytes(4) + KERNEL[56:]).hex()})),
            "target FUSE connection 51: the kernel does not offer",
        ),
    ],
)
def test_refused(hosts: tuple[Host, Host], change: Change, words: str) -> None:
    change(*hosts)
    found = look(hosts)
    refusals = [v for v in found.refused if words in told([v])]
    assert refusals, told(found.verdicts)
    others = [v for v in found.refused if v.what != refusals[0].what]
    assert not others or "memory" in told(others), told(others)


@pytest.mark.parametrize(
    ("change", "options", "warning"),
    [
        (lambda h, t: facts(t, criu="4.2"), {}, ""),
        (lambda h, t: (config(h, security__privileged="1"), t.info["environment"].update(
            kernel_features={"idmapped_mounts": "true"})), {}, ""),
        (lambda h, t: (t.objects.pop("profiles/fusecr"), t.objects.update(
            {"profiles/mine": {"name": "mine", "config": {"migration.stateful": "true", "raw.lxc": "lxc.console.path=none"}}})),
            {"profiles": ["default", "mine"]}, ""),
        (lambda h, t: t.objects.update({"storage-pools/fast": {"driver": "btrfs"}}), {"pool": "fast"}, ""),
        (lambda h, t: (nic(h, t, nictype="bridged", parent="br0"), t.objects.update({"networks/br0": {"type": "bridge"}})), {}, ""),
        # The target's profile may call the device otherwise, if the name in the container is the same.
        (lambda h, t: (devices(h, "profiles/default", lan={"type": "nic", "name": "eth0", "nictype": "bridged", "parent": "a"}),
            devices(t, "profiles/default", net={"type": "nic", "name": "eth0", "network": "b"}),
            t.objects.update({"networks/b": {"type": "bridge"}})), {}, ""),
        (lambda h, t: (devices(h, "profiles/default", data={**DISK, "source": "/x"}), devices(h, data={"type": "none"}),
            devices(t, "profiles/default", data={**DISK, "source": "/x"})), {}, ""),
        (lambda h, t: (devices(h, data={**DISK, "source": "/srv"}), h.answer.update(disks=NFS)), {}, "/srv is on nfs4"),
        (lambda h, t: devices(h, data={**DISK, "source": "/srv", "readonly": "true"}), {}, "it is read-only"),
        (lambda h, t: (devices(h, data={**DISK, "pool": "c", "source": "vol"}), t.objects.update(
            {"storage-pools/c": {"driver": "cephfs"}, "storage-pools/c/volumes/custom/vol": {}})), {}, ""),
        (lambda h, t: config(h, security__idmap__isolated="true"), {}, "chooses a range when the copy is made"),
        (lambda h, t: config(h, security__idmap__isolated="true", security__idmap__base="2000000"), {}, ""),
        (lambda h, t: t.objects["storage-pools/data/resources"].update(space={"total": 170 * MIB, "used": 0}), {},
            "its storage driver does not tell"),
        (lambda h, t: t.forbidden.append("storage-pools/data/resources"), {}, "storage pool data: this client may not"),
        (lambda h, t: (nic(h, t, nictype="bridged", parent="br0"), t.forbidden.append("networks/")), {}, "client may not see it"),
    ],
)
def test_not_refused(hosts: tuple[Host, Host], change: Change, options: dict[str, Any], warning: str) -> None:
    change(*hosts)
    found = look(hosts, **options)
    assert told(found.refused) == ""
    assert bool(found.verdicts) == bool(warning) and warning in told(found.verdicts)


BINDING = {"v": 1, "id": "ab12", "seq": 0, "op": "bind"}


@pytest.mark.parametrize(
    ("role", "more", "status", "arrived", "verdict"),
    [
        ("target", {}, "Stopped", "", "abort"),
        ("target", {}, "Running", "", "abort"),
        ("source", {}, "Stopped", "ab12", ""),
        ("source", {}, "Running", "ab12", "commit"),
        ("source", {"keep": True}, "Stopped", "ab12", None),
        ("source", {}, "Stopped", "cd34", None),
        ("source", {}, "Stopped", "", None),
        ("", {}, "Stopped", "ab12", None),
    ],
)
def test_remains_of_an_earlier_migration(
    hosts: tuple[Host, Host], role: str, more: dict[str, Any], status: str, arrived: str, verdict: str | None
) -> None:
    """What its client would have taken away is no reason to refuse; what anybody could miss is."""
    here, there = hosts
    here.instance()["config"]["user.fusecr.arrived"] = arrived
    key = json.dumps({**BINDING, "role": role, **more})
    there.instance(config={"volatile.uuid": "u-1", "user.fusecr.request": key}, status=status)
    found = look(hosts)
    assert found.remains == (None if verdict is None else Remains("ab12", verdict))
    assert ("exists already" in told(found.refused)) == (verdict is None)
    there.instance(config={"volatile.uuid": "u-2", "user.fusecr.request": key}, status=status)
    assert look(hosts).remains is None, "another instance of the same name"


def test_another_project_than_default(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    here, there = hosts
    with there.server.clone("team") as server:
        found = preflight(here.server, server, NAME, NAME, pool="", profiles=None)
        assert "restores no running container into another project" in told(found.refused)
        there.info["environment"]["server_version"] = "7.3"
    with there.server.clone("team") as server:
        assert not preflight(here.server, server, NAME, NAME, pool="", profiles=None).refused


# Clients without the right to edit a server


def test_a_confined_client_sees_the_same(hosts: tuple[Host, Host]) -> None:
    """By a profile, as it would speak to the agents later."""
    for host in hosts:
        host.confined = True
    facts(hosts[1], criu="4.0")
    found = look(hosts)
    assert "both CRIU: is 4.1.1 on h1 and 4.0 on h2" in told(found.verdicts)
    assert not [key for host in hosts for key in host.objects if key.startswith("profiles/fusecr-")]


def test_a_confined_client_finds_a_silent_target_before_anything_else(hosts: tuple[Host, Host]) -> None:
    here, there = hosts
    here.confined = there.confined = True
    there.facts = None
    with pytest.raises(AgentSilent, match="facts of h2: no incus-fusecr agent"):
        look(hosts)
    assert not [r for r in here.fake.requests if r.method == "PATCH" and "instances" in r.path]


def test_what_a_client_may_not_ask_is_told(hosts: tuple[Host, Host]) -> None:
    here, _ = hosts
    here.confined = True
    here.forbidden.append("profiles")
    found = look(hosts)
    assert not found.refused
    assert "warn source facts of h1: this client may not ask for them: versions" in told(found.verdicts)
    seen = check.look(here.server, NAME)
    assert seen["fit"] and seen["notes"][0]["what"] == "facts of h1"
    assert "Note: facts of h1: " in check.text_of(seen, Format())
    with pytest.raises(Forbidden):
        check.look(here.server, "")


# check and checkpoint


SETTINGS = ["migration.stateful", "raw.lxc", "boot.autorestart", "security.protection.delete"]


def spoil(host: Host) -> None:
    host.objects[f"instances/{NAME}"]["profiles"] = ["default"]
    config(host, boot__autorestart="true", security__protection__delete="true")


def test_check_looks_at_the_settings(hosts: tuple[Host, Host]) -> None:
    assert check.look(hosts[0].server, NAME)["fit"]
    spoil(hosts[0])
    found = check.look(hosts[0].server, NAME)
    assert [v["what"] for v in found["verdicts"]] == SETTINGS and not found["fit"]
    assert "incus profile add h1:c1 fusecr" in found["verdicts"][0]["hint"]
    assert "migration.stateful" in check.text_of(found, Format())


def test_checkpoint_looks_at_the_settings(hosts: tuple[Host, Host]) -> None:
    """At those that a dump needs; the others are a migration's."""
    spoil(hosts[0])
    with pytest.raises(Refused, match=r"migration\.stateful: is not true .*and 1 more"):
        checkpoint(hosts[0].server, NAME)
    assert not [r for r in hosts[0].fake.requests if r.method in ("POST", "PUT")]


def test_a_restored_container(hosts: tuple[Host, Host]) -> None:
    """liblxc dumps it once: said by check, refused by checkpoint, no matter to migrate."""
    here = hosts[0]
    here.answer["restored"] = True
    assert not look(hosts).verdicts
    found = check.look(here.server, NAME)
    assert found["fit"] and "Note: checkpoint of h1:c1: it was restored" in check.text_of(found, Format())
    assert json.loads(check.document(found, Format("json")))["notes"][0]["hint"].startswith("restart it before")
    with pytest.raises(Refused, match=r"liblxc 6\.0\.4 saves no such container again") as refusal:
        checkpoint(here.server, NAME)
    assert refusal.value.exit_code == 3
    assert not [r for r in here.fake.requests if r.method in ("POST", "PUT")]


def test_what_should_be_known(hosts: tuple[Host, Host]) -> None:
    """A note of the agent: shown by check, a warning of migrate, no refusal."""
    here = hosts[0]
    here.answer["notes"] = [{"what": "pid 7 (ll)", "why": "may know its files by number", "hint": "end it"}]
    found = look(hosts)
    assert [(v.level, v.what) for v in found.verdicts] == [("warn", "pid 7 (ll)")] and not found.refused
    shown = check.look(here.server, NAME)
    assert shown["fit"] and "Note: pid 7 (ll): may know its files by number (end it)" in check.text_of(shown, Format())


@pytest.mark.parametrize(("liblxc", "fine"), [("6.0.4", False), ("7.0.0", False), ("7.0.1", True), ("8", True), ("", True)])
def test_the_liblxc_that_dumps_once(liblxc: str, fine: bool) -> None:
    assert (settings.restored_once({"driver_version": liblxc}, "h1:c1") is None) == fine


def test_check_of_a_host_with_idmapped_mounts(hosts: tuple[Host, Host]) -> None:
    here = hosts[0]
    assert check.look(here.server, "")["fit"]
    here.info["environment"]["kernel_features"] = {"idmapped_mounts": "true"}
    here.server.server()
    found = check.look(here.server, "")
    assert not found["fit"] and "INCUS_IDMAPPED_MOUNTS_DISABLE=1" in found["verdicts"][0]["hint"]


# The map of uids and gids


def with_map(key: str, text: str, **more: str) -> dict[str, Any]:
    return {"config": {f"volatile.idmap.{key}": text, **{k.replace("__", "."): v for k, v in more.items()}}}


@pytest.mark.parametrize(
    ("here", "there", "words"),
    [
        (with_map("current", idmap()), with_map("next", idmap()), ""),
        (with_map("current", idmap()), with_map("next", json.dumps(json.loads(idmap())[::-1], indent=1)), ""),
        (with_map("current", idmap()), with_map("next", idmap(100000, 65536)), "would be 0:100000+65536 on the target"),
        (
            with_map("current", idmap(1065536, 65536), security__idmap__isolated="true", volatile__idmap__base="1065536"),
            with_map("next", idmap(1131072, 65536)),
            "security.idmap.base=1065536",
        ),
        (with_map("current", idmap()), with_map("current", idmap()), "would be unknown on the target"),
        (with_map("current", "[1]"), with_map("next", "[1]"), "is unknown on the source"),
        ({"config": {"security.privileged": "true"}}, {"config": {"security.privileged": "true"}}, ""),
    ],
)
def test_maps_of_ids(here: dict[str, Any], there: dict[str, Any], words: str) -> None:
    if not words:
        check_idmap(here, there)
        return
    with pytest.raises(FusecrError) as refusal:
        check_idmap(here, there)
    assert words in str(refusal.value)


# Parts


def test_expansion_is_incus_own() -> None:
    """Measured: the later profile wins, a device is replaced as a whole, none takes one away."""
    profiles = [
        {"config": {"a": "1", "b": "1"}, "devices": {"d": {"type": "disk", "path": "/x"}, "n": {"type": "nic"}}},
        {"config": {"b": "2", "c": "2"}, "devices": {"d": {"type": "disk", "source": "/y"}}},
    ]
    found = settings.expand(profiles, {"c": "3"}, {"n": {"type": "none"}})
    assert found == ({"a": "1", "b": "2", "c": "3"}, {"d": {"type": "disk", "source": "/y"}})


@pytest.mark.parametrize(
    ("need", "source_free", "target_free", "sides"),
    [
        (room.Need(), None, None, []),
        (room.Need(), 256 * MIB, 256 * MIB, []),
        (room.Need(), 255 * MIB, 255 * MIB, ["source", "target"]),
        (room.Need(memory=0), 64 * MIB, 64 * MIB, []),
        (room.Need(memory=MIB), 64 * MIB, 65 * MIB, ["source"]),
        (room.Need(files=500 * MIB, memory=36 * MIB), 100 * MIB, 600 * MIB, []),
        (room.Need(files=501 * MIB, memory=36 * MIB), 100 * MIB, 600 * MIB, ["target"]),
        (room.Need(files=501 * MIB, memory=36 * MIB), 0, None, ["source"]),
    ],
)
def test_room(need: room.Need, source_free: int | None, target_free: int | None, sides: list[str]) -> None:
    found = room.look(need, source_pool="a", source_free=source_free, target_pool="b", target_free=target_free)
    assert [v.where for v in found] == sides and all(v.level == "refuse" for v in found)


def test_room_is_read_as_incus_writes_it() -> None:
    assert room.usage({"disk": {"root": {"usage": 7}}}, "root") == 7
    assert [room.usage(s, "root") for s in ({}, {"disk": None}, {"disk": {}}, {"disk": {"root": {"usage": 0}}})] == [None] * 4
    assert room.free({"space": {"total": 10, "used": 3}}) == 7
    assert [room.free(r) for r in ({}, {"space": {}}, {"space": {"total": 0, "used": 0}})] == [None] * 3
