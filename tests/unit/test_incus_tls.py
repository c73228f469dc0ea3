# SPDX-License-Identifier: Apache-2.0
"""Certificates: the pinned one and no other, before the first byte of a request."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest
from fake_incus import FakeIncus, sync

from incus_fusecr.errors import UsageError
from incus_fusecr.incus.client import Server
from incus_fusecr.incus.config import Endpoint
from incus_fusecr.incus.failures import NotDelivered


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Self-signed pairs ``server``, ``other`` and ``client``, as incus makes them: with names of no use here."""
    directory = tmp_path_factory.mktemp("certificates")
    for name in ("server", "other", "client"):
        command = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-384",
            "-nodes",
        ]
        command += [
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.crt",
            "-days",
            "2",
            "-subj",
            f"/CN=root@{name}",
        ]
        subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=60)
    return directory


def tls_endpoint(fake: FakeIncus, directory: Path, pinned: str) -> Endpoint:
    return Endpoint(
        "h1",
        "default",
        url=f"https://127.0.0.1:{fake.port}",
        server_cert=str(directory / pinned) if pinned else "",
        client_cert=(str(directory / "client.crt"), str(directory / "client.key")),
    )


@pytest.mark.requires_command("openssl")
def test_the_pinned_certificate_is_enough(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever name it carries, and whatever the environment says of certificates."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nonexistent")
    with (
        FakeIncus(lambda r: sync({"name": "c1"}) if r.path.endswith("/c1") else None).listen_tls(
            certificates / "server.crt", certificates / "server.key"
        ) as fake,
        Server(tls_endpoint(fake, certificates, "server.crt")) as server,
    ):
        assert server.instance("c1") == {"name": "c1"}
        assert server.addresses()[0] == f"https://127.0.0.1:{fake.port}"


@pytest.mark.requires_command("openssl")
@pytest.mark.parametrize("pinned", ["other.crt", ""])
def test_any_other_certificate_is_refused_before_a_request(certificates: Path, pinned: str) -> None:
    with FakeIncus().listen_tls(certificates / "server.crt", certificates / "server.key") as fake:
        with pytest.raises(NotDelivered) as e:
            Server(tls_endpoint(fake, certificates, pinned))
        assert fake.requests == []
    assert ("not the pinned one" if pinned else "incus remote add") in str(e.value)


@pytest.mark.requires_command("openssl")
def test_tls_before_1_3_is_refused(certificates: Path) -> None:
    fake = FakeIncus().listen_tls(
        certificates / "server.crt", certificates / "server.key", ssl.TLSVersion.TLSv1_2
    )
    with fake, pytest.raises(NotDelivered):
        Server(tls_endpoint(fake, certificates, "server.crt"))


@pytest.mark.requires_command("openssl")
def test_a_broken_pin_is_a_usage_error(certificates: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.crt").write_text("no certificate")
    endpoint = Endpoint("h1", "default", url="https://127.0.0.1:1", server_cert=str(tmp_path / "bad.crt"))
    with pytest.raises(UsageError, match=r"bad\.crt"):
        Server(endpoint)
