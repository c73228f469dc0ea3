# SPDX-License-Identifier: Apache-2.0
"""The Debian root tree of the hosts: built once by mmdebstrap, cached as a squashfs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import LabError
from .run import progress, run
from .state import CACHE

SUITE = "trixie"
KEYRINGS = "/usr/share/keyrings"
HOST_PACKAGES = (
    "bindfs", "btrfs-progs", "busybox-static", "ca-certificates", "criu", "curl", "dbus", "dnsmasq-base", "fuse3",
    "gcc", "incus-base", "incus-client", "iproute2", "iptables", "iputils-arping", "iputils-ping", "libc6-dev",
    "libcriu-dev", "libfuse3-dev", "lxcfs", "make", "netcat-openbsd", "nftables", "openssh-client",
    "openssh-server", "pkg-config", "procps", "psmisc", "python3", "python3-dev", "python3-pip", "python3-venv",
    "rsync", "socat", "squashfs-tools", "sshfs", "strace", "systemd-sysv", "tar",
    "tcpdump", "xz-utils",
)
IMAGE_PACKAGES = (
    "attr", "bindfs", "busybox-static", "ca-certificates", "fuse3", "iproute2", "iputils-ping", "netcat-openbsd",
    "openssh-client", "openssh-server", "procps", "psmisc", "python3", "python3-pyfuse3", "python3-trio", "socat",
    "sshfs", "strace", "systemd-sysv",
)
EXAMPLES = "/usr/share/doc/libfuse3-dev/examples"
# libfuse's own example daemons, unmodified: multi-threaded, low level and high level
DAEMONS = ("passthrough", "passthrough_fh", "passthrough_ll", "hello_ll")
DAEMON_DIR = "usr/local/bin"
DEB_DIR = "usr/share/fusecr-lab"  # packages to be installed again: hosts have no network
DPKG_PATHS = (*(f"path-exclude=/usr/share/{d}/*" for d in ("doc", "man", "locale", "info")),
              "path-include=/usr/share/doc/libfuse3-dev*")
# part of each cache key: change it when this module builds something else from the same packages
RECIPE = "5"
KEPT = 3
KEPT_SECONDS = 3 * 86400


def need_packages(commands: dict[str, str]) -> None:
    """Install the Debian packages of commands (or files) that the machine lacks (command: package)."""
    missing = sorted({p for c, p in commands.items()
                      if not (os.path.exists(c) if c[0] == "/" else shutil.which(c, path=_path()))})
    if not missing:
        return
    progress(f"installing on this machine: {' '.join(missing)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing]
    try:
        run("install packages", install, timeout=600, env=env)
    except LabError:
        run("update the package lists", ["apt-get", "update", "-q"], timeout=300, env=env)
        run("install packages", install, timeout=600, env=env)


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin"


def mirror() -> str:
    """Return the Debian mirror of the machine's own apt configuration.

    Raises:
        LabError: none is configured.
    """
    seen = subprocess.run(["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages", "Origin: Debian"],
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout.split()
    sources = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for source in sources:  # without downloaded package lists there are no index targets with an origin
        if source.suffix not in (".list", ".sources") or not source.is_file():
            continue
        text = source.read_text(errors="replace")
        seen += re.findall(r"(?m)^URIs:\s*(\S+)", text)
        seen += re.findall(r"(?m)^deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+(?:bookworm|trixie)\s", text)
    for uri in seen:
        if "security" not in uri and re.match(r"(https?|file|copy|mirror\+\w+)://?\S*debian", uri):
            return uri.rstrip("/")
    raise LabError("no Debian mirror found in the machine's apt configuration (/etc/apt/sources.list*); "
                   "add a line of type deb for the main section of bookworm or trixie")


def _apt_options() -> list[str]:
    """The machine's proxies as options of mmdebstrap (removed from the tree at the end)."""
    dump = run("read the apt configuration", ["apt-config", "dump", "Acquire"])
    lines = [ln for ln in dump.splitlines() if re.match(r'Acquire::https?::[^ ]*(Proxy|CaInfo)[^ ]* "[^"]+"', ln)]
    return [f"--aptopt={line}" for line in lines]


