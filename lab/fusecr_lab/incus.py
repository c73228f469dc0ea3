# SPDX-License-Identifier: Apache-2.0
"""Incus on the hosts: services, storage pool, profiles, mutual trust."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from . import cgroups, systemd
from .errors import LabError
from .host import apparmor
from .net import BRIDGE
from .run import run_all
from .state import CLIENT_ALIAS, NET, Host, Lab

POOL_SIZE = "6GiB"
LAUNCHER = Path(__file__).resolve().parent.parent / "lab"
REPO = LAUNCHER.parent.parent
SERVICES = {
    "lxcfs": """[service]
before = umount -l /var/lib/lxcfs
command = lxcfs -f -p /run/lxcfs.pid /var/lib/lxcfs
ready = test -d /var/lib/lxcfs/proc
""",
    # idmapped mounts are not re-created by a restore: the container's rootfs would belong to 65534;
    # AppArmor profiles would be loaded into the machine's kernel and stay there
    "incusd": """[service]
after = lxcfs
environment = INCUS_IDMAPPED_MOUNTS_DISABLE=1 INCUS_SECURITY_APPARMOR=false
command = incusd --group root --logfile /var/log/incus/incusd.log
ready = incusd waitready --timeout=30
""",
}
# without AppArmor in use Incus sets the profile "unconfined", which CRIU cannot restore on a kernel that has none
LAB_RAW_LXC = "lxc.apparmor.profile="


def criu_conf() -> str:
    """CRIU's defaults in the lab.

    liblxc passes --cgroup-root lxc.payload.NAME on restore, which CRIU applies to every hierarchy it finds in
    /proc/PID/cgroup. On a machine that still has cgroup v1 hierarchies the containers are in their roots.
    """
    return "".join(f"cgroup-root {name}:/\n" for name in cgroups.v1_controllers())


def files(lab: Lab, name: str) -> dict[str, tuple[int, str]]:
    """The files of a host that differ from the root tree: path to (mode, contents)."""
    base = f"{lab.subnet}."
    hosts = f"127.0.0.1 localhost\n{base}254 {NET} {CLIENT_ALIAS}\n"
    hosts += "".join(f"{base}{i} h{i}\n" for i in range(1, 10))
    found = {
        "/usr/local/bin/labctl": (0o755, (Path(__file__).parent / "supervisor.py").read_text()),
        "/etc/hosts": (0o644, hosts), "/etc/hostname": (0o644, name + "\n"), "/etc/resolv.conf": (0o644, ""),
        "/etc/machine-id": (0o444, os.urandom(16).hex() + "\n"), "/etc/fusecr-lab/name": (0o644, lab.name + "\n"),
    }
    if name != NET:
        if lab.cgroups == "v2":
            found["/etc/criu/default.conf"] = (0o644, criu_conf())
        if lab.systemd(name):
            found |= systemd.files()
        for service, text in SERVICES.items() if not lab.systemd(name) else ():
            found[f"/etc/fusecr-lab/services.d/{service}.service"] = (0o644, text)
    else:
        found["/etc/fusecr-lab/services.d/dhcp.service"] = (0o644, "[service]\ncommand = dnsmasq -k --conf-file=/dev/null"
            f" --port=0 --interface={BRIDGE} --bind-dynamic --dhcp-range={base}100,{base}199,12h --dhcp-option=3"
            " --dhcp-leasefile=/run/dhcp.leases --dhcp-authoritative --user=root\n")
    return found


def shell(lab: Lab, host: str, script: str) -> tuple[list[str], bytes]:
    """Return a job for run_all: a shell script in a host that stops at its first failing command."""
    return ["env", f"FUSECR_LAB={lab.name}", sys.executable, str(LAUNCHER), "exec", host, "--", "sh", "-eu"], script.encode()


def preseed(lab: Lab, host: Host) -> str:
    """The script that makes a daemon a host of the lab."""
    size = f", config: {{size: {POOL_SIZE}}}" if lab.driver != "dir" else ""
    return f"""labctl start incusd 60
incus admin init --preseed <<'P'
config: {{core.https_address: "{host.address}:8443", images.auto_update_interval: "0"}}
storage_pools: [{{name: default, driver: {lab.driver}{size}}}]
profiles:
- {{name: default, devices: {{root: {{type: disk, path: /, pool: default}}}}}}
- {{name: lan, description: "NIC on the lab's network",
   devices: {{eth0: {{type: nic, nictype: bridged, parent: {BRIDGE}, name: eth0}}}}}}
P
"""


def profile(text: str) -> str:
    """The script that loads the product's profile and gives `default` the same keys, plus the lab's own."""
    added = "" if apparmor() else f"\n{LAB_RAW_LXC}"
    return f"""incus profile create -q fusecr 2>/dev/null || true
cat <<'P' | incus profile edit fusecr
{text.rstrip()}
P
RAW=$(incus profile get fusecr raw.lxc | grep -v '^{LAB_RAW_LXC}$' || true)
for P in fusecr default; do incus profile set $P raw.lxc="$RAW{added}"; done
incus profile set default migration.stateful=true
"""


def setup(lab: Lab, profile_text: str, images: str) -> None:
    """Start Incus on every host, then make them trust each other and the client.

    Args:
        lab: the lab, its network up.
        profile_text: YAML of the product's profile.
        images: shell script that imports the images.
    """
    hosts = lab.incus_hosts
    names = [h.name for h in hosts] + [NET]
    jobs = []
    for host in hosts:
        others = [n for n in names if n != host.name]
        tokens = "".join(f'echo "token {n} $(incus config trust add {n} -q | tail -n1)"\n' for n in others)
        jobs.append(shell(lab, host.name, preseed(lab, host) + profile(profile_text) + images + tokens))
    jobs.append(shell(lab, NET, "labctl start dhcp\n"))
    outputs = run_all("set up Incus", jobs, timeout=180)
    adds: dict[str, list[str]] = {n: [] for n in names}
    for host, output in zip(hosts, outputs, strict=False):
        found = re.findall(r"(?m)^token (\S+) (\S+)$", output)
        if len(found) != len(names) - 1:
            raise LabError(f"set up Incus: {host.name} gave {len(found)} trust tokens of {len(names) - 1}:\n{output}")
        for name, token in found:
            adds[name].append(f"incus remote add {host.name} {token} --accept-certificate -q\n")
    run_all("make the hosts trust each other", [shell(lab, n, "".join(lines)) for n, lines in adds.items() if lines])


def instances(lab: Lab, host: Host, timeout: float = 10) -> str:
    """Return a host's instances and their states in one line, for `lab status`."""
    from .run import run
    argv, stdin = shell(lab, host.name, "incus list --all-projects -f json 2>/dev/null")
    try:
        found = json.loads(run("list instances", argv, stdin=stdin, timeout=timeout))
        return " ".join(f"{i['name']}:{i['status']}" for i in found) or "none"
    except (LabError, ValueError, KeyError, TypeError):
        return "incusd does not answer"
