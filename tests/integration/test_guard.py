# SPDX-License-Identifier: Apache-2.0
"""fusecr-guard with real daemons on real mounts: what clients have open goes on when the daemon is killed."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import daemons
import guard_box
import pytest
import sandbox as sandboxes
from guard_box import Box, Client, Daemon, Guard, Refused, wait_for

from incus_fusecr.fuse.connection import device_fds
from incus_fusecr.guard import client as guard_client
from incus_fusecr.recovery import acquaint
from incus_fusecr.recovery.config import LXCFS

pytestmark = [
    pytest.mark.requires_root,
    pytest.mark.requires_fuse,
    pytest.mark.requires_command("make", "cc", "unshare", "nsenter"),
]
TEXT = "".join(f"{i:7}\n" for i in range(40000))  # 320 kB: several READs


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guard_box.build(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def box(program: Path) -> Iterator[Box]:
    with guard_box.opened(program) as made:
        yield made


def passthrough(box: Box, program: Path, *options: str) -> tuple[Daemon, list[str]]:
    """A mounted passthrough_fh or passthrough_ll, and the command of its sidecar."""
    backing = box.directory / "backing"
    backing.mkdir()
    (backing / "text").write_text(TEXT)
    (backing / "deep/er").mkdir(parents=True)
    (backing / "deep/er/file").write_text("deep")
    (backing / "many").mkdir()
    for number in range(300):
        (backing / f"many/{number:04}").write_text("")
    own = ["-o", f"source={backing}"] if program.name == "passthrough_ll" else ["-o", f"modules=subdir,subdir={backing}"]
    command = [str(program), "-f", *own, *options]
    return box.daemon([*command, str(box.directory / "mnt")], box.directory / "mnt"), [*command, "/dev/fd/@FD@"]


def acquainted(guard: Guard, client: Client, mount: Path, *directories: str) -> list[guard_client.Node]:
    """Tell a guard what the agent tells it."""
    client.run("pass")  # it is in its namespace by then
    root = os.open(f"/proc/{client.pid}/root{mount}", os.O_RDONLY | os.O_DIRECTORY)
    try:
        nodes, _ = acquaint.job_names({"directories": directories}, [root])
    finally:
        os.close(root)
    guard_client.tell_nodes(guard.control, nodes)
    return list(nodes)


def open_everything(client: Client) -> None:
    client.run("text = open(f'{mount}/text', 'rb', buffering=0); first = text.read(8)")
    client.run("both = os.open(f'{mount}/deep/er/file', os.O_RDWR); os.chdir(f'{mount}/deep/er')")
    client.run("tail = os.open(f'{mount}/log', os.O_CREAT | os.O_WRONLY | os.O_APPEND); os.write(tail, b'before ')")
    client.run("listing = os.scandir(f'{mount}/many'); some = [next(listing).name for _ in range(5)]")
    client.run("numbers = {n: os.fstat(n).st_ino for n in (text.fileno(), both, tail)}")
    client.run("loop = Loop(lambda: len(read_file(f'{mount}/text')))")
    client.run("held = Loop(lambda: os.pread(text.fileno(), 8, 80000))")


def use_everything(client: Client) -> None:
    assert client.value("(first + text.read(1 << 20)).decode()") == TEXT[: (1 << 20) + 8]
    assert client.value("os.pread(both, 10, 0).decode()") == "deep"
    assert client.value("os.pwrite(both, b'DEEPER', 0)") == 6
    assert client.value("open('file').read(), os.listdir('.')") == ["DEEPER", ["file"]]
    assert client.value("os.write(tail, b'after'), os.fsync(tail), open(f'{mount}/log').read()") == [5, None, "before after"]
    assert sorted(client.value("some + [e.name for e in listing]")) == [f"{n:04}" for n in range(300)]
    assert client.value("[n for n, ino in numbers.items() if os.fstat(n).st_ino != ino]") == []
    client.run("os.mkdir(f'{mount}/new'); os.rename(f'{mount}/new', f'{mount}/newer'); os.rmdir(f'{mount}/newer')")
    client.run("os.symlink('text', f'{mount}/sym'); os.link(f'{mount}/text', f'{mount}/hard')")
    assert client.value("os.readlink(f'{mount}/sym'), os.stat(f'{mount}/hard').st_nlink") == ["text", 2]
    client.run("os.ftruncate(both, 2); os.utime(both, (1, 2))")
    assert client.value("os.fstat(both).st_size, os.stat('file').st_mtime") == [2, 2.0]
    client.run("[open(f'{mount}/many/{n:04}', 'w').write(str(n)) for n in range(50)]")
    assert client.value("[open(f'{mount}/many/{n:04}').read() for n in range(50)]") == [str(n) for n in range(50)]
    with pytest.raises(Refused) as refused:
        client.run("open(f'{mount}/nothing')")
    assert refused.value.errno == errno.ENOENT


def check_loops(client: Client, *names: str) -> None:
    for name in names:
        before = client.value(f"{name}.count")
        wait_for(lambda name=name, before=before: client.value(f"{name}.count") > before + 20, f"loop {name} goes on")
        result = client.value(f"{name}.stop()")
        assert result["errors"] == [] and not result["stuck"], result


def close_everything(client: Client) -> None:
    client.run("listing.close(); text.close(); os.close(both); os.close(tail); os.chdir('/')")


@pytest.mark.requires_daemon("passthrough_fh", "passthrough_ll")
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("kind", ["passthrough_fh", "passthrough_ll"])
def test_open_files_go_on(box: Box, compiled: Callable[[str], Path], kind: str, warm: bool) -> None:
    daemon, command = passthrough(box, compiled(kind))
    guard = box.guard(daemon, command, guard_client.Options(warm=warm, strict=False))
    client = box.client(daemon.mount)
    open_everything(client)
    if warm:
        guard.sidecar()
    assert guard.status()["phase"] == "standby"
    daemon.kill()
    use_everything(client)
    check_loops(client, "loop", "held")
    assert client.value("loop.values, held.values") == [f"{{{len(TEXT)}}}", repr({TEXT[80000:80008].encode()})]
    status = guard.status()
    assert (status["phase"], status["respawns"], status["poisoned"], status["malformed"]) == ("serving", "0", "0", "0")
    close_everything(client)
    wait_for(lambda: guard.number("handles") == 0, "release of all handles")
    box.run("umount", str(daemon.mount))
    assert guard.process.wait(20) == guard_client.GONE
    assert not Path(guard.control).exists()


@pytest.mark.requires_command("bindfs")
@pytest.mark.requires_daemon("passthrough_fh")
@pytest.mark.parametrize("told", [True, False])
def test_an_open_that_was_under_way(box: Box, compiled: Callable[[str], Path], told: bool) -> None:
    """It tells an inode that nothing leads to. ESTALE has the kernel look its name up anew, but only once.

    bindfs lets the kernel keep names, and does not start on a descriptor: the sidecar is another one of the same tree.
    """
    backing, mount = box.directory / "backing", box.directory / "mnt"
    (backing / "deep/er").mkdir(parents=True)
    (backing / "deep/er/file").write_text("deep")
    (backing / "many").mkdir()
    for number in range(300):
        (backing / f"many/{number:04}").touch()
    daemon = box.daemon(["bindfs", "-f", "-o", "entry_timeout=60,attr_timeout=60", str(backing), str(mount)], mount)
    command = [str(compiled("passthrough_fh")), "-f", "-o", f"modules=subdir,subdir={backing}", "/dev/fd/@FD@"]
    guard = box.guard(daemon, command)
    guard.sidecar()
    client = box.client(daemon.mount)
    client.run("open(f'{mount}/deep/er/file').close(); os.stat(f'{mount}/many/0007')")
    if told:
        nodes = acquainted(guard, client, daemon.mount, "deep/er", "nothing", "many")
        assert {"/deep/er", "/deep/er/file", "/many"} <= {path for _, _, path in nodes} and len(nodes) == acquaint.MAX_NODES
    os.kill(daemon.pid, signal.SIGSTOP)
    client.send(run="opened = os.open(f'{mount}/deep/er/file', os.O_RDONLY)")
    assert not client.has_answer(0.3)
    daemon.kill()
    client.answer()
    assert client.value("os.read(opened, 10).decode()") == "deep"
    assert (guard.number("stale") == 0) is told


@pytest.mark.requires_daemon("passthrough_fh")
def test_a_guard_is_told_no_nonsense(box: Box, compiled: Callable[[str], Path]) -> None:
    daemon, command = passthrough(box, compiled("passthrough_fh"))
    guard = box.guard(daemon, command)
    for text in ("", "2", "2 0", "2 0 name", "1 0 /", f"{1 << 32} 0 /x", "x 0 /x", "2 x /x"):
        with pytest.raises(guard_client.GuardError, match="node"):
            guard_client.ask(guard.control, f"node {text}")
    guard_client.tell_nodes(guard.control, [(number, 0, f"/f{number}") for number in range(2, 4000)])
    with pytest.raises(guard_client.GuardError, match="too many"):
        guard_client.tell_nodes(guard.control, [(number, 0, f"/f{number}") for number in range(4000, 5000)])
    guard_client.tell_nodes(guard.control, [(2, 0, "/known")])


@pytest.mark.requires_daemon("passthrough_fh")
def test_every_clone_of_the_device_is_held(box: Box, compiled: Callable[[str], Path]) -> None:
    threads = 4  # each has a clone of its own
    daemon, command = passthrough(box, compiled("passthrough_fh"), "-o", f"clone_fd,max_threads={threads}")
    guard = box.guard(daemon, command)
    guard.sidecar()
    before = guard.number("fds")
    client = box.client(daemon.mount)
    client.run(f"loops = [Loop(lambda: len(read_file(f'{{mount}}/text'))) for _ in range({threads})]")
    wait_for(lambda: len(device_fds(daemon.pid)) == threads + 1, "all threads of the daemon")
    wait_for(lambda: guard.number("fds") == threads + 1, "the guard's look at them")
    assert before < threads + 1 and guard.event("clones").values["fds"]
    daemon.kill()
    for number in range(threads):
        check_loops(client, f"loops[{number}]")


@pytest.mark.requires_daemon("passthrough_fh")
def test_no_clone_is_held_twice(box: Box, compiled: Callable[[str], Path]) -> None:
    daemon, command = passthrough(box, compiled("passthrough_fh"), "-o", "clone_fd,max_threads=2")
    client = box.client(daemon.mount)
    client.run("loops = [Loop(lambda: len(read_file(f'{mount}/text'))) for _ in range(2)]")
    wait_for(lambda: len(device_fds(daemon.pid)) == 3, "all threads of the daemon")
    guard = box.guard(daemon, command)
    guard.sidecar()
    time.sleep(2.5)  # it looks each second
    assert guard.number("fds") == 3 and len(device_fds(guard.pid)) == 3
    for number in range(2):
        check_loops(client, f"loops[{number}]")


@pytest.mark.requires_daemon("passthrough_fh")
def test_the_sidecar_may_die(box: Box, compiled: Callable[[str], Path]) -> None:
    daemon, command = passthrough(box, compiled("passthrough_fh"))
    guard = box.guard(daemon, command)
    client = box.client(daemon.mount)
    open_everything(client)
    first = guard.sidecar()
    os.kill(first, signal.SIGKILL)  # in standby
    wait_for(lambda: guard.sidecar() != first, "another sidecar")
    assert guard.status()["phase"] == "standby"
    daemon.kill()
    client.run("names = [open(f'{mount}/{n}', 'w') for n in 'abc']; [n.write('x') for n in names]")
    for _ in range(4):
        os.kill(guard.sidecar(), signal.SIGKILL)
        guard.event("sidecar-exit")
        assert client.value("os.pread(both, 4, 0).decode()") == "deep"
    client.run("[n.close() for n in names]")
    assert client.value("[open(f'{mount}/{n}').read() for n in 'abc']") == ["x", "x", "x"]
    use_everything(client)
    check_loops(client, "loop", "held")
    status = guard.status()
    assert (status["respawns"], status["poisoned"]) == ("5", "0")
    close_everything(client)


@pytest.mark.requires_daemon("passthrough_fh")
def test_another_guard_goes_on(box: Box, compiled: Callable[[str], Path]) -> None:
    """Ids and handles that the first guard gave out are as foreign to the second as the daemon's own."""
    daemon, command = passthrough(box, compiled("passthrough_fh"))
    guard = box.guard(daemon, command)
    client = box.client(daemon.mount)
    open_everything(client)
    box.keep(daemon)
    daemon.kill()
    client.run("made = os.open(f'{mount}/deep/made', os.O_CREAT | os.O_RDWR); os.write(made, b'by the first')")
    client.run("numbers[made] = os.fstat(made).st_ino")
    guard.process.kill()
    guard.process.wait(20)
    second = box.guard(daemon, command)
    assert second.status()["phase"] == "serving"
    assert client.value("os.pread(made, 20, 0).decode()") == "by the first"
    use_everything(client)
    check_loops(client, "loop", "held")
    close_everything(client)


