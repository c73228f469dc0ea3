# SPDX-License-Identifier: Apache-2.0
"""The HTTP session under pylxd: unix sockets, and TLS 1.3 to a server whose certificate is pinned.

pylxd only knows LXD's paths and passes certificates its own way in each version; a session made here is
handed to it instead. Incus pins certificates: whatever name or authority stands in the server's certificate,
it must be the very one in ``servercerts/REMOTE.crt``.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
from typing import Any
from urllib.parse import quote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3 import exceptions as u3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from ..errors import UsageError
from .config import Endpoint
from .failures import NotDelivered, OutcomeUnknown

UNIX_SCHEME = "http+unix://"
_MISMATCH = "the server's certificate is not the pinned one"


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__("localhost", **kwargs)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(_seconds(self.timeout))
            sock.connect(self._path)
        except OSError as e:
            sock.close()
            # urllib3's name for "no connection came about", which alone proves that nothing was sent
            raise u3.NewConnectionError(self, _why(e)) from e
        self.sock = sock


class _TLSConnection(HTTPSConnection):
    def connect(self) -> None:
        try:
            super().connect()
        except u3.NewConnectionError:
            raise
        except (OSError, u3.HTTPError) as e:
            # Else a failed handshake looks like a TLS fault amid a request, which may have been carried out.
            raise u3.NewConnectionError(self, _why(e)) from e


class _UnixPool(HTTPConnectionPool):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", maxsize=1)
        self._path = path

    def _new_conn(self) -> _UnixConnection:
        return _UnixConnection(self._path)


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class _Adapter(HTTPAdapter):
    """One pool, one server: requests' own choice of pools and certificates is left out."""

    def __init__(self, pool: HTTPConnectionPool) -> None:
        super().__init__()
        self._pool = pool

    def get_connection_with_tls_context(
        self, request: Any, verify: Any, proxies: Any = None, cert: Any = None
    ) -> Any:
        return self._pool

    def get_connection(self, url: Any, proxies: Any = None) -> Any:  # requests before 2.32
        return self._pool

    def request_url(self, request: Any, proxies: Any) -> str:
        return str(request.path_url)

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        return

    def close(self) -> None:
        self._pool.close()
        super().close()


