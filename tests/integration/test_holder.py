# SPDX-License-Identifier: Apache-2.0
"""The holder as a process: real fds, kill -9, the store, clients that mean no good."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from holder_box import PYTHON, SECONDS, Box, Pipe, fds_of, holders, hung_up, rss, same_pipe, wait_for

from incus_fusecr.holder.client import HolderClient, HolderError, NoEntry, launch
from incus_fusecr.holder.server import MAX_CLIENTS
from incus_fusecr.holder.table import MAX_FDS, MAX_MESSAGE
from incus_fusecr.linux.fd import Fd

pytestmark = [pytest.mark.requires_root, pytest.mark.requires_command(PYTHON)]
ROOM = 2500  # kB that the holder may have above an interpreter that does nothing


def test_fds_outlive_the_one_who_put_them(box: Box, pipe: Pipe) -> None:
    holder = box()
    r, w = pipe()
    r2, w2 = pipe()
    holder.client.put("conn-5", {"pid": 7, "name": "é"}, [w, w2])
    w.close()
    w2.close()
    assert not hung_up(r) and not hung_up(r2)
    meta, fds = holder.client.get("conn-5")
    assert meta == {"pid": 7, "name": "é"} and [same_pipe(fd, x) for fd, x in zip(fds, (r, r2), strict=True)] == [True, True]
    for fd in fds:
        fd.close()
    holder.client.drop("conn-5")
    wait_for("both pipes hung up", lambda: hung_up(r) and hung_up(r2))
    with pytest.raises(NoEntry):
        holder.client.get("conn-5")
    holder.client.drop("conn-5")


@pytest.mark.requires_fuse
def test_a_fuse_connection_stays_open(box: Box) -> None:
    holder = box()
    with Fd(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)) as fuse:
        holder.client.put("conn-1", {}, [fuse])
    assert "/dev/fuse" in fds_of(holder.pid).values()


def test_put_replaces_fds_and_meta_and_closes_the_old(box: Box, pipe: Pipe) -> None:
    holder = box()
    (r, w), (r2, w2) = pipe(), pipe()
    holder.client.put("a", {"n": 1}, [w])
    w.close()
    holder.client.put("a", {"n": 2}, [w2])
    wait_for("the first pipe hung up", lambda: hung_up(r))
    w2.close()
    assert not hung_up(r2)
    holder.client.meta("a", {"n": 3})
    assert not hung_up(r2)
    (entry,) = holder.client.entries()
    assert (entry.key, entry.meta, entry.fds) == ("a", {"n": 3}, 1)
    with pytest.raises(NoEntry):
        holder.client.meta("b", {})


def test_many_entries_come_back_in_pages(box: Box) -> None:
    holder = box()
    for number in range(120):
        holder.client.put(f"k-{number:03}", {"x": "y" * 1500})
    assert [entry.key for entry in holder.client.entries()] == [f"k-{number:03}" for number in range(120)]


def test_nothing_is_inherited_and_nothing_leaks(box: Box, pipe: Pipe) -> None:
    holder = box()
    before = len(fds_of(holder.pid))
    for number in range(30):
        _, w = pipe()
        holder.client.put(f"k-{number % 3}", {}, [w] * 5)
        for fd in holder.client.get("k-0")[1]:
            fd.close()
        with pytest.raises(HolderError, match="an open file"), open("/etc/passwd") as file:
            holder.client.put("k-0", {}, [w.fileno(), file.fileno()])
    now = fds_of(holder.pid)
    assert len(now) - before == 1 + 3 * 5  # the client's connection
    for fd in now:
        if fd > 2:
            flags = int(Path(f"/proc/{holder.pid}/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8)
            assert flags & os.O_CLOEXEC, now[fd]
    for number in range(3):
        holder.client.drop(f"k-{number}")
    assert len(fds_of(holder.pid)) == before + 1


def test_files_whose_close_may_ask_a_daemon_are_refused(box: Box, pipe: Pipe) -> None:
    holder = box()
    r, w = pipe()
    for path in ("/etc/passwd", "/etc", "/dev/null"):
        number = os.open(path, os.O_RDONLY)
        with Fd(number), pytest.raises(HolderError, match=f"fd 1 of 2: an open file .{path}"):
            holder.client.put("a", {}, [w, number])
    with pytest.raises(NoEntry):
        holder.client.get("a")
    w.close()
    wait_for("the pipe of the refused message hung up", lambda: hung_up(r))
    numbers = (
        os.open("/etc", os.O_PATH), os.open("/proc/self/ns/mnt", os.O_RDONLY), os.pidfd_open(os.getpid()), os.memfd_create("x"),
    )
    holder.client.put("a", {}, numbers)
    for number in numbers:
        os.close(number)
    assert next(holder.client.entries()).fds == 4


def test_a_second_holder_ends_at_once_and_the_first_is_unharmed(box: Box, tmp_path: Path) -> None:
    holder = box()
    holder.client.put("a", {})
    launch(holder.path)
    done = subprocess.run(
        [PYTHON, "-I", "-S", sys.modules["incus_fusecr.holder.main"].__file__ or "", holder.path],
        capture_output=True, text=True, timeout=SECONDS,
    )
    assert done.returncode == 1 and "another one holds" in done.stderr and "Traceback" not in done.stderr
    wait_for("the end of the launched one", lambda: holders(holder.path) == {holder.pid})
    assert [entry.key for entry in holder.client.entries()] == ["a"]


def test_launch_leaves_a_holder_that_outlives_its_starter(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "holder.sock")
    starter = f"from incus_fusecr.holder.client import launch; launch({path!r})"
    subprocess.run([sys.executable, "-c", starter], check=True, timeout=SECONDS)
    with HolderClient(path, SECONDS) as client:
        client.put("a", {})
        assert client._sock
        pid = int.from_bytes(client._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert Path(f"/proc/{pid}/comm").read_text() == "fusecr-holder\n"
    os.kill(pid, 9)
    wait_for("its end", lambda: os.waitpid(pid, os.WNOHANG) != (0, 0))


# -- systemd's watchdog


def test_the_watchdog_is_fed(box: Box) -> None:
    holder = box(systemd=True, environment={"WATCHDOG_USEC": "100000"})
    manager = holder.systemd
    assert manager

    def beats() -> bool:
        manager.read()
        return manager.said.count("WATCHDOG=1") >= 3

    wait_for("three signs of life", beats)


def test_without_a_watchdog_it_never_wakes_up(box: Box) -> None:
    holder = box(systemd=True)
    holder.client.put("a", {})

    def switches() -> str:
        return Path(f"/proc/{holder.pid}/status").read_text().split("voluntary_ctxt_switches:")[1].split()[0]

    wait_for("it sleeps", lambda: "epoll" in Path(f"/proc/{holder.pid}/wchan").read_text() or True)
    time.sleep(0.2)
    before = switches()
    time.sleep(1)
    assert switches() == before


# -- clients that mean no good


def ask(sock: socket.socket, data: bytes, fds: tuple[int, ...] = ()) -> dict[str, object]:
    socket.send_fds(sock, [data], fds)
    return dict(json.loads(sock.recv(2 * MAX_MESSAGE)))


def test_bad_messages_are_answered_and_close_what_they_brought(box: Box, pipe: Pipe) -> None:
    holder = box()
    r, w = pipe()
    before = len(fds_of(holder.pid))
    with holder.raw() as sock:
        for data in (b"x", b"[" * 60000, b'{"op":"get","key":"../x"}', b'{"op":"get","key":"a"}', b"y" * (MAX_MESSAGE + 5)):
            assert "error" in ask(sock, data, (w.fileno(), w.fileno()))
        many = tuple([w.fileno()] * (MAX_FDS + 60))
        assert "at most 64 fds" in str(ask(sock, b'{"op":"put","key":"a","meta":{}}', many)["error"])
        assert ask(sock, b'{"op":"list","after":""}')["entries"] == []
        assert len(fds_of(holder.pid)) == before + 1
    w.close()
    wait_for("nothing of it is left", lambda: hung_up(r) and len(fds_of(holder.pid)) == before)


def test_a_client_that_asks_and_does_not_read_is_thrown_out(box: Box) -> None:
    holder = box()
    holder.client.put("big", {"x": "y" * 40000})
    with holder.raw() as sock:
        sock.setblocking(False)
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                with contextlib.suppress(BlockingIOError):
                    sock.send(b'{"op":"get","key":"big"}')
                    sent += 1
            pytest.fail(f"{sent} questions, and still connected")
    assert holder.client.get("big")[0]["x"]


def test_many_idle_clients_keep_nobody_out(box: Box) -> None:
    holder = box()
    with contextlib.ExitStack() as undo:
        idle = [undo.enter_context(holder.raw()) for _ in range(3 * MAX_CLIENTS)]
        holder.client.put("a", {})
        assert len(fds_of(holder.pid)) < 2 * MAX_CLIENTS
        assert idle[0].recv(1) == b""  # the first is out
        assert "ok" in ask(idle[-1], b'{"op":"get","key":"a"}')


def test_without_numbers_left_the_idlest_makes_room(box: Box) -> None:
    holder = box()
    resource.prlimit(holder.pid, resource.RLIMIT_NOFILE, (24, 24))
    with contextlib.ExitStack() as undo:
        for _ in range(40):
            undo.enter_context(holder.raw())
        holder.client.put("a", {})
        assert next(holder.client.entries()).key == "a"


def test_half_a_conversation_holds_nobody_up(box: Box, pipe: Pipe) -> None:
    holder = box()
    for number in range(50):
        sock = holder.raw()
        if number % 2:
            sock.send(b'{"op":"list","after":""}')
        sock.close()
    holder.client.put("a", {})
    assert next(holder.client.entries()).key == "a"


def test_another_user_and_another_namespace_are_refused(box: Box) -> None:
    holder = box()
    holder.client.put("a", {})
    os.chmod(holder.path, 0o666)
    for directory in Path(holder.path).parents:
        if directory.stat().st_uid == 0 and directory != Path("/") and directory != Path("/tmp"):
            directory.chmod(0o755)
    script = (
        "import socket,sys\ns=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET)\ns.connect(sys.argv[1])\n"
        "try:\n s.send(b'{\"op\":\"get\",\"key\":\"a\"}'); print(s.recv(100))\nexcept OSError as e: print('refused')"
    )
    base = [PYTHON, "-c", script, holder.path]
    wraps = {
        "uid": ["setpriv", "--reuid", "65534", "--clear-groups"],
        "user": ["unshare", "--user", "--map-root-user"],
        "pid": ["unshare", "--pid", "--fork"],
        "none": [],
    }
    answers = {}
    for name, wrap in wraps.items():
        done = subprocess.run([*wrap, *base], capture_output=True, text=True, timeout=SECONDS)
        if name == "user" and done.returncode and "unshare failed" in done.stderr:
            pytest.skip("needs user namespaces")
        answers[name] = done.stdout.strip()
    assert "ok" in answers.pop("none")
    assert all(answer in ("b''", "refused") for answer in answers.values()), answers
    log = holder.log.read_text()
    assert "refused a connection" in log and log.count("refused") <= 3


# -- its size


def test_it_is_small_and_stays_so(box: Box, pipe: Pipe) -> None:
    """Measured against an interpreter that does nothing: how big that is differs between builds."""
    empty = subprocess.Popen([PYTHON, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        wait_for("an interpreter that waits", lambda: "read" in Path(f"/proc/{empty.pid}/wchan").read_text())
        bare = rss(empty.pid)
    finally:
        empty.communicate(b"\n", timeout=SECONDS)
    holder = box(systemd=True)
    holder.restart()
    assert holder.systemd
    _, w = pipe()

    def load() -> None:
        for number in range(100):
            holder.client.put(f"conn-{number}", {"argv": ["x" * 50] * 5}, [w, w])
            holder.systemd.read()  # type: ignore[union-attr]
        for number in range(0, 100, 10):
            for fd in holder.client.get(f"conn-{number}")[1]:
                fd.close()
        assert len(list(holder.client.entries())) == 100

    load()
    first = rss(holder.pid)
    assert first < bare + ROOM, f"{first} kB, an empty interpreter has {bare} kB"
    for _ in range(10):
        load()
    assert rss(holder.pid) < first + 300
