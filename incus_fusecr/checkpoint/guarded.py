# SPDX-License-Identifier: Apache-2.0
"""One bad object must not end the thread that looks after all of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import FusecrError
from ..linux.proc import printable


@contextmanager
def guarded(log: logging.Logger, what: str) -> Iterator[None]:
    """Log whatever goes wrong with an object and go on with the next: a container decides what is seen of it.

    :param what: the object, for the log
    """
    try:
        yield
    except (FusecrError, OSError) as error:
        log.warning("%s: %s", printable(what), error)
    except Exception:
        log.exception("%s: the agent failed at it, and goes on with others", printable(what))
