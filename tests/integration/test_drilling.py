# SPDX-License-Identifier: Apache-2.0
"""``incus-fusecr drill``, the real thing, small: a healthy one, one whose guards die, one that is interrupted or killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import daemons
import guard_box
import pytest
from sandbox import descendants

from incus_fusecr.linux.mount import mountinfo

ROOT = Path(__file__).resolve().parents[2]
CONNECTIONS = Path("/sys/fs/fuse/connections")
SECONDS = 240.0
pytestmark = [
    pytest.mark.requires_root,
    pytest.mark.requires_fuse,
    pytest.mark.requires_command("gcc", "make"),
    pytest.mark.skipif(daemons.python_with_pyfuse3() is None, reason="needs the Python module pyfuse3 (package python3-pyfuse3)"),
]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guard_box.build(tmp_path_factory.mktemp("guard"))


@pytest.fixture(autouse=True)
def host_is_untouched() -> Iterator[None]:
    """No connection, and no mount, more than before."""

    def seen() -> tuple[set[str], set[str]]:
        ours = {m.mountpoint for m in mountinfo("self") if m.mountpoint.startswith("/run/")}
        return ours, {path.name for path in CONNECTIONS.iterdir()}

    # Another worker's tests have connections of their own; what holds one of ours would be a mount, or a process that is left.
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    mounts, connections = seen()
    yield
    end = time.monotonic() + 10
    while alone and seen()[1] - connections and time.monotonic() < end:
        time.sleep(0.05)
    after = seen()
    assert {m for m in after[0] - mounts if "fusecr-lab" not in m} == set()
    assert not alone or after[1] <= connections


def command(guard: Path, *args: str) -> list[str]:
    return [sys.executable, "-m", "incus_fusecr", "drill", "--guard", str(guard), *args]


def drill(guard: Path, *args: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        command(guard, "-f", "json", *args), capture_output=True, text=True, timeout=SECONDS, cwd=ROOT, check=False
    )
    return done.returncode, json.loads(done.stdout), done.stderr


def test_kills_and_upgrades(guard: Path) -> None:
    code, result, stderr = drill(guard, "--kills", "3", "--upgrades", "1", "--containers", "2", "--window", "0.3")
    assert (code, result["problems"], result["outcome"]) == (0, [], "done"), stderr
    assert stderr == "", "no progress where nobody looks"
    assert [(p["phase"], p["events"], p["errors"]) for p in result["phases"]] == [
        ("control", 0, 0), ("kills", 3, 0), ("upgrades", 1, 0),
    ]  # fmt: skip
    assert result["clients"] == 6 and result["errors"] == 0 and result["serving_ms"]["kills"] == 3
    assert all(p["windows"] and p["idle"] == 0 for p in result["phases"])
    assert len(result["connections"]) >= 2  # the kernel uses numbers again
    states = {f["feature"]: f["state"] for f in result["features"]}
    used = ("FUSE_NOTIFY_RESEND", "fdinfo fuse_connection", "MOVE_MOUNT_BENEATH", "pidfd_getfd")
    assert {states[name] for name in used} == {"used"}


def wrapper(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_guards_that_die_are_a_failure(tmp_path: Path) -> None:
    code, result, _ = drill(wrapper(tmp_path / "guard", "exit 7"), "--kills", "1", "--upgrades", "0", "--containers", "1")
    assert code == 1 and result["outcome"] == "failed"
    assert any("ended with code 7" in text for text in result["problems"]), result["problems"]
    assert any("cannot be protected" in text for text in result["problems"]), result["problems"]


def test_what_clients_notice_is_a_failure(guard: Path, tmp_path: Path) -> None:
    """The copy that serves what is open shows another directory."""
    script = f"""i=$#
while [ $i -gt 0 ]; do a=$1; shift; [ "$a" = /run/drill/data ] && a=/run/drill/reports; set -- "$@" "$a"; i=$((i-1)); done
exec {guard} "$@\""""
    lying = wrapper(tmp_path / "guard", script)
    code, result, _ = drill(lying, "--kills", "1", "--upgrades", "0", "--containers", "1", "--window", "0.3")
    assert code == 1 and result["errors"] and result["phases"][1]["errors"]
    assert any(text.startswith("holder ") and "(kill, the drill's event 1)" in text for text in result["problems"]), result[
        "problems"
    ]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_its_end_is_the_end_of_everything(guard: Path, signum: int) -> None:
    process = subprocess.Popen(
        command(guard, "--kills", "1000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    try:
        end = time.monotonic() + 60
        while len(serving(process.pid)) < 4:
            assert time.monotonic() < end and process.poll() is None, "it did not come up"
            time.sleep(0.05)
        everybody = descendants(process.pid)
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    if signum != signal.SIGKILL:
        assert process.returncode == 130 and stderr.strip() == "Error: interrupted"
    end = time.monotonic() + 10
    while left := {pid for pid in everybody if os.path.exists(f"/proc/{pid}") and state(pid) not in "ZX"}:
        assert time.monotonic() < end, left
        time.sleep(0.05)


def serving(pid: int) -> list[int]:
    """Daemons and sidecars."""
    return [p for p in descendants(pid) if "drill/filesystem.py" in text_of(f"/proc/{p}/cmdline")]


def text_of(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def state(pid: int) -> str:
    return text_of(f"/proc/{pid}/stat").rpartition(")")[2].strip()[:1] or "X"


def test_refused_where_the_kernel_is_too_old(guard: Path, tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path / "none"), capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert done.returncode == 3 and done.stdout == ""
    assert "make -C incus_fusecr/guard install" in done.stderr
