# SPDX-License-Identifier: Apache-2.0
"""The product on every host as its users have it: a virtual environment, the agent's service, CRIU's plugin.

Its Python dependencies come by pip with the machine's own configuration, once, into a cached squashfs layer.
"""

from __future__ import annotations

import configparser
import hashlib
import io
import os
import re
import shlex
import shutil
import tarfile
from pathlib import Path

from . import systemd, tree
from .errors import LabError
from .incus import REPO, shell
from .run import progress, run, run_all
from .state import CACHE, NET, Lab

VENV = "/opt/incus-fusecr"
SOURCE = "/usr/src/incus-fusecr"
PARTS = ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "incus_fusecr", "profiles", "examples")
AGENT = f"""[service]
after = incusd
command = {VENV}/bin/incus-fusecr agent
ready = test -S /run/incus-fusecr/agent.sock
"""
PIP_ENV = re.compile(r"PIP_\w+|SSL_CERT_\w+|\w+_CA_BUNDLE|(?i:https?|no|all)_proxy")
# runs in private mount and pid namespaces; $1 tree, $2 scratch, then the paths that pip's configuration names
BUILD = """set -e
TREE=$1 S=$2; shift 2
mkdir -p $S/lower $S/upper $S/work $S/root
mount -t squashfs -o loop,ro "$TREE" $S/lower
mount -t overlay overlay -o lowerdir=$S/lower,upperdir=$S/upper,workdir=$S/work $S/root
mount --rbind /dev $S/root/dev
mount -t proc proc $S/root/proc
mount -t tmpfs tmpfs $S/root/tmp
cp $S/pip.conf $S/requirements.txt $S/root/tmp/
for P in /etc/resolv.conf /etc/hosts /etc/ssl/certs "$@"; do
  [ -e "$P" ] || continue
  P=$(realpath "$P")
  if [ -d "$P" ]; then mkdir -p "$S/root$P"; else mkdir -p "$S/root$(dirname "$P")"; : >> "$S/root$P"; fi
  mount --rbind "$P" "$S/root$P"
done
[ -e $S/root/etc/resolv.conf ] || cp /etc/resolv.conf $S/root/etc/resolv.conf
chroot $S/root python3 -m venv VENV
chroot $S/root env PIP_CONFIG_FILE=/tmp/pip.conf PIP_NO_CACHE_DIR=1 VENV/bin/pip install -q -r /tmp/requirements.txt
mkdir -p $S/layer$(dirname VENV)
cp -a $S/upper/VENV $S/layer/VENV
""".replace("VENV", VENV)
# standard input: the source. The quick way leaves pip out: the code alone has changed
BUILD_PRODUCT = f"""S={SOURCE}; V={VENV}; rm -rf $S.new; mkdir -p $S.new; tar -C $S.new -xf -
D=$(echo $V/lib/python3*/site-packages)
if cmp -s $S.new/setup.cfg $S/setup.cfg && [ -e $D/incus_fusecr ]; then FAST=1; else FAST=; fi
rm -rf $S; mv $S.new $S
if [ $FAST ]; then
  rm -rf $D/incus_fusecr; cp -a $S/incus_fusecr $D/incus_fusecr
else
  $V/bin/pip install -q --disable-pip-version-check --root-user-action=ignore --no-deps --no-index \\
    --no-build-isolation --no-compile --force-reinstall $S >&2
  rm -rf $S/build; ln -sf $V/bin/incus-fusecr /usr/local/bin/incus-fusecr
fi
$V/bin/python -m compileall -q $D/incus_fusecr >&2
make -s -C $S/incus_fusecr/criu O=/var/tmp/fusecr-criu install >&2
make -s -C $S/incus_fusecr/guard O=/var/tmp/fusecr-guard install >&2
rm -rf /usr/libexec/incus-fusecr/holder; cp -a $S/incus_fusecr/holder /usr/libexec/incus-fusecr/holder
"""
INSTALLED = (f"{VENV}/lib/python3*/site-packages/incus_fusecr*", f"{VENV}/bin/incus-fusecr",
             "/usr/local/bin/incus-fusecr", "/usr/lib/criu/fusecr.so", "/usr/libexec/incus-fusecr", SOURCE)
PACK = "cd /; tar -cf - " + " ".join(p[1:] for p in INSTALLED) + "\n"
UNPACK = "rm -rf " + " ".join(INSTALLED) + "; tar -C / -xf -\n"
KEPT_BUILDS = 8


def requirements() -> list[str]:
    """Return the product's run-time dependencies (install_requires of setup.cfg)."""
    parser = configparser.ConfigParser(interpolation=None)
    if not parser.read(REPO / "setup.cfg"):
        raise LabError(f"{REPO}/setup.cfg is missing: the lab belongs into the project's source tree")
    return parser.get("options", "install_requires", fallback="").split("\n")


