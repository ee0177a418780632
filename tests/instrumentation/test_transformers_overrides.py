"""Models with a ``generate`` of their own: one call each, with exact tokens or none, whoever defines them and when."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
import weakref
from pathlib import Path

import pytest
import torch
import transformers
import wrapt
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

from melodi_otel.instrumentation.transformers import TransformersInstrumentor
from melodi_otel.instrumentation.transformers.overrides import positional
from melodi_otel.testing import tiny_model

sys.path.insert(0, str(Path(__file__).parent))
families = importlib.import_module("families")
sys.path.remove(str(Path(__file__).parent))

PROMPT = torch.tensor([[5, 6, 7, 8]])
Llama = transformers.LlamaForCausalLM


def overriding_modules():
    """Modules of the installed transformers that define a ``generate``, found by reading them, and those of their models."""
    root = Path(transformers.models.__path__[0])
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        here = [path for path in folder.glob("*.py") if not any(part in path.name for part in ("_tf_", "_flax_"))]
        files = [path for path in here if path.name.startswith(("modeling_", "generation_"))]
        if any("    def generate(" in path.read_text(encoding="utf-8") for path in files):
            yield from (f"transformers.models.{folder.name}.{path.stem}" for path in sorted(files))


def below(*roots):
    found, waiting = set(), list(roots)
    while waiting:
        kind = waiting.pop()
        if kind not in found:
            found.add(kind)
            waiting += type.__subclasses__(kind)
    return found


def overriders():
    """Every class that defines ``generate`` and that a model reaches, transformers' own aside."""
    kinds = below(GenerationMixin, PreTrainedModel)
    return {owner for kind in kinds for owner in kind.__mro__ if "generate" in owner.__dict__} - {GenerationMixin}


def family(module):
    return module.split(".")[2]


def test_every_family_is_wrapped_once(calls):
    """Every overriding family of this transformers, loaded before or after, is wrapped exactly once, and undone."""
    modules = list(overriding_modules())
    half = len(modules) // 2
    for module in modules[:half]:
        importlib.import_module(module)
    before = {kind: kind.__dict__["generate"] for kind in overriders()}
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    try:
        for module in modules[half:]:
            importlib.import_module(module)
        found = {kind for kind in overriders() if kind.__module__.startswith("transformers.models.")}
        assert {family(kind.__module__) for kind in found} == {family(module) for module in modules}
        assert len({family(kind.__module__) for kind in found}) >= 28
        for kind in found:
            ours = kind.__dict__["generate"]
            assert type(ours) is wrapt.FunctionWrapper, kind
            assert type(ours.__wrapped__) is not wrapt.FunctionWrapper, kind
    finally:
        instrumentor.uninstrument()
    assert all(type(kind.__dict__["generate"]) is not wrapt.FunctionWrapper for kind in overriders())
    assert all(kind.__dict__["generate"] is function for kind, function in before.items())
    assert "__init_subclass__" not in GenerationMixin.__dict__


def test_whisper(instrumented):
    """Speech to text: tokens of all windows, as many as come back; how many a recording is, nobody says."""
    out = families.whisper().generate(torch.zeros(2, 80, 3000), max_new_tokens=6, eos_token_id=None)
    call = instrumented.only
    assert call.ended.output_tokens == out.numel() == 12
    assert (call.ended.prompt_tokens, call.ended.finish_reasons) == (None, ("length", "length"))
    assert call.ended.first_token_ns is not None


def test_whisper_long(instrumented, without_and_with):
    """A long recording is one call whatever number of windows it takes, and its result is untouched."""
    model = families.whisper()
    sound = torch.zeros(1, 80, 6000)

    def transcribe():
        torch.manual_seed(0)
        return model.generate(
            sound, attention_mask=torch.ones(1, 6000), max_new_tokens=2, return_timestamps=True, return_segments=True
        )

    found = transcribe()
    call = instrumented.only
    assert call.ended.output_tokens == sum(len(segment["tokens"]) for segment in found["segments"][0])
    assert call.ended.error is None


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_blip_2(instrumented, encoder_decoder):
    """A call that hands over to a language model tells that model's tokens and steps, pictures included."""
    ids = torch.tensor([[99] * 4 + [5, 6, 7]])
    families.blip_2(encoder_decoder=encoder_decoder).generate(
        pixel_values=torch.zeros(1, 3, 32, 32), input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5
    )
    call = instrumented.only
    assert call.begin.model == "Blip2ForConditionalGeneration"
    assert (call.ended.prompt_tokens, call.ended.output_tokens, call.ended.outcome) == (7, 5, "length")
    assert [step.seq for step in call.steps] == [1, 2, 3, 4, 5]
    assert call.work == (7, 4, 0)


