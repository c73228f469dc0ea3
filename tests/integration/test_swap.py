# SPDX-License-Identifier: Apache-2.0
"""The swap of real mounts in real namespaces: nobody who reads sees a gap, and nothing else changes."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import time
from pathlib import Path

import pytest
from sandbox import wait_for
from swapbox import BINDS, Container, Reader, SwapBox, shape, swapped_shape

from incus_fusecr.linux import mountapi
from incus_fusecr.linux.mount import mountinfo
from incus_fusecr.recovery.hostmount import State, attach, look
from incus_fusecr.recovery.plan import Beneath
from incus_fusecr.recovery.swap import Host

pytestmark = [pytest.mark.requires_daemon("bindfs"), pytest.mark.requires_command("unshare", "nsenter")]


@pytest.mark.parametrize(
    "made", [pytest.param(k, marks=pytest.mark.requires_daemon(k)) for k in ("bindfs", "passthrough_fh")], indirect=True
)
def test_every_namespace(made: SwapBox) -> None:
    """Files and directories, three containers and the host; afterwards the old connection ends."""
    containers = [made.container() for _ in range(3)]
    for c in containers:
        c.binds(made.old.mountpoint, *BINDS)
        assert c(f"cat {c.place}/proc/meminfo") == "old proc/meminfo"
    tables = [swapped_shape(made, c) for c in containers]
    noted: dict[int, str] = {}
    olds = {m.id: m.root for c in containers for m in c.mounts() if m.minor == made.old.connection and m.major == 0}
    report = made.swap(made.swapper(record=lambda device, roots: noted.update(roots)))
    assert report.finished and not report.errors and not report.left and report.remaining == 0
    # the host's, three copies of it and nine binds in the containers; the host's is detached at the end
    assert report.done == {"swapped": 12, "detached": 1}
    assert olds.items() <= noted.items()
    for c, table in zip(containers, tables, strict=True):
        assert c(f"cat {c.place}/proc/meminfo {c.place}/sys/cpu/online {made.old.mountpoint}/top").split("\n") == [
            "fresh proc/meminfo", "fresh sys/cpu/online", "fresh top"]
        assert shape(c.mounts(), {}) == table
        assert made.count(c, made.old) == 0
    control = Path(f"/proc/{made.box.process.pid}/root{made.box.directory}/ctl/{made.old.connection}")
    wait_for(lambda: not control.exists(), "end of the old connection")
    # its number is free, and may be another file system's
    for c in containers:
        c(f"for n in 1 2 3 4 5 6 7 8; do mkdir -p {c.place}/n$n; mount -t tmpfs n {c.place}/n$n; done")
    again = made.swap()
    assert again.finished and again.passes == 1 and not again.done


def test_the_old_daemon_is_never_asked(made: SwapBox) -> None:
    """It is stopped, and all that was cached is stale: a look-up below it would wait for ever."""
    c = made.container()
    c.binds(made.old.mountpoint, *BINDS)
    time.sleep(1.5)
    os.kill(made.old.pid, signal.SIGSTOP)
    report = made.swap()
    assert report.finished and not report.errors and made.count(c, made.old) == 0
    assert c(f"cat {c.place}/proc/uptime") == "fresh proc/uptime"


def test_flags_stay(made: SwapBox) -> None:
    wanted = {"a": "ro,noexec", "b": "noatime,nosuid", "c": "nodiratime,nodev", "d": "strictatime,suid,dev", "e": "nosymfollow"}
    c = made.container()
    c(f"mkdir -p {c.place} && mount -t tmpfs ct {c.place}")
    for name, flags in wanted.items():
        place = f"{c.place}/{name}"
        c(f"mkdir {place} && mount --bind {made.old.mountpoint} {place} && mount -o remount,bind,{flags} {place}")
    before = {name: c.at(c.place / name)[0].options for name in wanted}
    assert len(set(before.values())) == len(wanted)
    assert not made.swap().errors
    assert {name: c.at(c.place / name)[0].options for name in wanted} == before
    assert made.count(c, made.old) == 0
    code, output = c.attempt(f"touch {c.place}/a/x")
    assert code and "Read-only" in output


def groups(containers: list[Container], places: list[Path | str]) -> list[tuple[str, ...]]:
    """The propagation of mounts, peer groups numbered in the order of their appearance."""
    numbers: dict[str, int] = {}
    found = []
    for c in containers:
        for mount in (m for place in places for m in c.at(place)):
            words = []
            for word in mount.propagation:
                kind, colon, number = word.partition(":")
                words.append(kind + (f":{numbers.setdefault(number, len(numbers))}" if colon else ""))
            found.append(tuple(words))
    return found


def test_propagation_stays(made: SwapBox) -> None:
    """The host shares; one container receives, another is private, a third has peers and a receiver of its own."""
    top = made.old.mountpoint
    host = made.container("unchanged")
    host(f"mount --make-shared {top}")
    slave, private = (made.container(kind, host) for kind in ("slave", "private"))
    for c in (slave, private):
        c.binds(top, *BINDS)
    slave(f"mount --make-shared {slave.place}/proc/uptime; mount --make-unbindable {slave.place}/sys")
    child = made.container("unchanged", slave)
    child(f"mount --make-slave {child.place}/proc/uptime")
    everybody = [host, slave, private, child]
    places: list[Path | str] = [top, *(slave.place / path for path in BINDS)]
    before = groups(everybody, places)
    assert len({words for words in before}) >= 5, before
    with host.namespace() as namespace:
        report = made.swapper().swap(made.devices(made.old), made.tree, Host(namespace, str(top)))
    assert report.finished and not report.errors and not report.left, report
    assert groups(everybody, places) == before
    assert all(made.count(c, made.old) == 0 for c in everybody)
    host(f"mount -t tmpfs late {top}/deep")
    assert [len(c.at(f"{top}/deep")) for c in everybody] == [1, 1, 0, 1]


def test_propagation_between_parents(made: SwapBox) -> None:
    """Services of a container: what is done in it comes to them, and must not be done there twice."""
    c = made.container()
    c.binds(made.old.mountpoint)
    c(f"mount --make-rshared {c.place}")
    for path in BINDS:
        c(f"mkdir -p {c.place}/proc; [ -d {made.old.mountpoint}/{path} ] && mkdir -p {c.place}/{path} || : > {c.place}/{path}; "
          f"mount --bind {made.old.mountpoint}/{path} {c.place}/{path}")
    peer, slave = (made.container(kind, c) for kind in ("unchanged", "slave"))
    everybody = [c, peer, slave]
    places: list[Path | str] = [c.place / path for path in BINDS]
    tables, before = [swapped_shape(made, x) for x in everybody], groups(everybody, places)
    report = made.swap()
    assert report.finished and not report.errors and report.changed == 0, report  # what came by propagation was read
    assert [shape(x.mounts(), {}) for x in everybody] == tables
    assert groups(everybody, places) == before
    assert all(x(f"cat {x.place}/proc/meminfo") == "fresh proc/meminfo" for x in everybody)


def test_nested_mounts(made: SwapBox) -> None:
    """What is mounted on the old one is on the fresh one, without a moment in which it is not."""
    c = made.container()
    top = made.old.mountpoint
    c(f"mount -t tmpfs kid {top}/proc && echo kept > {top}/proc/mine && mkdir {top}/proc/deeper")
    c(f"mount --bind {top}/sys {top}/proc/deeper; mount --bind {top}/deep/a {top}/deep")
    table = swapped_shape(made, c)
    reader = Reader(c, f"{top}/proc/mine", {"kept"})
    with reader:
        report = made.swap()
    assert report.finished and not report.errors and not report.left, report
    assert shape(c.mounts(), {}) == table and made.count(c, made.old) == 0
    assert c(f"cat {top}/proc/mine {top}/top {top}/proc/deeper/cpu/online {top}/deep/b/file").split("\n") == [
        "kept", "fresh top", "fresh sys/cpu/online", "fresh deep/a/b/file"]
    assert reader.reads and not reader.errors


def test_what_is_nested_and_cannot_be_copied_stays(made: SwapBox) -> None:
    c = made.container()
    top = made.old.mountpoint
    c(f"mount -t tmpfs kid {top}/proc && echo kept > {top}/proc/mine && mount --make-unbindable {top}/proc")
    report = made.swap()
    assert len(report.errors) == 1 and "open_tree" in report.errors[0]
    assert c(f"cat {top}/proc/mine") == "kept"


def test_working_directories(made: SwapBox) -> None:
    c, user = made.container(), made.container()
    c.binds(made.old.mountpoint, *BINDS)
    user.binds(made.old.mountpoint, *BINDS)
    user(f"cd {user.place}/sys/cpu")
    swapper = made.swapper()
    report = made.swap(swapper)
    assert report.finished and not report.errors and report.done["stacked"] == 1
    assert user("/bin/pwd") == f"{user.place}/sys/cpu"
    assert user("cat online") == "old sys/cpu/online"
    assert user(f"cat {user.place}/sys/cpu/online") == "fresh sys/cpu/online"
    assert not made.swap(swapper, collect=True).done
    user("cd /")
    report = made.swap(swapper)
    assert not report.done and report.remaining == 1
    report = made.swap(swapper, collect=True)
    assert report.done == {"collected": 1} and made.swap().remaining == 0
    assert [m.minor for m in user.at(user.place / "sys")] == [made.fresh.connection]
    assert user(f"cat {user.place}/sys/cpu/online") == "fresh sys/cpu/online"


def test_roots_that_are_gone(made: SwapBox) -> None:
    c = made.container()
    c(f"mkdir {made.old.mountpoint}/extra")
    c.binds(made.old.mountpoint, *BINDS, "extra")
    report = made.swap()
    assert report.finished and not report.errors
    assert report.left == {"the fresh file system has no /extra": 1}
    assert made.count(c, made.old) == 1 and c.at(c.place / "extra")[0].minor == made.old.connection


def look_up_anew(made: SwapBox, where: Container, *paths: str) -> None:
    """What FUSE_NOTIFY_INC_EPOCH and then somebody's look-up do: the dentries that mounts have as roots are unhashed."""
    os.write(made.devices(made.old)[(0, made.old.connection)].fileno(), struct.pack("<IiQ", 16, 8, 0))
    where(f"ls -d {' '.join(f'{made.old.mountpoint}/{path}' for path in paths)}")


