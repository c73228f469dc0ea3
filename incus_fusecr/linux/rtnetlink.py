# SPDX-License-Identifier: Apache-2.0
"""The few messages of rtnetlink(7) that are needed, for the caller's network namespace."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .proc import read_text

RTM_NEWLINK = 16
RTM_GETLINK = 18
RTM_SETLINK = 19
RTM_NEWADDR = 20
RTM_GETADDR = 22
RTM_NEWROUTE = 24
RTM_NEWNSID = 88
RTM_GETNSID = 90
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF
IFLA_ADDRESS = 1
IFLA_IFNAME = 3
IFLA_LINK = 5
IFLA_PROTINFO = 12
IFLA_LINK_NETNSID = 37
IFLA_BRPORT_STATE = 1
NETNSA_NSID = 1
NETNSA_FD = 3
IFA_ADDRESS = 1
IFA_LOCAL = 2
IFA_FLAGS = 8
IFA_F_NODAD = 0x02
AF_BRIDGE = 7
IFF_UP = 0x1
IFF_BROADCAST = 0x2
# net/bridge/br_private.h: what IFLA_BRPORT_STATE and sysfs brport/state count.
BR_STATE_DISABLED = 0
BR_STATE_FORWARDING = 3

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
IFINFOMSG = struct.Struct("=BxHiII")
IFADDRMSG = struct.Struct("=BBBBI")
ATTRIBUTE = struct.Struct("=HH")
RECEIVE = 1 << 18
SECONDS = 2.0
# A container may have as many addresses as it likes; nobody waits for all of them.
MAX_MESSAGES = 4096


@dataclass(frozen=True)
class Link:
    """A network device."""

    index: int
    name: str
    flags: int
    address: bytes


@dataclass(frozen=True)
class Address:
    """An address of the device with that index; ``family`` AF_INET or AF_INET6."""

    index: int
    family: int
    address: bytes


def messages(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(type, begin, end) of each whole message, header excluded."""
    at = 0
    while at + HEADER.size <= len(data):
        size, kind, *_ = HEADER.unpack_from(data, at)
        if size < HEADER.size or at + size > len(data):
            return
        yield kind, at + HEADER.size, at + size
        at += (size + 3) & ~3


