# SPDX-License-Identifier: Apache-2.0
"""One Incus server: its instances, snapshots and operations."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from ..errors import FusecrError, UsageError
from .connection import BUSY_SECONDS, Connection, Json, Progress, unless_busy
from .deadline import Deadline
from .failures import ApiError, NotFound, OperationFailed
from .names import DEFAULT_PROJECT

log = logging.getLogger(__name__)

__all__ = ["BUSY_SECONDS", "Json", "Progress", "Server", "unless_busy"]


class Server(Connection):
    """What this program asks of a server, in one project; requests and threads: :class:`Connection`."""

    # The server

    @property
    def info(self) -> Json:
        """``GET /1.0`` as it was when the connection was made."""
        return self._info

    def server(self) -> Json:
        """``GET /1.0`` as it is now."""
        self._info = dict(self.get(""))
        return self._info

    def has_extension(self, name: str) -> bool:
        return name in self._info.get("api_extensions", ())

    @property
    def environment(self) -> Json:
        found = self._info.get("environment")
        return found if isinstance(found, dict) else {}

    def addresses(self) -> list[str]:
        """URLs under which another server may reach this one, best first, as the incus client tries them:
        the one that works for this client, then all that the server listens on."""
        urls = [self.endpoint.url] if self.endpoint.url else []
        for address in self.environment.get("addresses") or ():
            url = f"https://{address}"
            if not address.startswith(":") and url not in urls:
                urls.append(url)
        return urls

    def check_project(self) -> None:
        """:raises UsageError: the project of this connection does not exist there"""
        try:
            self.get(f"projects/{quote(self.project, safe='')}")
        except NotFound as e:
            raise UsageError(
                f'the project "{self.project}" does not exist on {self.name}',
                "",
                f"see: incus project list {self.name}:",
            ) from e

    def patch_server_config(self, values: Mapping[str, str], *, timeout: float | None = None) -> None:
        """Set keys of the server's configuration; an empty value removes a key."""
        self.patch("", {"config": dict(values)}, timeout=timeout)

    # Instances

    def instance(self, name: str) -> dict[str, Any] | None:
        """``GET /1.0/instances/NAME``, or None if there is no such instance."""
        try:
            found = self.get(_instance(name))
        except NotFound:
            return None
        return dict(found)

    def require_instance(self, name: str) -> dict[str, Any]:
        """The instance. :raises UsageError: it, or its project, does not exist"""
        found = self.instance(name)
        if found is None:
            if self.project != DEFAULT_PROJECT:
                self.check_project()
            raise UsageError(
                f'the instance "{name}" does not exist on {self.name} in project "{self.project}"',
                "",
                f"see: incus list {self.name}:",
            )
        return found

    def instances(self, *, all_projects: bool = False) -> list[dict[str, Any]]:
        """All instances of the project, or of all projects."""
        params = {"recursion": "1"}
        if all_projects:
            params["all-projects"] = "true"
        return [dict(i) for i in self.get("instances", params) or ()]

    def instance_state(self, name: str) -> dict[str, Any]:
        return dict(self.get(f"{_instance(name)}/state"))

    def patch_instance_config(
        self,
        name: str,
        values: Mapping[str, str],
        *,
        timeout: float | None = None,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        """Set keys of an instance's own configuration; an empty value removes a key.

        :param busy_seconds: how long to try again while Incus refuses because of another operation
        :raises Busy: it still refuses; nothing was changed
        """
        body = {"config": dict(values)}
        unless_busy(lambda: self.patch(_instance(name), body, timeout=timeout), busy_seconds)

    def create_instance(
        self, body: Json, deadline: Deadline | float, progress: Progress | None = None
    ) -> Json:
        """POST an instance and wait for it."""
        return self.run("POST", "instances", body, deadline, progress)

    def delete_instance(self, name: str, deadline: Deadline | float, *, missing_ok: bool = True) -> bool:
        """Delete a stopped instance and look whether it is gone. :returns: whether there was one to delete"""
        end = Deadline.of(deadline)
        try:
            self.run("DELETE", _instance(name), None, end)
        except NotFound:
            if not missing_ok:
                raise
            return False
        except OperationFailed:
            # An ephemeral one that stops at this moment is deleted by Incus itself.
            if self.instance(name) is not None:
                raise
        if self.instance(name) is not None:
            raise FusecrError(
                f"deletion of {self.name}:{name}", "the server reported success, and it is still there"
            )
        return True

    def put_state(
        self,
        name: str,
        action: str,
        deadline: Deadline | float,
        *,
        stateful: bool = False,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Json:
        """``start``, ``stop``, ``restart``, ``freeze`` or ``unfreeze``, to its end."""
        end = Deadline.of(deadline)
        body = {"action": action, "timeout": max(1, int(end.left)), "force": force, "stateful": stateful}
        return self.run("PUT", f"{_instance(name)}/state", body, end, progress)

    def create_snapshot(
        self,
        name: str,
        snapshot: str,
        deadline: Deadline | float,
        *,
        stateful: bool = False,
        progress: Progress | None = None,
    ) -> Json:
        body = {"name": snapshot, "stateful": stateful}
        return self.run("POST", f"{_instance(name)}/snapshots", body, deadline, progress)

    def snapshot(self, name: str, snapshot: str) -> dict[str, Any] | None:
        """``GET .../snapshots/NAME``, or None if there is none."""
        try:
            return dict(self.get(f"{_instance(name)}/snapshots/{quote(snapshot, safe='')}"))
        except NotFound:
            return None

    def snapshots(self, name: str) -> list[str]:
        """The names of an instance's snapshots."""
        found = self.get(f"{_instance(name)}/snapshots", {"recursion": "1"}) or ()
        return [str(s["name"]).rpartition("/")[2] for s in found]

    def delete_snapshot(
        self, name: str, snapshot: str, deadline: Deadline | float, *, missing_ok: bool = True
    ) -> None:
        try:
            self.run("DELETE", f"{_instance(name)}/snapshots/{quote(snapshot, safe='')}", None, deadline)
        except NotFound:
            if not missing_ok:
                raise

    # Operations

    def operations(self) -> list[dict[str, Any]]:
        """All operations that the server still knows, of this project."""
        groups = self.get("operations", {"recursion": "1"}) or {}
        return [dict(o) for group in groups.values() for o in group or ()]

    def operation(self, identifier: str) -> dict[str, Any] | None:
        """An operation, or None: Incus forgets one a few seconds after its end."""
        try:
            return dict(self.get(f"operations/{quote(identifier, safe='')}"))
        except NotFound:
            return None

    def cancel_operation(self, identifier: str) -> None:
        """Ask for its end; one that is over, or cannot be cancelled, is left alone."""
        try:
            self.delete(f"operations/{quote(identifier, safe='')}")
        except ApiError as e:
            log.debug("cancel of operation %s on %s: %s", identifier, self.name, e)

    # Events

    def events(
        self,
        types: tuple[str, ...] = ("lifecycle",),
        *,
        all_projects: bool = False,
        stop: threading.Event | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The server's events without end; see :func:`incus_fusecr.incus.events.follow`."""
        from .events import follow

        return follow(self.endpoint, types, all_projects=all_projects, stop=stop)


def _instance(name: str) -> str:
    return f"instances/{quote(name, safe='')}"
