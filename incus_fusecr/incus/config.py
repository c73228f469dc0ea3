# SPDX-License-Identifier: Apache-2.0
"""Remotes, certificates, projects and sockets, found where the ``incus`` client finds them.

Sources: ``cmd/incus/main.go``, ``shared/cliconfig`` and ``client/connection.go`` of Incus 6.0.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import UsageError
from .names import DEFAULT_PROJECT, instance_name_fault

LOCAL_ADDRESS = "unix://"
# shared/cliconfig/default.go: these two exist in every configuration.
_STATIC = {
    "images": {"addr": "https://images.linuxcontainers.org", "public": True, "protocol": "simplestreams"},
    "local": {"addr": LOCAL_ADDRESS, "public": False, "protocol": "incus"},
}
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Remote:
    """One entry of ``remotes`` in ``config.yml``."""

    name: str
    addr: str
    project: str = ""
    protocol: str = ""
    auth_type: str = ""
    public: bool = False
    is_global: bool = False


@dataclass(frozen=True)
class Endpoint:
    """All that a connection to one server needs."""

    remote: str
    project: str
    unix_path: str = ""
    url: str = ""
    server_cert: str = ""
    ca: str = ""
    client_cert: tuple[str, str] | None = None

    @property
    def where(self) -> str:
        """For messages: what one would look at."""
        return self.unix_path or self.url


@dataclass(frozen=True)
class InstanceRef:
    """``[remote:]instance``, taken apart."""

    remote: str
    name: str

    def __str__(self) -> str:
        return f"{self.remote}:{self.name}"


@dataclass(frozen=True)
class Config:
    """The client's configuration; read only, this program never writes it."""

    directory: Path
    global_directory: Path
    default_remote: str
    remotes: Mapping[str, Remote]
    project_override: str = ""
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, project: str = "", environ: Mapping[str, str] | None = None) -> Config:
        """Read ``config.yml`` of the user and of the system.

        :param project: ``--project``; beats INCUS_PROJECT and the remote's own
        :param environ: the environment; the process's own by default
        :raises UsageError: a file is there and cannot be read or understood
        """
        env = os.environ if environ is None else environ
        directory = _directory(env)
        global_directory = Path(env.get("INCUS_GLOBAL_CONF") or "/etc/incus")
        own = _read(directory / "config.yml")
        default = env.get("INCUS_REMOTE") or ""
        remotes: dict[str, Remote] = {}
        if own is not None:
            remotes = _remotes(directory / "config.yml", own, is_global=False)
            default = default or _text(own.get("default-remote"))
        # The client reads the system's file only beside one of the user's; here it counts without one too,
        # since an agent's unit has no home with an `incus remote add` in it.
        system = _read(global_directory / "config.yml")
        if system is not None:
            for name, remote in _remotes(global_directory / "config.yml", system, is_global=True).items():
                remotes.setdefault(name, remote)
        for name, entry in _STATIC.items():
            kept = remotes[name].project if name in remotes else ""
            remotes[name] = replace(_remote(name, entry, is_global=False), project=kept)
        return cls(
            directory=directory,
            global_directory=global_directory,
            default_remote=default or "local",
            remotes=remotes,
            project_override=project or env.get("INCUS_PROJECT", ""),
            environ=env,
        )

    def parse(self, raw: str) -> tuple[str, str]:
        """Split ``[remote:]object`` like the client's ``ParseRemote``.

        :returns: the remote's name and the object, which may be empty
        :raises UsageError: no such remote
        """
        remote, colon, name = raw.partition(":")
        if not colon:
            remote, name = self.default_remote, raw
        self.remote(remote)
        return remote, name

    def remote(self, name: str) -> Remote:
        """The entry ``name``. :raises UsageError: there is none"""
        if name not in self.remotes:
            known = ", ".join(sorted(n for n, r in self.remotes.items() if not _not_a_server(r)))
            raise UsageError(
                f'the remote "{name}" does not exist',
                f"not in {self.directory / 'config.yml'} nor {self.global_directory / 'config.yml'}",
                f"known: {known}; add it with: incus remote add {name} ADDRESS",
            )
        return self.remotes[name]

    def parse_instance(self, raw: str) -> InstanceRef:
        """``[remote:]instance``. :raises UsageError: no such remote, no name, or not a name"""
        remote, name = self.parse(raw)
        if not name:
            raise UsageError(f'"{raw}" names no instance', "", "write [REMOTE:]INSTANCE")
        if "/" in name:
            raise UsageError(f'"{raw}" names a snapshot', "an instance is needed here", "")
        fault = instance_name_fault(name)
        if fault:
            raise UsageError(f'"{name}" is not an instance name', fault)
        return InstanceRef(remote, name)

    def parse_optional_instance(self, raw: str) -> tuple[str, str]:
        """``[remote:][instance]``: the instance may be left out. :returns: remote and name or ``""``"""
        if not raw:
            return self.default_remote, ""
        remote, name = self.parse(raw)
        return (remote, "") if not name else (remote, self.parse_instance(raw).name)

    def parse_target(self, raw: str, source: InstanceRef) -> InstanceRef:
        """``TARGET:[NAME]``, the name defaulting to the source's.

        :raises UsageError: no colon, no such remote, not a name, or the source's own remote
        """
        if ":" not in raw:
            hint = (
                f"write {raw}: for the remote of that name" if raw in self.remotes else "write TARGET:[NAME]"
            )
            raise UsageError(f'"{raw}" names no target server', "a target needs a remote and a colon", hint)
        remote, name = self.parse(raw)
        target = self.parse_instance(f"{remote}:{name or source.name}")
        if target.remote == source.remote:
            raise UsageError(
                f'source and target are the same server, "{source.remote}"',
                "a migration goes from one server to another",
            )
        return target

    def server_cert_path(self, remote: Remote) -> Path:
        base = self.global_directory if remote.is_global else self.directory
        return base / "servercerts" / f"{remote.name}.crt"

    def endpoint(self, name: str, project: str = "") -> Endpoint:
        """How to reach the server ``name``.

        :param project: beats --project, INCUS_PROJECT and the remote's own
        :raises UsageError: no such remote, not a private Incus server, or a certificate is missing
        """
        remote = self.remote(name)
        fault = _not_a_server(remote)
        if fault:
            raise UsageError(f'the remote "{name}" cannot be used here', fault)
        wanted = project or self.project_override or remote.project
        if remote.addr.startswith("unix:"):
            path = remote.addr.removeprefix("unix:").removeprefix("//")
            implied = ""
            if not path:
                path, implied = unix_socket(self.environ)
            return Endpoint(name, wanted or implied or DEFAULT_PROJECT, unix_path=path)
        if not remote.addr.startswith("https://"):
            raise UsageError(
                f'the remote "{name}" cannot be used here', f"address {remote.addr} is not https://"
            )
        try:
            parts = urlsplit(remote.addr)
            usable = bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise UsageError(
                f'the remote "{name}" cannot be used here', f"address {remote.addr} is malformed"
            )
        certificate, key = self.directory / "client.crt", self.directory / "client.key"
        for file in (certificate, key):
            if not file.is_file():
                raise UsageError(
                    f'the remote "{name}" needs a client certificate',
                    f"{file} does not exist",
                    f"make and trust one with: incus remote add {name} {remote.addr}",
                )
        pinned = self.server_cert_path(remote)
        ca = self.directory / "client.ca"
        return Endpoint(
            name,
            wanted or DEFAULT_PROJECT,
            url=remote.addr.rstrip("/"),
            server_cert=str(pinned) if pinned.is_file() else "",
            ca=str(ca) if ca.is_file() else "",
            client_cert=(str(certificate), str(key)),
        )


