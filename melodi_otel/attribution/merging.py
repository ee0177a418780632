"""One request, metered by two ledgers one after the other: its shares joined.

A request outlives the ledger that meters it: a hub is killed and another continues, or a better one is found. The client keeps
what the first has accrued for it and adds what the second gives. Joules add up, and never get lost; the time that neither
covered lowers the coverage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from melodi_otel.attribution.meter import Quality, Reason, Share, Tier
from melodi_otel.attribution.summary import FULL_COVERAGE, QUALITIES, TIERS


def merge_shares(first: Sequence[Share], second: Sequence[Share]) -> list[Share]:
    """Join what two ledgers say of one request, per device; ``first`` was there earlier.

    A device that only one of them knows keeps its share. Else:

    - joules and their parts are added; a part that one of two known shares cannot tell is not known. Where one has no joules
      the other's stand, and the quality is at best ``partial``.
    - ``[t0_ns, t1_ns]`` spans both; ``coverage`` is the covered time of both as a part of it, so a gap between them lowers it,
      and below 0.99 the quality is at best ``partial``, with the reason ``no_samples`` where neither has another.
    - uncertainties add in squares; the method is the least exact that holds 5 % of the joules; the quality is the worst;
      ``concurrency`` is the mean over the covered time; ``exclusive`` is known only where both know it, or one says no.
    """
    later = {share.device: share for share in second}
    merged = [_merge(share, later.pop(share.device)) if share.device in later else share for share in first]
    return [*merged, *later.values()]


def _merge(a: Share, b: Share) -> Share:
    known = [share for share in (a, b) if share.joules is not None]
    t0, t1 = min(a.t0_ns, b.t0_ns), max(a.t1_ns, b.t1_ns)
    covered = [share.coverage * (share.t1_ns - share.t0_ns) for share in (a, b)]
    coverage = min(1.0, math.fsum(covered) / (t1 - t0)) if t1 > t0 else min(a.coverage, b.coverage)
    quality: Quality = QUALITIES[max((QUALITIES.index(share.quality) for share in known), default=-1)]
    reasons: list[Reason] = [share.reason for share in (a, b) if share.reason]
    reasons.sort(key=lambda reason: reason == "no_samples")
    reason = reasons[0] if reasons else None
    if known and (len(known) < 2 or coverage < FULL_COVERAGE):
        quality = QUALITIES[max(QUALITIES.index(quality), QUALITIES.index("partial"))]
        reason = reason or "no_samples"
    exclusive = {a.exclusive, b.exclusive}
    return Share(
        key=a.key,
        device=a.device,
        t0_ns=t0,
        t1_ns=t1,
        joules=_sum([share.joules for share in known]),
        dynamic=_part([share.dynamic for share in known if share.joules != 0.0]),
        static=_part([share.static for share in known if share.joules != 0.0]),
        prefill=_part([share.prefill for share in known if share.dynamic != 0.0]),
        decode=_part([share.decode for share in known if share.dynamic != 0.0]),
        uncertainty=_uncertainty(known),
        method=_method(known or (a, b)),
        quality=quality,
        coverage=coverage,
        concurrency=_mean([a.concurrency, b.concurrency], covered),
        final_ns=max(a.final_ns, b.final_ns),
        reason=reason,
        exclusive=False if False in exclusive else None if None in exclusive else True,
        rollup=_sum([share.rollup for share in (a, b) if share.rollup is not None]),
    )


def _sum(values: Sequence[float | None]) -> float | None:
    return math.fsum(value or 0.0 for value in values) if values else None


def _part(values: Sequence[float | None]) -> float | None:
    # Given for shares that have something to split: one that cannot tell leaves the sum of the part unknown.
    return None if None in values else _sum(values)


def _uncertainty(known: Sequence[Share]) -> float | None:
    sigmas = [share.uncertainty for share in known if share.uncertainty is not None]
    return math.sqrt(math.fsum(sigma**2 for sigma in sigmas)) if sigmas else None


def _method(shares: Sequence[Share]) -> Tier:
    total = math.fsum(abs(share.joules or 0.0) for share in shares)
    return TIERS[max(TIERS.index(share.method) for share in shares if abs(share.joules or 0.0) >= 0.05 * total)]


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = math.fsum(weights)
    if total <= 0.0:
        return max(values)
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / total
