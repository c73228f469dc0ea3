# SPDX-License-Identifier: Apache-2.0
"""What the clients share: the report (described in fsclient.py), the known content, the loop. Stdlib only."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from typing import Any

RECORD = 16  # bytes; every file of known content consists of records that name their own place
REPORT_EVERY = 0.2  # seconds
FIRST_ERRORS = 20
STALLS = 100  # newest gaps that the report lists
PAUSE_AFTER_FAILURE = 0.05  # seconds


class Mismatch(Exception):
    """The file system answered, but not what it has to."""


def check(holds: bool, text: str) -> None:
    if not holds:
        raise Mismatch(text)


def pattern(start: int, length: int, tag: int = 0) -> bytes:
    """Content of a known file: 16-byte records ``tag:offset`` in hex; start and length multiples of 16."""
    return b"".join(b"%04x %010x" % (tag & 0xFFFF, at) + b"\n" for at in range(start, start + length, RECORD))


def compare(found: bytes, wanted: bytes, where: str) -> None:
    if found != wanted:
        at = next(
            (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b),
            min(len(found), len(wanted)),
        )
        base = at - at % RECORD
        raise Mismatch(
            f"{where}: {len(found)} bytes, {len(wanted)} wanted, first difference at {at}: "
            f"{found[base : base + RECORD]!r} instead of {wanted[base : base + RECORD]!r}"
        )


def append_line(number: int, realtime: float) -> bytes:
    """A line of the append log; check.py knows the same format."""
    body = b"%012d %017.6f" % (number, realtime)
    return body + b" %08x\n" % zlib.crc32(body)


class Report:
    """Counts, and the file that shows them."""

    def __init__(self, path: str, mode: str, target: str, pace: float, stall: float) -> None:
        self.path = path
        self.stall = stall * 1000
        self.last: tuple[float, float] | None = None
        self.written = 0.0
        self.data: dict[str, Any] = {
            "v": 1, "mode": mode, "target": target, "pid": os.getpid(), "state": "running",
            "pace_ms": pace * 1000, "started": time.time(), "updated": 0.0, "operations": 0, "errors": 0,
            "first_errors": [], "longest_gap_ms": 0.0, "longest_gap_monotonic_ms": 0.0,
            "longest_gap_realtime": 0.0, "stalls": [], "detail": {},
        }  # fmt: skip

    def success(self) -> None:
        now = (time.monotonic(), time.time())
        data = self.data
        data["operations"] += 1
        if self.last is not None:
            monotonic = (now[0] - self.last[0]) * 1000
            gap = max(monotonic, (now[1] - self.last[1]) * 1000)
            data["longest_gap_monotonic_ms"] = max(data["longest_gap_monotonic_ms"], monotonic)
            if gap > data["longest_gap_ms"]:
                data["longest_gap_ms"] = gap
                data["longest_gap_realtime"] = self.last[1]
            if gap > self.stall:
                data["stalls"] = [*data["stalls"], {"realtime": self.last[1], "ms": gap}][-STALLS:]
        self.last = now

    def failure(self, text: str) -> None:
        self.data["errors"] += 1
        if len(self.data["first_errors"]) < FIRST_ERRORS:
            self.data["first_errors"].append(f"{time.time():.3f} {text[:400]}")

    def rest(self) -> None:
        """Until the next success nothing is expected, so no gap is counted."""
        self.last = None

    def write(self, force: bool = False) -> None:
        if not force and 0 <= time.monotonic() - self.written < REPORT_EVERY:
            return
        self.written = time.monotonic()
        self.data["updated"] = time.time()
        temporary = f"{self.path}.{os.getpid()}"
        with open(temporary, "w") as file:
            json.dump(self.data, file)
        os.replace(temporary, self.path)


class Client:
    """A mode: ``setup`` once, then ``round`` again and again; ``resync`` after a failed round."""

    pace = 0.01  # seconds between two rounds

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self.options = options
        self.report = report
        self.ok = report.success
        self.rounds = 0
        self.place = os.path.join(options.target, options.name)

    def setup(self) -> None:
        os.makedirs(self.place, exist_ok=True)

    def round(self) -> None:
        raise NotImplementedError

    def resync(self) -> None:
        pass

    def close(self) -> None:
        pass

    def path(self, name: str) -> str:
        return os.path.join(self.place, name)

    def known_file(self, name: str, size: int, tag: int = 0) -> str:
        """Write a file of known content below the client's directory."""
        path = self.path(name)
        with open(path, "wb", buffering=0) as file:
            for at in range(0, size, 65536):
                file.write(pattern(at, min(65536, size - at), tag))
        return path


def run(mode: type[Client], options: argparse.Namespace) -> int:
    """Run a client until SIGTERM, SIGINT, its duration or its number of rounds; returns the exit code."""
    pace = mode.pace if options.pace_ms is None else options.pace_ms / 1000
    report = Report(options.report, options.mode, options.target, pace, options.stall_ms / 1000 + pace)
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stop.append(received))
    client = mode(options, report)
    try:
        client.setup()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"Error: {options.mode} on {options.target}: {error}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    failed = False
    while not stop and (not options.rounds or client.rounds < options.rounds):
        if options.duration and time.monotonic() - begin >= options.duration:
            break
        try:
            if failed:
                client.resync()
            failed = False
            client.round()
        except (OSError, Mismatch) as error:
            failed = True
            report.failure(f"{options.mode} round {client.rounds}: {error}")
        client.rounds += 1
        report.write()
        time.sleep(max(pace, PAUSE_AFTER_FAILURE) if failed else pace)
    try:
        client.close()
    except (OSError, subprocess.CalledProcessError) as error:
        report.failure(f"{options.mode} at the end: {error}")
    report.data["state"] = "stopped"
    report.write(force=True)
    return 1 if report.data["errors"] else 0
