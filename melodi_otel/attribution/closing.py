"""When may an interval close? When everything that ran in it is known, or has been waited for long enough."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from melodi_otel.attribution.account import Account
from melodi_otel.attribution.activity import Activity
from melodi_otel.attribution.engines import EngineState
from melodi_otel.devices import Device
from melodi_otel.timeline.timeline import Interval

MIN_WAIT_S: Final = 1.0
MAX_WAIT_S: Final = 5.0
STEP_PART: Final = 0.7
"""Of the time that a span waits at most, so much is for steps that run across an interval; the rest is for the reading after
its end and the settling, or a span would give up a moment before its joules come."""
TOKENS_WAIT_S: Final = 0.15
"""How long the newest token counts are waited for: they are read right after the sensor moved."""


def wait_s(device: Device, interval_s: float = 0.1) -> float:
    """Bound of every wait for ``device``: ``2 x (window + period)``, between 1 and 5 s."""
    seconds = 2.0 * ((device.window_s or 0.0) + max(device.period_s or 0.1, interval_s))
    return min(MAX_WAIT_S, max(MIN_WAIT_S, seconds))


def may_close(
    account: Account,
    interval: Interval,
    now_ns: int,
    engines: list[EngineState],
    longest_s: float | None = None,
    everywhere: Collection[EngineState] = (),
) -> bool:
    """Whether the evidence for ``interval`` is complete, or late enough to do without.

    ``longest_s`` is how late that is; None: :data:`STEP_PART` of :func:`wait_s` of the device. ``engines``: those that may have
    used the device; ``everywhere``: all there are, one of which may compute a request of which no step has told yet.
    """
    if interval.gap:
        return True  # nobody's joules: there is no evidence to wait for
    if now_ns < interval.t1_ns:
        return False  # a meter that is thought to be early: what will be done up to its end is not known yet
    longest_s = STEP_PART * wait_s(account.device, account.interval_s) if longest_s is None else longest_s
    if now_ns >= interval.t1_ns + round(1e9 * longest_s):
        return True
    cpu_ns = account.cpu.last_ns
    if cpu_ns is not None and cpu_ns < interval.t1_ns - round(1e9 * account.interval_s / 2):
        return False
    t1_ns, everywhere = interval.t1_ns, everywhere or engines
    if any(running(engine, t1_ns, now_ns, everywhere) for engine in engines):
        return False
    # Who was opened with another engine of the group, and stands in no step yet, may be in the first one of an engine here.
    return not any(
        _waits(engine, activity, t1_ns, everywhere)
        for other in everywhere
        if other.unstepped and other not in engines
        for activity in other.unstepped.values()
        if not activity.own_lane and activity.open_ns < t1_ns
        for engine in engines
        if engine.id.group == other.id.group and engine.evidence == "steps"
    )


def running(engine: EngineState, t_ns: int, now_ns: int, engines: Collection[EngineState]) -> bool:
    """Whether a request of ``engine`` may stand in a step across ``t_ns`` that has not been reported yet.

    ``engines``: all there are.
    """
    if any(_ending(engine, activity, t_ns, engines) for activity in engine.ending.values()):
        return True
    if engine.evidence == "none":
        return False
    if engine.evidence == "steps":
        if any(lane.running(t_ns) for lane in engine.lanes.values()):
            return True
        return any(
            _waits(engine, activity, t_ns, engines)
            for activity in engine.unstepped.values()
            if activity.close_ns is None
        )
    open_now = (one for one in engine.open.values() if one.close_ns is None and one.open_ns < t_ns)
    if engine.evidence == "unknown":
        return any(open_now)
    return now_ns < t_ns + round(TOKENS_WAIT_S * 1e9) and any(
        not one.progress_t or one.progress_t[-1] < t_ns for one in open_now
    )


def _waits(engine: EngineState, activity: Activity, t_ns: int, engines: Collection[EngineState]) -> bool:
    """The same of one request that stands in no step yet."""
    if activity.open_ns >= t_ns:
        return False
    if activity.close_ns is not None:
        return _ending(engine, activity, t_ns, engines)
    return activity.own_lane or not any(lane.t1_ns >= t_ns for lane in engine.lanes.values())


def _ending(engine: EngineState, activity: Activity, t_ns: int, engines: Collection[EngineState]) -> bool:
    """The same of one that has been closed."""
    if activity.open_ns >= t_ns or activity.close_ns is None:
        return False
    end_ns = min(t_ns, activity.close_ns)
    if unheard(engines, activity, end_ns):
        return True
    # An abort is known before the step that computed its last token; any other end comes after its steps.
    if activity.outcome not in ("abort", "error") or activity.own_lane:
        return False
    lane = engine.lane_of(activity)
    if lane is not None:
        return lane.t1_ns < end_ns
    # Whoever leaves in its first step stands in none yet; an error was perhaps never in one.
    first = activity.outcome == "abort" and activity.last_step_ns is None and engine.evidence == "steps"
    return first and not engine.gone and not any(lane.t1_ns >= end_ns for lane in engine.lanes.values())


def unheard(engines: Iterable[EngineState], activity: Activity, t_ns: int) -> bool:
    """Whether steps of ``activity`` that ended before ``t_ns`` may still be on their way from another process.

    One that stands in no step yet may be computed by any engine of its group.
    """
    mine = activity.engine
    if mine is None or activity.own_lane:
        return False
    return any(
        engine.heard_ns is not None
        and engine.heard_ns < t_ns
        and not engine.gone
        and engine.evidence != "tokens"
        and (engine.id == mine or (activity.last_step_ns is None and engine.id.group == mine.group))
        for engine in engines
    )