def test_roots_that_only_seem_to_be_gone(made: SwapBox) -> None:
    """And one that is: its file goes, another one gets its name."""
    c, user = made.container(), made.container()
    for each in (c, user):
        each.binds(made.old.mountpoint, *BINDS)
    user(f"cd {user.place}/sys/cpu")
    c(f"rm {made.old.mountpoint}/proc/uptime && echo 'old again' > {made.old.mountpoint}/proc/uptime")
    look_up_anew(made, c, "proc/meminfo", "sys")
    marked = {m.root for m in c.mounts() if m.minor == made.old.connection and m.root.endswith("//deleted")}
    assert "/proc/meminfo//deleted" in marked and "/proc/uptime//deleted" in marked
    noted: dict[int, str] = {}
    swapper = made.swapper(record=lambda device, roots: noted.update(roots))
    report = made.swap(swapper)
    assert report.finished and not report.errors and report.left == {"the fresh file system has no /proc/uptime//deleted": 2}
    assert "/proc/meminfo" in noted.values() and "/proc/meminfo//deleted" not in noted.values()
    assert c(f"cat {c.place}/proc/meminfo {c.place}/sys/cpu/online").split("\n") == ["fresh proc/meminfo", "fresh sys/cpu/online"]
    # what was stacked for the working directory, whose old root is unhashed meanwhile, is put in order all the same
    look_up_anew(made, user, "sys")
    user("cd /")
    made.swap(swapper, collect=True)
    assert [m.minor for m in user.at(user.place / "sys")] == [made.fresh.connection]


