# SPDX-License-Identifier: Apache-2.0
"""The rules that a machine can check, so that nobody has to remember them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST_MODULE = 500  # lines
SOURCES = {".py", ".c", ".h", ".sh", ".service", ".conf"}
LICENCES = {"Apache-2.0", "GPL-2.0-only"}
SKIPPED = {".git", ".nox", ".venv", "build", "__pycache__"}
# What only the machine of an author has: absolute homes and work directories.
MACHINE_PATHS = re.compile(r"/(?:work|root/\.pyenv|home/[a-z]+)/")


def source_files() -> list[Path]:
    """Tracked and new files as git sees them; everything below the root without git."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        command = [git, "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, capture_output=True, timeout=60)
        if done.returncode == 0:  # git refuses a repository of another owner, as root often is
            return sorted(
                {ROOT / name for name in done.stdout.decode().split("\0") if is_source(ROOT / name)}
            )
    found = (path for path in ROOT.rglob("*") if not SKIPPED & set(path.relative_to(ROOT).parts))
    return sorted(path for path in found if is_source(path))


def is_source(path: Path) -> bool:
    """By suffix, or a script by its first line."""
    if not path.is_file():
        return False
    if path.suffix in SOURCES:
        return True
    if path.suffix:
        return False
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def run_tool(*command: str) -> None:
    name = command[0]
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs the Python module {name} (pip install -e .[test])")
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_sources() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in source_files()}
    assert {"incus_fusecr/errors.py", "tests/conftest.py", "setup.py"} <= names


def test_ruff() -> None:
    run_tool("ruff", "check", "--no-cache", ".")


def test_mypy_strict() -> None:
    run_tool("mypy", "--strict")


def test_every_source_has_a_licence() -> None:
    bad = []
    for path in source_files():
        head = path.read_text(errors="replace").splitlines()[:4]
        found = re.search(r"SPDX-License-Identifier: (\S+)", "\n".join(head))
        if path.stat().st_size and (found is None or found[1] not in LICENCES):
            bad.append(str(path.relative_to(ROOT)))
    assert not bad, f"no SPDX line among the first four: {bad}"


def test_no_module_is_too_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in source_files()}
    assert not {name: n for name, n in lengths.items() if n > LONGEST_MODULE}


def test_no_path_of_an_authors_machine() -> None:
    bad = []
    for path in source_files():
        if path != Path(__file__).resolve():
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                if MACHINE_PATHS.search(line):
                    bad.append(f"{path.relative_to(ROOT)}:{number}")
    assert not bad
