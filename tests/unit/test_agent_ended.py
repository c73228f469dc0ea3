# SPDX-License-Identifier: Apache-2.0
"""The agent ends when it is asked to, whichever of its threads the kernel gives the signal to."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, threading, time
from incus_fusecr.agent.ended import Ended

ended = Ended()

def other():
    time.sleep(0.3)  # the main thread waits by then
    {action}

threading.Thread(target=other, daemon=True).start()
ended.wait()
assert ended.is_set()
print("ended")
"""


@pytest.mark.parametrize(
    "action",
    [
        "signal.pthread_kill(threading.get_ident(), signal.SIGTERM); time.sleep(100)",
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(100)",
        "ended.set(); time.sleep(100)",
        "[signal.pthread_kill(threading.get_ident(), signal.SIGTERM) for _ in range(100_000)]",
    ],
    ids=["given to another thread", "of the process", "a thread", "a full pipe"],
)
def test_it_wakes_the_main_thread(action: str) -> None:
    program = PROGRAM.format(action=action)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
