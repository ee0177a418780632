"""The meter interface: who was at work, when, on what, how much; and the joules that come back.

Frozen: the in-process ledger, the hub's client and every instrumentation meet here and nowhere else, so this module knows
the standard library only. All times are integer nanoseconds of ``CLOCK_MONOTONIC``.

A request is *opened*, makes *progress* or stands in engine *steps*, and is *closed*; joules exist once the timeline covers
its end, so ``close`` returns a future. No method raises into the caller because of what the hardware does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

Tier = Literal["exclusive", "step", "slice", "phase", "window", "equal", "process"]
Quality = Literal["measured", "interpolated", "estimated", "partial", "unavailable"]
EngineState = Literal["loading", "ready", "gone"]
Outcome = Literal["stop", "length", "abort", "error"]
Reason = Literal[
    "no_source",
    "permission_denied",
    "no_samples",
    "late",
    "counter_reset",
    "device_lost",
    "devices_assumed",
    "devices_elsewhere",
    "phase_elsewhere",
    "shutdown",
    "forked",
    "overflow",
    "disabled",
]


class Key(NamedTuple):
    """A request: the random token of its engine group and an id that is unique in it."""

    group: str
    request: str


class EngineId(NamedTuple):
    """An engine: the token of its group and its number in it (data-parallel index, or one per model)."""

    group: str
    number: int


class Prefill(NamedTuple):
    """Prompt tokens of ``id`` computed in a step; ``context`` = tokens already in its cache before the step."""

    id: str
    tokens: int
    context: int


class Joined(NamedTuple):
    """``id`` enters the decode set with ``context`` tokens in its cache before the step."""

    id: str
    context: int


class Decode(NamedTuple):
    """Members of the decode set in a step (one token each) and the sum of their contexts before it."""

    n: int
    context: int


class Late(NamedTuple):
    """A request that is reported when it is over, as somebody else's span is: ``open`` names a time in the past and ``close``
    follows at once. It takes its part of what the intervals in between left to nobody, and never from anybody's share.

    ``beside``: starts (monotonic ns) of others that ran beside it and are still to be reported. ``elsewhere``: another
    process computed it, so that what other processes used is its to take from.
    """

    beside: tuple[int, ...] = ()
    elsewhere: bool = False


Probe = Callable[[], int | None]
"""Output tokens so far; None while nothing is known of them. Called by the settle thread whenever the sensor moves, and once
more after ``close``, before the close takes effect: ints only, no locks. An instrumentation that knows step times hands them
over with ``Meter.step`` from inside this call, so that its request's thread pays nothing for it."""

current: ContextVar[Key | None] = ContextVar("melodi_otel_activity", default=None)
"""The innermost open activity of this context: the parent of what is opened next."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one request used on one device.

    Attributes:
        key: the request.
        device: ``hw.id``.
        t0_ns, t1_ns: the interval it was charged for.
        joules: J; equals ``dynamic + static`` where these are known. None: unknown (``quality`` is ``unavailable``).
        dynamic: J above the device's idle power; ``prefill + decode`` where that split is known.
        static: J of idle power, shared with whoever was scheduled at the same instants. ``dynamic`` and ``static`` are both
            None where idle power was not known in all of the request's time: it is learnt while nothing runs, or given.
        prefill, decode: J, or both None where the phases, or ``dynamic``, are not known.
        uncertainty: 1 sigma in J (the sensor's gain, a systematic, is not in it).
        method: the tier of evidence.
        quality: see the design, section 4; the worst condition wins.
        coverage: part of the interval with usable samples, 0..1.
        concurrency: time-mean number of participants on the device while it was there, itself included.
        final_ns: when the figure became final.
        reason: why ``partial`` or ``unavailable``, else None.
        exclusive: no other process computed on the device; None: not known.
        rollup: ``joules`` plus those of all requests nested in this one.
    """

    key: Key
    device: str
    t0_ns: int
    t1_ns: int
    joules: float | None
    dynamic: float | None
    static: float | None
    prefill: float | None
    decode: float | None
    uncertainty: float | None
    method: Tier
    quality: Quality
    coverage: float
    concurrency: float
    final_ns: int
    reason: Reason | None = None
    exclusive: bool | None = None
    rollup: float | None = None


class Meter(Protocol):
    """What an instrumentation may say. Implemented by ``attribution.ledger.Ledger`` and by the hub's client."""

    def engine(
        self,
        engine: EngineId,
        t_ns: int,
        state: EngineState = "ready",
        *,
        model: str | None = None,
        devices: Sequence[str] | None = None,
        world: int | None = None,
        pids: Sequence[int] = (),
        parameters: float | None = None,
        active_parameters: float | None = None,
        kv_bytes_per_token: float | None = None,
        layers: int | None = None,
        hidden: int | None = None,
        experts: int | None = None,
        experts_per_token: int | None = None,
    ) -> None:
        """Declare an engine or a change of its state; may be sent again.

        ``devices`` names its accelerators (``()``: none, it computes on the CPU; None: not known).
        """
        ...

    def open(
        self,
        key: Key,
        t_ns: int,
        *,
        engine: EngineId | None = None,
        devices: Sequence[str] | None = None,
        model: str | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
        labels: Mapping[str, str] | None = None,
        parent: Key | None = None,
        thread: int | None = None,
        probe: Probe | None = None,
        late: Late | None = None,
        reason: Reason | None = None,
    ) -> None:
        """A request begins. ``thread`` is the native id of the thread that computes it, where one does; ``late``: it is
        over already, and its close follows; ``reason``: why what is measured here is a part of what it uses
        (``phase_elsewhere``), whatever is covered.
        """
        ...

    def bind(self, key: Key, child_id: str) -> None:
        """``child_id`` (a row of a batch, a beam, an internal id) stands for ``key`` in steps."""
        ...

    def progress(
        self,
        key: Key,
        t_ns: int,
        output_tokens: int,
        *,
        first_token_ns: int | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
    ) -> None:
        """``output_tokens`` so far, as known at ``t_ns``."""
        ...

    def step(
        self,
        engine: EngineId,
        lane: int,
        seq: int,
        t0_ns: int,
        t1_ns: int,
        devices: Sequence[str] | None = None,
        *,
        decode: Decode = Decode(0, 0),
        prefill: Sequence[Prefill] = (),
        computed: Sequence[Prefill] = (),
        joined: Sequence[Joined] = (),
        left: Sequence[str] = (),
    ) -> None:
        """One engine step.

        ``decode`` counts the members of the decode set after ``joined`` entered and ``left`` went; each computes exactly
        one token. ``computed`` are decode rows with drafts, outside the set while listed. Steps of one (engine, lane) never
        overlap: ``t0_ns`` is clipped to the previous ``t1_ns``.
        """
        ...

    def close(
        self,
        key: Key,
        t_ns: int,
        output_tokens: int | None,
        outcome: Outcome,
        *,
        first_token_ns: int | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
    ) -> Future[list[Share]]:
        """The request ended; the future gives one :class:`Share` per device, and never an exception."""
        ...