def extras(name: str) -> list[str]:
    """Return the dependencies of an extra of setup.cfg."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(REPO / "setup.cfg")
    return [r for r in parser.get("options.extras_require", name, fallback="").split("\n") if r]


def pip_configuration() -> tuple[str, list[str]]:
    """Return the machine's pip configuration as one file's text, and the local paths that it names."""
    merged = configparser.RawConfigParser()
    home = Path(os.path.expanduser("~"))
    merged.read([Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf"), home / ".pip/pip.conf",
                 home / ".config/pip/pip.conf", Path(os.environ.get("PIP_CONFIG_FILE", "/nonexistent"))])
    text = io.StringIO()
    merged.write(text)
    values = [v for s in merged.sections() for _, v in merged.items(s)]
    values += [v for k, v in os.environ.items() if PIP_ENV.fullmatch(k)]
    paths = {w.removeprefix("file://") for v in values for w in v.split() if re.match(r"(file://)?/", w)}
    # of an index directory its parent, too: the pages of a simple index point outside of it
    paths |= {str(Path(p).parent) for p in paths if p.rstrip("/").endswith("/simple")}
    return text.getvalue(), sorted(p for p in paths if Path(p).exists())


def layer(tree_squashfs: Path) -> Path:
    """Return the squashfs with the product's dependencies; builds it if the cache lacks it."""
    wanted = "\n".join([*filter(None, requirements()), "setuptools", "wheel"]) + "\n"
    target = CACHE / (tree.key("deps", tree_squashfs.name, wanted, BUILD) + ".squashfs")
    if target.exists():
        return target
    with tree.building(target) as scratch:
        if scratch:
            progress("installing the product's dependencies by pip; only when setup.cfg changes")
            config, paths = pip_configuration()
            (scratch / "pip.conf").write_text(config)
            (scratch / "requirements.txt").write_text(wanted)
            env = {k: v for k, v in os.environ.items() if PIP_ENV.fullmatch(k) and k != "PIP_CONFIG_FILE"}
            env["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
            run("install the product's dependencies",
                tree.contained(["sh", "-c", BUILD, "sh", str(tree_squashfs), str(scratch), *paths]),
                timeout=600, env=env)
            tree.need_packages({"mksquashfs": "squashfs-tools"})
            tree.squash("pack the product's dependencies", scratch / "layer", target)
            progress(f"dependencies cached: {target}")
    return target


def source() -> bytes:
    """Return the product's source as a tar; times are kept, so that make rebuilds only what changed."""
    def keep(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        info.uid = info.gid = 0
        built = ("__pycache__", ".so", ".o", ".egg-info", "/fusecr-action", "/fusecr-guard", ".mypy_cache")
        return None if info.name.endswith(built) else info

    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for part in PARTS:
            if (REPO / part).exists():
                tar.add(REPO / part, part, filter=keep)
    return data.getvalue()


def _key(tar: bytes) -> str:
    """A hash of names and contents of the source: times do not count."""
    digest = hashlib.sha256()
    with tarfile.open(fileobj=io.BytesIO(tar)) as members:
        for info in sorted(members, key=lambda m: m.name):
            file = members.extractfile(info) if info.isfile() else None
            digest.update(f"{info.name} {info.mode:o} {info.size}\n".encode() + (file.read() if file else b""))
    return digest.hexdigest()


def _built(lab: Lab, deps: str) -> Path:
    """Return a tar of the installed product; built in the first host unless this very code was built before."""
    tar = source()
    target = CACHE / (tree.key("product", deps, _key(tar), BUILD_PRODUCT) + ".tar")
    if not target.exists():
        first = lab.incus_hosts[0].name
        argv, _ = shell(lab, first, "")
        run("build the product", [*argv[:-2], "sh", "-euc", BUILD_PRODUCT], stdin=tar, timeout=180)
        part = lab.dir / "product.tar"
        with open(part, "wb") as file:
            run("pack the product", [*argv[:-2], "sh", "-euc", PACK], timeout=60, stdout=file)
        shutil.move(part, target)
        for old in sorted(CACHE.glob("product-*.tar"), key=lambda p: p.stat().st_mtime)[:-KEPT_BUILDS]:
            old.unlink(missing_ok=True)
    return target


def install(lab: Lab, *, restart: bool) -> None:
    """Install the product from the source tree on all hosts; with restart, the agents are restarted."""
    deps = layer(tree.host_tree())
    if lab.deps and lab.deps != deps.name:
        raise LabError("the product's dependencies have changed since this lab was brought up; run: lab down; lab up")
    lab.deps = deps.name
    tar = _built(lab, deps.name).read_bytes()
    jobs = []
    for name in lab.hosts:
        script = UNPACK
        if name != NET:
            action = "restart" if restart else "start"
            if lab.systemd(name):
                script += systemd.install(REPO, f"{VENV}/bin/incus-fusecr") + f"labctl {action} agent\n"
                jobs.append(([*shell(lab, name, "")[0][:-2], "sh", "-euc", script], tar))
                continue
            script += f"mkdir -p /etc/fusecr-lab/services.d; printf %s {shlex.quote(AGENT)}" \
                f" > /etc/fusecr-lab/services.d/agent.service; labctl {action} agent\n"
        argv, _ = shell(lab, name, "")
        jobs.append(([*argv[:-2], "sh", "-euc", script], tar))
    run_all("install the product", jobs, timeout=120)
