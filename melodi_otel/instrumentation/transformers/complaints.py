"""Failures of our own while a program generates: told once, never raised."""

from __future__ import annotations

import logging

log = logging.getLogger("melodi_otel")


class Complaints:
    """The first failure is a warning, the rest are debug lines."""

    def __init__(self) -> None:
        self._said = False

    def about(self, what: str) -> None:
        """Log the exception being handled."""
        level = logging.DEBUG if self._said else logging.WARNING
        self._said = True
        log.log(level, "transformers instrumentation: %s failed; the program's own call goes on", what, exc_info=True)