def test_rag(instrumented):
    """Decoding without transformers' generate(): the question's tokens, a first token, and no invented ones."""
    ids, found = torch.tensor([[5, 6, 7]]), torch.full((2, 8), 9)
    families.rag().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        context_input_ids=found,
        context_attention_mask=torch.ones_like(found),
        doc_scores=torch.tensor([[0.5, 0.5]]),
        max_new_tokens=4,
        num_beams=1,
    )
    call = instrumented.only
    assert (call.ended.prompt_tokens, call.ended.output_tokens) == (3, None)
    assert call.ended.first_token_ns is not None
    assert call.begin.probe() is None


def test_musicgen(instrumented):
    """Sound is no text: the operation says so, and nothing is counted of it."""
    families.musicgen().generate(
        input_ids=torch.tensor([[4, 5, 6, 0]]),
        attention_mask=torch.tensor([[1, 1, 1, 0]]),
        max_new_tokens=4,
        do_sample=False,
        guidance_scale=1,
    )
    call = instrumented.only
    assert call.begin.operation == "generate_content"
    assert (call.ended.prompt_tokens, call.ended.output_tokens, call.ended.outcome) == (3, None, "stop")
    assert call.steps == []


def test_time_series(instrumented):
    """A forecast is a call without tokens."""
    out = families.patchtst().generate(torch.zeros(2, 16, 2))
    call = instrumented.only
    assert out.sequences.shape == (2, 100, 4, 2)
    assert call.begin.operation == "generate_content"
    assert (call.begin.prompt_tokens, call.ended.prompt_tokens, call.ended.output_tokens) == (None, None, None)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method.*:DeprecationWarning"
)  # torch's own, on its first compile
def test_diffusion(instrumented):
    """Text in blocks: the ids that come back, up to the first end token."""
    if importlib.util.find_spec("transformers.models.diffusion_gemma") is None:
        pytest.skip("this transformers has no diffusion_gemma")
    model = families.diffusion_gemma()
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    given = {"attention_mask": (ids != 0).long(), "max_new_tokens": 16, "max_denoising_steps": 2, "do_sample": False}
    torch.manual_seed(0)
    free = model.generate(ids, **given).sequences[:, 4:]
    end = int(free[0, 2])  # a token that row 0 is known to say early
    model.generation_config.eos_token_id = end
    torch.manual_seed(0)
    new = model.generate(ids, **given).sequences[:, 4:].tolist()
    without, call = instrumented.made
    assert (without.ended.prompt_tokens, without.ended.output_tokens) == (6, 32)
    assert call.ended.output_tokens == sum(row.index(end) + 1 if end in row else len(row) for row in new)
    assert call.ended.output_tokens < 32


# --- classes of one's own ---


def tiny(kind, seed=0):
    config = tiny_model.llama().config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).eval()


def preparing():
    class Preparing(Llama):
        def generate(self, ids, room=3, **kwargs):
            return super().generate(ids, max_new_tokens=room, **kwargs)

    return Preparing


def looping():
    class Looping(Llama):
        def generate(self, ids, **kwargs):
            for _ in range(4):
                new = self(ids).logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, new], dim=-1)
            return ids

    return Looping


@pytest.mark.parametrize("before", [True, False], ids=["defined before", "defined after"])
def test_override_with_super(calls, before):
    """An override that prepares and calls super() is one call with the tokens and steps of what it called."""
    kind = preparing() if before else None
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    try:
        tiny(kind or preparing()).generate(PROMPT, 5)
    finally:
        instrumentor.uninstrument()
    assert (calls.only.ended.prompt_tokens, calls.only.ended.output_tokens) == (4, 5)
    assert calls.only.work == (4, 4, 0)
    assert calls.only.begin.operation == "text_completion"


@pytest.mark.parametrize("before", [True, False], ids=["defined before", "defined after"])
def test_override_without_super(calls, before):
    """An override with a loop of its own is a call whose prompt is known only if a loop was seen, and whose output is not."""
    kind = looping() if before else None
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    try:
        out = tiny(kind or looping()).generate(PROMPT)
    finally:
        instrumentor.uninstrument()
    assert out.shape == (1, 8)
    assert (calls.only.ended.output_tokens, calls.only.ended.first_token_ns) == (None, None)
    assert calls.only.steps == []


def test_override_of_an_override(instrumented):
    """However many overrides a call goes through, it is the outermost one's."""

    class Outer(preparing()):
        def generate(self, ids, **kwargs):
            return super().generate(ids, 2, **kwargs)

    tiny(Outer).generate(PROMPT)
    assert instrumented.only.ended.output_tokens == 2


