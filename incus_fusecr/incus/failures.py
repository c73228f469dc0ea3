# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between this program and an Incus server, told apart by what it leaves behind."""

from __future__ import annotations

import re

from ..errors import FusecrError, Uncertain, UsageError


class ApiError(FusecrError):
    """The server answered, and refused. Nothing was changed.

    :param code: the HTTP status, or 0 for an answer that is none of the API
    """

    def __init__(self, what: str, why: str = "", hint: str = "", code: int = 0) -> None:
        super().__init__(what, why, hint)
        self.code = code


class NotFound(ApiError, UsageError):
    """404: an instance, project, operation... that is not there."""


class Conflict(ApiError):
    """409, 412: the object exists already, is busy, or changed meanwhile."""


class Busy(ApiError):
    """Another operation of the same instance runs; nothing was changed, later it may work.

    Incus refuses at once instead of waiting: a change of an instance's configuration during its start, stop
    or migration, and a start, stop or migration during a change of its configuration.
    """


class Forbidden(ApiError):
    """401, 403: this client is not trusted, or may not do this."""


class OperationFailed(ApiError):
    """A background operation ended in failure; ``why`` is the server's own text."""

    def __init__(
        self, what: str, why: str = "", hint: str = "", code: int = 0, cancelled: bool = False
    ) -> None:
        super().__init__(what, why, hint, code)
        self.cancelled = cancelled


class NotDelivered(FusecrError):
    """The request certainly did not reach the server: no connection came about."""


class OutcomeUnknown(Uncertain):
    """The request may have been carried out: the connection ended before the answer came.

    :param timed_out: the answer was too slow, the connection may be well
    """

    def __init__(self, what: str, why: str = "", hint: str = "", timed_out: bool = False) -> None:
        super().__init__(what, why, hint)
        self.timed_out = timed_out


class OperationBusy(OperationFailed, Busy):
    """A background operation that another one of the same instance kept from beginning."""


class OperationTimeout(OutcomeUnknown):
    """A background operation did not end within its deadline; it may still be running.

    :param operation: its identifier on the server
    """

    def __init__(self, what: str, why: str = "", hint: str = "", operation: str = "") -> None:
        super().__init__(what, why, hint, timed_out=True)
        self.operation = operation


# internal/server/instance/operationlock of Incus; the last one is a race with the making of a snapshot.
_BUSY = ("is busy running a", "failed getting exclusive access", "record count doesn't match")


def is_busy(text: str) -> bool:
    """Whether an error text of Incus says that another operation is in the way."""
    lowered = text.lower()
    return any(part in lowered for part in _BUSY)


_CRIU_ERROR = re.compile(r"Error \([\w./-]+:\d+\): (.*?)(?= *\(\d\d\.\d{6}\)|$)")
# Said in every log of a CRIU whose limits are not its own to raise, and at the end of every failed one.
_CRIU_NOISE = ("RLIMIT_NOFILE", "FAILED")


def reason(text: str) -> str:
    """An error of Incus, with the tail of CRIU's log that it may hold cut down to what CRIU calls errors."""
    errors = [e for e in _CRIU_ERROR.findall(text) if not any(noise in e for noise in _CRIU_NOISE)]
    if not errors:
        return text
    head = text[: text.index("(0")].rstrip() if "(0" in text else text
    return f"{head}: {'; '.join(dict.fromkeys(errors))}"
