"""Exact token counts of a call, from the tensors it is given and the ids it returns; text is never tokenised again.

Tensors are used through their own methods, so torch is never imported. What lies on an accelerator is counted there and
read once the generation itself has waited for the device: nothing here makes the host wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from melodi_otel.instrumentation.transformers.arguments import Arguments

Tensor = Any
"""A ``torch.Tensor``; spelt Any because this package knows no torch."""


@dataclass(slots=True)
class Prompt:
    """The prompts of one call.

    Attributes:
        rows: sequences given, before beams or ``num_return_sequences`` multiply them.
        width: columns of the returned ids that belong to the prompt.
        positions: columns of the prompt in the decoder, padding included; None where unknown.
        tokens: per row, those in a reused cache included; None: not known (yet).
        computed: per row, without those in the cache.
        pending: counts on their way from an accelerator: all tokens, computed ones.
        early: whether ``pending`` may be read as soon as the first token is on the host.
        decoder_ids: ``decoder_input_ids`` of an encoder-decoder, for :func:`decoder_width`.
    """

    rows: int
    width: int
    positions: int | None = None
    tokens: list[int] | None = None
    computed: list[int] | None = None
    pending: tuple[Tensor, Tensor] | None = None
    early: bool = False
    decoder_ids: Tensor | None = None

    def settle(self) -> None:
        """Read the pending counts, if any. Only after the device was waited for; two threads may do it at once."""
        pending = self.pending
        if pending is not None:
            self.computed = _whole(pending[1])
            self.tokens = _whole(pending[0])
            self.pending = None

    @property
    def total(self) -> int | None:
        """Prompt tokens of all rows, cached ones included."""
        return None if self.tokens is None else sum(self.tokens)

    @property
    def cached(self) -> int | None:
        """Prompt tokens that were in the cache already."""
        return None if self.tokens is None or self.computed is None else sum(self.tokens) - sum(self.computed)


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back: per sequence its tokens up to and including the first end-of-sequence, and whether it had one."""

    tokens: list[int]
    ended: list[bool]


def prompt_of(given: Arguments, *, encoder_decoder: bool) -> Prompt:
    """Count the prompts of a call before it runs.

    By the attention mask; without one by the ids that are not padding, as transformers itself would infer; else by shape.
    """
    ids, embeds, mask = ids_of(given), given.get("inputs_embeds"), given.get("attention_mask")
    source = embeds if embeds is not None and (ids is None or ids.shape[1] == 0) else ids
    if source is None:
        return _without_tokens(given, encoder_decoder)
    rows, length = int(source.shape[0]), int(source.shape[1])
    cached = 0 if encoder_decoder else cached_length(given.get("past_key_values"))
    prompt = Prompt(rows, 0 if ids is None else int(ids.shape[1]), length)
    if encoder_decoder:
        _decoder(prompt, given)
    if given.paged:
        mask = None  # continuous batching takes the rows as they are, padding and all
    if mask is not None and mask.dim() == 2 and mask.shape[0] == rows:
        kept = mask
    elif source is ids and not given.paged and (padding := _padding(given)) is not None:
        kept = ids != padding
    else:
        known = length if cached < length else cached + length
        prompt.tokens, prompt.computed = [known] * rows, [known - cached] * rows
        return prompt
    # a mask covers the cached positions too; what of it lies beyond them is computed
    total = kept.sum(-1)
    if kept.shape[1] <= cached:
        computed, total = total, total + cached
    else:
        computed = kept[:, cached:].sum(-1) if cached else total
    _count(prompt, total, computed)
    return prompt


def _count(prompt: Prompt, total: Tensor, computed: Tensor) -> None:
    kind = total.device.type
    if kind == "cpu":
        prompt.tokens = _whole(total)
        prompt.computed = prompt.tokens if computed is total else _whole(computed)
    elif kind == "cuda":
        # to pinned memory, queued before the model's own work: complete when that work has been waited for
        there = total.to("cpu", non_blocking=True)
        prompt.pending = (there, there if computed is total else computed.to("cpu", non_blocking=True))
        prompt.early = True
    else:
        prompt.pending = (total, computed)


