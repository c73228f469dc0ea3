# SPDX-License-Identifier: Apache-2.0
"""Two scripted Incus servers with agents, on which a migration would go well: what a test changes keeps it from that."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

from fake_incus import SERVER_INFO, FakeIncus, Request, refused, sync
from test_init import KERNEL

from incus_fusecr.incus.client import Server
from incus_fusecr.incus.config import Endpoint

NAME = "c1"
MIB = 1 << 20


def idmap(base: int = 1000000, count: int = 1000000000) -> str:
    """A ``volatile.idmap.*``."""
    ids = {"Hostid": base, "Nsid": 0, "Maprange": count}
    return json.dumps([{"Isuid": uid, "Isgid": not uid, **ids} for uid in (True, False)])


PROFILES: dict[str, dict[str, Any]] = {
    "default": {"name": "default", "config": {}, "devices": {"root": {"type": "disk", "path": "/", "pool": "data"}}},
    "fusecr": {
        "name": "fusecr",
        "config": {"migration.stateful": "true", "raw.lxc": "lxc.apparmor.profile=\nlxc.console.path = none\n"},
        "devices": {},
    },
}


class Host:
    """One server: ``objects`` by path below /1.0, ``facts`` and ``answer`` of its agent (None: no agent).

    :ivar forbidden: paths, as they begin, that the client may not see
    :ivar confined: whether the client may not write the server's keys
    """

    def __init__(self, where: Path, name: str) -> None:
        self.name = name
        self.info = copy.deepcopy(SERVER_INFO)
        self.info["environment"].update(
            server_version="6.0.4",
            driver_version="6.0.4",
            certificate_fingerprint=f"of {name}",
            kernel_features={"idmapped_mounts": "false"},
        )
        self.facts: dict[str, Any] | None = {
            "version": "0.1",
            "criu": "4.1.1",
            "machine": "x86_64",
            "missing": [],
            "fuse_init": {"request": KERNEL.hex()},
        }
        self.answer: dict[str, Any] = {"connections": [], "verdicts": [], "init_replies": {}, "memory": 10 * MIB, "disks": {}}
        self.objects: dict[str, dict[str, Any]] = {
            **{f"profiles/{p}": copy.deepcopy(content) for p, content in PROFILES.items()},
            "projects/default": {"name": "default"},
            "storage-pools/data": {"driver": "dir"},
            "storage-pools/data/resources": {"space": {"total": 10000 * MIB, "used": 100 * MIB}},
        }
        self.forbidden: list[str] = []
        self.confined = False
        self.keys: dict[str, str] = {}
        self._lock = threading.Lock()
        self.fake = FakeIncus(self._script).listen_unix(where / f"{name}.socket")
        self.server = Server(Endpoint(name, "default", f"{where}/{name}.socket"))

    def close(self) -> None:
        self.server.close()
        self.fake.close()

    def instance(self, **changes: Any) -> dict[str, Any]:
        """Put the running instance here, and return it."""
        found: dict[str, Any] = {
            "name": NAME,
            "type": "container",
            "status": "Running",
            "profiles": ["default", "fusecr"],
            "config": {"volatile.idmap.current": idmap(), "volatile.idmap.next": idmap(), "volatile.uuid": "u-1"},
            "devices": {},
            **changes,
        }
        self.objects[f"instances/{NAME}"] = found
        self.objects[f"instances/{NAME}/state"] = {"disk": {}}
        return found

    def _expanded(self, instance: dict[str, Any]) -> dict[str, Any]:
        config, devices = {}, {}
        for profile in instance.get("profiles", ()):
            config.update(self.objects[f"profiles/{profile}"]["config"])
            devices.update(self.objects[f"profiles/{profile}"]["devices"])
        return {
            **instance,
            "expanded_config": {**config, **instance.get("config", {})},
            "expanded_devices": {**devices, **instance.get("devices", {})},
        }

    def _script(self, request: Request) -> Any:
        with self._lock:
            path = request.path.removeprefix("/1.0").strip("/")
            if any(path.startswith(start) for start in self.forbidden):
                return refused(403, "User does not have permission")
            if request.method == "POST" and path == "profiles":
                self.objects[f"profiles/{request.body['name']}"] = {"config": self._answered(request.body["config"])}
                return sync({})
            if request.method == "PATCH" and path == "":
                if self.confined:
                    return refused(403, "Certificate is restricted")
                self.keys = self._answered({**self.keys, **request.body["config"]})
                return sync({})
            if path == "":
                return sync({**self.info, "config": self.keys})
            if path not in self.objects:
                return refused(404, "not found")
            found = self.objects[path]
            if request.method == "DELETE":
                del self.objects[path]
            elif request.method == "PATCH":
                found["config"] = self._answered({**found.get("config", {}), **request.body["config"]})
            return sync(self._expanded(found) if path == f"instances/{NAME}" else found)

    def _answered(self, config: dict[str, str]) -> dict[str, str]:
        """Keys as they are with the agent's answers among them."""
        kept = {key: value for key, value in config.items() if value}
        for key, value in list(kept.items()):
            if self.facts is None or not (".ask-" in key or ".request" in key):
                continue
            asked = json.loads(value)
            what = self.facts if asked["op"] == "facts" else self.answer
            head = {"v": 1, "id": asked["id"], "seq": asked.get("seq", 0), "data": what, "error": None}
            phase = "done" if ".ask-" in key else "facts" if asked["op"] == "facts" else "checked"
            kept[key.replace(".ask-", ".answer-").replace(".request", ".report")] = json.dumps({**head, "phase": phase})
        return kept


def pair(where: Path) -> tuple[Host, Host]:
    """The source with the instance, and the target."""
    here, there = Host(where, "h1"), Host(where, "h2")
    here.instance()
    return here, there
