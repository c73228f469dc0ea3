# SPDX-License-Identifier: Apache-2.0
"""The client against a holder of a script: what it repeats, how long it waits, and that it closes what nobody gets."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from incus_fusecr.holder.client import HolderClient, HolderError, NoEntry

Serve = Callable[[list[object]], list[bytes]]
DIE = object()
SILENCE = object()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """``serve([answer, DIE, (answer, fds), SILENCE])``: the requests that came."""
    undo = contextlib.ExitStack()

    def start(answers: list[object]) -> list[bytes]:
        requests: list[bytes] = []
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(tmp_path / "h.sock"))
        listener.listen()
        listener.settimeout(10)

        def run() -> None:
            peer: socket.socket | None = None
            kept = []
            for answer in answers:
                if peer is None:
                    peer, _ = listener.accept()
                data, fds, _, _ = socket.recv_fds(peer, 1 << 17, 64)
                requests.append(data)
                for fd in fds:
                    os.close(fd)
                if answer is DIE:
                    peer.close()
                    peer = None
                elif answer is SILENCE:
                    kept.append(peer)
                    peer = None
                elif isinstance(answer, tuple):
                    socket.send_fds(peer, [answer[0]], answer[1])
                else:
                    peer.send(answer)  # type: ignore[arg-type]
            for sock in [*kept, *([peer] if peer else [])]:
                undo.callback(sock.close)

        thread = threading.Thread(target=run)
        thread.start()
        undo.callback(listener.close)
        undo.callback(thread.join, 20)
        return requests

    with undo:
        yield start


def client(tmp_path: Path, seconds: float = 10) -> HolderClient:
    return HolderClient(str(tmp_path / "h.sock"), seconds)


def test_a_holder_that_dies_over_a_call_is_asked_again(serve: Serve, tmp_path: Path) -> None:
    requests = serve([DIE, DIE, b'{"ok":true}'])
    with client(tmp_path) as holder:
        holder.put("a", {"x": 1})
    assert requests == [b'{"op": "put", "key": "a", "meta": {"x": 1}}'] * 3


def test_a_holder_that_is_only_coming_up_is_waited_for(serve: Serve, tmp_path: Path) -> None:
    with client(tmp_path) as holder:
        timer = threading.Timer(0.1, lambda: serve([b'{"ok":true}']))
        timer.start()
        holder.drop("a")
        timer.join()


def test_no_holder_is_an_error_after_the_deadline(tmp_path: Path) -> None:
    with client(tmp_path, 0.1) as holder, pytest.raises(HolderError, match=r"h\.sock: No such file.*systemctl status"):
        holder.drop("a")


def test_silence_ends_with_the_deadline_and_a_late_answer_is_nobodys(serve: Serve, tmp_path: Path) -> None:
    requests = serve([SILENCE, b'{"ok":true,"meta":{"second":1}}'])
    with client(tmp_path, 0.2) as holder:
        with pytest.raises(HolderError, match="no answer from"):
            holder.get("a")
        holder.seconds = 10
        assert holder.get("b") == ({"second": 1}, [])
    assert len(requests) == 2


def test_a_refusal_is_not_repeated(serve: Serve, tmp_path: Path) -> None:
    requests = serve([b'{"error":"no"}', b'{"error":"none","missing":true}'])
    with client(tmp_path) as holder:
        with pytest.raises(HolderError, match="holder: meta a: no") as error:
            holder.meta("a", {})
        assert not isinstance(error.value, NoEntry)
        with pytest.raises(NoEntry):
            holder.get("a")
    assert len(requests) == 2


def test_get_gives_fds_that_the_caller_owns(serve: Serve, tmp_path: Path) -> None:
    r, w = os.pipe()
    serve([(b'{"ok":true,"meta":{}}', [w])])
    with client(tmp_path) as holder:
        _, fds = holder.get("a")
        os.close(w)
        (fd,) = fds
        assert not os.get_inheritable(fd.fileno())
        os.write(fd.fileno(), b"x")
        fd.close()
    assert os.read(r, 9) == b"x"
    os.close(r)


def test_fds_of_a_refusal_are_closed(serve: Serve, tmp_path: Path) -> None:
    r, w = os.pipe()
    copy = os.dup(w)
    serve([(b'{"error":"strange"}', [copy])])
    with client(tmp_path) as holder, pytest.raises(HolderError):
        holder.get("a")
    os.close(copy)
    os.close(w)
    assert os.read(r, 1) == b""  # nobody has the other end
    os.close(r)


def test_what_cannot_be_right_is_not_sent(serve: Serve, tmp_path: Path) -> None:
    with client(tmp_path) as holder:
        with pytest.raises(HolderError, match="65 fds"):
            holder.put("a", {}, [0] * 65)
        with pytest.raises(HolderError, match="a message has at most"):
            holder.put("a", {"x": "y" * 70000})


def test_entries_go_on_after_the_last_key(serve: Serve, tmp_path: Path) -> None:
    requests = serve(
        [
            b'{"ok":true,"entries":[{"key":"a","meta":{},"fds":1},{"key":"b","meta":{"x":1},"fds":0}],"more":true}',
            b'{"ok":true,"entries":[{"key":"c","meta":{},"fds":2}],"more":false}',
        ]
    )
    with client(tmp_path) as holder:
        assert [(e.key, e.meta, e.fds) for e in holder.entries()] == [("a", {}, 1), ("b", {"x": 1}, 0), ("c", {}, 2)]
    assert [b'"after": ""' in requests[0], b'"after": "b"' in requests[1]] == [True, True]
