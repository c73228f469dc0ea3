# SPDX-License-Identifier: Apache-2.0
"""Keep a container off the network, from the host's side: nothing of a held source or an unconfirmed target answers."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint import sockets
from ..criu.dump_args import LXC_RUN
from ..errors import FusecrError
from ..linux import rtnetlink
from ..linux.pidfd import pidfd_open, wait_exit
from ..linux.proc import printable
from ..linux.rtnetlink import BR_STATE_DISABLED, IFF_UP
from ..linux.zygote import Zygote

log = logging.getLogger(__name__)

SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
_IFREQ = struct.Struct("16sh22x")  # struct ifreq (netdevice(7))
COMMAND_SECONDS = 5.0
MAX_NICS = 64
# CRIU's jumps and chain (criu/net.c iptables_network_lock_internal()): the chain can go only when nothing jumps to it.
UNLOCK = ("*filter\n-D INPUT -j CRIU\n-D OUTPUT -j CRIU\nCOMMIT\n", "*filter\n-F CRIU\n-X CRIU\nCOMMIT\n")
PORT = "port"
LINK = "link"


def flags_of(name: str) -> int:
    """Flags of a device of this network namespace.

    :raises OSError: ENODEV if there is none
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        _, flags = _IFREQ.unpack(fcntl.ioctl(sock, SIOCGIFFLAGS, _IFREQ.pack(os.fsencode(name)[:15], 0)))
        return int(flags)


def set_up(name: str, up: bool) -> None:
    """Set or clear IFF_UP of a device of this network namespace.

    :raises OSError: ENODEV if there is none
    """
    flags = flags_of(name)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        wanted = flags | IFF_UP if up else flags & ~IFF_UP
        fcntl.ioctl(sock, SIOCSIFFLAGS, _IFREQ.pack(os.fsencode(name)[:15], wanted))


@dataclass
class Fence:
    """Host-side ends of a container's network devices that are, or are about to be, shut.

    :ivar doors: name -> how, and the former state of a bridge port
    """

    doors: dict[str, tuple[str, int]] = field(default_factory=dict)

    def plan_source(self, names: Iterable[str], init: int) -> None:
        """A port of a Linux bridge stops forwarding, which nobody in the container notices; others go down. Changes nothing.

        What is down already is left alone, for it has to be so afterwards.

        :param names: as the instance's configuration has them, which is its editors'
        :param init: a process of the container
        :raises FusecrError: one of them does not lead into the container
        """
        with open(f"/proc/{init}/ns/net") as netns:
            for name in names:
                try:
                    inside = rtnetlink.is_name(name) and rtnetlink.peer_in(name, netns.fileno()) > 0
                except OSError as error:
                    log.warning("network device %s: %s", printable(name), error.strerror)
                    continue
                if not inside:
                    raise FusecrError(
                        f"network device {printable(name)}",
                        "is not the other end of one in the container",
                        "the instance's volatile.NAME.host_name is wrong: restart it",
                    )
                self._plan(name)

    def _plan(self, name: str) -> None:
        try:
            state = rtnetlink.port_state(name)
            if not flags_of(name) & IFF_UP:
                return
        except OSError as error:
            log.warning("network device %s: %s", name, error.strerror)
            return
        if state is None:
            self.doors[name] = (LINK, 0)
        elif state != BR_STATE_DISABLED:
            self.doors[name] = (PORT, state)

    def plan_target(self, container: str) -> None:
        """Devices that were made for a container which CRIU is about to restore: all go down. Changes nothing.

        A bridge enables a port by itself as soon as it has carrier, and CRIU's setting the inner end up gives it that.

        :param container: liblxc's name
        """
        self.doors.clear()  # of an earlier attempt
        for peer in inner_links(container):
            try:
                name = socket.if_indextoname(rtnetlink.peer_index(peer))
            except OSError as error:
                log.warning("%s: network device %s has no other end here: %s", container, peer, error.strerror)
                continue
            self.doors[name] = (LINK, 0)

    def close(self) -> None:
        """Shut what is planned; again does no harm.

        :raises OSError: with the device's name: the container might answer
        """
        for name, (how, _) in self.doors.items():
            try:
                if how == PORT:
                    rtnetlink.set_port_state(name, BR_STATE_DISABLED)
                else:
                    set_up(name, False)
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise OSError(error.errno, error.strerror, name) from None

    def open(self) -> None:
        """As it was before."""
        for name, (how, state) in self.doors.items():
            try:
                if how == PORT:
                    rtnetlink.set_port_state(name, state)
                else:
                    set_up(name, True)
            except OSError as error:
                # Without carrier only "disabled" is taken; the bridge enables the port when carrier comes.
                if error.errno != errno.ENETDOWN:
                    log.warning("network device %s: %s", name, error.strerror)
        self.doors.clear()

    def to_dict(self) -> dict[str, Any]:
        return {name: list(door) for name, door in self.doors.items()}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Fence:
        return cls({str(name): (str(how), int(state)) for name, (how, state) in raw.items()})


