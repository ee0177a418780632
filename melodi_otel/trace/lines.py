"""The trace format: one JSON object per line, in the order of the time at which each became known.

Times are seconds (monotonic), energies cumulative joules. Unknown kinds and keys are left out with one warning each; a
broken line is counted with its number and skipped. The records are strict about types, so a typo does not become a zero.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec


class DeviceLine(msgspec.Struct, tag="device", tag_field="kind", omit_defaults=True):
    """A device; ``null`` = unknown. ``idle_watts`` absent: the baseline is learnt.

    ``source``, ``estimated`` and ``relative_uncertainty`` keep an estimate an estimate when it is replayed. ``live``: written by
    a running meter, whose waits were bounded by its readers' patience.
    """

    id: str
    type: str = "gpu"
    idle_watts: float | None = None
    window_s: float | None = None
    period_s: float | None = None
    peak_flops: float | None = None
    bytes_per_s: float | None = None
    name: str | None = None
    source: str = ""
    estimated: bool = False
    relative_uncertainty: float = 0.0
    fraction: float = 1.0
    live: bool = False


class EngineLine(msgspec.Struct, tag="engine", tag_field="kind", omit_defaults=True):
    """An engine or a change of its state."""

    id: str
    devices: list[str] | None = None
    parameters: float | None = None
    active_parameters: float | None = None
    kv_bytes_per_token: float | None = None
    layers: int | None = None
    hidden: int | None = None
    experts: int | None = None
    experts_per_token: int | None = None
    t: float | None = None
    state: str | None = None
    world: int | None = None
    model: str | None = None
    service: str | None = None


class SampleLine(msgspec.Struct, tag="sample", tag_field="kind", omit_defaults=True):
    """A reading: cumulative ``joules`` of a counter, ``watts`` of a gauge; with both the counter wins.

    ``shaped``: ``joules`` is no reading but a point between two, placed by the history of a gauge.
    """

    t: float
    device: str
    joules: float | None = None
    watts: float | None = None
    shaped: bool = False


NO_ENGINE: Final = ""
"""``engine`` of an activity that is a block of code and not a request to an engine (absent: implied by the devices)."""


class OpenLine(msgspec.Struct, tag="open", tag_field="kind", omit_defaults=True):
    """A request begins. ``thread``: it is computed by a thread of its own, whose steps are its alone.

    ``beside``: it is reported when it is over, and others that are still to be reported began at these times;
    ``elsewhere``: another process computed it. ``reason``: why what is measured here is a part of it.
    """

    t: float
    id: str
    engine: str | None = None
    devices: list[str] | None = None
    model: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    parent: str | None = None
    thread: int | None = None
    beside: list[float] | None = None
    elsewhere: bool = False
    reason: str | None = None


class BindLine(msgspec.Struct, tag="bind", tag_field="kind", omit_defaults=True):
    """``child`` stands for ``id`` in steps."""

    t: float
    id: str
    child: str


class StepLine(msgspec.Struct, tag="step", tag_field="kind", omit_defaults=True):
    """One engine step; ``work``: id -> [prefill tokens computed, decode tokens computed, context after].

    Steps of one ``lane`` follow each other; without it lanes are found by overlap.
    """

    t0: float
    t1: float
    work: dict[str, tuple[int, int, int]]
    engine: str | None = None
    devices: list[str] | None = None
    lane: int | None = None


class TokensLine(msgspec.Struct, tag="tokens", tag_field="kind", omit_defaults=True):
    """Output tokens so far, and when the first one was there."""

    t: float
    id: str
    output_tokens: int | None = None
    first_token_t: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None


class CloseLine(msgspec.Struct, tag="close", tag_field="kind", omit_defaults=True):
    """A request ends."""

    t: float
    id: str
    output_tokens: int | None = None
    outcome: str | None = None
    first_token_t: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None


class CpuLine(msgspec.Struct, tag="cpu", tag_field="kind", omit_defaults=True):
    """Cumulative CPU seconds of an engine's process tree and of the host."""

    t: float
    device: str
    busy_s: float
    host_busy_s: float
    engine: str | None = None


