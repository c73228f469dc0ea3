# SPDX-License-Identifier: Apache-2.0
"""Entry of the service ``incus-fusecr agent``."""

from __future__ import annotations

import logging
import os
import resource
import socket
import threading

from ..checkpoint.dump import Tools
from ..checkpoint.journal import RUN, Journal
from ..checkpoint.knob import Knob
from ..errors import FusecrError
from ..linux.libc import PR_SET_DUMPABLE, prctl
from ..linux.zygote import Zygote
from .ended import Ended
from .loop import Loop

log = logging.getLogger(__name__)

# A pidfd for each task that is stopped, in each of several containers (checkpoint/quiesce.py MAX_TASKS).
DESCRIPTORS = 1 << 18


def notify(state: str) -> None:
    """sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            sock.send(state.encode())


def main(*, debug: bool = False, criu_options: list[str] | None = None, recovery: bool = True) -> None:
    """Run until SIGTERM.

    :param criu_options: further arguments for CRIU's held dump
    :param recovery: protect the host's daemons that the configuration names
    :raises FusecrError: it is not root, or another agent runs
    """
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO, format="%(asctime)s %(levelname)s %(threadName)s: %(message)s"
    )
    logging.getLogger("urllib3").setLevel(logging.INFO)
    logging.getLogger("websockets").setLevel(logging.INFO)
    if os.geteuid() != 0:
        raise FusecrError("agent", "is not root", "run it as a service of the host")
    os.makedirs(RUN, exist_ok=True)
    os.chmod(RUN, 0o711)
    prctl(PR_SET_DUMPABLE, 0)
    # Before the lock: a child that hangs in D on a dead FUSE mount must not keep the next agent out.
    zygote = Zygote()
    try:
        lock = _only_one()
    except FusecrError:
        zygote.close()
        raise
    # Imported after the fork: the zygote stays small, and has no thread of a library.
    from ..incus.config import Config
    from ..recovery.containers import Aside
    from . import recovering
    from .probing import InitProbes
    from .service import Service

    journal = Journal()
    aside = Aside()
    tools = Tools(zygote, journal, Knob(journal), InitProbes(journal), aside.leave, lambda init: aside.outside(init))
    service = Service(tools, Config.load(), criu_options or [])
    ended = Ended()
    failed = watch(zygote, ended)
    raise_descriptors()
    service.start()
    recovered = recovering.start(zygote, aside) if recovery else None
    notify("READY=1")
    log.info("agent %d serves", os.getpid())
    ended.wait()
    threading.excepthook = threading.__excepthook__
    notify("STOPPING=1")
    service.close()
    if recovered is not None:
        recovered.close(failed=bool(failed))
    zygote.close()
    lock.close()
    if failed:
        raise FusecrError("agent", failed[0], "its supervisor starts another, which takes over")


def watch(zygote: Zygote, ended: Ended | threading.Event) -> list[str]:
    """Set ``ended`` when what the agent cannot do without is gone for good.

    :returns: where the reason will be
    """
    failed: list[str] = []

    def fail(why: str) -> None:
        if not ended.is_set():
            log.error("%s; the agent ends", why)
            failed.append(why)
            ended.set()

    def hook(args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread is not None else "?"
        log.error("thread %s failed: %r", name, args.exc_value, exc_info=args.exc_value)
        if isinstance(args.thread, Loop):
            fail(f"its thread {name} failed ({args.exc_value!r})")

    def wait() -> None:
        zygote.wait_gone()
        fail("its zygote is gone")

    threading.excepthook = hook
    threading.Thread(target=wait, daemon=True, name="zygote").start()
    return failed


def raise_descriptors() -> None:
    """As many as there may be; what is started from here may lower it again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), max(hard, DESCRIPTORS)))
    except (OSError, ValueError):  # above fs.nr_open
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _only_one() -> socket.socket:
    """A lock that the kernel releases with the process."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.bind("\0incus-fusecr-agent" + (f"-{os.stat(RUN).st_dev}"))
    except OSError:
        raise FusecrError("agent", "another one runs on this host", "systemctl status incus-fusecr") from None
    return sock
