# SPDX-License-Identifier: Apache-2.0
"""``nox`` runs lint and unit as any user; ``nox -s integration``, ``lab`` and ``bench`` need root."""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "unit"]
PYTHONS = ["3.11", "3.12", "3.13"]


@nox.session(python=PYTHONS)
def unit(session: nox.Session) -> None:
    """Needs neither root nor FUSE."""
    session.install("-e", ".[test]")
    session.run("pytest", "tests/unit", *session.posargs)


@nox.session
def integration(session: nox.Session) -> None:
    """Real kernel, real daemons, CRIU; no Incus. Root."""
    session.install("-e", ".[test]")
    session.run("pytest", "tests/integration", *session.posargs)


@nox.session
def lab(session: nox.Session) -> None:
    """Two real Incus hosts: ``./lab/lab test``, which makes its own environment. Root."""
    session.run("./lab/lab", "test", "--", *session.posargs, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """The rules that tests/unit/test_style.py checks too."""
    session.install("-e", ".[test]")
    session.run("ruff", "check", ".")
    session.run("mypy")
    session.run("pytest", "tests/unit/test_style.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Frozen and total times on a lab that is up (``./lab/lab up``). Root."""
    session.install("-e", ".")
    session.run("python", "-m", "bench", *session.posargs)
