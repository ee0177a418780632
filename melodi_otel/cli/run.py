"""``melodi-otel run -- CMD``: the meter in a program that does not know of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

EXAMPLE = "Example: melodi-otel run -- python generate.py --prompt tea"
SITE = Path(__file__).parent / "startup"

Execute = Callable[[str, Sequence[str], Mapping[str, str]], int]


def run(
    command: list[str] = typer.Argument(..., metavar="CMD…", help="The program and its arguments."),
) -> None:
    """Run a program with the meter on and print its energy when it ends.

    Every Python that CMD starts is instrumented (one started with -I, -S or -E is not). The exit code and the signals are
    those of CMD; 127: it was not found, 126: it cannot be executed.
    """
    raise typer.Exit(start(command, os.environ))


def start(
    command: Sequence[str],
    environ: Mapping[str, str],
    extra: Mapping[str, str] | None = None,
    execute: Execute | None = None,
) -> int:
    """Start ``command`` with the meter in its environment; its exit code, where this process is still there to see it.

    Args:
        command: program and arguments.
        environ: the environment to add to.
        extra: further variables.
        execute: how to start it; default: in place of this process, so that exit code and signals are its own.
    """
    execute = execute or _EXECUTE.get(os.name, _wait_for)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        return execute(command[0], command, with_meter(environ) | dict(extra or {}))
    except FileNotFoundError:
        print(f"melodi-otel: {command[0]}: not found", file=sys.stderr)
        return 127
    except OSError as error:
        print(f"melodi-otel: {command[0]}: {error.strerror or error}", file=sys.stderr)
        return 126


def with_meter(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` in which every Python starts the meter: our directory comes first on PYTHONPATH, once."""
    rest = [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != str(SITE)]
    return {**environ, "PYTHONPATH": os.pathsep.join([str(SITE), *rest])}


def _replace(program: str, command: Sequence[str], environ: Mapping[str, str]) -> int:
    os.execvpe(program, list(command), dict(environ))  # noqa: S606 - replacing this process is the point


def _wait_for(program: str, command: Sequence[str], environ: Mapping[str, str]) -> int:
    # Where a process cannot be replaced: Ctrl-C reaches both, and this one waits for the other's answer.
    child = subprocess.Popen(list(command), env=dict(environ))
    previous: Any = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGINT, previous)


_EXECUTE: dict[str, Execute] = {"posix": _replace, "nt": _wait_for}
