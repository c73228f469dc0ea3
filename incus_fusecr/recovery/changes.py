# SPDX-License-Identifier: Apache-2.0
"""What an operator asks for: another executable, and the end of the protection."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

from ..errors import FusecrError
from ..fuse import connection
from ..fuse.init import InitError, InitReply, parse_init_out
from ..linux.pidfd import send_signal, wait_exit
from ..linux.zygote import JobError
from . import warmup
from .fresh import StartError
from .link import Link
from .unit import SETTLE, Unit

INIT_SECONDS = 10.0
STEADY_SECONDS = 0.3  # so long a new daemon has to live before anybody gets it, at least
ASK_SECONDS = 5.0
DRAIN_SECONDS = 2.0


def upgrade(unit: Unit, exe: str = "") -> dict[str, object]:
    """A daemon from ``exe`` (as it is on disk now) takes the place of the present one.

    :raises FusecrError: the present one stays, and why
    """
    return finish(unit, begin(unit, exe))


def begin(unit: Unit, exe: str = "") -> Link:
    """The new daemon, which nobody uses yet. Between this and :func:`finish` one may watch whether it lives.

    :raises FusecrError: the present one stays, and why
    """
    what = f"upgrade of {unit.key}"
    old = _present(unit, what)
    if unit.candidate is not None:
        raise FusecrError(what, "another one is not finished")
    if exe and not (os.path.isfile(exe) and os.access(exe, os.X_OK)):
        raise FusecrError(what, f"{exe} is no program that can be run", f"the old one, pid {old.daemon.pid}, stays")
    wanted = old.recipe.with_exe(exe) if exe else old.recipe
    unit.event("upgrade-begins", old.number, exe=wanted.exe)
    new: Link | None = None
    try:
        new = unit.start(wanted)
        unit.candidate = new.number
        _check(unit, old, new)
    except (StartError, FusecrError) as error:
        raise _refused(unit, what, wanted.exe, new, str(error)) from None
    return new


def _present(unit: Unit, what: str) -> Link:
    old = unit.link(unit.current)
    if unit.paused or old is None or not old.alive():
        raise FusecrError(what, "it is not protected" if unit.paused else "no daemon of it runs just now", "incus-fusecr status")
    return old


def _refused(unit: Unit, what: str, exe: str, new: Link | None, why: str) -> FusecrError:
    unit.candidate = None
    unit.discard(new)
    if new is not None and new.daemon.pidfd is not None:  # it may never notice that nobody wants it
        send_signal(new.daemon.pidfd, signal.SIGKILL)
    old = unit.link(unit.current)
    unit.event("upgrade-refused", old.number if old else 0, level=30, exe=exe, why=why)
    return FusecrError(what, f"{exe}: {why}", f"the old one, pid {old.daemon.pid if old else 0}, stays")


def finish(unit: Unit, new: Link, began: float | None = None) -> dict[str, object]:
    """Everybody gets the new daemon of :func:`begin`.

    :param began: when that was, of the monotonic clock
    :raises FusecrError: it has ended meanwhile; the present one stays
    """
    began = time.monotonic() if began is None else began
    what, wanted = f"upgrade of {unit.key}", new.recipe
    if new.gone() or not new.alive():
        how = new.daemon.end or "it is not known how"
        raise _refused(unit, what, wanted.exe, new, f"it ended by itself after {time.monotonic() - began:.1f} s ({how})")
    try:
        old = _present(unit, what)
    except FusecrError as error:
        raise _refused(unit, what, wanted.exe, new, error.why) from None
    unit.candidate = None
    unit.discard(unit.link(unit.warm))  # it is of the old executable
    unit.promote(new, SETTLE)  # the swap is now, its spare comes later
    unit.fall_back_to(old.recipe)
    made = unit.fresh()
    assert made is not None
    report = unit.swap(made)
    drained = _drain(unit, old)
    unit.event("upgraded", new.number, pid=new.daemon.pid, exe=wanted.exe, old=old.number, drained=drained)
    return {
        "pid": new.daemon.pid, "connection": new.number, "exe": wanted.exe, "old_connection": old.number, "drained": drained,
        "errors": report.errors, "seconds": round(time.monotonic() - began, 3),
    }  # fmt: skip


def _check(unit: Unit, old: Link, new: Link) -> None:
    """:raises FusecrError: it is not fit to serve"""
    assert new.daemon.pidfd is not None
    end = time.monotonic() + INIT_SECONDS
    if not unit.context.guards.ensure(new, unit.config):
        raise FusecrError("its guard did not come up")
    if wait_exit(new.daemon.pidfd, STEADY_SECONDS):
        raise FusecrError("it ended at once")
    if unit.config.standby != "warm":
        return
    replies = [_reply(unit, link, end) for link in (old, new)]
    if replies[1] is None:
        raise FusecrError("its copy for open files does not answer FUSE_INIT")
    if replies[0] is not None and not same_init(replies[0], replies[1]):
        raise FusecrError(f"it answers FUSE_INIT otherwise than the old one: {difference(replies[0], replies[1])}")
    if not new.alive():
        raise FusecrError("it ended at once")
    _ask(unit, new)


def _ask(unit: Unit, new: Link) -> None:
    """:raises FusecrError: it does not answer as it should"""
    assert new.tree is not None
    args, on = {"path": unit.config.warmup}, connection.label(new.number)
    try:
        unit.context.zygote.run(f"{warmup.__name__}:job_ask", args, [new.tree.fileno()], deadline=ASK_SECONDS, on=on)
    except JobError as error:
        raise FusecrError(f"it does not answer as it should: {error}") from None


def _reply(unit: Unit, link: Link, end: float) -> InitReply | None:
    while True:
        text = unit.context.guards.status(link).get("init_reply", "")
        if text:
            try:
                return parse_init_out(bytes.fromhex(text))
            except (ValueError, InitError):
                return None
        if time.monotonic() > end:
            return None
        time.sleep(0.01)


def same_init(one: InitReply, other: InitReply) -> bool:
    """Whether what is open on the one's connection could be served by the other."""
    return not difference(one, other)


