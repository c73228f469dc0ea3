# SPDX-License-Identifier: Apache-2.0
"""What all hosts of all labs share, since they run on one kernel, and what of it is set while there is a lab.

fuse.allow_sys_admin_access is the kernel's, not a host's. On real hosts each agent turns it on for as long as a dump lasts;
here two agents, of one lab or of two, would turn it off under each other.
"""

from __future__ import annotations

from pathlib import Path

from .state import STATE_ROOT

PARAMETER = Path("/sys/module/fuse/parameters/allow_sys_admin_access")
BEFORE = STATE_ROOT / "allow_sys_admin_access"  # what it was before the first lab


def prepare() -> None:
    """Before a host starts."""
    if PARAMETER.exists() and not BEFORE.exists():
        BEFORE.parent.mkdir(parents=True, exist_ok=True)
        BEFORE.write_text(PARAMETER.read_text())
    if PARAMETER.exists():
        PARAMETER.write_text("Y")


def restore() -> None:
    """After the last lab."""
    if BEFORE.exists():
        PARAMETER.write_text(BEFORE.read_text())
        BEFORE.unlink()
