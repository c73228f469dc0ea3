# SPDX-License-Identifier: Apache-2.0
"""A connection to one Incus server: requests, background operations, failures that tell what they leave.

pylxd carries the requests (its ``api`` tree over a session of ours); its models are not used, since they know
LXD's rules and wait without a deadline.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar
from urllib.parse import quote

import pylxd
import requests
import tenacity
from pylxd import exceptions as pylxd_exceptions

from .. import __version__
from .config import Config, Endpoint
from .deadline import Deadline
from .failures import (
    ApiError,
    Busy,
    Conflict,
    Forbidden,
    NotDelivered,
    NotFound,
    OperationBusy,
    OperationFailed,
    OperationTimeout,
    OutcomeUnknown,
    is_busy,
)
from .transport import make_session, translate

log = logging.getLogger(__name__)

Json = Mapping[str, Any]
Progress = Callable[[Json], None]
T = TypeVar("T")

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
LOST_SECONDS = 5.0
BUSY_SECONDS = 2.0
_GET_ATTEMPTS = 4
_MAX_ERROR_TEXT = 2000


@dataclass(frozen=True)
class Answer:
    """What came back for one request.

    :ivar metadata: the answer's ``metadata``
    :ivar operation: identifier of the background operation, or ``""`` for a finished request
    :ivar etag: for a later ``If-Match``
    """

    metadata: Any
    operation: str
    etag: str


class Connection:
    """A connection to one server, in one project. Belongs to one thread: make one each with :meth:`clone`.

    :param endpoint: from :meth:`Config.endpoint`
    :param connect_seconds: for connection and handshake
    :param read_seconds: for an answer, where the call gives no other
    :ivar lost_seconds: how long a wait for an operation bears a lost link
    :raises NotDelivered: the server cannot be reached
    :raises Forbidden: the server does not trust this client
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        connect_seconds: float = CONNECT_SECONDS,
        read_seconds: float = READ_SECONDS,
    ) -> None:
        self.endpoint = endpoint
        self.name = endpoint.remote
        self.project = endpoint.project
        self.connect_seconds = connect_seconds
        self.read_seconds = read_seconds
        self.lost_seconds = LOST_SECONDS
        self._thread: int | None = None
        url, self._session = make_session(endpoint)
        self._session.headers["User-Agent"] = f"incus-fusecr/{__version__}"
        try:
            self._client = self._connect(url)
        except BaseException:
            self._session.close()
            raise
        self._info: dict[str, Any] = dict(self._client.host_info)
        if self._info.get("auth") != "trusted":
            self._session.close()
            raise Forbidden(
                f"{self.name} ({endpoint.where}) does not trust this client",
                "the client's certificate is not in its trust store",
                f"make a token there (incus config trust add NAME), then: incus remote add {self.name} TOKEN",
                403,
            )

    @classmethod
    def open(cls, config: Config, remote: str, project: str = "", **kwargs: float) -> Self:
        """The server of a remote in the client's configuration."""
        return cls(config.endpoint(remote, project), **kwargs)

    def clone(self, project: str = "") -> Self:
        """A new connection to the same server, for another thread or another project."""
        endpoint = replace(self.endpoint, project=project) if project else self.endpoint
        other = type(self)(endpoint, connect_seconds=self.connect_seconds, read_seconds=self.read_seconds)
        other.lost_seconds = self.lost_seconds
        return other

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __str__(self) -> str:
        return self.name

    # Requests

    def get(self, path: str, params: Mapping[str, str] | None = None, *, timeout: float | None = None) -> Any:
        """``metadata`` of GET ``/1.0/PATH``; repeated while the connection fails in passing.

        :param path: below ``/1.0``, parts already quoted where they hold foreign text
        :param timeout: seconds for the answer
        :raises NotFound, Forbidden, ApiError: the server's answer
        :raises NotDelivered, OutcomeUnknown: no answer
        """
        return self.request("GET", path, timeout=timeout, params=params).metadata

    def request(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        timeout: float | None = None,
        params: Mapping[str, str] | None = None,
        etag: str = "",
    ) -> Answer:
        """One request. Only GET is ever repeated.

        :param etag: refuse (:class:`Conflict`) if the object is no longer the one with this tag
        """
        if method != "GET":
            return self._once(method, path, body, timeout, params, etag)
        retry: tenacity.Retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_passing),
            stop=tenacity.stop_after_attempt(_GET_ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=0.4),
            reraise=True,
        )
        answer: Answer = retry(self._once, method, path, body, timeout, params, etag)
        return answer

    def put(self, path: str, body: Json, *, timeout: float | None = None, etag: str = "") -> Answer:
        return self.request("PUT", path, body, timeout=timeout, etag=etag)

    def patch(self, path: str, body: Json, *, timeout: float | None = None, etag: str = "") -> Answer:
        return self.request("PATCH", path, body, timeout=timeout, etag=etag)

    def post(self, path: str, body: Json, *, timeout: float | None = None) -> Answer:
        return self.request("POST", path, body, timeout=timeout)

    def delete(self, path: str, *, timeout: float | None = None) -> Answer:
        return self.request("DELETE", path, timeout=timeout)

    def run(
        self,
        method: str,
        path: str,
        body: Json | None,
        deadline: Deadline | float,
        progress: Progress | None = None,
    ) -> Json:
        """A request and the background operation it starts, to its end. See :meth:`wait_operation`."""
        end = Deadline.of(deadline)
        answer = self.request(method, path, body, timeout=max(1.0, min(end.left, self.read_seconds)))
        if not answer.operation:
            return answer.metadata if isinstance(answer.metadata, dict) else {}
        return self.wait_operation(answer.operation, end, progress, what=f"{method} {path}")

    def wait_operation(
        self,
        identifier: str,
        deadline: Deadline | float,
        progress: Progress | None = None,
        *,
        what: str = "operation",
        stall: float | None = None,
    ) -> Json:
        """Wait for a background operation.

        :param progress: called with the operation's ``metadata`` about once a second while it holds something
        :param stall: give up when its ``metadata`` has been the same for so many seconds; None to wait for the deadline
        :returns: the ended operation
        :raises OperationFailed: with the server's text
        :raises OperationTimeout: the deadline passed; it may still be running
        :raises OutcomeUnknown: the server lost it, by a restart for example
        """
        end = Deadline.of(deadline)
        lost: Deadline | None = None
        news, quiet = "", Deadline(stall if stall is not None else end.left)
        while not end.passed:
            try:
                found = self._operation_second(identifier)
            except NotFound as e:
                why = f"the server no longer knows operation {identifier}"
                raise OutcomeUnknown(f"{what} on {self.name}", why, "did it restart?") from e
            except (NotDelivered, OutcomeUnknown) as e:
                # The request to wait is lost, the operation goes on: see whether the link comes back.
                lost = lost or end.within(self.lost_seconds)
                if lost.passed:
                    raise OutcomeUnknown(f"{what} on {self.name}", e.why, e.hint) from e
                time.sleep(min(0.1, end.left))
                continue
            lost = None
            if (now := str(found.get("metadata"))) != news and stall is not None:
                news, quiet = now, Deadline(stall)
            status = int(found.get("status_code") or 0)
            if progress and found.get("metadata"):
                progress(found["metadata"])
            if status == 200:
                return found
            if status > 200:
                why = _bounded(found.get("err") or found.get("status"))
                failed = OperationBusy if is_busy(why) else OperationFailed
                raise failed(f"{what} on {self.name}", why, code=status, cancelled=status == 401)
            if stall is not None and quiet.passed:
                why = f"no progress for {stall:.0f} s"
                raise OperationTimeout(f"{what} on {self.name}", why, f"operation {identifier}", identifier)
        why = f"not done after {end.seconds:.0f} s"
        raise OperationTimeout(f"{what} on {self.name}", why, f"operation {identifier}", identifier)

    def _operation_second(self, identifier: str) -> dict[str, Any]:
        """The operation once it ended, or after a second as it then is."""
        path = f"operations/{quote(identifier, safe='')}"
        try:
            # The server waits in whole seconds; -1, its default, would outlive any deadline.
            return dict(self.get(f"{path}/wait", {"timeout": "1"}, timeout=6.0))
        except ApiError as e:
            # Incus 6.0 answers with an error, of the operation or of its own second that is over; look again.
            log.debug("wait for operation %s on %s: %s", identifier, self.name, e)
        return dict(self.get(path, timeout=6.0))

    # Below the API

    def _connect(self, url: str) -> Any:
        try:
            return pylxd.Client(
                endpoint=url, session=self._session, timeout=(self.connect_seconds, self.read_seconds)
            )
        except pylxd_exceptions.ClientConnectionFailed as e:
            raise translate(_root(e), "", self.endpoint) from e
        except requests.RequestException as e:
            raise translate(e, "", self.endpoint) from e
        except pylxd_exceptions.LXDAPIException as e:
            raise _refusal(e, "GET /1.0", self.name) from e
        except (ValueError, KeyError, TypeError) as e:
            raise ApiError(
                f"{self.name} ({self.endpoint.where}) is not an Incus server", "its answer makes no sense"
            ) from e

    def _once(
        self,
        method: str,
        path: str,
        body: Json | None,
        timeout: float | None,
        params: Mapping[str, str] | None,
        etag: str,
    ) -> Answer:
        self._owned()
        what = f"{method} /1.0/{path}".rstrip("/")
        node = self._client.api
        for part in path.split("/") if path else ():
            node = node[part]
        query = {"project": self.project, **(params or {})}
        if "all-projects" in query:  # Incus refuses both at once
            del query["project"]
        kwargs: dict[str, Any] = {
            "params": query,
            "timeout": (self.connect_seconds, self.read_seconds if timeout is None else timeout),
        }
        if body is not None:
            kwargs["json"] = body
        if etag:
            kwargs["headers"] = {"If-Match": etag}
        try:
            response = getattr(node, method.lower())(**kwargs)
            data = response.json()
            metadata = data.get("metadata")
            operation = str(data.get("operation") or "") if data.get("type") == "async" else ""
        except requests.exceptions.JSONDecodeError as e:
            raise ApiError(f"{what} on {self.name}", "the answer is not JSON") from e
        except requests.RequestException as e:
            raise translate(e, what, self.endpoint) from e
        except pylxd_exceptions.LXDAPIException as e:
            raise _refusal(e, what, self.name) from e
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise ApiError(f"{what} on {self.name}", "the answer makes no sense") from e
        return Answer(
            metadata, operation.rpartition("/")[2].partition("?")[0], response.headers.get("ETag", "")
        )

    def _owned(self) -> None:
        me = threading.get_ident()
        if self._thread is None:
            self._thread = me
        if self._thread != me:
            # Two threads in one keep-alive connection would read each other's answers.
            raise RuntimeError("a Server belongs to one thread; use clone()")


