"""Failures of our own while vLLM serves: told once, never raised."""

from __future__ import annotations

import logging

log = logging.getLogger("melodi_otel")


class Complaints:
    """The first failure of a kind is a warning, the rest are debug lines."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def about(self, what: str) -> None:
        """Log the exception being handled."""
        level = logging.DEBUG if what in self._said else logging.WARNING
        self._said.add(what)
        log.log(level, "melodi_otel, vLLM: %s; the server goes on", what, exc_info=True)
