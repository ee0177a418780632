"""``melodi-otel``: the list of commands. Each lives in a file of its own and imports what it needs when it runs.

Exit codes that all commands share: 0 done, 1 it could not be done (the message says why), 2 wrong usage or a wrong
``MELODI_*`` value, 130 interrupted. What a command adds to them stands in its ``--help``.
"""

from __future__ import annotations

import logging
import sys

import typer

from melodi_otel import __version__
from melodi_otel.cli import agent, demo, deploy, doctor, record, replay, run, top
from melodi_otel.errors import ConfigError, MelodiError

app = typer.Typer(
    name="melodi-otel",
    help="Joules per LLM request, measured, attributed and told through OpenTelemetry.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

# Options of the command that is started belong to that command: `run python x.py --verbose` needs no quoting.
_PASS_ON = {"allow_interspersed_args": False, "ignore_unknown_options": True}

app.command(epilog=doctor.EXAMPLE)(doctor.doctor)
app.command(epilog=demo.EXAMPLE)(demo.demo)
app.command(epilog=top.EXAMPLE)(top.top)
app.command(epilog=run.EXAMPLE, context_settings=_PASS_ON)(run.run)
app.command(epilog=agent.EXAMPLE)(agent.agent)
app.command(epilog=record.EXAMPLE, context_settings=_PASS_ON)(record.record)
app.command(epilog=replay.EXAMPLE)(replay.replay)
app.command(epilog=deploy.EXAMPLE)(deploy.deploy)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what is done, to standard error."),
) -> None:
    """Options of every command."""
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, format="%(name)s: %(message)s")


def main() -> None:
    """Entry point of the script ``melodi-otel``."""
    try:
        app()
    except ConfigError as error:
        print(f"melodi-otel: {error}", file=sys.stderr)
        sys.exit(2)
    except MelodiError as error:
        print(f"melodi-otel: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
