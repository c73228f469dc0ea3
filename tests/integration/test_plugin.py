# SPDX-License-Identifier: Apache-2.0
"""The CRIU plugin in a real CRIU, against a scripted agent: what it asks, what CRIU does with the answers."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from criu_box import MNT_DETACH, find_trees, run_in_box
from fake_agent import Answer, FakeAgent

import incus_fusecr

SOURCE = Path(incus_fusecr.__file__).parent / "criu"
HERE = Path(__file__).parent
TREES = find_trees()
PID = 1000      # of the dumped process in the box
FSUID = 12345
O_RDWR_NONBLOCK = os.O_RDWR | os.O_NONBLOCK

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="CRIU needs root"),
    pytest.mark.skipif(not TREES, reason="no CRIU >= 4.1: set FUSECR_TEST_ROOT to a Debian 13 tree or "
                                         "squashfs that has it (`lab up` makes one), or install criu >= 4.1"),
    pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="no /dev/fuse: modprobe fuse"),
]

START = f"""
mkdir -p /t/img /t/mnt
echo {PID - 1} > /proc/sys/kernel/ns_last_pid
setsid $PROGRAM <&- >&- 2>&- &
for i in 1 2 3 4 5 6 7 8 9 10; do
    sleep 0.1
    grep -q 'State:.S' /proc/{PID}/status && break
done
"""
# A killed task is seen alive for a moment, as CRIU does not wait for it: hence the sleep.
CRIU = f"""
cd /
criu $ARGUMENTS -D /t/img -v4 -L /t/plugin -o /t/log
echo $? > /t/rc
sleep 0.3
cat /proc/{PID}/status > /t/status
for n in 10 11; do cat /proc/{PID}/fdinfo/$n > /t/fdinfo.$n; done
true
"""


@dataclass
class Result:
    rc: int
    log: str
    alive: bool


class Box:
    """CRIU runs on one tree, with the plugin and a directory for the images."""

    def __init__(self, tree: Path, shared: Path) -> None:
        self.tree = tree
        self.shared = shared
        self.images = shared / "img"
        self.socket = shared / "agent.sock"

    def _criu(self, setup: str, arguments: str, env: dict[str, str]) -> Result:
        env = {"FUSECR_SOCKET": "/t/agent.sock", "ARGUMENTS": arguments} | env
        run_in_box(self.tree, self.shared, setup + CRIU, env)
        log = (self.shared / "log").read_text(errors="replace")
        # the name too: after a failed restore the next command in the box may get the number
        status = (self.shared / "status").read_text()
        alive = re.match(r"Name:\t(sleep|holder)\n(.*\n)*State:\t[RS] ", status) is not None
        return Result(int((self.shared / "rc").read_text()), log, alive)

    def dump(self, program: str = "sleep 900", tree_option: str = f"-t {PID}", **env: str) -> Result:
        return self._criu(START, f"dump {tree_option}", {"PROGRAM": program} | env)

    def restore(self) -> Result:
        return self._criu("", "restore -d", {})

    def fuse_images(self) -> list[str]:
        return sorted(path.read_text() for path in self.images.glob("fusecr-*.img"))

    def fdinfo(self, fd: int) -> str:
        return (self.shared / f"fdinfo.{fd}").read_text()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin, the helper and the test's holder, built from source."""
    out = tmp_path_factory.mktemp("built")
    subprocess.run(["make", "-s", "-C", str(SOURCE), f"O={out}"], check=True, timeout=120)
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", str(out / "holder"),
                    str(HERE / "fuse_holder.c")], check=True, timeout=120)
    return out


@pytest.fixture(params=TREES, ids=lambda tree: tree.name or "own-root")
def box(request: pytest.FixtureRequest, built: Path, tmp_path: Path) -> Box:
    (tmp_path / "plugin").mkdir()
    shutil.copy(built / "fusecr.so", tmp_path / "plugin")
    for name in ("fusecr-action", "holder"):
        shutil.copy(built / name, tmp_path)
    return Box(request.param, tmp_path)


def say(*answers: tuple[str, str | None]) -> Answer:
    """An agent that answers by the first word of the message, and nothing where it has no answer."""
    by_word = dict(answers)
    return lambda message, fds: by_word.get(message.split(" ")[0], "")


