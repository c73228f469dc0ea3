# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests on the lab's hosts; a test that fails shows what both agents and both Incus servers logged last."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest
from fusecontainer import CLIENTS, LAB, PLACE, ROOT, WORKLOAD, Container, on

AGENT_LOG = "/var/log/fusecr-lab/agent.log"
LOGS = {
    "agent": f"tail -n 40 {AGENT_LOG}",
    "incusd": "grep -E 'level=(warning|error)' /var/log/incus/incusd.log | tail -n 15",
}
ON_THE_LAB = {"containers_gone", "place"}


def lab_is_up() -> bool:
    return subprocess.run([str(LAB), "exec", "h1", "--", "true"], capture_output=True, timeout=60).returncode == 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and ON_THE_LAB & set(getattr(item, "fixturenames", ())):
        for host in ("h1", "h2"):
            for name, script in LOGS.items():
                command = [str(LAB), "exec", host, "--", "sh", "-c", script]
                done = subprocess.run(command, capture_output=True, text=True, timeout=60)
                report.sections.append((f"{name} of {host}", done.stdout + done.stderr))
    return report


@pytest.fixture(scope="session")
def containers_gone() -> Iterator[list[Container]]:
    """Containers that were made; they go at the end, whatever happened."""
    if not lab_is_up():
        pytest.skip("needs a lab that is up: lab test")
    made: list[Container] = []
    yield made
    for container in made:
        container.delete()


@pytest.fixture(scope="session")
def static(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``static("fsclient")``, ``static("passthrough_fh")``: programs that run in any image."""
    import daemons

    directory = tmp_path_factory.mktemp("static")

    def make(name: str) -> Path:
        output = directory / name
        if output.exists():
            return output
        if name == "fsclient":
            sources = [str(ROOT / "tests" / "workload" / f"{n}.c") for n in ("fsclient", "fsclient-lib")]
            subprocess.run(["gcc", "-O2", "-static", "-o", str(output), *sources], check=True, timeout=120)
        else:
            daemons.build(name, output)
        return output

    return make


@pytest.fixture(scope="session")
def debian(containers_gone: list[Container]) -> Callable[..., Container]:
    """``debian(name, privileged=False)``: systemd, Python, daemons; without clients."""

    def make(name: str, **options: bool) -> Container:
        container = Container("h1", name)
        containers_gone.append(container)
        container.create("debian", **options)
        container.push(WORKLOAD)
        return container

    return make


@pytest.fixture(scope="session")
def small(containers_gone: list[Container], static: Callable[[str], Path]) -> Callable[..., Container]:
    """``small(name, *options, fuse=True, project="default", privileged=False, modes=CLIENTS)``: busybox, libfuse's passthrough_fh
    on /mnt/fh, clients in C. With ``fuse=False`` they work on the root file system."""

    def make(
        name: str,
        *options: str,
        fuse: bool = True,
        project: str = "default",
        privileged: bool = False,
        modes: Sequence[str] = CLIENTS,
    ) -> Container:
        container = Container("h1", name, project)
        containers_gone.append(container)
        container.create("busybox", *options, privileged=privileged)
        container.push([static("fsclient"), *([static("passthrough_fh")] if fuse else [])])
        container.sh("mkdir -p /mnt/fh /srv/fh")
        if fuse:
            container.sh(
                f"setsid {PLACE}/passthrough_fh -f -o modules=subdir,subdir=/srv/fh,allow_other /mnt/fh "
                "</dev/null >/root/daemon.log 2>&1 & "
                "i=0; until grep -q ' /mnt/fh fuse' /proc/mounts; do i=$((i+1)); [ $i -gt 100 ] && exit 9; sleep 0.1; done"
            )
        for mode in modes:
            container.client(mode, "/mnt/fh", program=f"{PLACE}/fsclient")
        return container

    return make


@pytest.fixture(scope="session")
def work(debian: Callable[..., Container]) -> Callable[..., Container]:
    """``work(name, kind, modes, privileged=False)``: a Debian container with a daemon on /mnt/KIND and clients on it."""

    def make(name: str, kind: str, modes: tuple[str, ...] = CLIENTS, **options: bool) -> Container:
        container = debian(name, **options)
        container.daemon(kind, f"/mnt/{kind}")
        for mode in modes:
            container.client(mode, f"/mnt/{kind}", *(["--bind-at", "/mnt/bound"] if mode == "bind" else []))
        return container

    return make


@pytest.fixture
def agent_restarts() -> Callable[[str], int]:
    """``agent_restarts("h1")``: how often the supervisor has started it anew."""

    def count(host: str) -> int:
        (line,) = (line for line in on(host, "labctl", "status").splitlines() if line.startswith("agent "))
        words = line.split()
        return int(words[words.index("restarts") + 1])

    return count
