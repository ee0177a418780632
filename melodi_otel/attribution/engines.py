"""Engines and their steps: who computed what, from when to when, as rows with weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from melodi_otel.attribution.activity import ASSUMED_PREFILL_TOKENS_PER_S, Activity
from melodi_otel.attribution.meter import Decode, EngineId, Joined, Prefill
from melodi_otel.attribution.settle import Row
from melodi_otel.attribution.weights import CostModel, EngineFacts, Theta, decode_weight, prefill_weight
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


class Step:
    """A step with its rows, priced for the whole of it; ``t0_ns == t1_ns`` is an instant."""

    __slots__ = ("rows", "t0_ns", "t1_ns")

    def __init__(self, t0_ns: int, t1_ns: int, rows: list[Row]) -> None:
        self.t0_ns = t0_ns
        self.t1_ns = t1_ns
        self.rows = rows

    def part(self, t0_ns: int, t1_ns: int) -> float:
        """How much of it lies in [t0, t1], 0..1."""
        length = self.t1_ns - self.t0_ns
        if length <= 0:
            return 1.0 if t0_ns < self.t0_ns <= t1_ns else 0.0
        return max(0, min(self.t1_ns, t1_ns) - max(self.t0_ns, t0_ns)) / length


class Lane:
    """One sequence of steps that do not overlap, and its decode set (id -> context before the next step)."""

    __slots__ = ("last", "members", "seq", "t1_ns")

    def __init__(self) -> None:
        self.seq: int | None = None
        self.t1_ns = 0
        self.members: dict[str, int] = {}
        self.last: set[Activity] = set()

    def follow(self, seq: int) -> bool:
        """Take the number of the next step; False: deltas in between are lost, and with them the decode set."""
        whole = self.seq is None or seq == self.seq + 1
        if not whole:
            self.members.clear()
        self.seq = seq
        return whole

    def advance(
        self,
        decode: Decode,
        prefill: Sequence[Prefill],
        computed: Sequence[Prefill],
        joined: Sequence[Joined],
        left: Sequence[str],
    ) -> list[Work]:
        """Apply a step in delta form and return its full work."""
        for gone in left:
            self.members.pop(gone, None)
        for member in joined:
            self.members[member.id] = member.context
        work = [Work(row.id, row.tokens, 0, row.context) for row in prefill]
        for row in computed:
            self.members.pop(row.id, None)
            work.append(Work(row.id, 0, row.tokens, row.context))
        if decode.n:
            for member, context in self.members.items():
                work.append(Work(member, 0, 1, context))
                self.members[member] = context + 1
        return work


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
    """What is known of one engine."""

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
        self.speed = Speed()
        self.gaps = 0
        self.clipped = 0

    def priced(self, model: CostModel, devices: Iterable[Device]) -> Theta:
        """Coefficients of its steps on ``devices``, computed once per declaration."""
        if self.theta is None:
            self.theta = model.theta(replace(self.facts, flops_per_byte=_balance(devices)))
        return self.theta

    def loading_part(self, t0_ns: int, t1_ns: int) -> float:
        """Part of [t0, t1] during which it was loading, 0..1."""
        held = 0
        for start, stop in self.loading_ns:
            held += max(0, min(t1_ns, t1_ns if stop is None else stop) - max(t0_ns, start))
        return min(1.0, held / (t1_ns - t0_ns))

    def lane_of(self, activity: Activity) -> Lane | None:
        """The lane in whose newest step the activity stood."""
        return next((lane for lane in self.lanes.values() if activity in lane.last), None)

    def forget(self, activity: Activity) -> None:
        """A settled request: it stands in no newest step any more, and lanes of its own are over."""
        self.open.pop(id(activity), None)
        for number, lane in list(self.lanes.items()):
            lane.last.discard(activity)
            if activity.own_lane and not lane.last:
                del self.lanes[number]


def price(theta: Theta, work: Sequence[Work], find: Callable[[str], Activity]) -> list[Row]:
    """Rows of a step.

    The fixed cost is split equally among the participants; a row that computes prompt tokens puts its part of it into
    prefill, any other into decode.
    """
    if not work:
        return []
    fixed = (theta.fixed_prefill if any(row.prefill for row in work) else theta.fixed) / len(work)
    rows: dict[int, Row] = {}
    for part in work:
        activity = find(part.id)
        row = rows.get(id(activity))
        if row is None:
            row = rows[id(activity)] = Row(activity, 0)
        row.participants += 1
        if part.prefill:
            row.prefill += fixed + prefill_weight(theta, part.prefill, part.context)
            if part.decode:
                row.decode += theta.decode * part.decode
        else:
            row.decode += fixed + decode_weight(theta, part.decode, part.context)
    return list(rows.values())


def _balance(devices: Iterable[Device]) -> float | None:
    """FLOP per byte of the first device that says both peaks."""
    for device in devices:
        if device.peak_flops and device.bytes_per_s:
            return device.peak_flops / device.bytes_per_s
    return None