def _whole(counts: Tensor) -> list[int]:
    return [int(count) for count in counts.tolist()]


def ids_of(given: Arguments) -> Tensor | None:
    """The ids given as rows of tokens, or None."""
    for name in ("input_ids", "inputs"):
        ids = given.get(name)
        if ids is not None and hasattr(ids, "dim") and not ids.is_floating_point():
            if ids.dim() == 2:
                return ids
            if ids.dim() == 1 and given.paged:
                return ids[None]
    return None


def _padding(given: Arguments) -> int | None:
    """The padding id where it can be told from the end of a sequence, else None."""
    pad = given.token_ids("pad_token_id")
    return pad[0] if pad and pad[0] not in given.token_ids("eos_token_id") else None


def _without_tokens(given: Arguments, encoder_decoder: bool) -> Prompt:
    features = given.features
    # Sound or pictures: how many tokens they are, only the model knows. Nothing: transformers starts from one
    # beginning-of-sequence token.
    prompt = Prompt(1, 1, 1, [1], [1]) if features is None else Prompt(int(features.shape[0]), 0)
    if encoder_decoder:
        _decoder(prompt, given)
    return prompt


def _decoder(prompt: Prompt, given: Arguments) -> None:
    prompt.width = prompt.positions = 1
    prompt.decoder_ids = given.get("decoder_input_ids")


def decoder_width(prompt: Prompt, start: tuple[int, ...]) -> int:
    """Columns of the returned ids that were given; an encoder-decoder prepends its start token where it is missing."""
    ids = prompt.decoder_ids
    if ids is None:
        return prompt.width
    prepended = bool(start) and bool((ids[:, 0] != start[0]).all())
    return int(ids.shape[1]) + int(prepended)


def cached_length(cache: Any) -> int:
    """Positions in a reused key/value cache; 0 without one. Read before the call: generation grows the same object."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    # the older form: per layer a pair of key and value tensors
    return int(cache[0][0].shape[-2]) if len(cache) else 0


def completion_of(sequences: Tensor, width: int, eos: tuple[int, ...], pad: int | None, *, padded: bool) -> Completion:
    """Count returned ids: vectorised, with one copy to the host (two where padding has to be told apart).

    Args:
        sequences: ids, prompt included, one row per returned sequence.
        width: columns that belong to the prompt.
        eos: ids that end a sequence.
        pad: the padding id, or None.
        padded: whether a sequence of several may have ended without an end token, so that padding follows it; else
            padding ids are what the model said.
    """
    rows, length = int(sequences.shape[0]), max(int(sequences.shape[1]) - width, 0)
    if length == 0 or not eos:
        return Completion([length] * rows, [False] * rows)
    if rows == 1 and sequences.device.type == "cpu":
        # the usual case, three times as fast without seven small kernels
        row: list[int] = sequences.tolist()[0][width:]
        end = min((row.index(token) + 1 for token in eos if token in row), default=0)
        return Completion([end or length], [end > 0])
    new = sequences[:, width:]
    hits = new == eos[0]
    for token in eos[1:]:
        hits = hits | (new == token)
    # 1 + position of the first hit, 0 without one
    first: list[int] = ((hits.int().argmax(-1) + 1) * hits.any(-1)).tolist()
    ended = [count > 0 for count in first]
    tokens = [count or length for count in first]
    if padded and pad is not None and pad not in eos and not all(ended):
        real = (new != pad).int()
        trailing: list[int] = (real.flip(-1).argmax(-1) + (real.sum(-1) == 0) * length).tolist()
        tokens = [count if end else count - tail for count, end, tail in zip(tokens, ended, trailing, strict=True)]
    return Completion(tokens, ended)
