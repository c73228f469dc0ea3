# SPDX-License-Identifier: Apache-2.0
"""The client's configuration is found and understood as the incus client does it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from incus_fusecr.errors import UsageError
from incus_fusecr.incus.config import Config, InstanceRef, unix_socket
from incus_fusecr.incus.names import instance_name_fault, lxc_name, split_lxc_name

YAML = """
default-remote: h1
remotes:
  h1: {addr: "https://192.0.2.1:8443", protocol: incus, project: web, public: false}
  h2: {addr: "https://[2001:db8::2]:8443/", auth_type: tls}
  sock: {addr: "unix:///run/other.socket", project: p}
  pics: {addr: "https://pics.example", protocol: simplestreams, public: true}
  old: {addr: "https://old.example", protocol: lxd}
  sso: {addr: "https://sso.example:8443", auth_type: oidc}
  odd: {addr: "https://192.0.2.1:port"}
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    conf = tmp_path / "conf"
    (conf / "servercerts").mkdir(parents=True)
    (conf / "config.yml").write_text(YAML)
    for name in ("client.crt", "client.key", "servercerts/h1.crt"):
        (conf / name).write_text("x")
    return {"INCUS_CONF": str(conf), "INCUS_GLOBAL_CONF": str(tmp_path / "etc")}


def test_remotes(env: dict[str, str]) -> None:
    config = Config.load(environ=env)
    assert config.default_remote == "h1"
    endpoint = config.endpoint("h1")
    assert (endpoint.url, endpoint.project) == ("https://192.0.2.1:8443", "web")
    assert endpoint.server_cert == f"{env['INCUS_CONF']}/servercerts/h1.crt"
    assert endpoint.client_cert == (f"{env['INCUS_CONF']}/client.crt", f"{env['INCUS_CONF']}/client.key")
    assert config.endpoint("h2").url == "https://[2001:db8::2]:8443"
    assert config.endpoint("h2").server_cert == ""
    assert config.endpoint("sock").unix_path == "/run/other.socket"


@pytest.mark.parametrize(
    ("remote", "why"),
    [
        ("pics", "simplestreams"),
        ("images", "simplestreams"),
        ("old", "lxd"),
        ("sso", "oidc"),
        ("odd", "malformed"),
        ("nope", "does not exist"),
    ],
)
def test_what_is_no_server_is_refused_by_name(env: dict[str, str], remote: str, why: str) -> None:
    with pytest.raises(UsageError) as e:
        Config.load(environ=env).endpoint(remote)
    assert remote in str(e.value) and why in str(e.value)


def test_project_order(env: dict[str, str]) -> None:
    assert Config.load(environ=env).endpoint("h1").project == "web"
    assert Config.load(environ={**env, "INCUS_PROJECT": "env"}).endpoint("h1").project == "env"
    config = Config.load("flag", environ={**env, "INCUS_PROJECT": "env"})
    assert config.endpoint("h1").project == "flag"
    assert config.endpoint("h1", "given").project == "given"
    assert Config.load(environ=env).endpoint("h2").project == "default"


def test_environment_names_the_default_remote(env: dict[str, str]) -> None:
    assert Config.load(environ={**env, "INCUS_REMOTE": "h2"}).parse("c1") == ("h2", "c1")


def test_without_any_configuration(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "INCUS_GLOBAL_CONF": str(tmp_path / "none"), "INCUS_SOCKET": "/s"}
    config = Config.load(environ=env)
    assert config.default_remote == "local"
    assert config.endpoint("local").unix_path == "/s"
    assert config.endpoint("local").project == "default"
    assert config.directory == tmp_path / ".config" / "incus"


def test_global_remotes(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "etc" / "servercerts").mkdir(parents=True)
    (tmp_path / "etc" / "servercerts" / "all.crt").write_text("x")
    (tmp_path / "etc" / "config.yml").write_text(
        "remotes: {all: {addr: 'https://all:8443'}, h1: {addr: 'https://wrong:1'}}"
    )
    config = Config.load(environ=env)
    assert config.endpoint("all").server_cert == str(tmp_path / "etc/servercerts/all.crt")
    assert config.endpoint("h1").url == "https://192.0.2.1:8443"


def test_local_cannot_be_redirected_but_keeps_its_project(env: dict[str, str]) -> None:
    Path(env["INCUS_CONF"], "config.yml").write_text("remotes: {local: {addr: 'https://x:1', project: mine}}")
    endpoint = Config.load(environ={**env, "INCUS_SOCKET": "/s"}).endpoint("local")
    assert (endpoint.unix_path, endpoint.project) == ("/s", "mine")


def test_missing_client_certificate(env: dict[str, str]) -> None:
    os.unlink(f"{env['INCUS_CONF']}/client.key")
    with pytest.raises(UsageError, match="client certificate"):
        Config.load(environ=env).endpoint("h1")


@pytest.mark.parametrize("text", ["[1, 2]", "remotes: [1]", "remotes: {a: 1}", "a: [", "\udcff"])
def test_broken_files_are_named(env: dict[str, str], text: str) -> None:
    Path(env["INCUS_CONF"], "config.yml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=r"config\.yml"):
        Config.load(environ=env)


def test_parse_instance(env: dict[str, str]) -> None:
    config = Config.load(environ=env)
    assert config.parse_instance("c1") == InstanceRef("h1", "c1")
    assert config.parse_instance("h2:c1") == InstanceRef("h2", "c1")
    assert config.parse_optional_instance("h2:") == ("h2", "")
    assert config.parse_optional_instance("") == ("h1", "")
    assert config.parse_optional_instance("c9") == ("h1", "c9")
    for bad in ("h2:", "nope:c1", "h1:a_b", "h1:-a", "h1:1a", "h1:c/s", "h1:a:b", "h1:" + "a" * 64):
        with pytest.raises(UsageError):
            config.parse_instance(bad)


def test_parse_target(env: dict[str, str]) -> None:
    config = Config.load(environ=env)
    source = InstanceRef("h1", "c1")
    assert config.parse_target("h2:", source) == InstanceRef("h2", "c1")
    assert config.parse_target("h2:c2", source) == InstanceRef("h2", "c2")
    for bad, why in (
        ("h2", "write h2:"),
        ("c2", "TARGET"),
        ("h1:c2", "same server"),
        ("nope:", "does not exist"),
    ):
        with pytest.raises(UsageError, match=why):
            config.parse_target(bad, source)


def test_socket_order(tmp_path: Path) -> None:
    assert unix_socket({"INCUS_SOCKET": "/a", "INCUS_DIR": "/b"}) == ("/a", "")
    plain, user = tmp_path / "unix.socket", tmp_path / "unix.socket.user"
    env = {"INCUS_DIR": str(tmp_path)}
    assert unix_socket(env) == (str(plain), "")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(user))
    assert unix_socket(env) == (str(user), f"user-{os.geteuid()}")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(plain))
    assert unix_socket(env) == (str(plain), "")


@pytest.mark.parametrize("name", ["a", "web-1", "A9", "a" * 63])
def test_good_instance_names(name: str) -> None:
    assert instance_name_fault(name) == ""


@pytest.mark.parametrize("name", ["", "a" * 64, "1a", "a-", "-a", "a.b", "ä", "a\n", "a b", "a_b"])
def test_bad_instance_names(name: str) -> None:
    assert instance_name_fault(name)


def test_names_of_liblxc() -> None:
    assert lxc_name("default", "web") == "web"
    assert lxc_name("my_project", "web") == "my_project_web"
    for project, instance in (("default", "web"), ("my_project", "web")):
        assert split_lxc_name(lxc_name(project, instance)) == (project, instance)
