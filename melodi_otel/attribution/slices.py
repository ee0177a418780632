"""Cells for requests without steps: what can be said of an interval from token counters, phases, or times alone.

A bin is one sensor interval. The number of steps in it is taken as the most decode tokens any request made (at least one
while a prompt is computed); each request's part of the fixed cost is its participation in those steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from melodi_otel.attribution.activity import Activity
from melodi_otel.attribution.meter import Tier
from melodi_otel.attribution.settle import Cell, Row
from melodi_otel.attribution.weights import Theta

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
    did: list[float] | None = None,
) -> list[Cell]:
    """Cells of one engine's requests in one interval.

    Args:
        device: whose interval it is.
        members: requests with the parts of the interval in which they own device time.
        theta: cost coefficients of the engine.
        tokens_per_s: speed of prefill to assume where the first token is not known yet.
        limit: use no better evidence than this tier.
        did: gets the features of all that was done (:class:`melodi_otel.attribution.weights.Features`).
    """
    # (activity, segments, tier, prompt tokens, output tokens, part of the time with the prompt, context)
    bins: list[tuple[Activity, list[tuple[int, int]], Tier, float, float, float, float]] = []
    steps = 0.0
    for activity, segments in members:
        tier = tier_of(activity) if limit is None else _worse(tier_of(activity), limit)
        if tier == "equal":
            bins.append((activity, segments, tier, 0.0, 0.0, 0.0, 0.0))
            continue
        start, stop = segments[0][0], segments[-1][1]
        before = activity.tokens_at(start)
        decode = activity.tokens_at(stop) - before
        if decode < 0.0:
            decode = 0.0
        elif decode > steps:
            steps = decode
        prompt = prefill = part = 0.0
        if activity.prompt_tokens:
            prompt = activity.computed_prompt
            charged = activity.prefill_charged.get(device, 0.0)
            if charged < prompt:
                prefill = activity.prefill_in(device, start, stop, tokens_per_s)
                if prefill > 0.0:
                    activity.prefill_charged[device] = charged + prefill
                    part = _prefill_part(activity, start, stop, prefill, tokens_per_s)
                    steps = max(steps, prefill / PREFILL_CHUNK_TOKENS, 1.0)
        bins.append((activity, segments, tier, prefill, decode, part, prompt + (activity.cached_tokens or 0) + before))
    takes = [max(decode, part * steps) for *_, decode, part, _ in bins]
    # Steps that hold a prompt's chunk cost otherwise than those that only decode.
    mixed = min(1.0, max((part for *_, part, _ in bins), default=0.0))
    all_fixed = (theta.fixed * (1.0 - mixed) + theta.fixed_prefill * mixed) * steps
    if did is not None:
        did[0] += steps * (1.0 - mixed)
        did[5] += steps * mixed
    taking = sum(takes) or 1.0
    cells: list[Cell] = []
    for (activity, segments, tier, prefill, decode, part, context), take in zip(bins, takes, strict=True):
        row = Row(activity, activity.rows)
        if prefill > 0.0 or decode > 0.0:
            fixed = all_fixed * take / taking
            own_decode = (theta.decode + theta.cache * context) * decode
            own_prefill = 0.0
            if did is not None:
                did[1] += decode
                did[2] += prefill
                did[3] += context * decode
                did[4] += prefill * activity.computed_prompt / 2.0
            if prefill > 0.0:
                own_prefill = theta.prefill * prefill + theta.attention * prefill * activity.computed_prompt / 2.0
            if tier == "window":
                row.unsplit = fixed + own_prefill + own_decode
            elif prefill > 0.0:
                to_prefill = fixed * (part if decode > 0.0 else 1.0)
                row.prefill = own_prefill + to_prefill
                row.decode = own_decode + (fixed - to_prefill)
            else:
                row.decode = own_decode + fixed
        elif tier in ("equal", "window"):
            row.unknown = "unsplit"
        elif tier == "phase":
            row.unknown = "decode"
        if len(segments) == 1:
            start, stop = segments[0]
            cells.append(Cell(start, stop, tier, (row,)))
            continue
        whole = sum(b - a for a, b in segments)
        cells += [Cell(a, b, tier, (row,), (b - a) / whole) for a, b in segments]
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