@pytest.mark.requires_daemon("passthrough_fh")
def test_forgotten_nodes_are_forgotten(box: Box, compiled: Callable[[str], Path]) -> None:
    """libfuse ends when it is told to forget more than it gave."""
    daemon, command = passthrough(box, compiled("passthrough_fh"))
    guard = box.guard(daemon, command)
    client = box.client(daemon.mount)
    client.run("old = [os.open(f'{mount}/many/{n:04}', os.O_RDONLY) for n in range(100)]")
    guard.sidecar()
    daemon.kill()
    client.run("read = [os.read(n, 1) for n in old]; [os.close(n) for n in old]")
    for turn in range(3):
        client.run(f"[open(f'{{mount}}/storm-{{n}}', 'w').close() for n in range(1000)]; seen = len(os.listdir(mount)) # {turn}")
        assert client.value("seen") >= 1000
        client.run("[os.unlink(f'{mount}/storm-{n}') for n in range(1000)]")
    client.run("[os.unlink(f'{mount}/many/{n:04}') for n in range(300)]; os.rmdir(f'{mount}/many')")
    wait_for(lambda: guard.number("nodes") < 20, "few nodes again")
    status = guard.status()
    assert (status["respawns"], status["handles"], status["ready"]) == ("0", "0", "1")
    assert guard_box.memory_kb(guard.pid, "VmRSS") < 6000


