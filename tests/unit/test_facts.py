# SPDX-License-Identifier: Apache-2.0
"""What a host lacks is said, and is not taken for a container without FUSE."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from incus_fusecr.agent import facts as under_test
from incus_fusecr.agent import inventory, probing
from incus_fusecr.agent.requests import report_text
from incus_fusecr.agent.service import Service
from incus_fusecr.checkpoint import dump
from incus_fusecr.checkpoint import scan as scanning
from incus_fusecr.checkpoint.journal import Journal
from incus_fusecr.checkpoint.scan import Scan
from incus_fusecr.checkpoint.survive import Verdict
from incus_fusecr.cli.list import all_of
from incus_fusecr.errors import FusecrError
from incus_fusecr.fuse import initprobe
from incus_fusecr.fuse.init import InitRequest
from incus_fusecr.incus.ask import MAX_TEXT, parse_report
from incus_fusecr.linux import proc
from incus_fusecr.linux.zygote import JobTimeout


def agent() -> Any:
    """One that can look at containers, and nothing else."""
    made: Any = object.__new__(Service)
    made.tools = SimpleNamespace(outside=lambda _init: [])
    return made


def kernel(names_connections: bool) -> initprobe.Kernel:
    return initprobe.Kernel(InitRequest(b"\0" * 104, 2, 7, 45, 0, 0), names_connections)


@pytest.mark.parametrize("there", [True, False])
def test_a_kernel_that_does_not_name_connections_is_missing_something(
    monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setattr(initprobe, "kernel", lambda: kernel(there))
    missing = {m["what"]: m["hint"] for m in under_test.facts()["missing"]}
    assert missing.get(under_test.NAMES_CONNECTIONS) == (None if there else "Linux 6.16 or later")
    assert under_test.finds_daemons() is there


def test_a_host_without_fuse_has_no_daemons_to_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel() -> initprobe.Kernel:
        raise FusecrError("read this kernel's FUSE_INIT", "no /dev/fuse")

    monkeypatch.setattr(initprobe, "kernel", no_kernel)
    monkeypatch.setattr(under_test.os.path, "exists", lambda path: False)
    assert under_test.finds_daemons()


@pytest.mark.parametrize("there", [True, False])
def test_a_container_in_which_nothing_can_be_found_is_not_green(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(initprobe, "kernel", lambda: kernel(there))
    monkeypatch.setattr(dump, "look_twice", lambda _tools, init: (Scan(init, [], [], [], [], False), []))
    monkeypatch.setattr(dump, "paths_verdicts", lambda _tools, _seen: [])
    verdicts = agent().check(os.getpid(), "c1")["verdicts"]
    assert [v["what"] for v in verdicts] == ([] if there else [under_test.NAMES_CONNECTIONS])


def test_thousands_of_reasons_fit_into_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """2500 descriptors of unlinked files gave more than a report may have, and so none at all."""
    found = [Verdict(f"pid 9 (x) fd {n}: /mnt/f/{'n' * 200}", "is unlinked but still open", "close it") for n in range(2500)]
    monkeypatch.setattr(initprobe, "kernel", lambda: kernel(True))
    monkeypatch.setattr(dump, "look_twice", lambda _tools, init: (Scan(init, [], [], [], [], False), found))
    report = parse_report(report_text("0a", 1, "checked", agent().check(os.getpid(), "c1", [found[0]]), None))
    assert report is not None and report.error is None
    assert len(report.data["verdicts"]) == 101
    assert report.data["verdicts"][-1]["what"] == "and 2401 more"


def test_one_odd_container_does_not_spoil_the_list(monkeypatch: pytest.MonkeyPatch, expect_log: Any) -> None:
    """... and a list of any length comes in pages, each of which fits."""
    expect_log("lxc.payload.odd: .*did not finish")
    count = 700
    groups = [inventory.Cgroup(f"/sys/fs/cgroup/lxc.payload.{name}") for name in ("a", "odd", "z")]
    monkeypatch.setattr(inventory, "payloads", lambda: groups)
    monkeypatch.setattr(inventory.Cgroup, "pids", lambda self: [ord(self.path[-1])])
    monkeypatch.setattr(scanning, "init_of", lambda pids: pids[0])

    def scan(_zygote: Any, init: int) -> int:
        if init == ord("d"):
            raise JobTimeout("scan_job did not finish in time", False)
        return init

    monkeypatch.setattr(scanning, "scan", scan)
    monkeypatch.setattr(
        inventory, "connections", lambda init: [{"connection": n, "mountpoint": f"{init}" * 40} for n in range(count)]
    )
    made = agent()
    made.tools = SimpleNamespace(zygote=None, outside=lambda _init: [])
    pages = []

    def ask(args: dict[str, Any]) -> Any:
        pages.append(made.ask("list", args))
        assert len(report_text("0a", 0, "done", pages[-1], None)) < MAX_TEXT
        return pages[-1]

    found = all_of(ask)["connections"]
    assert [(e["container"], e["connection"]) for e in found] == [(c, n) for c in "az" for n in range(count)]
    assert len(pages) > 1


def test_a_daemon_is_probed_once_for_all_who_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[int] = []

    def probe(pid: int, *, deadline: float) -> Any:
        probed.append(pid)
        time.sleep(0.05)
        raise FusecrError("INIT", "it answers none")

    monkeypatch.setattr(probing, "probe_init", probe)
    probes = probing.InitProbes(Journal(str(tmp_path / "j")))
    errors: list[str] = []

    def ask() -> None:
        try:
            probes(os.getpid())
        except FusecrError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert probed == [os.getpid()] and errors == ["INIT: it answers none"] * 10
    monkeypatch.setattr(probing, "FAILED_SECONDS", 0.0)
    ask()
    assert len(probed) == 2


def test_a_dump_that_cannot_be_read_any_more_does_not_keep_the_agent_from_starting(
    tmp_path: Path, expect_log: Any
) -> None:
    expect_log("cannot be taken over; it is set aside")
    journal = Journal(str(tmp_path / "j"))
    me = {"init": os.getpid(), "start": proc.start_time(os.getpid()), "container": "c1", "criu": 0}
    journal.write(dump.KIND, str(os.getpid()), {**me, "phase": "quiet", "stopped": [], "devices": {}, "manifest": "{}"})
    tools: Any = SimpleNamespace(journal=journal)
    assert dump.recover(tools) == []
    assert journal.entries(dump.KIND) == []
