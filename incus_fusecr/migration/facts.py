# SPDX-License-Identifier: Apache-2.0
"""A host's facts, asked of its agent in the way that this client's rights allow."""

from __future__ import annotations

from typing import Any

from ..incus.ask import ask_host
from ..incus.client import Server
from ..incus.conversation import ask_without_instance
from ..incus.failures import Forbidden

SECONDS = 15.0


def host_facts(server: Server, seconds: float = SECONDS) -> dict[str, Any]:
    """Versions, and what is missing. A client that is confined to a project may not write the server's keys; the profile
    by which it would speak to the agent in a migration is as good.

    :raises AgentSilent: no agent answers there
    :raises Forbidden: this client may do neither
    """
    try:
        return dict(ask_host(server, "facts", deadline=seconds))
    except Forbidden:
        return dict(ask_without_instance(server, "facts", seconds).data)