def test_what_was_stacked_goes_on_receiving(made: SwapBox) -> None:
    """The old mount's peers are gone when it is collected: the one that was on top has their successors."""
    top = made.old.mountpoint
    host = made.container("unchanged")
    host(f"mount --make-shared {top}")
    c = made.container("slave", host)
    c.binds(top, *BINDS)
    before = groups([host, c], [c.place / "sys"])
    c(f"cd {c.place}/sys/cpu")
    swapper = made.swapper()
    with host.namespace() as namespace:
        for collect in (False, True):
            report = swapper.swap(made.devices(made.old), made.tree, Host(namespace, str(top)), collect=collect)
            assert report.finished and not report.errors and ("collected" if collect else "stacked") in report.done, report
            c("cd /")
    assert [m.minor for m in c.at(c.place / "sys")] == [made.fresh.connection]
    assert c.at(c.place / "sys")[0].propagation[0].startswith("master:") and groups([host, c], [c.place / "sys"]) == before


def test_who_received_from_a_host_mount_that_is_gone_receives_from_its_successor(made: SwapBox) -> None:
    """systemd's ``ExecStopPost=fusermount -u`` takes the mount away that an earlier swap has left there."""
    top = made.old.mountpoint
    host = made.container("unchanged")
    host(f"mount --make-shared {top}")
    c = made.container("slave", host)
    c.binds(top, *BINDS)
    before = [word.split(":")[0] for word in c.at(c.place / "sys")[0].propagation]
    swapper, back = made.swapper(), made.reverse()
    assert "master" in before
    with host.namespace() as namespace:
        where = Host(namespace, str(top))
        assert swapper.swap(made.devices(made.old), made.tree, where).finished
        host(f"umount -l {top}")
        assert not [m for m in host.mounts() if m.is_fuse]
        # The second of these finds that nobody has mounted the first one on the host.
        for old, fresh in ((made.fresh, back), (made.old, made.tree)):
            report = swapper.swap(made.devices(old), fresh, where)
            assert report.finished and not report.errors and not report.remaining
        assert attach(made.tree, where)
    assert [word.split(":")[0] for word in c.at(c.place / "sys")[0].propagation] == before
    group = {m.propagation[0].split(":")[1] for m in host.mounts() if m.mountpoint == str(top)}
    assert {m.propagation[-1].split(":")[1] for path in BINDS for m in c.at(c.place / path)} == group


