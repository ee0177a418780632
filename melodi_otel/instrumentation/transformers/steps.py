"""The step clock of one ``generate()``, and its times as engine steps.

The generation loop asks ``_has_unfinished_sequences`` once before its first step and once after every step, at a moment
when the host has waited for the device. So call 1 is the start of the loop and call k + 1 the end of step k::

    begin      call 1        call 2        call 3              call N + 1
      |--prepare-|              |             |        ...         |
      |<---- step 1 ---------->|<- step 2 -->|                    |     the prompt is computed in step 1,
      |   prefill + 1st token  |  2nd token  |                    |     which also gives the first token

The generating thread appends one integer per step and nothing else. Whoever wants them (the thread that settles, at every
movement of a sensor and once more when the call is over) turns new times into ``Meter.step``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Final

from melodi_otel.attribution.meter import Decode, EngineId, Joined, Meter, Prefill
from melodi_otel.instrumentation.transformers.request import Request

_NONE: Final = Decode(0, 0)


class Lane:
    """Where the steps of one call go, loop after loop.

    Args:
        number: its number at the engine.

    Attributes:
        seq: the number of its newest step.
        members: the rows of the loop that stepped last.
        lock: held by who hands over steps; every loop of the call asks for the same one, so their steps stay in order.
    """

    __slots__ = ("lock", "members", "number", "seq")

    def __init__(self, number: int) -> None:
        self.number = number
        self.seq = 0
        self.members: tuple[str, ...] = ()
        self.lock = threading.Lock()


class Steps:
    """What one run of the loop computes, step by step.

    Args:
        start_ns: begin of the run, monotonic.
        request: what was asked for.

    Attributes:
        prompt: the request's prompts.
        ticks: monotonic ns of the calls of the clock.
        drafts: per assisted step, (ids before it, drafts it verifies).
    """

    __slots__ = (
        "_cache",
        "_children",
        "_closed",
        "_context",
        "_copies",
        "_devices",
        "_engine",
        "_lane",
        "_meter",
        "_over",
        "_returned",
        "_sent",
        "_start_ns",
        "drafts",
        "prompt",
        "ticks",
    )

    def __init__(self, start_ns: int, request: Request) -> None:
        self.ticks: list[int] = []
        self.drafts: list[tuple[int, int]] = []
        self.prompt = request.prompt
        self._start_ns = start_ns
        self._copies = request.copies
        self._returned = request.returned
        self._cache = request.cache
        self._meter: Meter | None = None
        self._engine: EngineId | None = None
        self._devices: Sequence[str] | None = None
        self._lane = Lane(0)
        self._children: tuple[str, ...] = ()
        self._context = 0
        self._sent = 0
        self._closed = False
        self._over = False

    @property
    def rows(self) -> int:
        """Sequences that are computed at a time."""
        return self.prompt.rows * self._copies

    def report_to(
        self, meter: Meter, engine: EngineId, lane: Lane, devices: Sequence[str] | None, children: Sequence[str]
    ) -> None:
        """Name the receiver: from now on :meth:`hand_over` has somewhere to go. ``children`` has one id per row."""
        self._engine, self._devices, self._lane, self._children = engine, devices, lane, tuple(children)
        self._meter = meter

    @property
    def done(self) -> int:
        """Steps that ended."""
        return max(len(self.ticks) - 1, 0)

    @property
    def first_token_ns(self) -> int | None:
        """Monotonic ns at which the first token was on the host."""
        return self.ticks[1] if len(self.ticks) > 1 else None

    def output_tokens(self) -> int:
        """Tokens so far over all returned sequences.

        An upper estimate where several sequences run together: which of them has reached its end of sequence is known
        only on the device until the call returns.
        """
        if self.drafts:
            return (self.drafts[-1][0] - self.drafts[0][0]) * self._returned
        return self.done * self._returned

    def probe(self) -> int:
        """Hand over what is new, unless another thread is at it, and say how many tokens there are."""
        lock = self._lane.lock
        if lock.acquire(blocking=False):
            try:
                over = self._over
                self._hand_over(early=not over)
                self._closed |= over
            finally:
                lock.release()
        return self.output_tokens()

    def close(self) -> None:
        """The run is over: the next probe hands over what is left, and the last one that does."""
        self._over = True

    def _hand_over(self, *, early: bool) -> None:
        meter, engine, prompt = self._meter, self._engine, self.prompt
        if self._closed or meter is None or engine is None or self.done <= self._sent:
            return
        if prompt.early or not early:
            prompt.settle()
        if prompt.tokens is None or prompt.computed is None:
            return  # what a step computed is not known (yet): better none than invented ones
        step, lane, devices, members = meter.step, self._lane, self._devices, len(self._children)
        for index in range(self._sent + 1, self.done + 1):
            t0_ns = self._start_ns if index == 1 else self.ticks[index - 1]
            t1_ns = self.ticks[index]
            self._sent = index
            lane.seq = seq = lane.seq + 1
            if index > 2 and self._cache and not self.drafts:
                # Nearly all steps are of this kind: the same rows, one token each.
                decode = Decode(members, self._context + members * (index - 2))
                step(engine, lane.number, seq, t0_ns, t1_ns, devices, decode=decode)
                continue
            decode, prefill, verified, joined = self._work(index, prompt.tokens, prompt.computed)
            left: tuple[str, ...] = ()
            if index == 1:
                left, lane.members = lane.members, self._children
            step(
                engine,
                lane.number,
                seq,
                t0_ns,
                t1_ns,
                devices,
                decode=decode,
                prefill=prefill,
                computed=verified,
                joined=joined,
                left=left,
            )

    def _work(
        self, index: int, tokens: Sequence[int], computed: Sequence[int]
    ) -> tuple[Decode, Sequence[Prefill], Sequence[Prefill], Sequence[Joined]]:
        """What step ``index`` computed: decode set, prompts, drafts, and who enters the set."""
        if index == 1:
            # at least the last position is computed, or there would be no first token
            return _NONE, [Prefill(c, max(new, 1), all_ - new) for c, all_, new in self._rows(tokens, computed)], (), ()
        if not self._cache:  # every step computes everything again
            return _NONE, [Prefill(c, all_ + index - 1, 0) for c, all_, _ in self._rows(tokens, computed)], (), ()
        if len(self.drafts) >= index:
            before, drafts = self.drafts[index - 1]
            # the newest token is not in the cache yet: it is computed together with the drafts
            return _NONE, (), [Prefill(child, 1 + drafts, before - 1) for child in self._children], ()
        if index == 2:
            self._context = sum(tokens) * self._copies
            joined = [Joined(c, all_) for c, all_, _ in self._rows(tokens, computed)]
            return Decode(len(self._children), self._context), (), (), joined
        # assisted decoding that fell back to a plain step
        members = len(self._children)
        return Decode(members, self._context + members * (index - 2)), (), (), ()

    def _rows(self, tokens: Sequence[int], computed: Sequence[int]) -> Iterator[tuple[str, int, int]]:
        """Per computed row its id, its prompt's tokens, and those of them that are computed."""
        for row, child in enumerate(self._children):
            yield child, tokens[row // self._copies], computed[row // self._copies]
