# SPDX-License-Identifier: Apache-2.0
"""The readers of lxcfs notice what they are for: spoilt values, the host's values, errors, delays; and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lxcheck
import pytest

WORKLOAD = Path(__file__).resolve().parents[1] / "workload"
SECONDS = 20.0
MEM = 262144
MODES = ("loop", "held", "cwd", "dirs")
MEMINFO = "MemTotal: {mem:>10} kB\nMemFree: {free:>10} kB\nSwapTotal: 0 kB\n"

pytestmark = pytest.mark.requires_command("gcc")


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("lxreader") / "lxreader"
    sources = [str(WORKLOAD / f"{name}.c") for name in ("lxreader", "lxreader-lib")]
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", str(output), *sources, "-lm"]
    subprocess.run(command, check=True, timeout=120)
    return output


class Tree:
    """Files as lxcfs shows them, and a thread that lets the time pass in them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cpu = root / "sys/devices/system/cpu"
        (root / "proc").mkdir(parents=True)
        for name in ("cpu0", "cpu1", "cpufreq"):
            (self.cpu / name).mkdir(parents=True)
        self.write("sys/devices/system/cpu/online", "0-1\n")
        self.write("proc/cpuinfo", "processor\t: 0\nflags: x\n\nprocessor\t: 1\nflags: x\n\n")
        self.write("proc/stat", "cpu  10 0 10 500 0 0 0 0 0 0\ncpu0 5 0 5 0\ncpu1 5 0 5 0\nbtime 7\n")
        self.write("proc/loadavg", "0.10 0.10 0.10 1/20 7\n")
        self.write("proc/swaps", "Filename\t\t\t\tType\t\tSize\tUsed\tPriority\n")
        self.write("proc/diskstats", "")
        self.write("proc/slabinfo", "")
        self.meminfo(MEM)
        self.shift = 100.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._time()
        self._thread.start()

    def write(self, name: str, text: str) -> None:
        """In place: a held fd sees it."""
        path = self.root / name
        data = text.encode()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))
        os.close(fd)

    def meminfo(self, mem: int) -> None:
        self.write("proc/meminfo", MEMINFO.format(mem=mem, free=mem // 2))

    def _time(self) -> None:
        up = time.clock_gettime(time.CLOCK_BOOTTIME) - self.shift
        self.write("proc/uptime", f"{up:012.2f} {up:012.2f}\n")

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            self._time()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class Reader:
    def __init__(self, program: Path, directory: Path, root: Path, mode: str, *options: str) -> None:
        self.report_path = directory / f"{mode}.json"
        self.stop_path = directory / "stop"
        command = [str(program), mode, str(self.report_path), str(self.stop_path), "--root", str(root), "--pace", "1", *options]
        self.process = subprocess.Popen(command, cwd="/")

    def report(self) -> dict[str, Any]:
        try:
            return lxcheck.load(str(self.report_path))
        except FileNotFoundError:
            return {"operations": 0, "errors": 0, "wrong": 0}

    def until(self, what: str, holds: Callable[[dict[str, Any]], object]) -> None:
        end = time.monotonic() + SECONDS
        while not holds(self.report()):
            assert time.monotonic() < end, f"{what}: {self.report()}"
            assert self.process.poll() is None
            time.sleep(0.02)

    def advance(self) -> None:
        wanted = self.report()["operations"] + 50
        self.until("more operations", lambda r: r["operations"] >= wanted)

    def end(self) -> dict[str, Any]:
        self.stop_path.touch()
        assert self.process.wait(SECONDS) == 0
        return self.report()


Read = Callable[..., Reader]


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    made = Tree(tmp_path / "root")
    yield made
    made.close()


@pytest.fixture
def read(program: Path, tmp_path: Path) -> Iterator[Read]:
    """``read(root, mode, *options)``: a reader that runs."""
    made: list[Reader] = []

    def start(root: Path, mode: str, *options: str) -> Reader:
        made.append(Reader(program, tmp_path, root, mode, *options))
        return made[-1]

    yield start
    for reader in made:
        reader.process.kill()
        reader.process.wait(SECONDS)


def test_all_is_well_while_the_values_are_right(tree: Tree, read: Read) -> None:
    readers = [read(tree.root, mode, "--mem", str(MEM), "--cpus", "2") for mode in MODES]
    for reader in readers:
        reader.advance()
    found = lxcheck.summary([reader.end() for reader in readers], MEM, 2)
    assert found.problems == [] and found.reports == 4 and found.operations > 200
    assert found.values == {"cpus": [2], "entries": [6], "mem": [MEM], "swap": [0], "swaps": [0]}
    assert 0 < found.p50_us <= found.p99_us <= found.max_us


SPOILS: dict[str, tuple[str, Callable[[Tree], object], str]] = {
    "host's memory": ("loop", lambda t: t.meminfo(24 << 20), "MemTotal: mem is 25165824, not 262144"),
    "host's memory in a held file": ("held", lambda t: t.meminfo(24 << 20), "MemTotal: mem is 25165824, not 262144"),
    "more free than there is": (
        "loop", lambda t: t.write("proc/meminfo", MEMINFO.format(mem=MEM, free=MEM + 1)), "MemFree 262145 of 262144"),
    "host's cpus": ("held", lambda t: t.write("proc/cpuinfo", "processor : 0\n" * 8), "cpuinfo: cpus is 8, not 2"),
    "stat of the host": ("loop", lambda t: t.write("proc/stat", "cpu 1 1 1\ncpu0 1\n"), "stat: cpus is 1, not 2"),
    "online of the host": ("cwd", lambda t: t.write("sys/devices/system/cpu/online", "0-3,8,10-11\n"), "online: cpus is 7, not 2"),
    "host's uptime": ("loop", lambda t: setattr(t, "shift", 0.0), "uptime jumped"),
    "uptime from anew": ("held", lambda t: setattr(t, "shift", t.shift + 50), "uptime went back"),
    "nothing in it": ("loop", lambda t: t.write("proc/loadavg", ""), "/proc/loadavg: empty"),
    "rubbish": ("loop", lambda t: t.write("proc/swaps", "xyz\n"), "swaps: no heading"),
    "swap of the host": (
        "loop", lambda t: t.write("proc/swaps", "Filename Type\n/dev/sda2 partition 9 0 -2\n"), "swaps: swaps is 1, not 0"),
    "another directory": ("dirs", lambda t: (t.cpu / "cpu2").mkdir(), "readdir: entries is 7, not 6"),
    "cwd that has moved": ("cwd", lambda t: t.cpu.rename(t.cpu.with_name("gone")), "getcwd: "),
    "missing file": ("loop", lambda t: (t.root / "proc/stat").unlink(), "/proc/stat: No such file or directory"),
}


@pytest.mark.parametrize("name", SPOILS)
def test_what_is_spoilt_is_noticed(tree: Tree, read: Read, name: str) -> None:
    mode, spoil, message = SPOILS[name]
    reader = read(tree.root, mode)
    reader.advance()
    assert reader.report()["errors"] + reader.report()["wrong"] == 0
    spoil(tree)
    reader.until("an error", lambda r: r["errors"] + r["wrong"])
    found = lxcheck.summary([reader.end()])
    assert not found.clean and any(message in problem for problem in found.problems), found.problems


def test_the_hosts_values_from_the_beginning_are_noticed_by_what_was_expected(tree: Tree, read: Read) -> None:
    tree.meminfo(24 << 20)
    reader = read(tree.root, "held", "--mem", str(MEM), "--cpus", "4")
    reader.until("an error", lambda r: r["wrong"])
    texts = " ".join(reader.end()["texts"])
    assert "mem is 25165824, not 262144" in texts and "cpus is 2, not 4" in texts


@pytest.mark.requires_root
@pytest.mark.requires_daemon("bindfs")
@pytest.mark.parametrize("mode", ["loop", "held", "cwd", "dirs"])
def test_the_death_of_a_daemon_is_noticed(fuse_daemon: Callable[..., Any], program: Path, mode: str) -> None:
    daemon = fuse_daemon("bindfs")
    tree = Tree(daemon.backing / "root")
    try:
        where = Path(f"/proc/{daemon.sandbox.init}/root{daemon.mountpoint}/root")
        directory = daemon.sandbox.directory
        reports = directory / f"{mode}.json"
        command = [str(directory / "lxreader"), mode, str(reports), str(directory / "stop"), "--root", f"{daemon.mountpoint}/root"]
        (directory / "lxreader").write_bytes(program.read_bytes())
        (directory / "lxreader").chmod(0o755)
        child = daemon.sandbox.popen([*command, "--pace", "1"])

        def report() -> dict[str, Any]:
            with contextlib.suppress(FileNotFoundError):
                return lxcheck.load(str(reports))
            return {"operations": 0, "errors": 0}

        def wait(what: str, holds: Callable[[], object]) -> None:
            end = time.monotonic() + SECONDS
            while not holds():
                assert time.monotonic() < end, f"{what}: {where} {report()}"
                time.sleep(0.02)

        wait("operations", lambda: report()["operations"] > 50)
        assert lxcheck.summary([report()], finished=False).problems == []
        for pid in daemon.pids:
            os.kill(pid, signal.SIGKILL)
        wait("an error", lambda: report()["errors"])
        (directory / "stop").touch()
        assert child.wait(SECONDS) == 0
        assert any("Transport endpoint is not connected" in text for text in report()["texts"])
    finally:
        tree.close()


def test_a_delay_is_in_the_histogram_the_windows_and_the_slow_ones(read: Read, tree: Tree) -> None:
    reader = read(tree.root, "loop", "--slow", "250")
    reader.advance()
    path = tree.root / "proc/loadavg"
    os.mkfifo(tree.root / "proc/fifo")  # its open waits for a writer, as one of a file without a daemon does for an answer
    (tree.root / "proc/fifo").rename(path)
    start = time.monotonic()
    time.sleep(0.4)
    with path.open("w") as fifo:
        fifo.write("0.10 0.10 0.10 1/20 7\n")
        tree.write("proc/new", "0.10 0.10 0.10 1/20 7\n")
        (tree.root / "proc/new").rename(path)
    reader.advance()
    report = reader.end()
    assert report["errors"] + report["wrong"] == 0
    assert sum(count for _, count in report["histogram"]) == report["operations"]
    assert sum(n for _, n, _, _ in report["windows"]) == report["operations"]
    ours = [(begun, ms) for begun, ms, what in report["slow"] if what == "/proc/loadavg" and ms > 300]
    assert len(ours) == 1
    begun, ms = ours[0]
    assert report["max_us"] >= ms * 999
    assert lxcheck.longest_between([report], start, start + 0.5) >= ms * 999
    assert lxcheck.longest_between([report], start + 3600, start + 3601) == 0
    assert lxcheck.longest_between([report], report["started"], begun - 0.25) < ms * 1000


@pytest.mark.requires_root
def test_poll_waits_for_a_trigger_or_says_what_is_missing(read: Read, tmp_path: Path) -> None:
    reader = read(Path("/"), "poll")
    if Path("/proc/pressure/memory").exists():
        reader.until("polls or a reason", lambda r: r["operations"] > 5 or r.get("unsupported"))
    report = reader.end()
    assert report["errors"] + report["wrong"] == 0
    (tmp_path / "stop").unlink()
    other = read(tmp_path, "poll")
    assert other.process.wait(SECONDS) == 0
    assert "/proc/pressure/memory: No such file" in other.report()["unsupported"]
    assert lxcheck.summary([other.report()]).clean


def test_it_detaches_and_says_how_it_is_used(program: Path, tree: Tree, tmp_path: Path) -> None:
    for bad in (["loop"], ["nonsense", "r", "s"], ["loop", "r", "s", "--mem"], ["loop", "r", "s", "--what", "1"]):
        assert subprocess.run([str(program), *bad], capture_output=True, timeout=SECONDS).returncode == 2
    report, stop = tmp_path / "d.json", tmp_path / "stop"
    command = [str(program), "loop", str(report), str(stop), "--root", str(tree.root), "--detach"]
    assert subprocess.run(command, timeout=SECONDS).returncode == 0
    end = time.monotonic() + SECONDS
    while not report.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    stop.touch()
    while not lxcheck.load(str(report))["finished"]:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_judge_reads_several_reports(tmp_path: Path) -> None:
    base: dict[str, Any] = {
        "mode": "loop", "pid": 1, "started": 0.0, "operations": 100, "errors": 0, "wrong": 0, "max_us": 9.0, "texts": [],
        "histogram": [[2.0, 98], [10.0, 2]], "values": {"mem": 5}, "notes": {"x": 1}, "unsupported": "", "finished": True,
        "windows": [[1.0, 50, 0, 3.0], [2.0, 50, 0, 9.0]],
    }
    good = lxcheck.summary([base, base], 5)
    assert (good.operations, good.p50_us, good.p99_us, good.max_us, good.notes) == (200, 2.0, 9.0, 9.0, {"x": 2})
    assert good.clean and lxcheck.longest_between([base], 0.2, 0.9) == 3.0 and lxcheck.longest_between([base], 1.5, 9) == 9.0

    def problems(**changes: object) -> str:
        return " ".join(lxcheck.summary([base, {**base, **changes}], 5).problems)

    assert "readers differ: mem is 5, 6" in problems(values={"mem": 6})
    assert "did not come to its end" in problems(finished=False)
    assert "did nothing" in problems(operations=0)
    assert "3 more" in problems(errors=3)
    assert lxcheck.summary([]).problems == ["no reports"]
    assert "nobody looked, not 2" in " ".join(lxcheck.summary([base], cpus=2).problems)
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, report in zip(paths, (base, {**base, "texts": ["oops"], "wrong": 1}), strict=True):
        path.write_text(json.dumps(report))
    script = [sys.executable, str(WORKLOAD / "lxcheck.py")]
    good_one = [*script, str(paths[0]), "--mem", "5", "--between", "0", "9"]
    done = subprocess.run(good_one, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0 and json.loads(done.stdout)["longest_between_us"] == 9.0
    assert subprocess.run([*script, *map(str, paths)], capture_output=True, timeout=SECONDS).returncode == 1
    assert subprocess.run([*script, "/nonexistent"], capture_output=True, timeout=SECONDS).returncode == 1