@pytest.mark.requires_daemon("passthrough_fh")
def test_a_detached_mount_is_known_by_what_was_told(box: Box, compiled: Callable[[str], Path]) -> None:
    daemon, command = passthrough(box, compiled("passthrough_fh"))
    bind = box.directory / "bind"
    bind.mkdir()
    box.run("mount", "--bind", str(daemon.mount / "deep"), str(bind))
    guard = box.guard(daemon, command, guard_client.Options(warm=False, strict=False))
    client = box.client(bind)
    client.run("file = os.open(f'{mount}/er/file', os.O_RDONLY); os.chdir(f'{mount}/er')")
    lines = Path(f"/proc/{box.init}/mountinfo").read_text().splitlines()
    fields = next(line.split() for line in lines if line.split()[4] == str(bind))
    guard_client.tell_roots(guard.control, {int(fields[0]): fields[3]})
    box.run("umount", "-l", str(bind))
    daemon.kill()
    assert client.value("os.pread(file, 10, 0).decode(), os.listdir('.')") == ["deep", ["file"]]
    assert guard.number("stale") == 0


@pytest.mark.requires_daemon("passthrough_fh")
def test_an_idle_guard_costs_nothing(box: Box, compiled: Callable[[str], Path]) -> None:
    daemon, command = passthrough(box, compiled("passthrough_fh"))
    guard = box.guard(daemon, command, guard_client.Options(warm=False))
    client = box.client(daemon.mount)
    client.run("loop = Loop(lambda: len(read_file(f'{mount}/text')))")
    before, done = guard_box.wakeups(guard.pid), client.value("loop.count")
    started = time.monotonic()
    wait_for(lambda: client.value("loop.count") > done + 100 and time.monotonic() > started + 3, "a hundred more reads")
    seconds = time.monotonic() - started
    assert guard_box.wakeups(guard.pid) - before <= seconds + 2
    assert guard_box.memory_kb(guard.pid, "VmRSS") < 1000
    assert guard_box.memory_kb(guard.pid, "RssAnon") < 200
    assert guard.status()["sidecar"] == "0"
    check_loops(client, "loop")