def unix_socket(environ: Mapping[str, str]) -> tuple[str, str]:
    """The local server's socket, in the order of ``ConnectIncusUnix``.

    :returns: the path, and the project it implies (``user-UID`` for incus-user's socket, else ``""``)
    """
    given = environ.get("INCUS_SOCKET", "")
    if given:
        return given, ""
    directory = environ.get("INCUS_DIR", "")
    if not directory:
        directory = "/run/incus" if os.path.lexists("/run/incus/unix.socket") else "/var/lib/incus"
    path, user = os.path.join(directory, "unix.socket"), os.path.join(directory, "unix.socket.user")
    if not os.access(path, os.W_OK) and os.access(user, os.W_OK):
        return user, f"user-{os.geteuid()}"
    return path, ""


def _directory(env: Mapping[str, str]) -> Path:
    if env.get("INCUS_CONF"):
        return Path(env["INCUS_CONF"])
    home = env.get("HOME", "")
    if not home or not os.path.exists(home):
        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:
            home = "/"
    return Path(home) / ".config" / "incus"


def _read(path: Path) -> dict[str, Any] | None:
    import yaml  # 20 ms that `--help` need not pay

    try:
        with open(path, encoding="utf-8") as f:
            text = f.read(_MAX_CONFIG_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"cannot read {path}", getattr(e, "strerror", None) or str(e)) from e
    if len(text) > _MAX_CONFIG_BYTES:
        raise UsageError(f"cannot read {path}", "it is larger than 1 MiB")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UsageError(f"cannot understand {path}", " ".join(str(e).split())) from e
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"cannot understand {path}", "the top level is not a mapping")
    return data


def _remotes(path: Path, data: Mapping[str, Any], *, is_global: bool) -> dict[str, Remote]:
    entries = data.get("remotes") or {}
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise UsageError(f"cannot understand {path}", "remotes is not a mapping of mappings")
    return {str(name): _remote(str(name), entry, is_global=is_global) for name, entry in entries.items()}


def _remote(name: str, entry: Mapping[str, Any], *, is_global: bool) -> Remote:
    return Remote(
        name=name,
        addr=_text(entry.get("addr")),
        project=_text(entry.get("project")),
        protocol=_text(entry.get("protocol")),
        auth_type=_text(entry.get("auth_type")),
        public=entry.get("public") is True,
        is_global=is_global,
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _not_a_server(remote: Remote) -> str:
    if remote.protocol == "simplestreams":
        return "it is an image server (simplestreams), which runs no instances"
    if remote.public:
        return "it is a public image server, which runs no instances"
    if remote.protocol not in ("", "incus"):
        return f'its protocol is "{remote.protocol}", not incus'
    if remote.auth_type not in ("", "tls"):
        return f'its authentication is "{remote.auth_type}"; only TLS certificates are supported'
    return ""