def key(kind: str, *parts: str) -> str:
    """Return the cache key of an artefact: a hash of everything that decides its contents."""
    text = "\0".join([RECIPE, kind, SUITE, os.uname().machine, *parts])
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path | None]:
    """Hold the cache's lock; yield a scratch directory, or None if another lab built the target meanwhile.

    The scratch directory of a crashed build is removed first: nobody else can hold the lock then.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another lab that is filling the cache")
            fcntl.flock(file, fcntl.LOCK_EX)
        _remove_scratch()
        if target.exists():
            yield None
            return
        scratch = Path(tempfile.mkdtemp(prefix="build-", dir=CACHE))
        scratch.chmod(0o755)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _remove_scratch() -> None:
    for old in CACHE.glob("build-*"):
        shutil.rmtree(old, ignore_errors=True)


def remove_failed_builds() -> None:
    """Remove what killed builds left in the cache, unless some lab is building right now."""
    if not any(CACHE.glob("build-*")):
        return
    with open(CACHE / ".lock", "a") as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_scratch()


def contained(argv: list[str]) -> list[str]:
    """Wrap a build command: its mounts and processes vanish with it, whatever kills it."""
    return ["setpriv", "--pdeathsig", "KILL", "unshare", "-m", "-p", "--fork", "--kill-child", "--mount-proc",
            "--propagation", "private", *argv]


def bootstrap(step: str, root: Path, packages: tuple[str, ...], hooks: tuple[str, ...] = ()) -> None:
    """Build a Debian root tree in a directory; hooks are mmdebstrap customize hooks."""
    uri = mirror()
    argv = contained([
        "mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", f"--include={','.join(packages)}",
        '--aptopt=APT::Install-Recommends "false"', '--aptopt=Acquire::Languages "none"',
        '--aptopt=Acquire::Retries "3"', *_apt_options(), *[f"--dpkgopt={o}" for o in DPKG_PATHS],
        "--dpkgopt=force-unsafe-io", *[f"--customize-hook={h}" for h in hooks],
        '--customize-hook=rm -f "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/resolv.conf', SUITE, str(root), uri])
    env = {**os.environ, "PATH": _path(), "TMPDIR": str(root.parent)}
    run(step, argv, timeout=1800, env=env)


def squash(step: str, root: Path, target: Path) -> None:
    """Pack a directory as a squashfs at target, visible only when complete."""
    part = root.parent / "part.squashfs"
    run(step, contained(["mksquashfs", str(root), str(part), "-comp", "zstd", "-Xcompression-level", "3", "-noappend",
                         "-quiet", "-no-progress", "-xattrs"]), timeout=600)
    part.rename(target)
    _prune(target)


def _prune(new: Path) -> None:
    """Remove old artefacts of the same kind; a lab that still uses one keeps its data until it is down."""
    kind = new.name.rsplit("-", 1)[0]
    same = sorted(CACHE.glob(f"{kind}-*.squashfs"), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in same[KEPT:]:
        if time.time() - old.stat().st_mtime > KEPT_SECONDS:
            old.unlink(missing_ok=True)


def host_tree() -> Path:
    """Return the squashfs of the hosts' root tree; builds it if the cache lacks it."""
    target = CACHE / (key("tree", *HOST_PACKAGES) + ".squashfs")
    if target.exists():
        return target
    need_packages({"mmdebstrap": "mmdebstrap", "mksquashfs": "squashfs-tools"})
    with building(target) as scratch:
        if scratch:
            progress(f"building the hosts' root tree (Debian {SUITE}); only the first time, about a minute")
            # dpkg must not start services, and the ssh host keys must not be the same everywhere
            compile_daemons = "; ".join(
                f"gcc -O2 -o /{DAEMON_DIR}/{d} {EXAMPLES}/{d}.c $(pkg-config --cflags --libs fuse3)" for d in DAEMONS)
            hooks = ('rm -f "$1"/etc/ssh/ssh_host_*', 'echo fusecr-lab > "$1"/etc/hostname',
                     f'chroot "$1" sh -ec \'{compile_daemons}\'',
                     f'mkdir "$1"/{DEB_DIR}; cd "$1"/{DEB_DIR}; '
                     'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get download -q lxcfs')
            bootstrap("build the root tree", scratch / "root", HOST_PACKAGES, hooks)
            squash("pack the root tree", scratch / "root", target)
            progress(f"root tree cached: {target} ({target.stat().st_size >> 20} MiB)")
    return target
