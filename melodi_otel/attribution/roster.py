"""Who is known under which id: open requests, ids bound to them, steps that nobody has opened yet, and engines.

Requests and steps come from different processes and in any order. An id that no request has opened makes an *anonymous*
activity at once; an ``open`` or ``bind`` that follows adopts it. Work after a close is kept apart under the name
``anonymous``, because a settled share is never revised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from melodi_otel.attribution.account import Account
from melodi_otel.attribution.activity import Accrual, Activity
from melodi_otel.attribution.books import Who
from melodi_otel.attribution.engines import EngineState
from melodi_otel.attribution.lanes import pass_on
from melodi_otel.attribution.meter import EngineId, Key
from melodi_otel.attribution.riding import reckon

ADOPT_NS: Final = 5_000_000_000
"""An open or bind within this time adopts the steps of an id that was not known yet."""
LATE: Final = "anonymous"
"""Request id under which work after a close is kept: a settled share is never revised."""
_REMEMBERED: Final = 100_000
"""Closed ids that are remembered, so that late steps are told from unknown requests."""


class Roster:
    """Activities by key and by id, and the engines that they run on."""

    def __init__(self) -> None:
        self.activities: dict[Key, Activity] = {}
        self.engines: dict[EngineId, EngineState] = {}
        # Opened without an engine: what another one may be in. A server's thousands of requests are none of them.
        self.blocks: dict[Key, Activity] = {}
        self.active: Counter[Who] = Counter()
        """Open requests that somebody has opened, by who."""
        self.strays: dict[Key, Activity] = {}
        """Anonymous ones."""
        self.probed: dict[Key, Activity] = {}
        """Those that can be asked how far they are."""
        self._ids: dict[tuple[str, str], Activity] = {}
        self._closed: dict[tuple[str, str], None] = {}

    def engine(self, engine: EngineId) -> EngineState:
        """The engine, made known by whatever names it first."""
        state = self.engines.get(engine)
        if state is None:
            state = self.engines[engine] = EngineState(engine)
        return state

    def add(self, activity: Activity) -> None:
        """A request has been opened."""
        at = (activity.key.group, activity.key.request)
        self.activities[activity.key] = activity
        self.strays.pop(activity.key, None)
        self.active[activity.who] += 1
        if activity.probe is not None:
            self.probed[activity.key] = activity
        self._ids[at] = activity
        self._closed.pop(at, None)

    def bind(self, activity: Activity, child_id: str) -> Activity | None:
        """``child_id`` stands for ``activity`` from now on; returns an anonymous activity that had it until now."""
        at = (activity.key.group, child_id)
        before = self._ids.get(at)
        activity.children.append(child_id)
        activity.rows = len(activity.children)
        self._ids[at] = activity
        self._closed.pop(at, None)
        return before if before is not None and before.anonymous and before is not activity else None

    def participant(self, group: str, name: str, t0_ns: int) -> Activity:
        """Whoever ``name`` stands for in a step that began at ``t0_ns``."""
        at = (group, name)
        activity = self._ids.get(at)
        if activity is not None and not activity.settled:
            if activity.close_ns is None or t0_ns < activity.close_ns:
                return activity
            return self._stray(Key(group, LATE), t0_ns)
        if at in self._closed:
            return self._stray(Key(group, LATE), t0_ns)
        stray = self._stray(Key(group, name), t0_ns)
        self._ids[at] = stray
        return stray

    def _stray(self, key: Key, t0_ns: int) -> Activity:
        found = self.activities.get(key)
        if found is not None:
            return found  # also one that is closing: a second one under its key would push its joules out of the books
        stray = self.activities[key] = self.strays[key] = Activity(key, t0_ns, anonymous=True)
        return stray

    def adopt(self, key: Key, t_ns: int) -> Activity | None:
        """The anonymous activity that ``key`` turns out to be, open again if it was closing; None where there is none."""
        stray = self.activities.get(key)
        if stray is None or not stray.anonymous:
            return None
        stray.close_ns = None
        for rider, lane in stray.riders.items():
            if lane is not None:
                lane.ended.discard(rider.activity)
        stray.open_ns = min(t_ns, stray.open_ns)
        return stray

    def named(self, activity: Activity, who: Who, accounts: Mapping[str, Account]) -> None:
        """It is known now whose the joules are that ``activity`` accrued while only its steps had told of it."""
        for rider in activity.riders:
            for clock in rider.marks:
                clock.regroup(rider, who)
        activity.who = who
        reckon(activity)
        for device, accrual in activity.accruals.items():
            accounts[device].rename(accrual, activity.who)

    def disown(self, activity: Activity, accounts: Mapping[str, Account]) -> None:
        """What is left of a settled request's steps in intervals that could not be waited for is somebody unknown's."""
        end_ns = activity.end_ns or 0
        riders = [
            rider
            for rider in activity.riders
            if any((accounts[clock.device].closed_until or 0) < end_ns for clock in rider.marks)
        ]
        if not riders:
            return
        reckon(activity)
        stray = self._stray(Key(activity.key.group, LATE), activity.end_ns or activity.open_ns)
        for rider in riders:
            pass_on(rider, stray)
        if stray.engine is None and activity.engine is not None:
            self.belongs(stray, self.engines[activity.engine])
        stray.step_devices.update(activity.step_devices)
        stray.stood(activity.end_ns or activity.open_ns)

    def belongs(self, activity: Activity, engine: EngineState) -> None:
        """It is ``engine`` that computes ``activity``, whichever it was opened with."""
        if activity.engine is not None:
            self.engines[activity.engine].drop(activity)
        activity.engine = engine.id
        if not activity.settled:
            engine.add(activity)

    def merge(self, stray: Activity, into: Activity, accounts: Iterable[Account]) -> None:
        """What ``stray`` accrued, and its steps in intervals that are still open, are those of ``into``."""
        reckon(stray)
        stepped = into.last_step_ns is not None
        for device, accrual in stray.accruals.items():
            into.accruals.setdefault(device, Accrual()).merge(accrual)
            into.step_devices[device] = None
        into.step_devices.update(stray.step_devices)
        for rider in list(stray.riders):
            pass_on(rider, into)
        for account in accounts:
            if account.device.id in stray.accruals:
                account.rename(into.accruals[account.device.id], into.who)
            for step in account.steps:
                if step.only is stray:
                    step.only = into
                for row in step.rows:
                    if row.activity is stray:
                        row.activity = into
        self.activities.pop(stray.key, None)
        self.strays.pop(stray.key, None)
        if stray.engine is not None:
            computes = self.engines[stray.engine]
            computes.drop(stray)
            for lane in computes.lanes.values():
                if stray in lane.last:
                    lane.last.remove(stray)
                    lane.last.add(into)
            # The engine that computes it is known from here on, whichever it was opened with.
            if into.engine is None or not stepped:
                self.belongs(into, computes)
            computes.unstepped.pop(id(into), None)
        if stray.stood_ns is not None:
            into.stood(stray.stood_ns)

    def only_block(self, request: Activity) -> Activity | None:
        """The block of code that a request without a known parent runs in.

        A thread does not inherit the context of the block that started it (a streamer's thread is the usual case). Where
        exactly one innermost block of this group is open, the request is in it; with several, nobody can tell.
        """
        if request.engine is None:
            return None
        blocks = [
            activity
            for activity in self.blocks.values()
            if activity.engine is None
            and activity.close_ns is None
            and activity.late is None
            and activity.key.group == request.key.group
        ]
        inner = [block for block in blocks if not any(other.parent is block for other in blocks)]
        return inner[0] if len(inner) == 1 else None

    def ended(self, activity: Activity) -> None:
        """A request was closed: its ids are those of finished work from now on."""
        if not activity.anonymous:
            self.active[activity.who] -= 1
            if not self.active[activity.who]:
                del self.active[activity.who]
        if activity.engine is not None:
            self.engines[activity.engine].ended(activity)
        for lane in activity.riders.values():
            if lane is not None:
                lane.ended.add(activity)
        for name in (activity.key.request, *activity.children):
            self._closed[(activity.key.group, name)] = None
        if len(self._closed) > _REMEMBERED:
            for at in list(self._closed)[: _REMEMBERED // 2]:
                del self._closed[at]

    def remove(self, activity: Activity) -> None:
        """A request has settled."""
        self.activities.pop(activity.key, None)
        self.strays.pop(activity.key, None)
        self.probed.pop(activity.key, None)
        self.blocks.pop(activity.key, None)
        for name in (activity.key.request, *activity.children):
            at = (activity.key.group, name)
            if self._ids.get(at) is activity:
                del self._ids[at]
        if activity.engine is not None:
            self.engines[activity.engine].forget(activity)
