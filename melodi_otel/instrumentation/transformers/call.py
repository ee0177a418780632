"""One ``generate()`` from begin to end. Nothing here raises into the caller, whatever happens to us."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, TypeVar

from melodi_otel.attribution.meter import Outcome
from melodi_otel.instrumentation.seam import Begin, Calls, End, OpenCall
from melodi_otel.instrumentation.transformers.arguments import Arguments
from melodi_otel.instrumentation.transformers.counts import Prompt, completion_of, decoder_width
from melodi_otel.instrumentation.transformers.engines import Engine, Engines
from melodi_otel.instrumentation.transformers.request import Request, request_of
from melodi_otel.instrumentation.transformers.steps import Steps

log = logging.getLogger("melodi_otel")

PROVIDER: Final = "transformers"
T = TypeVar("T")


class Complaints:
    """Failures of our own: the first is a warning, the rest are debug lines."""

    def __init__(self) -> None:
        self._said = False

    def about(self, what: str) -> None:
        """Log the exception being handled."""
        level = logging.DEBUG if self._said else logging.WARNING
        self._said = True
        log.log(level, "transformers instrumentation: %s failed; the program's own call goes on", what, exc_info=True)


class GenerateCall:
    """What is known of one outermost ``generate()``.

    Args:
        calls: where it is reported.
        complaints: where our own failures go.
        model: what it was called on.

    Attributes:
        model_id: ``id`` of the model: the clocks of other models (assistants) are not its own.
        depth: how many nested ``generate()`` are running inside it now.
        thread: the thread it runs on; a context copied to another thread does not make that thread's calls nested.
        over: whether it has ended.
        ticks: where the step clock writes.
    """

    __slots__ = (
        "_active",
        "_calls",
        "_complaints",
        "_engine",
        "_open",
        "_request",
        "_start_ns",
        "_steps",
        "depth",
        "model_id",
        "over",
        "thread",
        "ticks",
    )

    def __init__(self, calls: Calls, complaints: Complaints, model: Any) -> None:
        self.model_id = id(model)
        self.thread = threading.get_ident()
        self.depth = 0
        self.over = False
        self.ticks: list[int] = []
        self._calls = calls
        self._complaints = complaints
        self._active: AbstractContextManager[None] | None = None
        self._engine: Engine | None = None
        self._open: OpenCall | None = None
        self._request: Request | None = None
        self._start_ns = 0
        self._steps: Steps | None = None

    def begin(
        self,
        engines: Engines,
        operation: str,
        model: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        clock: bool,
    ) -> None:
        """Open the activity and make its span the current one.

        Args:
            operation: ``gen_ai.operation.name``.
            args, kwargs: what ``generate`` was called with.
            clock: whether the step clock is installed.
        """
        self._engine = self._attempt("finding the model", lambda: engines.of(model))
        self._request = self._attempt(
            "reading the arguments", lambda: request_of(model, Arguments(model, args, kwargs))
        )
        self._attempt("beginning", lambda: self._begin(operation, clock))
        if self._open is not None:
            self._attempt("activating the span", self._enter)

    def _begin(self, operation: str, clock: bool) -> None:
        engine, request = self._engine, self._request
        self._start_ns = start_ns = self._calls.now_ns()
        prompt = self._prompt
        if request is not None and request.looped and clock:
            self._steps = Steps(start_ns, request)
            self.ticks = self._steps.ticks
        begin = Begin(
            operation,
            PROVIDER,
            None if engine is None else engine.model,
            start_ns,
            attributes={} if request is None else request.attributes,
            prompt_tokens=None if prompt is None else prompt.total,
            cached_tokens=None if prompt is None else prompt.cached,
            engine=None if engine is None else engine.id,
            devices=None if engine is None else engine.devices,
            thread=threading.get_native_id(),
            probe=None if self._steps is None else self._probe,
            adapter=None if engine is None else engine.adapter(),
        )
        self._open = opened = self._calls.begin(begin)
        if self._steps is not None and engine is not None:
            children = [f"{opened.key.request}.{row}" for row in range(self._steps.rows)]
            for child in children:
                opened.bind(child)
            self._steps.report_to(self._calls.meter, engine.id, next(engine.lanes), engine.devices, children)

    def _enter(self) -> None:
        if self._open is not None:
            active = self._open.active()
            active.__enter__()
            self._active = active

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

    def drafting(self, before: int) -> None:
        """An assisted step begins, after ``before`` known tokens."""
        if self._steps is not None:
            self._steps.drafts.append((before, 0))

    def drafted(self, before: int, drafts: int) -> None:
        """It is about to verify ``drafts`` tokens."""
        if self._steps is not None:
            self._steps.drafts[-1] = before, drafts

    def finish(self, result: Any) -> None:
        """It returned ``result``."""
        if not self.over:
            end_ns = self._now_ns()
            end = self._attempt("counting the result", lambda: self._counted(end_ns, result))
            self._close(end or self._plain(end_ns, "stop"))

    def fail(self, error: BaseException) -> None:
        """It raised ``error``: a failure, or an interruption where that is no ``Exception``."""
        if not self.over:
            end_ns = self._now_ns()
            outcome: Outcome = "error" if isinstance(error, Exception) else "abort"
            end = self._attempt("counting what there is", lambda: self._partial(end_ns, outcome, error))
            self._close(end or self._plain(end_ns, outcome, error))

    def _now_ns(self) -> int:
        """The time, or the last one that is known: a call is closed even if our clock fails."""
        now_ns = self._attempt("reading the clock", self._calls.now_ns)
        return now_ns if now_ns is not None else (self.ticks[-1] if self.ticks else self._start_ns)

    @property
    def _prompt(self) -> Prompt | None:
        return None if self._request is None else self._request.prompt

    def _probe(self) -> int:
        steps = self._steps
        if steps is None:
            return 0
        try:
            return steps.probe()
        except Exception:
            self._complaints.about("handing over steps")
            return steps.output_tokens()

    def _counted(self, end_ns: int, result: Any) -> End:
        request, sequences = self._request, sequences_of(result)
        if request is not None:
            request.prompt.settle()  # a result is there, so the device was waited for
        end = self._plain(end_ns, "stop")
        if request is None or request.custom or sequences is None:
            return end
        width = decoder_width(request.prompt, request.start)
        done = completion_of(sequences, width, request.eos, request.pad, padded=request.may_be_padded)
        # a sequence that stopped without an end token and below its limit met another criterion of the caller's
        limit = request.limit
        reasons = [
            "stop" if ended or (limit is not None and count < limit) else "length"
            for count, ended in zip(done.tokens, done.ended, strict=True)
        ]
        end.output_tokens = sum(done.tokens)
        end.finish_reasons = tuple(reasons)
        end.outcome = "length" if "length" in reasons else "stop"
        return end

    def _partial(self, end_ns: int, outcome: Outcome, error: BaseException) -> End:
        request, steps = self._request, self._steps
        if steps is not None and steps.done and steps.prompt.early:
            steps.prompt.settle()
        end = self._plain(end_ns, outcome, error)
        # where sequences of a batch may end apart, from the second step on only the device knew which still ran
        if (
            request is not None
            and steps is not None
            and (steps.rows == 1 or steps.done <= 1 or not request.may_end_early)
        ):
            end.output_tokens = steps.output_tokens()
        return end

    def _plain(self, end_ns: int, outcome: Outcome, error: BaseException | None = None) -> End:
        steps, prompt = self._steps, self._prompt
        return End(
            end_ns,
            outcome=outcome,
            first_token_ns=None if steps is None else steps.first_token_ns,
            prompt_tokens=None if prompt is None else prompt.total,
            cached_tokens=None if prompt is None else prompt.cached,
            error=error,
        )

    def _close(self, end: End) -> None:
        self.over = True
        steps, opened, prompt = self._steps, self._open, self._prompt
        if steps is not None:
            self._attempt("handing over steps", steps.close)
        if opened is not None:
            self._attempt("ending", lambda: opened.end(end))
        if prompt is not None:
            prompt.decoder_ids = None  # the caller's; the probe may be held a while longer

    def _attempt(self, what: str, act: Callable[[], T]) -> T | None:
        try:
            return act()
        except Exception:
            self._complaints.about(what)
            return None


def sequences_of(result: Any) -> Any:
    """The returned ids as rows of tokens, or None where the result is something else."""
    ids = result if hasattr(result, "dim") else getattr(result, "sequences", None)
    if ids is None or not hasattr(ids, "dim") or ids.is_floating_point():
        return None
    if ids.dim() == 3 and ids.shape[0] == 1:
        ids = ids[0]  # continuous batching puts its rows into one more dimension
    return ids if ids.dim() == 2 else None
