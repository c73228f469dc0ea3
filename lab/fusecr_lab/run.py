# SPDX-License-Identifier: Apache-2.0
"""Progress lines and commands whose failure names the step, the command and its last output."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO

from .errors import LabError, tail

_start = time.monotonic()


def progress(text: str) -> None:
    """Print one progress line with the seconds since the command began."""
    print(f"lab [{time.monotonic() - _start:5.1f}s] {text}", file=sys.stderr, flush=True)


def shown(argv: Sequence[str], limit: int = 300) -> str:
    """Return a command line as a user could type it, shortened."""
    text = " ".join(shlex.quote(a) for a in argv)
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def failure(step: str, argv: Sequence[str], why: str, output: str) -> LabError:
    """Build the error of a failed command."""
    return LabError(f"{step} failed: {why}\n  command: {shown(argv)}\n  last output:\n{tail(output)}")


def run(step: str, argv: Sequence[str], *, timeout: float = 120, stdin: bytes | None = None,
        env: Mapping[str, str] | None = None, cwd: str | None = None, stdout: IO[bytes] | None = None) -> str:
    """Run a command to its end and return its output (stdout and stderr in the order written).

    Args:
        step: what the user is told when it fails.
        argv: the command.
        timeout: seconds after which it is killed and the step has failed.
        stdin: its standard input; empty without.
        env: its whole environment; ours without.
        cwd: its working directory.
        stdout: where its output goes instead; the returned text is its stderr then.

    Raises:
        LabError: it could not be started, returned non-zero or did not end in time.
    """
    try:
        done = subprocess.run(argv, input=stdin if stdin is not None else b"", stdout=stdout or subprocess.PIPE,
                              stderr=subprocess.PIPE if stdout else subprocess.STDOUT, timeout=timeout, env=env,
                              cwd=cwd, check=False)
    except OSError as err:
        raise failure(step, argv, f"cannot run it: {err}", "") from None
    except subprocess.TimeoutExpired as err:
        output = (err.stdout or b"").decode(errors="replace")
        raise failure(step, argv, f"not finished after {timeout:g} s", output) from None
    output = ((done.stderr if stdout else done.stdout) or b"").decode(errors="replace")
    if done.returncode:
        raise failure(step, argv, f"exit code {done.returncode}", output)
    return output


def run_all(step: str, jobs: Sequence[tuple[Sequence[str], bytes]], *, timeout: float = 120) -> list[str]:
    """Run several commands at the same time (each with its standard input), return their outputs in order.

    Raises:
        LabError: for the first that failed, after all of them have ended.
    """
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(max(1, len(jobs))) as pool:
        futures = [pool.submit(run, step, argv, timeout=timeout, stdin=stdin) for argv, stdin in jobs]
    return [future.result() for future in futures]
