"""Errors of ours: said once per place, never raised into the host program."""

from __future__ import annotations

import logging

log = logging.getLogger("melodi_otel")


class Complaints:
    """Logs the first error of every place of one object.

    Args:
        who: whose errors these are, as a person would call it.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._said: set[str] = set()

    def __call__(self, where: str, error: BaseException) -> None:
        """``where`` failed with ``error``."""
        if self.first(where):
            log.warning("%s: %s failed; the application is not affected (said once)", self._who, where, exc_info=error)

    def first(self, where: str) -> bool:
        """Whether ``where`` complains for the first time."""
        if where in self._said:
            return False
        self._said.add(where)
        return True
