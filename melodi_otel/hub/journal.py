"""What survives the death of a hub: its books, and what it has promised and not delivered.

The hub writes the journal before it tells anybody anything, so what programs know is always in it: the next hub goes on from
there, and no joule is told twice. A whole new file is moved over the old one each time. Nothing is forced to the disk: it has
to outlive a killed process, not a lost machine, after which monotonic time starts anew and the journal means nothing.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from melodi_otel.attribution.meter import Share
from melodi_otel.attribution.state import State

log = logging.getLogger("melodi_otel")

FORMAT: Final = 2
FRESH_S: Final = 600.0
"""An older journal is not gone on from: what happened since would be one huge gap."""


class Promise(msgspec.Struct, array_like=True, frozen=True):
    """Joules of a request whose arrival nobody has acknowledged yet.

    ``final``: they are; else what it had accrued in a hub before, and nobody has asked for.
    """

    group: str
    request: str
    shares: list[Share]
    final: bool = True


class Page(msgspec.Struct, frozen=True):
    """The content of a journal.

    Attributes:
        format: :data:`FORMAT`.
        boot: of which start of the machine.
        hub: the name of these books.
        t_ns: monotonic time of writing.
        state: the books.
        promises: not acknowledged.
    """

    format: int
    boot: str
    hub: str
    t_ns: int
    state: State
    promises: list[Promise]


class _About(msgspec.Struct, frozen=True):
    """Of a page, what is the same in every format."""

    format: int
    boot: str
    t_ns: int


class Journal:
    """One file.

    Args:
        path: where; None: nothing is kept.
        boot: names this start of the machine.
        now: monotonic ns.
    """

    def __init__(self, path: Path | None, boot: str | None = None, now: Callable[[], int] = time.monotonic_ns) -> None:
        self._path = path
        self._boot = boot_id() if boot is None else boot
        self._now = now
        self._encode: Final = msgspec.msgpack.Encoder().encode
        self._said = False
        self.failures = 0

    def load(self) -> Page | None:
        """What the hub before this one left; None where there is nothing to go on from. Never raises."""
        if self._path is None:
            return None
        try:
            raw = self._path.read_bytes()
        except OSError:
            return None
        try:
            about = msgspec.msgpack.decode(raw, type=_About)
            if about.format != FORMAT or about.boot != self._boot or not 0 <= self._now() - about.t_ns <= FRESH_S * 1e9:
                log.info("the journal %s is of another start or too old; the books start anew", self._path)
                return None
            return msgspec.msgpack.decode(raw, type=Page)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError):
            log.warning("the journal %s cannot be read and is not used; the books start anew", self._path)
            return None

    def save(self, hub: str, state: State, promises: list[Promise]) -> bool:
        """Replace the journal; whether that worked. Never raises.

        Where it did not, an older one is removed: books that go on from a wrong page would count joules twice.
        """
        if self._path is None:
            return False
        page = Page(FORMAT, self._boot, hub, self._now(), state, promises)
        beside = self._path.with_name(self._path.name + ".new")
        try:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(self._encode(page))
            beside.replace(self._path)
        except OSError as error:
            self._failed(error)
            return False
        if self._said:
            self._said = False
            log.info("the journal %s is written again", self._path)
        return True

    def remove(self) -> None:
        """Leave nothing behind; never raises."""
        if self._path is not None:
            for path in (self._path, self._path.with_name(self._path.name + ".new")):
                try:
                    path.unlink(missing_ok=True)
                except OSError:
                    log.debug("%s cannot be removed", path, exc_info=True)

    def _failed(self, error: OSError) -> None:
        self.failures += 1
        self.remove()
        if not self._said:
            self._said = True
            log.warning(
                "the journal %s cannot be written (%s); metering goes on, but if this hub is killed its books start anew",
                self._path,
                error.strerror or error,
            )


def boot_id(procfs: str = "/proc") -> str:
    """A name of this start of the machine; empty where the system has none."""
    try:
        return Path(procfs, "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
