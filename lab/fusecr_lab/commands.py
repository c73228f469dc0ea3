# SPDX-License-Identifier: Apache-2.0
"""The commands of `lab`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from . import cgroups, host, linux, machine
from .errors import LabError
from .run import progress
from .state import CGROUPS, INITS, MAX_HOSTS, NET, Host, Lab

DRIVERS = ("dir", "btrfs")
DEFAULT_PROFILE = """description: a container with FUSE daemons that can be checkpointed and migrated
config:
  migration.stateful: "true"
  raw.lxc: lxc.console.path=none
devices: {}
"""


def up(lab: Lab, count: int, driver: str, cgroup: str = CGROUPS[0], init: str = INITS[0]) -> bool:
    """Bring a lab up; one that is up in the same shape is left as it is. Return True if it was not."""
    if cgroup == "v1" and not cgroups.v1_mounts():
        raise LabError("--cgroup v1: this machine has no cgroup v1 hierarchy mounted", 2)
    with lab.lock("up"):
        fresh = Lab.load(lab.name)  # another command may have changed it until we held the lock
        if fresh.ready and all(h.alive for h in fresh.hosts.values()):
            wanted = replace(fresh, driver=driver, cgroups=cgroup, init=init).shape
            if len(fresh.incus_hosts) == count and fresh.shape == wanted:
                progress(f"lab {lab.name!r} is already up: {', '.join(fresh.hosts)} ({wanted})")
                return False
            raise LabError(f"lab {lab.name!r} is up with {len(fresh.incus_hosts)} hosts on {fresh.shape}, not "
                           f"{count} on {wanted}; run `lab down` first")
        if fresh.dir.exists() or cgroups.exists(fresh.cgroup):
            progress("removing what an earlier lab of this name left behind")
            clean(fresh)
        lab.hosts, lab.driver, lab.ready, lab.deps = {}, driver, False, ""
        lab.cgroups, lab.init = cgroup, init
        try:
            _up(lab, count)
        except BaseException:
            if os.environ.get("FUSECR_LAB_KEEP"):
                progress(f"kept for a look as FUSECR_LAB_KEEP is set: {lab.dir}")
            else:
                progress("failed: removing what was started")
                clean(lab)
            raise
    return True


def _up(lab: Lab, count: int) -> None:
    from . import images, incus, net, product, tree
    tree.need_packages({"ip": "iproute2", "nsenter": "util-linux", "unshare": "util-linux"})
    load_modules()
    machine.prepare()
    root = tree.host_tree()
    squashes = [product.layer(root), root]
    image_files = images.prepare(root)
    lab.dir.mkdir(parents=True)
    lab.dir.chmod(0o755)
    lab.save()
    progress(f"starting {count} hosts and their network")
    loops = [linux.attach_loop(str(path)) for path in squashes]
    try:
        names = {NET: 254, **{f"h{i}": i for i in range(1, count + 1)}}
        for name, last in names.items():
            lab.hosts[name] = host.start(lab, name, f"{lab.subnet}.{last}", [d for _, d in loops],
                                         incus.files(lab, name))
            lab.save()
    finally:
        for fd, _ in loops:
            os.close(fd)  # from now on the hosts' mounts hold the devices
    net.setup(lab)
    progress("starting Incus, importing images")
    images.offer(lab, image_files)
    profile = incus.REPO / "profiles" / "fusecr.yaml"
    incus.setup(lab, profile.read_text() if profile.exists() else DEFAULT_PROFILE, images.IMPORT)
    progress("installing the product on the hosts")
    product.install(lab, restart=False)
    lab.ready = True
    lab.save()
    progress(f"lab {lab.name!r} is up: {', '.join(lab.hosts)}")


def load_modules() -> None:
    """Load the kernel modules that nothing in a namespace would load by itself."""
    import shutil
    import subprocess
    modprobe = shutil.which("modprobe", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if modprobe:  # absent modules are built in, or their absence shows in the step that needs them
        subprocess.run([modprobe, "-qab", "overlay", "squashfs", "loop", "fuse", "tun", "veth", "bridge", "btrfs"],
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def pool_files(lab: Lab) -> set[tuple[int, int]]:
    """Return (st_dev, st_ino) of the files that may be behind the lab's loop devices."""
    found = set()
    for path in lab.dir.glob("*/incus/disks/*"):
        info = path.stat()
        found.add((info.st_dev, info.st_ino))
    return found


