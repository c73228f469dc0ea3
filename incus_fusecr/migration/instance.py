# SPDX-License-Identifier: Apache-2.0
"""What an instance must be before anything is begun with it."""

from __future__ import annotations

from typing import Any

from ..errors import Refused
from ..incus.client import Server

RUNNING = "Running"
STOPPED = "Stopped"


def require_container(server: Server, name: str) -> dict[str, Any]:
    """The instance. :raises UsageError: there is none. :raises Refused: it is a virtual machine"""
    found = server.require_instance(name)
    if found.get("type", "container") != "container":
        raise Refused(
            f"{server}:{name} is a virtual machine",
            "its FUSE daemons are its own kernel's affair",
            "move it with: incus move",
        )
    return found


def require_running_container(server: Server, name: str) -> dict[str, Any]:
    """The instance. :raises UsageError: there is none. :raises Refused: not a container, or it does not run"""
    found = require_container(server, name)
    status = str(found.get("status", ""))
    if status != RUNNING:
        hint = (
            f"start it with: incus start {server}:{name}" if status == STOPPED else f"it is {status.lower()}"
        )
        raise Refused(f"{server}:{name} is not running", f"its status is {status}", hint)
    return found
