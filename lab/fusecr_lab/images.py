# SPDX-License-Identifier: Apache-2.0
"""The images on every host: `busybox`, small, and `debian` with systemd; built once, cached."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path

from . import tree
from .run import progress, run
from .state import CACHE, Lab

OFFER = "/var/log/images"
ARCH = {"x86_64": "amd64", "aarch64": "arm64"}
BUSYBOX_INIT = """#!/bin/sh
# reaps what is orphaned into it; SIGPWR is how Incus asks a container to shut down
/bin/mount -t tmpfs -o mode=1777 tmpfs /tmp
[ -e /etc/rc.local ] && /bin/sh /etc/rc.local </dev/null >/var/log/rc.local.log 2>&1
exec /bin/init
"""
# busybox init takes SIGTERM for a reboot and SIGUSR2 for a poweroff; Incus is told so by lxc.signal.halt
INITTAB = "::sysinit:/bin/hostname -F /etc/hostname\n::ctrlaltdel:/bin/poweroff\n::shutdown:/bin/true\n"
METADATA_DATE = "1700000000"
# what a container cannot or need not run; the rest lets systemd reach `running`
MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "console-getty.service", "dev-hugepages.mount",
    "dev-mqueue.mount", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer",
    "getty.target", "getty-static.service", "ldconfig.service", "modprobe@.service", "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount", "sys-kernel-config.mount", "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount", "systemd-binfmt.service", "systemd-journald-audit.socket",
    "systemd-logind.service", "systemd-machine-id-commit.service", "systemd-modules-load.service",
    "systemd-networkd-wait-online.service", "systemd-pstore.service", "systemd-random-seed.service",
    "run-lock.mount", "systemd-remount-fs.service", "systemd-sysctl.service", "systemd-udevd.service", "tmp.mount",
)
# a restored fd of memory.pressure has no trigger and polls as an error for ever: systemd must not open one
DEBIAN_INIT = "#!/bin/sh\nMEMORY_PRESSURE_WATCH=/dev/null exec /lib/systemd/systemd\n"
# CRIU 4.1 can dump neither a credentials mount, nor a BPF program, nor nested uts or network namespaces: no service
# of the image gets one of its own
UNCONFINED = ("[Service]", "ImportCredential=", "LoadCredential=", "SetCredential=", "IPAddressAllow=",
              "IPAddressDeny=", "DevicePolicy=auto", "DeviceAllow=", "ProtectHostname=no", "PrivateTmp=no",
              "PrivateDevices=no", "PrivateNetwork=no", "ProtectSystem=no", "ProtectHome=no",
              "ProtectControlGroups=no", "ProtectKernelTunables=no", "ProtectKernelModules=no",
              "ProtectKernelLogs=no", "ProtectProc=default")
# root may log in to the container's own sshd: `sshfs localhost:/srv /mnt` works as it is
DEBIAN_HOOKS = (
    'mkdir -p "$1"/etc/systemd/system/service.d; printf "%s\\n" ' + " ".join(f"'{u}'" for u in UNCONFINED)
    + ' > "$1"/etc/systemd/system/service.d/lab.conf',
    'for u in ' + " ".join(MASKED) + '; do ln -sf /dev/null "$1"/etc/systemd/system/$u; done',
    'mkdir -p "$1"/etc/systemd/system.conf.d; '
    'printf "[Manager]\\nDefaultMemoryPressureWatch=off\\n" > "$1"/etc/systemd/system.conf.d/lab.conf; '
    f'rm "$1"/sbin/init; printf %s \'{DEBIAN_INIT}\' > "$1"/sbin/init; chmod 755 "$1"/sbin/init',
    'rm -f "$1"/etc/hostname; : > "$1"/etc/machine-id; echo "127.0.0.1 localhost" > "$1"/etc/hosts',
    'sed -i "s/^#*user_allow_other/user_allow_other/" "$1"/etc/fuse.conf; '
    'grep -qx user_allow_other "$1"/etc/fuse.conf || echo user_allow_other >> "$1"/etc/fuse.conf',
    'chroot "$1" sh -ec "mkdir -p -m 700 /root/.ssh; ssh-keygen -q -t ed25519 -N \'\' -C lab -f /root/.ssh/id_ed25519; '
    'cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys; '
    'printf \'Host *\\nStrictHostKeyChecking no\\nUserKnownHostsFile /dev/null\\nLogLevel ERROR\\n\' > /root/.ssh/config; '
    'useradd -m -s /bin/bash user"',
)


def metadata(name: str, description: str) -> bytes:
    """metadata.yaml of an image; the fixed date keeps its fingerprint the same on every host."""
    arch = os.uname().machine
    return (f"architecture: {arch}\ncreation_date: {METADATA_DATE}\nproperties:\n  os: {name}\n  release: lab\n"
            f"  architecture: {ARCH.get(arch, arch)}\n  description: {description}\n").encode()


def _add(tar: tarfile.TarFile, name: str, data: bytes = b"", *, mode: int = 0o644, link: str = "",
         directory: bool = False) -> None:
    info = tarfile.TarInfo(name)
    info.mode, info.size, info.mtime = mode, len(data), int(METADATA_DATE)
    if link:
        info.type, info.linkname = tarfile.SYMTYPE, link
    elif directory:
        info.type, info.mode = tarfile.DIRTYPE, mode if mode != 0o644 else 0o755
    tar.addfile(info, io.BytesIO(data) if data else None)


def busybox(tree_squashfs: Path) -> Path:
    """Return the small image, made from the static busybox of the root tree."""
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    target = CACHE / (tree.key("busybox", tree_squashfs.name, source) + ".tar.gz")
    if target.exists():
        return target
    tree.need_packages({"unsquashfs": "squashfs-tools"})
    with tree.building(target) as scratch:
        if scratch:
            root = scratch / "root"
            run("take busybox from the root tree",
                ["unsquashfs", "-n", "-d", str(root), str(tree_squashfs), "usr/bin/busybox"])
            binary = root / "usr/bin/busybox"
            applets = run("list the applets of busybox", [str(binary), "--list"]).split()
            part = scratch / "image.tar.gz"
            with tarfile.open(part, "w:gz", compresslevel=6) as tar:
                _add(tar, "metadata.yaml", metadata("busybox", "busybox, the lab's small image"))
                for name in ("", "bin", "dev", "etc", "mnt", "proc", "root", "run", "sbin", "sys", "srv", "usr",
                             "usr/bin", "usr/sbin", "var", "var/log", "var/tmp", "home"):
                    _add(tar, f"rootfs/{name}".rstrip("/"), directory=True)
                _add(tar, "rootfs/tmp", directory=True, mode=0o1777)
                _add(tar, "rootfs/bin/busybox", binary.read_bytes(), mode=0o755)
                for applet in applets:
                    if applet != "busybox":
                        _add(tar, f"rootfs/bin/{applet}", link="busybox")
                _add(tar, "rootfs/sbin/init", BUSYBOX_INIT.encode(), mode=0o755)
                _add(tar, "rootfs/etc/inittab", INITTAB.encode())
                _add(tar, "rootfs/etc/hostname", b"busybox\n")
                _add(tar, "rootfs/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home:/bin/sh\n")
                _add(tar, "rootfs/etc/group", b"root:x:0:\nuser:x:1000:\n")
                _add(tar, "rootfs/etc/resolv.conf")
                _add(tar, "rootfs/etc/hosts", b"127.0.0.1 localhost\n")
            part.rename(target)
            progress(f"small image cached: {target}")
    return target


def debian(tree_squashfs: Path) -> list[Path]:
    """Return the files (metadata, root) of the Debian image: systemd, sshd, sshfs, bindfs, pyfuse3, libfuse3's examples."""
    meta = CACHE / (tree.key("debian-meta", METADATA_DATE) + ".tar.gz")
    if not meta.exists():
        with tree.building(meta) as scratch:
            if scratch:
                with tarfile.open(scratch / "part", "w:gz") as tar:
                    _add(tar, "metadata.yaml", metadata("debian", "Debian 13 with systemd and FUSE daemons"))
                (scratch / "part").rename(meta)
    name = tree.key("debian", *tree.IMAGE_PACKAGES, tree_squashfs.name, *DEBIAN_HOOKS)
    target = CACHE / (name + ".squashfs")
    if target.exists():
        return [meta, target]
    tree.need_packages({"mmdebstrap": "mmdebstrap", "mksquashfs": "squashfs-tools"})
    with tree.building(target) as scratch:
        if scratch:
            progress("building the Debian image; only the first time, about a minute")
            root = scratch / "root"
            tree.bootstrap("build the Debian image", root, tree.IMAGE_PACKAGES, DEBIAN_HOOKS)
            run("take the example daemons from the root tree",
                ["unsquashfs", "-n", "-f", "-d", str(root), str(tree_squashfs),
                 *[f"{tree.DAEMON_DIR}/{d}" for d in tree.DAEMONS]])
            tree.squash("pack the Debian image", root, target)
            progress(f"Debian image cached: {target} ({target.stat().st_size >> 20} MiB)")
    return [meta, target]


def prepare(tree_squashfs: Path) -> dict[str, list[Path]]:
    """Return the files of each image, building what the cache lacks."""
    return {"busybox": [busybox(tree_squashfs)], "debian": debian(tree_squashfs)}


def offer(lab: Lab, files: dict[str, list[Path]]) -> None:
    """Put the image files where the hosts can read them for the import."""
    for item in lab.incus_hosts:
        directory = lab.host_dir(item.name) / "log" / "images"
        directory.mkdir(exist_ok=True)
        for name, paths in files.items():
            for i, path in enumerate(paths):
                link = directory / f"{name}.{i}"
                try:
                    os.link(path, link)
                except OSError:
                    shutil.copyfile(path, link)


IMPORT = f"""for I in {OFFER}/*.0; do
  N=$(basename $I .0); set -- {OFFER}/$N.*
  incus image import -q "$@" --alias $N
done
rm -r {OFFER}
"""
