"""Lanes: sequences of steps that do not overlap, each with its decode set.

A step is told as what changed: who joined the set and with how much context, who left, which prompts and drafts were computed
beside it. So a step costs what changed, not what runs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Final, NamedTuple

from melodi_otel.attribution.activity import Activity
from melodi_otel.attribution.meter import EngineId
from melodi_otel.attribution.riding import Clock, Rider
from melodi_otel.attribution.weights import Features

NEXT_NS: Final = 500_000
"""A step that begins so soon behind the one before begins where that ended: what the host does in between is done for it."""
LONGEST_RUN: Final = 64
"""Steps in a run, so that what is over is let go of while it goes on."""


class Change(NamedTuple):
    """``members`` sequences of ``rider`` more (or fewer) in a set; ``offset`` is the sum of their contexts at tick 0."""

    rider: Rider
    members: int
    offset: int


class WorkRow:
    """What one activity computed in a step outside of the decode set.

    Attributes:
        activity: who; another one takes its place where it turns out to be somebody else.
        participants: its sequences.
        prefill: prompt tokens; ``cache``: tokens of context that they, or its decode tokens, read; ``attention``: products of
            queries and context, ``decode``: decode tokens; ``touched``: its tokens' weight among the experts that the step used.
        in_prefill: whether its part of the step's fixed cost is prefill.
    """

    __slots__ = ("activity", "attention", "cache", "decode", "in_prefill", "participants", "prefill", "touched")

    def __init__(self, activity: Activity) -> None:
        self.activity = activity
        self.participants = 0
        self.prefill = self.decode = 0
        self.cache = self.attention = self.touched = 0.0
        self.in_prefill = False


class Step:
    """A step of a lane, or a run of them, of which each but the first is the set of the one before, one tick on, as nearly all
    steps are; ``t0_ns == t1_ns`` is an instant.

    Attributes:
        t0_ns, t1_ns: from when to when; ``ends``: the end of each step.
        over: some device has done with it: it does not go on.
        number: of the step in its lane, from 1; of a run: of its first step, as all that follows.
        changes: what happens to the decode set before it.
        rows: work outside of the set.
        participants: sequences in all, ``members`` of them in the set, ``contexts`` the sum of these's contexts.
        tick: of the set: contexts are offset + tick.
        heads: different requests in the set that stand in no row; ``only``: the one, where there is one.
        x: its features, see :class:`melodi_otel.attribution.weights.Features`.
    """

    __slots__ = (
        "changes",
        "contexts",
        "ends",
        "engine",
        "heads",
        "lane",
        "members",
        "number",
        "only",
        "over",
        "participants",
        "rows",
        "t0_ns",
        "t1_ns",
        "tick",
        "x",
    )

    def __init__(
        self,
        engine: EngineId,
        lane: Lane,
        t0_ns: int,
        t1_ns: int,
        rows: Sequence[WorkRow],
        changes: Sequence[Change],
        computes: bool,
        coverage: float,
    ) -> None:
        self.engine = engine
        self.lane = lane
        self.t0_ns = t0_ns
        self.t1_ns = t1_ns
        self.ends = [t1_ns]
        self.over = False
        self.rows = rows
        self.changes = changes
        lane.number += 1
        self.number = lane.number
        self.tick = lane.tick
        self.members = self.contexts = self.heads = 0
        self.only: Activity | None = None
        riding = lane.riding
        if computes and lane.members:
            self.members = len(lane.members)
            self.contexts = lane.offsets + self.members * lane.tick
            self.heads = len(riding) - sum(row.activity in riding for row in rows) if rows else len(riding)
            if len(riding) == 1:
                self.only = next(iter(riding))
            lane.tick += 1
            lane.computed_ns = t1_ns
        if not rows:
            # As nearly all steps are.
            self.participants = self.members
            self.x = Features(1.0, float(self.members), 0.0, float(self.contexts), 0.0, 0.0, coverage)
            return
        self.participants = self.members + sum([row.participants for row in rows])
        prefill = any(row.in_prefill for row in rows)
        self.x = Features(
            0.0 if prefill else 1.0,
            float(self.members + sum([row.decode for row in rows])),
            float(sum([row.prefill for row in rows])),
            self.contexts + sum([row.cache for row in rows]),
            sum([row.attention for row in rows]),
            1.0 if prefill else 0.0,
            coverage,
        )

    def copy(self, changes: Sequence[Change], *, ran: bool) -> Step:
        """The same for another device: with other ``changes``, and on one where it did not run (``ran``) without work."""
        step = object.__new__(Step)
        for name in Step.__slots__:
            setattr(step, name, getattr(self, name))
        step.ends = [*self.ends]
        step.changes = changes
        if not ran:
            step.participants = step.members = step.contexts = step.heads = 0
            step.only, step.rows = None, ()
        return step

    def part(self, t0_ns: int, t1_ns: int) -> tuple[float, float]:
        """How much of it lies in [t0, t1]: the sum of its steps' parts (0..1 each), and the same times their places (from 0)."""
        ends = self.ends
        low, high = max(self.t0_ns, t0_ns), min(self.t1_ns, t1_ns)
        if len(ends) == 1:
            length = self.t1_ns - self.t0_ns
            if length <= 0:
                return (1.0 if t0_ns < self.t0_ns <= t1_ns else 0.0), 0.0
            return max(0, high - low) / length, 0.0
        if high <= low:
            return 0.0, 0.0
        first, last = bisect_right(ends, low), bisect_left(ends, high)
        begin = ends[first - 1] if first else self.t0_ns
        if first == last:
            part = (high - low) / (ends[first] - begin)
            return part, part * first
        head = (ends[first] - low) / (ends[first] - begin)
        rest = (high - ends[last - 1]) / (ends[last] - ends[last - 1])
        whole = last - first - 1
        return head + whole + rest, head * first + whole * (first + last) / 2.0 + rest * last

    def ended(self, t0_ns: int, t1_ns: int) -> Did | None:
        """What its steps did that ended in (t0, t1]."""
        if not self.participants or self.t1_ns <= t0_ns:
            return None
        ends = self.ends
        first, after = bisect_right(ends, t0_ns), bisect_right(ends, t1_ns)
        number = after - first
        if number <= 0:
            return None
        since_ns, x = ends[first - 1] if first else self.t0_ns, self.x
        if len(ends) > 1:
            grown = self.members * (first + after - 1) / 2.0
            x = Features(x.fixed, x.decode, x.prefill, x.cache + grown, x.attention, x.fixed_prefill, x.coverage)
        return Did(self.engine, since_ns, ends[after - 1], number, x)