def tls_context(endpoint: Endpoint) -> ssl.SSLContext:
    """TLS 1.3 with the client's certificate.

    With a pinned certificate the context itself verifies nothing: the caller compares the fingerprint.

    :raises UsageError: a certificate cannot be read
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    file = ""
    try:
        if endpoint.client_cert:
            file = endpoint.client_cert[0]
            # An encrypted key would make OpenSSL ask on the terminal.
            context.load_cert_chain(*endpoint.client_cert, password=_no_password)
        if endpoint.server_cert:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif endpoint.ca:
            file = endpoint.ca
            context.load_verify_locations(file)
        else:
            context.load_default_certs()
    except (OSError, ValueError) as e:
        raise UsageError(f"cannot use the certificate {file}", _why(e)) from e
    return context


def fingerprint(path: str) -> str:
    """SHA-256 of the first certificate in a PEM file, in hexadecimal. :raises UsageError: there is none"""
    try:
        with open(path, encoding="ascii") as f:
            pem = f.read(1 << 16)
        end = "-----END CERTIFICATE-----"
        start = pem.index("-----BEGIN CERTIFICATE-----")
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem[start : pem.index(end) + len(end)])).hexdigest()
    except (OSError, ValueError) as e:
        raise UsageError(
            f"cannot use the certificate {path}", _why(e), "incus remote remove, then add it again"
        ) from e


def make_session(endpoint: Endpoint) -> tuple[str, requests.Session]:
    """A session for one server, and the URL prefix that pylxd calls the endpoint."""
    session = requests.Session()
    # REQUESTS_CA_BUNDLE, ~/.netrc and proxies of the environment beat what is set here.
    session.trust_env = False
    if endpoint.unix_path:
        session.mount(UNIX_SCHEME, _Adapter(_UnixPool(endpoint.unix_path)))
        return UNIX_SCHEME + quote(endpoint.unix_path, safe=""), session
    parts = urlsplit(endpoint.url)
    pinned: dict[str, Any] = {}
    if endpoint.server_cert:
        pinned = {"assert_fingerprint": fingerprint(endpoint.server_cert), "assert_hostname": False}
    pool = _TLSPool(
        parts.hostname or "", parts.port or 443, maxsize=1, ssl_context=tls_context(endpoint), **pinned
    )
    session.mount("https://", _Adapter(pool))
    return endpoint.url, session


def dial(endpoint: Endpoint, timeout: float) -> socket.socket:
    """A connected, for TLS also verified, socket: what a websocket runs on.

    :param timeout: seconds for the connection and the handshake
    :raises NotDelivered: no connection, or not to the server that is meant
    """
    raw: socket.socket | None = None
    try:
        if endpoint.unix_path:
            raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            raw.settimeout(timeout)
            raw.connect(endpoint.unix_path)
            return raw
        parts = urlsplit(endpoint.url)
        raw = socket.create_connection((parts.hostname, parts.port or 443), timeout)
        tls = tls_context(endpoint).wrap_socket(raw, server_hostname=parts.hostname)
        raw = tls
        if endpoint.server_cert:
            seen = hashlib.sha256(tls.getpeercert(True) or b"").hexdigest()
            if seen != fingerprint(endpoint.server_cert):
                raise ssl.SSLError(_MISMATCH)
        return tls
    except OSError as e:
        if raw is not None:
            raw.close()
        raise NotDelivered(f"cannot reach {endpoint.remote} ({endpoint.where})", _why(e)) from e


def translate(error: Exception, what: str, endpoint: Endpoint) -> NotDelivered | OutcomeUnknown:
    """A failure of requests, as one that tells whether the request can have been carried out.

    :param what: the request; ``""`` for the first contact
    """
    cause: BaseException = error
    if (
        isinstance(error, requests.RequestException)
        and error.args
        and isinstance(error.args[0], BaseException)
    ):
        cause = error.args[0]
    if isinstance(cause, u3.MaxRetryError) and cause.reason is not None:
        cause = cause.reason
    server = f"{endpoint.remote} ({endpoint.where})"
    # Name, address and handshake come before the first byte of a request.
    if isinstance(cause, (u3.NewConnectionError, u3.ConnectTimeoutError)) or isinstance(
        error, (requests.exceptions.ConnectTimeout, requests.exceptions.InvalidURL)
    ):
        failed = f"{what} on {server} was not sent" if what else f"cannot reach {server}"
        return NotDelivered(failed, _why(cause), _connect_hint(cause, endpoint))
    timed_out = isinstance(error, requests.exceptions.Timeout) or isinstance(
        cause, (u3.ReadTimeoutError, TimeoutError)
    )
    why = "no answer in time" if timed_out else f"the connection ended before the answer: {_why(cause)}"
    failed = f"{what} on {server} may or may not have happened" if what else f"no answer from {server}"
    return OutcomeUnknown(failed, why, timed_out=timed_out)


def _connect_hint(cause: BaseException, endpoint: Endpoint) -> str:
    text = str(cause)
    if _MISMATCH in text:
        return f"if the server really has a new certificate, replace {endpoint.server_cert}"
    if "CERTIFICATE_VERIFY_FAILED" in text and not endpoint.server_cert:
        return f"pin it with: incus remote add {endpoint.remote} {endpoint.url}"
    if endpoint.unix_path and "Permission denied" in text:
        return "be root or a member of the group incus-admin"
    if endpoint.unix_path:
        return "is Incus running on this machine?"
    return "is Incus running there, and is core.https_address set?"


def _why(error: BaseException) -> str:
    """The innermost text, without the addresses of Python objects."""
    if isinstance(error, u3.NewConnectionError) and isinstance(error.__cause__, OSError):
        return _why(error.__cause__)
    if isinstance(error, (u3.ConnectTimeoutError, TimeoutError)) and not isinstance(
        error, u3.NewConnectionError
    ):
        return "no connection in time"
    if isinstance(error, ssl.SSLError):
        return str(error.args[-1]) if error.args else "TLS failed"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if error.args and isinstance(error.args[-1], BaseException):
        return _why(error.args[-1])
    text = str(error)
    if "ingerprints did not match" in text:
        return _MISMATCH
    for end_of_object in (">: ", "): "):
        if end_of_object in text:
            return text.rpartition(end_of_object)[2]
    return text


def _no_password() -> str:
    raise ValueError("the private key is encrypted")


def _seconds(timeout: Any) -> float | None:
    return timeout if isinstance(timeout, (int, float)) else None