@pytest.mark.requires_daemon("passthrough_fh")
def test_control_socket(box: Box, compiled: Callable[[str], Path]) -> None:
    daemon, command = passthrough(box, compiled("passthrough_fh"))
    guard = box.guard(daemon, command)
    assert os.stat(guard.control).st_mode & 0o777 == 0o600
    os.chmod(guard.control, 0o666)
    child = os.fork()
    if child == 0:
        os.setuid(1234)
        try:
            guard_client.status(guard.control)
        except OSError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(guard_client.GuardError, match="unknown"):
        guard_client.ask(guard.control, "nonsense")
    with pytest.raises(guard_client.GuardError, match="MNT_ID"):
        guard_client.ask(guard.control, "roots 12 no-slash")
    followers = [guard_client.Follower(guard.control) for _ in range(7)]  # and guard.follower
    with pytest.raises(OSError):
        guard_client.status(guard.control)
    for follower in followers:
        follower.close()
    sidecar = guard.sidecar()
    guard_client.stop(guard.control)
    assert guard.process.wait(20) == guard_client.STOPPED
    assert not sandboxes.alive(sidecar) and not Path(guard.control).exists()
    client = box.client(daemon.mount)
    assert client.value("len(read_file(f'{mount}/text'))") == len(TEXT)

    guard = box.guard(daemon, command)
    daemon.kill()
    guard.event("serving")
    with pytest.raises(guard_client.GuardError, match="serves"):
        guard_client.stop(guard.control)
    os.kill(guard.pid, signal.SIGTERM)
    guard.event("signal-ignored")
    assert client.value("len(read_file(f'{mount}/text'))") == len(TEXT)