class Did(NamedTuple):
    """``number`` steps of an engine, one after another from ``t0_ns`` to ``t1_ns``; ``x``: the mean of their features."""

    engine: EngineId
    t0_ns: int
    t1_ns: int
    number: int
    x: Features


class Lane:
    """One sequence of steps that do not overlap.

    Attributes:
        t1_ns: end of the newest step; ``computed_ns``: of the newest in which the set computed.
        members: id -> (its rider, its offset).
        riding: the riders of the set by activity; ``ended``: activities among them that have been closed.
        last: activities that stood in rows of the newest step.
        changes: of the set, since the newest step.
        given: devices that were told with the newest step that named any, and ``given_named`` what they stand for.
        tail: the newest step as it was told to all its devices; None: nothing goes on from it.
        named: devices of the newest step; ``on``: those that have been told all changes; ``clocks``: what counts there.
    """

    __slots__ = (
        "_counts",
        "_twins",
        "changes",
        "clocks",
        "computed_ns",
        "ended",
        "given",
        "given_named",
        "last",
        "members",
        "named",
        "number",
        "offsets",
        "on",
        "riding",
        "seq",
        "t1_ns",
        "tail",
        "tick",
    )

    def __init__(self) -> None:
        self.seq: int | None = None
        self.tail: Step | None = None
        self.t1_ns = 0
        self.computed_ns = 0
        self.number = 0
        self.tick = 0
        self.offsets = 0
        self.members: dict[str, tuple[Rider, int]] = {}
        self.riding: dict[Activity, Rider] = {}
        self._counts: dict[Rider, int] = {}
        # Whether one activity may ride with two riders: it turned out to be the same as another.
        self._twins = False
        self.ended: set[Activity] = set()
        self.last: set[Activity] = set()
        self.changes: list[Change] = []
        self.named: tuple[str, ...] | None = None
        self.given: tuple[str, ...] | None = None
        self.given_named: tuple[str, ...] = ()
        self.on: set[str] = set()
        self.clocks: dict[str, Clock] = {}

    def follow(self, seq: int) -> bool:
        """Take the number of the next step; False: deltas in between are lost, and with them the decode set."""
        whole = self.seq is None or seq == self.seq + 1
        if not whole:
            for name in list(self.members):
                self.leave(name)
        self.seq = seq
        return whole

    def follows(self, seq: int, t0_ns: int) -> bool:
        """Whether a step with this number that begins at ``t0_ns`` is the next one, with no time in between."""
        return self.tail is not None and seq - 1 == self.seq and self.t1_ns <= t0_ns <= self.t1_ns + NEXT_NS

    def goes_on(self, t0_ns: int, t1_ns: int) -> bool:
        """Let the newest step's run have a step more, from ``t0_ns`` to ``t1_ns``; False: it cannot, a new one has to begin."""
        tail = self.tail
        if tail is None or tail.t1_ns != t0_ns or t1_ns <= t0_ns or tail.over or len(tail.ends) >= LONGEST_RUN:
            return False
        tail.ends.append(t1_ns)
        tail.t1_ns = self.computed_ns = t1_ns
        self.number += 1
        self.tick += 1
        return True

    def running(self, t_ns: int) -> bool:
        """Whether somebody who is open stood in the newest step, and it ended before ``t_ns``."""
        if self.t1_ns >= t_ns:
            return False
        return len(self.riding) > len(self.ended) or any(one.close_ns is None for one in self.last)

    def holds(self, activity: Activity) -> bool:
        """Whether the activity stands in the newest step."""
        return activity in self.riding or activity in self.last

    def join(self, name: str, activity: Activity, context: int) -> bool:
        """``name`` enters the set with this context before the next step; whether its activity was not in it yet."""
        if name in self.members:
            self.leave(name)
        rider = self.riding.get(activity)
        new = rider is None
        if rider is None:
            rider = self.riding[activity] = Rider(activity)
            activity.riders[rider] = self
        offset = context - self.tick
        self.members[name] = (rider, offset)
        self._counts[rider] = self._counts.get(rider, 0) + 1
        self.offsets += offset
        self.changes.append(Change(rider, 1, offset))
        return new

    def leave(self, name: str) -> None:
        """``name`` is not in the set from the next step on."""
        member = self.members.pop(name, None)
        if member is None:
            return
        rider, offset = member
        self.offsets -= offset
        self.changes.append(Change(rider, -1, -offset))
        left = self._counts[rider] = self._counts[rider] - 1
        if not left:
            activity = rider.activity
            del self._counts[rider]
            if self.riding.get(activity) is rider:
                twin = next((one for one in self._counts if one.activity is activity), None) if self._twins else None
                if twin is not None:
                    self.riding[activity] = twin
                else:
                    del self.riding[activity]
                    self.ended.discard(activity)
            if activity.riders.get(rider) is self:
                activity.riders[rider] = None
                activity.stood(self.computed_ns)
        if not self.members:
            self.tick = 0

    def over(self, t_ns: int) -> list[tuple[str, int]]:
        """Ids of activities that were closed by ``t_ns`` (or have settled) and are still in the set leave it, with the contexts
        they have.
        """
        found: list[tuple[str, int]] = []
        for activity in [one for one in self.ended if one.settled or (one.close_ns or 0) <= t_ns]:
            names = [(name, at + self.tick) for name, (one, at) in self.members.items() if one.activity is activity]
            for name, _ in names:
                self.leave(name)
            found += names
        return found

    def replace(self, rider: Rider, before: Activity) -> None:
        """``rider`` stands for another activity than ``before``."""
        activity = rider.activity
        self.tail = None
        if self.riding.get(before) is rider:
            del self.riding[before]
            self.ended.discard(before)
        self._twins |= activity in self.riding
        self.riding[activity] = rider
        if activity.close_ns is not None:
            self.ended.add(activity)

    def whole(self) -> list[Change]:
        """The set as one change from nothing."""
        sums: dict[Rider, list[int]] = {}
        for rider, offset in self.members.values():
            held = sums.setdefault(rider, [0, 0])
            held[0] += 1
            held[1] += offset
        return [Change(rider, *held) for rider, held in sums.items()]

    def forget(self, activity: Activity) -> None:
        """A settled activity stands in no newest step any more."""
        self.last.discard(activity)


def pass_on(rider: Rider, activity: Activity) -> None:
    """``activity`` takes the place of whom ``rider`` stood for, from where its joules have been reckoned up to."""
    before = rider.activity
    for clock in rider.marks:
        clock.rename(rider, activity)
    lane = before.riders.pop(rider, None)
    rider.activity = activity
    activity.riders[rider] = lane
    if lane is not None:
        lane.replace(rider, before)
