"""From what a request has accrued to its shares: method, quality, coverage, uncertainty, and why they are what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from melodi_otel.attribution.account import Account
from melodi_otel.attribution.activity import Accrual, Activity
from melodi_otel.attribution.engines import EngineState
from melodi_otel.attribution.meter import Quality, Reason, Share, Tier
from melodi_otel.attribution.slices import tier_of
from melodi_otel.attribution.summary import FULL_COVERAGE, TIERS
from melodi_otel.attribution.uncertainty import share_sigma

WIDE: Final = 0.25
"""A share whose 1 sigma is above this part of it is called interpolated at best."""
_EXACT: Final[tuple[Tier, ...]] = ("exclusive", "step", "slice", "process")


def shares_of(
    activity: Activity, accounts: Mapping[str, Account], now_ns: int, engine: EngineState | None
) -> list[Share]:
    """One share per device of ``activity``, which has ended."""
    end = activity.close_ns or activity.open_ns
    seen = _seen(activity, accounts, engine)
    mine = [accounts[name] for name in activity.charged() if name in accounts]
    return [_share(activity, account, end, now_ns, seen if account.device.type == "gpu" else 1.0) for account in mine]


def shares_so_far(activity: Activity, accounts: Mapping[str, Account], engine: EngineState | None) -> list[Share]:
    """What ``activity`` has accrued, per device on which an interval has closed since its opening.

    The same figures as :func:`shares_of` would give if it had ended when the device's books were closed last: ``t1_ns`` is
    that time, or its end where that is earlier, and ``coverage`` is of the time up to it. ``final_ns`` is the time up to which
    the books are closed. Work that is reported late has accrued nothing before it settles.
    """
    if activity.late is not None:
        return []
    seen = _seen(activity, accounts, engine)
    found: list[Share] = []
    for name in activity.charged():
        account = accounts.get(name)
        if account is None or account.closed_until is None:
            continue
        until = account.closed_until
        if until <= activity.open_ns and name not in activity.accruals:
            continue
        end = max(activity.open_ns, until if activity.close_ns is None else min(activity.close_ns, until))
        found.append(_share(activity, account, end, until, seen if account.device.type == "gpu" else 1.0))
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
    own = activity.accruals.get(device)
    return (own.joules if own else 0.0) + sum(rollup(child, device) for child in activity.nested)


def _share(activity: Activity, account: Account, end: int, now_ns: int, seen: float) -> Share:
    coverage = min(1.0, account.coverage(activity.open_ns, end))
    if activity.late is not None and end > activity.open_ns:
        # Where others were told of everything, it is not known what this request used.
        held = activity.late_covered_ns.get(account.device.id, 0.0) / (end - activity.open_ns)
        coverage = min(coverage, held)
    accrual = activity.accruals.get(account.device.id)
    if coverage <= 0.0 and (accrual is None or accrual.joules == 0.0):
        return _unknown(activity, account, end, now_ns)
    accrual = accrual or Accrual()
    static = accrual.static
    split = accrual.unsplit == 0.0 and (accrual.prefill > 0.0 or accrual.decode > 0.0)
    dynamic = accrual.prefill + accrual.decode if split else accrual.dynamic
    joules = dynamic + static
    # Known in all of its intervals, or the parts would hold idle joules of the others.
    based = not accrual.unbased
    duration = (accrual.busy_ns or max(1, end - activity.open_ns)) / 1e9
    interval_s = accrual.interval_ns / accrual.intervals / 1e9 if accrual.intervals else account.interval_s
    sigma = share_sigma(
        joules=joules,
        static=static,
        shared=accrual.shared,
        duration_s=duration,
        interval_s=interval_s,
        idle_watts=account.baseline.watts,
        source=account.device.relative_uncertainty,
    )
    method = _method(activity, accrual)
    coverage *= seen
    reason = _reason(activity, account, coverage, end, seen < 1.0)
    return Share(
        key=activity.key,
        device=account.device.id,
        t0_ns=activity.open_ns,
        t1_ns=end,
        joules=joules,
        dynamic=dynamic if based else None,
        static=static if based else None,
        prefill=accrual.prefill if split and based else None,
        decode=accrual.decode if split and based else None,
        uncertainty=sigma,
        method=method,
        quality=_quality(account, method, sigma, joules, coverage, (end - activity.open_ns) / 1e9, reason),
        coverage=coverage,
        concurrency=max(1.0, accrual.company_ns / accrual.busy_ns) if accrual.busy_ns else 1.0,
        final_ns=now_ns,
        reason=reason,
        exclusive=_exclusive(activity, account, accrual, end),
        rollup=rollup(activity, account.device.id) if activity.nested else joules,
    )


def _exclusive(activity: Activity, account: Account, accrual: Accrual, end: int) -> bool | None:
    if accrual.foreign:
        return False
    return True if account.cpu.series else account.foreign.exclusive(activity.open_ns, end)


def _unknown(activity: Activity, account: Account, end: int, now_ns: int) -> Share:
    reason: Reason = "device_lost" if account.gone else "late" if activity.late is not None else "no_samples"
    method = "process" if account.cpu.series else tier_of(activity)
    return Share(
        activity.key,
        account.device.id,
        activity.open_ns,
        end,
        *([None] * 6),
        method=method,
        quality="unavailable",
        coverage=0.0,
        concurrency=1.0,
        final_ns=now_ns,
        reason=reason,
    )


def _method(activity: Activity, accrual: Accrual) -> Tier:
    if len(accrual.tiers) == 1:
        return next(iter(accrual.tiers))
    total = sum(abs(joules) for joules in accrual.tiers.values())
    enough = [tier for tier, joules in accrual.tiers.items() if abs(joules) >= 0.05 * total]
    if enough:
        return TIERS[max(TIERS.index(tier) for tier in enough)]
    return "step" if activity.last_step_ns is not None else tier_of(activity)


def _reason(activity: Activity, account: Account, coverage: float, end: int, elsewhere: bool) -> Reason | None:
    if coverage < FULL_COVERAGE:
        if elsewhere:
            return "devices_elsewhere"
        if activity.late is not None:
            return "late"
        if account.gone:
            return "device_lost"
        if account.had_reset(activity.open_ns, end):
            return "counter_reset"
        return "no_samples"
    return "devices_assumed" if activity.assumed else None


def _quality(
    account: Account,
    method: Tier,
    sigma: float,
    joules: float,
    coverage: float,
    duration_s: float,
    reason: Reason | None,
) -> Quality:
    if coverage < FULL_COVERAGE:
        return "partial"
    if account.device.estimated:
        return "estimated"
    if (
        method not in _EXACT
        or sigma > WIDE * joules
        or duration_s < (account.device.period_s or account.interval_s)
        or reason == "devices_assumed"
        or account.device.fraction < 1.0
    ):
        return "interpolated"
    return "measured"
