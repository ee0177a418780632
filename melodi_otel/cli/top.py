"""``melodi-otel top``: what the meter of this machine shows now, live in the terminal."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import typer

from melodi_otel.cli.top_places import Access, Finder, NoStatus, Place, by_http, first, http_places, hub_places

EXAMPLE = "Example: melodi-otel top --once --json"

FINDERS: list[Finder] = [hub_places]
"""Places that are asked before those of HTTP."""

Wait = Callable[[float], str | None]
"""Waits so many seconds for a key; the key, or None."""

_FEW: Final = 5
"""Requests that shall be seen, if something else has to be shortened for that."""
_LEAVE: Final = {"q", "Q", "\x03", "\x04", "\x1b"}


def top(
    url: str = typer.Option("", "--url", help="Ask this endpoint, e.g. http://HOST:9464, instead of looking for one."),
    once: bool = typer.Option(False, "--once", help="Show it once and end."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object per status on standard output, for programs."),
    interval: float = typer.Option(2.0, "--interval", min=0.5, max=60.0, help="Seconds between two looks."),
    user: str = typer.Option(
        "", "--user", help="User of the endpoint; the password is asked for, or read from standard input."
    ),
    cafile: str = typer.Option("", "--cafile", help="PEM file with the CA of an https endpoint."),
    cert: str = typer.Option(
        "", "--cert", help="PEM file with our certificate and key, where the endpoint asks for one."
    ),
) -> None:
    """Show devices, open requests with their joules so far, joules per token, and where every joule went.

    Keys: q ends. Without a terminal that can be drawn on, it shows the status once.

    Exit codes: 0 it was shown, 1 no meter answered (the message says where was looked).
    """
    from melodi_otel.results.terminal import console

    password = None
    if user:
        password = (
            typer.prompt("Password", hide_input=True, err=True)
            if sys.stdin.isatty()
            else sys.stdin.readline().rstrip("\r\n")
        )
    access = Access(user or None, password, cafile or None, cert or None)
    try:
        places = [by_http(url, access)] if url else _places(os.environ, access)
        place, status = first(places)
        if as_json:
            _print(place, status, None if once else interval)
            return
        screen = console()
        # A dumb terminal cannot move its cursor, a pipe has none: a picture that moves would be a heap of lines there.
        if once or not screen.is_terminal or screen.is_dumb_terminal:
            from melodi_otel.cli.top_view import WIDEST, view

            _say_what_it_can(sys.stdout)
            screen.print(view(status, min(screen.width, WIDEST), where=place.name), width=min(screen.width, WIDEST))
            return
        with keys() as wait:
            live(screen, lambda: first(places), place, status, interval, wait)
    except NoStatus as error:
        print(f"melodi-otel top: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        return  # the way to leave it
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - whoever read has gone; nothing to flush
        return


def live(
    screen: Any,
    look: Callable[[], tuple[Place, Mapping[str, Any]]],
    place: Place,
    status: Mapping[str, Any],
    interval: float,
    wait: Wait,
    monotonic_s: Callable[[], float] = time.monotonic,
) -> None:
    """Draw until somebody leaves. While nothing answers, the last figures stay, with how old they are and why.

    Args:
        screen: the console to draw on.
        look: finds a meter and asks it; raises NoStatus.
        place, status: what was found first.
        interval: seconds between two looks.
        wait: waits for a key.
        monotonic_s: a clock in seconds.
    """
    from rich.constrain import Constrain
    from rich.live import Live

    from melodi_otel.cli.top_view import WIDEST, view

    seen_s, stale = monotonic_s(), ""
    with Live(console=screen, screen=True, auto_refresh=False, vertical_overflow="crop") as drawing:
        while True:
            width = min(screen.width, WIDEST)
            options = screen.options.update(width=width, height=None)
            about: dict[str, Any] = {"where": place.name, "stale": stale}
            for compact in (False, True):
                # With one request the rest takes so many lines; what is left of the screen is for the others.
                one = view(status, width, rows=1, compact=compact, **about)
                rows = screen.height - len(screen.render_lines(one, options, pad=False)) + 1
                if rows >= _FEW:
                    break
            shown = view(status, width, rows=rows, compact=compact, **about)
            drawing.update(Constrain(shown, width), refresh=True)
            if wait(interval) in _LEAVE:
                return
            try:
                place, status = look()
                seen_s, stale = monotonic_s(), ""
            except NoStatus:
                stale = f"stale: no answer for {monotonic_s() - seen_s:.0f} s; asked again every {interval:g} s"


@contextmanager
def keys() -> Generator[Wait]:
    """Keys as they are pressed, without Enter; the terminal is as before when it is left."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    with _posix_keys() if os.name == "posix" else _windows_keys() as wait:
        yield wait


def _sleep(seconds: float) -> str | None:
    time.sleep(seconds)
    return None


def _posix_keys() -> AbstractContextManager[Wait]:
    import select
    import termios
    import tty

    @contextmanager
    def reading() -> Generator[Wait]:
        stdin = sys.stdin.fileno()
        before = termios.tcgetattr(stdin)

        def wait(seconds: float) -> str | None:
            ready, _, _ = select.select([stdin], [], [], seconds)
            return os.read(stdin, 1).decode("latin-1") if ready else None

        try:
            tty.setcbreak(stdin)  # not raw: ctrl-c stays a signal
            yield wait
        finally:
            termios.tcsetattr(stdin, termios.TCSADRAIN, before)

    return reading()


def _windows_keys() -> AbstractContextManager[Wait]:
    @contextmanager
    def reading() -> Generator[Wait]:
        from importlib import import_module

        console: Any = import_module("msvcrt")

        def wait(seconds: float) -> str | None:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if console.kbhit():
                    return str(console.getwch())
                time.sleep(0.05)
            return None

        yield wait

    return reading()


def _say_what_it_can(stream: Any) -> None:
    """A stream that is not UTF-8 gets a question mark where it has no such sign, instead of an error."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def _places(environ: Mapping[str, str], access: Access) -> list[Place]:
    return [*(place for finder in FINDERS for place in finder(environ)), *http_places(environ, access)]


def _print(place: Place, status: Mapping[str, Any], interval: float | None) -> None:
    """One line of JSON, or one per interval until it is interrupted or the place is silent."""
    print(json.dumps(status, indent=2 if interval is None else None), flush=True)
    while interval is not None:
        time.sleep(interval)
        try:
            status = place.read()
        except OSError as error:
            raise NoStatus(f"{place.name}: {error.strerror or error}") from None
        except NoStatus as error:
            raise NoStatus(f"{place.name}: {error}") from None
        print(json.dumps(status), flush=True)
