# SPDX-License-Identifier: Apache-2.0
"""The action helper: what it passes on, and with what status CRIU sees it end."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from fake_agent import FakeAgent

import incus_fusecr

SOURCE = Path(incus_fusecr.__file__).parent / "criu"
PASSED_ON = ["setup-namespaces", "post-setup-namespaces", "post-restore", "post-resume", "network-unlock",
             "post-dump"]
OTHERS = ["pre-stream", "pre-dump", "pre-restore", "network-lock", "pre-resume",
          "orphan-pts-master", "status-ready", "query-ext-files"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the helper talks only to an agent of root")


@pytest.fixture(scope="session")
def helper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("helper")
    command = ["make", "-s", "-C", str(SOURCE), f"O={out}", f"{out}/fusecr-action"]
    subprocess.run(command, check=True, timeout=120)
    return out / "fusecr-action"


def run(helper: Path, tmp_path: Path, action: str | None, **env: str) -> subprocess.CompletedProcess[str]:
    variables = {"FUSECR_SOCKET": str(tmp_path / "sock"), "FUSECR_HOLD_SECONDS": "1"}
    variables |= {"CRTOOLS_INIT_PID": "4711"} | env
    if action is not None:
        variables["CRTOOLS_SCRIPT_ACTION"] = action
    return subprocess.run([str(helper)], env=variables, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("action", PASSED_ON)
def test_passed_on(helper: Path, tmp_path: Path, action: str) -> None:
    with FakeAgent(tmp_path / "sock", lambda message, fds: "ok") as agent:
        done = run(helper, tmp_path, action)
    assert (done.returncode, done.stderr) == (0, "")
    assert agent.messages == [f"act {action} 4711 {os.getpid()}"]


@pytest.mark.parametrize("action", [*OTHERS, "", None])
def test_not_passed_on(helper: Path, tmp_path: Path, action: str | None) -> None:
    with FakeAgent(tmp_path / "sock", lambda message, fds: "error no") as agent:
        assert run(helper, tmp_path, action).returncode == 0
    assert agent.connections == 0


@pytest.mark.parametrize("pid", ["", "0", "-4", "12x", "99999999999"])
def test_unknown_init_pid(helper: Path, tmp_path: Path, pid: str) -> None:
    with FakeAgent(tmp_path / "sock", lambda message, fds: "ok") as agent:
        assert run(helper, tmp_path, "post-dump", CRTOOLS_INIT_PID=pid).returncode == 0
    assert agent.messages == [f"act post-dump 0 {os.getpid()}"]


@pytest.mark.parametrize("action", PASSED_ON)
@pytest.mark.parametrize(("answer", "line"), [
    ("error handle 3 differs", "the agent refuses: handle 3 differs"),
    ("ok then", "the agent's answer is not understood: ok then"),
])
def test_refused(helper: Path, tmp_path: Path, action: str, answer: str, line: str) -> None:
    with FakeAgent(tmp_path / "sock", lambda message, fds: answer) as agent:
        done = run(helper, tmp_path, action)
    assert done.returncode == 1
    assert done.stderr == f"Error (fusecr-action): {action}: {line}\n"
    assert len(agent.messages) == 1


@pytest.mark.parametrize("action", PASSED_ON)
def test_without_agent(helper: Path, tmp_path: Path, action: str) -> None:
    done = run(helper, tmp_path, action)
    if action == "network-unlock":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 1
        assert done.stderr == f"Error (fusecr-action): {action}: no verdict of the agent: {os.strerror(2)}\n"


@pytest.mark.parametrize("action", ["setup-namespaces", "post-setup-namespaces", "post-restore", "post-resume"])
def test_lost_connection_ends_a_restore(helper: Path, tmp_path: Path, action: str) -> None:
    with FakeAgent(tmp_path / "sock", lambda message, fds: None) as agent:
        done = run(helper, tmp_path, action)
    assert done.returncode == 1
    assert "the agent closed the connection without an answer" in done.stderr
    assert agent.connections == 1


def test_post_dump_outlives_an_agent(helper: Path, tmp_path: Path) -> None:
    """The first agent dies with the question in hand, and so does the second: the third gives the verdict."""
    lost = 0

    def dies_twice(message: str, fds: list[int]) -> str | None:
        nonlocal lost
        lost += 1
        return None if lost <= 2 else "ok"

    with FakeAgent(tmp_path / "sock", dies_twice) as agent:
        assert run(helper, tmp_path, "post-dump", FUSECR_HOLD_SECONDS="30").returncode == 0
    assert agent.messages == [f"act post-dump 4711 {os.getpid()}"] * 3


def test_post_dump_waits_for_the_agents_start(helper: Path, tmp_path: Path) -> None:
    env = {"FUSECR_SOCKET": str(tmp_path / "sock"), "CRTOOLS_SCRIPT_ACTION": "post-dump"}
    with subprocess.Popen([str(helper)], env=env, stderr=subprocess.PIPE) as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        with FakeAgent(tmp_path / "sock", lambda message, fds: "ok") as agent:
            assert waiting.wait(60) == 0
    assert agent.messages == [f"act post-dump 0 {os.getpid()}"]


def test_nobody_waits_for_a_dead_criu(helper: Path, tmp_path: Path) -> None:
    env = {"FUSECR_SOCKET": str(tmp_path / "sock"), "CRTOOLS_SCRIPT_ACTION": "post-dump", "PATH": os.defpath}
    with FakeAgent(tmp_path / "sock", lambda message, fds: "") as agent:
        with subprocess.Popen(["sh", "-c", f"{helper}; true"], env=env) as criu:
            with pytest.raises(subprocess.TimeoutExpired):
                criu.wait(0.5)
            assert len(agent.messages) == 1 and not agent.ended.is_set()
            criu.kill()
        assert agent.ended.wait(30)


@pytest.mark.parametrize("answer", [None, "ok\0"])
def test_post_dump_gives_up_and_lets_the_tree_run(helper: Path, tmp_path: Path, answer: str | None) -> None:
    with FakeAgent(tmp_path / "sock", lambda message, fds: answer) as agent:
        done = run(helper, tmp_path, "post-dump")
    assert done.returncode == 1
    if answer is None:
        assert "the agent closed the connection without an answer" in done.stderr
        assert agent.connections >= 2
    else:
        assert "Bad message" in done.stderr
        assert agent.connections == 1
