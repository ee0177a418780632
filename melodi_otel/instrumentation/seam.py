"""Between "when does work happen?" and "how does the world see it?".

An instrumentation describes a call with these records; the runtime plugs in what makes spans, metrics and results of
them. So no instrumentation imports OpenTelemetry's SDK, the ledger or a meter's library, and each can be tested with a
list as its ``Calls``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from melodi_otel.attribution.meter import EngineId, Key, Meter, Outcome, Probe, Reason

AttributeValue = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]


Origin = object
"""Where a request came from, as :meth:`Calls.origin` noted it; only whoever made it knows what is in it."""

INCOMING: Final = "melodi-otel-incoming"
"""Key under which OpenTelemetry's context holds the :class:`Incoming` of the request being served."""

incoming: ContextVar[Incoming | None] = ContextVar("melodi_otel_incoming", default=None)
"""The same once more: a middleware of others that begins a new OpenTelemetry context would lose it."""


@dataclass(frozen=True, slots=True, eq=False)
class Incoming:
    """What a server's request says about whose it is.

    Attributes:
        headers: those that were asked for, by lower-case name; one that came several times is joined by ``", "``.
        user: reads the ``user`` field of its body, or None where nobody asked for that.
        span: the span that was current when it came in (the server's), or None.
        origin: the trace and the baggage that its headers name, where no span was current, or None.
        calls: model calls that were made for it, for what its answer says of them.
        answer: the id under which that answer promises their joules, once there is one.
    """

    headers: Mapping[str, str]
    user: Callable[[], str | None] | None = None
    span: object = None
    origin: Origin | None = None
    calls: list[Any] = field(default_factory=list[Any])
    answer: list[str] = field(default_factory=list[str])


@dataclass(slots=True)
class Begin:
    """A model call as it starts.

    Attributes:
        operation: ``gen_ai.operation.name`` (``chat``, ``text_completion``, …).
        provider: ``gen_ai.provider.name`` (``transformers``, ``vllm``, …).
        model: ``gen_ai.request.model``, or None.
        start_ns: monotonic ns.
        attributes: span attributes known now (``gen_ai.request.*``), by their full names.
        prompt_tokens, cached_tokens: where known before the work.
        engine: the engine declared by ``Meter.engine``.
        devices: accelerators by ``hw.id`` (``()``: CPU only; None: not known).
        thread: native id of the computing thread.
        probe: output tokens so far, see ``attribution.meter.Probe``.
        origin: where the request came from, for a thread that may not know: what the thread does know is right.
        user: who asked, where the request itself says so (OpenAI's ``user``, ``safety_identifier``). It is a label and no
            span attribute.
        adapter: name of the LoRA or other adapter that computes, or None.
        answer: the id under which its answer promises its joules, or None.
        reason: why what is measured here is a part of what it uses, or None.
    """

    operation: str
    provider: str
    model: str | None
    start_ns: int
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict[str, AttributeValue])
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    engine: EngineId | None = None
    devices: Sequence[str] | None = None
    thread: int | None = None
    probe: Probe | None = None
    origin: Origin | None = None
    user: str | None = None
    adapter: str | None = None
    answer: str | None = None
    reason: Reason | None = None


@dataclass(slots=True)
class End:
    """The same call as it ended.

    Attributes:
        end_ns: monotonic ns.
        output_tokens: exact count, or None where it cannot be known.
        outcome: ``stop``, ``length``, ``abort`` (cancelled, disconnected, interrupted) or ``error``.
        finish_reasons: ``gen_ai.response.finish_reasons``, one per sequence.
        first_token_ns: monotonic ns at which the first token was on the host.
        error: what the call raised, or None.
        attributes: further span attributes by their full names.
    """

    end_ns: int
    output_tokens: int | None = None
    outcome: Outcome = "stop"
    finish_reasons: Sequence[str] = ()
    first_token_ns: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    error: BaseException | None = None
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict[str, AttributeValue])


class OpenCall(Protocol):
    """A call in flight."""

    @property
    def key(self) -> Key: ...

    def active(self) -> AbstractContextManager[None]:
        """While entered, the call's span is the current one and its activity the parent of nested ones."""
        ...

    def bind(self, child_id: str) -> None:
        """``child_id`` stands for this call in engine steps."""
        ...

    def end(self, end: End) -> None:
        """Close it; a second call does nothing. Never raises."""
        ...


class Calls(Protocol):
    """Where an instrumentation reports."""

    @property
    def meter(self) -> Meter:
        """For engines and steps; requests go through :meth:`begin`."""
        ...

    @property
    def group(self) -> str:
        """The group token of this process's engines."""
        ...

    def now_ns(self) -> int:
        """Monotonic time of the clock that everything here uses."""
        ...

    def origin(self) -> Origin | None:
        """The request, trace and baggage that the caller stands in, to be given to a :class:`Begin`; None: in none."""
        ...

    def begin(self, begin: Begin) -> OpenCall:
        """Open the activity and start the span. Never raises."""
        ...

    def so_far(self, answer: str, keys: Sequence[Key]) -> Mapping[str, Any]:
        """What is known by now of the energy of these requests, as their answer tells it. Does not wait."""
        ...


class Library(Protocol):
    """The instrumentation of one library."""

    def instrument(self) -> None:
        """Patch it, now or when it is loaded; a second time changes nothing. Never raises."""
        ...

    def uninstrument(self) -> None:
        """Leave it as it was."""
        ...