def test_several_runs_of_one_model(instrumented):
    """Runs of one model add up, and their steps stand one after the other on one lane."""

    class Twice(Llama):
        def generate(self, ids, **kwargs):
            first = super().generate(ids, max_new_tokens=2)
            return super().generate(first, max_new_tokens=3)

    tiny(Twice).generate(PROMPT)
    call = instrumented.only
    assert (call.ended.prompt_tokens, call.ended.output_tokens) == (4 + 6, 2 + 3)
    assert [step.seq for step in instrumented.meter.steps] == [1, 2, 3, 4, 5]
    assert len({step.lane for step in instrumented.meter.steps}) == 1
    assert call.work == (10, 3, 0)
    assert [step.left for step in instrumented.meter.steps if step.left] == [("r0.0.0",)]


def test_runs_of_several_models(instrumented, llama):
    """Tokens of several models are not added up: they are different things."""

    class Staged(Llama):
        def generate(self, ids, **kwargs):
            text = super().generate(ids, max_new_tokens=2)
            return llama.generate(text, max_new_tokens=3)

    tiny(Staged).generate(PROMPT)
    call = instrumented.only
    assert (call.ended.output_tokens, call.ended.first_token_ns) == (None, None)
    assert len(instrumented.meter.steps) == 5


def test_nested_work_is_no_part(instrumented, llama):
    """What runs inside the run that was handed over (a depth model, a draft) adds no tokens."""

    class Inside(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            llama.generate(PROMPT, max_new_tokens=2)
            return scores

    tiny(preparing()).generate(PROMPT, 3, logits_processor=transformers.LogitsProcessorList([Inside()]))
    assert instrumented.only.ended.output_tokens == 3
    assert instrumented.only.work == (4, 2, 0)


def test_override_raises(instrumented):
    """What an override raises comes out as it was; what is known by then is told."""
    mistake = ValueError("after two tokens")

    class Failing(Llama):
        def generate(self, ids, **kwargs):
            super().generate(ids, max_new_tokens=2)
            raise mistake

    with pytest.raises(ValueError) as raised:
        tiny(Failing).generate(PROMPT)
    assert raised.value is mistake
    end = instrumented.only.ended
    assert (end.outcome, end.error, end.output_tokens) == ("error", mistake, 2)


def test_mixin_without_a_base(instrumented):
    """A generate() inherited from outside transformers' classes counts too."""

    class Mixin:
        def generate(self, ids, **kwargs):
            return ids

    class Mixed(Mixin, Llama):
        pass

    tiny(Mixed).generate(PROMPT)
    assert len(instrumented.made) == 1


def test_generators_are_left_alone(instrumented):
    """A generate() that yields does its work later, so a call that ends before it is not made up."""

    class Yielding(Llama):
        def generate(self, ids, **kwargs):
            yield from ids

    assert type(Yielding.__dict__["generate"]).__name__ == "function"
    assert len(list(tiny(Yielding).generate(PROMPT))) == 1
    assert instrumented.made == []


def test_subclass_hooks_still_run(instrumented):
    """__init_subclass__ of transformers and of a class of one's own run as before, with their arguments."""
    heard = []

    class Listening(Llama):
        def __init_subclass__(cls, *, word="", **kwargs):
            super().__init_subclass__(**kwargs)
            heard.append(word)

    class Heard(Listening, word="tea"):
        pass

    assert heard == ["tea"]
    assert Heard.config_class is transformers.LlamaConfig


def test_somebody_elses_override_wrapper_stays(calls):
    """If someone wrapped an override after us, theirs stays, and ours below it passes calls through."""
    kind = preparing()
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    ours = kind.generate
    kind.generate = lambda self, *args, **kwargs: ours(self, *args, **kwargs)
    theirs = kind.__dict__["generate"]
    instrumentor.uninstrument()
    assert kind.__dict__["generate"] is theirs
    assert tiny(kind).generate(PROMPT, 2).shape == (1, 6)
    assert calls.made == []


def test_classes_are_not_kept(instrumented):
    """A class that its program has dropped does not live on in an undo list."""
    kind = weakref.ref(preparing())
    gc.collect()
    gc.collect()
    assert kind() is None


def test_positional_names():
    """Names of positional arguments are read from the function; one that hands on *args takes transformers' own."""
    assert positional(lambda self, ids, room=3, *, word=None, **kwargs: None) == ("ids", "room")
    assert positional(lambda self, *args, **kwargs: None)[:2] == ("inputs", "generation_config")
    assert positional(len) == ()
