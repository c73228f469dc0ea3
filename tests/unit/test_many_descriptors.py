# SPDX-License-Identifier: Apache-2.0
"""An agent that protects hundreds of daemons has descriptors beyond 1023, where select(2) ends."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from incus_fusecr.guard.client import Follower
from incus_fusecr.recovery.keeping import Keeping
from incus_fusecr.recovery.link import Process

ENOUGH = 1100


@pytest.fixture
def crowded() -> Iterator[None]:
    """All numbers up to :data:`ENOUGH` are taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * ENOUGH:
        pytest.skip(f"needs {2 * ENOUGH} descriptors, the limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * ENOUGH), hard))
    taken = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)]
    try:
        while taken[-1] < ENOUGH:
            taken.append(os.dup(taken[0]))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_processes(crowded: None) -> None:
    process = Process.of(os.getpid())
    assert process.pidfd is not None and process.pidfd.fileno() > 1023 and process.alive()
    process.close()


def test_followers(crowded: None, tmp_path: Path) -> None:
    path = str(tmp_path / "guard.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(path)
        server.listen(1)

        def answer() -> None:
            client, _ = server.accept()
            with client:
                client.recv(100)
                client.send(b"ok")
                client.send(b"t=5 serving sidecar=7")
                client.recv(100)

        thread = threading.Thread(target=answer)
        thread.start()
        with Follower(path) as follower:
            assert follower.fileno() > 1023
            event = follower.next(5)
            assert event is not None and event.name == "serving" and follower.next(0) is None
        thread.join(5)


def test_the_holder_is_watched(crowded: None, tmp_path: Path) -> None:
    path = str(tmp_path / "holder.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(path)
        server.listen(1)
        keeping = Keeping(lambda: None, path)
        assert keeping.ensure() and keeping.fileno() > 1023
        assert not keeping.ensure(), "the same one"
        keeping.close()
