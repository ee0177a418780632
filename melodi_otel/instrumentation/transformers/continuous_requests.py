"""Requests of continuous batching: opened by whoever adds them, ended by the loop that serves them.

A request has a row per sequence: its own, and one per child that the engine forks off. It ends when the last of them does,
and once only, whichever of delivery, cancellation, failure or the end of the loop comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from melodi_otel.attribution.meter import Outcome
from melodi_otel.instrumentation.seam import AttributeValue, Begin, Calls, End, OpenCall
from melodi_otel.instrumentation.transformers.arguments import Arguments
from melodi_otel.instrumentation.transformers.call import PROVIDER
from melodi_otel.instrumentation.transformers.continuous_steps import Lane, batch_of, prompt_of
from melodi_otel.instrumentation.transformers.engines import Engine

_CHILD: Final = "__child#"
"""Between the id of a request and the number of a sequence that the engine forked off it."""
_WORST_FIRST: Final[tuple[Outcome, ...]] = ("error", "abort", "length", "stop")


class BatchedRow:
    """One sequence of a request.

    Attributes:
        child: its id in steps.
        index: which sequence of the request it is.
        reached: positions computed so far.
        state: what the engine knows of it; after a reset that is another object.
        request: None where it was added before anybody looked.
    """

    __slots__ = ("child", "index", "reached", "request", "state")

    def __init__(self, child: str, index: int, state: Any, request: BatchedRequest | None) -> None:
        self.child = child
        self.index = index
        self.reached = 0
        self.state = state
        self.request = request

    def scheduled(self, context: int, state: Any, gives_token: bool) -> bool:
        """See :class:`melodi_otel.instrumentation.transformers.continuous_steps.Row`."""
        self.state = state
        request = self.request
        if request is None:
            return False
        if request.cached_tokens is None:
            request.cached_tokens = context  # there before anything of it was computed: another's prefix
        return gives_token and request.first_token_ns is None

    def first_token(self, t_ns: int) -> None:
        """See :class:`melodi_otel.instrumentation.transformers.continuous_steps.Row`."""
        if self.request is not None and self.request.first_token_ns is None:
            self.request.first_token_ns = t_ns

    def tokens(self) -> int | None:
        """How many it has been given so far; None where nobody knows."""
        return None if self.state is None else len(self.state.to_generation_output().generated_tokens)


class BatchedRequest:
    """A request that was added to a loop.

    Args:
        state: what the engine knows of it.
        rows: how many sequences it will have.
        ended: called once, when it has ended.

    Attributes:
        cached_tokens: prompt tokens that were in the cache before it was first computed; None: it was not yet.
        first_token_ns: monotonic ns at which the first token was on the host.
        rows: its sequences, as far as they exist.
    """

    def __init__(self, state: Any, rows: int, ended: Callable[[BatchedRequest], None]) -> None:
        self.cached_tokens: int | None = None
        self.first_token_ns: int | None = None
        self.rows: list[BatchedRow] = []
        self._opened: OpenCall | None = None
        self._ended = ended
        self._prompt_tokens = len(prompt_of(state))
        self._eos = _token_ids(state.eos_token_id)
        self._awaited = rows
        self._error: BaseException | None = None
        self._over: dict[int, tuple[int | None, Outcome]] = {}
        self._ticket = [None]  # whoever takes it ends the request: to pop is atomic

    def open(self, calls: Calls, begin: Begin) -> None:
        """Report it."""
        self._opened = opened = calls.begin(begin)
        for index in range(self._awaited):
            opened.bind(self.child(index))

    def child(self, index: int) -> str:
        """The id of sequence ``index`` in steps. First :meth:`open`."""
        return "" if self._opened is None else f"{self._opened.key.request}.{index}"

    def delivered(self, index: int, tokens: Sequence[int], now_ns: int) -> None:
        """Sequence ``index`` is complete."""
        self._row_over(index, len(tokens), "stop" if tokens and tokens[-1] in self._eos else "length", now_ns)

    def gave_up(self, row: BatchedRow, outcome: Outcome, now_ns: int, error: BaseException | None = None) -> None:
        """Sequence ``row`` ended before it was complete."""
        if getattr(row.state, "num_children", 0) > 0:
            self._awaited = 1  # it would have been forked only now
        self._error = self._error or error
        self._row_over(row.index, row.tokens(), outcome, now_ns)

    def abandon(self, outcome: Outcome, now_ns: int, error: BaseException | None = None) -> None:
        """Nobody will hear of it any more: what is not complete stays as it is."""
        self._awaited = len(self.rows)
        for row in self.rows:
            if row.index not in self._over:
                self.gave_up(row, outcome, now_ns, error)

    def _row_over(self, index: int, tokens: int | None, outcome: Outcome, now_ns: int) -> None:
        self._over.setdefault(index, (tokens, outcome))
        if len(self._over) < self._awaited:
            return
        try:
            self._ticket.pop()
        except IndexError:
            return
        rows = [self._over[index] for index in sorted(self._over)]
        outcomes = {outcome for _, outcome in rows}
        known = [tokens for tokens, _ in rows if tokens is not None]
        end = End(
            now_ns,
            output_tokens=sum(known) if len(known) == len(rows) else None,
            outcome=next(outcome for outcome in _WORST_FIRST if outcome in outcomes),
            finish_reasons=tuple(outcome for _, outcome in rows if outcome in ("stop", "length")),
            first_token_ns=self.first_token_ns,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self.cached_tokens,
            error=self._error,
        )
        try:
            if self._opened is not None:
                self._opened.end(end)
        finally:
            self._ended(self)


class BatchLoop:
    """One manager's loop: its requests, and the lane of its steps.

    Args:
        name: under which sequences that nobody added here stand in steps; unique in the process.
        ended: called after each end of a request.

    Attributes:
        over: the loop has ended; nothing that is added now is computed.
        error: what it died of.
        engine: the engine of its model, as of the newest request.
        lane: of its steps; None until it looks for work.
        requests: those that are open.
    """

    def __init__(self, name: str, ended: Callable[[], None]) -> None:
        self.over = False
        self.error: BaseException | None = None
        self.engine: Engine | None = None
        self.lane: Lane | None = None
        self.requests: set[BatchedRequest] = set()
        self._name = name
        self._notify = ended
        self._rows: dict[str, BatchedRow] = {}
        self._cancelled: set[str] = set()

    def add(self, calls: Calls, operation: str, engine: Engine | None, manager: Any, state: Any) -> BatchedRequest:
        """Open a request, in the context of whoever adds it: ``state`` has just been made of what was asked for."""
        self.engine = engine
        begin = Begin(
            operation,
            PROVIDER,
            None if engine is None else engine.model,
            calls.now_ns(),
            attributes=_attributes(manager, state),
            prompt_tokens=len(prompt_of(state)),
            engine=None if engine is None else engine.id,
            devices=None if engine is None else engine.devices,
        )
        request = BatchedRequest(state, 1 + int(getattr(state, "num_children", 0)), self._ended)
        request.open(calls, begin)
        before = self._rows.get(state.request_id)
        if before is not None and before.request is not None:
            before.request.abandon("abort", calls.now_ns())  # the engine, too, knows one request of a name
        self.requests.add(request)
        self._know(state.request_id, request, 0, state)
        return request

    def find(self, name: str) -> BatchedRow:
        """The row of an id of the engine."""
        row = self._rows.get(name)
        if row is not None:
            return row
        parent, mark, number = name.rpartition(_CHILD)
        forked = self._rows.get(parent) if mark and number.isdecimal() else None
        if forked is not None and forked.request is not None:
            return self._know(name, forked.request, int(number) + 1, None)
        row = self._rows[name] = BatchedRow(f"{self._name}.{name}", 0, None, None)
        return row

    def _know(self, name: str, request: BatchedRequest, index: int, state: Any) -> BatchedRow:
        row = self._rows[name] = BatchedRow(request.child(index), index, state, request)
        request.rows.append(row)
        return row

    def looked(self, processor: Any, found: bool, now_ns: int) -> None:
        """It has looked for work, and ``found`` a batch."""
        if self._cancelled:
            self._let_go(processor, now_ns)
        if self.lane is None:
            return
        if found:
            self.lane.launch(batch_of(processor), self.find)
        else:
            self.lane.idle(now_ns, lambda: _computed(processor))

    def cancel(self, name: str) -> None:
        """The program wants a request to be cancelled; the loop will see to that, or deliver it before."""
        self._cancelled.add(name)

    def _let_go(self, processor: Any, now_ns: int) -> None:
        scheduler = processor.scheduler
        for name in list(self._cancelled):
            row = self._rows.get(name)
            if row is not None and (name in scheduler.active_requests or name in scheduler.waiting_requests):
                continue
            if row is not None and any(state.request_id == name for state in list(processor.input_queue.queue)):
                continue
            self._cancelled.discard(name)
            if row is not None and row.request is not None:
                self._forget(name, row)
                row.request.gave_up(row, "abort", now_ns)

    def delivered(self, name: str, tokens: Sequence[int], now_ns: int) -> None:
        """A sequence is complete and about to be handed to the program."""
        row = self.find(name)
        self._forget(name, row)
        if row.request is not None:
            row.request.delivered(row.index, tokens, now_ns)

    def failed(self, state: Any, error: BaseException, now_ns: int) -> None:
        """A sequence failed, and the program is about to be told."""
        row = self.find(state.request_id)
        self._forget(state.request_id, row)
        row.state = state
        if row.request is not None:
            row.request.gave_up(row, "error", now_ns, error)

    def refused(self, request: BatchedRequest, error: BaseException | None, now_ns: int) -> None:
        """What was added never reached the engine, or nobody waits for it: ``error`` is what the program got instead."""
        request.abandon("error" if isinstance(error, Exception) else "abort", now_ns, error)

    def _forget(self, name: str, row: BatchedRow) -> None:
        self._rows.pop(name, None)
        self._cancelled.discard(name)
        if self.lane is not None:
            self.lane.leave(row)

    def leave(self) -> Lane | None:
        """Give up the lane, if there is one; nobody stands in it any more."""
        lane, self.lane = self.lane, None
        if lane is not None:
            lane.clear()
        return lane

    def end(self, now_ns: int, error: BaseException | None = None) -> None:
        """The loop is over, and with it every request that is open. First :meth:`leave`."""
        self.over = True
        self.error = self.error or error
        self._rows.clear()
        self._cancelled.clear()
        for request in list(self.requests):
            self.refused(request, self.error, now_ns)

    def _ended(self, request: BatchedRequest) -> None:
        self.requests.discard(request)
        self._notify()


def _computed(processor: Any) -> bool:
    """Whether the device is done with the batch in flight. Only where two can be in flight is there one while idle."""
    ios = processor.inputs_and_outputs
    return bool(ios.io_pairs[1 - ios.current_pair].d2h_over.query())


def _attributes(manager: Any, state: Any) -> dict[str, AttributeValue]:
    given: dict[str, Any] = {**getattr(state, "logit_processor_kwargs", {})}
    given |= {"generation_config": manager.generation_config, "max_new_tokens": state.max_new_tokens}
    if getattr(state, "streaming", getattr(manager, "streaming", False)):
        given["streamer"] = manager
    # this engine takes nothing over from the model's own settings
    return Arguments(None, (), given).attributes()


def _token_ids(eos: Any) -> frozenset[int]:
    """Ids that end a sequence: the engine takes one, several or none."""
    if eos is None:
        return frozenset()
    found: Any = eos.tolist() if hasattr(eos, "tolist") else eos
    return frozenset((found,)) if isinstance(found, int) else frozenset(found)