def clean(lab: Lab) -> None:
    """Remove everything of a lab, whatever state it is in, and check that it is gone."""
    files = pool_files(lab)
    cgroups.kill_all(lab.cgroup)
    cgroups.remove(lab.cgroup)
    if cgroups.last_is_gone():
        machine.restore()
    deadline = time.monotonic() + 5
    while True:
        left = [f"/dev/{p.name}" for p in Path("/sys/block").glob("loop*")
                if (p / "loop").exists() and linux.loop_backing(f"/dev/{p.name}") in files]
        if not left:
            break
        if time.monotonic() > deadline:  # dead mount namespaces let go of their devices a moment later
            for device in left:
                linux.detach_loop(device)
            deadline += 5
        time.sleep(0.05)
    lab.remove_dir()
    lab.hosts, lab.ready = {}, False


def down(lab: Lab) -> None:
    """Take a lab down."""
    from . import tree
    with lab.lock("down"):
        tree.remove_failed_builds()
        fresh = Lab.load(lab.name)
        if not fresh.dir.exists() and not cgroups.exists(fresh.cgroup):
            progress(f"lab {lab.name!r} is not up")
            return
        clean(fresh)
        progress(f"lab {lab.name!r} is down")


def reload(lab: Lab) -> None:
    """Put the source tree's present code on the hosts of a running lab and restart the agents."""
    from . import product
    with lab.lock("reload"):
        if not lab.ready:
            raise LabError(f"lab {lab.name!r} is not up; start it with: lab up")
        product.install(lab, restart=True)
        progress("the hosts run the present code")


def test(lab: Lab, arguments: Sequence[str], driver: str) -> int:
    """Run the tests; return pytest's exit code. A lab that was not up is taken down again.

    All tests run on two labs side by side: most of those on a lab wait for deadlines of the product.
    """
    from . import testing
    if not testing.needs_lab(arguments):
        return testing.run_pytest([lab], arguments)
    if arguments:
        return _with_lab(lab, driver, lambda present: testing.run_pytest([present], arguments), keep=False)
    second = Lab.load(f"{lab.name[:24]}-2")
    return _with_lab(lab, driver, lambda present: _with_lab(
        second, driver, lambda other: testing.run_pytest([present, other], arguments), keep=False), keep=False)


def demo(lab: Lab, driver: str, keep: bool) -> int:
    """Show a migration from end to end; return 0 if it went as it should."""
    from .demo import run_demo
    return _with_lab(lab, driver, run_demo, keep=keep)


def _with_lab(lab: Lab, driver: str, work: Callable[[Lab], int], *, keep: bool) -> int:
    """Do something on a lab with the present code; take the lab down if it was not up before."""
    present = lab.ready and all(h.alive for h in lab.hosts.values())
    fits = present and len(lab.incus_hosts) >= 2 and lab.driver == driver
    mine = not fits and up(lab, 2, driver)
    if not mine:
        reload(Lab.load(lab.name))
    try:
        return work(Lab.load(lab.name))
    finally:
        if mine and not keep:
            down(lab)
        elif mine:
            progress(f"lab {lab.name!r} stays up; take it down with: lab down")


