# SPDX-License-Identifier: Apache-2.0
"""fusecr-guard where things go wrong: requests in flight, requests that kill, daemons that lie or do not start."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import guard_box
import pytest
from guard_box import Box, Client, Daemon, Guard, Refused, wait_for

from incus_fusecr.guard import client as guard_client
from incus_fusecr.guard.client import Options

pytestmark = [
    pytest.mark.requires_root,
    pytest.mark.requires_fuse,
    pytest.mark.requires_command("make", "cc", "unshare", "nsenter"),
]
FAKE = Path(__file__).parent / "fake_fuse.py"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guard_box.build(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def box(program: Path) -> Iterator[Box]:
    with guard_box.opened(program) as made:
        yield made


class Fake:
    """A fake_fuse.py on a mount, with its guard."""

    def __init__(
        self, box: Box, *, first: tuple[str, ...] = (), second: tuple[str, ...] = (), options: Options | None = None
    ) -> None:
        self.box = box
        self.backing = box.directory / "backing"
        self.backing.mkdir()
        self.log_path = Path(f"{self.backing}.log")
        for name in ("a", "b", "c"):
            (self.backing / name).write_text(f"text of {name}")
        mount = box.directory / "mnt"
        self.daemon: Daemon = box.daemon(self.command("--mount", str(mount), "--base", "100", *first), mount)
        self.sidecar = self.command("--fd", "@FD@", "--base", "5000", *second)
        self.guard: Guard = box.guard(self.daemon, self.sidecar, options)
        self.client: Client = box.client(self.daemon.mount)

    def command(self, *words: str) -> list[str]:
        environment = ["env", f"PYTHONPATH={ROOT}", "PYTHONDONTWRITEBYTECODE=1"]
        return [*environment, sys.executable, str(FAKE), str(self.backing), *words]

    def log(self) -> list[str]:
        return self.log_path.read_text().splitlines() if self.log_path.exists() else []

    def start(self, client: Client, expression: str, opcode: str) -> None:
        """Have the client begin what the first daemon does not answer."""
        before = len(self.log())
        client.send(value=expression)
        wait_for(lambda: any(line.startswith(opcode) for line in self.log()[before:]), f"{opcode} at the daemon")


def errno_of(client: Client) -> int:
    """What the operation under way ends with; 0: success."""
    try:
        client.answer()
    except Refused as refused:
        return int(refused.errno or 0)
    return 0


# (what the client does, the opcode, done by the first daemon or not) -> all end well, and once
DONE_TWICE = [
    ("os.mkdir(f'{mount}/new')", "MKDIR:new", lambda b: (b / "new").is_dir()),
    ("os.symlink('there', f'{mount}/new')", "SYMLINK:new", lambda b: os.readlink(b / "new") == "there"),
    ("os.link(f'{mount}/a', f'{mount}/new')", "LINK:new", lambda b: (b / "new").samefile(b / "a")),
    ("os.unlink(f'{mount}/b')", "UNLINK:b", lambda b: not (b / "b").exists()),
    ("os.rmdir(f'{mount}/dir')", "RMDIR:dir", lambda b: not (b / "dir").exists()),
    ("os.rename(f'{mount}/b', f'{mount}/new')", "RENAME:b", lambda b: (b / "new").read_text() == "text of b"),
    ("os.open(f'{mount}/new', os.O_CREAT | os.O_EXCL | os.O_RDWR)", "CREATE:new", lambda b: (b / "new").read_text() == ""),
    ("os.write(os.open(f'{mount}/c', os.O_WRONLY | os.O_APPEND), b'!')", "WRITE:c", lambda b: (b / "c").read_text()[8:] == "c!"),
]  # fmt: skip


@pytest.mark.parametrize("action", ["swallow", "ignore"], ids=["done", "not-done"])
@pytest.mark.parametrize(("expression", "rule", "holds"), DONE_TWICE, ids=[e[1].split(":")[0] for e in DONE_TWICE])
def test_in_flight(box: Box, expression: str, rule: str, holds: object, action: str) -> None:
    """Whether the dead daemon had carried it out or not: it is, once, and the client is told so."""
    fake = Fake(box, first=(f"{rule}:{action}",))
    (fake.backing / "dir").mkdir()
    # An id that nobody has open leads nowhere: it is ESTALE, and the VFS looks the path up again.
    fake.client.run("a = os.open(f'{mount}/a', os.O_RDONLY)")
    fake.start(fake.client, expression, rule.split(":")[0])
    fake.daemon.kill()
    assert errno_of(fake.client) == 0
    assert callable(holds) and holds(fake.backing)
    assert fake.guard.status()["respawns"] == "0"
    assert fake.client.value("read_file(f'{mount}/a')") == "text of a"


@pytest.mark.parametrize("order", ["old, new", "new, old"])
def test_an_inode_with_two_names(box: Box, order: str) -> None:
    """What was open before a first take-over shows as deleted afterwards, and what was opened since, the same file, does not.

    The next guard finds both, one after the other, and hears of the second while the sidecar is being asked for the first.
    """
    fake = Fake(box)
    box.keep(fake.daemon)
    fake.client.run("numbers = [os.dup(0) for _ in range(900)]; old = os.open(f'{mount}/a', os.O_RDONLY)")
    fake.daemon.kill()
    fake.guard.event("serving")
    assert fake.client.value("os.pread(old, 20, 0).decode()") == "text of a"
    fake.client.run("new = os.open(f'{mount}/a', os.O_RDONLY)")
    assert fake.client.value("[os.readlink(f'/proc/self/fd/{n}').endswith('(deleted)') for n in (old, new)]") == [True, False]
    assert fake.client.value("os.fstat(old).st_ino == os.fstat(new).st_ino")
    # far from each other: to look at all between them takes longer than to send the sidecar a question
    fake.client.run(f"one, other = {order}; os.dup2(one, numbers[0]); os.dup2(other, numbers[-1]); os.close(old); os.close(new)")
    fake.guard.process.kill()
    fake.guard.process.wait(20)
    late = ("OPENDIR:backing:late", "READDIR:backing:late", "LOOKUP:a:late")
    second = box.guard(fake.daemon, fake.command("--fd", "@FD@", "--base", "9000", *late))
    second.event("sidecar-ready")
    assert fake.client.value("os.pread(numbers[0], 20, 0).decode()") == "text of a"
    assert second.number("stale") == 0


def test_what_was_there_before_is_still_an_error(box: Box) -> None:
    fake = Fake(box, first=("CREATE:new:ignore",))
    fake.start(fake.client, "os.open(f'{mount}/new', os.O_CREAT | os.O_EXCL | os.O_RDWR)", "CREATE")
    (fake.backing / "new").write_text("of another host")
    fake.daemon.kill()
    assert errno_of(fake.client) == errno.EEXIST


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "none"])
def test_fsync_says_what_may_be_lost(box: Box, strict: bool) -> None:
    fake = Fake(box, first=("FSYNC:a:ignore",), options=Options(strict=strict))
    other = box.client(fake.daemon.mount)
    reader = box.client(fake.daemon.mount)
    fake.client.run("a = os.open(f'{mount}/a', os.O_RDWR); os.write(a, b'T')")
    other.run("b = os.open(f'{mount}/b', os.O_RDWR); os.write(b, b'T')")
    reader.run("c = os.open(f'{mount}/c', os.O_RDONLY)")
    fake.start(fake.client, "os.fsync(a)", "FSYNC")
    fake.daemon.kill()
    assert errno_of(fake.client) == (errno.EIO if strict else 0)
    other.send(value="os.fsync(b)")  # it was not in flight, but what was written before may be lost all the same
    assert errno_of(other) == (errno.EIO if strict else 0)
    assert other.value("os.fsync(b)") is None
    assert reader.value("os.fsync(c), os.close(c)") == [None, None]
    assert other.value("os.pread(b, 20, 0).decode(), os.close(b)") == ["Text of b", None]
    assert fake.guard.status()["respawns"] == "0"


def test_a_request_that_kills_every_daemon(box: Box) -> None:
    rules = ("READ:b:die", "READ:slow:ignore")
    fake = Fake(box, second=rules)
    (fake.backing / "slow").write_text("at every daemon when it dies")
    slow = box.client(fake.daemon.mount)
    others = [box.client(fake.daemon.mount) for _ in range(3)]
    for other in others:
        other.run("held = os.open(f'{mount}/a', os.O_RDONLY)")
        other.run("loops = [Loop(lambda: read_file(f'{mount}/c')), Loop(lambda: os.pread(held, 20, 0))]")
    fake.daemon.kill()
    fake.start(slow, "read_file(f'{mount}/slow')", "READ ignore")
    fake.client.send(value="read_file(f'{mount}/b')")
    assert errno_of(fake.client) == errno.EIO
    event = fake.guard.event("poison")
    assert (event.values["opcode"], event.values["pid"], event.values["attempts"]) == ("READ", str(fake.client.pid), "3")
    for other in others:
        for number in range(2):
            before = other.value(f"loops[{number}].count")
            wait_for(lambda n=number, o=other, b=before: o.value(f"loops[{n}].count") > b + 10, "others go on")
            assert other.value(f"loops[{number}].stop()['errors']") == []
    status = fake.guard.status()
    assert (status["poisoned"], status["respawns"]) == ("1", "3")  # though the kernel has tried its READ twice
    deaths = [line.split()[2] for line in fake.log() if line.startswith("READ die")]
    assert len(deaths) == len(set(deaths)) == 3
    assert fake.client.value("read_file(f'{mount}/a')") == "text of a"
    assert not slow.has_answer(0)


@pytest.mark.parametrize("action", ["short", "long", "giant", "tiny", "error", "noise"])
def test_a_daemon_that_lies(box: Box, action: str) -> None:
    fake = Fake(box, second=(f"READ:b:{action}",))
    fake.client.run("held = os.open(f'{mount}/a', os.O_RDONLY)")
    fake.daemon.kill()
    fake.client.send(value="read_file(f'{mount}/b')")
    assert errno_of(fake.client) == (0 if action == "noise" else errno.EIO)
    assert fake.client.value("os.pread(held, 20, 0).decode(), read_file(f'{mount}/c')") == ["text of a", "text of c"]
    status = fake.guard.status()
    if action in ("short", "giant"):
        assert int(status["malformed"]) >= 1
    if action == "noise":
        assert int(status["dropped_notifications"]) > 0
    assert status["phase"] == "serving"
    assert guard_box.memory_kb(fake.guard.pid, "VmRSS") < 6000


@pytest.mark.parametrize("opcode", ["LOOKUP", "OPEN", "GETATTR", "CREATE", "READDIR"])
def test_a_daemon_that_lies_about_ids(box: Box, opcode: str) -> None:
    fake = Fake(box, second=(f"{opcode}:*:short",))
    fake.client.run("held = os.open(f'{mount}/a', os.O_RDONLY)")
    fake.daemon.kill()
    for expression in ("read_file(f'{mount}/b')", "os.listdir(mount)", "open(f'{mount}/new', 'w')", "os.stat(f'{mount}/c')"):
        fake.client.send(value=expression)
        errno_of(fake.client)
    assert int(fake.guard.status()["malformed"]) >= 1
    assert fake.guard.number("pending") == 0
    if opcode not in ("LOOKUP", "OPEN", "GETATTR"):  # without them there is no reading
        assert fake.client.value("os.pread(held, 20, 0).decode()") == "text of a"


def test_deadline(box: Box) -> None:
    """No sidecar at all: after the deadline nobody waits in vain, and when there is one everything works again."""
    fake = Fake(box, options=Options(deadline=1, warm=False))
    fake.client.run("held = os.open(f'{mount}/a', os.O_RDONLY); os.pread(held, 1, 0)")
    switch = box.directory / "broken"
    switch.touch()
    fake.guard.process.kill()
    box.keep(fake.daemon)
    command = ["sh", "-c", f'test -e {switch} && exit 1; exec "$@"', "-", *fake.sidecar]
    guard = box.guard(fake.daemon, command, Options(deadline=1, warm=False))
    fake.daemon.kill()
    fake.client.send(value="os.stat(f'{mount}/b')")
    assert errno_of(fake.client) == errno.ENOTCONN
    assert guard.event("deadline").values["seconds"] == "1"
    assert guard.status()["phase"] == "failing"
    fake.client.send(value="os.stat(f'{mount}/c')")
    assert errno_of(fake.client) == errno.ENOTCONN
    switch.unlink()
    guard.event("sidecar-ready")
    assert fake.client.value("os.pread(held, 20, 0).decode(), read_file(f'{mount}/c')") == ["text of a", "text of c"]


def test_a_request_that_silences_every_sidecar(box: Box) -> None:
    """They live and answer nothing: each is replaced, and the request is refused in the end. The others only wait."""
    fake = Fake(box, second=("READ:b:hang",), options=Options(deadline=12, strict=False))
    others = [box.client(fake.daemon.mount) for _ in range(2)]
    for other in others:
        other.run("held = os.open(f'{mount}/a', os.O_RDONLY)")
        other.run("loops = [Loop(lambda: read_file(f'{mount}/c')), Loop(lambda: os.pread(held, 20, 0))]")
    fake.guard.sidecar()
    fake.daemon.kill()
    fake.client.send(value="read_file(f'{mount}/b')")
    event = fake.guard.event("poison", 60)
    assert (event.values["opcode"], event.values["pid"], event.values["attempts"]) == ("READ", str(fake.client.pid), "3")
    assert errno_of(fake.client) == errno.EIO
    for other in others:
        for number in range(2):
            before = other.value(f"loops[{number}].count")
            wait_for(lambda n=number, o=other, b=before: o.value(f"loops[{n}].count") > b + 10, "others go on")
            assert other.value(f"loops[{number}].stop()['errors']") == []
    status = fake.guard.status()
    assert (status["poisoned"], status["respawns"], status["expired"]) == ("1", "3", "0")
    assert fake.client.value("read_file(f'{mount}/a')") == "text of a"


def test_a_request_that_takes_long_is_no_silence(box: Box) -> None:
    """A lock may be waited for, for hours; a daemon that answers something else lives."""
    fake = Fake(box, second=("READ:b:ignore",), options=Options(deadline=4, attempts=1))
    fake.guard.sidecar()
    fake.daemon.kill()
    fake.start(fake.client, "read_file(f'{mount}/b')", "READ ignore")
    assert not fake.client.has_answer(10)  # more than twice as long as a sidecar may be silent
    status = fake.guard.status()
    assert (status["respawns"], status["pending"], status["phase"]) == ("0", "1", "serving")


def test_sidecars_that_are_all_silent(box: Box) -> None:
    """Nobody waits beyond the deadline, as without a sidecar; and when there is a good one everything works again."""
    fake = Fake(box)
    fake.client.run("held = os.open(f'{mount}/a', os.O_RDONLY); os.pread(held, 1, 0)")
    box.keep(fake.daemon)
    fake.guard.process.kill()
    fake.guard.process.wait(20)
    switch = box.directory / "hang"
    switch.touch()
    rules = " ".join(f"{opcode}:*:hang" for opcode in ("LOOKUP", "GETATTR", "READ", "OPEN", "STATFS"))
    command = ["sh", "-c", f'test -e {switch} && exec "$@" {rules}; exec "$@"', "-", *fake.sidecar]
    guard = box.guard(fake.daemon, command, Options(deadline=2))
    clients = [fake.client, *(box.client(fake.daemon.mount) for _ in range(3))]
    fake.daemon.kill()
    for number, client in enumerate(clients):
        client.send(value=f"os.stat(f'{{mount}}/{'abcd'[number]}').st_size")
    errors = {errno_of(client) for client in clients}
    assert errno.ENOTCONN in errors and errors <= {errno.ENOTCONN, errno.EIO}  # EIO: the one that was tried so often
    guard.event("deadline")
    assert guard.status()["phase"] == "failing"
    clients[1].send(value="os.stat(f'{mount}/c')")
    assert errno_of(clients[1]) == errno.ENOTCONN
    switch.unlink()
    guard.event("served")
    assert fake.client.value("os.pread(held, 20, 0).decode(), read_file(f'{mount}/c')") == ["text of a", "text of c"]
    assert guard.status()["phase"] == "serving"


def test_unserved_fail(box: Box) -> None:
    fake = Fake(box)
    fake.guard.process.kill()
    guard = box.guard(fake.daemon, ["false"], Options(fail_unserved=True, warm=False))
    fake.daemon.kill()
    guard.event("sidecar-exit")
    fake.client.send(value="os.stat(f'{mount}/b')")
    assert errno_of(fake.client) == errno.EIO


def test_unserved_wait(box: Box) -> None:
    """Who waits can be killed: a signal ends it."""
    fake = Fake(box)
    fake.guard.process.kill()
    switch = box.directory / "broken"
    switch.touch()
    command = ["sh", "-c", f'test -e {switch} && exit 1; exec "$@"', "-", *fake.sidecar]
    guard = box.guard(fake.daemon, command, Options(warm=False))
    fake.daemon.kill()
    other = box.client(fake.daemon.mount)
    for client in (fake.client, other):
        client.send(value="os.stat(f'{mount}/b').st_size")
    wait_for(lambda: guard.number("pending") == 2, "both requests")
    assert not fake.client.has_answer(0.3)
    other.process.send_signal(signal.SIGKILL)
    assert other.process.wait(20) == -signal.SIGKILL
    wait_for(lambda: guard.number("pending") == 1, "the end of one of them")
    switch.unlink()
    assert fake.client.answer() == 9


def test_a_slow_start_is_waited_for(box: Box) -> None:
    fake = Fake(box, second=("--ready-after", "1"), options=Options(warm=False))
    fake.client.run("loop = Loop(lambda: read_file(f'{mount}/a'))")
    fake.daemon.kill()
    fake.guard.event("served")
    before = fake.client.value("loop.count")
    wait_for(lambda: fake.client.value("loop.count") > before + 5, "the loop goes on")
    assert fake.client.value("loop.stop()['errors']") == []


WORK = """
def work():
    with open(own, 'w') as file:
        file.write('abc')
    text = read_file(own)
    os.unlink(own)
    return text
