"""One call from begin to end. Nothing here raises into the caller, whatever happens to us."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

from melodi_otel import semconv as names
from melodi_otel.attribution.meter import Outcome
from melodi_otel.instrumentation.seam import AttributeValue, Begin, Calls, End, OpenCall, Origin
from melodi_otel.instrumentation.transformers.arguments import Arguments
from melodi_otel.instrumentation.transformers.compiling import compiled_frames
from melodi_otel.instrumentation.transformers.complaints import Complaints
from melodi_otel.instrumentation.transformers.counts import Prompt, ids_of, prompt_of
from melodi_otel.instrumentation.transformers.engines import Engine, Engines
from melodi_otel.instrumentation.transformers.loops import NOT_COUNTED, Loop, Produced
from melodi_otel.instrumentation.transformers.request import is_encoder_decoder, request_of
from melodi_otel.instrumentation.transformers.serving import is_cancellation
from melodi_otel.instrumentation.transformers.steps import Lane, Steps

PROVIDER: Final = "transformers"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """How a call was entered.

    Attributes:
        names: of the positional parameters that its arguments were given by.
        clock: whether the step clock is installed.
        delegates: whether somebody else's function was called, which may run transformers' loop any number of times.
        stepped: whether, if not, that is transformers' own loop, which asks the step clock.
        operation: ``gen_ai.operation.name`` where the function itself says it.
    """

    names: Sequence[str]
    clock: bool
    delegates: bool = False
    stepped: bool = True
    operation: str | None = None


class Held(NamedTuple):
    """What a nested ``generate()`` has put aside: whose ticks count, where they go, and which run they belong to."""

    clock_id: int
    ticks: list[int]
    loop: Loop | None


class GenerateCall:
    """What is known of one outermost call.

    Args:
        calls: where it is reported.
        complaints: where our own failures go.
        model: what it was called on.

    Attributes:
        clock_id: ``id`` of the model whose step clock counts now: not that of an assistant or of another part; 0: nobody's.
        thread: the thread it runs on; a context copied to another thread does not make that thread's calls nested.
        over: whether it has ended.
        ticks: where the step clock writes.
    """

    __slots__ = (
        "_active", "_asked", "_calls", "_compiled", "_complaints", "_delegates", "_engine", "_entry", "_lane", "_loop",
        "_loops", "_open", "_own_ticks", "_start_ns", "clock_id", "over", "thread", "ticks",
    )  # fmt: skip

    def __init__(self, calls: Calls, complaints: Complaints, model: Any, entry: Entry) -> None:
        self.clock_id = id(model)
        self.thread = threading.get_ident()
        self.over = False
        self.ticks: list[int] = []
        self._own_ticks = self.ticks
        self._calls = calls
        self._complaints = complaints
        self._entry = entry
        self._delegates = entry.delegates
        self._active: AbstractContextManager[None] | None = None
        self._asked: Prompt | None = None
        self._compiled = compiled_frames()
        self._engine: Engine | None = None
        self._lane: Lane | None = None
        self._loop: Loop | None = None
        self._loops: list[Loop] = []
        self._open: OpenCall | None = None
        self._start_ns = 0

    def begin(
        self,
        engines: Engines,
        operation: str,
        model: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        origin: Origin | None = None,
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> None:
        """Open the activity and make its span the current one.

        Args:
            operation: ``gen_ai.operation.name``, unless the entry has one.
            args, kwargs: what was called with.
            origin: where the request came from, if its thread does not know.
            attributes: further ones of the span.
        """
        self._engine = self._attempt("finding the model", lambda: engines.of(model))
        found = self._attempt(
            "reading the arguments", lambda: self._read(model, Arguments(model, args, kwargs, self._entry.names))
        )
        operation = self._entry.operation or operation
        self._attempt("beginning", lambda: self._begin(operation, {**(found or {}), **(attributes or {})}, origin))
        if self._open is not None:
            self._attempt("activating the span", self._enter)

    def _read(self, model: Any, given: Arguments) -> Mapping[str, AttributeValue]:
        self._delegates = self._delegates or given.delegated
        if self._delegates:
            attributes = given.attributes()
            if ids_of(given) is not None:  # what else is given, only the model knows how to count
                self._asked = prompt_of(given, encoder_decoder=is_encoder_decoder(model))
            return attributes
        request = request_of(model, given)
        self._loop = Loop(id(model), request, None)
        self._loops.append(self._loop)
        return request.attributes

    def _begin(self, operation: str, attributes: Mapping[str, AttributeValue], origin: Origin | None) -> None:
        engine, loop = self._engine, self._loop
        self._start_ns = start_ns = self._calls.now_ns()
        if loop is not None and loop.request.looped and self._entry.stepped and self._entry.clock:
            loop.steps = Steps(start_ns, loop.request)
            self.ticks = loop.steps.ticks
        begin = Begin(
            operation,
            PROVIDER,
            None if engine is None else engine.model,
            start_ns,
            attributes=attributes,
            prompt_tokens=None if loop is None else loop.prompt_tokens,
            cached_tokens=None if loop is None else loop.cached_tokens,
            engine=None if engine is None else engine.id,
            devices=None if engine is None else engine.devices,
            thread=threading.get_native_id(),
            probe=self._probe if self._delegates or (loop is not None and loop.steps is not None) else None,
            origin=origin,
        )
        self._open = opened = self._calls.begin(begin)
        if loop is not None and loop.steps is not None:
            self._report(loop.steps, opened, opened.key.request)

    def _report(self, steps: Steps, opened: OpenCall, name: str) -> None:
        """Bind a row's name to each row of ``steps``, and say where they go."""
        engine = self._engine
        if engine is None:
            return
        if self._lane is None:
            self._lane = Lane(next(engine.lanes))
        children = [f"{name}.{row}" for row in range(steps.rows)]
        for child in children:
            opened.bind(child)
        steps.report_to(self._calls.meter, engine.id, self._lane, engine.devices, children)

    def _enter(self) -> None:
        if self._open is not None:
            active = self._open.active()
            active.__enter__()
            self._active = active

    # --- inside it ---

    def nested(self, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Held:
        """``generate`` of transformers begins on ``model`` inside this call; give the answer to :meth:`unnested`.

        A run of the loop that this call was handed over to counts as its own. Anything below that (an assistant's draft, a
        healed token, the depth model of an audio frame) is work inside a run, and no tokens of the request.
        """
        held = Held(self.clock_id, self.ticks, self._loop)
        self.clock_id = 0
        if self._delegates and held.loop is None:
            self._attempt("following a part of the call", lambda: self._start(model, args, kwargs))
        return held

    def _start(self, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        request = request_of(model, Arguments(model, args, kwargs))
        loop = self._loop = Loop(id(model), request, None)
        if request.looped and self._entry.clock:
            steps = Steps(self._calls.now_ns(), request)
            if self._open is not None:
                self._report(steps, self._open, f"{self._open.key.request}.{len(self._loops)}")
            loop.steps, self.ticks, self.clock_id = steps, steps.ticks, loop.model_id
        self._loops.append(loop)

    def unnested(self, held: Held, result: Any = None, error: BaseException | None = None) -> None:
        """What :meth:`nested` announced returned ``result`` or raised ``error``."""
        loop = self._loop
        self.clock_id, self.ticks, self._loop = held
        if loop is None or loop is held.loop:
            return
        if error is None:
            self._attempt("counting a part of the call", lambda: loop.returned(result))
        else:
            self._attempt("counting a part of the call", loop.interrupted)
        self._attempt("handing over steps", loop.close)

    def drafting(self, before: int) -> None:
        """An assisted step begins, after ``before`` known tokens."""
        if self._loop is not None and self._loop.steps is not None:
            self._loop.steps.drafts.append((before, 0))

    def drafted(self, before: int, drafts: int) -> None:
        """It is about to verify ``drafts`` tokens."""
        if self._loop is not None and self._loop.steps is not None:
            self._loop.steps.drafts[-1] = before, drafts

    def _probe(self) -> int | None:
        tokens: int | None = None
        for loop in self._loops:
            if loop.steps is None:
                continue
            tokens = tokens or 0
            try:
                tokens += loop.steps.probe()
            except Exception:
                self._complaints.about("handing over steps")
                tokens += loop.steps.output_tokens()
        return tokens

    # --- its end ---

    def leave(self, error: BaseException | None) -> None:
        """The wrapped call is over; ``error`` is what it raised. What the span does with it cannot swallow it."""
        active, self._active = self._active, None
        if active is None:
            return
        try:
            active.__exit__(
                None if error is None else type(error), error, None if error is None else error.__traceback__
            )
        except BaseException as raised:
            if raised is not error and not isinstance(raised, Exception):
                raise
            if raised is not error:
                self._complaints.about("leaving the span")

    def finish(self, result: Any) -> None:
        """It returned ``result``."""
        if not self.over:
            end_ns = self._now_ns()
            loop = self._loop
            if loop is not None:
                self._attempt("counting the result", lambda: loop.returned(result))
            if self._asked is not None and (self._loops or len(self._own_ticks) > 1):
                self._attempt("counting the prompt", self._asked.settle)  # a loop ran, so the device was waited for
            end = self._attempt("counting the result", lambda: self._ended(end_ns))
            self._close(end or End(end_ns))

    def fail(self, error: BaseException) -> None:
        """It raised ``error``: a failure, or an interruption where that is no ``Exception`` or the client has left."""
        if self.over:
            return
        end_ns = self._now_ns()
        left = is_cancellation(error)
        outcome: Outcome = "abort" if left or not isinstance(error, Exception) else "error"
        loop = self._loop
        if loop is not None:
            self._attempt("counting what there is", loop.interrupted)
        end = self._attempt("counting what there is", lambda: self._ended(end_ns)) or End(end_ns)
        end.outcome, end.error = outcome, None if left else error
        end.finish_reasons = (outcome,) * loop.request.returned if left and loop is not None else ()
        self._close(end)

    def _now_ns(self) -> int:
        """The time, or the last one that is known: a call is closed even if our clock fails."""
        now_ns = self._attempt("reading the clock", self._calls.now_ns)
        return now_ns if now_ns is not None else (self.ticks[-1] if self.ticks else self._start_ns)

    def _ended(self, end_ns: int) -> End:
        loops, one = self._loops, self._of_one_model
        last: Produced = (loops[-1].produced or NOT_COUNTED) if len(loops) == 1 else NOT_COUNTED
        prompt, cached = self._asked, None
        if one:
            total, cached = _sum([loop.prompt_tokens for loop in loops]), _sum([loop.cached_tokens for loop in loops])
        else:
            total = None
        if total is None and prompt is not None:
            total, cached = prompt.total, prompt.cached
        end = End(
            end_ns,
            output_tokens=_sum([loop.output_tokens for loop in loops]) if one else None,
            outcome=last.outcome,
            finish_reasons=last.finish_reasons,
            first_token_ns=self._first_token_ns,
            prompt_tokens=total,
            cached_tokens=cached,
        )
        if compiled_frames() > self._compiled:
            end.attributes = {names.COMPILE_WARMUP: True}
        return end

    @property
    def _of_one_model(self) -> bool:
        """Whether there were runs, all of one model: tokens of several have different vocabularies, so no sum."""
        return len({loop.model_id for loop in self._loops}) == 1

    @property
    def _first_token_ns(self) -> int | None:
        loops = self._loops
        if loops:
            steps = loops[0].steps
            return steps.first_token_ns if steps is not None and self._of_one_model else None
        # a loop of the model's own that asks transformers' step clock
        return self._own_ticks[1] if len(self._own_ticks) > 1 else None

    def _close(self, end: End) -> None:
        self.over = True
        opened = self._open
        for loop in self._loops:
            self._attempt("handing over steps", loop.close)
        if opened is not None:
            self._attempt("ending", lambda: opened.end(end))

    def _attempt(self, what: str, act: Callable[[], T]) -> T | None:
        try:
            return act()
        except Exception:
            self._complaints.about(what)
            return None


def _sum(parts: Sequence[int | None]) -> int | None:
    """The sum, or None where a part is not known."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
