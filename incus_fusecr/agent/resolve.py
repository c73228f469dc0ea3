# SPDX-License-Identifier: Apache-2.0
"""What became of a migration on its target, asked by the source's agent when the client is gone.

The host's own remotes are used, and only those: a request may name a target, it cannot make this host connect elsewhere.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..errors import FusecrError
from ..incus.arrival import settle
from ..incus.client import Server
from ..incus.config import Config
from ..incus.mailbox import ProfileMailbox

log = logging.getLogger(__name__)

CONNECT_SECONDS = 3.0
# Higher than a client's; each question of this agent is a new one.
LAST_SEQ = 1_000_000_000


def ask_target(config: Config, target: Mapping[str, Any], migration: str) -> str:
    """``running``: it goes on there. ``aborted``: it certainly does not, and will not. Empty: not known (yet).

    :param target: certificate (fingerprint), project, instance
    """
    server = _open(config, target)
    if server is None:
        return ""
    with server:
        try:
            return settle(server, str(target.get("instance", "")), migration, LAST_SEQ + int(time.monotonic()))
        except FusecrError as error:
            log.info("target of migration %s: %s", migration, error)
            return ""
        finally:
            # Nobody else would remove it: the target may have forgotten this migration long ago.
            with suppress(FusecrError):
                ProfileMailbox(migration).clear(server)


def _open(config: Config, target: Mapping[str, Any]) -> Server | None:
    wanted = str(target.get("fingerprint", ""))
    project = str(target.get("project", "default"))
    for name in config.remotes:
        try:
            server = Server(config.endpoint(name, project), connect_seconds=CONNECT_SECONDS)
        except FusecrError as error:
            log.debug("remote %s: %s", name, error)
            continue
        if wanted and server.environment.get("certificate_fingerprint") == wanted:
            return server
        server.close()
    log.warning("the target (certificate %s) is none of this host's remotes, or cannot be reached", wanted[:16])
    return None
