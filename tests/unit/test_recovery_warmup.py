# SPDX-License-Identifier: Apache-2.0
"""A fresh daemon's threads are warmed up whatever came before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from incus_fusecr.recovery import warmup


def test_namespaces_that_take_all_their_time_leave_the_threads_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork(2) for a namespace makes every thread's buffer copy-on-write again: just then the burst is needed."""
    (tmp_path / "file").write_text("x")
    asked: list[int] = []
    reads: list[str] = []
    monkeypatch.setattr(warmup, "NAMESPACES_SECONDS", -1.0)
    monkeypatch.setattr(warmup, "other_pid_namespaces", lambda: [1, 2])
    monkeypatch.setattr(warmup, "_ask_from", lambda pid, tree, path: asked.append(pid))
    monkeypatch.setattr(warmup, "_read", lambda tree, path: reads.append(path))
    tree = os.open(tmp_path, os.O_PATH)
    try:
        assert warmup.job_warm({"path": "file"}, [tree]) == (0, [])
    finally:
        os.close(tree)
    assert asked == [] and reads == ["file"] * (warmup.THREADS * warmup.ROUNDS)