def status(lab: Lab) -> int:
    """Print the hosts and what runs on them; 0 if all run, 3 if the lab is not up or a host is dead."""
    from . import incus
    if not lab.hosts:
        print(f"lab {lab.name}: not up")
        return 3
    alive = {n: h.alive for n, h in lab.hosts.items()}
    state = "up" if lab.ready and all(alive.values()) else "broken (clean up with: lab down)"
    print(f"lab {lab.name}: {state}, driver {lab.shape}, state directory {lab.dir}")
    for name, item in lab.hosts.items():
        what = "" if not alive[name] else "" if name == NET else f" instances: {incus.instances(lab, item)}"
        print(f"  {name:4} {item.address:14} pid {item.pid:<8} {'running' if alive[name] else 'DEAD':8}{what}")
    return 0 if lab.ready and all(alive.values()) else 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="lab", description="Real Incus hosts in namespaces of this machine. The "
                                  "environment variable FUSECR_LAB names the lab (default: lab); labs of different "
                                  "names run side by side.")
    sub = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    cmd = sub.add_parser("up", help="start the hosts h1, h2, ... and the network host `net`")
    cmd.add_argument("--hosts", type=int, default=2, metavar="N", help=f"1 to {MAX_HOSTS} (default 2)")
    cmd.add_argument("--driver", choices=DRIVERS, default="dir", help="of the storage pool (default dir)")
    cmd.add_argument("--cgroup", choices=CGROUPS, default=CGROUPS[0],
                     help="v2: containers without controllers, can be migrated; v1: with limits that are real, by this "
                     "machine's v1 hierarchies (default v2)")
    cmd.add_argument("--init", choices=INITS, default=INITS[0],
                     help="pid 1 of the hosts: the lab's supervisor, or systemd with the packaged units (default labctl)")
    cmd = sub.add_parser("exec", help="run a command in a host; its exit code is ours, 125 if there is no such host")
    cmd.add_argument("host", help="h1, h2, ..., net or client (the same: on the network, trusted, without a daemon)")
    cmd.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    sub.add_parser("status", help="show the hosts and their instances")
    sub.add_parser("down", help="remove the lab, whatever state it is in")
    sub.add_parser("reload", help="install the product's present code on the hosts and restart the agents")
    cmd = sub.add_parser("test", help="run the tests on a lab (brought up and down as needed)")
    cmd.add_argument("--driver", choices=DRIVERS, default="dir", help="of the storage pool (default dir)")
    cmd.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- PYTEST ARGUMENTS")
    cmd = sub.add_parser("demo", help="migrate a container with sshfs in use between two hosts")
    cmd.add_argument("--driver", choices=DRIVERS, default="dir", help="of the storage pool (default dir)")
    cmd.add_argument("--keep", action="store_true", help="leave the lab up")
    cmd = sub.add_parser("cut", help="cut a host off the network, or two hosts off each other only")
    cmd.add_argument("host", nargs="+")
    sub.add_parser("heal", help="undo every cut")
    return top


def main(argv: Sequence[str]) -> int:
    """Run one command; return the exit code."""
    args = parser().parse_args(argv)
    try:
        return dispatch(args)
    except LabError as err:
        print(f"Error: {err}", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        print("Error: interrupted", file=sys.stderr)
        return 130
    except OSError as err:
        print(f"Error: {args.command}: {err}", file=sys.stderr)
        return 1


def dispatch(args: argparse.Namespace) -> int:
    """Call the command that was asked for."""
    if os.geteuid() != 0:
        raise LabError("the lab needs root; run it with sudo", 2)
    lab = Lab.load()
    if args.command == "up":
        if not 1 <= args.hosts <= MAX_HOSTS:
            raise LabError(f"--hosts {args.hosts}: use 1 to {MAX_HOSTS}", 2)
        up(lab, args.hosts, args.driver, args.cgroup, args.init)
    elif args.command == "exec":
        words = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
        if not words:
            raise LabError("lab exec HOST -- COMMAND: the command is missing", 2)
        return host.execute(lab, lab.host(args.host), words)
    elif args.command == "down":
        down(lab)
    elif args.command == "reload":
        reload(lab)
    elif args.command == "test":
        return test(lab, args.argv[1:] if args.argv[:1] == ["--"] else args.argv, args.driver)
    elif args.command == "demo":
        return demo(lab, args.driver, args.keep)
    elif args.command == "status":
        return status(lab)
    else:
        from . import net
        with lab.lock(args.command):
            lab.host(NET)
            if args.command == "cut":
                net.cut(lab, args.host)
            else:
                net.heal(lab)
    return 0


__all__ = ["Host", "main"]
