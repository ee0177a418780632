"""Requests as the ledger sees them: when they were there, what is known of their progress, what they have accrued."""

from __future__ import annotations

import logging
from bisect import bisect_right
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final

from melodi_otel.attribution.books import Phase, Who
from melodi_otel.attribution.meter import EngineId, Key, Late, Outcome, Probe, Reason, Share, Tier

if TYPE_CHECKING:
    from melodi_otel.attribution.lanes import Lane
    from melodi_otel.attribution.riding import Rider

log = logging.getLogger("melodi_otel")

NESTED: Final = 64
"""Requests in requests in requests; one that is deeper is nobody's child."""
ASSUMED_PREFILL_TOKENS_PER_S: Final = 5000.0
"""Speed at which a prompt is assumed to be computed until its engine has shown one."""


class Accrual:
    """What one activity has accrued on one device over closed intervals; joules and ns."""

    __slots__ = (
        "booked",
        "busy_ns",
        "company_ns",
        "decode",
        "foreign",
        "interval_ns",
        "intervals",
        "prefill",
        "shared",
        "spread",
        "static",
        "tiers",
        "tilt",
        "unbased",
        "unfit",
        "unsplit",
    )

    def __init__(self) -> None:
        self.prefill = 0.0
        self.decode = 0.0
        self.unsplit = 0.0
        self.static = 0.0
        # Energy that was really divided with others, by tier: what the tier's own error applies to.
        self.shared: dict[Tier, float] = {}
        # The same, each times the relative error of the weights it was divided by: 1 sigma of it, in J.
        self.spread = 0.0
        # What is wrong by how prompts are priced against decoded tokens, 1 sigma in J: above 0 has more of prompts than the
        # others beside it, and what it wins in one interval it loses in another.
        self.tilt = 0.0
        # Joules of intervals that the fitted costs do not describe well.
        self.unfit = 0.0
        self.tiers: dict[Tier, float] = {}
        # As the account has it in its attributed joules: by (who, phase, quality).
        self.booked: dict[tuple[Who, Phase, str], float] = {}
        self.busy_ns = 0
        self.company_ns = 0
        self.intervals = 0
        self.interval_ns = 0
        self.foreign = False
        # Whether idle power was not known in some interval: then its part cannot be told from the rest.
        self.unbased = False

    @property
    def dynamic(self) -> float:
        return self.prefill + self.decode + self.unsplit

    @property
    def joules(self) -> float:
        return self.dynamic + self.static

    def merge(self, other: Accrual) -> None:
        """Take over what an anonymous activity accrued before its name was known."""
        self.prefill += other.prefill
        self.decode += other.decode
        self.unsplit += other.unsplit
        self.static += other.static
        self.busy_ns += other.busy_ns
        self.company_ns += other.company_ns
        self.intervals += other.intervals
        self.interval_ns += other.interval_ns
        self.spread += other.spread
        self.tilt += other.tilt
        self.unfit += other.unfit
        self.foreign |= other.foreign
        self.unbased |= other.unbased
        for mine, theirs in ((self.shared, other.shared), (self.tiers, other.tiers)):
            for tier, joules in theirs.items():
                mine[tier] = mine.get(tier, 0.0) + joules
        for at, joules in other.booked.items():
            self.booked[at] = self.booked.get(at, 0.0) + joules