def errors(log: str) -> str:
    return "\n".join(line for line in log.splitlines() if "Error (" in line)


# ---- Dump ----

def test_inert_without_agent(box: Box) -> None:
    done = box.dump()
    assert done.rc == 0 and not done.alive
    assert 'Plugin "fusecr" (version 512 hooks 4)' in done.log
    assert "fusecr: no agent on /t/agent.sock: No such file" in done.log
    assert box.fuse_images() == []
    done = box.restore()
    assert done.rc == 0 and done.alive


def test_inert_with_the_socket_of_a_dead_agent(box: Box) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(box.socket))
    done = box.dump()
    assert done.rc == 0
    assert "fusecr: no agent on /t/agent.sock: Connection refused" in done.log


def test_inert_where_the_agent_says_none(box: Box) -> None:
    with FakeAgent(box.socket, say(("dump", "none"), ("restore", "none"))) as agent:
        assert box.dump().rc == 0
        done = box.restore()
        assert done.rc == 0 and done.alive
    assert agent.messages == [f"dump {PID}", "restore"]     # and no "exit": there was no session


@pytest.mark.parametrize("option", [f"--tree {PID}", f"--tree={PID}", f"-t{PID}"])
def test_every_way_to_name_the_tree(box: Box, option: str) -> None:
    with FakeAgent(box.socket, say(("dump", "none"))) as agent:
        assert box.dump(tree_option=option).rc == 0
    assert agent.messages == [f"dump {PID}"]


@pytest.mark.parametrize(("answer", "line"), [
    ("error bindfs (pid 7) cannot be stopped", "the agent refuses: bindfs (pid 7) cannot be stopped"),
    (None, "the agent closed the connection without an answer to 'dump"),
    ("ok\next mnt[/a]:k\nfrobnicate 3", "a line that this plugin does not understand: 'frobnicate 3'"),
    ("ok\nfsuid 0 -1", "a line that this plugin does not understand: 'fsuid 0 -1'"),
    ("ok\nfsuid 4294967295 0", "a line that this plugin does not understand: 'fsuid 4294967295 0'"),
    ("ok\nscript relative/path", "does not understand: 'script relative/path'"),
    ("ok\n\next mnt[/a]:k", "does not understand: ''"),
    ("okay", "the agent's answer is not understood: 'okay'"),
    ("none of it", "the agent's answer is not understood: 'none of it'"),
    ("ok\next a\0b", "no answer of the agent to 'dump 1000' (waited up to 60 s): Bad message"),
    ("ok\n" + "ext mnt[/a]:k\n" * 5000, "Bad message"),
    ("error \x1b[31m" + "x" * 5000, "the agent refuses:  [31mxxxx"),
])
def test_dump_refused(box: Box, answer: str | None, line: str) -> None:
    with FakeAgent(box.socket, say(("dump", answer))):
        done = box.dump()
    assert done.rc != 0 and done.alive
    assert line in errors(done.log)
    assert "\x1b" not in done.log


def test_dump_fails_at_a_socket_that_is_not_roots(box: Box) -> None:
    # SO_PEERCRED is of who called listen()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(box.socket))
        os.seteuid(FSUID)
        try:
            listener.listen(1)
        finally:
            os.seteuid(0)
        done = box.dump()
    assert done.rc != 0 and done.alive
    assert "cannot connect to the incus-fusecr agent on /t/agent.sock: Operation not" in errors(done.log)


def test_dump_session_with_fsuid_and_post_dump(box: Box) -> None:
    answer = f"ok\next mnt[/a]:k\nscript /t/fusecr-action\nfsuid {FSUID} {FSUID}\n"
    with FakeAgent(box.socket, say(("dump", answer), ("act", "ok"))) as agent:
        done = box.dump("/t/holder /t/mnt")
    assert done.rc == 0 and not done.alive, errors(done.log)
    assert agent.messages[0] == f"dump {PID}" and agent.messages[2:] == ["exit 0"]
    assert re.fullmatch(rf"act post-dump {PID} \d+", agent.messages[1])
    image = next(box.images.glob("fusecr-*.img")).stat()
    assert (image.st_uid, image.st_gid) == (FSUID, FSUID)


