# SPDX-License-Identifier: Apache-2.0
"""`lab test`: pytest in an environment of its own, on a lab that is brought up and taken down as needed."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import product, tree
from .errors import LabError
from .incus import REPO
from .run import progress, run
from .state import CACHE, Lab

# what the tests use on this machine itself; sshd is missing on purpose: its package would start it here
MACHINE = {
    "/usr/lib/openssh/sftp-server": "openssh-sftp-server", "/usr/include/fuse3/fuse.h": "libfuse3-dev",
    "/usr/include/stdlib.h": "libc6-dev", "bindfs": "bindfs", "fusermount3": "fuse3", "gcc": "gcc",
    "gocryptfs": "gocryptfs", "fuse-overlayfs": "fuse-overlayfs", "make": "make", "mksquashfs": "squashfs-tools",
    "openssl": "openssl", "pkg-config": "pkg-config", "squashfuse": "squashfuse", "squashfuse_ll": "squashfuse",
    "ssh": "openssh-client", "sshfs": "sshfs", "strace": "strace",
    "/var/lib/dpkg/info/python3-pyfuse3.list": "python3-pyfuse3", "/var/lib/dpkg/info/python3-trio.list": "python3-trio",
}
PYTHON = "/usr/bin/python3"


def environment() -> Path:
    """Return the directory of a virtual environment with the project's run-time and test dependencies."""
    wanted = [*filter(None, product.requirements()), *product.extras("test")]
    version = run("ask for Python's version", [PYTHON, "-c", "import sys; print(sys.version_info[:2])"])
    venv = CACHE / tree.key("venv", version, str(REPO), *wanted)
    done = venv / ".complete"
    if done.exists():
        return venv
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / ".venv-lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists():
            return venv
        shutil.rmtree(venv, ignore_errors=True)
        progress("making the tests' virtual environment; only when setup.cfg changes")
        if subprocess.run([PYTHON, "-c", "import venv, ensurepip"], stderr=subprocess.DEVNULL, check=False).returncode:
            tree.need_packages({"/nonexistent": "python3-venv"})
        run("make a virtual environment", [PYTHON, "-m", "venv", str(venv)])
        python = str(venv / "bin/python")
        run("install the tests' dependencies",
            [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted], timeout=900)
        site = run("find its packages", [python, "-c", "import site; print(site.getsitepackages()[0])"]).strip()
        (Path(site) / "incus-fusecr.pth").write_text(f"{REPO}\n")
        done.touch()
    return venv


def needs_lab(arguments: Sequence[str]) -> bool:
    """True unless the pytest arguments name only paths outside of the lab's tests."""
    named = [(REPO / a.split("::")[0]).resolve() for a in arguments if not a.startswith("-")]
    named = [p for p in named if p.exists()]
    lab_tests = REPO / "tests" / "lab"
    return not named or any(p == lab_tests or lab_tests in p.parents or p in lab_tests.parents for p in named)


def run_pytest(labs: Sequence[Lab], arguments: Sequence[str]) -> int:
    """Run pytest in the project's root, with a worker for each lab if there are several; return its exit code."""
    venv = environment()
    tree.need_packages(MACHINE)
    names = ",".join(lab.name for lab in labs)
    env = {**os.environ, "FUSECR_LAB": labs[0].name, "FUSECR_LABS": names, "PYTHONDONTWRITEBYTECODE": "1",
           "VIRTUAL_ENV": str(venv), "PATH": f"{venv}/bin:{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"}
    argv = [str(venv / "bin/python"), "-m", "pytest", "-p", "no:cacheprovider", *(arguments or ["tests"])]
    if len(labs) > 1:
        # A file's tests share their containers.
        argv += ["-n", str(len(labs)), "--dist", "loadfile", "--no-loadscope-reorder"]
    try:
        process = subprocess.Popen(argv, cwd=REPO, env=env)
    except OSError as err:
        raise LabError(f"cannot run {argv[0]}: {err}") from None
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # pytest got it from the terminal, too, and ends its test properly