def attributes(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(type, begin, end) of each whole attribute, header excluded."""
    while begin + ATTRIBUTE.size <= end:
        size, kind = ATTRIBUTE.unpack_from(data, begin)
        if size < ATTRIBUTE.size or begin + size > end:
            return
        yield kind & NLA_TYPE_MASK, begin + ATTRIBUTE.size, begin + size
        begin += (size + 3) & ~3


def request(kind: int, flags: int, body: bytes) -> list[tuple[int, bytes]]:
    """Send one request; the answers, without their headers.

    :raises OSError: what the kernel answers; TimeoutError if it does not
    """
    found: list[tuple[int, bytes]] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(SECONDS)
        sock.send(HEADER.pack(HEADER.size + len(body), kind, flags | NLM_F_REQUEST, 1, 0) + body)
        while len(found) < MAX_MESSAGES:
            data = sock.recv(RECEIVE)
            for answer, begin, end in messages(data):
                if answer == NLMSG_DONE:
                    return found
                if answer == NLMSG_ERROR:
                    (code,) = struct.unpack_from("=i", data, begin)
                    if code:
                        raise OSError(-code, os.strerror(-code), f"rtnetlink request {kind}")
                    return found
                found.append((answer, data[begin:end]))
    return found


def links() -> list[Link]:
    """All network devices."""
    found = []
    for kind, body in request(RTM_GETLINK, NLM_F_DUMP, IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        if kind == RTM_NEWLINK and len(body) >= IFINFOMSG.size:
            _, _, index, flags, _ = IFINFOMSG.unpack_from(body)
            values = {a: body[b:e] for a, b, e in attributes(body, IFINFOMSG.size, len(body))}
            name = os.fsdecode(values.get(IFLA_IFNAME, b"").rstrip(b"\0"))
            found.append(Link(index, name, flags, values.get(IFLA_ADDRESS, b"")))
    return found


def addresses() -> list[Address]:
    """All addresses."""
    found = []
    for kind, body in request(RTM_GETADDR, NLM_F_DUMP, IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        if kind == RTM_NEWADDR and len(body) >= IFADDRMSG.size:
            family, _, _, _, index = IFADDRMSG.unpack_from(body)
            values = {a: body[b:e] for a, b, e in attributes(body, IFADDRMSG.size, len(body))}
            # With a peer address IFA_ADDRESS is the peer's (include/uapi/linux/if_addr.h).
            address = values.get(IFA_LOCAL) or values.get(IFA_ADDRESS) or b""
            if len(address) == {socket.AF_INET: 4, socket.AF_INET6: 16}.get(family, -1):
                found.append(Address(index, family, address))
    return found


def set_port_state(name: str, state: int) -> None:
    """State of a port of a Linux bridge (net/bridge/br_netlink.c br_set_port_state()).

    :raises OSError: EBUSY with STP on; ENETDOWN for any but disabled while there is no carrier
    """
    state_attribute = ATTRIBUTE.pack(5, IFLA_BRPORT_STATE) + bytes([state, 0, 0, 0])
    body = IFINFOMSG.pack(AF_BRIDGE, 0, socket.if_nametoindex(name), 0, 0)
    body += ATTRIBUTE.pack(ATTRIBUTE.size + len(state_attribute), IFLA_PROTINFO | NLA_F_NESTED) + state_attribute
    try:
        request(RTM_SETLINK, NLM_F_ACK, body)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), name) from None


def port_state(name: str) -> int | None:
    """State of a bridge port that may be set by hand; None if it is none, or its bridge runs STP."""
    try:
        if read_text(f"/sys/class/net/{name}/master/bridge/stp_state").strip() != "0":
            return None
        return int(read_text(f"/sys/class/net/{name}/brport/state"))
    except FileNotFoundError:
        return None


def peer_index(name: str) -> int:
    """Index of a veth's other end, in whatever network namespace that is; 0 for a device without one."""
    index, peer = (int(read_text(f"/sys/class/net/{name}/{what}")) for what in ("ifindex", "iflink"))
    return 0 if index == peer else peer


def is_name(name: str) -> bool:
    """Whether a device could have this name (net/core/dev.c dev_valid_name())."""
    raw = os.fsencode(name)
    return 0 < len(raw) < 16 and name not in (".", "..") and not any(c in b"/:" or chr(c).isspace() for c in raw)


def nsid(netns: int) -> int:
    """The number by which this network namespace knows the one behind a descriptor; -1 if it has none for it."""
    body = bytes(4) + ATTRIBUTE.pack(8, NETNSA_FD) + struct.pack("=i", netns)
    for kind, answer in request(RTM_GETNSID, NLM_F_ACK, body):
        if kind == RTM_NEWNSID:
            for attribute, begin, end in attributes(answer, 4, len(answer)):
                if attribute == NETNSA_NSID:
                    return int(struct.unpack("=i", answer[begin:end])[0])
    return -1


def peer_in(name: str, netns: int) -> int:
    """Index of a device's other end, if that is in the network namespace behind a descriptor (and not in this one); else 0.

    An index alone says nothing: each network namespace counts its own.

    :raises OSError: there is no such device
    """
    peer, where = 0, -1
    body = IFINFOMSG.pack(socket.AF_UNSPEC, 0, socket.if_nametoindex(name), 0, 0)
    for kind, answer in request(RTM_GETLINK, NLM_F_ACK, body):
        if kind == RTM_NEWLINK:
            for attribute, begin, end in attributes(answer, IFINFOMSG.size, len(answer)):
                if attribute in (IFLA_LINK, IFLA_LINK_NETNSID):
                    (value,) = struct.unpack("=i", answer[begin:end])
                    peer, where = (value, where) if attribute == IFLA_LINK else (peer, value)
    return peer if where >= 0 and where == nsid(netns) else 0
