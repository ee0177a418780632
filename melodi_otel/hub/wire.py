"""What travels between a program and its hub: framed batches of versioned messages.

A frame is its length (4 bytes, big-endian) and a MessagePack array ``[number, [message, …]]``. Frames of one direction are
numbered from 0 without gaps, so a frame that is repeated or left out is seen. A message is an array whose first item is its
tag; items may be added at its end (older readers ignore them), never moved. Anything else is a new :data:`VERSION`.

Times are monotonic nanoseconds of the one host that both ends run on, energies joules.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

import msgspec

from melodi_otel.attribution.meter import Decode, EngineState, Joined, Late, Outcome, Prefill, Quality, Share
from melodi_otel.devices import Device

if TYPE_CHECKING:
    Row: TypeAlias = Prefill
    Member: TypeAlias = Joined
    Number: TypeAlias = Decode
    Lateness: TypeAlias = Late

VERSION: Final = 1
FRAME_LIMIT: Final = 1 << 20
"""The largest frame, in bytes: 1 MiB."""
_LENGTH: Final = struct.Struct(">I")
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=1024)]
"""A name; a longer one is refused."""
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
Trace: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=16)]
Time: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Change: TypeAlias = Annotated[int, msgspec.Meta(ge=-(1 << 16), le=1 << 16)]
Size: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=1e18)]
"""A fact of a model; what is no number (NaN) or has no end is refused: one of them would spoil the sums of everybody."""
Joules: TypeAlias = Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]
Labels: TypeAlias = Annotated[dict[Text, Text], msgspec.Meta(max_length=256)]
Devices: TypeAlias = Annotated[list[Text], msgspec.Meta(max_length=256)]
ROWS: Final = 10_000
"""Sequences that one list of a step may name."""

if not TYPE_CHECKING:
    # The records of the meter interface know no bounds; what comes from another process has some.
    class Row(Prefill):  # noqa: D101
        __slots__ = ()
        id: Text
        tokens: Count
        context: Count

    class Member(Joined):  # noqa: D101
        __slots__ = ()
        id: Text
        context: Count

    class Number(Decode):  # noqa: D101
        __slots__ = ()
        n: Count
        context: Count

    class Lateness(Late):  # noqa: D101
        __slots__ = ()
        beside: Annotated[tuple[Time, ...], msgspec.Meta(max_length=10_000)]
        elsewhere: bool


Rows: TypeAlias = Annotated[list[Row], msgspec.Meta(max_length=ROWS)]


class WireError(Exception):
    """A frame that cannot be used; the text says why.

    Attributes:
        version: of the wire, where it is a greeting in another one than ours.
    """

    version: int | None = None


class Message(msgspec.Struct, array_like=True, frozen=True):
    """Anything on the wire."""


# --- from a program to its hub -----------------------------------------------------------------------------------------


class Hello(Message, tag=1, frozen=True):
    """The first message of a connection.

    Attributes:
        version: of the wire.
        release: of the program's melodi_otel, for people.
        name: random, of this process: it tells its engines and requests from those of others in the group.
        group: the group token.
        alone: its engines and requests are its own; False: it shares both with other processes of its group (an engine
            whose steps are told by another process than its requests).
        service, namespace: of its telemetry.
        renders: it serves its own observations itself; the hub does not show them. Where it begins to do so later,
            :class:`Observed` says it of each.
        resume: ids of requests that another hub knew, whose joules so far are asked for.
    """

    version: int
    release: Text
    name: Text
    group: Text
    alone: bool
    service: Text | None
    namespace: Text | None
    renders: bool
    resume: list[Text]


class EngineTold(Message, tag=2, frozen=True):
    """See :meth:`melodi_otel.attribution.meter.Meter.engine`; ``facts`` in the order of its last seven arguments."""

    number: Count
    t_ns: Time
    state: EngineState
    model: Text | None
    devices: Devices | None
    world: Count | None
    pids: Annotated[list[Count], msgspec.Meta(max_length=ROWS)]
    facts: tuple[Size | None, Size | None, Size | None, Count | None, Count | None, Count | None, Count | None]


class Opened(Message, tag=3, frozen=True):
    """See :meth:`melodi_otel.attribution.meter.Meter.open`; ``engine`` and ``parent`` are of the same group.

    ``probed``: the program answers :class:`Ask` for it. ``threaded``: a thread of its own computes it.
    """

    request: Text
    t_ns: Time
    engine: Count | None
    devices: Devices | None
    model: Text | None
    prompt_tokens: Count | None
    cached_tokens: Count | None
    labels: Labels
    parent: Text | None
    threaded: bool
    probed: bool
    late: Lateness | None
    reason: Literal["phase_elsewhere"] | None = None


class Bound(Message, tag=4, frozen=True):
    """``child`` stands for ``request`` in steps."""

    request: Text
    child: Text


class Progressed(Message, tag=5, frozen=True):
    """Output tokens so far."""

    request: Text
    t_ns: Time
    output_tokens: Count
    first_token_ns: Time | None = None
    prompt_tokens: Count | None = None
    cached_tokens: Count | None = None


class Stepped(Message, tag=6, frozen=True):
    """One engine step as a difference to the one before; see :meth:`melodi_otel.attribution.meter.Meter.step`."""

    engine: Count
    lane: Count
    seq: Count
    t0_ns: Time
    t1_ns: Time
    devices: Devices | None
    decode: Number
    prefill: Rows
    computed: Rows
    joined: Annotated[list[Member], msgspec.Meta(max_length=ROWS)]
    left: Annotated[list[Text], msgspec.Meta(max_length=ROWS)]


class Closed(Message, tag=7, frozen=True):
    """The request ended; its joules are awaited."""

    request: Text
    t_ns: Time
    output_tokens: Count | None
    outcome: Outcome
    first_token_ns: Time | None
    prompt_tokens: Count | None
    cached_tokens: Count | None


class Forgone(Message, tag=8, frozen=True):
    """Nobody waits for the joules of this request any more: its span said ``unavailable``."""

    request: Text


class Unseen(Message, tag=9, frozen=True):
    """``change`` more pieces of work run that will be reported late."""

    t_ns: Time
    change: Change


class Observed(Message, tag=10, frozen=True):
    """A finished request as metrics show it; see :class:`melodi_otel.attribution.record.RequestRecord`."""

    request: Text
    operation: Text | None
    provider: Text | None
    model: Text | None
    start_ns: Time
    end_ns: Time
    first_token_ns: Time | None
    prompt_tokens: Count | None
    output_tokens: Count | None
    outcome: Outcome
    error_type: Text | None
    instrumented: bool
    total: Joules | None
    scope: Text | None
    quality: Quality
    trace: Trace
    span: Trace
    labels: Labels
    rendered: bool = False
    answer: Text | None = None
    uncertainty: Joules | None = None


class Answered(Message, tag=11, frozen=True):
    """All progress that was known when :class:`Ask` number ``ask`` arrived has been sent."""

    ask: int


class Got(Message, tag=12, frozen=True):
    """Everything up to :class:`Settled` number ``settled`` has arrived: the hub need not keep it any more."""

    settled: int


class Between(Message, tag=13, frozen=True):
    """What did the whole device use in this time?"""

    question: Count
    device: Text
    t0_ns: Time
    t1_ns: Time


class StatusAsked(Message, tag=14, frozen=True):
    """What does the hub's status page show?"""

    question: Count