def test_tree_runs_on_after_post_dump_is_refused(box: Box) -> None:
    answers = say(("dump", "ok\nscript /t/fusecr-action"), ("act", "error the target is down"))
    with FakeAgent(box.socket, answers) as agent:
        done = box.dump()
    assert done.rc != 0 and done.alive
    assert "Error (fusecr-action): post-dump: the agent refuses: the target is down" in done.log
    # the dump itself did not fail: the plugin's "exit 0" does not say whether the tree was killed
    assert agent.messages[1].startswith("act post-dump ") and agent.messages[2:] == ["exit 0"]


# ---- /dev/fuse ----

def dump_holder(box: Box) -> None:
    with FakeAgent(box.socket, say(("dump", "ok"))):
        done = box.dump("/t/holder /t/mnt")
    assert done.rc == 0, errors(done.log)


def test_dump_of_fuse_fds(box: Box) -> None:
    dump_holder(box)
    unconnected, connected = box.fuse_images()
    assert unconnected == f"-1 {O_RDWR_NONBLOCK}\n"
    assert re.fullmatch(rf"[1-9]\d* {os.O_RDWR}\n", connected)


def test_fuse_fds_without_session_are_left_to_criu(box: Box) -> None:
    with FakeAgent(box.socket, say(("dump", "none"))):
        done = box.dump("/t/holder /t/mnt")
    assert done.rc != 0 and done.alive
    assert "Can't dump file 10 of that type" in errors(done.log)
    assert box.fuse_images() == []


@pytest.mark.parametrize(("owner", "mode"), [(FSUID, 0o755), (0, 0o775), (0, 0o757)])
def test_scripts_that_others_can_write_are_not_run(box: Box, owner: int, mode: int) -> None:
    script = box.shared / "fusecr-action"
    os.chown(script, owner, 0)
    script.chmod(mode)
    with FakeAgent(box.socket, say(("dump", "ok\nscript /t/fusecr-action"), ("act", "ok"))) as agent:
        done = box.dump()
    assert done.rc != 0 and done.alive
    assert "cannot do what the agent asks for: 'script /t/fusecr-action': Operation not perm" in errors(done.log)
    assert agent.messages == [f"dump {PID}"]


def test_other_files_are_left_to_criu_and_other_plugins(box: Box) -> None:
    with FakeAgent(box.socket, say(("dump", "ok"))):
        done = box.dump("/t/holder /t/mnt and-another")
    assert done.rc != 0 and done.alive
    assert "Can't dump file 12 of that type" in errors(done.log)    # what CRIU says to -ENOTSUP only


def give(fd: int, text: str = "ok") -> Answer:
    """An agent that answers "fd N" on the socket that comes with it, with an fd unless it is negative."""
    def answer(message: str, fds: list[int]) -> str:
        if message == "restore":
            return "ok"
        if message.startswith("fd "):
            with socket.socket(fileno=os.dup(fds[0])) as reply:
                socket.send_fds(reply, [text.encode()], [fd] if fd >= 0 else [])
        return ""
    return answer


@pytest.fixture
def fuse_fd(tmp_path: Path) -> Iterator[int]:
    """A /dev/fuse fd with a connection, of a mount that is gone again before anything could wait for it."""
    libc = ctypes.CDLL(None, use_errno=True)
    target = str(tmp_path / "mounted").encode()
    os.mkdir(target)
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
        if libc.mount(b"fusecr-test", target, b"fuse", 0, options) or libc.umount2(target, MNT_DETACH):
            raise OSError(ctypes.get_errno(), "mount", target)
        yield fd
    finally:
        os.close(fd)


def connection_of(fdinfo: str) -> str | None:
    match = re.search(r"fuse_connection:\t(\d+)", fdinfo)
    return match[1] if match else None


def flags_of(fdinfo: str) -> int:
    match = re.search(r"flags:\t(\d+)", fdinfo)
    assert match
    return int(match[1], 8) & O_RDWR_NONBLOCK


def test_restore_takes_the_fd_from_the_agent(box: Box, fuse_fd: int) -> None:
    dump_holder(box)
    (box.images / "fusecr.json").touch()
    number = box.fuse_images()[1].split(" ")[0]
    with FakeAgent(box.socket, give(fuse_fd)) as agent:
        done = box.restore()
    assert done.rc == 0 and done.alive, errors(done.log)
    assert agent.messages == ["restore", f"fd {number}"]
    assert agent.connections == 1       # the task in the box asked over the connection that CRIU kept
    given = connection_of(Path(f"/proc/self/fdinfo/{fuse_fd}").read_text())
    assert connection_of(box.fdinfo(10)) == given and given not in (None, number)
    assert connection_of(box.fdinfo(11)) is None
    assert (flags_of(box.fdinfo(10)), flags_of(box.fdinfo(11))) == (os.O_RDWR, O_RDWR_NONBLOCK)


