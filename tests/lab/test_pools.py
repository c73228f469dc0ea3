# SPDX-License-Identifier: Apache-2.0
"""From a pool into another one, of another driver, and between two of btrfs: there Incus' own move loses what is written
between its two passes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator

import pytest
from fusecontainer import PLACE, Container, on, sh
from test_migrate import OTHER, hop

pytestmark = pytest.mark.requires_root
POOL = "second"


@pytest.fixture(scope="module")
def btrfs(containers_gone: list[Container]) -> Iterator[str]:
    """A pool of btrfs beside the lab's own, on both hosts."""
    for host in OTHER:
        on(host, "incus", "storage", "create", "-q", POOL, "btrfs", "size=1GiB")
    yield POOL
    for container in containers_gone:
        container.delete()
    for host in OTHER:
        on(host, "incus", "storage", "delete", POOL)


def pool_of(container: Container) -> tuple[str, list[str]]:
    """Pool of its root disk, and its snapshots."""
    found = json.loads(on(container.host, "incus", "query", f"/1.0/instances/{container.name}?recursion=1"))
    return found["expanded_devices"]["root"]["pool"], [s["name"] for s in found.get("snapshots") or ()]


def test_no_line_is_lost_between_pools(small: Callable[..., Container], btrfs: str) -> None:
    """Into btrfs, between two of it, where a common snapshot carries the difference, and out of it."""
    container = small("pl-hops")
    container.sh("mkdir /root/fast")
    container.client("append", "/root/fast", "--pace-ms", "2", program=f"{PLACE}/fsclient")
    assert len(container.logs) == 2
    assert hop(container, "--storage", btrfs)["plan"][0].startswith("copy")
    assert pool_of(container) == (btrfs, [])
    report = hop(container)
    assert report["plan"][0].startswith("snapshot")
    assert pool_of(container) == (btrfs, [])
    hop(container, "--storage", "default")
    assert pool_of(container) == ("default", [])
    lines = int(container.sh("wc -l < /root/fast/append/log"))
    assert lines > container.reports()["mnt-fh-append"]["detail"]["lines"], "as fast as it was meant to be"
    container.delete()


def test_a_pool_that_is_too_small(small: Callable[..., Container], btrfs: str) -> None:
    """Memory of the tasks that no file has: it has to fit into the pool, as the dump."""
    container = small("pl-room", fuse=False)
    tiny = "tiny"
    on("h2", "incus", "storage", "create", "-q", tiny, "btrfs", "size=150MiB")
    try:
        assert container.migrate("h2:", "--dry-run", "--storage", tiny)["outcome"] == "planned"
        # A shell that keeps 200 MB in a variable.
        fill = "x=$(head -c 200000000 /dev/zero | tr '\\0' x); : > /root/ready; sleep 100000; echo $x"
        container.sh(f"setsid sh -c {shlex.quote(fill)} >/dev/null 2>&1 &")
        container.sh("i=0; until [ -e /root/ready ]; do i=$((i+1)); [ $i -gt 300 ] && exit 9; sleep 0.1; done")
        report = container.migrate("h2:", "--storage", tiny, code=3)
        (refusal,) = (v for v in report["verdicts"] if v["level"] == "refuse")
        assert refusal["what"] == f"storage pool {tiny}" and "of memory) may need" in refusal["why"]
        assert sh("h2", "incus list -f csv -c n ^pl-room$") == ""
        container.advances()
    finally:
        on("h2", "incus", "storage", "delete", tiny)
    container.delete()