def inner_links(container: str, run: str = LXC_RUN) -> list[str]:
    """The devices that liblxc was told to move into a container (``lxc.net.N.link``), by their names on the host."""
    with open(os.path.join(run, container, "lxc.conf"), encoding="utf-8", errors="surrogateescape") as lines:
        found = [m[1] for m in (re.fullmatch(r"lxc\.net\.\d+\.link\s*=\s*(\S+)\s*", line) for line in lines) if m]
    return found[:MAX_NICS]


def undo_network_lock(zygote: Zygote, init: int) -> None:
    """What a killed CRIU leaves of its network lock: rules in the container's network namespace, and sockets in repair mode.

    Rules first: leaving repair mode sends a window probe, which they would drop. Each step is tried, nothing is raised: a
    container that has this in its way has it in its own.
    """
    try:
        # Opened while it certainly lives: what follows is about its namespace, whoever has its number then.
        with pidfd_open(init) as pidfd, open(f"/proc/{init}/ns/net") as netns:
            if wait_exit(pidfd, 0):
                return
            for load in ("iptables-restore", "ip6tables-restore"):
                if all([_in_netns(netns.fileno(), [load, "-w", "--noflush"], text) is not None for text in UNLOCK]):
                    log.info("removed CRIU's network lock of pid %d (%s)", init, load)
            for family, table in criu_tables(_in_netns(netns.fileno(), ["nft", "list", "tables"]) or ""):
                _in_netns(netns.fileno(), ["nft", "delete", "table", family, table])
    except OSError as error:
        log.warning("network lock of pid %d: %s", init, error)
    except Exception:
        log.exception("network lock of pid %d", init)
    sockets.repair_off(zygote, init)


def criu_tables(listed: str) -> list[tuple[str, str]]:
    """(family, name) of CRIU's tables (criu/net.c NFTABLES_TABLE ``CRIU-%d``) among ``nft list tables``. Names are the
    container's, and a command of nft goes on after its words: nothing but what CRIU can have written is passed on.
    """
    found = (re.fullmatch(r"table (ip|ip6|inet|arp|bridge|netdev) (CRIU-[0-9]{1,10})", line) for line in listed.split("\n"))
    return [(m[1], m[2]) for m in found if m]


def _in_netns(netns: int, command: list[str], text: str | None = None) -> str | None:
    """Run a host's command in a network namespace alone; None if it is not installed or fails."""
    program = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        return None
    try:
        result = subprocess.run(
            ["nsenter", f"--net=/proc/self/fd/{netns}", program, *command[1:]],
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=COMMAND_SECONDS,
            check=False,
            pass_fds=[netns],
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("%s: %s", command[0], error)
        return None
    return result.stdout if result.returncode == 0 else None
