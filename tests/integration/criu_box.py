# SPDX-License-Identifier: Apache-2.0
"""A box to run a real CRIU in: own mount, pid and ipc namespaces over a Debian tree that has criu >= 4.1.

The trees come from FUSECR_TEST_ROOT (directories or squashfs files, separated by ':'), else from the lab's
cache, else the machine's own root is taken. Nothing of a box outlives the command that runs in it: its mounts
are private to its namespace and its processes end with the init of its pid namespace.

Run as a program it is the inside half: it makes the root from the arguments TREE SHARED and becomes SCRIPT.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

LAB_CACHE = Path("/var/cache/incus-fusecr-lab")
SHARED = "/t"
BOX_SECONDS = 90
MNT_DETACH = 2
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def own_criu() -> tuple[int, ...]:
    """Return the version of the machine's own criu, () without one."""
    path = shutil.which("criu", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        return ()
    out = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    match = re.search(r"Version: (\d+)\.(\d+)", out)
    return (int(match[1]), int(match[2])) if match else ()


def find_trees() -> list[Path]:
    """Return the trees to test with; empty if there is none."""
    named = os.environ.get("FUSECR_TEST_ROOT")
    if named:
        return [Path(name) for name in named.split(":") if name]
    cached = sorted(LAB_CACHE.glob("tree-*.squashfs"), key=lambda path: path.stat().st_mtime)
    if cached:
        return cached[-1:]
    return [Path("/")] if own_criu() >= (4, 1) else []


def run_in_box(tree: Path, shared: Path, script: str, env: dict[str, str]) -> str:
    """Run a shell script as init of a new box on a tree.

    shared is a directory of this machine that stands at /t in the box; the script finds env in its own one.
    Returns stdout and stderr of the script together; raises AssertionError if the script fails or overruns.
    """
    command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--ipc",
               "--", sys.executable, __file__, str(tree), str(shared), script]
    path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    done = subprocess.run(command, env=path | env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=BOX_SECONDS, check=False)
    assert done.returncode == 0, f"script in the box on {tree} failed ({done.returncode}):\n{done.stdout}"
    return done.stdout


def _mount(source: str, target: Path, fstype: str, *options: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", fstype, *options, source, str(target)], check=True, timeout=30)


def _device(dev: Path, name: str) -> None:
    node = os.stat(f"/dev/{name}")
    os.mknod(dev / name, node.st_mode, node.st_rdev)
    (dev / name).chmod(0o666)


def _build_root(tree: Path, shared: Path, work: Path) -> Path:
    _mount("none", work, "tmpfs")
    lower = tree
    if tree.is_file():
        lower = work / "lower"
        _mount(str(tree), lower, "squashfs", "-o", "loop,ro")
    for name in ("upper", "work"):
        (work / name).mkdir()
    root = work / "root"
    _mount("none", root, "overlay", "-o", f"lowerdir={lower},upperdir={work}/upper,workdir={work}/work")
    for name in ("dev", "run", "tmp"):
        _mount("none", root / name, "tmpfs")
    for name in ("null", "zero", "full", "random", "urandom", "tty", "fuse"):
        _device(root / "dev", name)
    _mount("none", root / "dev/pts", "devpts", "-o", "newinstance,ptmxmode=0666")
    os.symlink("pts/ptmx", root / "dev/ptmx")
    _mount("none", root / "proc", "proc")
    _mount("none", root / "sys", "sysfs")
    (root / SHARED.lstrip("/")).mkdir()
    subprocess.run(["mount", "--bind", str(shared), str(root) + SHARED], check=True, timeout=30)
    return root


def _enter(root: Path) -> None:
    """Make root the root and leave nothing of the old one: CRIU reads the whole mount table."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.chdir(root)
    if libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."):
        raise OSError(ctypes.get_errno(), "pivot_root", str(root))
    if libc.umount2(b".", MNT_DETACH):
        raise OSError(ctypes.get_errno(), "umount2 of the old root")
    os.chdir("/")


def _main(tree: str, shared: str, script: str) -> None:
    # /mnt: the tmpfs is only in this mount namespace
    _enter(_build_root(Path(tree), Path(shared), Path("/mnt")))
    os.execvp("sh", ["sh", "-c", script])


if __name__ == "__main__":
    _main(*sys.argv[1:4])
