# SPDX-License-Identifier: Apache-2.0
"""The lab's network: one L2 segment that exists in the lab's own network namespaces only.

The pseudo host `net` holds a bridge; a veth joins each host's bridge `labbr0` to it, so that a container's NIC on
`labbr0` (profile `lan`) keeps its address wherever the container runs. No route leads out of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from .errors import LabError
from .run import run
from .state import NET, Host, Lab

BRIDGE = "labbr0"
UPLINK = "lab0"
FORWARDING, DISABLED = 3, 0


def port(host: str) -> str:
    """The name of a host's port on the bridge of `net`."""
    return f"p-{host}"


def _ip(step: str, host: Host, lines: Sequence[str], tool: str = "ip") -> None:
    # the machine's own ip: it sees the machine's pids, by which the far end of a veth is placed
    argv = ["nsenter", "-t", str(host.pid), "-n", tool, "-batch", "-"]
    run(step, argv, stdin=("\n".join(lines) + "\n").encode(), timeout=20)


def _bridge(address: str) -> list[str]:
    last = int(address.rsplit(".", 1)[1])
    # a fixed MAC: else the bridge takes the lowest of its ports, which changes with each container
    return ["link set lo up", f"link add {BRIDGE} address 02:83:00:00:00:{last:02x} type bridge forward_delay 0",
            f"addr add {address}/24 dev {BRIDGE}", f"link set {BRIDGE} up"]


def setup(lab: Lab) -> None:
    """Make the bridges and the veths between them."""
    hub = lab.hosts[NET]
    _ip("set up the lab's network", hub, _bridge(hub.address))
    for host in lab.incus_hosts:
        _ip(f"connect {host.name} to the lab's network", hub,
            [f"link add {port(host.name)} type veth peer name {UPLINK} netns {host.pid}",
             f"link set {port(host.name)} master {BRIDGE}", f"link set {port(host.name)} up"])
        _ip(f"set up the network of {host.name}", host,
            [*_bridge(host.address), f"link set {UPLINK} master {BRIDGE}", f"link set {UPLINK} up"])


def cut(lab: Lab, names: Sequence[str]) -> None:
    """Cut hosts off, as a pulled cable somewhere in the middle does (their own carrier stays).

    One host: from everybody. Two or more: from each other only, `net` still reaches them.
    """
    ports = _ports(lab, names)
    how = f"state {DISABLED}" if len(ports) == 1 else "isolated on"
    lines = [f"link set dev {p} {how}" for p in ports]
    _ip(f"cut {' and '.join(names)}", lab.hosts[NET], lines, "bridge")


def heal(lab: Lab) -> None:
    """Undo every cut."""
    lines = [f"link set dev {port(h.name)} state {FORWARDING} isolated off" for h in lab.incus_hosts]
    _ip("heal the network", lab.hosts[NET], lines, "bridge")


def _ports(lab: Lab, names: Sequence[str]) -> list[str]:
    for name in names:
        if lab.host(name).name == NET:
            raise LabError("the network's own host cannot be cut; name Incus hosts", 2)
    return [port(name) for name in names]
