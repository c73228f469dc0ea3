# SPDX-License-Identifier: Apache-2.0
"""Which network devices of an instance can go along: pairs of veths on a bridge, under the name that Incus gave them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..checkpoint.survive import Verdict
from ..errors import FusecrError
from ..incus.client import Server
from ..linux import ns, rtnetlink
from ..linux.pidfd import pidfd_open
from ..linux.proc import printable
from ..linux.zygote import JobError, Zygote

BRIDGED = "bridged"
BRIDGE = "bridge"
JOB_SECONDS = 5.0


def look(zygote: Zygote, init: int, server: Server, name: str) -> list[Verdict]:
    """Reasons against carrying the network devices of a running instance over.

    :param server: the local one, of the instance's project
    :raises FusecrError: they could not be looked at
    """

    def network_type(network: str) -> str:
        return str(server.get(f"networks/{network}").get("type", ""))

    try:
        with open(f"/proc/{init}/ns/net") as netns:

            def peer(host: str) -> int:
                return rtnetlink.peer_in(host, netns.fileno()) if rtnetlink.is_name(host) else 0

            return verdicts(server.instance(name) or {}, network_type, peer, inside(zygote, init))
    except (JobError, FileNotFoundError, ProcessLookupError) as error:
        raise FusecrError(f"network devices of {name}", str(error), "try again") from None


def verdicts(
    instance: Mapping[str, Any],
    network_type: Callable[[str], str],
    peer: Callable[[str], int],
    inside: Mapping[int, str],
) -> list[Verdict]:
    """Reasons against carrying an instance's network devices over. Decides; reads nothing by itself.

    :param instance: as Incus shows it
    :param network_type: type of a managed network
    :param peer: index of the other end of a device of this host, 0 if it is not in the container; raises OSError
    :param inside: the container's devices, index -> name
    """
    found = []
    config = instance.get("config") or {}
    for device_name, device in sorted((instance.get("expanded_devices") or {}).items()):
        if device.get("type") not in ("nic", "infiniband"):
            continue
        kind = str(device.get("nictype") or "") if device["type"] == "nic" else "infiniband"
        if not kind and device.get("network"):
            kind = network_type(str(device["network"]))
        what = f"network device {printable(str(device_name))}"
        if kind not in (BRIDGED, BRIDGE):
            found.append(
                Verdict(
                    what,
                    f"is of the kind {kind or 'none'}, and only bridged ones keep their connections",
                    f"replace it by one with nictype=bridged, or take it out for the time: incus config device remove "
                    f"{instance.get('name')} {device_name}",
                )
            )
            continue
        host = str(config.get(f"volatile.{device_name}.host_name") or "")
        name = str(device.get("name") or config.get(f"volatile.{device_name}.name") or device_name)
        try:
            now = inside.get(peer(host)) if host else None
        except OSError:
            now = None
        if now != name:
            # A restore finds the pair that Incus has made by the name inside (liblxc: --external netdev[NAME]:HOST).
            found.append(
                Verdict(
                    what,
                    f"is called {printable(now)} inside and not {name}" if now else f"is not in the container as {name}",
                    f"rename it back: ip link set {printable(now)} name {name}" if now else "restart the instance once",
                )
            )
    return found


def host_names(instance: Mapping[str, Any]) -> list[str]:
    """Host-side devices of an instance's NICs, as Incus records them: of the devices that it has, and of no other key that
    somebody may have written into its configuration.
    """
    config = instance.get("config") or {}
    devices = instance.get("expanded_devices") or {}
    names = (config.get(f"volatile.{name}.host_name") for name, device in sorted(devices.items()) if device.get("type") == "nic")
    return [str(name) for name in names if name]


def inside(zygote: Zygote, init: int) -> dict[int, str]:
    """The network devices of a process's network namespace, index -> name.

    :raises JobError: they could not be listed
    """
    with pidfd_open(init) as pidfd:
        found, _ = zygote.run(f"{__name__}:links_job", {}, [pidfd.fileno()], deadline=JOB_SECONDS)
    return {int(index): str(name) for index, name in found}


def links_job(_args: dict[str, Any], fds: list[int]) -> tuple[Any, list[int]]:
    """fds[0]: pidfd; the result is [[index, name]]"""
    ns.setns(fds[0], ns.CLONE_NEWNET)
    return [[link.index, link.name] for link in rtnetlink.links()], []
