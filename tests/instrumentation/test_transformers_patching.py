"""Patching: only what is loaded, once, and undone to the very same attributes."""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from transformers.generation.utils import GenerationMixin
from transformers.pipelines.text_generation import TextGenerationPipeline

from melodi_otel.instrumentation.patches import Patches
from melodi_otel.instrumentation.transformers import TransformersInstrumentor
from melodi_otel.testing import tiny_model

PROMPT = torch.tensor([[5, 6, 7, 8]])
PATCHED = [
    (GenerationMixin, "generate"),
    (GenerationMixin, "_has_unfinished_sequences"),
    (GenerationMixin, "_get_candidate_generator"),
    (TextGenerationPipeline, "_forward"),
]


def attributes():
    return [owner.__dict__[name] for owner, name in PATCHED]


def test_undone(calls):
    """uninstrument() puts back the very same objects."""
    before = attributes()
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    assert all(now is not then for now, then in zip(attributes(), before, strict=True))
    instrumentor.uninstrument()
    assert all(now is then for now, then in zip(attributes(), before, strict=True))


def test_twice_is_once(calls, llama):
    """instrument() twice gives one call per generate(); one uninstrument() undoes both."""
    before = attributes()
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    instrumentor.instrument()
    llama.generate(PROMPT, max_new_tokens=2)
    instrumentor.uninstrument()
    instrumentor.uninstrument()
    assert len(calls.made) == 1
    assert all(now is then for now, then in zip(attributes(), before, strict=True))


def test_on_again(calls, llama):
    """After uninstrument() nothing is reported; after the next instrument() everything is."""
    instrumentor = TransformersInstrumentor(calls)
    for turn in range(2):
        instrumentor.instrument()
        llama.generate(PROMPT, max_new_tokens=2)
        instrumentor.uninstrument()
        llama.generate(PROMPT, max_new_tokens=2)
        assert len(calls.made) == turn + 1


def test_somebody_elses_wrapper_stays(calls, llama):
    """If someone wrapped after us, theirs stays, and ours below it passes calls through."""
    original = GenerationMixin.__dict__["generate"]
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    ours = GenerationMixin.generate

    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    GenerationMixin.generate = theirs
    try:
        instrumentor.uninstrument()
        assert GenerationMixin.generate is theirs
        assert llama.generate(PROMPT, max_new_tokens=2).shape == (1, 6)
        assert calls.made == []
    finally:
        GenerationMixin.generate = original


def test_two_instrumentations(calls, llama):
    """Two instrumentations side by side each see the whole call, steps included."""
    other = type(calls)()
    first, second = TransformersInstrumentor(calls), TransformersInstrumentor(other)
    first.instrument()
    second.instrument()
    llama.generate(PROMPT, max_new_tokens=3)
    second.uninstrument()
    first.uninstrument()
    assert [each.only.ended.output_tokens for each in (calls, other)] == [3, 3]
    assert [len(each.meter.steps) for each in (calls, other)] == [3, 3]


def test_uninstrument_in_flight(calls, llama):
    """A call in flight while everything is undone still ends, once, with its result counted."""
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()

    class Undo(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            instrumentor.uninstrument()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    llama.generate(PROMPT, max_new_tokens=3, stopping_criteria=transformers.StoppingCriteriaList([Undo()]))
    assert calls.only.ended.output_tokens == 3


def test_signature(instrumented):
    """The signature that tools read is the original one."""
    assert "assistant_model" in inspect.signature(GenerationMixin.generate).parameters
    assert GenerationMixin.generate.__doc__


def test_class_call(instrumented, llama):
    """Called through the class, it is the same call."""
    GenerationMixin.generate(llama, PROMPT, max_new_tokens=2)
    assert instrumented.only.begin.prompt_tokens == 4


def test_nothing_is_kept(instrumented):
    """Neither a model nor its inputs live longer because of us; the engine of a model that is gone is reported gone."""
    model, ids = tiny_model.llama(), PROMPT.clone()
    import weakref

    alive = weakref.ref(model), weakref.ref(ids)
    model.generate(ids, max_new_tokens=2)
    engine = instrumented.only.begin.engine
    del model, ids
    gc.collect()
    assert [one() for one in alive] == [None, None]
    tiny_model.llama().generate(PROMPT, max_new_tokens=1)
    assert (engine, {"state": "gone"}) in instrumented.meter.engines


def test_inherited_attributes_are_removed_again():
    """An attribute that a class only inherits is taken away again, not set."""

    class Base:
        def method(self):
            return 1

    class Derived(Base):
        pass

    patches = Patches()
    patches.replace(Derived, "method", lambda original: lambda self: original(self) + 1)
    assert Derived().method() == 2
    patches.undo()
    assert "method" not in Derived.__dict__
    assert Derived().method() == 1


LAZY = """
    import logging, sys
    sys.path.insert(0, {here!r})
    from types import SimpleNamespace
    from melodi_otel.instrumentation.transformers import TransformersInstrumentor
    made = []
    opened = SimpleNamespace(key=SimpleNamespace(request="r"), bind=lambda child: None, end=lambda end: made.append(end))
    meter = SimpleNamespace(engine=lambda *a, **k: None, step=lambda *a, **k: None)
    calls = SimpleNamespace(meter=meter, group="g", now_ns=lambda: 0, begin=lambda begin: opened)
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    assert "torch" not in sys.modules and "transformers" not in sys.modules, "imported by instrument()"
    {turn}
    import torch
    from melodi_otel.testing import tiny_model
    torch.set_num_threads(1)
    logging.getLogger("melodi_otel").setLevel(logging.CRITICAL)
    from transformers.generation.utils import GenerationMixin
    import transformers.pipelines
    tiny_model.llama().generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
    print(len(made), type(GenerationMixin.__dict__["generate"]).__name__)
"""


@pytest.mark.parametrize(
    ("turn", "printed"),
    [
        ("", "1 FunctionWrapper"),
        ("instrumentor.uninstrument()", "0 function"),
        ("instrumentor.uninstrument(); instrumentor.instrument()", "1 FunctionWrapper"),
    ],
    ids=["instrumented", "uninstrumented", "instrumented again"],
)
def test_import_afterwards(turn, printed, request):
    """instrument() imports nothing; what is imported later is patched, unless uninstrument() came in between."""
    script = textwrap.dedent(LAZY).format(here=str(request.config.rootpath), turn=turn)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.strip(), done.returncode) == (printed, 0), done.stderr
