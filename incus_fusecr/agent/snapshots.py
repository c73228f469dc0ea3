# SPDX-License-Identifier: Apache-2.0
"""A stateful snapshot: Incus copies the file system after CRIU's dump, when the container would run again.

Whatever it writes in between would be in the snapshot's files and unknown to its processes: restored, an appending process
writes the same line once more (Incus leaves it so: a comment in internal/server/instance/drivers/driver_lxc.go snapshot()).
So the tasks that a dump has brought to rest stay there until the operation is over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from ..errors import FusecrError
from ..incus.client import Server
from ..incus.names import split_lxc_name

log = logging.getLogger(__name__)

# internal/server/db/operationtype: SnapshotCreate
SNAPSHOTTING = "Snapshotting instance"
COPY_SECONDS = 600.0
POLL_SECONDS = 0.05


def is_snapshot_of(operation: dict[str, Any], instance: str) -> bool:
    """Whether an operation makes a snapshot of an instance, now."""
    paths = (operation.get("resources") or {}).get("instances") or []
    names = [str(path).split("?")[0].rsplit("/", 1)[-1] for path in paths]
    return operation.get("description") == SNAPSHOTTING and operation.get("status") == "Running" and instance in names


def wait_copied(connect: Callable[[str], Server], container: str, seconds: float = COPY_SECONDS) -> float:
    """Wait while Incus makes a snapshot of a container; none, or an Incus that does not answer, is no reason to wait.

    :param connect: a connection to the local server, for a project
    :param container: liblxc's name
    :returns: seconds that it took
    """
    project, instance = split_lxc_name(container)
    began = time.monotonic()
    try:
        with connect(project) as server:
            while any(is_snapshot_of(o, instance) for o in server.operations()):
                if time.monotonic() - began > seconds:
                    log.error("%s: its snapshot is not done after %.0f s; it goes on", container, seconds)
                    break
                time.sleep(POLL_SECONDS)
    except FusecrError as error:
        log.warning("%s: operations: %s", container, error)
    return time.monotonic() - began
