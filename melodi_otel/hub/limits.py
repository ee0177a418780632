"""How much one program, or one user, may ask of a hub, and the count of what was refused."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Final, Literal

from melodi_otel.hub import wire

log = logging.getLogger("melodi_otel")

OPEN_LIMIT: Final = 10_000
"""Open requests per connection."""
ENGINE_LIMIT: Final = 256
"""Engines per connection."""
BIND_LIMIT: Final = 10_000
"""Ids that stand for open requests, per connection."""
MEMBER_LIMIT: Final = wire.ROWS
"""Sequences in the decode set of a lane: each of them costs the hub something at every step."""
LANE_LIMIT: Final = 1024
"""Lanes of a connection whose sets are counted; the one that was silent the longest is forgotten."""
BESIDE_LIMIT: Final = 1000
"""Others beside late work that are looked at: each costs something for each interval that the work ran in."""
NAME_LIMIT: Final = 1000
"""Combinations of model, provider, service, … of one user that the books and metrics tell apart; further ones are ``other``."""
OTHER: Final = "other"

Refusal = Literal["malformed", "version", "greeting", "replayed", "foreign", "too_many"]


class Refusals:
    """Counts of what was refused, and one line in the log for each kind and user."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._said: set[tuple[str, int | None]] = set()

    def __call__(self, kind: Refusal, uid: int | None, text: str) -> None:
        self.counts[kind] += 1
        if (kind, uid) not in self._said and len(self._said) < 1000:
            self._said.add((kind, uid))
            log.warning("hub: refused from user %s: %s (%s; said once)", "?" if uid is None else uid, text, kind)


class Names:
    """The metric identities of one user: so many that a program which makes one up per request cannot fill the books."""

    def __init__(self, limit: int = NAME_LIMIT) -> None:
        self._limit = limit
        self._seen: set[tuple[str | None, ...]] = set()

    def __call__(self, *names: str | None) -> bool:
        """Whether there is room for this combination."""
        if names not in self._seen:
            if len(self._seen) >= self._limit:
                return False
            self._seen.add(names)
        return True
