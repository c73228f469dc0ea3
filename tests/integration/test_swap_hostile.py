# SPDX-License-Identifier: Apache-2.0
"""The swap where somebody is in the way: containers that work against it, daemons that do not answer, kernels that lack calls."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from sandbox import descendants
from swapbox import BINDS, SwapBox, shape, swapped_shape

from incus_fusecr.linux import mountapi
from incus_fusecr.linux.fd import Fd
from incus_fusecr.linux.mount import mountinfo
from incus_fusecr.linux.statx import mount_id
from incus_fusecr.recovery import namespaces
from incus_fusecr.recovery.namespaces import Traveller, open_proc
from incus_fusecr.recovery.plan import Device
from incus_fusecr.recovery.swap import Swapper

pytestmark = [pytest.mark.requires_daemon("bindfs"), pytest.mark.requires_command("unshare", "nsenter")]


def test_locked_mounts_are_stacked_on(made: SwapBox) -> None:
    outer = made.container()
    outer.binds(made.old.mountpoint, *BINDS)
    c = made.container("private", outer, user=True)
    swapper = made.swapper()
    report = made.swap(swapper)
    assert report.finished and not report.errors
    assert report.done["stacked"] == 4
    assert made.count(outer, made.old) == 0
    for _ in range(2):
        assert c(f"cat {c.place}/proc/meminfo; cat {c.place}/sys/cpu/online") == "fresh proc/meminfo\nfresh sys/cpu/online"
        assert [m.minor for m in c.at(c.place / "sys")] == [made.old.connection, made.fresh.connection]
        assert not made.swap(swapper, collect=True).done
    # somebody who does not know yet that they are locked tries once, and has it as it was
    report = made.swap(collect=True)
    assert report.finished and not report.errors
    assert [m.minor for m in c.at(c.place / "sys")] == [made.old.connection, made.fresh.connection]


def test_the_id_of_a_locked_mount_may_be_anothers_by_now(made: SwapBox) -> None:
    """Of another namespace, or of another mount in the same one: none of them is stacked on, which would last for ever."""
    c = made.container()
    c.binds(made.old.mountpoint, *BINDS)
    swapper = made.swapper()
    with c.namespace() as fd:
        number = os.fstat(fd.fileno()).st_ino
    for mount in c.mounts():
        for known in ((number + 1, mount.id, (0, mount.minor), mount.mountpoint), (number, mount.id, (0, mount.minor), "/gone")):
            swapper._locked.add(known)
    report = made.swap(swapper)
    assert report.finished and not report.errors and "stacked" not in report.done
    assert made.count(c, made.old) == 0 and not swapper._locked


def test_flags_stay_locked(made: SwapBox) -> None:
    """Root of an unprivileged container could not make a read-only mount writable before, and cannot now."""
    outer = made.container()
    outer.binds(made.old.mountpoint, "sys", "proc/uptime")
    outer(f"mount -o remount,bind,ro {outer.place}/sys; mount -o remount,bind,noexec {outer.place}/proc/uptime")
    c = made.container("private", outer, user=True)
    c(f"mkdir {c.place}/own && mount --bind {c.place}/sys {c.place}/own")  # as LXC's hook makes them: flags locked, itself not
    wishes = (("rw", "sys"), ("rw", "own"), ("exec", "proc/uptime"))
    attempts = [f"mount -o remount,bind,{flag} {c.place}/{path}" for flag, path in wishes]
    assert [c.attempt(command)[0] for command in attempts] == [32] * 3
    options = [c.at(c.place / path)[-1].options for path in ("sys", "own", "proc/uptime")]
    report = made.swap()
    assert report.finished and not report.errors and report.done == {"stacked": 3, "swapped": 4, "detached": 1}, report
    assert [c.at(c.place / path)[-1].options for path in ("sys", "own", "proc/uptime")] == options
    assert {c.at(c.place / path)[-1].minor for path in ("sys", "own", "proc/uptime")} == {made.fresh.connection}
    assert [c.attempt(command)[0] for command in attempts] == [32] * 3
    assert len(c.at(c.place / "own")) == 1
    c(f"umount {c.place}/own")  # its own it can unmount, as before


def test_what_a_container_changed_is_left(made: SwapBox) -> None:
    c = made.container()
    c.binds(made.old.mountpoint, *BINDS)
    c(f"echo own > /tmp/own-{c.pid}; mount --bind /tmp/own-{c.pid} {c.place}/proc/meminfo; rm /tmp/own-{c.pid}")
    c(f"umount {c.place}/proc/uptime")
    report = made.swap()
    assert report.finished and not report.errors
    assert [reason.startswith("covered by a foreign") for reason in report.left] == [True]
    assert c(f"cat {c.place}/proc/meminfo") == "own"
    assert c.at(c.place / "proc/uptime") == [] and c(f"cat {c.place}/proc/uptime") == ""
    assert len(c.at(c.place / "proc/meminfo")) == 2
    assert c(f"cat {c.place}/sys/cpu/online") == "fresh sys/cpu/online"


def test_a_container_that_turns_its_paths(made: SwapBox) -> None:
    """Between reading and acting its root renames a directory and puts a link to somewhere else in its place."""
    c, other = made.container(), made.container()
    c.binds(made.old.mountpoint)
    c(f"mkdir -p {c.place}/x/d {c.place}/victim/d && mount --bind {made.old.mountpoint}/sys {c.place}/x/d")
    turned = []

    def turn(device: Device, roots: dict[int, str]) -> None:
        if not turned:
            turned.append(c(f"cd {c.place} && mv x y && ln -s victim x && cd /"))

    report = made.swap(made.swapper(record=turn))
    assert report.finished and not report.errors and turned and report.remaining == 0
    assert c.at(c.place / "victim/d") == [] and other.at(c.place / "victim/d") == []
    assert [m.minor for m in c.at(c.place / "y/d")] == [made.fresh.connection]
    assert report.passes >= 3


def test_a_container_that_moves_its_mounts(made: SwapBox) -> None:
    """Another mount at the same path is not what was planned for."""
    c = made.container()
    c.binds(made.old.mountpoint, *BINDS)
    c(f"mkdir {c.place}/elsewhere")
    turned = []

    def turn(device: Device, roots: dict[int, str]) -> None:
        if not turned:
            c(f"mount --move {c.place}/sys {c.place}/elsewhere && mount -t tmpfs mine {c.place}/sys && touch {c.place}/sys/own")
            turned.append(True)

    report = made.swap(made.swapper(record=turn))
    assert report.finished and not report.errors and turned and report.remaining == 0
    assert [m.fstype for m in c.at(c.place / "sys")] == ["tmpfs"] and c(f"ls {c.place}/sys") == "own"
    assert [m.minor for m in c.at(c.place / "elsewhere")] == [made.fresh.connection]


def test_a_container_that_never_stops_turning(made: SwapBox) -> None:
    """A race on purpose: whatever happens to it, nobody else is touched and nothing of the fresh one is outside of it."""
    c, other = made.container(), made.container()
    for each in (c, other):
        each.binds(made.old.mountpoint, *BINDS)
    table = swapped_shape(made, other)
    c(f"mkdir -p {c.place}/a/d {c.place}/victim/d; mount --bind {made.old.mountpoint}/sys {c.place}/a/d")
    turn = "mv a b; ln -s victim a; rm a; mv b a; mount -t tmpfs t proc; umount proc"
    c(f"(cd {c.place}; while [ ! -e stop ]; do {turn}; done) > /dev/null 2>&1 &")
    swapper, back = made.swapper(), made.reverse()
    for number in range(10):
        old, fresh = ((made.fresh, back) if number % 2 else (made.old, made.tree))
        swapper.swap(made.devices(old), fresh, made.host)
        assert made.count(other, old) == 0
        assert c.at(c.place / "victim/d") == []
    c(f"touch {c.place}/stop; wait; while umount -t tmpfs {c.place}/proc; do :; done")
    report = swapper.swap(made.devices(made.old), made.tree, made.host)
    assert report.finished and not report.errors and report.remaining == 0
    assert shape(other.mounts(), {}) == table


def test_a_daemon_of_a_container_is_never_asked(made: SwapBox) -> None:
    """The way to an old mount leads through a FUSE mount of its own, whose daemon does not answer."""
    c = made.container()
    third = made.box.daemon("bindfs", name="third")
    wait = made.container()  # its namespace has a copy of the third mount
    wait(f"mkdir {third.mountpoint}/d && mount --bind {made.old.mountpoint}/sys {third.mountpoint}/d")
    time.sleep(1.5)
    os.kill(third.pid, signal.SIGSTOP)
    started = time.monotonic()
    report = made.swap()
    assert report.errors == [] and report.left == {"fuse would have to be asked": 1}, report
    assert time.monotonic() - started < 10  # no request was sent: it would never be answered
    assert made.count(c, made.old) == 0 and made.count(wait, made.old) == 1
    os.kill(third.pid, signal.SIGCONT)
    wait(f"ls {third.mountpoint}/d")
    assert made.swap().remaining == 0


def test_what_is_hidden_is_left_until_it_is_seen_again(made: SwapBox) -> None:
    c = made.container()
    c.binds(made.old.mountpoint, *BINDS)
    c(f"mount -t tmpfs mine {c.place}/proc")
    report = made.swap()
    assert report.finished and not report.errors and report.left == {"a tmpfs hides it": 2}
    c(f"umount {c.place}/proc")
    assert made.swap().done == {"swapped": 2} and c(f"cat {c.place}/proc/uptime") == "fresh proc/uptime"


def test_a_fresh_daemon_that_does_not_answer(made: SwapBox) -> None:
    """It is an error with a name after a deadline, the old mounts stay, and a repetition does all of it."""
    c = made.container()
    c.binds(made.old.mountpoint, "proc/meminfo")
    os.kill(made.fresh.pid, signal.SIGSTOP)
    swapper = made.swapper(deadline=0.3)
    report = made.swap(swapper)
    assert not report.finished and len(report.errors) == 1 and "did not finish in time" in report.errors[0]
    assert made.count(c, made.old) == 1
    os.kill(made.fresh.pid, signal.SIGCONT)
    report = made.swap(swapper)
    assert report.finished and not report.errors and made.count(c, made.old) == 0


def test_mounts_outside_of_a_chroot(made: SwapBox) -> None:
    """The only process of a namespace sees nothing of the old mount; it is there nevertheless."""
    c = made.container()
    c(f"mkdir {c.place}")
    program = f"import os, sys; os.chroot('{c.place}'); os.chdir('/'); print('in', flush=True); sys.stdin.read()"
    child = c.spawn(["unshare", "--mount", "--propagation", "private", made.box.python, "-c", program])
    assert child.stdout and child.stdout.readline() == b"in\n"
    (pid,) = descendants(child.pid)
    assert b"fuse" not in Path(f"/proc/{pid}/mountinfo").read_bytes()
    report = made.swap()
    assert report.namespaces == 3 and report.remaining == 0 and not report.errors
    assert report.done == {"swapped": 2, "detached": 1}


def test_an_older_kernel(made: SwapBox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without MOVE_MOUNT_BENEATH (6.5), and without clones of what is detached (6.15), the tree being attached."""
    move, clone = mountapi.move_mount, mountapi.open_tree
    refused = []

    def old_move(tree: Fd, to: Fd, flags: int = 0) -> None:
        if flags & mountapi.MOVE_MOUNT_BENEATH:
            refused.append("beneath")
            raise OSError(errno.EINVAL, "emulated")
        if mount_id(to.fileno()) not in attached:
            refused.append("to-detached")
            raise OSError(errno.EINVAL, "emulated")
        move(tree, to, flags)
        attached.add(mount_id(tree.fileno()))

    def old_clone(fd: Fd, flags: int = 0) -> Fd:
        if mount_id(fd.fileno()) not in attached:
            refused.append("clone")
            raise OSError(errno.EINVAL, "emulated")
        return clone(fd, flags)

    containers = [made.container() for _ in range(2)]
    for c in containers:
        c.binds(made.old.mountpoint, *BINDS)
    containers[0](f"mount -t tmpfs kid {made.old.mountpoint}/proc && echo kept > {made.old.mountpoint}/proc/mine")
    tree = made.attached()
    attached = {m.id for m in mountinfo(made.box.init)} | {m.id for c in containers for m in c.mounts()}
    monkeypatch.setattr(mountapi, "move_mount", old_move)
    monkeypatch.setattr(mountapi, "open_tree", old_clone)
    report = made.swapper().swap(made.devices(made.old), tree, made.host)
    assert report.finished and not report.errors and set(refused) == {"beneath", "clone", "to-detached"}, report.errors
    assert containers[0](f"cat {made.old.mountpoint}/proc/mine {made.old.mountpoint}/top") == "kept\nfresh top"
    assert report.done == {"stacked": 9}
    for c in containers:
        assert c(f"cat {c.place}/proc/meminfo; cat {c.place}/sys/cpu/online") == "fresh proc/meminfo\nfresh sys/cpu/online"


