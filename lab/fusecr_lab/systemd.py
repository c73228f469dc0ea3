# SPDX-License-Identifier: Apache-2.0
"""systemd as pid 1 of a host: the packaged units of lxcfs and Incus, and ours, as their users run them."""

from __future__ import annotations

import shlex
from pathlib import Path

from .state import Lab

INIT = "/lib/systemd/systemd"
ENVIRONMENT = {"container": "other", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
UNITS = "/etc/systemd/system"
# what a host in namespaces cannot or need not run
MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "console-getty.service", "dev-hugepages.mount", "dev-mqueue.mount",
    "dnsmasq.service", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer",
    "getty.target", "getty-static.service", "incus-startup.service", "ldconfig.service", "modprobe@.service",
    "nftables.service", "proc-sys-fs-binfmt_misc.automount", "ssh.service", "ssh.socket", "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "systemd-binfmt.service",
    "systemd-journald-audit.socket", "systemd-logind.service", "systemd-machine-id-commit.service",
    "systemd-modules-load.service", "systemd-networkd.service", "systemd-networkd-wait-online.service",
    "systemd-pstore.service", "systemd-random-seed.service", "systemd-remount-fs.service", "systemd-resolved.service",
    "systemd-sysctl.service", "systemd-tmpfiles-setup-dev.service", "systemd-tmpfiles-setup-dev-early.service",
    "systemd-udev-settle.service", "systemd-udev-trigger.service", "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket", "systemd-udevd.service", "tmp.mount",
)
DROPINS = {
    # a host of the lab is a container for systemd
    "lxcfs.service": "[Unit]\nConditionVirtualization=\n",
    "incus.service": "[Service]\nEnvironment=INCUS_SECURITY_APPARMOR=false\nExecStartPre=\n"
                     "ExecStartPre=/bin/mkdir -p /var/log/incus\n",
    "incus-fusecr-holder.service": "",
}
SERVICES = {"lxcfs": "lxcfs.service", "incusd": "incus.service", "agent": "incus-fusecr.service",
            "holder": "incus-fusecr-holder.service"}
# the same words as the supervisor's, so that a script need not know which of them is pid 1
LABCTL = """#!/bin/sh
# labctl start|stop|restart|wait|status|pid|log SERVICE [TIMEOUT], labctl status: of a host whose pid 1 is systemd
unit() { case $1 in CASES *) echo "labctl: no service '$1' here; there are: NAMES" >&2; exit 1;; esac; }
booted() { timeout 60 sh -c "until systemctl is-system-running 2>/dev/null | grep -qE 'running|degraded'; do sleep 0.05; done"; }
pid() { systemctl show -P MainPID "$1"; }
[ $# -gt 0 ] || { echo "labctl: no command" >&2; exit 1; }
C=$1
if [ "$C" = status ] && [ $# = 1 ]; then
  for S in NAMES; do
    U=$(unit $S)
    printf '%-12s %-8s pid %-8s wanted %-4s restarts %-4s %s\\n' $S "$(systemctl show -P ActiveState $U)" "$(pid $U)" \\
      yes "$(systemctl show -P NRestarts $U)" "$(systemctl show -P Result $U)"
  done
  exit
fi
U=$(unit "$2") || exit 1
case $C in
  start|stop|restart)
    booted || { echo "labctl: systemd is not up" >&2; exit 1; }
    timeout "${3:-90}" systemctl $C $U || { systemctl status -n 30 $U >&2; exit 1; };;
  wait) timeout "${3:-20}" sh -c "until systemctl is-active -q $U; do sleep 0.05; done";;
  status) systemctl show -p ActiveState,MainPID,NRestarts $U; systemctl is-active -q $U || exit 3;;
  pid) P=$(pid $U); echo $P; [ $P != 0 ] || exit 3;;
  log) journalctl -q --no-pager -n 15 -o cat -u $U;;
  *) echo "labctl: unknown command '$C'" >&2; exit 1;;
esac
""".replace("CASES", " ".join(f"{name}) echo {unit};;" for name, unit in SERVICES.items())).replace("NAMES", " ".join(SERVICES))


def argv(lab: Lab) -> list[str]:
    """The command line of pid 1; in a container systemd takes it for the kernel's, too."""
    words = [INIT, "--system", f"fusecr-lab={lab.name}"]
    if lab.cgroups == "v1":  # since 256 systemd has to be asked for that
        words += ["systemd.unified_cgroup_hierarchy=0", "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"]
    return words


def files() -> dict[str, tuple[int, str]]:
    """The files of a host before its pid 1 runs: path to (mode, contents)."""
    found = {"/usr/local/bin/labctl": (0o755, LABCTL)}
    found |= {f"{UNITS}/{unit}.d/lab.conf": (0o644, text) for unit, text in DROPINS.items() if text}
    # an empty unit file masks as well as a link to /dev/null does
    found |= {f"{UNITS}/{unit}": (0o644, "") for unit in MASKED}
    return found


def install(repo: Path, program: str) -> str:
    """The script that puts our units into a running host, as a package does, and loads them."""
    script = f"ln -sf {program} /usr/bin/incus-fusecr\n"
    source = repo / "packaging" / "systemd"
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        target = f"{UNITS}/{path.relative_to(source)}"
        script += f"mkdir -p {target.rpartition('/')[0]}; printf %s {shlex.quote(path.read_text())} > {target}\n"
    return script + "systemctl daemon-reload; systemctl enable -q incus-fusecr-holder incus-fusecr\n"
