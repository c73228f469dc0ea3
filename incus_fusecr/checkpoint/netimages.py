# SPDX-License-Identifier: Apache-2.0
"""Two things in CRIU's network images that the kernel of the target would stumble over, set right before CRIU reads them.

``ifaddr-N.img`` and ``route-N.img`` are what ``ip addr save`` and ``ip route save`` wrote: a magic number (iproute2,
ip/ipaddress.c and ip/iproute.c), then rtnetlink messages. They came from another host: what is not understood stays as it is.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import stat
import struct

from ..linux import rtnetlink
from ..linux.fd import Fd

log = logging.getLogger(__name__)

IMAGE = re.compile(r"(ifaddr|route6?)-\d{1,10}\.img")
MAGIC = {"ifaddr": 0x47361222, "route": 0x45311224, "route6": 0x45311224}
MAX_IMAGES = 256
MAX_SIZE = 16 << 20  # bytes
# include/uapi/linux/rtnetlink.h
RTNH_F_DEAD = 1
RTNH_F_LINKDOWN = 16
RTMSG_SIZE = 12
RTM_FLAGS_AT = 8
IFA_FLAGS_AT = 2


def patch(imgdir: int) -> int:
    """Patch all network images of a directory; returns how many messages were changed.

    :param imgdir: descriptor of CRIU's image directory
    :raises OSError: an image could not be read or written
    """
    names = sorted(name for name in os.listdir(imgdir) if IMAGE.fullmatch(name))
    return sum(_patch_file(imgdir, name) for name in names[:MAX_IMAGES])


def _patch_file(imgdir: int, name: str) -> int:
    with Fd(os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=imgdir), name) as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1 or info.st_size > MAX_SIZE:
            log.warning("%s is not a plain file of a usual size: left as it is", name)
            return 0
        data = bytearray(os.pread(file.fileno(), MAX_SIZE, 0))
        changed = patched(data, MAGIC[name.partition("-")[0]])
        if changed:
            os.pwrite(file.fileno(), data, 0)
        return changed


def patched(data: bytearray, magic: int) -> int:
    """Patch an image in place; returns the number of messages that were changed.

    IPv6 addresses get IFA_F_NODAD: for the second or two of duplicate address detection in a new network namespace nobody
    may bind to an address (net/ipv6/af_inet6.c), so that CRIU could not restore a connection. There is no duplicate: the
    source is shut off, and ends. Routes lose RTNH_F_LINKDOWN and RTNH_F_DEAD, which the kernel sets by itself and refuses
    from others (net/ipv4/fib_semantics.c fib_create_info()).
    """
    if len(data) < 4 or struct.unpack_from("<I", data)[0] != magic:
        return 0
    changed = 0
    body = bytes(data[4:])
    for kind, begin, end in rtnetlink.messages(body):
        at = 4 + begin
        if kind == rtnetlink.RTM_NEWADDR and end - begin >= rtnetlink.IFADDRMSG.size and data[at] == socket.AF_INET6:
            data[at + IFA_FLAGS_AT] |= rtnetlink.IFA_F_NODAD
            for attribute, first, last in rtnetlink.attributes(body, begin + rtnetlink.IFADDRMSG.size, end):
                # Where it is present it is what counts; its lowest byte comes first (x86_64 and aarch64).
                if attribute == rtnetlink.IFA_FLAGS and last - first == 4:
                    data[4 + first] |= rtnetlink.IFA_F_NODAD
            changed += 1
        elif kind == rtnetlink.RTM_NEWROUTE and end - begin >= RTMSG_SIZE:
            before = data[at + RTM_FLAGS_AT]
            data[at + RTM_FLAGS_AT] &= ~(RTNH_F_DEAD | RTNH_F_LINKDOWN) & 0xFF
            changed += data[at + RTM_FLAGS_AT] != before
    return changed
