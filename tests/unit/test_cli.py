# SPDX-License-Identifier: Apache-2.0
"""The command line: exit codes, one-line errors, formats, progress; no server is reached."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from incus_fusecr import __version__
from incus_fusecr.cli import main as cli_main
from incus_fusecr.cli.list import COLUMNS, all_of, rows_of
from incus_fusecr.cli.migrate import text_of
from incus_fusecr.cli.output import (
    Column,
    Format,
    Reporter,
    choose,
    clean,
    document,
    error_line,
    human_bytes,
    parse_format,
    render,
)
from incus_fusecr.errors import FusecrError, Refused, Uncertain, UsageError
from incus_fusecr.migration.model import Carried, Phase, Progress, Report, Verdict

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["migrate", "checkpoint", "restore", "check", "list", "drill", "agent", "completion"]


def program(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "incus_fusecr", *args],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **env},
    )


@pytest.fixture
def conf(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "config.yml").write_text("remotes: {h2: {addr: 'https://192.0.2.1:8443'}}\n")
    return {"INCUS_CONF": str(tmp_path), "INCUS_SOCKET": str(tmp_path / "no.socket")}


def test_help_names_every_command_and_exit_code() -> None:
    done = program("--help")
    assert done.returncode == 0 and done.stderr == ""
    for word in [*COMMANDS, "Exit codes", "refused before anything was touched"]:
        assert word in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = program(command, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"Usage: incus-fusecr {command}")


def test_version() -> None:
    assert program("--version").stdout == f"incus-fusecr {__version__}\n"


def test_help_imports_no_http() -> None:
    code = (
        "import sys\n"
        "from incus_fusecr.cli.main import run\n"
        "run(['--help']); run(['migrate', '--help']); run(['list', '--help'])\n"
        "print([m for m in ('requests', 'pylxd', 'websockets', 'yaml', 'ssl') if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["nonsense"], 2, "No such command"),
        (["migrate"], 2, "Missing argument"),
        (["migrate", "c1", "h2:", "--bogus"], 2, "No such option"),
        (["migrate", "nope:c1", "h2:"], 2, 'remote "nope" does not exist'),
        (["migrate", "c1", "h2"], 2, "write h2:"),
        (["migrate", "c1", "local:"], 2, "same server"),
        (["migrate", "c1", "h2:a_b"], 2, "not an instance name"),
        (["migrate", "c1", "h2:", "--timeout", "0"], 2, "timeout"),
        (["check", "-f", "xml"], 2, "unknown format"),
        (["list", "-c", "z"], 2, 'unknown column "z"'),
        (["list", "images:"], 2, "image server"),
        (["list", "h2:"], 2, "client certificate"),
        (["list"], 1, "no.socket"),
        (["checkpoint", "c1"], 1, "no.socket"),
        (["restore", "c1"], 1, "no.socket"),
    ],
)
def test_errors_are_one_line_and_a_code(conf: dict[str, str], args: list[str], code: int, text: str) -> None:
    done = program(*args, **conf)
    assert done.returncode == code
    assert done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first.startswith("Error: ") and text in first
    assert all(line.startswith("Try: incus-fusecr") for line in rest)


def test_debug_shows_the_origin(conf: dict[str, str]) -> None:
    done = program("list", "--debug", **conf)
    assert done.returncode == 1 and "Traceback" in done.stderr and "Error: cannot reach local" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    done = program("completion", shell)
    assert done.returncode == 0 and "_INCUS_FUSECR_COMPLETE" in done.stdout


def test_completion_of_commands_and_remotes(conf: dict[str, str]) -> None:
    def complete(words: str) -> str:
        env = {
            "_INCUS_FUSECR_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        return program(**conf, **env).stdout

    assert "plain,migrate" in complete("incus-fusecr mi")
    assert "plain,h2:" in complete("incus-fusecr migrate c1 h")
    assert "plain,local:" in complete("incus-fusecr check lo")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FusecrError("a", "b"), 1),
        (UsageError("a", "b"), 2),
        (Refused("a", "b"), 3),
        (Uncertain("a", "b"), 4),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("x"), 1),
    ],
)
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_main.explain(error) == code
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith("Error: ") and out.err.count("\n") == 1


def test_an_unexpected_error_asks_for_debug(capsys: pytest.CaptureFixture[str]) -> None:
    cli_main.explain(ZeroDivisionError("x"))
    assert "--debug" in capsys.readouterr().err


def test_sigterm_interrupts_like_ctrl_c(conf: dict[str, str], tmp_path: Path) -> None:
    """A server that takes the connection and says nothing."""
    import signal
    import socket

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(conf["INCUS_SOCKET"])
        sock.listen()
        sock.settimeout(30)
        process = subprocess.Popen(
            [sys.executable, "-m", "incus_fusecr", "list"],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], **conf},
        )
        connection, _ = sock.accept()
        with connection, process:
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip()) == (130, "Error: interrupted")


# Output


PEOPLE: list[Column[Any]] = [
    Column("n", "NAME", lambda r: r[0]),
    Column("a", "AGE", lambda r: r[1], right=True),
    Column("x", "EXTRA", lambda r: "?", default=False),
]
ROWS = [("bob", 7), ("alice", 40)]


def show(form: str, letters: str = "") -> str:
    return render(ROWS, choose(PEOPLE, letters), parse_format(form))


def test_table() -> None:
    assert show("table").splitlines() == [
        "+-------+-----+",
        "| NAME  | AGE |",
        "+-------+-----+",
        "| bob   |   7 |",
        "| alice |  40 |",
        "+-------+-----+",
    ]


def test_other_forms() -> None:
    assert show("csv") == "bob,7\nalice,40\n"
    assert show("csv,header", "an") == "AGE,NAME\n7,bob\n40,alice\n"
    assert show("compact,noheader") == "  bob     7\n  alice  40\n"
    assert show("table,noheader").splitlines()[1] == "| bob   |  7 |"
    assert render([], choose(PEOPLE, ""), Format("csv")) == "NAME,AGE\n"
    for bad in ("xml", "table,foo", ""):
        with pytest.raises(UsageError):
            parse_format(bad)
    with pytest.raises(UsageError, match='"q"'):
        choose(PEOPLE, "nq")


def test_documents_can_be_read_back() -> None:
    data = {"a": [1, {"b": "ü\x1b[31m"}]}
    assert json.loads(document(data, Format("json"))) == data
    assert yaml.safe_load(document(data, Format("yaml"))) == data
    assert "\x1b" not in document(data, Format("json")) + document(data, Format("yaml"))


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "\x07", "\u202e", "\udc80", "\r", "\x9b"])
def test_nothing_steers_the_terminal(text: str) -> None:
    for shown in (
        clean(text),
        error_line(FusecrError(text)),
        render([(text, 1)], PEOPLE[:1], parse_format("compact,noheader")),
    ):
        assert shown.removesuffix("\n").isprintable()
        shown.encode()


def test_long_cells_are_cut() -> None:
    assert len(clean("x" * 10000)) == 400


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0B"), (999, "999B"), (1000, "1.0kB"), (45_770_000, "45.8MB")]
)
def test_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_rewrites_its_line_and_takes_it_away() -> None:
    out = Terminal()
    with Reporter(stream=out) as reporter:
        reporter.update("one long text")
        reporter.update("two")
    assert "\n" not in out.getvalue()
    shown = out.getvalue().split("\r")
    assert shown[1] == "one long text" and shown[2].rstrip() == "two" and len(shown[2]) == len(shown[1])
    assert shown[-2].strip() == "" and shown[-1] == ""


@pytest.mark.parametrize(("stream", "quiet"), [(io.StringIO(), False), (Terminal(), True)])
def test_progress_is_silent_in_a_pipe_and_when_quiet(stream: io.StringIO, quiet: bool) -> None:
    with Reporter(stream=stream, quiet=quiet) as reporter:
        reporter.update("text", {"a": 1})
    assert stream.getvalue() == ""


def test_progress_as_json_lines() -> None:
    out = io.StringIO()
    with Reporter(stream=out, as_json=True, quiet=True) as reporter:
        for phase in ("precopy", "held"):
            step = Progress(phase, frozen=phase == "held")
            reporter.update("text", step.to_dict())
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(line["type"], line["phase"], line["frozen"]) for line in lines] == [
        ("progress", "precopy", False),
        ("progress", "held", True),
    ]


def test_progress_outlives_its_reader() -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Reporter(stream=Gone()) as reporter:
        reporter.update("a")
        reporter.update("b")


# Reports


def report(outcome: str = "done") -> Report:
    return Report(
        "0123",
        "h1:web",
        "h2:web",
        outcome,
        seconds=4.2,
        frozen_seconds=0.4125,
        frozen_parts={"dump": 0.2, "start": 0.2136},
        phases=[Phase("precopy", 3.1, bytes=2_000_000), Phase("refresh", 0.2, frozen=True, bytes=500)],
        carried=[Carried("sshfs", "/mnt", 5, 7), Carried("bindfs", "/b", 2, 2)],
        verdicts=[Verdict("refuse", "target", "criu", "is missing", "apt install criu")],
        plan=["copy", "hold"],
    )


def test_report_as_tables() -> None:
    text = text_of(report(), Format())
    for word in (
        "precopy",
        "2.0MB",
        "FROZEN FOR",
        "0.214",
        "sshfs",
        "h1:web -> h2:web: done in 4.20 s",
        "7 handles",
    ):
        assert word in text, word


def test_what_preflight_warned_of_is_said_at_the_end() -> None:
    done = report()
    done.verdicts.append(Verdict("warn", "target", "network br0", "not checked"))
    done.warnings.append("it was frozen during the first copy")
    lines = text_of(done, Format()).splitlines()
    assert lines[-3:-1] == ["Warning: network br0: not checked", "Warning: it was frozen during the first copy"]
    assert "Warning: network br0" not in text_of(report("planned"), Format())


def test_report_as_document() -> None:
    data = json.loads(text_of(report(), Format("json")))
    assert data["version"] == 1 and data["type"] == "report" and data["id"] == "0123"
    assert data["bytes"] == 2_000_500 and data["handles"] == 7 and data["frozen_parts"]["dump"] == 0.2
    assert data["carried"][0] == {"daemon": "sshfs", "mountpoint": "/mnt", "handles": 5, "nodes": 7}


def test_plan() -> None:
    text = text_of(report("planned"), Format())
    assert text.startswith("1. copy\n2. hold\n") and "apt install criu" in text and "precopy" not in text


def test_list_rows() -> None:
    data = {
        "connections": [
            {"container": "web", "connection": 9, "daemon": "sshfs"},
            {"container": "other_project_web", "connection": 3},
            {"container": "db", "connection": 10},
            "nonsense",
        ]
    }
    assert [r["instance"] for r in rows_of(data, "default", "")] == ["db", "web"]
    assert rows_of(data, "other_project", "web")[0]["connection"] == 3
    assert len(rows_of(data, "", "")) == 3
    assert rows_of(None, "", "") == []
    assert "sshfs" in render(rows_of(data, "default", "web"), choose(COLUMNS, ""), Format())


def test_a_list_of_any_length_is_asked_for_page_by_page() -> None:
    every = [{"container": f"c{n // 3}", "connection": n} for n in range(10)]
    asked: list[Any] = []

    def ask(args: dict[str, Any]) -> dict[str, Any]:
        asked.append(args.get("after"))
        rest = [e for e in every if [e["container"], e["connection"]] > args.get("after", ["", -1])]
        return {"connections": rest[:4], "more": len(rest) > 4}

    assert all_of(ask) == {"connections": every}
    assert asked == [None, ["c1", 3], ["c2", 7]]
    # One that never ends, or says nothing, is not asked for ever.
    assert all_of(lambda _args: {"connections": every[:1], "more": True}) == {"connections": every[:1] * 2}
    assert all_of(lambda _args: {"connections": "x", "more": True}) == {"connections": []}
