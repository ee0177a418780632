"""A request that several meters metered one after the other: its parts, and what becomes of one whose meter is gone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.merging import merge_shares
from melodi_otel.attribution.meter import Key, Share
from melodi_otel.hub import fitting
from melodi_otel.hub.client import HubClient, give
from melodi_otel.hub.pending import Since
from melodi_otel.hub.wire import Told

log = logging.getLogger("melodi_otel")

Target = Ledger | HubClient


class Places(Protocol):
    """Where meters are. Called off the request's thread."""

    def above(self, client: HubClient | None) -> Callable[[], Any] | None:
        """How to connect to a hub above this one (None: above the ledger in the process), or None; quick."""

    def after(self, client: HubClient, why: str) -> Callable[[], Any] | None:
        """How to connect to what takes the place of a hub that is gone; None: the ledger in the process."""


@dataclass(slots=True)
class Kept:
    """An open request: what to say of it once more to the next meter, and its parts in earlier ones.

    A meter may get it back before it has settled the part that it had, so each part has a name of its own (``at``); steps go
    on naming the first.
    """

    key: Key
    t_ns: int
    told: dict[str, Any]
    target: Target
    at: Key
    children: list[str] = field(default_factory=list[str])
    tokens: int | None = None
    first_token_ns: int | None = None
    parts: list[Future[list[Share]]] = field(default_factory=list["Future[list[Share]]"])

    @property
    def since(self) -> Since:
        """When it began, and its accelerators."""
        return Since(self.t_ns, self.told["devices"])

    def ask(self) -> None:
        """Ask how far it is, and for its steps: what it did until a move belongs to the meter that it leaves."""
        probe = self.told["probe"]
        try:
            tokens = None if probe is None else fitting.count(probe())
        except Exception:
            log.debug("melodi_otel: a probe failed", exc_info=True)
            return
        if tokens is not None:
            self.tokens = max(tokens, self.tokens or 0)

    def move(self, target: Target, t_ns: int, parent: Key | None) -> None:
        """Tell ``target`` of it, from ``t_ns`` on; ``parent``: what the request around it is called there."""
        since_ns = max(t_ns, self.t_ns)
        told: dict[str, Any] = {**self.told, "parent": parent}
        self.at = Key(self.key.group, f"{self.key.request}~{len(self.parts)}")
        began = bool(self.tokens or self.first_token_ns)
        if told["prompt_tokens"] is not None and began:
            told["cached_tokens"] = told["prompt_tokens"]  # it has been computed, and charged, before
        self.target = target
        target.open(self.at, since_ns, **told)
        for child in self.children or [self.key.request]:
            target.bind(self.at, child)
        if self.tokens is not None:
            target.progress(self.at, since_ns, self.tokens, first_token_ns=since_ns if began else None)


@dataclass(slots=True)
class Orphan:
    """A part of a request whose meter is gone: until when it was there, what that meter last acknowledged, and the shares to
    give where nobody knows anything of it: they make the gap visible.
    """

    key: Key
    part: Future[list[Share]]
    end_ns: int
    acknowledged: list[Share]
    unknown: list[Share]


def orphans_of(client: HubClient, open_now: Iterable[Kept], t_ns: int) -> list[Orphan]:
    """What ``client``, gone at ``t_ns``, owed, and the parts in it of requests that are still open."""
    found = [
        Orphan(
            pending.key,
            pending.future,
            pending.close_ns,
            shares,
            client.unknown(pending.key, pending.opened, pending.close_ns, "no_samples"),
        )
        for pending, shares in client.give_up()
    ]
    for kept in open_now:
        if kept.target is client:
            part: Future[list[Share]] = Future()
            kept.parts.append(part)
            unknown = client.unknown(kept.at, client.since(kept.at, kept.since), t_ns, "no_samples")
            found.append(Orphan(kept.at, part, t_ns, client.so_far(kept.at), unknown))
    return found


def settle_orphans(orphans: Sequence[Orphan], resumed: Mapping[str, Told]) -> None:
    """Give every orphan what the next hub knows of it (``resumed``), else what was acknowledged."""
    once = dict(resumed)
    for orphan in orphans:
        told = once.pop(fitting.name(orphan.key.request), None)
        if told is not None and told.final:
            give(orphan.part, [keyed(share, orphan.key) for share in told.shares])
            continue
        shares = [keyed(share, orphan.key) for share in (told.shares if told else orphan.acknowledged)]
        give(orphan.part, closed_part(orphan.key, shares, orphan.end_ns) or orphan.unknown)


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


def known(shares: list[Share]) -> Future[list[Share]]:
    """Shares that nobody has to wait for."""
    future: Future[list[Share]] = Future()
    future.set_result(shares)
    return future


def summed(key: Key, parts: Sequence[Future[list[Share]]]) -> Future[list[Share]]:
    """The shares of the request ``key``, that several meters metered one after the other."""
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
            try:
                shares = merge_shares(shares, part.result())
            except Exception:  # whoever waits for the sum must get one
                log.exception("melodi_otel: a part of a request's joules is lost")
        give(whole, [keyed(share, key) for share in shares])

    for part in parts:
        part.add_done_callback(done)
    return whole
