# SPDX-License-Identifier: Apache-2.0
"""What a stand-in and a placeholder answer."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import struct

from test_manifest import good

from incus_fusecr.checkpoint import manifest
from incus_fusecr.checkpoint.answers import PRIVATE_FH, Answers
from incus_fusecr.checkpoint.manifest import Connection, Handle
from incus_fusecr.fuse import wire
from incus_fusecr.fuse.wire import Request


def connection(**changes: object) -> Connection:
    found = manifest.parse(json.dumps(good()).encode()).connections[0]
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def handle(pid: int, fd: int, fh: int, flags: int = os.O_RDWR) -> Handle:
    return Handle(pid=pid, fd=fd, nodeid=2, fh=fh, flags=flags, open_flags=2, path="/mnt/f/a")


def ask(answers: Answers, opcode: int, nodeid: int = 2, pid: int = 9, body: bytes = b"") -> tuple[int, bytes]:
    reply = answers.answer(Request(opcode, 4, nodeid, 0, 0, pid, body))
    assert reply is not None
    size, error, unique = wire.OUT_HEADER.unpack_from(reply)
    assert size == len(reply) and unique == 4
    return -error, reply[wire.OUT_HEADER.size :]


def open_(answers: Answers, pid: int, flags: int = os.O_RDWR) -> int:
    error, body = ask(answers, wire.FUSE_OPEN, pid=pid, body=wire.OPEN_IN.pack(flags, 0))
    assert error == 0
    return int(wire.OPEN_OUT.unpack(body)[0])


def release(answers: Answers, fh: int) -> None:
    assert ask(answers, wire.FUSE_RELEASE, body=wire.RELEASE_IN.pack(fh, 0, 0, 0))[0] == 0


def test_lookup_gives_the_recorded_node_and_no_valid_attributes() -> None:
    answers = Answers(connection(), b"x")
    error, body = ask(answers, wire.FUSE_LOOKUP, nodeid=1, body=b"a\xff\0")
    nodeid, generation, entry_valid, attr_valid, *_ = wire.ENTRY_OUT.unpack_from(body)
    assert (error, nodeid, generation, attr_valid) == (0, 2, 3, 0)
    assert 0 < entry_valid < 100_000
    assert ask(answers, wire.FUSE_LOOKUP, nodeid=1, body=b"b\0")[0] == errno.ENOENT


def test_a_second_lookup_of_a_name_is_counted() -> None:
    answers = Answers(connection(), b"x")
    ask(answers, wire.FUSE_LOOKUP, nodeid=1, body=b"a\xff\0")
    assert answers.over_counted() == {}
    ask(answers, wire.FUSE_LOOKUP, nodeid=1, body=b"a\xff\0")
    assert answers.over_counted() == {2: 1}


def test_handles_go_to_their_task_in_order_of_descriptors() -> None:
    answers = Answers(connection(handles=[handle(9, 5, 50), handle(9, 3, 30), handle(8, 3, 80)]), b"x")
    assert [open_(answers, 9), open_(answers, 9), open_(answers, 8)] == [30, 50, 80]
    assert not answers.private and not answers.unused()


def test_a_shared_handle_is_not_given_twice_while_others_wait() -> None:
    # Task 9 has descriptor 3 in common with task 8, and one of its own: CRIU opens the common one in task 8.
    answers = Answers(connection(handles=[handle(8, 3, 30), handle(9, 3, 30), handle(9, 4, 40)]), b"x")
    assert open_(answers, 8) == 30
    assert open_(answers, 9) == 40


def test_flags_decide_and_strangers_get_private_handles() -> None:
    answers = Answers(connection(handles=[handle(9, 3, 30, os.O_RDWR | os.O_APPEND | os.O_CREAT)]), b"x")
    assert open_(answers, 9, os.O_RDWR) == PRIVATE_FH
    assert open_(answers, 9, os.O_RDWR | os.O_APPEND) == 30
    assert open_(answers, 7, os.O_RDWR | os.O_APPEND) == PRIVATE_FH + 1
    assert len(answers.private) == 2
    release(answers, PRIVATE_FH)
    release(answers, PRIVATE_FH + 1)
    assert not answers.private


def test_a_released_handle_can_be_opened_again() -> None:
    answers = Answers(connection(handles=[handle(9, 3, 30)]), b"x")
    release(answers, open_(answers, 9))
    assert open_(answers, 9) == 30


def test_probe_is_noted_and_refused() -> None:
    answers = Answers(connection())
    body = wire.IOCTL_IN.pack(1 << 63, 0, wire.PROBE_IOCTL, 17, 0, 0)
    assert ask(answers, wire.FUSE_IOCTL, body=body)[0] == errno.ENOTTY
    assert answers.probes == {17: (2, 1 << 63)}


def test_a_stand_in_gives_out_nothing_that_its_daemon_would_have_to_take_back() -> None:
    answers = Answers(connection(handles=[handle(9, 3, 30)]))
    # ENOMEM is the one error after which the kernel keeps the dentry, and has counted nothing
    assert ask(answers, wire.FUSE_LOOKUP, nodeid=1, body=b"a\xff\0") == (errno.ENOMEM, b"")
    for opcode in (wire.FUSE_OPEN, wire.FUSE_OPENDIR):
        assert ask(answers, opcode, body=wire.OPEN_IN.pack(os.O_RDWR, 0)) == (errno.ENOMEM, b"")
    assert answers.refused == 3


def test_contents_are_never_made_up() -> None:
    answers = Answers(connection())
    for opcode in (wire.FUSE_READ, wire.FUSE_WRITE, wire.FUSE_READDIR, wire.FUSE_READDIRPLUS):
        assert ask(answers, opcode, body=bytes(40)) == (errno.EIO, b"")


def test_no_answer_makes_the_kernel_stop_asking() -> None:
    # ENOSYS is remembered for the life of a connection (fc->no_access, no_flush, no_lock, ...).
    answers = Answers(connection())
    for opcode in range(1, 60):
        reply = answers.answer(Request(opcode, 4, 2, 0, 0, 9, bytes(80)))
        if reply is not None:
            assert wire.OUT_HEADER.unpack_from(reply)[1] != -errno.ENOSYS, opcode


def test_init_only_from_a_placeholder() -> None:
    assert ask(Answers(connection()), wire.FUSE_INIT, body=bytes(64))[0] == errno.EIO
    placeholder = Answers(connection(), b"reply")
    assert ask(placeholder, wire.FUSE_INIT, body=bytes(64)) == (0, b"reply")
    assert placeholder.initialised


def entries(notes: list[bytes]) -> list[tuple[int, bytes, int]]:
    found = []
    for note in notes:
        _, code, unique = wire.OUT_HEADER.unpack_from(note)
        assert unique == 0
        if code == wire.FUSE_NOTIFY_INVAL_ENTRY:
            parent, size, flags = wire.NOTIFY_INVAL_ENTRY_OUT.unpack_from(note, wire.OUT_HEADER.size)
            name = note[wire.OUT_HEADER.size + wire.NOTIFY_INVAL_ENTRY_OUT.size :]
            assert name[size:] == b"\0"
            found.append((parent, name[:size], flags))
    return found


def test_everything_answered_is_expired_at_the_hand_over() -> None:
    answers = Answers(connection(), b"x")
    notes = answers.farewell()
    assert entries(notes) == [(1, b"a\xff", wire.FUSE_EXPIRE_ONLY)]
    attributes = [n for n in notes if struct.unpack_from("<i", n, 4)[0] == wire.FUSE_NOTIFY_INVAL_INODE]
    assert len(attributes) == 2


def test_pages_of_mapped_files_are_made_up_for_criu_and_dropped() -> None:
    mapped = connection(handles=[handle(9, -1, 30, os.O_RDONLY)])
    read = wire.READ_IN.pack(30, 4096, 8192) + bytes(20)
    assert ask(Answers(mapped, b"x"), wire.FUSE_READ, body=read) == (0, bytes(8192))
    dropped = wire.inval_pages(2)
    assert dropped in Answers(mapped, b"x").farewell()
    # neither of files that are open only, nor for a process outside of the container, nor on the source
    assert ask(Answers(connection(handles=[handle(9, 3, 30)]), b"x"), wire.FUSE_READ, body=read)[0] == errno.EIO
    assert ask(Answers(mapped, b"x"), wire.FUSE_READ, pid=0, body=read)[0] == errno.EIO
    assert ask(Answers(mapped), wire.FUSE_READ, body=read)[0] == errno.EIO


def test_entries_of_daemons_that_look_inodes_up_by_number_stay_on_restore_only() -> None:
    pointers = connection(pointer_nodeids=True)
    assert entries(Answers(pointers, b"x").farewell()) == []


def test_a_stand_in_has_nothing_to_expire() -> None:
    assert Answers(connection()).farewell() == []


def test_who_leaves_gives_out_no_more_entries() -> None:
    answers = Answers(connection(), b"x")
    answers.leaving = True
    assert ask(answers, wire.FUSE_LOOKUP, nodeid=1, body=b"a\xff\0") == (errno.ENOMEM, b"")
    assert ask(answers, wire.FUSE_OPEN, body=wire.OPEN_IN.pack(os.O_RDWR, 0)) == (errno.ENOMEM, b"")
    assert ask(answers, wire.FUSE_GETATTR)[0] == 0 and answers.over_counted() == {}
