"""One call as it was asked for: everything that the end of it needs, and nothing of the caller's kept alive for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from melodi_otel.instrumentation.seam import AttributeValue
from melodi_otel.instrumentation.transformers.arguments import Arguments
from melodi_otel.instrumentation.transformers.counts import Prompt, prompt_of


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for.

    Attributes:
        prompt: its prompts, counted.
        copies: sequences computed per prompt: beams, or sequences asked for.
        returned: sequences that come back, in all.
        cache: whether keys and values are kept between steps.
        looped: whether transformers' own loop runs, which asks the step clock.
        paged: whether continuous batching runs it.
        custom: whether somebody else's loop generates, whose result may be anything.
        may_end_early: whether a sequence can end before the others of its batch.
        may_be_padded: whether it can do so without an end token, and be padded then.
        eos: ids that end a sequence.
        pad: the padding id, or None.
        start: ids an encoder-decoder's output starts with.
        limit: the most tokens a sequence may get, or None.
        attributes: ``gen_ai.request.*``.
    """

    prompt: Prompt
    copies: int
    returned: int
    cache: bool
    looped: bool
    paged: bool
    custom: bool
    may_end_early: bool
    may_be_padded: bool
    eos: tuple[int, ...]
    pad: int | None
    start: tuple[int, ...]
    limit: int | None
    attributes: Mapping[str, AttributeValue]


def is_encoder_decoder(model: Any) -> bool:
    """Whether the output of ``model`` starts anew, without the prompt."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def request_of(model: Any, given: Arguments) -> Request:
    """Read the arguments of a call on ``model``, before it runs."""
    prompt = prompt_of(given, encoder_decoder=is_encoder_decoder(model))
    choices = given.whole("num_return_sequences", 1)
    beams = given.whole("num_beams", 1)
    criteria = any(given.setting(name) for name in ("stopping_criteria", "stop_strings"))
    eos, pad = given.token_ids("eos_token_id"), given.token_ids("pad_token_id")
    return Request(
        prompt=prompt,
        copies=max(beams, choices),
        returned=prompt.rows * choices,
        cache=given.setting("use_cache") is not False,
        looped=not given.paged and not given.custom,
        paged=given.paged,
        custom=given.custom,
        may_end_early=bool(eos) or criteria,
        # a limit of tokens or time ends all sequences at once; beams may lack a candidate altogether
        may_be_padded=(criteria or beams > 1) and prompt.rows * max(beams, choices) > 1,
        eos=eos,
        pad=pad[0] if pad else None,
        start=given.token_ids("decoder_start_token_id") or given.token_ids("bos_token_id"),
        limit=given.limit(prompt.width, prompt.positions),
        attributes=given.attributes(),
    )
