# SPDX-License-Identifier: Apache-2.0
"""What the plugin does for stock CRIU on newer kernels: containers with inet sockets, hosts without CAP_SYS_RESOURCE."""

from __future__ import annotations

import errno
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from criu_box import find_trees, run_in_box
from fake_agent import FakeAgent

import incus_fusecr

SOURCE = Path(incus_fusecr.__file__).parent / "criu"
HERE = Path(__file__).parent
TREES = find_trees()
SESSION_LEADER = 1000  # pid of the dumped tree's root in the box
OTHER_USER = 12345
REDIRECTED = "fusecr: {}() of CRIU goes through the plugin"


def sopass_is_restricted() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inet:
        try:
            inet.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
        except OSError as error:
            return error.errno == errno.EOPNOTSUPP
    return False


needs_restriction = pytest.mark.skipif(
    not sopass_is_restricted(), reason="no kernel >= 6.16, which has SO_PASSCRED for unix and netlink sockets only"
)


def with_criu(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on each tree that has CRIU."""
    test = pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.name or "own-root")(test)
    return pytest.mark.requires_root(needs_tree(test))


needs_tree = pytest.mark.skipif(
    not TREES,
    reason="no CRIU >= 4.1: set FUSECR_TEST_ROOT to a Debian 13 tree or "
    "squashfs that has it (`lab up` makes one), or install criu >= 4.1",
)

# $BEFORE and $AS_CRIU are programs that run another: they change what the tree and what CRIU have.
DUMP = f"""
mkdir -p /t/img
echo {SESSION_LEADER - 1} > /proc/sys/kernel/ns_last_pid
setsid $BEFORE sh -c "$PROGRAM" <&- >&- 2>&- &
n=0
until sh -c "$READY"; do
    n=$((n + 1)); [ $n -lt 100 ] || {{ echo "the program does not start: $PROGRAM"; exit 1; }}
    sleep 0.1
done
cat /proc/{SESSION_LEADER}/limits > /t/limits.before
cd /
$AS_CRIU criu dump -t {SESSION_LEADER} --tcp-established -D /t/img -v4 -L /t/plugin -o /t/dump.log
echo $? > /t/rc
"""
RESTORE = f"""
cd /
criu restore -d --tcp-established -D /t/img -v4 -L /t/plugin -o /t/restore.log
echo $? > /t/rc
sleep 1
cat /proc/{SESSION_LEADER}/limits > /t/limits.after
cat /proc/{SESSION_LEADER}/status > /t/status
"""


class Box:
    """CRIU runs in it, with the plugin and an agent that only says what to do."""

    def __init__(self, tree: Path, shared: Path, answer: str = "ok") -> None:
        subprocess.run(["make", "-s", "-C", str(SOURCE), f"O={shared}/built"], check=True, timeout=120)
        (shared / "plugin").mkdir()
        shutil.copy(shared / "built/fusecr.so", shared / "plugin")
        shutil.copy(HERE / "socket_holder.py", shared)
        self.tree = tree
        self.shared = shared
        self.answer = answer

    def _run(self, script: str, env: dict[str, str]) -> int:
        with FakeAgent(self.shared / "agent.sock", lambda message, fds: self._say(message)):
            run_in_box(self.tree, self.shared, script, {"FUSECR_SOCKET": "/t/agent.sock"} | env)
        return int((self.shared / "rc").read_text())

    def _say(self, message: str) -> str:
        return self.answer if message.split(" ")[0] in ("dump", "restore") else ""

    def need(self, *programs: str) -> None:
        """Skip the test if the tree lacks one."""
        script = 'for p in $PROGRAMS; do command -v "$p" > /dev/null || echo "$p"; done'
        lacks = run_in_box(self.tree, self.shared, script, {"PROGRAMS": " ".join(programs)}).split()
        if lacks:
            pytest.skip(f"needs in {self.tree}: {', '.join(lacks)}")

    def dump(self, program: str, ready: str, before: str = "", as_criu: str = "") -> int:
        return self._run(DUMP, {"PROGRAM": program, "READY": ready, "BEFORE": before, "AS_CRIU": as_criu})

    def restore(self) -> int:
        return self._run(RESTORE, {})

    def text(self, name: str) -> str:
        return (self.shared / name).read_text(errors="replace")

    def errors(self, log: str) -> str:
        return "\n".join(line for line in self.text(log).splitlines() if "Error (" in line)


SOCKETS = "ip link set lo up; exec python3 /t/socket_holder.py /t/numbers"


@needs_restriction
@with_criu
def test_connections_survive(tree: Path, tmp_path: Path) -> None:
    box = Box(tree, tmp_path)
    box.need("python3", "ip", "iptables-restore")
    assert box.dump(SOCKETS, "test -s /t/numbers", "unshare --net") == 0, box.errors("dump.log")
    assert REDIRECTED.format("getsockopt") in box.text("dump.log")
    dumped = len(box.text("numbers").splitlines())
    assert box.restore() == 0, box.errors("restore.log")
    lines = [line.split() for line in box.text("numbers").splitlines()]
    assert len(lines) > dumped
    assert [number for number, _ in lines] == [str(i) for i in range(len(lines))]
    # SO_PASSCRED of the unix socket was dumped and restored, not taken for 0
    assert len({pid for _, pid in lines}) == 1


@needs_restriction
@with_criu
def test_inert_where_the_agent_says_none(tree: Path, tmp_path: Path) -> None:
    box = Box(tree, tmp_path, "none")
    assert box.dump("exec sleep 900", f"grep -q sleep /proc/{SESSION_LEADER}/comm") == 0, box.errors("dump.log")
    assert REDIRECTED.format("getsockopt") not in box.text("dump.log")


@with_criu
def test_task_of_another_user_without_cap_sys_resource(tree: Path, tmp_path: Path) -> None:
    box = Box(tree, tmp_path)
    box.need("setpriv", "prlimit")
    user = f"setpriv --reuid {OTHER_USER} --regid {OTHER_USER} --clear-groups prlimit --nofile=123:456 --core=0:0"
    without = "setpriv --bounding-set=-sys_resource --inh-caps=-all"
    ready = f"grep -q '^Max open files  *123 ' /proc/{SESSION_LEADER}/limits"
    assert box.dump("exec sleep 900", ready, user, without) == 0, box.errors("dump.log")
    assert REDIRECTED.format("syscall") in box.text("dump.log")
    assert box.restore() == 0, box.errors("restore.log")
    assert re.search(rf"^Uid:\t{OTHER_USER}\t", box.text("status"), re.MULTILINE)
    before, after = box.text("limits.before"), box.text("limits.after")
    assert after == before
    assert re.search(r"^Max open files +123 +456 ", after, re.MULTILINE)


WAYS = {
    "lazy": ["-Wl,-z,lazy,-z,norelro"],
    "lazy-relro": ["-Wl,-z,lazy,-z,relro"],
    "now": ["-Wl,-z,now,-z,relro"],
    "no-plt": ["-fno-plt", "-Wl,-z,now,-z,relro"],
    "no-pie": ["-fno-pie", "-no-pie", "-Wl,-z,now,-z,relro"],
    "no-pie-lazy": ["-fno-pie", "-no-pie", "-Wl,-z,lazy"],
}


@needs_restriction
@pytest.mark.requires_command("cc")
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_import(tmp_path: Path, way: str) -> None:
    library, program = tmp_path / "compat.so", tmp_path / "program"
    warn = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    for arguments in (
        ["-fPIC", "-shared", "-o", str(library), *(str(SOURCE / name) for name in ("compat.c", "redirect.c"))],
        [*WAYS[way], "-rdynamic", "-o", str(program), str(HERE / "imports.c"), "-ldl"],
    ):
        subprocess.run(["cc", *warn, *arguments], check=True, timeout=120)
    done = subprocess.run([program, library], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split("\n") == [
        f"{errno.EOPNOTSUPP} 0 {errno.EBADF}",
        f"0 0 {errno.EBADF}",
        "",
    ]
    assert REDIRECTED.format("getsockopt") in done.stderr
