"""From what a request has accrued to its shares: method, quality, coverage, uncertainty, and why they are what they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Final

from melodi_otel.attribution.account import Account
from melodi_otel.attribution.activity import Accrual, Activity
from melodi_otel.attribution.engines import EngineState
from melodi_otel.attribution.meter import Key, Quality, Reason, Share, Tier
from melodi_otel.attribution.riding import reckon
from melodi_otel.attribution.slices import tier_of
from melodi_otel.attribution.state import Known, SoFar, State
from melodi_otel.attribution.summary import FULL_COVERAGE, TIERS
from melodi_otel.attribution.uncertainty import share_sigma

WIDE: Final = 0.25
"""A share whose 1 sigma is above this part of it is called interpolated at best."""
_PUT: Final[Mapping[str, Callable[[Share, Any], None]]] = {
    field.name: vars(Share)[field.name].__set__ for field in fields(Share)
}
_SHAPED: Final[frozenset[Tier]] = frozenset(("exclusive", "step"))
_EXACT: Final[tuple[Tier, ...]] = ("exclusive", "step", "slice", "process")


def shares_of(
    activity: Activity, accounts: Mapping[str, Account], now_ns: int, engine: EngineState | None
) -> list[Share]:
    """One share per device of ``activity``, which has ended."""
    end = activity.close_ns or activity.open_ns
    reckon(activity)
    seen = _seen(activity, accounts, engine)
    mine = [accounts[name] for name in activity.charged() if name in accounts]
    return [made(_facts(activity, account, end, now_ns, seen), account.known()) for account in mine]


def so_far(activity: Activity, accounts: Mapping[str, Account], engine: EngineState | None) -> list[SoFar]:
    """What ``activity`` has accrued, per device on which an interval has closed since its opening.

    :func:`made` into shares, the same figures as :func:`shares_of` would give if it had ended when the device's books were
    closed last: ``t1_ns`` is that time, or its end where that is earlier, and ``coverage`` is of the time up to it.
    ``final_ns`` is the time up to which the books are closed. Work that is reported late has accrued nothing before it
    settles.
    """
    if activity.late is not None:
        return []
    reckon(activity)
    seen = _seen(activity, accounts, engine)
    found: list[SoFar] = []
    for name in activity.charged():
        account = accounts.get(name)
        if account is None or account.closed_until is None:
            continue
        until = account.closed_until
        if until <= activity.open_ns and name not in activity.accruals:
            continue
        end = max(activity.open_ns, until if activity.close_ns is None else min(activity.close_ns, until))
        found.append(_facts(activity, account, end, until, seen))
    return found


def accrued_in(state: State) -> dict[Key, list[Share]]:
    """The shares so far of the requests that were under way when ``state`` was made."""
    known = {one.device.id: one.known for one in state.devices}
    found: dict[Key, list[Share]] = {}
    for one in state.accrued:
        if one.device in known:
            found.setdefault(one.key, []).append(made(one, known[one.device]))
    return found


def _seen(activity: Activity, accounts: Mapping[str, Account], engine: EngineState | None) -> float:
    # A group larger than what is seen here (several nodes): the GPUs that are seen are part of what the request used.
    world = engine.world if engine else None
    if not world:
        return 1.0
    gpus = sum(accounts[name].device.type == "gpu" for name in activity.on() if name in accounts)
    return min(1.0, gpus / world) if gpus else 1.0


def rollup(activity: Activity, device: str) -> float:
    """J of a request and of all that are nested in it."""
    reckon(activity)
    own = activity.accruals.get(device)
    return (own.joules if own else 0.0) + sum(rollup(child, device) for child in activity.nested)


_NOTHING: Final = Accrual()
_DUST_J: Final = 1e-12
"""What sums of parts leave of nothing."""


def _facts(activity: Activity, account: Account, end: int, now_ns: int, seen: float) -> SoFar:
    open_ns = activity.open_ns
    device = account.device
    name = device.id
    coverage = min(1.0, account.coverage(open_ns, end))
    late = activity.late is not None
    if late and end > open_ns:
        # Where others were told of everything, it is not known what this request used.
        held = activity.late_covered_ns.get(name, 0.0) / (end - open_ns)
        coverage = min(coverage, held)
    accrual = activity.accruals.get(name)
    exclusive = True if account.cpu.series else account.foreign.exclusive(open_ns, end) if account.foreign else None
    known = accrual or _NOTHING
    return SoFar(
        activity.key,
        name,
        open_ns,
        end,
        now_ns,
        coverage,
        seen if device.type == "gpu" else 1.0,
        bool(account.lost) and account.had_reset(open_ns, end),
        exclusive,
        late,
        activity.assumed,
        activity.last_step_ns is not None,
        tier_of(activity),
        sum(rollup(child, name) for child in activity.nested) if activity.nested else None,
        accrual is not None,
        known.prefill,
        known.decode,
        known.unsplit,
        known.static,
        known.shared.copy(),
        known.tiers.copy(),
        known.busy_ns,
        known.company_ns,
        known.intervals,
        known.interval_ns,
        known.foreign,
        known.unbased,
        activity.reason,
        known.spread,
        known.unfit,
        known.tilt,
    )


def made(it: SoFar, known: Known) -> Share:
    """The share of what was accrued."""
    dynamic = it.prefill + it.decode + it.unsplit
    if it.coverage <= 0.0 and (not it.accrued or abs(dynamic + it.static) < _DUST_J):
        return _unknown(it, known)
    split = it.unsplit == 0.0 and (it.prefill > 0.0 or it.decode > 0.0)
    dynamic = it.prefill + it.decode if split else dynamic
    joules = dynamic + it.static
    # Known in all of its intervals, or the parts would hold idle joules of the others.
    based = not it.unbased
    length_ns = it.t1_ns - it.t0_ns
    sigma = share_sigma(
        joules=joules,
        static=it.static,
        shared=it.shared,
        spread=math.hypot(it.spread, it.tilt),
        duration_s=(it.busy_ns or max(1, length_ns)) / 1e9,
        interval_s=it.interval_ns / it.intervals / 1e9 if it.intervals else known.interval_s,
        idle_watts=known.idle_watts,
        source=known.device.relative_uncertainty,
        delayed=known.delayed,
        idle_part=known.idle_part,
        others=it.company_ns / it.busy_ns - 1.0 if it.busy_ns else None,
        alone=it.tiers.get("exclusive", 0.0) / joules if joules > 0.0 else 0.0,
        rough=known.rough if set(it.tiers) <= _SHAPED else None,
    )
    method = _method(it)
    coverage = it.coverage * it.seen
    reason = _reason(it, known, coverage)
    return _share(
        key=it.key,
        device=it.device,
        t0_ns=it.t0_ns,
        t1_ns=it.t1_ns,
        joules=joules,
        dynamic=dynamic if based else None,
        static=it.static if based else None,
        prefill=it.prefill if split and based else None,
        decode=it.decode if split and based else None,
        uncertainty=sigma,
        method=method,
        quality=_quality(known, method, sigma, joules, coverage, length_ns / 1e9, reason, it.unfit > 0.5 * abs(joules)),
        coverage=coverage,
        concurrency=max(1.0, it.company_ns / it.busy_ns) if it.busy_ns else 1.0,
        final_ns=it.final_ns,
        reason=reason,
        exclusive=False if it.foreign else it.exclusive,
        rollup=joules if it.nested is None else dynamic + it.static + it.nested,
    )


def _share(**values: object) -> Share:
    # What Share(...) does. There every field of a frozen record passes a guard, which takes two thirds of the time that a
    # share takes to make, and a hub makes thousands a second.
    share = object.__new__(Share)
    for name, value in values.items():
        _PUT[name](share, value)
    return share


def _unknown(it: SoFar, known: Known) -> Share:
    reason: Reason = "device_lost" if known.gone else "late" if it.late else "no_samples"
    return Share(
        it.key,
        it.device,
        it.t0_ns,
        it.t1_ns,
        *([None] * 6),
        method="process" if known.process else it.tier,
        quality="unavailable",
        coverage=0.0,
        concurrency=1.0,
        final_ns=it.final_ns,
        reason=reason,
    )


def _method(it: SoFar) -> Tier:
    if len(it.tiers) == 1:
        return next(iter(it.tiers))
    total = sum(abs(joules) for joules in it.tiers.values())
    enough = [tier for tier, joules in it.tiers.items() if abs(joules) >= 0.05 * total]
    if enough:
        return TIERS[max(TIERS.index(tier) for tier in enough)]
    return "step" if it.stepped else it.tier


def _reason(it: SoFar, known: Known, coverage: float) -> Reason | None:
    if coverage < FULL_COVERAGE:
        if it.seen < 1.0:
            return "devices_elsewhere"
        if it.late:
            return "late"
        if known.gone:
            return "device_lost"
        return "counter_reset" if it.reset else "no_samples"
    return it.part or ("devices_assumed" if it.assumed else None)


def _quality(
    known: Known,
    method: Tier,
    sigma: float,
    joules: float,
    coverage: float,
    duration_s: float,
    reason: Reason | None,
    unfit: bool,
) -> Quality:
    if coverage < FULL_COVERAGE or reason == "phase_elsewhere":
        return "partial"
    if known.device.estimated or unfit:
        return "estimated"
    if (
        method not in _EXACT
        or sigma > WIDE * joules
        or duration_s < (known.device.period_s or known.interval_s)
        or reason == "devices_assumed"
        or known.device.fraction < 1.0
    ):
        return "interpolated"
    return "measured"
