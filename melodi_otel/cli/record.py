"""``melodi-otel record -- CMD``: write down what the meter saw, for ``replay``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from melodi_otel.cli.run import start
from melodi_otel.errors import MissingDependency

EXAMPLE = "Example: melodi-otel record --out tea.jsonl -- python generate.py"


def record(
    command: list[str] = typer.Argument(..., metavar="CMD…", help="The program and its arguments."),
    out: Path = typer.Option(
        Path("trace.jsonl"), "--out", "-o", metavar="FILE", help="The trace; .gz and .zst are packed."
    ),
) -> None:
    """Run a program with the meter on and record the trace of its requests, steps and samples.

    Exit code and signals are those of CMD; 127: it was not found, 126: it cannot be executed, 1: FILE cannot be written.
    """
    from melodi_otel.trace import packing

    path = out.absolute()
    try:
        packing.packer(packing.suffix(path) or ".gz")
    except MissingDependency as error:
        print(f"melodi-otel: {path} cannot be written: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        print(f"melodi-otel: {path} cannot be written", file=sys.stderr)
        raise typer.Exit(1)
    raise typer.Exit(start(command, os.environ, {"MELODI_RECORD": str(path)}))