def unless_busy(action: Callable[[], T], seconds: float | Deadline) -> T:
    """Do something, again while another operation is in its way.

    :raises Busy: it still is after ``seconds``
    """
    end = Deadline.of(seconds)
    while True:
        try:
            return action()
        except Busy:
            if end.passed:
                raise
            time.sleep(min(0.01, end.left))


def _passing(error: BaseException) -> bool:
    """Worth another try of a GET: the connection failed, rather than the server being slow or refusing."""
    if isinstance(error, NotDelivered):
        return "not the pinned one" not in error.why and "no connection in time" not in error.why
    return isinstance(error, OutcomeUnknown) and not error.timed_out


def _root(error: BaseException) -> Exception:
    cause = error.__context__
    return cause if isinstance(cause, Exception) else Exception(str(error))


def _refusal(error: Any, what: str, server: str) -> ApiError:
    """The exception for an error answer of the API."""
    code = int(getattr(error.response, "status_code", 0))
    try:
        text = _bounded(error.response.json()["error"])
    except (ValueError, KeyError, TypeError):
        text = f"HTTP status {code}"
    kind: type[ApiError] = ApiError
    if is_busy(text):
        kind = Busy
    elif code == 404:
        kind = NotFound
    elif code in (409, 412):
        kind = Conflict
    elif code in (401, 403):
        kind = Forbidden
    return kind(f"{what} on {server}", text, code=code)


def _bounded(text: object) -> str:
    flat = " ".join(str(text).split())
    return flat if len(flat) <= _MAX_ERROR_TEXT else flat[:_MAX_ERROR_TEXT] + "..."