def test_restore_fails_with_the_agents_reason(box: Box) -> None:
    dump_holder(box)
    with FakeAgent(box.socket, give(-1, "error connection 7 is not in the manifest")):
        done = box.restore()
    assert done.rc != 0 and not done.alive
    assert "the agent gave no /dev/fuse for connection" in errors(done.log)
    assert "error connection 7 is not in the manifest" in errors(done.log)


def test_restore_refuses_another_device(box: Box) -> None:
    dump_holder(box)
    with open("/dev/null", "r+b") as null, FakeAgent(box.socket, give(null.fileno())):
        done = box.restore()
    assert done.rc != 0 and not done.alive
    assert "what came for a /dev/fuse fd is not the device 10:229" in errors(done.log)


def test_restore_refuses_another_access_mode(box: Box) -> None:
    dump_holder(box)
    fd = os.open("/dev/fuse", os.O_RDONLY)
    try:
        with FakeAgent(box.socket, give(fd)):
            done = box.restore()
    finally:
        os.close(fd)
    assert done.rc != 0 and not done.alive
    assert "was opened with mode 2 before the dump, and now with mode 0" in errors(done.log)


def test_restore_of_fuse_state_needs_the_agent(box: Box) -> None:
    assert box.dump().rc == 0
    (box.images / "fusecr.json").touch()
    done = box.restore()
    assert done.rc != 0 and not done.alive
    assert "(fusecr.json), but the incus-fusecr agent does not run on this host" in errors(done.log)
    with FakeAgent(box.socket, say(("restore", "none"))):
        done = box.restore()
    assert done.rc != 0 and not done.alive
    assert "fusecr.json), but the incus-fusecr agent says that it has nothing to do" in errors(done.log)
    with FakeAgent(box.socket, say(("restore", "error fusecr.json has version 9"))):
        done = box.restore()
    assert done.rc != 0 and not done.alive
    assert "the agent refuses: fusecr.json has version 9" in errors(done.log)


def test_restore_without_session_leaves_no_fuse_fd_behind(box: Box) -> None:
    dump_holder(box)
    done = box.restore()
    assert done.rc != 0 and not done.alive
    assert "but no fusecr.json: it is not complete" in errors(done.log)


@pytest.mark.parametrize("content", [
    "", "7", "7 2", "7 2\n\n", " 7 2\n", "7  2\n", "+7 2\n", "0x7 2\n", "-2 2\n", "2147483648 2\n", "7 2 2\n",
    f"7 {os.O_RDWR | os.O_APPEND}\n", "7 3\n", "7 -1\n", f"7 {1 << 40}\n", "7 2\0\n", "9" * 70 + " 2\n",
    "x" * 100000,
])
def test_restore_refuses_a_damaged_image(hostile: Box, content: str) -> None:
    for path in hostile.images.glob("fusecr-*.img"):
        path.write_text(content)
    with FakeAgent(hostile.socket, give(-1, "error asked")) as agent:
        done = hostile.restore()
    assert done.rc != 0 and not done.alive
    assert re.search(r"\(fusecr\): (cannot read )?fusecr-\w+\.img (in|from) the image directory",
                     errors(done.log))
    assert agent.messages == ["restore"]


@pytest.fixture
def hostile(box: Box) -> Box:
    """A box with a complete dump of the holder, whose plugin images a test replaces."""
    dump_holder(box)
    return box


def test_restore_follows_no_symlink_in_the_image(hostile: Box) -> None:
    for path in hostile.images.glob("fusecr-*.img"):
        path.rename(hostile.shared / path.name)
        path.symlink_to(f"../{path.name}")
    with FakeAgent(hostile.socket, give(-1, "error asked")) as agent:
        done = hostile.restore()
    assert done.rc != 0 and not done.alive
    assert "from the image directory: Too many levels of symbolic links" in errors(done.log)
    assert agent.messages == ["restore"]
