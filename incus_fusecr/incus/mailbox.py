# SPDX-License-Identifier: Apache-2.0
"""Where a request and its report are written: objects of the Incus API that carry ``user.*`` keys.

Incus refuses every change of an instance's configuration while the instance starts, stops or is the source
of a migration (measured on 6.0.4). What must be said at such a time needs an object that no operation holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol
from urllib.parse import quote

from .ask import REPORT_KEY, REQUEST_KEY
from .client import Server
from .failures import Conflict, NotFound

PROFILE_PREFIX = "fusecr-"


class Mailbox(Protocol):
    """Keys that both sides read and write; each call names the server, since that belongs to a thread."""

    @property
    def where(self) -> str:
        """For messages."""

    def write(self, server: Server, values: Mapping[str, str], timeout: float | None = None) -> None:
        """Set keys; an empty value removes one."""

    def read(self, server: Server, timeout: float | None = None) -> Mapping[str, str]:
        """All keys there are. :raises NotFound: the object is gone"""

    def clear(self, server: Server) -> None:
        """Leave nothing behind."""


class InstanceMailbox:
    """The instance's own configuration: 10 ms a write; closed during its start, stop and migration."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def where(self) -> str:
        return self._name

    def write(self, server: Server, values: Mapping[str, str], timeout: float | None = None) -> None:
        server.patch_instance_config(self._name, values, timeout=timeout)

    def read(self, server: Server, timeout: float | None = None) -> Mapping[str, str]:
        return _config(server.get(f"instances/{quote(self._name, safe='')}", timeout=timeout))

    def clear(self, server: Server) -> None:
        try:
            self.write(server, {REQUEST_KEY: "", REPORT_KEY: ""})
        except NotFound:
            pass


class ServerMailbox:
    """The server's configuration, the identifier in the key: 2 ms a write, never closed; administrators."""

    def __init__(self, identifier: str) -> None:
        self._suffix = f"-{identifier}"

    @property
    def where(self) -> str:
        return "the server's configuration"

    def write(self, server: Server, values: Mapping[str, str], timeout: float | None = None) -> None:
        server.patch_server_config({k + self._suffix: v for k, v in values.items()}, timeout=timeout)

    def read(self, server: Server, timeout: float | None = None) -> Mapping[str, str]:
        found = _config(server.get("", timeout=timeout))
        return {k.removesuffix(self._suffix): v for k, v in found.items() if k.endswith(self._suffix)}

    def clear(self, server: Server) -> None:
        self.write(server, {REQUEST_KEY: "", REPORT_KEY: ""})


class ProfileMailbox:
    """A profile that no instance uses, made for one conversation, in the instance's project: 4 ms a write,
    never closed, and open to a client that is confined to that project."""

    def __init__(self, identifier: str) -> None:
        self._name = PROFILE_PREFIX + identifier

    @property
    def where(self) -> str:
        return f"the profile {self._name}"

    def write(self, server: Server, values: Mapping[str, str], timeout: float | None = None) -> None:
        body = {"config": dict(values)}
        try:
            server.patch(f"profiles/{self._name}", body, timeout=timeout)
        except NotFound:
            fresh = {"name": self._name, "config": {k: v for k, v in values.items() if v}, "devices": {}}
            try:
                server.request("POST", "profiles", fresh, timeout=timeout)
            except Conflict:
                server.patch(f"profiles/{self._name}", body, timeout=timeout)

    def read(self, server: Server, timeout: float | None = None) -> Mapping[str, str]:
        return _config(server.get(f"profiles/{self._name}", timeout=timeout))

    def clear(self, server: Server) -> None:
        try:
            server.delete(f"profiles/{self._name}")
        except NotFound:
            pass


def _config(found: object) -> Mapping[str, str]:
    config = found.get("config") if isinstance(found, dict) else None
    return config if isinstance(config, dict) else {}