class Promised(Message, tag=15, frozen=True):
    """An answer with this id promises the joules of one more request; its observation names the same id."""

    answer: Text


# --- from a hub to a program -------------------------------------------------------------------------------------------


class Told(msgspec.Struct, array_like=True, frozen=True):
    """Joules of one request: final, or what it has accrued so far."""

    request: str
    final: bool
    shares: list[Share]


class Welcome(Message, tag=33, frozen=True):
    """The answer to :class:`Hello`.

    Attributes:
        hub: random name of this hub's books.
        tier: ``agent`` or ``shared``.
        devices: what it measures.
        denied: a meter is there and may not be read.
        wait_s: how long a span should wait for its joules.
        url: of its metrics page, or None.
        resumed: what it knows of the requests that were asked for, or the first of it.
        whole: that is all of it; else :class:`Resumed` follows.
    """

    version: int
    release: str
    hub: str
    tier: str
    devices: list[Device]
    denied: bool
    wait_s: float
    url: str | None
    resumed: list[Told]
    whole: bool


class Refused(Message, tag=34, frozen=True):
    """The connection ends, and why."""

    code: str
    text: str


class Ask(Message, tag=35, frozen=True):
    """The sensor moved: send the progress of every request that you opened as ``probed``, then :class:`Answered`."""

    ask: int


