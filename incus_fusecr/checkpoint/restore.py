# SPDX-License-Identifier: Apache-2.0
"""One restore: mount inside the new namespaces, answer for daemons that do not run yet, verify, hand over."""

from __future__ import annotations

import logging
import os
import signal
import stat
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from ..errors import FusecrError
from ..fuse.connection import CONNECTION_KEY
from ..linux import ns, proc
from ..linux.fd import Fd
from ..linux.mount import FLAG_OF_OPTION, MS_RDONLY
from ..linux.pidfd import pidfd_getfd, pidfd_open, send_signal
from ..linux.zygote import JobError, Zygote
from . import directories, inits, jobs, manifest, record, scan
from .answers import Answers
from .cgroup import Cgroup
from .journal import RUN, Journal
from .manifest import Connection, Manifest
from .standin import StandIn, leave

log = logging.getLogger(__name__)

KIND = "restore"
STAGE = f"{RUN}/stage"
ACTION_HELPER = "/usr/libexec/incus-fusecr/fusecr-action"
MOUNT_SECONDS = 8.0
INIT_SECONDS = 5.0
SETTLE_SECONDS = 5.0
TIMENS_IMAGE = "timens-0.img"


class RestoreError(FusecrError):
    """The restore has to be given up."""


@dataclass
class Restore:
    """A restore that CRIU (process ``criu``) is doing. Ends with :meth:`hand_over` or :meth:`drop`.

    :ivar external: further external mounts: key -> path on this host
    :ivar initfd: pidfd of ``init``, from its verification on
    :ivar wanted_name: liblxc's name that the container has to have; empty for any
    """

    zygote: Zygote
    journal: Journal
    manifest: Manifest
    criu: int
    name: str = ""
    init: int = 0
    placeholders: dict[int, StandIn] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    verified: bool = False
    done: bool = False
    external: dict[str, str] = field(default_factory=dict)
    wanted_name: str = ""
    undo: ExitStack = field(default_factory=ExitStack)
    initfd: Fd | None = None

    @property
    def stage(self) -> str:
        return f"{STAGE}/{self.criu}"

    def _staging(self, connection: Connection) -> str:
        return f"{self.stage}/{connection.key}"

    def prepare(self) -> str:
        """Staging directories; the plugin's orders."""
        for directory in (RUN, STAGE, self.stage):
            os.makedirs(directory, exist_ok=True)
            # The container's root must get through them, not list them.
            os.chmod(directory, 0o711)
        self.undo.callback(_rmdir, self.stage)
        lines = ["ok"]
        for connection in self.manifest.connections:
            staging = self._staging(connection)
            os.makedirs(staging, mode=0o755, exist_ok=True)
            self.undo.callback(_rmdir, staging)
            lines.append(f"ext mnt[{connection.key}]:{staging}")
        lines += [f"ext mnt[{key}]:{path}" for key, path in self.external.items()]
        lines.append(f"script {ACTION_HELPER}")
        return "\n".join(lines)

    def setup_namespaces(self, init: int) -> None:
        """Mount each connection at its staging place inside the new mount namespace, and answer for it.

        :param init: the new container's first process; its user namespace is mapped, its root not yet changed
        :raises RestoreError: a mount could not be made
        """
        self.init = init
        for connection in self.manifest.connections:
            device = self._mount(connection)
            placeholder = StandIn(device, Answers(connection, bytes.fromhex(connection.init_reply)))
            self.placeholders[connection.number] = placeholder
            placeholder.start()
        for connection in self.manifest.connections:
            if not self.placeholders[connection.number].ready.wait(INIT_SECONDS):
                raise RestoreError(f"FUSE mount {proc.printable(connection.mountpoint)}", "the kernel sent no INIT")

    def create_cgroups(self, init: int) -> None:
        """All cgroups, empty ones too, once the first task is in its own (not yet so at ``setup-namespaces``)."""
        group = scan.payload_cgroup(init)
        if group is not None:
            Cgroup(group).restore(self.manifest.cgroups, ns.IdMaps(init).outside)

    def _mount(self, connection: Connection) -> Fd:
        root = next(n for n in connection.nodes if n.nodeid == 1)
        options = [o for o in connection.super_options.split(",") if o and o not in FLAG_OF_OPTION and o != "rw"]
        options = [o for o in options if not o.startswith("rootmode=")]
        options.append(f"rootmode={stat.S_IFMT(root.attr[9]):o}")
        # A mount option may say ro where the superblock says rw; CRIU sets the mount's own flags later.
        flags = _flags(connection.mount_options) & ~MS_RDONLY | _flags(connection.super_options)
        with pidfd_open(self.init) as pidfd:
            try:
                _, fds = self.zygote.run(
                    f"{jobs.__name__}:mount_job",
                    {
                        "pid": self.init,
                        "staging": self._staging(connection),
                        "source": connection.source,
                        "fstype": connection.fstype,
                        "flags": flags,
                        "options": ",".join(options),
                    },
                    [pidfd.fileno()],
                    deadline=MOUNT_SECONDS,
                )
            except JobError as error:
                raise RestoreError(
                    f"FUSE mount {proc.printable(connection.mountpoint)} in the restored container",
                    str(error),
                    "is /dev/fuse there, with mode 0666?",
                ) from None
        return fds[0]

    def device(self, number: int) -> Fd:
        """A /dev/fuse descriptor for the restored daemon.

        :raises RestoreError: there is no such connection
        """
        placeholder = self.placeholders.get(number)
        if placeholder is None:
            raise RestoreError(f"FUSE connection {number}", "is not one of the manifest's")
        return placeholder.device.dup()

    def verify(self, init: int) -> None:
        """Every restored handle has the nodeid and fh that the daemon knows: the last point for a veto.

        :raises RestoreError: names the first handles that differ
        """
        self.init = init
        self._hold_init()
        if self.wanted_name and self.name != self.wanted_name:
            # Incus would not know it, and never end it (6.0: instances of other projects; lxc/incus pull request 3692).
            raise RestoreError("restored container", f"is {self.name} to liblxc instead of {self.wanted_name}")
        pids = tasks_by_ns_pid(init)
        missing = [pid for pid in self.manifest.tasks if pid not in pids]
        if missing:
            raise RestoreError("restored container", f"lacks tasks {missing[:10]}")
        for connection in self.manifest.connections:
            self._verify(connection, pids)
            for daemon in connection.daemons:
                inits.remember(self.journal, pids[daemon], bytes.fromhex(connection.init_reply))
        self.journal.write(
            KIND,
            str(init),
            {
                "init": init,
                "start": proc.start_time(init),
                "criu": self.criu,
                "container": self.name,
                "manifest": self.manifest.dump().decode(),
            },
        )
        self.undo.callback(self.journal.remove, KIND, str(init))
        self.verified = True

    def _hold_init(self) -> None:
        """:raises ProcessLookupError: it is gone"""
        if self.initfd is None:
            self.initfd = pidfd_open(self.init)
            self.undo.callback(self.initfd.close)

    def _verify(self, connection: Connection, pids: dict[int, int]) -> None:
        answers = self.placeholders[connection.number].answers
        answers.probes.clear()
        handles = [h for h in connection.handles if h.fd >= 0]
        options = dict(o.partition("=")[::2] for o in connection.super_options.split(","))
        try:
            codes = record.probe(
                self.zygote,
                self.init,
                int(options.get("user_id", "0")),
                int(options.get("group_id", "0")),
                [(pids[h.pid], h.fd) for h in handles],
            )
        except JobError as error:
            raise RestoreError(f"handles on {proc.printable(connection.mountpoint)}", str(error)) from None
        wrong = []
        for index, handle in enumerate(handles):
            seen = answers.probes.get(index)
            if seen != (handle.nodeid, handle.fh):
                wrong.append(
                    f"task {handle.pid} fd {handle.fd} ({proc.printable(handle.path)}): "
                    + (f"node {seen[0]:#x} fh {seen[1]:#x}" if seen else os.strerror(codes[index][0]))
                    + f" instead of node {handle.nodeid:#x} fh {handle.fh:#x}"
                )
        if wrong:
            raise RestoreError(
                f"{len(wrong)} restored handles on {proc.printable(connection.mountpoint)}",
                "; ".join(wrong[:5]),
                "the container was not resumed",
            )
        deadline = time.monotonic() + SETTLE_SECONDS
        while answers.private and time.monotonic() < deadline:
            time.sleep(0.001)
        if answers.private:
            raise RestoreError(
                f"restore of {proc.printable(connection.mountpoint)}",
                f"{len(answers.private)} files were opened that the daemon does not know: "
                + ", ".join(f"task {pid} node {node:#x}" for pid, node in list(answers.private.values())[:5]),
                "the container was not resumed",
            )
        if answers.over_counted():
            log.warning("%s: nodes given out more often than the daemon counted: %s", self.name, answers.over_counted())

    def wait_stopped(self, seconds: float = SETTLE_SECONDS) -> bool:
        """CRIU has let go of tasks that were stopped when it dumped them: wait until they are again."""
        pids = tasks_by_ns_pid(self.init).values()
        deadline = time.monotonic() + seconds
        while any(set(proc.thread_states(p)) - proc.STOPPED_OR_GONE for p in pids):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True

    def hand_over(self, seconds: float = SETTLE_SECONDS) -> None:
        """CRIU has let go: all tasks are stopped. Placeholders leave, daemons and what they need go on, then clients.

        :raises Exception: not all of them go on; it may be called again
        """
        stopped = self.wait_stopped(seconds)
        pids = tasks_by_ns_pid(self.init)
        if stopped:  # not when it is called again: who goes on uses his positions
            directories.settle(self.zygote, pids.values())
        try:
            leave(self.placeholders.values(), self.zygote)
        finally:
            resume(pids, self.manifest)
        self.done = True
        self.undo.close()
        log.info(
            "%s: restored, %d handles on %d connections, %.3f s after CRIU asked",
            self.name,
            sum(len(c.handles) for c in self.manifest.connections),
            len(self.manifest.connections),
            time.monotonic() - self.began,
        )

    def drop(self) -> None:
        """The restore failed or was aborted: nothing of it stays."""
        try:
            leave(self.placeholders.values())
            for placeholder in self.placeholders.values():
                placeholder.abort()
            self.placeholders.clear()
        finally:
            self.undo.close()


