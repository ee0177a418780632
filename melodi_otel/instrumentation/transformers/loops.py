"""One run of transformers' own generation inside a call: what it was asked, its step clock, what came of it.

A plain ``generate()`` is one such run. A model with a ``generate`` of its own may start none (it has another loop), one (it
prepares what the language model needs) or several (windows of a long recording, text before speech).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from melodi_otel.attribution.meter import Outcome
from melodi_otel.instrumentation.transformers.counts import completion_of, decoder_width
from melodi_otel.instrumentation.transformers.request import Request
from melodi_otel.instrumentation.transformers.steps import Steps


@dataclass(frozen=True, slots=True)
class Produced:
    """What a run produced: tokens over all returned sequences (None: not known), and why they ended."""

    output_tokens: int | None = None
    outcome: Outcome = "stop"
    finish_reasons: Sequence[str] = ()


NOT_COUNTED: Final = Produced()


class Loop:
    """See the module.

    Args:
        model_id: ``id`` of the model that generates.
        request: what was asked for.
        steps: its steps, or None where no step clock runs for it.

    Attributes:
        produced: what came back; None while it runs, and for good where it raised.
    """

    __slots__ = ("model_id", "produced", "request", "steps")

    def __init__(self, model_id: int, request: Request, steps: Steps | None) -> None:
        self.model_id = model_id
        self.request = request
        self.steps = steps
        self.produced: Produced | None = None

    @property
    def prompt_tokens(self) -> int | None:
        """Prompt tokens of all rows, cached ones included."""
        return self.request.prompt.total

    @property
    def cached_tokens(self) -> int | None:
        """Those of them that a cache already held."""
        return self.request.prompt.cached

    @property
    def output_tokens(self) -> int | None:
        """Tokens that came back, or those so far where it has not returned."""
        return self.so_far() if self.produced is None else self.produced.output_tokens

    def returned(self, result: Any) -> None:
        """It returned ``result``."""
        request = self.request
        request.prompt.settle()  # a result is there, so the device was waited for
        self.produced = NOT_COUNTED
        self.produced = self._counted(result)

    def interrupted(self) -> None:
        """It raised: what can be read without waiting for the device is read."""
        steps = self.steps
        if steps is not None and steps.done and steps.prompt.early:
            steps.prompt.settle()

    def so_far(self) -> int | None:
        """Exact tokens so far, or None."""
        steps, request = self.steps, self.request
        # where sequences of a batch may end apart, from the second step on only the device knew which still ran
        if steps is not None and (steps.rows == 1 or steps.done <= 1 or not request.may_end_early):
            return steps.output_tokens()
        return None

    def _counted(self, result: Any) -> Produced:
        request = self.request
        sequences = None if request.custom else sequences_of(result, paged=request.paged)
        if sequences is None:
            return NOT_COUNTED
        width = decoder_width(request.prompt, request.start)
        done = completion_of(sequences, width, request.eos, request.pad, padded=request.may_be_padded)
        # a sequence that stopped without an end token and below its limit met another criterion of the caller's
        limit = request.limit
        reasons = tuple(
            "stop" if ended or (limit is not None and count < limit) else "length"
            for count, ended in zip(done.tokens, done.ended, strict=True)
        )
        return Produced(sum(done.tokens), "length" if "length" in reasons else "stop", reasons)

    def close(self) -> None:
        """It is over: its steps are handed over at the next probe, and nothing of the caller's is kept."""
        if self.steps is not None:
            self.steps.close()
        self.request.prompt.decoder_ids = None  # the probe may be held a while longer


def sequences_of(result: Any, *, paged: bool = False) -> Any:
    """The returned ids as rows of tokens, or None where the result is something else.

    Args:
        paged: whether continuous batching made it, which puts its rows into one more dimension.
    """
    ids = result if hasattr(result, "dim") else getattr(result, "sequences", None)
    if ids is None or not hasattr(ids, "dim") or ids.is_floating_point():
        return None
    if paged and ids.dim() == 3 and ids.shape[0] == 1:
        ids = ids[0]
    return ids if ids.dim() == 2 else None
