# SPDX-License-Identifier: Apache-2.0
"""Names as Incus writes and checks them."""

from __future__ import annotations

import re

DEFAULT_PROJECT = "default"

# internal/instance.ValidName: a host name label; the first character a letter, the last one not a dash.
_INSTANCE = re.compile(r"[A-Za-z](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?", re.ASCII)

# internal/server/project.separator: so liblxc, cgroups and storage pools name an instance of another project.
_SEPARATOR = "_"


def instance_name_fault(name: str) -> str:
    """Why ``name`` is no instance name, or the empty string.

    Rules: ``internal/instance.ValidName`` of Incus.
    """
    if not name:
        return "the name is empty"
    if len(name) > 63:
        return "the name has more than 63 characters"
    if not _INSTANCE.fullmatch(name):
        return "only letters, digits and dashes; a letter comes first, a dash not last"
    return ""


def lxc_name(project: str, instance: str) -> str:
    """The name of an instance in liblxc, ``/run/incus`` and ``lxc.payload.*``: bare in the default project,
    ``PROJECT_INSTANCE`` elsewhere (``project.Instance`` of Incus)."""
    return instance if project == DEFAULT_PROJECT else f"{project}{_SEPARATOR}{instance}"


def split_lxc_name(name: str) -> tuple[str, str]:
    """The reverse of :func:`lxc_name`: (project, instance). A project's name may hold an underscore,
    an instance's may not, so the last one separates (``project.InstanceParts``)."""
    project, found, instance = name.rpartition(_SEPARATOR)
    return (project, instance) if found else (DEFAULT_PROJECT, name)
