"""A request that several meters metered one after the other: its parts, and what becomes of one whose meter is gone."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.merging import merge_shares
from melodi_otel.attribution.meter import Key, Share
from melodi_otel.hub.client import HubClient
from melodi_otel.hub.wire import Told

Target = Ledger | HubClient


@dataclass(slots=True)
class Kept:
    """An open request: what to say of it once more to the next meter, and its parts in earlier ones."""

    key: Key
    t_ns: int
    told: dict[str, Any]
    target: Target
    children: list[str] = field(default_factory=list[str])
    tokens: int | None = None
    first_token_ns: int | None = None
    parts: list[Future[list[Share]]] = field(default_factory=list["Future[list[Share]]"])


@dataclass(slots=True)
class Orphan:
    """A part of a request whose meter is gone: until when it was there, and what that meter last acknowledged."""

    key: Key
    part: Future[list[Share]]
    open_ns: int
    end_ns: int
    acknowledged: list[Share]


def settle_orphans(orphans: Sequence[Orphan], resumed: Mapping[str, Told]) -> None:
    """Give every orphan what the next hub knows of it (``resumed``), else what was acknowledged."""
    once = dict(resumed)
    for orphan in orphans:
        # A request that was told to a hub that never answered has two parts here; only the first had any joules.
        told = once.pop(orphan.key.request, None)
        if told is not None and told.final:
            give(orphan.part, [keyed(share, orphan.key) for share in told.shares])
            continue
        shares = [keyed(share, orphan.key) for share in (told.shares if told else orphan.acknowledged)]
        give(orphan.part, closed_part(orphan.key, shares, orphan.end_ns))


def closed_part(key: Key, shares: Sequence[Share], end_ns: int) -> list[Share]:
    """``shares`` up to ``end_ns``, of which the last stretch is not known."""
    return [
        share
        if share.t1_ns >= end_ns
        else merge_shares(
            [share],
            [
                Share(key, share.device, share.t1_ns, end_ns, *([None] * 6), method=share.method,
                      quality="unavailable", coverage=0.0, concurrency=share.concurrency, final_ns=share.final_ns,
                      reason="no_samples")
            ],
        )[0]
        for share in shares
    ]  # fmt: skip


def keyed(share: Share, key: Key) -> Share:
    """The share under the name that the program gave the request."""
    return replace(share, key=key)


def give(future: Future[list[Share]], shares: list[Share]) -> None:
    """Resolve it, once."""
    if not future.done():
        future.set_result(shares)


def summed(parts: Sequence[Future[list[Share]]]) -> Future[list[Share]]:
    """The shares of a request that several meters metered one after the other."""
    whole: Future[list[Share]] = Future()
    lock = threading.Lock()
    left = [len(parts)]

    def done(_: Future[list[Share]]) -> None:
        with lock:
            left[0] -= 1
            if left[0]:
                return
        shares: list[Share] = []
        for part in parts:
            shares = merge_shares(shares, part.result())
        whole.set_result(shares)

    for part in parts:
        part.add_done_callback(done)
    return whole
