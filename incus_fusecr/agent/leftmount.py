# SPDX-License-Identifier: Apache-2.0
"""What an incusd that was killed left mounted on an instance's directory, which it can then neither delete nor rename (EBUSY).

While it writes there, or reads a saved state, Incus has the directory bound to itself with ``nosymfollow``; the next incusd knows
nothing of that.
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Iterable

from ..linux.mount import Mount, mountinfo, umount2

log = logging.getLogger(__name__)

UMOUNT_NOFOLLOW = 8
_KINDS = ("containers", "virtual-machines")


def bound_to_themselves(mounts: Iterable[Mount], name: str) -> list[str]:
    """Mountpoints of the directory of an instance that show just what they cover; the topmost first.

    :param name: as the directory is called: ``PROJECT_NAME`` outside of the default project
    """
    by_id = {m.id: m for m in mounts}
    found = []
    for m in by_id.values():
        parts = m.mountpoint.split("/")
        if len(parts) < 4 or parts[-1] != name or parts[-2] not in _KINDS or parts[-4] != "storage-pools":
            continue
        below = by_id.get(m.parent)
        if below is None or (below.major, below.minor) != (m.major, m.minor) or "nosymfollow" not in m.options.split(","):
            continue
        covered = posixpath.normpath(below.root.rstrip("/") + "/" + posixpath.relpath(m.mountpoint, below.mountpoint))
        if m.root == covered:
            found.append(m.mountpoint)
    return found[::-1]


def there(name: str) -> bool:
    """Whether there are any in our mount namespace, which is incusd's."""
    return bool(bound_to_themselves(mountinfo("self"), name))


def take_away(name: str) -> bool:
    """Unmount them. What is in use stays (EBUSY): somebody works there.

    :returns: whether there was one, and none is left
    """
    found = bound_to_themselves(mountinfo("self"), name)
    for path in found:
        try:
            umount2(path, UMOUNT_NOFOLLOW)
        except OSError as error:
            log.warning("%s: mounted by an incusd that has ended: %s", path, error.strerror)
            return False
        log.warning("%s: unmounted; an incusd that has ended had it mounted", path)
    return bool(found)
