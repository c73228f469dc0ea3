# SPDX-License-Identifier: Apache-2.0
"""What to answer in place of a daemon that is frozen or not yet restored. Decides; does no system call.

The *stand-in* (dump) answers CRIU from recorded nodes. The *placeholder* (restore) moreover answers INIT with the recorded
reply, and LOOKUP and OPEN with the numbers that the restored daemon knows.

Counts matter: the kernel sends one FORGET for each LOOKUP that was answered, and libfuse aborts when it is told to forget
more than it counted. The daemon has counted at least one for each directory entry that was recorded, so each is given out
once; a long validity keeps the kernel from asking again, and the entries are expired when the daemon takes over.

A stand-in's daemon goes on with counts that nobody can change. So a stand-in gives out neither entries nor handles; CRIU
does not ask it for any (see :mod:`.paths`).
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass, field

from ..fuse import wire
from ..fuse.wire import Request
from .manifest import Connection, Handle

# Validity of entries while the placeholder answers, seconds; ends with the hand-over.
ENTRY_VALID = 3600
# Entries of daemons that find inodes by st_dev and st_ino keep a long one, see Answers.farewell().
ENTRY_VALID_KEPT = 10 * 365 * 86400
PRIVATE_FH = 0xFEED000000000000
# What of the open flags CRIU passes again; O_CREAT, O_EXCL, O_TRUNC are gone after the first open.
COMPARED_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_DIRECT | os.O_SYNC | os.O_NOATIME


@dataclass
class Recorded:
    """A recorded handle and how many openings it answered."""

    handle: Handle
    used: int = 0


@dataclass
class Answers:
    """State of one connection while its daemon cannot answer.

    :ivar init_reply: bytes for FUSE_INIT; empty for a stand-in, which never sees one
    :ivar private: handles that CRIU opened for itself: fh -> (pid, nodeid); must be empty before the hand-over
    :ivar probes: cookie of a probe ioctl -> (nodeid, fh)
    :ivar refused: look-ups and openings that a stand-in refused
    :ivar leaving: what was given out is being expired: nothing more is
    """

    connection: Connection
    init_reply: bytes = b""
    private: dict[int, tuple[int, int]] = field(default_factory=dict)
    probes: dict[int, tuple[int, int]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    initialised: bool = False
    refused: int = 0
    leaving: bool = False

    def __post_init__(self) -> None:
        self._nodes = {n.nodeid: n for n in self.connection.nodes}
        self._names = {(n.parent, os.fsencode(n.name)): n.nodeid for n in self.connection.names}
        self._pool = [Recorded(h) for h in sorted(self.connection.handles, key=lambda h: (h.pid, h.fd))]
        self._mapped = {h.nodeid for h in self.connection.handles if h.fd < 0}
        self._claimed: Counter[int] = Counter()
        self._given: Counter[int] = Counter()
        self._next_private = PRIVATE_FH
        self._kept = bool(self.init_reply) and self.connection.pointer_nodeids

    def answer(self, request: Request) -> bytes | None:
        """The reply to write, None for requests that want none."""
        self.counts[request.name] += 1
        op = request.opcode
        if op in (wire.FUSE_FORGET, wire.FUSE_BATCH_FORGET, wire.FUSE_INTERRUPT):
            return None
        if op == wire.FUSE_INIT:
            self.initialised = True
            return wire.reply(request.unique, 0 if self.init_reply else errno.EIO, self.init_reply)
        try:
            body = self._body(request)
        except OSError as error:
            return wire.reply(request.unique, error.errno or errno.EIO)
        return wire.reply(request.unique, 0, body)

    def _body(self, request: Request) -> bytes:
        op = request.opcode
        if (self.leaving or not self.init_reply) and op in (wire.FUSE_LOOKUP, wire.FUSE_OPEN, wire.FUSE_OPENDIR):
            # ENOMEM: with any other error a LOOKUP would also unhash the dentry (fs/fuse/dir.c, fuse_dentry_revalidate()).
            self.refused += 1
            raise OSError(errno.ENOMEM, "")
        if op == wire.FUSE_LOOKUP:
            return self._lookup(request)
        if op in (wire.FUSE_GETATTR, wire.FUSE_SETATTR):
            # SETATTR: CRIU may set times or modes that are as recorded; the daemon's own state stays.
            return wire.ATTR_OUT.pack(0, 0, 0) + self._attr(request.nodeid)
        if op == wire.FUSE_STATFS:
            return wire.STATFS_OUT.pack(*self.connection.statfs, 0, *[0] * 6)
        if op in (wire.FUSE_OPEN, wire.FUSE_OPENDIR):
            return self._open(request)
        if op in (wire.FUSE_RELEASE, wire.FUSE_RELEASEDIR):
            self._release(request)
            return b""
        if op == wire.FUSE_IOCTL:
            fh, _flags, command, argument, _in, _out = wire.IOCTL_IN.unpack_from(request.body)
            if command == wire.PROBE_IOCTL:
                self.probes[argument] = (request.nodeid, fh)
            raise OSError(errno.ENOTTY, "")
        if op in (wire.FUSE_ACCESS, wire.FUSE_FLUSH, wire.FUSE_FSYNC, wire.FUSE_FSYNCDIR, wire.FUSE_SYNCFS):
            return b""
        if op == wire.FUSE_GETXATTR:
            raise OSError(errno.ENODATA, "")
        if op == wire.FUSE_READ and self.init_reply and not self.leaving and request.nodeid in self._mapped and request.pid:
            # CRIU writes the changed pages of a private mapping, and the kernel reads each before it copies it (mm/memory.c,
            # do_cow_fault()). Nobody sees what is answered: CRIU overwrites it, and farewell() drops the pages. As much as
            # was asked for, since a short answer would be the end of the file. Pid 0 is a process outside of the container.
            _fh, _offset, size = wire.READ_IN.unpack_from(request.body)
            return bytes(size)
        if op in (wire.FUSE_READ, wire.FUSE_WRITE, wire.FUSE_READDIR, wire.FUSE_READDIRPLUS):
            # Contents are the daemon's: nobody but a stranger asks now. EIO to it, nothing made up.
            raise OSError(errno.EIO, "")
        if op == wire.FUSE_LISTXATTR:
            return bytes(8)
        # Not ENOSYS: for many operations the kernel would remember that the daemon lacks them, and never ask it again.
        raise OSError(errno.EOPNOTSUPP, "")

    def _attr(self, nodeid: int) -> bytes:
        node = self._nodes.get(nodeid)
        if node is None:
            raise OSError(errno.ESTALE, "")
        return wire.ATTR.pack(*node.attr)

    def _lookup(self, request: Request) -> bytes:
        name = request.body.split(b"\0", 1)[0]
        nodeid = self._names.get((request.nodeid, name))
        if nodeid is None:
            raise OSError(errno.ENOENT, "")
        self._given[nodeid] += 1
        valid = ENTRY_VALID_KEPT if self._kept else ENTRY_VALID
        generation = self._nodes[nodeid].generation
        # Attributes have no validity: the daemon is asked at their first use after the hand-over.
        return wire.ENTRY_OUT.pack(nodeid, generation, valid, 0, 0, 0) + self._attr(nodeid)

    def _open(self, request: Request) -> bytes:
        flags, _open_flags = wire.OPEN_IN.unpack_from(request.body)
        found = self._recorded(request.nodeid, request.pid, flags)
        if found is None:
            fh = self._next_private
            self._next_private += 1
            self.private[fh] = (request.pid, request.nodeid)
            return wire.OPEN_OUT.pack(fh, 0, 0)
        found.used += 1
        self._claimed[found.handle.fh] += 1
        return wire.OPEN_OUT.pack(found.handle.fh, found.handle.open_flags, 0)

    def _recorded(self, nodeid: int, pid: int, flags: int) -> Recorded | None:
        """An unused record of this task. Records of a handle that another task shares are taken last: its description was
        opened once already, by the task that CRIU chose."""
        fitting = [
            r
            for r in self._pool
            if not r.used and r.handle.nodeid == nodeid and r.handle.pid == pid and not (r.handle.flags ^ flags) & COMPARED_FLAGS
        ]
        return min(fitting, key=lambda r: (self._claimed[r.handle.fh] > 0, r.handle.fd < 0), default=None)

    def _release(self, request: Request) -> None:
        fh, *_ = wire.RELEASE_IN.unpack_from(request.body)
        if self.private.pop(fh, None) is not None:
            return
        for recorded in self._pool:
            if recorded.used and recorded.handle.fh == fh and recorded.handle.nodeid == request.nodeid:
                recorded.used = 0
                self._claimed[fh] -= 1
                return

    def farewell(self) -> list[bytes]:
        """Notifications to write before the daemon takes over: nothing that was answered here may outlive this.

        A stand-in has none: it gave out neither entries nor pages, and its attributes were never valid.

        Entries of a daemon whose node ids are addresses are left: it finds inodes by st_dev and st_ino, which are others
        on another host, so the first LOOKUP would give a new nodeid, and every open path below would read "(deleted)".
        """
        if not self.init_reply:
            return []
        notes = [
            wire.inval_pages(nodeid) if nodeid in self._mapped else wire.inval_attr(nodeid) for nodeid in sorted(self._nodes)
        ]
        if not self._kept:
            # All that could have been given, not only what was: a former agent may have answered before this one.
            notes += [wire.inval_entry(parent, name, wire.FUSE_EXPIRE_ONLY) for parent, name in sorted(self._names)]
        return notes

    def over_counted(self) -> dict[int, int]:
        """nodeid -> times it was given out beyond its recorded entries; the daemon would abort on their FORGET."""
        entries = Counter(self._names.values())
        return {n: count - entries[n] for n, count in self._given.items() if count > entries[n]}

    def unused(self) -> list[Handle]:
        """Recorded handles that no opening took, apart from those shared with a taken one."""
        return [r.handle for r in self._pool if not r.used and not self._claimed[r.handle.fh]]
