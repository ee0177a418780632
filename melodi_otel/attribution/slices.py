"""Cells for requests without steps: what can be said of an interval from token counters, phases, or times alone.

A bin is one sensor interval. The number of steps in it is taken as the most decode tokens any request made (at least one
while a prompt is computed); each request's part of the fixed cost is its participation in those steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from melodi_otel.attribution.activity import Activity
from melodi_otel.attribution.meter import Tier
from melodi_otel.attribution.settle import Cell, Row
from melodi_otel.attribution.weights import Theta, decode_weight

PREFILL_CHUNK_TOKENS = 2048
"""Prompt tokens that a step computes at most, for counting the steps of a long prompt."""


def tier_of(activity: Activity) -> Tier:
    """The evidence there is for a request without steps."""
    if activity.counted:
        return "slice"
    if activity.first_token_ns is not None:
        return "phase"
    if activity.prompt_tokens is not None or activity.output_tokens is not None:
        return "window"
    return "equal"


def slice_cells(
    device: str,
    members: Sequence[tuple[Activity, list[tuple[int, int]]]],
    theta: Theta,
    tokens_per_s: float,
    limit: Tier | None = None,
) -> list[Cell]:
    """Cells of one engine's requests in one interval.

    Args:
        device: whose interval it is.
        members: requests with the parts of the interval in which they own device time.
        theta: cost coefficients of the engine.
        tokens_per_s: speed of prefill to assume where the first token is not known yet.
        limit: use no better evidence than this tier.
    """
    bins: list[tuple[Activity, list[tuple[int, int]], Tier, float, float, float]] = []
    for activity, segments in members:
        tier = _worse(tier_of(activity), limit)
        start, stop = segments[0][0], segments[-1][1]
        if tier == "equal":
            bins.append((activity, segments, tier, 0.0, 0.0, 0.0))
            continue
        prefill = activity.prefill_in(device, start, stop, tokens_per_s)
        activity.prefill_charged[device] = activity.prefill_charged.get(device, 0.0) + prefill
        decode = max(0.0, activity.tokens_at(stop) - activity.tokens_at(start))
        bins.append(
            (activity, segments, tier, prefill, decode, _prefill_part(activity, start, stop, prefill, tokens_per_s))
        )
    steps = max((decode for *_, decode, _ in bins), default=0.0)
    steps = max(steps, max((prefill / PREFILL_CHUNK_TOKENS for _, _, _, prefill, _, _ in bins), default=0.0))
    if any(prefill > 0.0 for _, _, _, prefill, _, _ in bins):
        steps = max(steps, 1.0)
    taking = sum(max(decode, part * steps) for *_, decode, part in bins) or 1.0
    cells: list[Cell] = []
    for activity, segments, tier, prefill, decode, part in bins:
        row = Row(activity, activity.rows)
        if prefill > 0.0 or decode > 0.0:
            context = activity.computed_prompt + (activity.cached_tokens or 0) + activity.tokens_at(segments[0][0])
            fixed = theta.fixed * steps * max(decode, part * steps) / taking
            to_prefill = fixed * (part if decode > 0.0 else 1.0)
            own_prefill = theta.prefill * prefill + theta.attention * prefill * activity.computed_prompt / 2.0
            own_decode = decode_weight(theta, 1.0, context) * decode
            if tier == "window":
                row.unsplit = fixed + own_prefill + own_decode
            else:
                row.prefill = own_prefill + (to_prefill if prefill > 0.0 else 0.0)
                row.decode = own_decode + (fixed - to_prefill if prefill > 0.0 else fixed)
        elif tier in ("equal", "window"):
            row.unknown = "unsplit"
        elif tier == "phase":
            row.unknown = "decode"
        cells += _spread(row, tier, segments)
    return cells


def _worse(tier: Tier, limit: Tier | None) -> Tier:
    order: list[Tier] = ["slice", "phase", "window", "equal"]
    if limit is None or limit not in order:
        return tier
    return order[max(order.index(tier), order.index(limit))]


def _prefill_part(activity: Activity, start: int, stop: int, prefill: float, tokens_per_s: float) -> float:
    if prefill <= 0.0:
        return 0.0
    if activity.first_token_ns is not None:
        return max(0.0, min(1.0, (activity.first_token_ns - start) / (stop - start)))
    return min(1.0, prefill / (tokens_per_s * (stop - start) / 1e9))


def _spread(row: Row, tier: Tier, segments: Sequence[tuple[int, int]]) -> list[Cell]:
    if len(segments) == 1:
        return [Cell(*segments[0], tier, [row])]
    whole = sum(b - a for a, b in segments)
    cells: list[Cell] = []
    for a, b in segments:
        part = (b - a) / whole
        weights = (row.prefill * part, row.decode * part, row.unsplit * part)
        cells.append(Cell(a, b, tier, [Row(row.activity, row.participants, *weights, row.unknown)]))
    return cells