def difference(one: InitReply, other: InitReply) -> str:
    """What differs, but for the version of the protocol."""
    other = replace(other, raw=one.raw, minor=one.minor)
    changed = [name for name in vars(one) if getattr(one, name) != getattr(other, name)]
    return ", ".join(f"{name} {getattr(one, name):#x} and {getattr(other, name):#x}" for name in changed)


def _drain(unit: Unit, old: Link) -> bool:
    """Let its users leave; then end it, and its guard serves who is left. Returns whether nobody was left."""
    end = time.monotonic() + DRAIN_SECONDS
    while time.monotonic() < end:
        if old.gone():
            return True
        time.sleep(0.02)
    if old.daemon.pidfd is not None and old.guard is not None and old.guard.alive():
        send_signal(old.daemon.pidfd, signal.SIGTERM)
    return False


def hand_back(unit: Unit) -> list[str]:
    """Let go of everything that is not being served by a sidecar; no mount is changed.

    :returns: what has to be kept, a text each
    :raises FusecrError: the present daemon is dead, and its recovery is not finished
    """
    current = unit.link(unit.current)
    if current is not None and not current.alive():
        raise FusecrError(f"unprotect {unit.key}", "its daemon is dead, and everybody would lose it", "wait for its recovery")
    unit.paused = True
    unit.put()
    unit.discard(unit.link(unit.warm))
    kept = []
    for link in list(unit.links.values()):
        if link.gone() or (link.alive() and unit.context.guards.stop(link)):
            unit.remove(link)
        else:
            status = unit.context.guards.status(link)
            users = f"{status['handles']} open handles" if status.get("handles") else "somebody who uses it"
            kept.append(f"connection {link.number} of a daemon that is dead: its guard stays for {users}")
    unit.event("unprotected", current.number if current else 0, kept=kept)
    return kept
