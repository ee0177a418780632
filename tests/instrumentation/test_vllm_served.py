"""One request of vLLM: its tokens are those that came from the engine, whatever its caller made of the answers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from melodi_otel.instrumentation.seam import Begin
from melodi_otel.instrumentation.vllm.served import Served, settings_of


class Detokenizer:
    """Counts the tokens that came from the engine."""

    def __init__(self) -> None:
        self.count = 0

    def num_output_tokens(self) -> int:
        return self.count


def state(prompt: int = 5, *, first_s: float = 0.0, cached: int | None = 0, kind: str = "CUMULATIVE") -> Any:
    """What the output processor keeps of a sequence."""
    return SimpleNamespace(
        prompt_len=prompt,
        detokenizer=Detokenizer(),
        num_cached_tokens=cached,
        is_prefilling=False,
        stats=SimpleNamespace(first_token_ts=first_s),
        output_kind=SimpleNamespace(name=kind),
        request_id="in",
    )


def answer(*parts: tuple[int, list[int], str | None], finished: bool = False, prompt: list[int] | None = None) -> Any:
    """An output of ``(index, token ids, finish reason)``."""
    made = [SimpleNamespace(index=i, token_ids=ids, finish_reason=why) for i, ids, why in parts]
    return SimpleNamespace(outputs=made, finished=finished, prompt_token_ids=prompt)


def served(calls: Any, *, probing: bool = False, same_host: bool = True, whole: bool = False) -> Served:
    made = Served(calls, probing=probing, same_host=same_host, whole=whole)
    made.call = calls.begin(Begin("chat", "vllm", "m", calls.now_ns()))
    return made


def test_ids_are_bound(calls: Any) -> None:
    """Every sequence is bound under the engine's id of it; the prompt's length comes with the first."""
    one = served(calls)
    for name in ("0_r", "1_r"):
        one.joined(name, state(7))
    assert calls.only.children == ["0_r", "1_r"]
    one.end(None)
    assert calls.only.ended.prompt_tokens == 7


@pytest.mark.parametrize("kind", ["CUMULATIVE", "DELTA", "FINAL_ONLY"])
def test_tokens_are_the_engines(calls: Any, kind: str) -> None:
    """Three tokens are three, whether the caller was shown them as deltas, wholes or only at the end."""
    one = served(calls)
    kept = state(kind=kind)
    one.joined("r", kept)
    shown = {"CUMULATIVE": [[1], [1, 2], [1, 2, 3]], "DELTA": [[1], [2], [3]], "FINAL_ONLY": [[1, 2, 3]]}[kind]
    for number, ids in enumerate(shown):
        kept.detokenizer.count = 3 if kind == "FINAL_ONLY" else number + 1
        one.saw(answer((0, ids, "length" if ids is shown[-1] else None), finished=ids is shown[-1]))
    assert (calls.only.ended.output_tokens, calls.only.ended.outcome) == (3, "length")


def test_answers_are_summed(calls: Any) -> None:
    """The tokens of n answers are one request's; their reasons stand in order."""
    one = served(calls)
    kept = [state(), state()]
    for number, each in enumerate(kept):
        one.joined(f"{number}_r", each)
        each.detokenizer.count = 4 + number
    one.saw(answer((1, [1], "stop"), (0, [1], "length"), finished=True))
    ended = calls.only.ended
    assert (ended.output_tokens, ended.finish_reasons, ended.outcome) == (9, ("length", "stop"), "stop")


@pytest.mark.parametrize("error", [asyncio.CancelledError(), GeneratorExit(), KeyboardInterrupt()])
def test_who_leaves_aborts(calls: Any, error: BaseException) -> None:
    """A caller that goes away ends it as an abort with what had been computed; that is no error."""
    one = served(calls)
    kept = state()
    one.joined("r", kept)
    kept.detokenizer.count = 17
    one.end(error)
    ended = calls.only.ended
    assert (ended.outcome, ended.output_tokens, ended.error) == ("abort", 17, None)


def test_what_fails_is_an_error(calls: Any) -> None:
    """What the engine raised is told."""
    one = served(calls)
    error = ValueError("no")
    one.end(error)
    assert (calls.only.ended.outcome, calls.only.ended.error) == ("error", error)


@pytest.mark.parametrize(
    ("reason", "outcome"), [("abort", "abort"), ("error", "error"), ("stop", "stop"), ("length", "length")]
)
def test_reasons(calls: Any, reason: str, outcome: str) -> None:
    """The engine's reason is the outcome."""
    one = served(calls)
    one.joined("r", state())
    one.saw(answer((0, [1], reason), finished=True))
    assert calls.only.ended.outcome == outcome


