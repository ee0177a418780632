"""What answers are promised of their joules, here or by the hub that meters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Key, Share
from melodi_otel.hub.client import HubClient
from melodi_otel.telemetry.answers import Answers


class Promises(Answers):
    """The figures of this program's answers; those that a hub meters stand on the hub's page.

    Args:
        ledger: of this program.
        hub: the hub in use, or None.
    """

    def __init__(self, ledger: Callable[[], Ledger], hub: Callable[[], HubClient | None]) -> None:
        super().__init__()
        self._ledger = ledger
        self._hub = hub

    def promised(self, answer: str, user: int | None = None) -> None:
        """One more request belongs to this answer."""
        hub = self._hub()
        if hub is None:
            super().promised(answer, user)
        else:
            hub.promise(answer)

    def accrued(self, key: Key) -> Sequence[Share]:
        """Provisional shares of a request that is not settled; of one that has moved to another meter nobody knows the sum."""
        hub = self._hub()
        return self._ledger().accrued().get(key, ()) if hub is None else hub.so_far(key)
