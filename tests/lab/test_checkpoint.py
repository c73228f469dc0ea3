# SPDX-License-Identifier: Apache-2.0
"""Incus' own stateful stop, start, snapshot and pause of containers with unmodified daemons and busy clients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fusecontainer import CLIENTS, Container, modes_of, on, sh, wait_for

pytestmark = pytest.mark.requires_root

MODES = (*CLIENTS, "mapper", "bind")
KINDS = {
    "bindfs": False,
    "sshfs": False,
    "memfs": True,
    "passthrough_fh": True,
    "passthrough_ll": False,
}


@pytest.fixture(scope="module", params=KINDS)
def busy(request: pytest.FixtureRequest, work: Callable[..., Container]) -> Iterator[tuple[Container, str]]:
    """A container with one daemon, unprivileged or privileged, and seven clients."""
    kind = str(request.param)
    container = work(f"ck-{kind.replace('_', '-')}", kind, modes_of(kind, MODES), privileged=KINDS[kind])
    yield container, kind
    container.delete()


def test_snapshot_and_stop_and_restore(busy: tuple[Container, str]) -> None:
    """One container's way: a snapshot while it runs, a stop with its state, a start, and back to the snapshot."""
    container, kind = busy
    container.advances()
    tasks, ids = container.tasks(), container.ids(f"/mnt/{kind}/append/log", f"/mnt/{kind}/writer/slots")

    container.incus("snapshot create --stateful", container.name, "s1")
    container.advances()
    lines = container.reports()[f"mnt-{kind}-append"]["detail"]["lines"]

    container.incus("stop --stateful", container.name)
    assert container.status() == "STOPPED"
    container.incus("start", container.name)
    assert [row["mountpoint"] for row in container.listed()] == [f"/mnt/{kind}"]
    container.advances()
    assert container.tasks() == tasks
    assert container.ids(f"/mnt/{kind}/append/log", f"/mnt/{kind}/writer/slots") == ids
    later = container.reports()[f"mnt-{kind}-append"]["detail"]["lines"]
    assert later > lines

    # Files and processes go back together: a line that only one of them knows would be a hole or a repetition.
    container.incus("snapshot restore --stateful", container.name, "s1")
    assert container.reports()[f"mnt-{kind}-append"]["detail"]["lines"] < later
    container.advances()
    assert container.tasks() == tasks


@pytest.mark.alone
def test_criu_is_let_in_while_a_dump_lasts(small: Callable[..., Container]) -> None:
    """The lab has the kernel's parameter on for all its hosts, real hosts have it off."""
    container = small("ck-knob")
    parameter = Path("/sys/module/fuse/parameters/allow_sys_admin_access")
    before = parameter.read_text()
    parameter.write_text("N")
    try:
        container.incus("snapshot create --stateful", container.name, "s1")
        # Incus is done a moment before the agent has seen that it is.
        wait_for("the parameter's former value", lambda: parameter.read_text().strip() == "N", 10)
    finally:
        parameter.write_text(before)
    container.advances()
    container.delete()


def test_what_changes_underneath_is_seen(work: Callable[..., Container]) -> None:
    """Nothing that was answered in place of the daemon outlives the restore: it validates again by its own rules."""
    container = work("ck-valid", "bindfs", ("reader", "cwd"))
    container.sh("mkdir -p /srv/bindfs/d; echo one > /srv/bindfs/d/f; echo x > /srv/bindfs/d/gone; cat /mnt/bindfs/d/*")
    # An open file and a working directory: recorded, given to the kernel by the placeholder.
    container.sh("cd /mnt/bindfs/d; exec 3</mnt/bindfs/d/f 4</mnt/bindfs/d/gone; setsid sleep 100000 >/dev/null 2>&1 &")
    container.incus("stop --stateful", container.name)
    container.incus("start", container.name)
    container.sh("cd /srv/bindfs/d; echo three more > f; rm gone; echo new > new; chmod 640 f")
    seen = "cat /mnt/bindfs/d/f; ls /mnt/bindfs/d; stat -c %a /mnt/bindfs/d/f; cat /mnt/bindfs/d/gone 2>/dev/null"
    wanted = ["three more", "f", "new", "640"]
    # bindfs lets the kernel keep attributes and entries for a second.
    wait_for(f"{wanted}", lambda: container.sh(seen, code=None).splitlines() == wanted, 10)
    container.advances()


