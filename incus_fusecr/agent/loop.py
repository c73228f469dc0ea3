# SPDX-License-Identifier: Apache-2.0
"""Threads without which the agent only looks alive: it ends when one of them fails, and its supervisor starts the next."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Loop(threading.Thread):
    """One of them (see ``threading.excepthook`` in main.py)."""

    def __init__(self, target: Callable[[], object], name: str) -> None:
        super().__init__(target=target, daemon=True, name=name)
