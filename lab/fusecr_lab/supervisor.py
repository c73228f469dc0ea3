#!/usr/bin/python3 -I
# SPDX-License-Identifier: Apache-2.0
"""pid 1 of a lab host (`supervisor.py init`) and its control command (under the name `labctl`).

Services are files /etc/fusecr-lab/services.d/NAME.service:

    [service]
    command = /usr/bin/thing --flag     run by sh -c "exec ..."
    before = umount -l /somewhere       optional, run by sh before each start; its failure is ignored
    ready = test -S /run/thing.sock     optional, what `labctl start` and `labctl wait` wait for
    environment = A=b C=d               optional
    after = other                       optional, started when that one is ready

A service whose process ends, however it does, is started again after 0.2 s (2 s once it has ended quickly five
times in a row), unless it was stopped by `labctl stop`. Only the main process is signalled: what a service
detached from itself goes on. Output goes to /var/log/fusecr-lab/NAME.log. Runs on its own, standard library only.
"""

from __future__ import annotations

import configparser
import json
import os
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

SERVICES = Path("/etc/fusecr-lab/services.d")
LOGS = Path("/var/log/fusecr-lab")
SOCKET = "/run/fusecr-lab.sock"
PATH = "/usr/libexec/incus:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
START_SECONDS = 10.0
RESTART_DELAY = 0.2
SLOW_DELAY = 2.0
QUICK_END = 1.0
QUICK_ENDS = 5


class Service:
    """One supervised process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.wanted = False
        self.pid = 0
        self.started = 0.0
        self.restarts = 0
        self.quick = 0
        self.due: float | None = None
        self.last = "never started"
        self.proc: subprocess.Popen[bytes] | None = None

    def config(self) -> dict[str, str]:
        """Read the service file; it may change between two starts."""
        parser = configparser.ConfigParser(interpolation=None)
        parser.read(SERVICES / f"{self.name}.service")
        return dict(parser["service"])

    def start(self) -> None:
        """Run the command in its own session."""
        config = self.config()
        env = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"}
        env.update(item.partition("=")[::2] for item in shlex.split(config.get("environment", "")))
        script = f"{config['before']} 2>/dev/null\n" if "before" in config else ""
        with open(LOGS / f"{self.name}.log", "ab") as log:
            self.proc = subprocess.Popen(["/bin/sh", "-c", f"{script}exec {config['command']}"], env=env, cwd="/",
                                         stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self.pid, self.started, self.due = self.proc.pid, time.monotonic(), None
        if not self.restarts:
            self.last = "has not ended yet"

    def ended(self, status: int) -> None:
        """Take note of the end of the process and plan the next start."""
        code = os.waitstatus_to_exitcode(status)
        self.last = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        if self.proc:
            self.proc.returncode = code  # reaped by us, not by subprocess
        self.quick = self.quick + 1 if time.monotonic() - self.started < QUICK_END else 0
        self.pid = 0
        if self.wanted:
            self.plan(SLOW_DELAY if self.quick >= QUICK_ENDS else RESTART_DELAY)

    def plan(self, delay: float) -> None:
        """Start it after a delay (seconds)."""
        self.due = time.monotonic() + delay
        self.restarts += 1

    def state(self) -> dict[str, object]:
        """What `labctl status` shows."""
        return {"name": self.name, "wanted": self.wanted, "pid": self.pid, "restarts": self.restarts,
                "last": self.last, "ready": self.config().get("ready", ""), "after": self.config().get("after", "")}


class Init:
    """The supervisor: reaps orphans, restarts services, answers on its socket (root only)."""

    def __init__(self) -> None:
        self.services: dict[str, Service] = {}
        self.selector = selectors.DefaultSelector()
        wake_r, wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # the kernel then kills the whole host
        self.wake = wake_r
        self.selector.register(wake_r, selectors.EVENT_READ)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        os.umask(0o077)
        self.listener.bind(SOCKET)
        os.umask(0o022)
        self.listener.listen(16)
        self.selector.register(self.listener, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve for ever."""
        while True:
            dues = [s.due for s in self.services.values() if s.due is not None]
            timeout = max(0.0, min(dues) - time.monotonic()) if dues else None
            for key, _ in self.selector.select(timeout):
                if key.fileobj is self.listener:
                    self.answer()
                else:
                    os.read(self.wake, 4096)
            self.reap()
            for service in self.services.values():
                if service.due is not None and service.due <= time.monotonic():
                    self.try_start(service)

    def try_start(self, service: Service) -> None:
        """Start a service; a broken service file is reported in its status and tried again."""
        try:
            service.start()
        except (OSError, KeyError, ValueError, configparser.Error) as err:
            service.last = f"cannot start: {err}"
            service.plan(SLOW_DELAY)

    def reap(self) -> None:
        """Reap every ended child, ours or orphaned."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for service in self.services.values():
                if service.pid == pid:
                    service.ended(status)

    def answer(self) -> None:
        """Answer one client; a client gets one second to say what it wants."""
        client, _ = self.listener.accept()
        with client:
            client.settimeout(1)
            try:
                request = json.loads(client.recv(4096))
                reply = self.command(str(request["command"]), str(request.get("name", "")))
            except (OSError, ValueError, KeyError, TypeError) as err:
                reply = {"error": str(err)}
            try:
                client.sendall(json.dumps(reply).encode() + b"\n")
            except OSError:
                pass

    def command(self, command: str, name: str) -> dict[str, object]:
        """Do what a client asks; waiting is the client's job."""
        known = {p.stem for p in SERVICES.glob("*.service")}
        for new in known - self.services.keys():
            self.services[new] = Service(new)
        if command == "list":
            return {"services": [s.state() for s in self.services.values()]}
        if name not in known:
            return {"error": f"no service {name!r} here; there are: {', '.join(sorted(known))}"}
        service = self.services[name]
        if command == "start":
            service.wanted = True
            if not service.pid and service.due is None:
                service.quick = 0
                self.try_start(service)
        elif command in ("stop", "kill"):
            service.wanted, service.due = False, None
            if service.pid:
                os.kill(service.pid, signal.SIGTERM if command == "stop" else signal.SIGKILL)
        elif command != "status":
            return {"error": f"unknown command {command!r}"}
        return service.state()


