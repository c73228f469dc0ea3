# SPDX-License-Identifier: Apache-2.0
"""What a preflight collects."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .model import Carried, Verdict
from .remains import Remains


@dataclass
class Findings:
    """What preflight saw.

    :ivar driver: of the storage on both sides; empty if it is not the same
    :ivar remains: of an earlier migration of the same instance, under the name that it is to get
    """

    instance: dict[str, Any]
    verdicts: list[Verdict] = field(default_factory=list)
    carried: list[Carried] = field(default_factory=list)
    driver: str = ""
    remains: Remains | None = None

    def refuse(self, where: str, what: str, why: str, hint: str) -> None:
        self.verdicts.append(Verdict("refuse", where, what, why, hint))

    def warn(self, where: str, what: str, why: str, hint: str = "") -> None:
        self.verdicts.append(Verdict("warn", where, what, why, hint))

    def add(self, *found: Verdict | None) -> None:
        """Those that there are."""
        self.verdicts += [verdict for verdict in found if verdict is not None]

    def extend(self, found: Iterable[Verdict]) -> None:
        self.verdicts += found

    @property
    def refused(self) -> list[Verdict]:
        return [v for v in self.verdicts if v.level == "refuse"]
