# SPDX-License-Identifier: Apache-2.0
"""The control socket and the commands that ask it."""

from __future__ import annotations

import errno
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from incus_fusecr.cli import main as cli
from incus_fusecr.errors import FusecrError, UsageError
from incus_fusecr.recovery import control
from incus_fusecr.recovery.events import EventLog

UNIT = {
    "name": "lxcfs", "mountpoint": "/var/lib/lxcfs", "state": "protected", "pid": 7, "connection": 40, "exe": "/usr/bin/lxcfs",
    "spare": 9, "failures": 0, "problem": "", "connections": [{"role": "old"}, {"role": "current"}],
}  # fmt: skip


class PaperSupervisor:
    def __init__(self) -> None:
        self.units = [dict(UNIT)]
        self.asked: list[tuple[str, ...]] = []

    def call(self, work: Callable[[], Any]) -> Any:
        return work()

    def status(self) -> dict[str, Any]:
        return {"units": self.units}

    def protect(self, name: str) -> dict[str, Any]:
        return {"units": self.units}

    def unprotect(self, name: str) -> dict[str, Any]:
        if name != "lxcfs":
            raise UsageError(f"daemon {name}", "is not known here", "known: lxcfs")
        return {"kept": ["connection 3 of a daemon that is dead"]}

    def upgrade(self, name: str, exe: str, watch: float) -> dict[str, Any]:
        self.asked.append((name, exe))
        if exe == "/bad":
            raise FusecrError(f"upgrade of {name}", "/bad: it ended with exit code 1", "the old one stays")
        return {"pid": 8, "connection": 41, "exe": exe, "old_connection": 40, "drained": True, "errors": [], "seconds": 0.5}


@pytest.fixture
def supervisor() -> PaperSupervisor:
    return PaperSupervisor()


@pytest.fixture
def events(tmp_path: Path) -> Iterator[EventLog]:
    log = EventLog(str(tmp_path / "events.jsonl"))
    yield log
    log.close()


@pytest.fixture
def path(tmp_path: Path, supervisor: Any, events: EventLog, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(control, "check_peer", lambda sock: None)  # the tests need not be root's
    place = str(tmp_path / "control.sock")
    server = control.Server(supervisor, events, place)
    monkeypatch.setattr(control.ask, "__defaults__", (5.0, place))
    monkeypatch.setattr(control.lines, "__defaults__", (place,))
    thread = threading.Thread(target=server.run)
    thread.start()
    yield place
    server.close()
    thread.join(5)
    assert not thread.is_alive() and not Path(place).exists()


def test_it_accepts_again_after_it_was_short_of_something(
    path: str, supervisor: PaperSupervisor, events: EventLog, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("control socket: accept")
    expect_log("a connection was dropped: can't start new thread")
    monkeypatch.setattr(control, "SHORT_PAUSE", 0.0)
    server = control.Server(supervisor, events, f"{path}.2")  # type: ignore[arg-type]
    failures = [errno.EMFILE, errno.ECONNABORTED, errno.ENOMEM]
    accept, start = server._sock.accept, threading.Thread.start

    class Listener:
        def accept(self) -> Any:
            if failures:
                raise OSError(failures.pop(0), "accept")
            return accept()

    def none_left(thread: threading.Thread) -> None:
        if thread.name == "a control client":
            raise RuntimeError("can't start new thread")
        start(thread)

    sock, server._sock = server._sock, Listener()  # type: ignore[assignment]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        for _ in range(control.MAX_CLIENTS):
            with pytest.raises(FusecrError):
                control.ask({"op": "status"}, 5, server.path)
    assert control.ask({"op": "status"}, 5, server.path)["units"] == [UNIT]  # those that were dropped have left their places
    server._sock = sock
    server.close()
    thread.join(5)
    assert not failures and not thread.is_alive()


def test_a_socket_of_no_use_is_not_waited_for(path: str, supervisor: PaperSupervisor, events: EventLog) -> None:
    server = control.Server(supervisor, events, f"{path}.2")  # type: ignore[arg-type]
    server._sock.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        server.run()
    control.unlink(server.path)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_status(path: str, supervisor: PaperSupervisor, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "status")
    assert code == 0 and "| lxcfs | protected |   7 |         40 |     9 |   1 | /var/lib/lxcfs |" in out
    code, out, _ = run(capsys, "status", "-f", "json")
    assert json.loads(out) == [UNIT]
    supervisor.units[0]["state"] = "recovering"
    assert run(capsys, "status", "-f", "csv")[:2] == (1, "lxcfs,recovering,7,40,9,1,/var/lib/lxcfs,\n")


def test_unprotect_says_what_it_keeps(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "unprotect", "lxcfs") == (0, "Kept: connection 3 of a daemon that is dead\n", "")
    code, out, err = run(capsys, "unprotect", "other")
    assert (code, out) == (2, "") and err == "Error: daemon other: is not known here (known: lxcfs)\n"


def test_upgrade(path: str, supervisor: PaperSupervisor, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "upgrade", "lxcfs", "--exec", "/new", "-f", "json")
    assert code == 0 and json.loads(out)["exe"] == "/new" and "ok" not in json.loads(out)
    code, out, _ = run(capsys, "upgrade", "lxcfs")
    assert code == 0 and "40 ended" in out and supervisor.asked[-1] == ("lxcfs", "")
    code, _, err = run(capsys, "upgrade", "lxcfs", "--exec", "/bad")
    assert code == 1 and err.count("\n") == 1 and "exit code 1 (the old one stays)" in err


def test_events(path: str, events: EventLog, capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("adopted", "swapped"):
        events.add(what, "lxcfs", 40, ms=1.5)
    code, out, _ = run(capsys, "events", "-f", "csv", "--since", "1")
    assert code == 0 and out.startswith("2,") and out.endswith(",lxcfs,40,swapped,ms=1.5\n")
    assert [row["what"] for row in json.loads(run(capsys, "events", "-f", "json")[1])] == ["adopted", "swapped"]


def test_events_are_followed(path: str, events: EventLog) -> None:
    events.add("adopted")
    found = control.lines({"op": "events", "since": 0, "follow": True}, 5.0, path)
    assert json.loads(next(found))["what"] == "adopted"
    events.add("swapped")
    assert json.loads(next(found))["what"] == "swapped"
    events.close()
    assert [json.loads(line) for line in found] == [{"ok": True}]


@pytest.mark.parametrize("text", [b"{}\n", b'{"op": "drop"}\n'])
def test_unknown_requests(path: str, text: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(path)
        sock.sendall(text)
        assert b"not known to this agent" in sock.recv(4096)


@pytest.mark.parametrize("text", [b"no\n", b"[]\n", b"x" * 70000])
def test_what_is_no_request_ends_the_connection(path: str, text: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(path)
        try:
            sock.sendall(text)
            assert sock.recv(4096) == b""
        except (ConnectionResetError, BrokenPipeError):
            pass


def test_no_agent(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control.ask, "__defaults__", (5.0, str(tmp_path / "none")))
    code, out, err = run(capsys, "status")
    assert (code, out) == (1, "") and "nobody answers" in err and err.count("\n") == 1