class Settled(Message, tag=36, frozen=True):
    """Requests whose joules are final, to be acknowledged by :class:`Got`."""

    number: int
    told: list[Told]


class Accrued(Message, tag=37, frozen=True):
    """Sign of life, at least twice a second; from time to time with the joules of open requests so far."""

    t_ns: int
    told: list[Told]


class Resumed(Message, tag=40, frozen=True):
    """More of what :class:`Welcome` began; ``whole``: now that is all."""

    resumed: list[Told]
    whole: bool


class BetweenAnswered(Message, tag=38, frozen=True):
    """J, or None where that is not known."""

    question: int
    joules: float | None


class StatusAnswered(Message, tag=39, frozen=True):
    """The status page's JSON text."""

    question: int
    text: str


ToHub: TypeAlias = (
    Hello | EngineTold | Opened | Bound | Progressed | Stepped | Closed | Forgone | Unseen | Observed | Answered | Got
    | Between | StatusAsked | Promised
)  # fmt: skip
ToProgram: TypeAlias = Welcome | Refused | Ask | Settled | Accrued | BetweenAnswered | StatusAnswered | Resumed

_encoder: Final = msgspec.msgpack.Encoder()


def encode(number: int, messages: Sequence[Message]) -> bytes:
    """One frame.

    Raises:
        WireError: it would be larger than :data:`FRAME_LIMIT`.
    """
    frame = bytearray(_LENGTH.size)
    _encoder.encode_into((number, messages), frame, _LENGTH.size)
    length = len(frame) - _LENGTH.size
    if length > FRAME_LIMIT:
        raise WireError(f"a frame of {length} bytes is larger than {FRAME_LIMIT}")
    _LENGTH.pack_into(frame, 0, length)
    return bytes(frame)


def encode_all(number: int, messages: Sequence[Message]) -> Iterator[bytes]:
    """The messages in as many frames as they need, numbered from ``number`` on.

    A single message that fits no frame is left out.
    """
    if not messages:
        return
    try:
        yield encode(number, messages)
    except WireError:
        if len(messages) == 1:
            return
        half = len(messages) // 2
        for part in (messages[:half], messages[half:]):
            for frame in encode_all(number, part):
                yield frame
                number += 1


class Frames:
    """Bytes of one direction back into messages.

    Args:
        kind: :data:`ToHub` or :data:`ToProgram`.
    """

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(tuple[int, list[kind]])
        self._held = bytearray()
        self._next = 0

    def feed(self, data: bytes | memoryview) -> list[Any]:
        """The messages that ``data`` completes.

        Raises:
            WireError: a frame is too large, is no frame of this wire, or is not the next one; nothing after it can be read.
        """
        held = self._held
        if held:
            held += data
            data, held = memoryview(held), bytearray()
        found: list[Any] = []
        at, end = 0, len(data)
        with memoryview(data) as view:
            while end - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(view, at)
                if length > FRAME_LIMIT:
                    raise WireError(f"a frame of {length} bytes is announced; the most is {FRAME_LIMIT}")
                stop = at + _LENGTH.size + length
                if end < stop:
                    break
                found += self._frame(view[at + _LENGTH.size : stop])
                at = stop
            held += view[at:]
        self._held = held
        return found

    def _frame(self, raw: memoryview) -> list[Any]:
        try:
            number, messages = self._decoder.decode(raw)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError) as failure:
            error = WireError(f"a frame cannot be read: {failure}")
            error.version = _version_of(raw) if self._next == 0 else None
            raise error from None
        if number != self._next:
            raise WireError(f"frame {number} came where {self._next} was due")
        self._next += 1
        return messages


def _version_of(raw: memoryview) -> int | None:
    """The version in a first frame that cannot be read: only the first two items of a greeting are the same in all of them."""
    try:
        frame = msgspec.msgpack.decode(raw, type=tuple[int, list[list[Any]]])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError):
        return None
    first = frame[1][0] if frame[1] else []
    version = first[1] if len(first) > 1 and first[0] == 1 else None
    return version if isinstance(version, int) and version != VERSION else None
