"""One request of vLLM from its first line of code to its last token, and what it says of itself when it ends.

Tokens are counted where vLLM counts them: in the state that its output processor keeps of every sequence. It holds all that
have come from the engine, also those of a client that left before it read them, and what a caller's kind of stream
(cumulative, deltas, only the last) makes of the answers does not matter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

from melodi_otel.attribution.meter import Outcome
from melodi_otel.instrumentation.seam import AttributeValue, Calls, End, OpenCall

_NUMBERS: Final = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty")
_LEFT: Final = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt)
"""How it shows that nobody wants the answer any more."""


class Served:
    """A request in flight.

    Args:
        call: where it is reported.
        now_ns: monotonic ns.
        probing: nobody reports the engine's steps: its tokens are told instead.
        same_host: times of the engine are times here.
        whole: what it produced stands in its last answer alone, as beams do; the sequences behind it are more.
    """

    __slots__ = (
        "_calls", "_counts", "_ended", "_first_ns", "_now_ns", "_prompt", "_reasons", "_same_host", "_whole", "call",
        "probing",
        "states",
    )  # fmt: skip

    def __init__(self, calls: Calls, *, probing: bool, same_host: bool = True, whole: bool = False) -> None:
        self.call: OpenCall | None = None
        self.probing = probing
        self.states: list[Any] = []
        self._calls = calls
        self._now_ns = calls.now_ns
        self._same_host = same_host
        self._whole = whole
        self._first_ns: int | None = None
        self._prompt: int | None = None
        self._reasons: dict[int, str] = {}
        self._counts: dict[int, int] = {}
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._ended

    def joined(self, engine_id: str, state: Any) -> None:
        """A sequence of it is on its way to the engine, which knows it by ``engine_id``."""
        call = self.call
        if call is None or self._ended:
            return
        if state is not None and not any(known is state for known in self.states):
            self.states.append(state)
        call.bind(engine_id)
        if self._prompt is None and state is not None:
            self._prompt = int(state.prompt_len)
            if self.probing:
                self._calls.meter.progress(call.key, self._now_ns(), 0, prompt_tokens=self._prompt)

    def tokens(self) -> int | None:
        """Tokens that have come from the engine so far; None: not known, or it computes no tokens."""
        if self._whole or not self.states:
            return sum(self._counts.values()) if self._counts else None
        return _sum(_tokens(state) for state in self.states)

    def saw(self, output: Any) -> None:
        """An answer of it passes by, on its way to whoever asked."""
        if self._first_ns is None:
            self._first_ns = self._now_ns()
        for part in _parts(output):
            if part.finish_reason is not None:
                self._reasons[part.index] = str(part.finish_reason)
            if self._whole or not self.states:
                self._counts[part.index] = len(part.token_ids)
        if output.finished:
            if self._prompt is None and output.prompt_token_ids is not None:
                self._prompt = len(output.prompt_token_ids)
            self.end(None)

    def produced(self, tokens: int | None, reasons: Mapping[int, str]) -> None:
        """What the whole of it came to, where no answer says it."""
        if tokens is not None:
            self._counts = {0: tokens}
        self._reasons.update(reasons)

    def end(self, error: BaseException | None) -> None:
        """It is over; a second time changes nothing."""
        call = self.call
        if self._ended or call is None:
            return
        self._ended = True
        left = isinstance(error, _LEFT)
        outcome: Outcome = "abort" if left else "error" if error is not None else self._outcome()
        first = next(iter(self.states), None)
        call.end(
            End(
                self._now_ns(),
                output_tokens=self.tokens(),
                outcome=outcome,
                finish_reasons=tuple(self._reasons[index] for index in sorted(self._reasons)),
                first_token_ns=self._first_token_ns(),
                prompt_tokens=self._prompt,
                cached_tokens=None if first is None else _cached(first),
                error=None if left else error,
            )
        )

    def _outcome(self) -> Outcome:
        reasons = set(self._reasons.values())
        if "abort" in reasons:
            return "abort"
        if "error" in reasons:
            return "error"
        return "length" if reasons == {"length"} else "stop"

    def _first_token_ns(self) -> int | None:
        """When the first token came from the engine; else when the caller saw it, where it saw it alone."""
        if self._same_host:
            found = [int(1e9 * s) for state in self.states if (s := _first_token_s(state))]
            if found:
                return min(found)
        only_last = any(getattr(state.output_kind, "name", "") == "FINAL_ONLY" for state in self.states)
        pooled = self.states and all(getattr(state, "detokenizer", None) is None for state in self.states)
        return None if only_last or pooled or self._whole else self._first_ns


def _parts(output: Any) -> Sequence[Any]:
    """The sequences of an answer; an embedding has none."""
    parts: Any = output.outputs
    return cast(Sequence[Any], parts) if isinstance(parts, Sequence) else ()


def settings_of(params: Any) -> dict[str, AttributeValue]:
    """``gen_ai.request.*`` of sampling parameters: what was set, and sampling only where there is some."""
    found: dict[str, AttributeValue] = {}
    most, number, seed = (getattr(params, name, None) for name in ("max_tokens", "n", "seed"))
    if isinstance(most, int):
        found["gen_ai.request.max_tokens"] = most
    if isinstance(number, int) and number > 1:
        found["gen_ai.request.choice.count"] = number
    if isinstance(seed, int):
        found["gen_ai.request.seed"] = seed
    for name in _NUMBERS:
        value: object = getattr(params, name, None)
        if isinstance(value, int | float) and value != _UNSET.get(name):
            found[f"gen_ai.request.{name}"] = float(value)
    if getattr(getattr(params, "output_kind", None), "name", "") == "DELTA":
        found["gen_ai.request.stream"] = True
    return found


_UNSET: Final[Mapping[str, float]] = {
    "top_p": 1.0,
    "top_k": 0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}


def _tokens(state: Any) -> int | None:
    detokenizer = state.detokenizer
    if detokenizer is None:
        return None
    count: Callable[[], int] | None = getattr(detokenizer, "num_output_tokens", None)
    return int(count()) if count is not None else len(detokenizer.output_token_ids)


def _cached(state: Any) -> int | None:
    """Prompt tokens that were in the cache; not known before its prompt was computed."""
    found = getattr(state, "num_cached_tokens", None)
    return found if isinstance(found, int) and not getattr(state, "is_prefilling", False) else None


def _first_token_s(state: Any) -> float | None:
    return getattr(getattr(state, "stats", None), "first_token_ts", None)


def _sum(counts: Any) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
