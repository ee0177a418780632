"""Engines: what is known of each, which requests it has, and the lanes of its steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from melodi_otel.attribution.activity import ASSUMED_PREFILL_TOKENS_PER_S, Activity
from melodi_otel.attribution.lanes import Lane
from melodi_otel.attribution.meter import EngineId
from melodi_otel.attribution.weights import CostModel, EngineFacts, Theta
from melodi_otel.devices import Device

Evidence = Literal["unknown", "steps", "tokens", "none"]


def with_host(devices: Sequence[str], host_devices: Sequence[str]) -> tuple[str, ...]:
    """Accelerators and, behind them, the CPU packages and memory that everything uses."""
    return (*devices, *(name for name in host_devices if name not in devices))


def devices_given(given: tuple[str, ...] | None, named: Sequence[str] | None) -> tuple[str, ...] | None:
    """What ``MELODI_ENGINE_DEVICES`` makes of the devices that an engine names: those of them that it lists, else all of it.

    Cores of one engine have a part of the list each; an engine that cannot say where it computes has all of it.
    """
    if not given:
        return None if named is None else tuple(named)
    return tuple(name for name in named or () if name in given) or given


class Work(NamedTuple):
    """One id in one step: prompt tokens computed, decode tokens computed (1 + drafts), context before the step."""

    id: str
    prefill: int
    decode: int
    context: int


def by_id(work: Sequence[Work]) -> dict[str, tuple[int, int, int]]:
    """As traces have it: id -> (prompt tokens, decode tokens, context after)."""
    return {part.id: (part.prefill, part.decode, part.context + part.prefill + part.decode) for part in work}


@dataclass(slots=True)
class Speed:
    """Prompt tokens per second that an engine has shown (moving average)."""

    tokens_per_s: float = ASSUMED_PREFILL_TOKENS_PER_S
    seen: bool = False

    def observe(self, tokens: float, seconds: float) -> None:
        """One prompt of ``tokens`` took ``seconds`` to its first token."""
        if tokens <= 0.0 or seconds <= 0.0:
            return
        rate = tokens / seconds
        self.tokens_per_s = rate if not self.seen else 0.8 * self.tokens_per_s + 0.2 * rate
        self.seen = True


class EngineState:
    """What is known of one engine.

    Attributes:
        open: requests that are not settled; ``ending``: those of them that are closed, ``unstepped``: that stand in no step
            yet.
        on: devices that its requests and steps have named.
    """

    def __init__(self, engine: EngineId) -> None:
        self.id = engine
        self.model: str | None = None
        self.service: str | None = None
        self.devices: tuple[str, ...] | None = None
        self.world: int | None = None
        self.facts = EngineFacts()
        self.theta: Theta | None = None
        self.loading_ns: list[tuple[int, int | None]] = []
        self.gone = False
        self.heard_ns: int | None = None
        """Steps that ended by then have been told; None: a step is known as soon as it has ended."""
        self.evidence: Evidence = "unknown"
        self.lanes: dict[int, Lane] = {}
        self.open: dict[int, Activity] = {}
        self.ending: dict[int, Activity] = {}
        self.unstepped: dict[int, Activity] = {}
        self.on: set[str] = set()
        self.speed = Speed()
        self.gaps = 0
        self.clipped = 0

    def priced(self, model: CostModel, devices: Iterable[Device]) -> Theta:
        """Coefficients of its steps on ``devices`` without a fit, computed once per declaration."""
        if self.theta is None:
            self.theta = model.theta(replace(self.facts, flops_per_byte=_balance(devices)))
        return self.theta

    def loading_part(self, t0_ns: int, t1_ns: int) -> float:
        """Part of [t0, t1] during which it was loading, 0..1."""
        held = 0
        for start, stop in self.loading_ns:
            held += max(0, min(t1_ns, t1_ns if stop is None else stop) - max(t0_ns, start))
        return min(1.0, held / (t1_ns - t0_ns))

    def add(self, activity: Activity) -> None:
        """It computes this request."""
        at = id(activity)
        self.open[at] = activity
        self.on.update(activity.devices)
        if activity.last_step_ns is None:
            self.unstepped[at] = activity
        if activity.close_ns is not None:
            self.ending[at] = activity

    def drop(self, activity: Activity) -> None:
        """Another engine computes it."""
        for held in (self.open, self.ending, self.unstepped):
            held.pop(id(activity), None)

    def ended(self, activity: Activity) -> None:
        """It has been closed."""
        if id(activity) in self.open:
            self.ending[id(activity)] = activity

    def lane_of(self, activity: Activity) -> Lane | None:
        """The lane in whose newest step the activity stood."""
        return next((lane for lane in self.lanes.values() if lane.holds(activity)), None)

    def forget(self, activity: Activity) -> None:
        """A settled request: it stands in no newest step any more, and lanes of its own are over."""
        self.drop(activity)
        for number, lane in list(self.lanes.items()):
            lane.forget(activity)
            if activity.own_lane and not lane.last and not lane.riding:
                del self.lanes[number]


def _balance(devices: Iterable[Device]) -> float | None:
    """FLOP per byte of the first device that says both peaks."""
    for device in devices:
        if device.peak_flops and device.bytes_per_s:
            return device.peak_flops / device.bytes_per_s
    return None
