# SPDX-License-Identifier: Apache-2.0
"""Recovery of the host's daemons as a part of the agent: whether, from when on, and what happens to it at the end."""

from __future__ import annotations

import glob
import logging
import os
import subprocess

from ..errors import FusecrError
from ..linux.zygote import Zygote
from ..recovery import config, control, facts
from ..recovery.containers import Aside, ContainerSupervisor
from ..recovery.events import EventLog
from ..recovery.supervisor import Supervisor, missing
from .loop import Loop

log = logging.getLogger(__name__)

UNIT = "incus-fusecr.service"


class Recovering:
    """Supervisors that run, and their control socket."""

    def __init__(self, zygote: Zygote, configuration: config.Config, aside: Aside | None = None) -> None:
        self.events = EventLog()
        self.supervisor = Supervisor(zygote, configuration, self.events)
        inside: list[Supervisor] = []
        if wanted_inside(configuration):
            inside.append(ContainerSupervisor(zygote, configuration, self.events, aside=aside))
        self.supervisors = [self.supervisor, *inside]
        self.server = control.Server(self.supervisor, self.events, more=inside)
        targets = [("recovery", self.supervisor.run), *(("containers", one.run) for one in inside), ("control", self.server.run)]
        for name, target in targets:
            Loop(target, name).start()

    def close(self, failed: bool = False) -> None:
        """Hand everything back, unless another agent comes; what is being served goes on.

        :param failed: the agent ends because something in it did
        """
        self.server.close()
        hand_back = not failed and not restarts()
        for supervisor in reversed(self.supervisors):
            try:
                for text in supervisor.stop(hand_back):
                    log.warning("%s", text)
            except (FusecrError, TimeoutError) as error:
                log.error("recovery: %s; guards and holder go on", error or "no answer")
        self.events.close()


def wanted_inside(configuration: config.Config) -> bool:
    """Whether daemons in containers are to be protected, or an agent before has left some that are to be given back."""
    return any(d.protect and d.where != "host" for d in configuration.daemons) or bool(glob.glob(facts.path_of("*")))


def start(zygote: Zygote, aside: Aside) -> Recovering | None:
    """
    :param aside: containers in which nothing is to be protected just now
    :returns: None if nothing is to be protected, or nothing can be; the log says why
    """
    try:
        configuration = config.load()
    except config.ConfigError as error:
        log.error("recovery is off: %s", error)
        return None
    if not any(daemon.protect for daemon in configuration.daemons):
        log.info("recovery is off: no daemon is to be protected")
        return None
    why = missing()
    if why:
        log.warning("recovery is off: %s", why)
        return None
    try:
        return Recovering(zygote, configuration, aside)
    except OSError as error:
        log.error("recovery is off: %s", error)
        return None


def restarts() -> bool:
    """Whether systemd ends us only to start us again (systemctl restart, a package's upgrade)."""
    if not os.environ.get("INVOCATION_ID"):
        return False
    try:
        done = subprocess.run(
            ["systemctl", "list-jobs", "--no-legend", "--plain"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return True  # nothing is lost by staying protected
    jobs = [line.split() for line in done.stdout.splitlines()]
    return any(UNIT in words and "restart" in words for words in jobs)