def test_and_when_the_next_daemons_mount_is_on_the_host_by_then(made: SwapBox) -> None:
    """It died before anybody got it: two connections are old, and only the younger one is mounted on the host."""
    top = made.old.mountpoint
    younger = made.box.daemon("bindfs", "", name="younger")
    host = made.container("unchanged")
    host(f"mount --make-shared {top}")
    c = made.container("slave", host)
    c.binds(top, *BINDS)
    before = [word.split(":")[0] for word in c.at(c.place / "sys")[0].propagation]
    swapper = made.swapper()
    with host.namespace() as namespace:
        where = Host(namespace, str(top))
        back = made.reverse()
        assert swapper.swap(made.devices(made.old), made.tree, where).finished
        host(f"umount -l {top}")
        host(f"mount --bind {younger.mountpoint} {top}; mount --make-private {top}; mount --make-shared {top}")
        report = swapper.swap(made.devices(made.fresh) | made.devices(younger), back, where)
        assert report.finished and not report.errors and not report.remaining
    assert [word.split(":")[0] for word in c.at(c.place / "sys")[0].propagation] == before
    group = {m.propagation[0].split(":")[1] for m in host.mounts() if m.mountpoint == str(top)}
    assert {m.propagation[-1].split(":")[1] for path in BINDS for m in c.at(c.place / path)} == group


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 9])
@pytest.mark.parametrize("stop_before", ["attach", "detach"])
def test_killed_and_repeated(made: SwapBox, steps: int, stop_before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was done when the swapping process died: the next one finishes, and nothing is there twice."""
    containers = [made.container() for _ in range(2)]
    for c in containers:
        c.binds(made.old.mountpoint, *BINDS)
    tables = [swapped_shape(made, c) for c in containers]
    pid = os.fork()
    if pid == 0:
        count, real = [0], mountapi.detach

        def step(_: object) -> None:
            count[0] += 1
            if count[0] >= steps:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            if stop_before == "detach":
                mountapi.detach = lambda fd: (step(fd), real(fd))[1]
            made.swap(made.swapper(threads=1, before=step if stop_before == "attach" else None))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert made.old.connection in {m.minor for m in mountinfo(made.box.init)}  # the host's own is the last
    report = made.swap()
    assert report.finished and not report.errors and report.remaining == 0
    assert report.done.get("detached", 0) >= (stop_before == "detach")
    assert [shape(c.mounts(), {}) for c in containers] == tables


def test_readers_see_no_gap(made: SwapBox) -> None:
    """Forth and back while files are read by path: each read is answered by one of the two."""
    containers = [made.container() for _ in range(2)]
    for c in containers:
        c.binds(made.old.mountpoint, *BINDS)
    paths = ("proc/meminfo", "sys/cpu/online")
    readers = [Reader(c, f"{c.place}/{p}", set(made.say(p).values())) for c in containers for p in paths]
    swapper, back = made.swapper(), made.reverse()
    with contextlib.ExitStack() as undo:
        for reader in readers:
            undo.enter_context(reader)
        for number in range(20):
            old, fresh = ((made.fresh, back) if number % 2 else (made.old, made.tree))
            before = [reader.reads for reader in readers]
            report = swapper.swap(made.devices(old), fresh, made.host)
            assert report.finished and not report.errors
            wait_for(lambda b=before: all(r.reads > n + 3 for r, n in zip(readers, b, strict=True)), "reads")
    assert [reader.errors for reader in readers] == [[]] * 4


def test_the_plan_can_be_shown(made: SwapBox) -> None:
    c = made.container()
    c.binds(made.old.mountpoint, *BINDS)
    found = made.swapper().plan(made.devices(made.old), made.tree.device)
    mine = [step for number, step in found if number == os.stat(f"/proc/{c.pid}/ns/mnt").st_ino]
    assert [type(step) for step in mine] == [Beneath] * 4
    assert {step.mount.mountpoint for step in mine} == {str(c.place / p) for p in BINDS} | {str(made.old.mountpoint)}
    assert made.count(c, made.old) == 4  # nothing was done


def test_the_hosts_mount_by_level(made: SwapBox) -> None:
    where, new = str(made.old.mountpoint), made.tree.device
    init = made.box.init
    assert look(where, new, init).state is State.OTHER
    assert not attach(made.tree, made.host)
    made.swap()
    assert look(where, new, init).state is State.PRESENT
    made.box.run(["umount", where])
    assert look(where, new, init).state is State.ABSENT
    assert attach(made.tree, made.host)
    assert look(where, new, init) == look(where, new, init) and look(where, new, init).state is State.PRESENT
    assert made.box.run(["cat", f"{where}/top"]).stdout == "fresh top\n"
    made.box.run(["mount", "-t", "tmpfs", "mine", where])
    assert look(where, new, init).state is State.FOREIGN and not attach(made.tree, made.host)
    made.box.run(["umount", where])


def test_no_descriptor_is_left(made: SwapBox) -> None:
    c = made.container()
    c.binds(made.old.mountpoint, *BINDS)
    c(f"cd {c.place}/sys")
    lower = made.container("private", c, user=True)
    lower(f"mkdir {c.place}/own; mount --bind {c.place}/sys {c.place}/own; mount --make-shared {c.place}/own")
    lower_still = made.container("slave", lower)
    assert made.count(lower_still, made.old)
    tree = made.reverse()
    assert made.swap().done["swapped"]
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        made.swap(collect=True)
    assert made.swapper().swap(made.devices(made.fresh), tree, made.host).done["swapped"]
    assert sorted(os.listdir("/proc/self/fd")) == before
