"""Engine steps of continuous batching: the rows of a scheduled batch in the delta form of ``Meter.step``.

One loop steps many requests at once::

    schedule   batch 1 runs   update    schedule   batch 2 runs   update
      |-------------------------|          |
      |<------ step 1 --------->|<--------------- step 2 ----------->|

Where the loop goes on at once, a step begins where the last one ended: what the host does in between is done for those that
run. Where it had nothing to do, or was paused, the step begins when the next batch is scheduled. With two batches in flight
the device computes the second one while the first is updated, so from update to update is what the device spent on it.

A loop that serves 256 requests comes by here once per step, so a batch of the same sequences as before is recognised
without looking at each of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from melodi_otel.attribution.meter import Decode, EngineId, Joined, Meter, Prefill

_NONE: Final = Decode(0, 0)


class Row(Protocol):
    """A sequence of a request as it stands in steps."""

    child: str
    """Its id there."""
    reached: int
    """Positions computed so far: a step that begins before them computes something again."""

    def scheduled(self, context: int, state: Any, gives_token: bool) -> bool:
        """It is about to be computed otherwise than one token after the last: whether its first token comes of it."""
        ...

    def first_token(self, t_ns: int) -> None:
        """The first token was on the host."""
        ...


@dataclass(slots=True)
class Scheduled:
    """One sequence in one batch, in the words of transformers 5."""

    state: Any
    query_length: int
    has_new_token: bool


def batch_of(processor: Any) -> Sequence[Any]:
    """What ``processor`` has just scheduled: objects with the attributes of :class:`Scheduled`."""
    ios = getattr(processor, "inputs_and_outputs", None)
    if ios is None:  # 4.57: the states themselves
        return [
            Scheduled(state, len(state.prompt_ids), not state.remaining_prompt_ids)
            for state in processor.requests_in_batch
        ]
    pairs = getattr(ios, "io_pairs", None)
    batch: Sequence[Any] = (ios if pairs is None else pairs[ios.current_pair].host_io).requests_in_batch
    return batch


def prompt_of(state: Any) -> Sequence[int]:
    """The tokens that ``state`` was admitted with: its prompt, after a reset also what it had generated."""
    tokens: Sequence[int] | None = getattr(state, "initial_tokens", None)
    return state.full_prompt_ids if tokens is None else tokens


class _Flight:
    """A batch on its way: what it computes, and whose first token it gives."""

    __slots__ = ("computed", "decode", "firsts", "joined", "left", "over", "prefill")

    def __init__(
        self,
        decode: Decode,
        prefill: Sequence[Prefill],
        joined: Sequence[Joined],
        left: Sequence[str],
        firsts: Sequence[Row],
    ) -> None:
        self.decode = decode
        self.prefill = prefill
        self.joined = joined
        self.left = left
        self.firsts = firsts
        self.over = False


class Lane:
    """One loop's sequence of steps.

    Args:
        number: its lane in the engine; another loop of the model may go on with it once this one is over.
    """

    __slots__ = (
        "_ahead",
        "_context",
        "_devices",
        "_engine",
        "_flights",
        "_last_ns",
        "_leaving",
        "_length_ns",
        "_members",
        "_meter",
        "_number",
        "_seq",
        "_states",
    )

    def __init__(self, number: int) -> None:
        self._number = number
        self._seq = 0
        self._meter: Meter | None = None
        self._engine: EngineId | None = None
        self._devices: Sequence[str] | None = None
        self._flights: deque[_Flight] = deque()
        self._last_ns: int | None = None  # where the next step begins; None: when its batch is scheduled
        self._length_ns = 0
        self._leaving: list[str] = []
        # the decode set: engine's id -> context at its next step, but for the steps of the same set since (_ahead)
        self._members: dict[str, int] = {}
        self._ahead = 0
        # the states of the last batch, if all of them decoded, and the sum of their contexts
        self._states: list[Any] = []
        self._context = 0

    def report_to(self, meter: Meter, engine: EngineId, devices: Sequence[str] | None) -> None:
        """Name the receiver; a model that has moved is on other devices from then on."""
        self._meter, self._engine, self._devices = meter, engine, devices

    def begin(self, now_ns: int) -> None:
        """The loop looks for work: what it finds begins now, unless a step has just ended."""
        if self._last_ns is None:
            self._last_ns = now_ns

    def resume(self, now_ns: int) -> None:
        """The loop was held up by somebody else until now."""
        self._last_ns = now_ns

    def idle(self, now_ns: int, computed: Callable[[], bool]) -> None:
        """It found none. ``computed``: whether the batch that is still in flight has been computed."""
        flights = self._flights
        if not flights:
            self._last_ns = None
        elif not flights[0].over and computed():
            # Nobody asks for its result until there is more work. It computes what the step before it did, if anything.
            begun = now_ns if self._last_ns is None else self._last_ns
            self._land(flights[0], min(now_ns, begun + self._length_ns))
            self._last_ns = None

    def launch(self, batch: Sequence[Any], find: Callable[[str], Row]) -> None:
        """``batch`` is about to run. ``find`` knows the row of an id of the engine."""
        states = [one.state for one in batch]
        count = len(states)
        # identical objects compare as equal without being looked into
        if states == self._states:
            context = sum([state.position_offset for state in states]) - count
            if context == self._context + count:
                self._context = context
                self._ahead += 1
                self._flights.append(_Flight(Decode(count, context), (), (), (), ()))
                return
        self._flights.append(self._changed(batch, states, find))

    def _changed(self, batch: Sequence[Any], states: list[Any], find: Callable[[str], Row]) -> _Flight:
        before, ahead = self._members, self._ahead
        members: dict[str, int] = {}
        total = kept = 0
        prefill: list[Prefill] = []
        joined: list[Joined] = []
        firsts: list[Row] = []
        for one in batch:
            state = one.state
            name = state.request_id
            tokens = one.query_length
            context = state.position_offset - tokens
            expected = before.get(name)
            if expected is not None and expected + ahead == context and tokens == 1:
                kept += 1
                members[name] = context + 1
                total += context
                continue
            row = find(name)
            if expected is not None:
                row.reached = max(row.reached, expected + ahead)
            if row.scheduled(context, state, one.has_new_token):
                firsts.append(row)
            if tokens == 1 and context >= row.reached and context >= len(prompt_of(state)):
                joined.append(Joined(row.child, context))
                members[name] = context + 1
                total += context
            else:
                prefill.append(Prefill(row.child, tokens, context))
            row.reached = max(row.reached, context + tokens)
        left, self._leaving = self._leaving, []
        if kept != len(before):
            for name, expected in before.items():
                if name not in members:
                    row = find(name)
                    row.reached = max(row.reached, expected + ahead)
                    left.append(row.child)
        self._members, self._ahead = members, 0
        steady = bool(members) and not prefill
        self._states, self._context = (states, total) if steady else ([], 0)
        return _Flight(Decode(len(members), total) if members else _NONE, prefill, joined, left, firsts)

    def land(self, now_ns: int) -> None:
        """The oldest batch in flight has been computed."""
        if self._flights:
            flight = self._flights.popleft()
            if not flight.over:
                self._land(flight, now_ns)

    def _land(self, flight: _Flight, now_ns: int) -> None:
        flight.over = True
        begun = now_ns if self._last_ns is None else min(self._last_ns, now_ns)
        self._last_ns = now_ns
        self._length_ns = now_ns - begun
        for row in flight.firsts:
            row.first_token(now_ns)
        self._seq += 1
        meter, engine = self._meter, self._engine
        if meter is not None and engine is not None:
            meter.step(
                engine,
                self._number,
                self._seq,
                begun,
                now_ns,
                self._devices,
                decode=flight.decode,
                prefill=flight.prefill,
                joined=flight.joined,
                left=flight.left,
            )

    def leave(self, name: str, child: str) -> None:
        """The engine's ``name`` is over: it stands in no batch that is scheduled from now on."""
        if self._members.pop(name, None) is not None:
            self._leaving.append(child)
            self._states = []

    def clear(self, find: Callable[[str], Row]) -> None:
        """The loop is over: whoever still is in the decode set leaves it, and what was in flight is lost."""
        self._leaving += [find(name).child for name in self._members]
        self._members, self._ahead, self._states = {}, 0, []
        self._flights.clear()
        self._last_ns = None
