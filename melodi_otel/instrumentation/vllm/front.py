"""Where requests enter a vLLM server and answers leave it (``AsyncLLM``), and what every request has, a script's too.

Each prompt is one request, whatever list it came in; the sequences of ``n > 1`` and the beams of a beam search are parts of
theirs. A request has its span from the call on; which ids the engine gives to its sequences is seen where vLLM notes them
itself, in its output processor.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

from melodi_otel.attribution.meter import EngineId
from melodi_otel.instrumentation.seam import AttributeValue, Begin, Calls, Origin, incoming
from melodi_otel.instrumentation.vllm.answers import Answers
from melodi_otel.instrumentation.vllm.complaints import Complaints
from melodi_otel.instrumentation.vllm.facts import model_of, nth_engine, number_of, one_phase, shape_of
from melodi_otel.instrumentation.vllm.served import Served, settings_of

PROVIDER: Final = "vllm"
_CHATS: Final = ("chatcmpl-", "resp_", "msg_")
"""How ids of requests begin that came as chats."""
_REQUEST_ID: Final = "gen_ai.response.id"


@dataclass(frozen=True, slots=True)
class Place:
    """What requests of an engine have in common.

    Attributes:
        engine: its first core.
        model: as clients call it.
        probing: its steps are not reported.
        same_host: it computes on this host.
        phase: all its requests have their prefill here and their decode elsewhere, or the reverse.
    """

    engine: EngineId
    model: str | None
    probing: bool
    same_host: bool
    phase: bool = False


class FrontEnd:
    """Reports every request of this process.

    Args:
        calls: where they are reported.
        complaints: where our own failures go.
        origin: what the headers that a request was given say about where it came from.
        answers: what is told in answers; None: nothing.

    Attributes:
        adding: the request whose sequences are given to an engine just now, in this context.
        outer: the request to which everything belongs that is given to an engine in this context.
        operation: what is asked in this context where nothing else says it.
    """

    def __init__(
        self,
        calls: Calls,
        complaints: Complaints,
        origin: Callable[[Mapping[str, str]], Origin | None] | None = None,
        answers: Answers | None = None,
    ) -> None:
        self._calls = calls
        self._answers = answers
        self.complaints: Final = complaints
        self._origin = origin
        self._places: WeakKeyDictionary[Any, Place] = WeakKeyDictionary()
        self.adding: Final[ContextVar[Served | None]] = ContextVar("melodi_otel_vllm_adding", default=None)
        self.outer: Final[ContextVar[Served | None]] = ContextVar("melodi_otel_vllm_outer", default=None)
        self.operation: Final[ContextVar[str]] = ContextVar("melodi_otel_vllm_operation", default="text_completion")

    def made(self, engine: Any, *, stepping: bool) -> Place:
        """An engine was made in this process; ``stepping``: its cores report their steps."""
        shape = shape_of(engine.vllm_config)
        here = stepping and not shape.elsewhere
        place = Place(
            EngineId(self._calls.group, number_of(nth_engine(), 0)),
            model_of(engine.vllm_config),
            probing=not here,
            same_host=not shape.elsewhere,
            phase=one_phase(engine.vllm_config),
        )
        self._places[engine] = place
        return place

    # --- servers ------------------------------------------------------------------------------------------------------

    def stream(self, original: Callable[..., AsyncIterator[Any]], *, pooling: bool = False) -> Callable[..., Any]:
        """``AsyncLLM.generate`` and, with ``pooling``, ``encode``."""

        @functools.wraps(original)
        async def metered(engine: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            served = self._begin_stream(engine, args, kwargs, pooling)
            answers = original(engine, *args, **kwargs)
            error: BaseException | None = None
            token: Any = None
            try:
                # What the engine is given is given before the first answer; no later one shall look like ours.
                token = self.adding.set(served or self.adding.get())
                try:
                    answer = await anext(answers, _OVER)
                finally:
                    self.adding.reset(token)
                while answer is not _OVER:
                    if served is not None:
                        self._saw(served, answer)
                    yield answer
                    answer = await anext(answers, _OVER)
            except BaseException as raised:
                error = raised
                raise
            finally:
                try:
                    await answers.aclose()  # type: ignore[attr-defined]  # else an abort would wait for the collector
                finally:
                    if served is not None:
                        self.end(served, error)

        return metered

    def _begin_stream(
        self, engine: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], pooling: bool
    ) -> Served | None:
        try:
            if self.outer.get() is not None:
                return None
            request = argument(args, kwargs, 2, "request_id")
            return self.begin(
                engine,
                argument(args, kwargs, 1, "pooling_params" if pooling else "sampling_params"),
                request,
                lora=argument(args, kwargs, 3, "lora_request") if pooling else kwargs.get("lora_request"),
                headers=argument(args, kwargs, 4, "trace_headers") if pooling else kwargs.get("trace_headers"),
            )
        except Exception:
            self.complaints.about("a request cannot be metered")
            return None

    def beams(self, original: Callable[..., AsyncIterator[Any]]) -> Callable[..., Any]:
        """The beam search of a server: one request, whatever it asks of the engine."""

        @functools.wraps(original)
        async def metered(serving: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            served = self._begin_beams(serving, args, kwargs)
            answers = original(serving, *args, **kwargs)
            error: BaseException | None = None
            try:
                while True:
                    token = self.outer.set(served or self.outer.get())
                    try:
                        answer = await anext(answers, _OVER)
                    finally:
                        self.outer.reset(token)
                    if answer is _OVER:
                        break
                    if served is not None:
                        self._saw(served, answer)
                    yield answer
            except BaseException as raised:
                error = raised
                raise
            finally:
                try:
                    await answers.aclose()  # type: ignore[attr-defined]
                finally:
                    if served is not None:
                        self.end(served, error)

        return metered

    def _begin_beams(self, serving: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Served | None:
        try:
            return self.begin(
                serving.engine_client,
                argument(args, kwargs, 2, "params"),
                argument(args, kwargs, 1, "request_id"),
                lora=argument(args, kwargs, 3, "lora_request"),
                headers=argument(args, kwargs, 4, "trace_headers"),
                whole=True,
            )
        except Exception:
            self.complaints.about("a beam search cannot be metered")
            return None

    # --- both ---------------------------------------------------------------------------------------------------------

    def note(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``OutputProcessor.add_request``: the ids and the state of a sequence that goes to the engine now."""

        @functools.wraps(original)
        def add_request(processor: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            found = original(processor, request, *args, **kwargs)
            served = self.adding.get() or self.outer.get()
            if served is not None:
                try:
                    served.joined(request.request_id, processor.request_states.get(request.request_id))
                except Exception:
                    self.complaints.about("the engine's id of a request cannot be read")
            return found

        return add_request

    def begin(
        self,
        engine: Any,
        params: Any,
        request: str | None,
        *,
        lora: Any = None,
        headers: Mapping[str, str] | None = None,
        whole: bool = False,
    ) -> Served:
        """A request begins; see :class:`~melodi_otel.instrumentation.vllm.served.Served` for ``whole``."""
        place = self._places.get(engine) or self.made(engine, stepping=False)
        adapter: str | None = getattr(lora, "lora_name", None)
        attributes: dict[str, AttributeValue] = settings_of(params)
        if request:
            attributes[_REQUEST_ID] = request
        served = Served(self._calls, probing=place.probing, same_host=place.same_host, whole=whole)
        begin = Begin(
            self._operation_of(params, request),
            PROVIDER,
            adapter or place.model,
            self._calls.now_ns(),
            attributes,
            engine=place.engine,
            probe=served.tokens if place.probing else None,
            adapter=adapter,
        )
        asked = incoming.get()
        if asked is not None:
            begin.origin = asked.origin  # it has what vLLM does not pass on: the whole trace context, and baggage
        if begin.origin is None and headers and self._origin is not None:
            begin.origin = self._origin(headers)
        begin.reason = "phase_elsewhere" if place.phase or _hands_over(params) else None
        if self._answers is not None:
            begin.answer = self._answers.belongs(served)
        served.call = self._calls.begin(begin)
        return served

    def _operation_of(self, params: Any, request: str | None) -> str:
        task: Any = getattr(params, "task", None)
        if isinstance(task, str):
            return "embeddings" if "embed" in task else task
        if type(params).__name__ == "PoolingParams":
            return "embeddings"
        if request is not None and request.startswith(_CHATS):
            return "chat"
        return self.operation.get()

    def _saw(self, served: Served, answer: Any) -> None:
        try:
            served.saw(answer)
        except Exception:
            self.complaints.about("an answer cannot be read")

    def end(self, served: Served, error: BaseException | None) -> None:
        """A request is over; never raises."""
        try:
            served.end(error)
        except Exception:
            self.complaints.about("a request cannot be ended")


_OVER: Final = object()


def _hands_over(params: Any) -> bool:
    """Whether another engine computes the other phase of a request, as a router says that has two kinds of them."""
    extra = cast("dict[str, Any]", getattr(params, "extra_args", None) or {})
    said = cast("dict[str, Any]", extra.get("kv_transfer_params") or {})
    return bool(said.get("do_remote_decode") or said.get("do_remote_prefill"))


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], at: int, name: str) -> Any:
    """What a call was given at this place or by this name; None: nothing."""
    return kwargs.get(name, args[at] if len(args) > at else None)
