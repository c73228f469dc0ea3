# SPDX-License-Identifier: Apache-2.0
"""One instance of an Incus that does what it is told, and the bindings of an agent there."""

from __future__ import annotations

import json
from typing import Any

from incus_fusecr.agent.bindings import Binding, Bindings
from incus_fusecr.errors import FusecrError
from incus_fusecr.incus.ask import REQUEST_KEY


class Incus:
    """One instance with snapshots."""

    def __init__(self, bound: str = "", snapshots: tuple[str, ...] = (), status: str = "Running") -> None:
        self.config = {REQUEST_KEY: json.dumps({"id": bound})} if bound else {}
        self.names = list(snapshots)
        self.status = status
        self.deleted: list[str] = []
        self.there = True
        self.mounted = False
        self.running: list[dict[str, Any]] = []
        self.pid = 0
        self.states: list[tuple[str, bool]] = []

    def __enter__(self) -> Incus:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def instance(self, name: str) -> dict[str, Any] | None:
        return {"name": name, "status": self.status, "config": self.config} if self.there else None

    def get(self, path: str) -> dict[str, Any]:
        assert path.endswith("/state")
        return {"pid": self.pid}

    def put_state(self, _name: str, action: str, _deadline: float, *, force: bool) -> None:
        self.states.append((action, force))
        self.status, self.pid = "Stopped", 0

    def snapshots(self, _name: str) -> list[str]:
        return list(self.names)

    def delete_snapshot(self, _name: str, snapshot: str, _deadline: float) -> None:
        self.names.remove(snapshot)

    def delete_instance(self, name: str, _deadline: float) -> None:
        if self.mounted:
            raise FusecrError("unlinkat: device or resource busy")
        self.there = False

    def patch_instance_config(self, _name: str, values: dict[str, str]) -> None:
        for key in values:
            self.config.pop(key, None)

    def operations(self) -> list[dict[str, Any]]:
        return self.running

    def delete(self, path: str) -> None:
        self.deleted.append(path)


def bindings(incus: Incus | None = None, live: set[str] | None = None, dropped: list[str] | None = None) -> Bindings:
    server: Any = incus or Incus()
    forgotten = dropped if dropped is not None else []
    return Bindings(lambda _project: server, lambda m: m in (live or set()), forgotten.append)


def bind(to: Bindings, migration: str, instance: str, project: str = "default", role: str = "source") -> Binding:
    to.bind(Binding(migration, role, project, instance))
    return Binding(migration, role, project, instance)