def resume(pids: dict[int, int], what: Manifest) -> None:
    """SIGCONT the restored tasks, ``first`` in order, then the others, but for those that were stopped by their users.

    :raises OSError: of the last one that could not be told; all others go on
    """
    held = set(what.stopped)
    failed: OSError | None = None
    rest = [p for p in what.tasks if p not in set(what.first)]
    for ns_pid in [*what.first, *rest]:
        pid = pids.get(ns_pid)
        if pid is None or ns_pid in held:
            continue
        try:
            with pidfd_open(pid) as pidfd:
                send_signal(pidfd, signal.SIGCONT)
        except ProcessLookupError:
            continue
        except OSError as error:
            failed = error
    if failed is not None:
        raise failed


def tasks_by_ns_pid(init: int) -> dict[int, int]:
    """Pid in the container -> pid here, for the container's own pid namespace."""
    depth = len(proc.ns_pids(init)) - 1
    found = {}
    for pid in proc.pids_in_pidns(init):
        try:
            found[proc.ns_pids(pid)[depth]] = pid
        except (FileNotFoundError, ProcessLookupError, IndexError, KeyError):
            continue
    return found


def open_images(imgdir: int) -> None:
    """Let the restored container's root read the time namespace image.

    CRIU's prepare_timens() opens it in the new tasks before their user namespace is mapped, when they have no right to the
    directory of an unprivileged container (0700): a race that fails restores now and then. The directory's parents keep
    everybody else out. Only a plain file is touched: the directory's contents came from another host.
    """
    os.fchmod(imgdir, stat.S_IMODE(os.fstat(imgdir).st_mode) | 0o011)
    try:
        fd = os.open(TIMENS_IMAGE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=imgdir)
    except OSError:
        return
    with Fd(fd) as image:
        info = os.fstat(image.fileno())
        if stat.S_ISREG(info.st_mode) and info.st_nlink == 1:
            os.fchmod(image.fileno(), stat.S_IMODE(info.st_mode) | 0o044)


