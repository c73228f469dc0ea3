# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests on a real kernel."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import daemons
import pytest
from holder_box import Holder, Manager
from sandbox import Sandbox
from swapbox import SwapBox

from incus_fusecr.linux.fd import Fd


@pytest.fixture
def made(sandbox: Callable[..., Sandbox], compiled: Callable[[str], Path], request: pytest.FixtureRequest) -> Iterator[SwapBox]:
    kind = getattr(request, "param", "bindfs")
    with contextlib.ExitStack() as undo:
        box = sandbox()
        if kind in daemons.PROGRAMS:
            shutil.copy(compiled(kind), box.workload / kind)
        yield SwapBox.open(undo, box, kind)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Callable[..., Holder]]:
    """``box(systemd=False)``: a holder that serves."""
    undo = contextlib.ExitStack()

    def make(systemd: bool = False, environment: dict[str, str] | None = None) -> Holder:
        manager = Manager(tmp_path) if systemd else None
        if manager:
            undo.callback(manager.close)
        holder = Holder(tmp_path, manager)
        undo.callback(holder.close)
        holder.start(environment)
        return holder

    with undo:
        yield make


@pytest.fixture
def pipe() -> Iterator[Callable[[], tuple[Fd, Fd]]]:
    with contextlib.ExitStack() as undo:

        def make() -> tuple[Fd, Fd]:
            r, w = (undo.enter_context(Fd(number)) for number in os.pipe())
            return r, w

        yield make