"""


def test_the_sidecar_dies_again_and_again(box: Box) -> None:
    """Killed from outside at any moment: nobody is accused, nothing is lost."""
    fake = Fake(box)
    clients = [box.client(fake.daemon.mount) for _ in range(3)]
    for number, client in enumerate(clients):
        client.run(f"own = f'{{mount}}/own-{number}'; held = os.open(f'{{mount}}/a', os.O_RDONLY)")
        client.run(WORK)
        client.run("loops = [Loop(work), Loop(lambda: os.pread(held, 20, 0).decode())]")
    fake.daemon.kill()
    for _ in range(8):
        counts = [client.value("loops[0].count") for client in clients]
        wait_for(lambda c=counts: all(x.value("loops[0].count") > n for x, n in zip(clients, c, strict=True)), "work")
        os.kill(fake.guard.sidecar(), signal.SIGKILL)
        fake.guard.event("sidecar-exit")
    for client in clients:
        for number, value in enumerate(("abc", "text of a")):
            result = client.value(f"loops[{number}].stop()")
            assert (result["errors"], result["values"], result["stuck"]) == ([], [value], False)
    status = fake.guard.status()
    assert (status["poisoned"], status["respawns"]) == ("0", "8")


def test_a_follower_that_does_not_read_is_dropped(box: Box) -> None:
    fake = Fake(box, second=("READ:b:short",))
    fake.daemon.kill()
    for _ in range(400):
        os.kill(fake.guard.pid, signal.SIGHUP)  # each is an event
        fake.guard.status()
    assert fake.client.value("read_file(f'{mount}/a')") == "text of a"
    with pytest.raises(OSError, match="hung up"):
        while fake.guard.follower.next(5) is not None:
            pass


def test_poll(box: Box) -> None:
    fake = Fake(box)
    fake.client.run("import select; poll = select.poll(); a = os.open(f'{mount}/a', os.O_RDONLY); poll.register(a, 1 | 4)")
    assert fake.client.value("poll.poll(5000) == [(a, 1)]")
    fake.daemon.kill()
    assert fake.client.value("poll.poll(5000) == [(a, 1)]")  # bound to a handle that the dead daemon gave
    fake.guard.event("serving")
    os.kill(fake.guard.sidecar(), signal.SIGKILL)
    assert fake.client.value("poll.poll(5000) == [(a, 1)]")
    assert fake.guard.status()["respawns"] == "1"


SLEEPER = {
    "poll": "waiting = select.poll(); waiting.register(empty, select.POLLIN); events = lambda: waiting.poll()",
    "epoll": "waiting = select.epoll(); waiting.register(empty, select.EPOLLIN); events = lambda: waiting.poll()",
    "select": "events = lambda: [(n, 1) for n in select.select([empty], [], [])[0]]",
}


@pytest.mark.parametrize("late", [False, True], ids=["at-the-death", "later"])
@pytest.mark.parametrize("how", SLEEPER)
def test_who_sleeps_in_poll_is_woken(box: Box, how: str, late: bool) -> None:
    """The daemon that died had to wake him: by a number that nobody else knew."""
    fake = Fake(box)
    (fake.backing / "empty").touch()
    fake.client.run("import select; empty = os.open(f'{mount}/empty', os.O_RDWR)")
    fake.client.run(SLEEPER[how])
    fake.client.send(value="events() == [(empty, 1)]")
    wait_for(lambda: asleep(fake.client.pid), "sleep")
    assert not fake.client.has_answer(0.2)
    if not late:
        (fake.backing / "empty").write_text("what would have woken him")  # nobody is told of it
    fake.daemon.kill()
    fake.guard.event("serving")
    if late:
        assert not fake.client.has_answer(0.5)
        other = box.client(fake.daemon.mount)
        other.run("file = os.open(f'{mount}/empty', os.O_WRONLY); os.write(file, b'now'); os.close(file)")
    assert fake.client.answer() is True
    status = fake.guard.status()
    assert (status["respawns"], status["stale"], status["dropped_notifications"]) == ("0", "0", "0")


def asleep(pid: int) -> bool:
    """In poll(2) or its like, by what the kernel calls the place where it sleeps."""
    place = Path(f"/proc/{pid}/wchan").read_text()
    return "poll" in place or "select" in place


def test_a_sidecar_in_standby_is_asked_in_the_name_of_others(box: Box) -> None:
    """As it will be asked after a death: a file is opened, read and closed for each of them."""
    fake = Fake(box, second=("OPEN:a:noted", "READ:a:noted", "RELEASE:a:noted"))
    fake.guard.sidecar()

    def warm() -> list[str]:
        guard_client.warm(fake.guard.control, 777, [11, 22])
        return fake.log()

    with pytest.raises(guard_client.GuardError, match="not told of this node"):
        guard_client.warm(fake.guard.control, 777, [11])
    guard_client.tell_nodes(fake.guard.control, [(777, 0, "/a")])
    wait_for(warm, "somebody asks")  # the first one has it look for the file
    wait_for(lambda: sum(line.startswith("RELEASE") for line in fake.log()) >= 2, "all is closed again")
    asked = [line.split() for line in fake.log()]
    for opcode in ("OPEN", "READ"):
        assert {words[3] for words in asked if words[0] == opcode} == {"11", "22"}
    assert fake.guard.number("handles") == 0 and fake.guard.status()["phase"] == "standby"
    fake.daemon.kill()
    assert fake.client.value("open(f'{mount}/a').read()") == "text of a"
    with pytest.raises(guard_client.GuardError, match="standby"):
        guard_client.warm(fake.guard.control, 777, [11])
