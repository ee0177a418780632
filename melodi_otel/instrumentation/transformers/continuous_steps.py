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
    state: Any
    """What the engine knows of it, as last scheduled."""

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
        "_bases",
        "_devices",
        "_engine",
        "_flights",
        "_last_ns",
        "_launched",
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
        # The decode set, by the identity of the engine's state. A member takes part in every batch, so its context in batch
        # number n is n plus its base; the sum of the bases tells at once whether all are where they should be.
        self._members: dict[int, tuple[Row, int, Any]] = {}
        self._bases = 0
        self._launched = 0
        self._states: list[Any] = []  # of the last batch, if all of them decoded

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
        self._launched += 1
        states = [one.state for one in batch]
        count = len(states)
        positions = sum([state.position_offset for state in states])
        # identical objects compare as equal without being looked into
        if states == self._states and positions == self._bases + count * (self._launched + 1):
            flight = _Flight(Decode(count, positions - count), (), (), (), ())
        else:
            flight = self._changed(batch, states, positions, find)
        self._flights.append(flight)

    def _changed(self, batch: Sequence[Any], states: list[Any], positions: int, find: Callable[[str], Row]) -> _Flight:
        members, number = self._members, self._launched
        names = list(map(id, states))
        fresh = [one for one, name in zip(batch, names, strict=True) if name not in members]
        left, self._leaving = self._leaving, []
        kept = len(names) - len(fresh)
        if kept != len(members):
            present = set(names)
            left += [self._drop(name) for name in [name for name in members if name not in present]]
        if positions - sum(one.state.position_offset for one in fresh) != self._bases + kept * (number + 1):
            for one in batch:  # somebody does not go on where it was
                member = members.get(id(one.state))
                if member is not None and one.state.position_offset != member[1] + number + 1:
                    left.append(self._drop(id(one.state)))
                    fresh.append(one)
        prefill: list[Prefill] = []
        joined: list[Joined] = []
        firsts: list[Row] = []
        for one in fresh:
            state, tokens = one.state, one.query_length
            context = state.position_offset - tokens
            row = find(state.request_id)
            if row.scheduled(context, state, one.has_new_token):
                firsts.append(row)
            if tokens == 1 and context >= row.reached and context >= len(prompt_of(state)):
                joined.append(Joined(row.child, context))
                members[id(state)] = row, context - number, state
                self._bases += context - number
            else:
                prefill.append(Prefill(row.child, tokens, context))
            row.reached = max(row.reached, context + tokens)
        count = len(members)
        self._states = states if count == len(states) else []
        return _Flight(Decode(count, self._bases + count * number) if count else _NONE, prefill, joined, left, firsts)

    def _drop(self, name: int) -> str:
        row, base, _ = self._members.pop(name)
        self._bases -= base
        self._states = []
        row.reached = max(row.reached, base + self._launched)
        return row.child

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

    def leave(self, row: Row) -> None:
        """``row`` is over: it stands in no batch that is scheduled from now on."""
        if id(row.state) in self._members:
            self._leaving.append(self._drop(id(row.state)))

    def clear(self) -> None:
        """The loop is over: whoever still is in the decode set leaves it, and what was in flight is lost."""
        self._leaving += [self._drop(name) for name in list(self._members)]
        self._flights.clear()
        self._last_ns = None

    def lost(self) -> None:
        """Something went wrong here: the number that is left out says so, and the next step sends the whole set."""
        self.clear()
        self._leaving = []
        self._seq += 1