def test_flags_that_cannot_be_locked_are_an_error(made: SwapBox) -> None:
    """Rather an old mount, which still is served, than one that its container's root can make writable."""

    def locker(trees: object) -> tuple[Fd, list[Fd]]:
        raise OSError(errno.ENOSPC, "no more user namespaces")

    outer = made.container()
    outer.binds(made.old.mountpoint, "sys")
    c = made.container("private", outer, user=True)
    report = made.swap(Swapper(made.swapper()._opener, locker))
    assert not report.finished and len(report.errors) == 2 and all("no more user namespaces" in e for e in report.errors)
    assert made.count(c, made.old) == 2 and made.count(outer, made.old) == 0
    assert made.swap().finished


def test_locked_mounts_that_receive(made: SwapBox) -> None:
    """What is done where they come from is done to them by the kernel, which also locks the fresh one's flags."""
    outer = made.container("unchanged")
    outer(f"mkdir {outer.place}; mount -t tmpfs ct {outer.place}; mount --make-shared {outer.place}; mkdir {outer.place}/d")
    outer(f"mount --bind {made.old.mountpoint}/sys {outer.place}/d; mount -o remount,bind,ro {outer.place}/d")
    c = made.container("slave", outer, user=True)
    report = made.swap()
    assert report.finished and not report.errors and report.changed == 0, report
    for each in (outer, c):
        assert [m.minor for m in each.at(c.place / "d")] == [made.fresh.connection]
        assert each(f"cat {c.place}/d/cpu/online") == "fresh sys/cpu/online"
    assert c.attempt(f"mount -o remount,bind,rw {c.place}/d")[0]


def test_one_that_holds_up_its_thread_holds_up_nobody_else() -> None:
    others, names = threading.Event(), set()
    done: list[int] = []

    def work(_traveller: Traveller, item: int) -> None:
        names.add(threading.current_thread().name)
        if item == 0:
            assert others.wait(60), "nobody came to do the others"
        done.append(item)
        if len(done) == 9:
            others.set()

    with open_proc() as proc:
        namespaces.each(range(10), work, proc, 16)
    assert sorted(done) == list(range(10)) and len(names) > 1


def test_one_thread_does_it_while_nothing_holds_it_up() -> None:
    """More would take the interpreter's lock from each other around each of thousands of system calls."""
    names = set()
    with open_proc() as proc:
        namespaces.each(range(100), lambda _traveller, _item: names.add(threading.current_thread().name), proc, 16, stuck=30)
    assert names == {"swap-0"}


def test_a_thread_that_hangs_has_a_deadline() -> None:
    go = threading.Event()
    with open_proc() as proc:
        with pytest.raises(TimeoutError):
            namespaces.each([1], lambda _traveller, _item: bool(go.wait(60)), proc, 16, deadline=0.1)
        go.set()
        for thread in threading.enumerate():
            if thread.name.startswith("swap-"):
                thread.join(60)
