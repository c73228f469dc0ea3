# SPDX-License-Identifier: Apache-2.0
"""What the supervisor decides: with links, guards, mounts and daemons of paper."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from incus_fusecr.errors import FusecrError
from incus_fusecr.linux.fd import Fd
from incus_fusecr.recovery import changes, fresh, hostmount, supervisor
from incus_fusecr.recovery import events as event_log
from incus_fusecr.recovery import link as links
from incus_fusecr.recovery import unit as units
from incus_fusecr.recovery.config import LXCFS
from incus_fusecr.recovery.events import EventLog
from incus_fusecr.recovery.fresh import Started, StartError
from incus_fusecr.recovery.hostmount import HostMount, State
from incus_fusecr.recovery.link import Link, Process
from incus_fusecr.recovery.plan import Device
from incus_fusecr.recovery.recipe import MOUNT_WORD, Recipe
from incus_fusecr.recovery.swap import Report

RECIPE = Recipe("/usr/bin/lxcfs", ("lxcfs", MOUNT_WORD))


def some_fd() -> Fd:
    return Fd(os.open("/dev/null", os.O_RDONLY))


@dataclass
class World:
    """Connections by number; what is mounted on the host; what was done, in its order."""

    alive: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    serving: set[int] = field(default_factory=set)
    top: int | None = None
    buried: list[int] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(100, 200)))
    starts: bool = True
    clones: int = 0
    now: float = 1000.0
    report: Report = field(default_factory=lambda: Report(finished=True, done={"swapped": 1}))

    def say(self, text: str) -> None:
        self.done.append(text)

    def taken(self) -> list[str]:
        done, self.done = self.done, []
        return done


class PaperLink(Link):
    world: World

    def alive(self) -> bool:
        return self.number in self.world.alive

    def gone(self) -> bool:
        return self.number in self.world.gone


class PaperKeeping:
    def __init__(self, world: World) -> None:
        self.world = world

    def __getattr__(self, name: str) -> Any:
        def record(*args: Any) -> None:
            if name in ("put_role", "forget"):
                words = [str(a.number) if isinstance(a, Link) else str(a) for a in args if a != "lxcfs"]
                self.world.say(" ".join([name, *words]))

        return record


class PaperGuards:
    def __init__(self, world: World) -> None:
        self.world = world

    def ensure(self, link: Link, daemon: object) -> bool:
        return True

    def look(self, links: list[Link]) -> None:
        self.world.say("look " + ",".join(str(link.number) for link in links if not link.alive()))

    def heard(self, link: Link) -> None:
        pass

    def stop(self, link: Link) -> bool:
        return link.number not in self.world.serving

    def status(self, link: Link) -> dict[str, str]:
        return {}

    def tell_roots(self, link: Link, roots: dict[int, str]) -> None:
        pass


class PaperSwapper:
    def __init__(self, world: World) -> None:
        self.world = world

    def swap(self, old: dict[Device, Fd], made: Any, host: object, collect: bool) -> Report:
        self.world.say(f"swap {','.join(str(d[1]) for d in sorted(old))} to {made.device[1]}")
        self.world.top = made.device[1]
        return self.world.report


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def unit(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[units.Unit]:
    PaperLink.world = world
    monkeypatch.setattr(event_log.log, "disabled", True)  # whats() tells them

    def start(zygote: object, namespace: object, wanted: Recipe, name: str, serial: int) -> Started:
        if not world.starts:
            raise StartError("it ended with exit code 1")
        number = next(world.numbers)
        world.say(f"start {number}")
        return Started(number * 10, 1, number, some_fd())

    def hold(pid: int, number: int) -> tuple[Process, list[Fd]]:
        world.alive.add(number)
        return Process(pid, 1, None), [some_fd() for _ in range(1 + world.clones)]

    def look(mountpoint: str, wanted: Device) -> HostMount:
        if world.top is None:
            return HostMount(State.ABSENT)
        return HostMount(State.PRESENT if world.top == wanted[1] else State.OTHER, (0, world.top))

    def attach(made: Any, host: object) -> bool:
        world.say(f"attach {made.device[1]}")
        world.top = made.device[1]
        return True

    def clone(zygote: object, namespace: object, mountpoint: str) -> tuple[int, Fd]:
        assert world.top is not None
        return world.top, some_fd()

    monkeypatch.setattr(fresh, "start", start)
    monkeypatch.setattr(fresh, "clone_host_mount", clone)
    monkeypatch.setattr(units, "hold", hold)
    monkeypatch.setattr(links, "hold", hold)
    monkeypatch.setattr(units, "Link", PaperLink)
    monkeypatch.setattr(units.recipe, "read", lambda pid, mountpoint: RECIPE)
    monkeypatch.setattr(units, "servers", lambda: {number: number * 10 for number in world.alive})
    monkeypatch.setattr(hostmount, "look", look)
    monkeypatch.setattr(hostmount, "attach", attach)
    monkeypatch.setattr(hostmount, "buried", lambda mountpoint: [(0, number) for number in world.buried])

    def detach(zygote: object, namespace: object, mountpoint: str, connection: int) -> None:
        assert world.top == connection
        world.say(f"detach {connection}")
        world.top = world.buried.pop() if world.buried else None

    monkeypatch.setattr(fresh, "detach_host_mount", detach)
    monkeypatch.setattr(units.acquaint, "once", lambda context, link, directories: None)
    monkeypatch.setattr(units.warmup, "warm", lambda zygote, tree, number, path: world.say(f"warm {number}"))
    monkeypatch.setattr(units.keepwarm, "tick", lambda unit: None)
    monkeypatch.setattr(units, "SETTLE", 0.0)
    monkeypatch.setattr(fresh, "tidy", lambda *names: None)
    monkeypatch.setattr(units.time, "monotonic", lambda: world.now)
    with contextlib.ExitStack() as undo:
        events = EventLog(str(tmp_path / "events.jsonl"))
        undo.callback(events.close)
        nowhere: Any = undo.enter_context(some_fd())
        papers: Any = PaperKeeping(world), PaperGuards(world)
        context = units.Context(nowhere, papers[0], events, papers[1], nowhere, lambda: nowhere)
        made = units.Unit(context, "lxcfs", LXCFS, "/var/lib/lxcfs")
        made._swapper = PaperSwapper(world)  # type: ignore[assignment]
        undo.callback(lambda: [link.close() for link in made.links.values()])
        yield made


def adopted(unit: units.Unit, world: World, number: int = 1) -> None:
    """Somebody's daemon is there, and protected, with a spare."""
    world.alive.add(number)
    world.top = number
    unit.settle()
    world.now += 1
    unit.settle()
    assert (unit.current, unit.warm) == (number, 100)
    world.taken()


