# SPDX-License-Identifier: Apache-2.0
"""lxcfs' own tests (LGPL-2.1-or-later): fetched as Debian's source package when they are wanted, and run as they are."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# Those of tests/main.sh that are about what the file system shows. The others need its cgroup file system, which Debian's lxcfs
# does not show unless it is told to (test_readdir, test_cgroup, test_confinement, test_syscalls), signal the daemon to change
# its ways (test_reload, test_sigusr2) or do not ask it at all (cpusetrange).
SCRIPTS = ("test_proc", "test_read_proc.sh", "test_meminfo_hierarchy.sh")


def fetch(directory: Path) -> Path:
    """A directory ``tests`` with :data:`SCRIPTS` and what they run; made once for each suite and kept in the lab's cache.

    :raises OSError, subprocess.SubprocessError: the source package cannot be fetched
    """
    sys.path.insert(0, str(ROOT / "lab"))
    from fusecr_lab import tree
    from fusecr_lab.errors import LabError
    from fusecr_lab.state import CACHE

    archive = CACHE / (tree.key("lxcfs-source") + ".tar")
    if not archive.exists():
        try:
            mirror = tree.mirror()
        except LabError as error:
            raise OSError(str(error)) from None
        with tree.building(archive) as scratch:
            if scratch is not None:
                _download(scratch, mirror, tree.SUITE).rename(archive)
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests":
                (directory / parts[2]).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    tests = directory / "tests"
    tests.mkdir()
    for name in SCRIPTS:
        text = (directory / f"{name}.in").read_text()
        (tests / name).write_text(text.replace("{{LXCFS_BUILD_ROOT}}", "/root/lxcfs"))
        (tests / name).chmod(0o755)
    (directory / "config.h").write_text("#define _GNU_SOURCE\n")  # what a build would make of the system's facts
    command = ["gcc", "-O2", "-static", "-w", f"-I{directory}", "-o", str(tests / "test-read"), str(directory / "test-read.c")]
    subprocess.run(command, check=True, timeout=SECONDS)
    return tests


def _download(scratch: Path, mirror: str, suite: str) -> Path:
    for name in ("lists/partial", "archives/partial"):
        (scratch / name).mkdir(parents=True)
    (scratch / "sources.list").write_text(f"deb-src [signed-by={KEYRING}] {mirror} {suite} main\n")
    options = [
        f"Dir::State={scratch}", f"Dir::State::Lists={scratch}/lists", f"Dir::Cache={scratch}", "Dir::Etc::SourceParts=/dev/null",
        f"Dir::Etc::SourceList={scratch}/sources.list", "APT::Sandbox::User=root",
    ]  # fmt: skip
    apt = ["apt-get", "-q", *(word for option in options for word in ("-o", option))]
    for words in (["update"], ["source", "--download-only", "lxcfs"]):
        subprocess.run([*apt, *words], cwd=scratch, check=True, capture_output=True, timeout=SECONDS)
    (found,) = scratch.glob("lxcfs_*.orig.tar.*[!c]")
    return found
