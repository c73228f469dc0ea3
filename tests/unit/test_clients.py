# SPDX-License-Identifier: Apache-2.0
"""The clients and their judge on plain directories: what they have to notice, they notice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from check import AppendResult, append_holes, summary
from clientlib import Mismatch, append_line, compare, pattern

CLIENT = Path(__file__).resolve().parents[1] / "workload" / "fsclient.py"
DEADLINE = 20.0  # seconds
MODES = ("reader", "writer", "append", "dirs", "cwd", "mapper", "meta", "unlinked")


def log_of(*numbers: int) -> bytes:
    return b"".join(append_line(number, 1.7e9 + number) for number in numbers)


@pytest.mark.parametrize(
    ("content", "lines", "expected"),
    [
        pytest.param(log_of(0, 1, 2), 3, (0, 0, 0), id="whole"),
        pytest.param(log_of(0, 1, 2), 2, (0, 0, 0), id="one-written-but-not-counted"),
        pytest.param(log_of(0, 3), None, (2, 0, 0), id="hole"),
        pytest.param(log_of(1, 2), None, (1, 0, 0), id="hole-at-the-start"),
        pytest.param(log_of(0, 1), 5, (3, 0, 0), id="lost-at-the-end"),
        pytest.param(log_of(0, 1, 1, 1, 2), 3, (0, 2, 0), id="repeats"),
        pytest.param(log_of(0, 1, 2, 1, 2, 3), 4, (0, 2, 0), id="went-back"),
        pytest.param(log_of(0, 1) + log_of(2)[:-7], 2, (0, 0, 1), id="torn-end"),
        pytest.param(log_of(0) + log_of(1)[:9] + log_of(2), 3, (2, 0, 1), id="torn-middle"),
        pytest.param(log_of(0).replace(b"1700", b"1701") + log_of(1), 2, (1, 0, 1), id="changed"),
        pytest.param(bytes(4096), 0, (0, 0, 1), id="zeros"),
        pytest.param(b"", 4, (4, 0, 0), id="empty"),
    ],
)
def test_append_holes(tmp_path: Path, content: bytes, lines: int | None, expected: tuple[int, ...]) -> None:
    log = tmp_path / "log"
    log.write_bytes(content)
    assert append_holes(str(log), lines) == AppendResult(*expected)


def report(**more: Any) -> dict[str, Any]:
    data = {
        "v": 1, "mode": "reader", "target": "/m", "pid": 7, "state": "stopped", "pace_ms": 10.0,
        "updated": time.time(), "operations": 5, "errors": 0, "first_errors": [], "longest_gap_ms": 12.0,
    }  # fmt: skip
    return data | more


def test_summary_adds_up() -> None:
    found = summary([report(), report(longest_gap_ms=80.0, mode="writer"), report(pace_ms=1000.0, longest_gap_ms=1e3)])
    assert (found.reports, found.operations, found.errors, found.clean) == (3, 15, 0, True)
    assert found.longest_gap_ms == 80.0 and found.longest_gap_of.startswith("writer")


@pytest.mark.parametrize(
    "bad",
    [
        report(errors=1, first_errors=["1.0 EIO"]),
        report(operations=0),
        report(state="running", updated=time.time() - 60),
        "/nonexistent/report.json",
    ],
    ids=["error", "no-operation", "silent", "no-report"],
)
def test_summary_is_not_clean(bad: Any) -> None:
    found = summary([report(), bad], max_age=5)
    assert not found.clean and found.errors and found.problems


def test_summary_of_nothing_is_not_clean() -> None:
    assert not summary([]).clean


def test_compare_names_the_place() -> None:
    wanted = pattern(0, 64)
    with pytest.raises(Mismatch, match="first difference at 37"):
        compare(wanted[:37] + b"X" + wanted[38:], wanted, "f")
    with pytest.raises(Mismatch, match="48 bytes, 64 wanted"):
        compare(wanted[:48], wanted, "f")


# -- running clients

Start = Callable[..., "Running"]


class Running:
    def __init__(self, command: list[str], path: Path) -> None:
        self.path = path
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def report(self) -> dict[str, Any]:
        return dict(json.loads(self.path.read_text()))

    def wait(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + DEADLINE
        while not (self.path.exists() and holds(self.report())):
            assert time.monotonic() < deadline, self.report() if self.path.exists() else "no report"
            time.sleep(0.02)
        return self.report()

    def stop(self) -> dict[str, Any]:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(DEADLINE)
        return self.report()


@pytest.fixture(scope="session")
def c_client(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not shutil.which("gcc"):
        pytest.skip("needs command gcc")
    output = tmp_path_factory.mktemp("c") / "fsclient"
    sources = [str(CLIENT.with_name(name)) for name in ("fsclient.c", "fsclient-lib.c")]
    flags = ["-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", str(output), *sources], check=True, timeout=120)
    return str(output)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Running] = []

    def run(mode: str, target: str = "", *options: str, program: str = "") -> Running:
        (tmp_path / "d").mkdir(exist_ok=True)
        path = tmp_path / f"{mode}.json"
        command = [program] if program else [sys.executable, str(CLIENT)]
        running.append(Running([*command, mode, target or str(tmp_path / "d"), str(path), *options], path))
        return running[-1]

    yield run
    for client in running:
        client.process.kill()
        client.process.wait(DEADLINE)


@pytest.mark.parametrize("mode", MODES)
def test_undisturbed(start: Start, tmp_path: Path, mode: str) -> None:
    client = start(mode, "", "--rounds", "40", "--pace-ms", "1")
    assert client.process.wait(DEADLINE) == 0
    found = client.report()
    assert (found["errors"], found["state"], found["first_errors"]) == (0, "stopped", [])
    assert found["operations"] >= 40
    if mode == "append":
        assert found["detail"]["lines"] == 40
        assert append_holes(found["detail"]["log"], 40) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["reader", "writer", "append", "dirs", "cwd", "idle"])
def test_undisturbed_in_c(start: Start, c_client: str, mode: str) -> None:
    client = start(mode, "", "--rounds", "40", "--pace-ms", "1", program=c_client)
    assert client.process.wait(DEADLINE) == 0
    assert summary([str(client.path)]).clean
    if mode == "append":
        assert append_holes(client.report()["detail"]["log"], 40) == (0, 0, 0)
    assert client.report().keys() == start(mode, "", "--rounds", "1").wait(lambda r: True).keys()


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(b"spoilt")


def truncate_elsewhere(path: Path) -> None:
    other = path.rename(path.with_name("other"))
    os.truncate(other, 0)


SPOILERS: dict[str, Callable[[Path], object]] = {
    "reader": lambda d: overwrite(d / "content"),
    "writer": lambda d: os.truncate(d / "slots", 0),
    "append": lambda d: truncate_elsewhere(d / "log"),
    "dirs": lambda d: (d / "intruder").write_bytes(b""),
    "cwd": lambda d: os.rename(d, f"{d}.moved"),
    "mapper": lambda d: overwrite(d / "mapped"),
    "idle": lambda d: os.rename(d / "held-0", d / "renamed"),
    "meta": lambda d: os.rename(d / "meta", d / "away"),
}


@pytest.mark.parametrize(
    ("mode", "language"),
    [(mode, "python") for mode in SPOILERS] + [(mode, "c") for mode in SPOILERS if mode not in ("mapper", "meta")],
)
def test_spoilt(start: Start, request: pytest.FixtureRequest, tmp_path: Path, mode: str, language: str) -> None:
    program = request.getfixturevalue("c_client") if language == "c" else ""
    client = start(mode, "", "--pace-ms", "2", program=program)
    client.wait(lambda r: r["operations"] > 4)
    assert client.report()["errors"] == 0
    SPOILERS[mode](tmp_path / "d" / mode)
    if mode == "append":  # its own fd does not notice: the log does
        lines = client.stop()["detail"]["lines"]
        assert any(append_holes(str(tmp_path / "d" / mode / "other"), lines))
        return
    found = client.wait(lambda r: r["errors"] > 0)
    assert found["first_errors"][0]
    assert client.stop()["state"] == "stopped"
    assert client.process.returncode == 1


@pytest.mark.parametrize("language", ["python", "c"])
def test_a_stopped_client_shows_the_gap(start: Start, request: pytest.FixtureRequest, language: str) -> None:
    client = start("reader", program=request.getfixturevalue("c_client") if language == "c" else "")
    client.wait(lambda r: r["operations"] > 4)
    client.process.send_signal(signal.SIGSTOP)
    before = time.time()
    time.sleep(0.6)
    client.process.send_signal(signal.SIGCONT)
    found = client.wait(lambda r: r["longest_gap_ms"] >= 500)
    assert abs(found["longest_gap_realtime"] - before) < 5
    assert any(stall["ms"] >= 500 for stall in client.stop()["stalls"])


# -- TCP


@pytest.fixture
def address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def connectable(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def test_tcp_pair(start: Start, address: str) -> None:
    server = start("tcpserver", address)
    deadline = time.monotonic() + DEADLINE
    while not connectable(address):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    client = start("tcpclient", address, "--pace-ms", "1")
    client.wait(lambda r: r["operations"] > 50)
    found = client.stop()
    assert (found["errors"], found["detail"]["resets"], found["detail"]["connections"]) == (0, 0, 1)
    assert found["detail"]["bytes"] == found["operations"] * 16
    heard = server.stop()
    assert heard["errors"] == 0 and heard["detail"]["bytes"] >= found["detail"]["bytes"]


@pytest.mark.parametrize("fault", ["reset", "wrong"])
def test_tcp_client_notices(start: Start, fault: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE)

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(peer.recv(16))
                data = peer.recv(16)
                peer.sendall(data if fault == "reset" else b"000000000000999\n")
                if fault == "wrong":
                    peer.recv(16)

        thread = threading.Thread(target=serve)
        thread.start()
        client = start("tcpclient", f"127.0.0.1:{listener.getsockname()[1]}")
        found = client.wait(lambda r: r["errors"] > 0)
        thread.join(DEADLINE)
    assert found["detail"]["resets"] == (1 if fault == "reset" else 0)
