# SPDX-License-Identifier: Apache-2.0
"""Which namespaces have to be worked on one after the other, and in which order."""

from __future__ import annotations

from dataclasses import dataclass

from ..linux.fd import Fd
from ..linux.mount import Mount
from .namespaces import Namespace
from .plan import Device, View, device, peer_group


@dataclass
class Visit:
    """A namespace, and what was read of it."""

    namespace: Namespace
    fd: Fd
    view: View
    old: list[Mount]

    @property
    def devices(self) -> frozenset[Device]:
        return frozenset(device(m) for m in self.old)

    def groups(self, kind: str) -> set[int]:
        """Peer groups of what the old mounts hang on: ``shared`` sends and receives, ``master`` receives."""
        return {peer_group(self.view.parent(m), kind) for m in self.old} - {0}


def families(visits: list[Visit], host: int) -> list[list[Visit]]:
    """Namespaces between which mounts propagate have to be worked on one after the other, who sends before who receives."""
    leader = list(range(len(visits)))  # union-find

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    first: dict[int, int] = {}
    for index, visit in enumerate(visits):
        for group in visit.groups("shared") | visit.groups("master"):
            leader[find(index)] = find(first.setdefault(group, index))
    found: dict[int, list[Visit]] = {}
    for index, visit in enumerate(visits):
        found.setdefault(find(index), []).append(visit)
    sender: dict[int, int] = {}
    for visit in visits:
        for mount in visit.old:
            parent = visit.view.parent(mount)
            if group := peer_group(parent):
                sender[group] = peer_group(parent, "master")

    def depth(visit: Visit) -> int:
        longest = 0
        for start in visit.groups("master"):
            group, steps = start, 1
            while (group := sender.get(group, 0)) and steps < len(sender) + 1:
                steps += 1
            longest = max(longest, steps)
        return longest

    return [sorted(family, key=lambda v: (v.namespace.number != host, depth(v))) for family in found.values()]
