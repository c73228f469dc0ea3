# SPDX-License-Identifier: Apache-2.0
"""Instances of all kinds, and what is refused of them before anything is touched. Small containers: a hop takes seconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fusecontainer import Container, on, sh, wait_for
from test_migrate import OTHER, hop

pytestmark = pytest.mark.requires_root
CONFINED = ("env", "INCUS_CONF=/tmp/confined")
VARIABLE = "INCUS_IDMAPPED_MOUNTS_DISABLE=1 "
UNIT = "/etc/fusecr-lab/services.d/incusd.service"


@pytest.fixture
def bare(containers_gone: list[Container]) -> Callable[..., Container]:
    """``bare(name, *options)``: busybox, nothing of ours in it."""

    def make(name: str, *options: str) -> Container:
        container = Container("h1", name)
        containers_gone.append(container)
        return container.create("busybox", *options)

    return make


def query(container: Container, rest: str = "") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(on(container.host, "incus", "query", f"/1.0/instances/{container.name}{rest}"))
    return found


def refusals(report: dict[str, Any]) -> dict[str, str]:
    return {v["what"]: v["why"] for v in report["verdicts"] if v["level"] == "refuse"}


def untouched(container: Container, target: str = "h2") -> None:
    """It runs, no key of ours is in it, and the target has nothing of it."""
    found = query(container)
    assert found["status"] == "Running" and not [key for key in found["config"] if key.startswith("user.fusecr.")]
    assert sh(target, f"incus list -f csv -c n ^{container.name}$") == ""
    for host in OTHER:
        assert "fusecr-" not in on(host, "incus", "profile", "list", "-f", "csv")


def test_an_ephemeral_one(small: Callable[..., Container]) -> None:
    """Incus itself deletes the source when it ends."""
    container = small("ki-brief", "--ephemeral")
    hop(container)
    assert query(container)["ephemeral"] is True
    container.incus("stop -f", container.name)
    assert container.status() == ""


def test_snapshots_a_name_and_profiles_from_a_third_machine(small: Callable[..., Container]) -> None:
    """And afterwards: liblxc cannot dump a restored container, which checkpoint says before and check notes."""
    container = small("ki-many")
    container.incus("snapshot create", container.name, "files")
    container.sh("echo later > /root/later")
    on("h2", "incus", "profile", "copy", "fusecr", "ki-other")
    on("h2", "incus", "profile", "set", "ki-other", "user.mine=1")
    try:
        options = ("--profile", "default", "--profile", "ki-other")
        report = container.migrate("h2:ki-moved", *options, source="h1:", by="net")
        assert report["outcome"] == "done"
        found = query(container, "?recursion=1")
        assert found["profiles"] == ["default", "ki-other"] and found["expanded_config"]["user.mine"] == "1"
        assert [s["name"] for s in found["snapshots"]] == ["files"]
        container.advances()
        assert "restored" in container.check()["notes"][0]["why"] and container.check()["fit"]
        told = sh("h2", f"incus-fusecr checkpoint {container.name} 2>&1; echo rc $?").splitlines()
        assert told[-1] == "rc 3" and "saves no such container again" in told[0]
        container.advances()
        container.delete()
    finally:
        container.delete()
        on("h2", "incus", "profile", "delete", "ki-other")


def test_disks_that_are_not_copied(bare: Callable[..., Container]) -> None:
    """Incus would mount the target's volume of the same name, with other contents, and say nothing."""
    container = bare("ki-disk")
    for host in OTHER:
        on(host, "incus", "storage", "volume", "delete", "default", "ki-vol", code=None)
    on("h1", "incus", "storage", "volume", "create", "-q", "default", "ki-vol")
    container.incus("storage volume attach default ki-vol", container.name, "data", "/data")
    container.sh("echo here > /data/file")
    container.incus("config device set", container.name, "data", "readonly=true")
    container.incus("restart -f", container.name)
    assert list(refusals(container.migrate("h2:", code=3)).values()) == ["does not exist there"]
    on("h2", "incus", "storage", "volume", "create", "-q", "default", "ki-vol")
    container.incus("config device set", container.name, "data", "readonly=false")
    assert "is not copied" in refusals(container.migrate("h2:", code=3))["disk device data"]
    container.incus("config device remove", container.name, "data")
    container.incus("config device add", container.name, "data", "disk", "source=/etc/fusecr-lab", "path=/data")
    assert "is not copied" in refusals(container.migrate("h2:", code=3))["disk device data"]
    untouched(container)
    # Read-only: both hosts have it, and nothing that was written here stays behind.
    container.incus("config device set", container.name, "data", "readonly=true")
    container.incus("restart -f", container.name)
    report = container.migrate("h2:")
    assert report["outcome"] == "done" and "it is read-only" in report["verdicts"][0]["why"]
    assert container.sh("ls /data") == sh("h2", "ls /etc/fusecr-lab")
    container.delete()
    for host in OTHER:
        on(host, "incus", "storage", "volume", "delete", "default", "ki-vol")