@pytest.mark.requires_daemon("passthrough_fh")
def test_the_end_of_the_connection_ends_the_guard(box: Box, compiled: Callable[[str], Path]) -> None:
    daemon, command = passthrough(box, compiled("passthrough_fh"))
    guard = box.guard(daemon, command)
    sidecar = guard.sidecar()
    box.run("umount", str(daemon.mount))
    assert guard.process.wait(20) == guard_client.GONE
    assert not sandboxes.alive(sidecar) and not Path(guard.control).exists()


# -- lxcfs and sshfs


@pytest.mark.skipif(not guard_box.has_lxcfs(), reason="needs a tree with lxcfs (lab up makes one, or FUSECR_TEST_ROOT)")
def test_lxcfs(program: Path) -> None:
    with guard_box.opened(program, own_pids=True) as box:
        lxcfs_goes_on(box)


def lxcfs_goes_on(box: Box) -> None:
    tree = box.enter_tree()
    daemon = box.daemon(guard_box.lxcfs(tree, "first", "/var/lib/lxcfs"), tree / "var/lib/lxcfs")
    command = guard_box.lxcfs(tree, "sidecar", "/dev/fd/@FD@")
    bind = box.directory / "meminfo"
    bind.touch()
    box.run("mount", "--bind", str(daemon.mount / "proc/meminfo"), str(bind))
    guard = box.guard(daemon, command)
    guard.sidecar()
    wait_for(lambda: guard.number("nodes") >= 3, "the roots of the mounts")
    clients = [box.client(daemon.mount) for _ in range(2)]
    acquainted(guard, clients[0], daemon.mount, *LXCFS.preload)
    for client in clients:
        client.run("files = sorted(os.listdir(f'{mount}/proc'))")
        client.run("opened = {f: open(f'{mount}/proc/{f}', 'rb', buffering=0) for f in files}")
        client.run(f"bind = open('{bind}', 'rb', buffering=0); total = bind.read().split(b'\\n')[0]")
        client.run("half = os.open(f'{mount}/proc/meminfo', os.O_RDONLY); start = os.read(half, 10)")
        client.run("os.chdir(f'{mount}/proc'); listing = os.scandir(mount); some = [next(listing).name]")
        client.run("loops = [Loop(lambda f=f: bool(read_file(f'{mount}/proc/{f}')) or f) for f in ('meminfo', 'uptime', 'stat')]")
        client.run(f"loops.append(Loop(lambda: read_file('{bind}').split('\\n')[0]))")
        client.run("loops.append(Loop(lambda: os.pread(bind.fileno(), 30, 0)))")
    for client in clients:  # what recovery/warmup.py does: lxcfs forks for the first that asks
        wait_for(lambda c=client: min(c.value("[loop.count for loop in loops]")) > 100, "a daemon that is warm")
    daemon.kill()
    for client in clients:
        assert client.value("total.decode()").startswith("MemTotal")
        assert client.value("(start + os.read(half, 20)).decode()").startswith(client.value("total.decode()")[:25])
        assert client.value("[f for f, o in opened.items() if not o.read(10) and f not in ('swaps',)]") == []
        assert client.value("sorted(os.listdir('.')) == files and len(some + [e.name for e in listing])") >= 2
        for number in range(5):
            check_loops(client, f"loops[{number}]")
        assert client.value("loops[3].values == {total.decode()}")
    status = guard.status()
    assert (status["respawns"], status["stale"], status["malformed"]) == ("0", "0", "0")
    # the next sidecar
    os.kill(guard.sidecar(), signal.SIGKILL)
    for client in clients:
        assert client.value("bind.seek(0) or bind.read().split(b'\\n')[0] == total")
        assert client.value("[f for f, o in opened.items() if o.seek(0) and not o.read(10)]") == []
    wait_for(lambda: guard.number("respawns") >= 1, "the next sidecar")


