# SPDX-License-Identifier: Apache-2.0
"""Where a lab keeps its state, its lock, and its record of hosts."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .errors import LabError

STATE_ROOT = Path("/var/lib/incus-fusecr-lab")
CACHE = Path(os.environ.get("FUSECR_LAB_CACHE") or "/var/cache/incus-fusecr-lab")
NET = "net"
CGROUPS = ("v2", "v1")
INITS = ("labctl", "systemd")
CLIENT_ALIAS = "client"
MAX_HOSTS = 9


def start_time(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot (proc(5), field 22), None if gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2:].split()
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass
class Host:
    """One host of the lab: pid 1 of its pid namespace as the machine numbers it."""

    name: str
    address: str
    pid: int
    start: int

    @property
    def alive(self) -> bool:
        """True while its pid 1 runs (the start time guards against a reused pid)."""
        return start_time(self.pid) == self.start


@dataclass
class Lab:
    """A lab by its name (environment variable FUSECR_LAB) and what is recorded of it."""

    name: str
    driver: str = "dir"
    cgroups: str = "v2"
    init: str = "labctl"
    ready: bool = False
    deps: str = ""
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def dir(self) -> Path:
        """The lab's state directory, removed by `lab down`."""
        return STATE_ROOT / self.name

    @property
    def cgroup(self) -> str:
        """The lab's cgroup in every hierarchy; the authority on which processes belong to the lab."""
        return f"fusecr-lab.{self.name}"

    @property
    def subnet(self) -> str:
        """The first three bytes of the lab network; it exists in the lab's network namespaces only."""
        return f"10.83.{zlib.crc32(self.name.encode()) % 254 + 1}"

    def systemd(self, name: str) -> bool:
        """True if systemd is pid 1 of that host; never of the network's."""
        return self.init == "systemd" and name != NET

    @property
    def shape(self) -> str:
        """What a lab is asked to be besides the number of its hosts, in words."""
        return f"{self.driver}, cgroup {self.cgroups}, init {self.init}"

    @property
    def incus_hosts(self) -> list[Host]:
        """The hosts that run Incus, in order."""
        return [h for n, h in self.hosts.items() if n != NET]

    def host(self, name: str) -> Host:
        """Return a host by its name, or raise LabError (exit code 125) saying which there are."""
        name = NET if name == CLIENT_ALIAS else name
        if not self.hosts:
            raise LabError(f"lab {self.name!r} is not up; start it with: lab up", 125)
        if name not in self.hosts:
            raise LabError(f"lab {self.name!r} has no host {name!r}; it has: "
                           f"{', '.join([*self.hosts, CLIENT_ALIAS])}", 125)
        return self.hosts[name]

    def host_dir(self, name: str) -> Path:
        """The state directory of one host."""
        return self.dir / name

    def save(self) -> None:
        """Write the record atomically."""
        new = self.dir / "lab.json.new"
        new.write_text(json.dumps(asdict(self), indent=1))
        new.rename(self.dir / "lab.json")

    @classmethod
    def load(cls, name: str = "") -> Lab:
        """Return a lab (by default the one named by FUSECR_LAB) with its record, an empty one if it is not up."""
        name = name or os.environ.get("FUSECR_LAB") or "lab"
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", name):
            raise LabError(f"FUSECR_LAB={name!r}: use up to 32 lower case letters, digits and dashes", 2)
        lab = cls(name)
        try:
            record = json.loads((lab.dir / "lab.json").read_text())
            lab.driver, lab.ready = str(record["driver"]), bool(record["ready"])
            lab.deps = str(record["deps"])
            lab.cgroups, lab.init = str(record["cgroups"]), str(record["init"])
            lab.hosts = {n: Host(**h) for n, h in record["hosts"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError):
            lab.hosts, lab.ready = {}, False  # a crash while writing: `up` and `down` clean by the cgroup
        return lab

    @contextlib.contextmanager
    def lock(self, command: str) -> Iterator[None]:
        """Hold the lab's lock: one command at a time changes a lab."""
        STATE_ROOT.mkdir(parents=True, exist_ok=True)
        path = STATE_ROOT / f"{self.name}.lock"
        with open(path, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read(200).strip() or "another command"
                raise LabError(f"lab {self.name!r} is locked by {holder}; wait for it to end, or choose another "
                               "lab with the environment variable FUSECR_LAB") from None
            file.truncate(0)
            file.write(f"`lab {command}` (pid {os.getpid()})\n")
            file.flush()
            yield

    def remove_dir(self) -> None:
        """Remove the state directory; refuses to if something is still mounted below it."""
        prefix = str(self.dir)
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        left = [m for m in mounts if m == prefix or m.startswith(prefix + "/")]
        if left:
            raise LabError(f"still mounted below {prefix}: {', '.join(left[:5])}; unmount it and repeat")
        for attempt in range(20):
            try:
                shutil.rmtree(self.dir)
                return
            except FileNotFoundError:
                return
            except OSError as err:
                if attempt == 19:
                    raise LabError(f"cannot remove {self.dir}: {err}") from None
                time.sleep(0.1)
