# SPDX-License-Identifier: Apache-2.0
"""CRIU's command line for a dump, as liblxc would give it (src/lxc/criu.c exec_criu())."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

GHOST_LIMIT = 256 << 20  # bytes; liblxc's value under Incus
LXC_RUN = "/run/incus"


def external_binds(name: str, run: str = LXC_RUN) -> list[str]:
    """Targets of the bind mounts in the container's run-time configuration, each external to CRIU.

    :param name: liblxc's name of the container
    """
    found = []
    with open(os.path.join(run, name, "lxc.conf"), encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            key, _, value = line.partition("=")
            if key.strip() != "lxc.mount.entry":
                continue
            words = value.split()
            if len(words) >= 4 and "bind" in re.split("[,]", words[3]):
                target = words[1].lstrip("/").replace("\\040", " ")
                found += ["--ext-mount-map", f"/{target}:{target}"]
    return found


def held_dump(
    *, criu: str, init: int, images: str, cgroup: str, name: str, action_helper: str, extra: Sequence[str] = ()
) -> list[str]:
    """The dump that waits in its post-dump script.

    :param criu: the program
    :param images: image directory
    :param cgroup: the container's cgroup directory, frozen by CRIU while it seizes the tasks
    """
    return [
        criu,
        "dump",
        "--tcp-established",
        "--file-locks",
        "--link-remap",
        "--manage-cgroups=full",
        "--ext-mount-map",
        "auto",
        "--enable-external-sharing",
        "--enable-external-masters",
        "--enable-fs",
        "hugetlbfs",
        "--enable-fs",
        "tracefs",
        # The default, build ids, maps the file: with its daemon frozen nobody could answer the READ.
        "--file-validation",
        "filesize",
        "--action-script",
        action_helper,
        "-D",
        images,
        "-o",
        os.path.join(images, "dump.log"),
        "-v2",  # errors and warnings; each line is a system call while the container stands still
        *external_binds(name),
        "-t",
        str(init),
        "--skip-in-flight",
        "--freeze-cgroup",
        cgroup,
        "--force-irmap",
        "--ghost-limit",
        str(GHOST_LIMIT),
        *extra,
    ]


def errors_of(log: str, limit: int = 5) -> list[str]:
    """The lines of a CRIU log that tell why it failed."""
    try:
        with open(log, encoding="utf-8", errors="replace") as lines:
            found = [line.strip() for line in lines if "Error" in line and "RLIMIT" not in line]
    except OSError:
        return []
    return [re.sub(r"^\([\d.]+\)\s*", "", line)[:300] for line in found[:limit]]