class Activity:
    """One request: open, under way or waiting for its joules."""

    __slots__ = (
        "accruals",
        "anonymous",
        "assumed",
        "cached_tokens",
        "children",
        "close_ns",
        "counted",
        "devices",
        "engine",
        "first_token_ns",
        "forgone",
        "future",
        "key",
        "late",
        "late_covered_ns",
        "model",
        "nested",
        "open_ns",
        "outcome",
        "output_tokens",
        "own_lane",
        "parent",
        "prefill_charged",
        "probe",
        "progress_n",
        "progress_t",
        "prompt_tokens",
        "reason",
        "riders",
        "rows",
        "settled",
        "step_devices",
        "stood_ns",
        "who",
    )

    def __init__(self, key: Key, open_ns: int, *, anonymous: bool = False) -> None:
        self.key = key
        self.open_ns = open_ns
        self.anonymous = anonymous
        self.engine: EngineId | None = None
        self.devices: tuple[str, ...] = ()
        self.step_devices: dict[str, None] = {}
        self.assumed = False
        self.model: str | None = None
        self.who = Who()
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.output_tokens: int | None = None
        self.first_token_ns: int | None = None
        self.parent: Activity | None = None
        self.nested: list[Activity] = []
        self.own_lane = False
        self.probe: Probe | None = None
        self.children: list[str] = []
        self.rows = 1
        self.close_ns: int | None = None
        self.outcome: Outcome | None = None
        # Reported when it was over: it is no part of any interval, and what it takes it takes at the end.
        self.late: Late | None = None
        self.reason: Reason | None = None
        self.late_covered_ns: dict[str, float] = {}
        # The end of its newest step outside of decode sets, and its places in those: a lane until it has left it.
        self.stood_ns: int | None = None
        self.riders: dict[Rider, Lane | None] = {}
        self.progress_t: list[int] = []
        self.progress_n: list[int] = []
        # Per device: each divides its own joules, at its own readings.
        self.prefill_charged: dict[str, float] = {}
        self.counted = False
        self.accruals: dict[str, Accrual] = {}
        self.future: Future[list[Share]] = Future()
        # Nobody waits for its joules: its span has gone out without them.
        self.forgone = False
        self.settled = False

    def stood(self, t_ns: int) -> None:
        """It stood in a step that ended at ``t_ns``."""
        if self.stood_ns is None or t_ns > self.stood_ns:
            self.stood_ns = t_ns

    @property
    def last_step_ns(self) -> int | None:
        """The end of the newest step that named it; None: none has."""
        last = self.stood_ns
        for lane in self.riders.values():
            if lane is not None and lane.computed_ns and (last is None or lane.computed_ns > last):
                last = lane.computed_ns
        return last

    @property
    def end_ns(self) -> int | None:
        """When what it used ends: its close, or the end of a step that began before; None while it is open."""
        return None if self.close_ns is None else max(self.close_ns, self.last_step_ns or 0)

    def on(self) -> tuple[str, ...]:
        """The devices it is charged for: those of the steps that name it, else those it was opened with."""
        return tuple(self.step_devices) if self.step_devices else self.devices

    def charged(self) -> tuple[str, ...]:
        """:meth:`on`, and the devices on which it has accrued before its steps named others: those joules are its too."""
        on = self.on()
        more = [name for name, accrual in self.accruals.items() if name not in on and accrual.joules != 0.0]
        return (*on, *more) if more else on

    def told(self, t_ns: int, output_tokens: int) -> None:
        """Progress: ``output_tokens`` at ``t_ns``; news that are older than what is known, or fewer, are left out."""
        if self.progress_t and (t_ns <= self.progress_t[-1] or output_tokens < self.progress_n[-1]):
            return
        self.progress_t.append(t_ns)
        self.progress_n.append(output_tokens)
        self.output_tokens = output_tokens

    def tokens_at(self, t_ns: int) -> float:
        """Output tokens at ``t_ns``, joined by straight lines between what is known; never more than is known."""
        times, counts = self.progress_t, self.progress_n
        if self.first_token_ns is None:
            start_ns, start_n = self.open_ns, 0.0
        else:
            start_ns, start_n = self.first_token_ns, 1.0
        if t_ns <= start_ns or not times:
            return 0.0 if t_ns < start_ns else start_n
        if t_ns >= times[-1]:
            return float(max(counts[-1], start_n))
        at = bisect_right(times, t_ns)
        t1, n1 = times[at], float(counts[at])
        if at and times[at - 1] >= start_ns:
            t0, n0 = times[at - 1], float(counts[at - 1])
        else:
            t0, n0 = start_ns, start_n
        if t1 <= t0:
            return n1
        return n0 + (max(n1, n0) - n0) * (t_ns - t0) / (t1 - t0)

    @property
    def computed_prompt(self) -> float:
        """Prompt tokens to compute: prompt minus cached; 0 while unknown."""
        return float(max(0, (self.prompt_tokens or 0) - (self.cached_tokens or 0)))

    def prefill_in(self, device: str, t0_ns: int, t1_ns: int, tokens_per_s: float) -> float:
        """Prompt tokens to charge on ``device`` for [t0, t1].

        Evenly up to the first token where that is known, else at an assumed speed.

        What an earlier guess left over is charged when the first token shows that the prompt is done, so the sum over a
        request is exact.
        """
        left = self.computed_prompt - self.prefill_charged.get(device, 0.0)
        if left <= 0.0:
            return 0.0
        done_ns = self.first_token_ns
        if done_ns is None and self.progress_t and self.progress_n[-1] > 0:
            done_ns = self.progress_t[bisect_right(self.progress_n, 0)]  # counts never fall
        if done_ns is not None and done_ns <= t1_ns:
            return left
        if done_ns is not None:
            return left * (t1_ns - t0_ns) / max(1, done_ns - t0_ns)
        return min(left, tokens_per_s * (t1_ns - t0_ns) / 1e9)

    def segments(self, t0_ns: int, t1_ns: int) -> list[tuple[int, int]]:
        """The parts of [t0, t1] in which it owns the device time: open, and none of its nested activities is."""
        start = max(t0_ns, self.open_ns)
        stop = t1_ns if self.close_ns is None or self.close_ns > t1_ns else self.close_ns
        if not self.nested:
            return [(start, stop)] if stop > start else []
        parts: list[tuple[int, int]] = []
        for child in sorted(self.nested, key=lambda activity: activity.open_ns):
            child_stop = stop if child.close_ns is None else child.close_ns
            if child.open_ns > start:
                parts.append((start, min(child.open_ns, stop)))
            start = max(start, child_stop)
        parts.append((start, stop))
        return [(a, b) for a, b in parts if b > a]


def may_hold(outer: Activity, inner: Activity) -> bool:
    """Whether ``inner`` may be nested in ``outer``: nobody is inside itself, and not deeper than anybody programs."""
    above: Activity | None = outer
    for _ in range(NESTED):
        if above is None:
            return True
        if above is inner:
            return False
        above = above.parent
    return False


def ask(activity: Activity) -> int | None:
    """What its probe says; one that fails is not asked again."""
    if activity.probe is None:
        return None
    try:
        return activity.probe()
    except Exception:
        log.debug("melodi_otel: a probe failed and is not asked again", exc_info=True)
        activity.probe = None
        return None