@pytest.mark.requires_daemon("sshfs_pipe")
def test_sshfs(box: Box) -> None:
    backing, state, mount = (box.directory / name for name in ("backing", "state", "mnt"))
    for directory in (backing, state):
        directory.mkdir()
    (backing / "text").write_text(TEXT)
    (backing / "gone").write_text("unlinked while it is open")
    for number in range(200):
        (backing / f"n{number:03}").touch()

    def command(where: str) -> list[str]:
        return daemons.sshfs_pipe(backing, Path(where), state, [], lambda *_: 0)

    daemon = box.daemon(command(str(mount)), mount)
    guard = box.guard(daemon, command("/dev/fd/@FD@"))
    client = box.client(mount)
    client.run("text = open(f'{mount}/text', 'rb', buffering=0); first = text.read(8)")
    client.run("gone = os.open(f'{mount}/gone', os.O_RDWR); os.unlink(f'{mount}/gone')")
    client.run("tail = os.open(f'{mount}/log', os.O_CREAT | os.O_WRONLY | os.O_APPEND); os.write(tail, b'before '); os.fsync(tail)")
    client.run("listing = os.scandir(mount); some = [next(listing).name for _ in range(5)]")
    guard.sidecar()
    daemon.kill()
    assert client.value("(first + text.read(1 << 20)).decode()") == TEXT
    assert client.value("os.pread(gone, 50, 0).decode()") == "unlinked while it is open"
    assert client.value("os.write(tail, b'after'), os.fsync(tail), open(f'{mount}/log').read()") == [5, None, "before after"]
    names = client.value("some + [e.name for e in listing]")
    assert {f"n{number:03}" for number in range(200)} <= set(names) and len(set(names)) == len(names)
    os.kill(guard.sidecar(), signal.SIGKILL)
    assert client.value("os.pwrite(gone, b'still', 0), os.pread(gone, 50, 0).decode()") == [5, "stillked while it is open"]
    client.run("os.close(gone); os.close(tail); text.close(); listing.close()")
    wait_for(lambda: not list(backing.glob(".fuse_hidden*")), "removal of the hidden file")
    assert guard.number("stale") == 0

