"""Engine steps as they arrive: deltas made whole, lanes kept apart, rows priced, every device told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from melodi_otel.attribution.account import Account
from melodi_otel.attribution.activity import Activity
from melodi_otel.attribution.engines import EngineState, Lane, Step, Work, price, with_host
from melodi_otel.attribution.meter import Decode, EngineId, Joined, Prefill
from melodi_otel.attribution.roster import Roster
from melodi_otel.attribution.weights import CostModel
from melodi_otel.devices import Device

SAME_LANE_NS: Final = 1_000_000
"""Steps given without a lane that overlap by less than this follow each other: clocks and rounding differ by that much."""


class Arrivals:
    """Takes steps.

    Args:
        roster: who is there; ids that nobody has opened become anonymous activities.
        accounts: the devices' accounts, which keep steps until their intervals close.
        model: where weights come from.
        host_devices: ids of CPU packages and memory that every step uses beside its accelerators.
        board: names of devices with those of slices replaced by their boards'.
    """

    def __init__(
        self,
        roster: Roster,
        accounts: Mapping[str, Account],
        model: CostModel,
        host_devices: Sequence[str],
        board: Callable[[tuple[str, ...]], tuple[str, ...]] = tuple,
    ) -> None:
        self._roster = roster
        self._accounts = accounts
        self._model = model
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
        state = self._roster.engine(engine)
        run = state.lanes.setdefault(lane, Lane())
        # Where deltas are lost the client resends its set, and what ran in the gap is seen as slices.
        state.gaps += not run.follow(seq)
        self._add(state, run, t0_ns, t1_ns, devices, run.advance(decode, prefill, computed, joined, left))

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
        state = self._roster.engine(engine)
        run = (
            state.lanes.get(number)
            if number is not None
            else next((lane for lane in state.lanes.values() if lane.t1_ns <= t0_ns + SAME_LANE_NS), None)
        )
        if run is None:
            run = state.lanes[len(state.lanes) if number is None else number] = Lane()
        self._add(state, run, t0_ns, t1_ns, devices, work)

    def _add(
        self,
        state: EngineState,
        run: Lane,
        t0_ns: int,
        t1_ns: int,
        devices: tuple[str, ...] | None,
        work: Sequence[Work],
    ) -> None:
        if devices is not None:
            devices = self._board(devices)
        if t0_ns < run.t1_ns:
            state.clipped += 1
            t0_ns = run.t1_ns
        t1_ns = max(t0_ns, t1_ns)
        run.t1_ns = t1_ns
        theta = state.priced(self._model, self._known(devices or state.devices or ()))
        group = state.id.group
        rows = price(theta, work, lambda name: self._roster.participant(group, name, t0_ns))
        named = devices if devices is not None else state.devices
        if named is None:
            named = rows[0].activity.devices if rows else ()
        elif devices is not None:
            named = with_host(devices, self._host_devices)
        step = Step(t0_ns, t1_ns, rows)
        run.last = {row.activity for row in rows}
        for row in rows:
            activity = row.activity
            if activity.engine != state.id:
                self._belongs(activity, state)
            activity.last_step_ns = max(t1_ns, activity.last_step_ns or 0)
            if activity.close_ns is not None:
                activity.end_ns = max(activity.end_ns or 0, t1_ns)
            for device in named:
                activity.step_devices[device] = None
        state.evidence = "steps"
        for device in named:
            account = self._accounts.get(device)
            if account is not None and rows:
                account.steps.append(step)

    def _known(self, names: Sequence[str]) -> Iterator[Device]:
        return (self._accounts[name].device for name in names if name in self._accounts)

    def _belongs(self, activity: Activity, state: EngineState) -> None:
        """A step names a request that was opened without its engine, or with another one, which has not computed it."""
        before = None if activity.engine is None else self._roster.engines[activity.engine]
        if before is None or before.evidence != "steps" or activity.last_step_ns is None:
            self._roster.belongs(activity, state)