def test_pause_and_resume(small: Callable[..., Container]) -> None:
    """The freezer stops daemons and clients in any order: a client that waits for a frozen daemon could never freeze."""
    container = small("ck-pause")
    for _ in range(10):
        container.incus("pause", container.name)
        assert container.status() == "FROZEN"
        container.incus("resume", container.name)
    container.advances()
    container.delete()


def test_restores_of_unprivileged_containers_never_race(small: Callable[..., Container]) -> None:
    """CRIU's new tasks open the time namespace image before they have any right to its directory."""
    container = small("ck-timens")
    saved = 0
    for _ in range(5):
        container.incus("snapshot create --stateful", container.name, f"s{saved}")
        saved += 1
    for number in range(saved):
        container.incus("snapshot restore --stateful", container.name, f"s{number}")
        assert container.status() == "RUNNING"
    container.advances()
    container.delete()


@pytest.mark.parametrize("privileged", [False, True])
def test_agent_killed_while_criu_dumps(
    small: Callable[..., Container], agent_restarts: Callable[[str], int], privileged: bool
) -> None:
    """The next agent takes over stopped tasks and unanswered connections from the journal."""
    container = small(f"ck-kill-{int(privileged)}", privileged=privileged)
    # Memory that takes CRIU a while to write.
    container.sh("mkdir -p /big && mount -t tmpfs big /big && dd if=/dev/zero of=/big/file bs=1M count=300 2>/dev/null")
    before = agent_restarts("h1")
    journal = "/run/incus-fusecr/journal"
    pid = on("h1", "labctl", "pid", "agent").strip()
    # The helper waits for the dump's journal on the host itself: an order from here would come too late.
    killer = (
        f"i=0; until grep -qs '\"phase\": \"quiet\"' {journal}/dump-*.json; "
        f"do i=$((i+1)); [ $i -gt 6000 ] && exit 9; sleep 0.005; done; kill -9 {pid}"
    )
    stop = f"incus stop --stateful {container.name}; echo stop $?"
    outcome = sh("h1", f"({killer}) & {stop}; wait $!; echo killer $?")
    assert "killer 0" in outcome, outcome
    wait_for("a new agent", lambda: agent_restarts("h1") > before)
    wait_for("its service", lambda: on("h1", "incus-fusecr", "list", "-f", "json", code=None).startswith("["))
    if "stop 0" in outcome:
        assert container.status() == "STOPPED"
        container.incus("start", container.name)
    assert container.status() == "RUNNING"
    container.advances()
    assert sh("h1", f"ls {journal} | grep -c ^dump- || true") == "0"
    container.delete()


def test_a_container_without_fuse(small: Callable[..., Container]) -> None:
    container = small("ck-plain", fuse=False)
    tasks = container.tasks()
    container.incus("stop --stateful", container.name)
    container.incus("start", container.name)
    container.advances()
    assert container.tasks() == tasks and container.listed() == []
    container.delete()


def test_a_stopped_client_stays_stopped(small: Callable[..., Container]) -> None:
    """SIGSTOP by the container's own users is theirs to undo."""
    container = small("ck-stopped")
    pid = container.sh("pidof fsclient").split()[0]
    container.sh(f"kill -STOP {pid}")
    container.incus("stop --stateful", container.name)
    container.incus("start", container.name)
    time.sleep(0.5)
    assert container.sh(f"cut -d' ' -f3 /proc/{pid}/stat") == "T"
    container.sh(f"kill -CONT {pid}")
    container.advances()
    container.delete()
