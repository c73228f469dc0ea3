# SPDX-License-Identifier: Apache-2.0
"""kill -9 of the holder, and what systemd's fd store gives back; systemd itself is in tests/lab/test_lab_modes.py."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from pathlib import Path

import pytest
from holder_box import PYTHON, Box, Pipe, fds_of, hung_up, same_pipe, wait_for

from incus_fusecr.holder.server import MAX_CLIENTS
from incus_fusecr.holder.table import MAX_MESSAGE

pytestmark = [pytest.mark.requires_root, pytest.mark.requires_command(PYTHON)]


def test_kill_and_restart_give_everything_back(box: Box, pipe: Pipe) -> None:
    holder = box(systemd=True)
    assert holder.systemd
    (r, w), (r2, w2), (r3, w3) = pipe(), pipe(), pipe()
    holder.client.put("conn-1", {"n": 1}, [w, w2])
    holder.client.put("conn-2", {"n": 2}, [w3])
    holder.client.put("current-lxcfs", {"exe": "/usr/bin/lxcfs"})
    holder.client.meta("conn-2", {"n": 3})
    for fd in (w, w2, w3):
        fd.close()
    for _ in range(3):  # what came back must come back again
        holder.kill()
        assert not hung_up(r) and not hung_up(r2) and not hung_up(r3)
        holder.start()
        assert "STATUS=3 entries came back" in holder.systemd.said[-1]
        found = {entry.key: (entry.meta, entry.fds) for entry in holder.client.entries()}
        assert found == {
            "conn-1": ({"n": 1}, 2), "conn-2": ({"n": 3}, 1), "current-lxcfs": ({"exe": "/usr/bin/lxcfs"}, 0),
        }
        fds = holder.client.get("conn-1")[1]
        assert [same_pipe(fd, x) for fd, x in zip(fds, (r, r2), strict=True)] == [True, True]
        for fd in fds:
            fd.close()
    assert not holder.log.read_text()
    holder.client.drop("conn-1")
    holder.restart()
    assert hung_up(r) and hung_up(r2) and not hung_up(r3)
    assert [entry.key for entry in holder.client.entries()] == ["conn-2", "current-lxcfs"]


def test_the_same_fd_again_stays_in_the_store(box: Box, pipe: Pipe) -> None:
    """systemd drops the second of two fds of one description, with its name."""
    holder = box(systemd=True)
    assert holder.systemd
    r, w = pipe()
    for number in range(4):
        holder.client.put("a", {"n": number}, [w, w])
        holder.client.put("b", {"n": number}, [w])
        holder.systemd.read()
    assert len(holder.systemd.stored) == 2
    assert len({os.fstat(fd).st_ino for _, fd in holder.systemd.stored}) == 2
    w.close()
    holder.restart()
    assert {e.key: (e.meta["n"], e.fds) for e in holder.client.entries()} == {"a": (3, 2), "b": (3, 1)}
    assert not hung_up(r)


def test_killed_at_any_moment_every_entry_is_the_old_or_the_new_one(box: Box, pipe: Pipe) -> None:
    holder = box(systemd=True)
    pipes = {}
    for number in range(8):
        pipes[number] = pipe()
        holder.client.put("a", {"n": number}, [pipes[number][1]])
        answered = number
        with holder.raw() as sock:  # one more whose answer nobody waits for
            pipes[-1 - number] = pipe()
            message = json.dumps({"op": "put", "key": "a", "meta": {"n": -1 - number}}).encode()
            socket.send_fds(sock, [message], [pipes[-1 - number][1].fileno()])
            time.sleep(number * 0.0001)
            holder.kill()
        holder.start()
        meta, (fd,) = holder.client.get("a")
        with fd:
            assert meta["n"] in (answered, -1 - number)
            assert same_pipe(fd, pipes[meta["n"]][0])


@pytest.mark.parametrize("first", ["old", "new"])
def test_what_the_store_has_in_two_versions_counts_once(box: Box, pipe: Pipe, first: str) -> None:
    """As after a death between storing the new and removing the old."""
    holder = box(systemd=True)
    assert holder.systemd
    (r, w), (r2, w2) = pipe(), pipe()
    holder.client.put("a", {"n": 1}, [w])
    holder.systemd.read()
    ((name, fd),) = holder.systemd.stored
    old = (name, os.dup(fd))
    holder.client.put("a", {"n": 2}, [w2])
    holder.kill()
    w.close()
    w2.close()
    holder.systemd.stored = [old, *holder.systemd.stored] if first == "old" else [*holder.systemd.stored, old]
    holder.start()
    holder.systemd.read()
    assert [e.meta for e in holder.client.entries()] == [{"n": 2}]
    assert [n for n, _ in holder.systemd.stored] == ["a@2"]
    assert hung_up(r) and not hung_up(r2)
    holder.client.put("b", {})  # generations go on above what the store had
    holder.systemd.read()
    assert [n for n, _ in holder.systemd.stored] == ["a@2", "b@3"]


def test_rubbish_in_the_store_is_dropped_and_told(box: Box) -> None:
    holder = box(systemd=True)
    assert holder.systemd
    holder.client.put("good", {"n": 1})
    holder.kill()
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    c, d = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    a.send(b"no json")
    holder.systemd.stored += [
        ("null@9", os.open("/dev/null", os.O_RDONLY)), ("bad@8", b.detach()), ("empty@7", d.detach()),
        ("Bad Key@6", os.open("/dev/null", os.O_RDONLY)), ("stored", os.open("/dev/null", os.O_RDONLY)),
    ]
    a.close()
    holder.start()
    c.close()
    holder.systemd.read()
    assert [entry.key for entry in holder.client.entries()] == ["good"]
    assert [name for name, _ in holder.systemd.stored] == ["good@1"]
    log = holder.log.read_text()
    assert all(f"<4>systemd's store: {name}" in log for name in ("null@9", "bad@8", "empty@7", "Bad Key@6", "stored"))
    assert {fd: link for fd, link in fds_of(holder.pid).items() if fd > 2 and link == "/dev/null"} == {}


def test_a_manager_that_reads_nothing_delays_the_answers_only_of_changes(box: Box, pipe: Pipe) -> None:
    holder = box(systemd=True)
    assert holder.systemd
    holder.client.put("first", {"n": 1})
    limit = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 20
    socks = []
    w = pipe()[1]
    with contextlib.ExitStack() as undo:
        for number in range(min(limit, MAX_CLIENTS - 4)):
            sock = undo.enter_context(holder.raw())
            message = json.dumps({"op": "put", "key": f"k-{number}", "meta": {}}).encode()
            socket.send_fds(sock, [message], [w.fileno()])
            socks.append(sock)
        if limit > len(socks):
            pytest.skip("needs a net.unix.max_dgram_qlen below 36")
        wait_for("all changes made", lambda: len(list(holder.client.entries())) == limit + 1)  # it serves meanwhile
        assert holder.client.get("k-0")[0] == {}
        waiting = [s for s in socks if not select.select([s], [], [], 0)[0]]
        assert waiting
        socks.pop(socks.index(waiting[0])).close()  # one that goes away without its answer

        def all_answered() -> bool:
            holder.systemd.read()  # type: ignore[union-attr]
            return all(select.select([s], [], [], 0)[0] for s in socks)

        wait_for("all answers", all_answered)
        assert {s.recv(MAX_MESSAGE) for s in socks} == {b'{"ok":true}'}

    def all_stored() -> bool:  # also the one of the client that went away
        holder.systemd.read()  # type: ignore[union-attr]
        return len(holder.systemd.stored) == limit + 1  # type: ignore[union-attr]

    wait_for("all entries in the store", all_stored)
    holder.restart()
    assert len(list(holder.client.entries())) == limit + 1
