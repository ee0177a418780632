"""Engine steps as they arrive: deltas made whole, lanes kept apart, work put in rows, every device told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from melodi_otel.attribution.account import Account
from melodi_otel.attribution.activity import Activity
from melodi_otel.attribution.engines import EngineState, Work, by_id, with_host
from melodi_otel.attribution.lanes import NEXT_NS, Lane, Step, WorkRow
from melodi_otel.attribution.meter import Decode, EngineId, Joined, Prefill
from melodi_otel.attribution.roster import Roster
from melodi_otel.attribution.weights import touched

SAME_LANE_NS: Final = 1_000_000
"""Steps given without a lane that overlap by less than this follow each other: clocks and rounding differ by that much."""


class Arrivals:
    """Takes steps.

    Args:
        roster: who is there; ids that nobody has opened become anonymous activities.
        accounts: the devices' accounts, which keep steps until their intervals close.
        host_devices: ids of CPU packages and memory that every step uses beside its accelerators.
        board: names of devices with those of slices replaced by their boards'.
    """

    def __init__(
        self,
        roster: Roster,
        accounts: Mapping[str, Account],
        host_devices: Sequence[str],
        board: Callable[[tuple[str, ...]], tuple[str, ...]] = tuple,
    ) -> None:
        self._roster = roster
        self._accounts = accounts
        self._host_devices = host_devices
        self._board = board

    def step(
        self,
        engine: EngineId,
        lane: int,
        seq: int,
        t0_ns: int,
        t1_ns: int,
        devices: tuple[str, ...] | None,
        decode: Decode,
        prefill: Sequence[Prefill],
        computed: Sequence[Prefill],
        joined: Sequence[Joined],
        left: Sequence[str],
    ) -> None:
        """See :meth:`melodi_otel.attribution.meter.Meter.step`."""
        state = self._roster.engines.get(engine) or self._roster.engine(engine)
        run = state.lanes.get(lane)
        if run is None:
            run = state.lanes[lane] = Lane()
        elif (
            decode[0]
            and run.follows(seq, t0_ns)
            and not (joined or left or prefill or computed)
            and self._same(state, run, devices)
            and run.goes_on(run.t1_ns, t1_ns)
        ):
            # As nearly all steps are: the set goes on, and nothing has to be looked at.
            run.seq, run.t1_ns = seq, t1_ns
            return
        # Where deltas are lost the client resends its set, and what ran in the gap is seen as slices.
        state.gaps += not run.follow(seq)
        t0_ns, t1_ns = self._placed(state, run, t0_ns, t1_ns)
        if not (joined or left or prefill or computed) and self._goes_on(
            state, run, t0_ns, t1_ns, devices, decode.n > 0
        ):
            return
        for name in left:
            run.leave(name)
        if run.ended:
            joined = [*_over(run, t0_ns), *joined]
        new = self._join(state, run, joined, t0_ns) if joined else []
        for row in computed:
            run.leave(row.id)
        work = [Work(row.id, row.tokens, 0, row.context) for row in prefill]
        work += [Work(row.id, 0, row.tokens, row.context) for row in computed]
        self._add(state, run, t0_ns, t1_ns, devices, work, new, decode.n > 0)

    def work(
        self,
        engine: EngineId,
        t0_ns: int,
        t1_ns: int,
        devices: tuple[str, ...] | None,
        work: Sequence[Work],
        number: int | None,
    ) -> None:
        """A step with its full work; ``number`` is its lane, None: the first lane that is free."""
        self.whole(engine, t0_ns, t1_ns, devices, by_id(work), number)

    def whole(
        self,
        engine: EngineId,
        t0_ns: int,
        t1_ns: int,
        devices: tuple[str, ...] | None,
        work: Mapping[str, tuple[int, int, int]],
        number: int | None,
    ) -> None:
        """:meth:`work` by id: (prompt tokens, decode tokens, context after)."""
        state = self._roster.engine(engine)
        run = (
            state.lanes.get(number)
            if number is not None
            else next((lane for lane in state.lanes.values() if lane.t1_ns <= t0_ns + SAME_LANE_NS), None)
        )
        if run is None:
            run = state.lanes[len(state.lanes) if number is None else number] = Lane()
        t0_ns, t1_ns = self._placed(state, run, t0_ns, t1_ns)
        # Who goes on as the set expects it stays in it; nothing is done for them.
        members, after_tick = run.members, run.tick + 1
        stay = 0
        rows: list[Work] = []
        joined: list[Joined] = []
        for name, (prefill, decode, after) in work.items():
            if decode == 1 and not prefill:
                member = members.get(name)
                if member is not None and member[1] + after_tick == after:
                    stay += 1
                else:
                    joined.append(Joined(name, max(0, after - 1)))
            else:
                rows.append(Work(name, prefill, decode, max(0, after - prefill - decode)))
        if stay < len(members):
            staying = {name for name, (prefill, decode, _) in work.items() if decode == 1 and not prefill}
            for name in [name for name in members if name not in staying]:
                run.leave(name)
        if not (joined or rows) and self._goes_on(state, run, t0_ns, t1_ns, devices, stay > 0):
            return
        if run.ended:
            joined += _over(run, t0_ns)
        new = self._join(state, run, joined, t0_ns) if joined else []
        self._add(state, run, t0_ns, t1_ns, devices, rows, new, stay > 0 or bool(joined))

    def _goes_on(
        self, state: EngineState, run: Lane, t0_ns: int, t1_ns: int, devices: tuple[str, ...] | None, computes: bool
    ) -> bool:
        """Take a step of the set as it was in the step before; False: something is new, and has to be looked at."""
        if not computes or run.last or not self._same(state, run, devices):
            return False
        if not run.goes_on(t0_ns, t1_ns):
            step = Step(state.id, run, t0_ns, t1_ns, (), (), True, 0.0)
            run.tail = None
            if step.participants:
                self._tell(step, run, run.named or ())
        return True

    def _same(self, state: EngineState, run: Lane, devices: tuple[str, ...] | None) -> bool:
        """Whether a step of the lane's set needs no look: nobody came or went, the devices are those it ran on."""
        return (
            not run.changes
            and not run.ended
            and run.named is not None
            and (
                run.named == state.devices if devices is None else devices == run.given and run.named == run.given_named
            )
            and state.facts.routed is None
            and state.evidence == "steps"
        )

    def _placed(self, state: EngineState, run: Lane, t0_ns: int, t1_ns: int) -> tuple[int, int]:
        """From when to when a step ran, behind the one before."""
        if t0_ns < run.t1_ns:
            state.clipped += 1
            t0_ns = run.t1_ns
        elif run.number and t1_ns > t0_ns <= run.t1_ns + NEXT_NS:  # as Lane.follows
            t0_ns = run.t1_ns
        t1_ns = max(t0_ns, t1_ns)
        run.t1_ns = t1_ns
        return t0_ns, t1_ns

    def _join(self, state: EngineState, run: Lane, joined: Sequence[Joined], t0_ns: int) -> list[Activity]:
        """Ids enter the set; their activities that were not in it."""
        new: list[Activity] = []
        group = state.id.group
        for name, context in joined:
            activity = self._roster.participant(group, name, t0_ns)
            if run.join(name, activity, context):
                new.append(activity)
        return new

    def _add(
        self,
        state: EngineState,
        run: Lane,
        t0_ns: int,
        t1_ns: int,
        devices: tuple[str, ...] | None,
        work: Sequence[Work],
        new: list[Activity],
        computes: bool,
    ) -> None:
        rows, coverage = self._rows(state, run, work, t0_ns, computes)
        step = Step(state.id, run, t0_ns, t1_ns, rows, run.changes, computes, coverage)
        run.changes, run.tail = [], None
        if rows or run.last:
            run.last = {row.activity for row in rows}
        if devices is not None:
            if devices != run.given:
                run.given, run.given_named = devices, with_host(self._board(devices), self._host_devices)
            named = run.given_named
        elif state.devices is not None:
            named = state.devices
        else:
            named = rows[0].activity.devices if rows else next(iter(run.riding)).devices if run.riding else ()
        told = [*(row.activity for row in rows), *new] if rows else new
        if named != run.named and step.participants:
            told = [*told, *run.riding]
            run.named = named
            state.on.update(named)
        for activity in told:
            if activity.engine != state.id:
                self._belongs(activity, state)
            for device in named:
                activity.step_devices[device] = None
            state.unstepped.pop(id(activity), None)
            if activity in run.ended or activity.close_ns is None:
                continue
            if activity in run.riding:
                run.ended.add(activity)
        for row in rows:
            row.activity.stood(t1_ns)
        state.evidence = "steps"
        if step.participants or step.changes:
            self._tell(step, run, named)

    def _tell(self, step: Step, run: Lane, named: Sequence[str]) -> None:
        """Hand a step to the devices it ran on; those of earlier steps have to know of its changes, new ones of the whole set."""
        alike = step.members > 0 and not step.rows and step.t1_ns > step.t0_ns and not step.x.coverage
        for device in named:
            account = self._accounts.get(device)
            if account is None:
                continue
            if device in run.on:
                account.steps.append(step)
            else:
                alike = False
                run.on.add(device)
                account.steps.append(step.copy(run.whole(), ran=True))
        if alike:
            run.tail = step
        if step.changes and not run.on.issubset(named):
            for device in run.on.difference(named):
                self._accounts[device].steps.append(step.copy(step.changes, ran=False))

    def _rows(
        self, state: EngineState, run: Lane, work: Sequence[Work], t0_ns: int, computes: bool
    ) -> tuple[list[WorkRow], float]:
        """The work outside of the set by activity, and the part of the experts that the step touches."""
        routed = state.facts.routed
        members = len(run.members) if computes else 0
        if not work and routed is None:
            return [], 0.0
        rows: dict[Activity, WorkRow] = {}
        group = state.id.group
        whole, tokens = 0.0, float(members)
        for name, prefill, decode, context in work:
            activity = self._roster.participant(group, name, t0_ns)
            row = rows.get(activity)
            if row is None:
                row = rows[activity] = WorkRow(activity)
            row.participants += 1
            row.prefill += prefill
            row.decode += decode
            row.cache += context
            if prefill:
                row.in_prefill = True
                row.attention += prefill * (context + prefill / 2.0)
            if routed is not None:
                row.touched += touched(routed[0], prefill + decode)
            tokens += prefill + decode
        if routed is None:
            return list(rows.values()), 0.0
        coverage = touched(routed[0], tokens)
        whole = sum([row.touched for row in rows.values()]) + members * touched(routed[0], 1.0)
        for row in rows.values():
            row.touched *= coverage / whole
        return list(rows.values()), coverage

    def _belongs(self, activity: Activity, state: EngineState) -> None:
        """A step names a request that was opened without its engine, or with another one, which has not computed it."""
        before = None if activity.engine is None else self._roster.engines[activity.engine]
        if before is None or before.evidence != "steps" or activity.last_step_ns is None:
            self._roster.belongs(activity, state)


def _over(run: Lane, t0_ns: int) -> list[Joined]:
    """Ids that are in the set and over: a settled share is never revised, so they are somebody unknown from ``t0_ns`` on."""
    return [Joined(name, context) for name, context in run.over(t0_ns)]