def recover(zygote: Zygote, journal: Journal) -> list[tuple[Restore, dict[str, Any]]]:
    """Restores that an agent had verified and not handed over when it died. One that cannot be taken over stays stopped:
    it may be a migration's, and nobody knows whether it may run."""
    found: list[tuple[Restore, dict[str, Any]]] = []

    def take(entry: dict[str, Any]) -> None:
        if proc.dying(entry["init"]) or proc.start_time(entry["init"]) != entry["start"]:
            journal.remove(KIND, entry["name"])
            return
        with ExitStack() as failed:
            what = manifest.parse(entry["manifest"].encode())
            restore = Restore(zygote, journal, what, entry["criu"], entry["container"], entry["init"])
            failed.callback(restore.drop)
            restore._hold_init()
            _answer_again(restore)
            failed.pop_all()
        restore.undo.callback(journal.remove, KIND, entry["name"])
        found.append((restore, entry))

    journal.each(KIND, take)
    return found


def _answer_again(restore: Restore) -> None:
    restore.verified = True
    pids = tasks_by_ns_pid(restore.init)
    for connection in restore.manifest.connections:
        device = _daemon_device(connection, pids)
        if device is not None:
            answers = Answers(connection, bytes.fromhex(connection.init_reply))
            restore.placeholders[connection.number] = StandIn(device, answers)
            restore.placeholders[connection.number].start()


def _daemon_device(connection: Connection, pids: dict[int, int]) -> Fd | None:
    """The restored daemon's own /dev/fuse descriptor: its link reads otherwise after a restore, fdinfo tells."""
    for ns_pid in connection.daemons:
        pid = pids.get(ns_pid, 0)
        for fd in proc.fds(pid) if pid else []:
            try:
                if CONNECTION_KEY in proc.fdinfo(pid, fd):
                    with pidfd_open(pid) as pidfd:
                        return pidfd_getfd(pidfd, fd)
            except OSError:
                continue
    return None


def _flags(options: str) -> int:
    return sum(flag for option, flag in FLAG_OF_OPTION.items() if option in options.split(","))


def _rmdir(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError as error:
        log.debug("%s: %s", path, error.strerror)
