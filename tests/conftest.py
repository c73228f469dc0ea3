# SPDX-License-Identifier: Apache-2.0
"""What every test gets: nothing may be left behind, nothing unexpected logged, what the machine lacks is a skip.

Markers: ``requires_root``, ``requires_command("bindfs", ...)``, ``requires_fuse``,
``requires_daemon("sshfs", ...)``, ``alone``.
Fixtures: ``sandbox``, ``fuse_daemon``, ``expect_log``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
# Each worker of pytest-xdist has a lab of its own, see lab/fusecr_lab/testing.py.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and "FUSECR_LABS" in os.environ:
    os.environ["FUSECR_LAB"] = os.environ["FUSECR_LABS"].split(",")[int(worker.removeprefix("gw"))]
sys.path.insert(0, str(TESTS / "workload"))  # check, daemons and the clients, as they lie in a container

import daemons  # noqa: E402
import sandbox as sandboxes  # noqa: E402

PR_SET_CHILD_SUBREAPER = 36
GRACE = 3.0  # seconds that a process or a mount has to go after its test
OURS = ("/run/incus-fusecr",)  # places outside of the tests' directories where the product mounts

MARKERS = {
    "requires_root": "needs uid 0 with its capabilities",
    "requires_command(*names)": "needs programs in $PATH",
    "requires_fuse": "needs a /dev/fuse that can be opened",
    "requires_daemon(*kinds)": "needs what workload/daemons.py starts, and root",
    "alone": "changes what all labs of the machine share: no other worker's test runs meanwhile",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    # Orphans come to us instead of to init, so that a daemon that a test forgot is seen.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def lacks_root() -> str:
    return "" if os.geteuid() == 0 else "root"


def lacks_fuse() -> str:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/fuse ({error.strerror})"
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    lacks: list[str] = []
    if item.get_closest_marker("requires_root"):
        lacks.append(lacks_root())
    if item.get_closest_marker("requires_fuse"):
        lacks.append(lacks_fuse())
    for marker in item.iter_markers("requires_command"):
        lacks += [f"command {name}" for name in marker.args if not shutil.which(name)]
    for marker in item.iter_markers("requires_daemon"):
        lacks += [lacks_root(), lacks_fuse(), *(reason for kind in marker.args for reason in lacking(kind))]
    lacks = sorted(set(filter(None, lacks)))
    if lacks:
        pytest.skip(f"needs {', '.join(lacks)}")


def lacking(kind: str) -> list[str]:
    """What a kind of daemon needs and this machine lacks; the compiled ones are made on demand."""
    if kind not in daemons.PROGRAMS:
        return daemons.missing(kind)
    reasons = [f"command {c}" for c in ("gcc", "pkg-config") if not shutil.which(c)]
    source = daemons.EXAMPLES / f"{kind}.c"
    return reasons + ([] if source.exists() else [f"{source} (package libfuse3-dev)"])


@pytest.fixture(autouse=True)
def taking_turns(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A test marked ``alone`` waits until the tests of the other workers have ended; none begins while it waits or runs."""
    if not worker:
        yield
        return
    shared = tmp_path_factory.getbasetemp().parent
    how = fcntl.LOCK_EX if request.node.get_closest_marker("alone") else fcntl.LOCK_SH
    with (shared / "running").open("a") as running, (shared / "door").open("a") as door:
        fcntl.flock(door, fcntl.LOCK_EX)  # who waits for all others to end is overtaken by nobody
        fcntl.flock(running, how)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(running, fcntl.LOCK_UN)  # a child that a test forgot has it, too


# -- nothing is left behind


def mounts_of_tests(basetemp: Path) -> set[str]:
    found = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        below = (str(basetemp), *OURS)
        if fields[4].startswith(below) or "/fusecr-test-" in fields[4]:
            found.add(f"{fields[4]} ({fields[fields.index('-') + 1]})")
    return found


def name_of(pid: int) -> str:
    try:
        command = (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        )
        return f"{pid} {command[:120]}"
    except OSError:
        return f"{pid}"


def reap(before: set[int]) -> set[int]:
    """Wait for zombies that came to us since, return the other new descendants."""
    new = sandboxes.descendants(os.getpid()) - before
    for pid in new:
        if not sandboxes.alive(pid):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
    return {pid for pid in new if sandboxes.alive(pid)}


@pytest.fixture(autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails a test that leaves a process or a mount (and ends what it left)."""
    basetemp = tmp_path_factory.getbasetemp()
    processes = sandboxes.descendants(os.getpid())
    mounts = mounts_of_tests(basetemp)
    yield
    deadline = time.monotonic() + GRACE
    while (left := reap(processes)) or mounts_of_tests(basetemp) - mounts:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    names = sorted(name_of(pid) for pid in left)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    left_mounts = sorted(mounts_of_tests(basetemp) - mounts)
    problems = [f"process {name}" for name in names] + [f"mount {mount}" for mount in left_mounts]
    if problems:
        pytest.fail("left behind: " + "; ".join(problems), pytrace=False)


# -- nothing unexpected is logged


@pytest.fixture
def expected_logs() -> list[re.Pattern[str]]:
    return []


@pytest.fixture
def expect_log(expected_logs: list[re.Pattern[str]]) -> Callable[[str], None]:
    """``expect_log(r"regular expression")``: a warning or an error with this text is part of the test."""
    return lambda pattern: expected_logs.append(re.compile(pattern))


@pytest.fixture(autouse=True)
def no_unexpected_logs(
    caplog: pytest.LogCaptureFixture, expected_logs: list[re.Pattern[str]]
) -> Iterator[None]:
    """Fails a test that logs a warning which it did not announce, or lacks one that it did."""
    yield
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    texts = [f"{r.name} {r.levelname}: {r.getMessage()}" for r in records if r.levelno >= logging.WARNING]
    unexpected = [text for text in texts if not any(p.search(text) for p in expected_logs)]
    missing = [p.pattern for p in expected_logs if not any(p.search(text) for text in texts)]
    if unexpected or missing:
        pytest.fail(f"unexpected log records: {unexpected}; expected and missing: {missing}", pytrace=False)


# -- real daemons


@pytest.fixture
def sandbox() -> Iterator[Callable[..., sandboxes.Sandbox]]:
    """``sandbox(user=False)``: namespaces for daemons and clients, see sandbox.py; needs root."""
    with contextlib.ExitStack() as undo:

        def make(user: bool = False) -> sandboxes.Sandbox:
            made = sandboxes.Sandbox.open(user)
            undo.callback(made.close)
            return made

        yield make


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``compiled("passthrough_fh")``: a static build of libfuse's example, made once a session."""
    directory = tmp_path_factory.mktemp("programs")

    def make(name: str) -> Path:
        output = directory / name
        if not output.exists():
            daemons.build(name, output)
        return output

    return make


@pytest.fixture
def fuse_daemon(
    sandbox: Callable[..., sandboxes.Sandbox], compiled: Callable[[str], Path]
) -> Callable[..., sandboxes.Daemon]:
    """``fuse_daemon("bindfs", user=False, within=None, options="")``: a mounted daemon (a sandbox.Daemon).

    ``within`` takes another daemon's sandbox, so that several run side by side. Mark the test with
    ``requires_daemon``.
    """

    def make(
        kind: str, *, user: bool = False, within: sandboxes.Sandbox | None = None, **more: Any
    ) -> sandboxes.Daemon:
        where = within or sandbox(user)
        if kind in daemons.PROGRAMS and not (where.workload / kind).exists():
            shutil.copy(compiled(kind), where.workload / kind)
        return where.daemon(kind, **more)

    return make