def connect(sock: socket.socket) -> None:
    """To pid 1, which may have come up this very moment: whoever runs something on a host need not wait for that."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return sock.connect(SOCKET)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def ask(command: str, name: str = "") -> dict[str, object]:
    """Send one request to pid 1; exits with its error."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        try:
            connect(sock)
            sock.sendall(json.dumps({"command": command, "name": name}).encode())
            data = b""
            while not data.endswith(b"\n"):
                part = sock.recv(65536)
                if not part:
                    break
                data += part
            reply: dict[str, object] = json.loads(data)
        except (OSError, ValueError) as err:
            sys.exit(f"labctl: pid 1 does not answer on {SOCKET}: {err}")
    if "error" in reply:
        sys.exit(f"labctl: {reply['error']}")
    return reply


def wait_ready(name: str, timeout: float) -> None:
    """Wait until a service runs and its ready command succeeds."""
    deadline = time.monotonic() + timeout
    env = {"PATH": PATH, "HOME": "/root"}
    while True:
        state = ask("status", name)
        ready = str(state["ready"]) or "true"
        if state["pid"]:
            try:
                if subprocess.run(["/bin/sh", "-c", ready], env=env, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                  timeout=max(0.1, deadline - time.monotonic()), check=False).returncode == 0:
                    return
            except subprocess.TimeoutExpired:
                pass
        if time.monotonic() > deadline:
            sys.exit(f"labctl: {name} is not ready after {timeout:g} s: "
                     f"{'runs, but fails: ' + ready if state['pid'] else state['last']}; last lines of its log:\n"
                     + tail_log(name))
        time.sleep(0.03)


def tail_log(name: str) -> str:
    """Return the last lines of a service's log."""
    try:
        return "\n".join((LOGS / f"{name}.log").read_text(errors="replace").splitlines()[-15:])
    except OSError as err:
        return str(err)


def stop(name: str, timeout: float) -> None:
    """Stop a service: SIGTERM, after the timeout SIGKILL."""
    state = ask("stop", name)
    pid, deadline, killed = state["pid"], time.monotonic() + timeout, False
    while pid and ask("status", name)["pid"] == pid:
        if time.monotonic() > deadline:
            if killed:
                sys.exit(f"labctl: {name} (pid {pid}) survives SIGKILL")
            ask("kill", name)
            killed, deadline = True, time.monotonic() + 5
        time.sleep(0.02)


def start(name: str, timeout: float) -> None:
    """Start a service after the one it names, and wait until it is ready."""
    after = str(ask("status", name)["after"])
    if after:
        start(after, timeout)
    ask("start", name)
    wait_ready(name, timeout)


def labctl(argv: list[str]) -> int:
    """The control command: labctl start|stop|restart|status|wait|log|pid [SERVICE] [TIMEOUT]."""
    usage = "usage: labctl start|stop|restart|wait|status|pid|log SERVICE [TIMEOUT], labctl status"
    if not argv or len(argv) > 3:
        sys.exit(usage)
    command, name = argv[0], argv[1] if len(argv) > 1 else ""
    timeout = float(argv[2]) if len(argv) > 2 else 20.0
    if command == "status" and not name:
        listed = ask("list")["services"]
        assert isinstance(listed, list)
        for s in listed:
            print(f"{s['name']:12} {'running' if s['pid'] else 'stopped':8} pid {s['pid'] or '-':<8} "
                  f"wanted {'yes' if s['wanted'] else 'no':4} restarts {s['restarts']:<4} {s['last']}")
        return 0
    if not name:
        sys.exit(usage)
    if command == "status":
        state = ask("status", name)
        print(json.dumps(state))
        return 0 if state["pid"] else 3
    if command == "pid":
        pid = ask("status", name)["pid"]
        print(pid)
        return 0 if pid else 3
    if command == "log":
        print(tail_log(name))
    elif command == "start":
        start(name, timeout)
    elif command == "stop":
        stop(name, timeout)
    elif command == "restart":
        stop(name, timeout)
        start(name, timeout)
    elif command == "wait":
        wait_ready(name, timeout)
    else:
        sys.exit(usage)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["init"] and os.getpid() == 1:
        LOGS.mkdir(parents=True, exist_ok=True)
        Init().run()
    try:
        sys.exit(labctl(sys.argv[1:]))
    except ValueError:
        sys.exit("labctl: the timeout is a number of seconds")
