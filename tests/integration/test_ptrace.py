# SPDX-License-Identifier: Apache-2.0
"""A system call made by another process, which notices nothing of it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sandbox import end, wait_for

from incus_fusecr.linux import ptrace

pytestmark = [
    pytest.mark.requires_root,
    pytest.mark.skipif(not ptrace.can_make_calls(), reason="ptrace.call() knows the registers of x86_64 only"),
]

# In the group of its parent, so that it may become a session leader; prints when its sleep ended as it should.
SLEEPS = {
    "select": "import select, sys; print(select.select([sys.stdin], [], [])[0] == [sys.stdin])",
    "nanosleep": """import ctypes, time
libc, before = ctypes.CDLL(None, use_errno=True), time.monotonic()
class timespec(ctypes.Structure): _fields_ = [("s", ctypes.c_long), ("n", ctypes.c_long)]
print((libc.nanosleep(ctypes.byref(timespec(2, 0)), None), time.monotonic() - before >= 2) == (0, True))""",
    "futex": "import sys, threading; e = threading.Event(); threading.Thread(target=lambda: (sys.stdin.read(1), e.set())).start();"
    " print(e.wait())",
    "busy": """total = 0
while not seen: total += sum(range(1000)) - 499500
print(total == 0)""",
}


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def run(kind: str) -> subprocess.Popen[str]:
        ready = "import signal; seen = []; signal.signal(signal.SIGUSR1, lambda *_: seen.append(1)); print('up', flush=True)"
        code = f"{ready}\n{SLEEPS[kind]}"
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        assert process.stdout and process.stdout.readline() == "up\n"
        return process

    yield run
    for process in started:
        end(process)


@pytest.mark.parametrize("kind", SLEEPS)
def test_what_it_was_doing_goes_on(start: Callable[[str], subprocess.Popen[str]], kind: str) -> None:
    process = start(kind)
    if kind != "busy":
        wait_for(lambda: state(process.pid) == "S", "its sleep")
    before = os.getsid(process.pid)
    assert ptrace.call(process.pid, ptrace.NR_SETSID, 5.0) == process.pid
    assert (os.getsid(process.pid), os.getpgid(process.pid)) == (process.pid, process.pid) != (before, before)
    # A leader already: the call's own answer comes back, and once more nothing else is disturbed.
    assert ptrace.call(process.pid, ptrace.NR_SETSID, 5.0) == -errno.EPERM
    if kind == "busy":
        process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate("x", timeout=20)
    assert (out, process.returncode) == ("True\n", 0)


def test_a_signal_meanwhile_is_not_lost(start: Callable[[str], subprocess.Popen[str]]) -> None:
    """It comes while the process is stopped for the call."""
    process = start("busy")
    os.kill(process.pid, signal.SIGSTOP)
    wait_for(lambda: state(process.pid) == "T", "its stop")
    os.kill(process.pid, signal.SIGUSR1)
    assert ptrace.call(process.pid, ptrace.NR_SETSID, 5.0) == process.pid
    os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=20)
    assert (out, process.returncode) == ("True\n", 0)


def state(pid: int) -> str:
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2]