def whats(unit: units.Unit) -> list[str]:
    return [event.what for event in unit.context.events.since()]


def test_what_somebody_started_is_adopted_and_gets_a_spare(unit: units.Unit, world: World) -> None:
    world.alive.add(1)
    world.top = 1
    unit.settle()
    assert unit.current == 1 and unit.warm is None and unit.due is not None
    world.now += 1
    unit.settle()
    assert unit.warm == 100 and whats(unit) == ["adopted", "spare-ready"]


def test_a_death_is_answered_by_the_spare(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    world.alive.discard(1)
    unit.settle()
    assert unit.current == 100 and unit.warm is None
    done = world.taken()
    order = [done.index(text) for text in ("put_role current 100", "look 1", "warm 100", "swap 1 to 100")]
    assert order == sorted(order)
    world.gone.add(1)
    unit.settle()
    assert list(unit.links) == [100] and "forget 1" in world.taken()


def test_clones_that_the_daemon_makes_later_are_held(unit: units.Unit, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    adopted(unit, world)
    kept: list[int] = []
    monkeypatch.setattr(unit.context.keeping, "put_link", lambda link: kept.append(len(link.fuse)), raising=False)
    link = unit.links[1]
    world.clones = 3
    unit.settle()
    assert len(link.fuse) == 1 and not kept  # nobody has told of them
    link.unheld = True
    unit.settle()
    assert len(link.fuse) == 4 and kept == [4] and not link.unheld
    world.clones, link.unheld = 1, True  # threads of it have ended, or it is about to
    unit.settle()
    assert len(link.fuse) == 4 and kept == [4]
    world.clones, link.unheld = 9, True
    world.alive.discard(1)
    unit.settle()
    assert len(link.fuse) == 4


def test_the_next_spare_waits_for_calm(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    world.alive.discard(1)
    unit.settle()
    assert "start 101" not in world.taken() and unit.due is not None
    world.now += units.CALM + 0.01
    unit.settle()
    assert "start 101" in world.taken() and unit.warm == 101


def test_the_swap_waits_a_moment_however_often_the_next_one_dies(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    units.SETTLE = 0.6
    for number, began in ((1, world.now), (100, world.now), (101, world.now)):
        world.alive.discard(number)
        unit.links[number].daemon.status = signal.SIGKILL
        unit.settle()
        assert not any("swap" in text for text in world.taken()) and unit.due is not None and unit.due < began + 0.7
        world.now += 0.21
    unit.settle()
    assert f"swap 1,100,101 to {unit.current}" in world.taken()


def test_without_a_spare_one_is_started(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    world.now += 100
    unit.settle()
    world.alive -= {1, 100}
    unit.settle()
    assert unit.current == 101 and "swap 1,100 to 101" in world.taken()


def test_a_start_that_fails_is_tried_again_later(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    world.now += 100  # the daemon has served well
    unit.settle()
    world.alive -= {1, 100}
    world.starts = False
    unit.settle()
    assert "start-failed" in whats(unit) and unit.due is not None and unit.due > world.now
    first = len(whats(unit))
    unit.settle()  # too early
    assert len(whats(unit)) <= first + 1 and "restart-waits" in whats(unit)
    world.starts = True
    world.now += 60
    unit.settle()
    assert unit.current == 101 and unit.problem == ""


def test_a_number_that_is_used_again_before_its_end_was_seen(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    world.alive -= {1, 100}
    unit.settle()  # 101 serves; then 1 ends, and its number is given to what the service has started
    old = unit.links[1]
    world.top = 1
    world.alive.add(1)
    assert unit.adopt(10, 1) and unit.current == 1
    assert unit.links[1] is not old and old.fuse[0].closed and "forget 1" in world.taken()


@pytest.mark.parametrize("status", (signal.SIGKILL, signal.SIGTERM, 0, signal.SIGSEGV, 1 << 8))
def test_who_was_killed_says_nothing_about_the_next(unit: units.Unit, world: World, status: int) -> None:
    adopted(unit, world)
    for number in (1, 100, 101, 102):
        world.alive -= {number, unit.warm}
        unit.links[number].daemon.status = status
        unit.settle()
        world.now += 1  # far too little to be proven
        if status in (signal.SIGSEGV, 1 << 8):
            assert unit.restarts.failures == 1
            return
        unit.settle()
        assert unit.restarts.failures == 0 and unit.problem == ""


def test_the_breaker_opens(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    world.alive -= {1, 100}
    world.starts = False
    for _ in range(40):
        unit.settle()
        if unit.restarts.open:
            break
        world.now = max(world.now, unit.due or 0) + 0.001
    assert unit.restarts.open
    unit.settle()
    assert unit.problem == "breaker" and unit.due == pytest.approx(world.now + LXCFS.limits.cooldown, abs=1)


def test_its_service_starts_it_again(unit: units.Unit, world: World) -> None:
    """The spare had taken over meanwhile; it stays as the spare."""
    adopted(unit, world)
    world.alive.discard(1)
    unit.settle()
    world.alive.add(2)
    world.top = 2
    world.taken()
    unit.settle()
    assert (unit.current, unit.warm) == (2, 100) and "swap 1,100 to 2" in world.taken()


def test_one_that_was_started_in_that_very_moment_is_uncovered(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    world.alive.discard(1)
    unit.settle()
    world.alive.add(2)
    world.buried = [2]
    world.taken()
    unit.settle()
    assert "detach 100" in world.taken() and unit.current == 2
    world.buried = [3]  # of nobody
    unit.settle()
    assert unit.current == 2 and not [text for text in world.taken() if text.startswith("detach")]


def test_a_dead_mount_that_nobody_held_goes(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    world.top = 77
    unit.settle()
    assert not [text for text in world.taken() if text.startswith(("detach", "attach"))]  # its daemon may just not be seen
    world.now += units.UNKNOWN_SECONDS + 0.1
    unit.settle()
    done = world.taken()
    assert done[:2] == ["detach 77", "attach 1"] and unit.current == 1


def test_a_host_mount_that_was_taken_away_is_put_back(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    world.top = None
    unit.settle()
    assert "attach 1" in world.taken()


def test_old_mounts_are_looked_for_as_long_as_there_are_users(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    world.alive.discard(1)
    unit.settle()
    swaps = 1
    for _ in range(20):
        world.now = max(world.now, unit.due or 0) + 0.001
        unit.settle()
        swaps += sum(text.startswith("swap") for text in world.taken())
    assert 5 <= swaps <= 21
    world.gone.add(1)
    for _ in range(3):
        world.now += 60
        unit.settle()
    world.taken()
    world.now += 60
    unit.settle()
    assert not [text for text in world.taken() if text.startswith("swap")]


def test_a_spare_that_dies_is_replaced(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    world.alive.discard(100)
    unit.settle()
    assert unit.warm == 101 and "spare-died" in whats(unit)


def test_nothing_that_cannot_be_copied_is_touched(unit: units.Unit, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, mountpoint: str) -> Recipe:
        raise ValueError("its command line does not name it")

    monkeypatch.setattr(units.recipe, "read", refuse)
    world.alive.add(1)
    world.top = 1
    for _ in range(3):
        unit.settle()
    assert unit.links == {} and whats(unit) == ["cannot-protect"] and unit.problem


def test_hand_back_keeps_what_is_served(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    world.alive.discard(1)
    unit.settle()
    world.serving.add(1)
    world.now += 1
    unit.settle()
    kept = changes.hand_back(unit)
    assert len(kept) == 1 and "connection 1 " in kept[0] and list(unit.links) in ([1], [1, 101])
    assert unit.paused
    world.taken()
    world.alive.discard(100)
    unit.settle()
    assert not [text for text in world.taken() if text.startswith(("start", "swap", "attach"))]


def test_hand_back_waits_for_a_recovery(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    world.alive.discard(1)
    with pytest.raises(FusecrError, match="everybody would lose it"):
        changes.hand_back(unit)
    assert not unit.paused


def test_upgrade_refuses_what_does_not_start(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    world.starts = False
    with pytest.raises(FusecrError, match=r"exit code 1.*stays"):
        changes.upgrade(unit)
    assert unit.current == 1 and "upgrade-refused" in whats(unit)
    with pytest.raises(FusecrError, match="no program"):
        changes.upgrade(unit, "/nonexistent")


@pytest.mark.parametrize(
    ("release", "why"),
    [("6.1.0-20-amd64", "RESEND"), ("6.12.3", "6.16"), ("6.18.44", ""), ("7.0-rc1", ""), ("x", "no version")],
)
def test_kernels(release: str, why: str) -> None:
    found = supervisor.missing(release, "/bin/true")
    assert why in found and bool(found) == bool(why)


def test_no_guard() -> None:
    assert "make" in supervisor.missing("6.18.0", "/nonexistent")


@pytest.mark.parametrize(
    ("status", "later", "back"), [(signal.SIGSEGV, 5, True), (signal.SIGKILL, 5, False), (signal.SIGSEGV, 61, False)]
)
def test_after_an_upgrade_what_ends_by_itself_soon_gives_way(
    unit: units.Unit, world: World, status: int, later: float, back: bool
) -> None:
    adopted(unit, world)
    before = RECIPE.with_exe("/usr/bin/before")
    unit.fall_back_to(before)
    world.now += later
    world.alive.discard(1)
    unit.links[1].daemon.status = status
    unit.settle()
    assert (unit.recipe == before, "upgrade-undone" in whats(unit)) == (back, back)
    assert unit.current == (101 if back else 100)


def test_a_candidate_keeps_its_tree_and_is_nobodys(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    new = unit.start(RECIPE)
    unit.candidate = new.number
    world.alive.discard(1)
    unit.settle()  # a death meanwhile is answered by the spare
    assert unit.current == 100 and new.tree is not None and new not in unit.olds()
    world.gone.add(100)  # nobody has anything of it any more, or the end waits for them
    assert changes.finish(unit, new)["connection"] == new.number and unit.current == new.number and unit.candidate is None


def test_a_candidate_that_ended_is_refused(unit: units.Unit, world: World) -> None:
    adopted(unit, world)
    new = unit.start(RECIPE)
    unit.candidate = new.number
    world.alive.discard(new.number)
    with pytest.raises(FusecrError, match=r"ended by itself after .*stays"):
        changes.finish(unit, new)
    assert unit.current == 1 and unit.candidate is None and new.tree is None