def test_it_ends_once(calls: Any) -> None:
    """After its last answer nothing changes it, and it says that it is over."""
    one = served(calls)
    one.joined("r", state())
    assert not one.ended
    one.saw(answer((0, [1], "stop"), finished=True))
    assert one.ended
    one.end(GeneratorExit())
    one.joined("late", state())
    assert calls.only.ended.outcome == "stop"
    assert calls.only.children == ["r"]


def test_cached_tokens(calls: Any) -> None:
    """Prompt tokens that were in the cache are told; where the prompt was never computed they are not known."""
    for kept, cached in ((state(cached=128), 128), (state(cached=0), 0), (state(cached=None), None)):
        one = served(calls)
        one.joined("r", kept)
        one.end(None)
        assert calls.made[-1].ended.cached_tokens == cached
    early = state(cached=0)
    early.is_prefilling = True
    one = served(calls)
    one.joined("r", early)
    one.end(GeneratorExit())
    assert calls.made[-1].ended.cached_tokens is None


def test_the_first_token_is_the_engines(calls: Any) -> None:
    """On this host it came when the engine says so; from elsewhere, or where it says nothing, when the caller saw it."""
    one = served(calls)
    one.joined("r", state(first_s=2.5))
    one.saw(answer((0, [1], None)))
    one.end(None)
    assert calls.made[-1].ended.first_token_ns == 2_500_000_000
    far = served(calls, same_host=False)
    far.joined("r", state(first_s=2.5))
    far.saw(answer((0, [1], None)))
    far.end(None)
    assert calls.made[-1].ended.first_token_ns is not None
    assert calls.made[-1].ended.first_token_ns < 2_500_000_000


def test_only_the_last_answer_shows_no_first_token(calls: Any) -> None:
    """Who is shown only the whole answer does not see when its first token came."""
    one = served(calls)
    one.joined("r", state(kind="FINAL_ONLY"))
    one.saw(answer((0, [1, 2], "stop"), finished=True))
    assert calls.only.ended.first_token_ns is None


def test_an_embedding_has_no_tokens(calls: Any) -> None:
    """A pooling request has a prompt, no output tokens and no first one."""
    kept = state()
    kept.detokenizer = None
    one = served(calls)
    one.joined("r", kept)
    one.saw(SimpleNamespace(outputs=SimpleNamespace(data=[0.5]), finished=True, prompt_token_ids=[1, 2]))
    ended = calls.only.ended
    assert (ended.prompt_tokens, ended.output_tokens, ended.first_token_ns, ended.outcome) == (5, None, None, "stop")


def test_beams_stand_in_the_last_answer(calls: Any) -> None:
    """Of a beam search the beams that were returned are the tokens, however many sequences computed them."""
    one = served(calls, whole=True)
    for number in range(6):
        kept = state()
        kept.detokenizer.count = 1
        one.joined(f"b{number}", kept)
    one.saw(answer((0, [1, 2, 3], "stop"), (1, [1, 2, 4], "stop"), finished=True))
    assert calls.only.ended.output_tokens == 6


def test_beams_of_a_script(calls: Any) -> None:
    """Where no answer passes by, the search says itself what it came to."""
    one = served(calls, whole=True)
    one.produced(8, {0: "stop"})
    one.end(None)
    assert (calls.only.ended.output_tokens, calls.only.ended.finish_reasons) == (8, ("stop",))


def test_a_probe_counts_so_far(calls: Any) -> None:
    """Where steps are not seen its tokens can be asked for at any time; before it reaches the engine they are not known."""
    one = served(calls, probing=True)
    assert one.tokens() is None
    kept = state()
    calls.meter.progress = lambda key, t_ns, tokens, **more: calls.meter.steps.append((tokens, more))
    one.joined("r", kept)
    kept.detokenizer.count = 4
    assert one.tokens() == 4
    assert calls.meter.steps == [(0, {"prompt_tokens": 5})]


def test_settings() -> None:
    """What was asked for stands in the request's attributes; what was not set does not."""
    asked = SimpleNamespace(
        max_tokens=9, n=3, seed=7, temperature=0.5, top_p=1.0, top_k=20, frequency_penalty=0.0, presence_penalty=0.25,
        output_kind=SimpleNamespace(name="DELTA"),
    )  # fmt: skip
    assert settings_of(asked) == {
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.choice.count": 3,
        "gen_ai.request.seed": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": 20.0,
        "gen_ai.request.presence_penalty": 0.25,
        "gen_ai.request.stream": True,
    }
    assert settings_of(SimpleNamespace(max_tokens=None)) == {}