class ForeignLine(msgspec.Struct, tag="foreign", tag_field="kind", omit_defaults=True):
    """From ``t`` on other processes use this share of the device's dynamic energy; ``others``: whether any computes."""

    t: float
    device: str
    share: float
    others: bool | None = False


class BusyLine(msgspec.Struct, tag="busy", tag_field="kind", omit_defaults=True):
    """Somebody computes on a GPU at ``t``: what it draws teaches no idle power."""

    t: float
    device: str


class HeardLine(msgspec.Struct, tag="heard", tag_field="kind", omit_defaults=True):
    """All steps of an engine of another process that ended by ``t`` have been told: the lines before this one are all."""

    t: float
    engine: str


class UnseenLine(msgspec.Struct, tag="unseen", tag_field="kind", omit_defaults=True):
    """From ``t`` on, ``change`` more pieces of work run (or fewer) that are reported when they are over."""

    t: float
    change: int


Line = (
    DeviceLine
    | EngineLine
    | SampleLine
    | OpenLine
    | BindLine
    | StepLine
    | TokensLine
    | CloseLine
    | CpuLine
    | ForeignLine
    | BusyLine
    | UnseenLine
    | HeardLine
)

KINDS: Final[dict[str, type[msgspec.Struct]]] = {
    "device": DeviceLine,
    "engine": EngineLine,
    "sample": SampleLine,
    "open": OpenLine,
    "bind": BindLine,
    "step": StepLine,
    "tokens": TokensLine,
    "close": CloseLine,
    "cpu": CpuLine,
    "foreign": ForeignLine,
    "busy": BusyLine,
    "unseen": UnseenLine,
    "heard": HeardLine,
}
AGAIN: Final = "again"
"""Key of any line, ``true``: the file before this one says it, too, and whoever read that one leaves this line out."""
KNOWN_KEYS: Final = {kind: frozenset(("kind", AGAIN, *struct.__struct_fields__)) for kind, struct in KINDS.items()}


class FileLine(msgspec.Struct, tag="file", tag_field="kind"):
    """The first line of each file of a recording in several: which recording, and which of its files, counted from 0.

    It is read by :mod:`melodi_otel.trace.read` and by nobody behind it, so it is no :data:`Line`.
    """

    run: str
    number: int


_decode: Final = msgspec.json.Decoder(Line)
_encode: Final = msgspec.json.Encoder()
_loose: Final = msgspec.json.Decoder(dict[str, Any])
_file: Final = msgspec.json.Decoder(FileLine)


class UnknownKind(ValueError):
    """A line of a kind that this version does not know."""


def decode(raw: str | bytes) -> Line:
    """The record of one line.

    Raises:
        UnknownKind: the kind is not of this version.
        ValueError: not JSON, or not of the form of its kind.
    """
    try:
        return _decode.decode(raw)
    except msgspec.ValidationError as error:
        if "Invalid value" in str(error) and "$.kind" in str(error):
            raise UnknownKind(str(_loose.decode(raw).get("kind"))) from None
        raise ValueError(str(error)) from None
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from None


def unknown_keys(raw: str | bytes) -> set[str]:
    """Keys of a good line that its kind does not have."""
    found = _loose.decode(raw)
    return set(found) - KNOWN_KEYS[found["kind"]]


def encode(line: msgspec.Struct) -> bytes:
    """One line with its newline; what is unknown (None) is left out."""
    return _encode.encode(line) + b"\n"


def encode_again(line: msgspec.Struct) -> bytes:
    """A line that the file before this one has, too."""
    return _encode.encode(line)[:-1] + b',"again":true}\n'


def encode_value(value: str | float | list[str]) -> bytes:
    """A value inside a line, in the form in which :func:`encode` writes it."""
    return _encode.encode(value)


def decode_file(raw: bytes) -> FileLine | None:
    """The file that a line begins; None: it begins none."""
    try:
        return _file.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def said_again(raw: bytes) -> bool:
    """Whether the file before has this line, too."""
    if b'"again"' not in raw:
        return False
    try:
        return _loose.decode(raw).get(AGAIN) is True
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
