# SPDX-License-Identifier: Apache-2.0
"""Capabilities of the calling thread (capabilities(7)): capset(2), bounding set, ambient set."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

from .libc import check, libc, prctl
from .proc import read_text

CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_SYS_ADMIN = 21

PR_SET_KEEPCAPS = 8
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class CapSets:
    """The five sets as bit masks, as /proc/PID/status shows them (CapInh, CapPrm, CapEff, CapBnd, CapAmb)."""

    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int


def of_status(status: dict[str, str]) -> CapSets:
    """The sets in a parsed /proc/PID/status (linux/proc.py status())."""
    return CapSets(*(int(status[key], 16) for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")))


def last_cap() -> int:
    """The highest capability that this kernel knows."""
    return int(read_text("/proc/sys/kernel/cap_last_cap"))


def capset(permitted: int, effective: int, inheritable: int) -> None:
    """capset(2) of the calling thread."""
    header = struct.pack("<Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    data = b"".join(
        struct.pack("<III", effective >> shift & _MASK, permitted >> shift & _MASK, inheritable >> shift & _MASK)
        for shift in (0, 32)
    )
    check(int(libc.capset(header, data)), "capset")


def capget() -> tuple[int, int, int]:
    """(permitted, effective, inheritable) of the calling thread (capget(2))."""
    header = struct.pack("<Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    check(int(libc.capget(header, data)), "capget")
    low, high = struct.unpack_from("<III", data, 0), struct.unpack_from("<III", data, 12)
    effective, permitted, inheritable = (one | two << 32 for one, two in zip(low, high, strict=True))
    return permitted, effective, inheritable


def limit_bounding(allowed: int, last: int) -> None:
    """Drop every capability up to number ``last`` that is not in ``allowed`` from the bounding set
    (CAP_SETPCAP).
    """
    for cap in range(last + 1):
        if not allowed >> cap & 1 and prctl(PR_CAPBSET_READ, cap):
            prctl(PR_CAPBSET_DROP, cap)


def set_ambient(ambient: int, last: int) -> None:
    """Make the ambient set ``ambient``; each must be permitted and inheritable already."""
    check(int(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)), "PR_CAP_AMBIENT_CLEAR_ALL")
    for cap in range(last + 1):
        if ambient >> cap & 1:
            raised = libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, ctypes.c_ulong(cap), 0, 0)
            check(int(raised), f"PR_CAP_AMBIENT_RAISE {cap}")