def test_isolated_ranges_of_ids(bare: Callable[..., Container]) -> None:
    """The target's Incus chooses another range: found before the hold, by what it has chosen."""
    isolated = ("-c", "security.idmap.isolated=true")
    first, container = bare("ki-iso1", *isolated), bare("ki-iso2", *isolated)
    base = query(container)["config"]["volatile.idmap.base"]
    assert base != query(first)["config"]["volatile.idmap.base"]
    report = container.migrate("h2:", code=1)
    assert report["outcome"] == "failed" and "map of uids and gids" in report["error"]["what"]
    assert "hold" not in [phase["name"] for phase in report["phases"]]
    assert any("chooses a range" in v["why"] for v in report["verdicts"] if v["level"] == "warn")
    untouched(container)
    # As the hint says.
    assert f"security.idmap.base={base}" in report["error"]["hint"]
    container.incus("config set", container.name, f"security.idmap.base={base}")
    container.incus("restart -f", container.name)
    assert container.migrate("h2:")["outcome"] == "done"
    assert container.sh("touch /root/mine; stat -c %u:%g / /root/mine").split() == ["0:0", "0:0"]
    first.delete()
    container.delete()


def test_settings_are_looked_at_by_all_commands(bare: Callable[..., Container]) -> None:
    container = bare("ki-plain", "-c", "migration.stateful=false", "-c", "boot.autorestart=true")
    found = json.loads(on("h1", "incus-fusecr", "check", "-f", "json", container.name, code=3))
    assert [v["what"] for v in found["verdicts"]] == ["migration.stateful", "boot.autorestart"]
    assert list(refusals(container.migrate("h2:", code=3))) == ["migration.stateful", "boot.autorestart"]
    assert "rc 3" in sh("h1", f"incus-fusecr checkpoint {container.name}; echo rc $?")
    container.incus("config set", container.name, "migration.stateful=true", "boot.autorestart=false")
    # The target's profile of the same name may say something else.
    sh("h2", "incus profile create -q ki-bad; incus profile set ki-bad security.protection.delete=true")
    try:
        report = container.migrate("h2:", "--profile", "default", "--profile", "ki-bad", code=3)
        assert list(refusals(report)) == ["security.protection.delete"]
    finally:
        on("h2", "incus", "profile", "delete", "ki-bad")
    untouched(container)
    container.delete()


@pytest.fixture
def confined() -> Iterator[None]:
    """A client on the third machine whose certificates on both hosts are good for one project."""
    sh("net", "rm -rf /tmp/confined; mkdir /tmp/confined")
    for host in OTHER:
        add = "incus config trust add confined --projects default --restricted -q | tail -n 1"
        token = sh(host, add).split()[-1]
        on("net", *CONFINED, "incus", "remote", "add", host, token, "--accept-certificate", "-q")
    yield
    sh("net", "rm -rf /tmp/confined")
    for host in OTHER:
        listed = json.loads(on(host, "incus", "config", "trust", "list", "-f", "json"))
        for entry in listed:
            if entry["name"] == "confined":
                on(host, "incus", "config", "trust", "remove", entry["fingerprint"])


def test_a_client_confined_to_a_project(small: Callable[..., Container], confined: None) -> None:
    """It may not write the server's keys; what is compared, and a silent target, it learns all the same before it copies."""
    container = small("ki-conf")
    where = f"h1:{container.name}"
    found = json.loads(on("net", *CONFINED, "incus-fusecr", "check", "-f", "json", where))
    assert found["fit"] and found["host"]["criu"] and found["notes"] == []
    assert json.loads(on("net", *CONFINED, "incus-fusecr", "check", "-f", "json", "h2:"))["host"]["version"]
    migrate = (*CONFINED, "incus-fusecr", "migrate", "-f", "json", where, "h2:")
    on("h2", "labctl", "stop", "agent")
    try:
        report = json.loads(on("net", *migrate, code=3))
        assert [phase["name"] for phase in report["phases"]] == ["preflight"] and report["seconds"] < 10
        assert "no incus-fusecr agent answers there" in report["error"]["why"]
    finally:
        on("h2", "labctl", "start", "agent")
        wait_for("the agent", lambda: on("h2", "incus-fusecr", "list", "-f", "json", code=None).startswith("["))
    untouched(container)
    report = json.loads(on("net", *migrate))
    assert report["outcome"] == "done" and report["verdicts"] == []
    container.host = "h2"
    container.advances()
    container.delete()


def test_a_target_with_idmapped_mounts(bare: Callable[..., Container]) -> None:
    container = bare("ki-idmap")
    sh("h2", f"sed -i 's/{VARIABLE}//' {UNIT}; labctl restart incusd 60")
    try:
        found = json.loads(on("h1", "incus-fusecr", "check", "-f", "json", "h2:", code=3))
        assert VARIABLE.strip() in found["verdicts"][0]["hint"]
        assert list(refusals(container.migrate("h2:", code=3))) == ["incusd of h2"]
    finally:
        sh("h2", f"sed -i 's/^environment = /&{VARIABLE}/' {UNIT}; labctl restart incusd 60")
    untouched(container)
    assert json.loads(on("h1", "incus-fusecr", "check", "-f", "json", "h2:"))["fit"]
    container.delete()
