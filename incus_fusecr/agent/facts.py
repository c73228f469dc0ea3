# SPDX-License-Identifier: Apache-2.0
"""What this host can do: facts that the other side's preflight compares."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Any

from .. import __version__
from ..checkpoint import knob
from ..checkpoint.restore import ACTION_HELPER
from ..errors import FusecrError
from ..fuse import connection, initprobe

PLUGIN = "/usr/lib/criu/fusecr.so"
CRIU_SECONDS = 5.0
# Without it every container looks as if it had no FUSE daemon.
NAMES_CONNECTIONS = "kernel that names the FUSE connection of a descriptor (fuse_connection in fdinfo)"


def criu_version() -> str:
    """``4.1.1``, empty if CRIU is not installed."""
    program = shutil.which("criu", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        return ""
    try:
        text = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=CRIU_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(r"Version: (\S+)", text)
    return match[1] if match else ""


def finds_daemons() -> bool:
    """Whether this kernel tells which processes serve FUSE. Where there is no FUSE at all, none does."""
    try:
        return initprobe.kernel().names_connections
    except FusecrError:
        return not os.path.exists("/dev/fuse")


def facts() -> dict[str, Any]:
    """Versions, and what is missing on this host with what to do about it."""
    uname = os.uname()
    kernel = initprobe.kernel()
    missing = []

    def need(there: bool, what: str, hint: str) -> None:
        if not there:
            missing.append({"what": what, "hint": hint})

    version = criu_version()
    need(bool(version), "criu", "apt install criu")
    need(os.path.exists(PLUGIN), f"CRIU plugin {PLUGIN}", "make -C incus_fusecr/criu install")
    need(os.access(ACTION_HELPER, os.X_OK), f"action helper {ACTION_HELPER}", "make -C incus_fusecr/criu install")
    need(os.path.isdir(connection.FUSECTL), "fusectl", f"mount -t fusectl fusectl {connection.FUSECTL}")
    need(kernel.names_connections, NAMES_CONNECTIONS, "Linux 6.16 or later")
    need(os.path.exists(knob.PARAMETER), "kernel parameter fuse.allow_sys_admin_access", "Linux 6.0 or later")
    need(os.path.exists("/dev/fuse"), "/dev/fuse", "modprobe fuse")
    need(bool(shutil.which("iptables-save", path="/usr/sbin:/sbin:/usr/bin")), "iptables", "apt install iptables")
    return {
        "version": __version__,
        "kernel": uname.release,
        "machine": uname.machine,
        "criu": version,
        "fuse_init": {"request": kernel.request.raw.hex()},
        "missing": missing,
    }
