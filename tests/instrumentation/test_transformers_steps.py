"""Step hand-over: what the meter hears of a call's steps is exactly what was computed, once, in order."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
import transformers

from melodi_otel.attribution.meter import Decode, EngineId, Joined, Prefill
from melodi_otel.instrumentation.transformers.arguments import Arguments
from melodi_otel.instrumentation.transformers.request import request_of
from melodi_otel.instrumentation.transformers.steps import Lane, Steps
from melodi_otel.testing import tiny_model

PROMPT = torch.tensor([[5, 6, 7, 8]])


def test_every_step(instrumented, llama):
    """Step 1 computes the prompt; every later one a token per row on a context that grows by one.

    ======  ========  ===========  ========
    step    computes  context      members
    ======  ========  ===========  ========
    1       4         0            -
    2       1         4            joined
    3       1         5
    ======  ========  ===========  ========
    """
    llama.generate(PROMPT, max_new_tokens=3)
    call = instrumented.only
    child = call.children[0]
    assert [(step.prefill, step.joined, step.decode) for step in call.steps] == [
        ((Prefill(child, 4, 0),), (), Decode(0, 0)),
        ((), (Joined(child, 4),), Decode(1, 4)),
        ((), (), Decode(1, 5)),
    ]


def test_times(instrumented, llama):
    """Steps begin with the call, follow each other without a gap, and the first ends with the first token."""
    llama.generate(PROMPT, max_new_tokens=4)
    call = instrumented.only
    times = [(step.t0_ns, step.t1_ns) for step in call.steps]
    assert times[0] == (call.begin.start_ns, call.ended.first_token_ns)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(times))
    assert times[-1][1] <= call.ended.end_ns
    assert [step.seq for step in call.steps] == [1, 2, 3, 4]


def test_all_before_the_end(instrumented, llama):
    """Every step is with the meter before the call is closed."""
    llama.generate(PROMPT, max_new_tokens=5)
    assert instrumented.only.steps_at_end == 5


@pytest.mark.parametrize(
    ("options", "rows", "prefill", "decode"),
    [
        ({}, 2, 13, 2 * 4),
        ({"num_beams": 3}, 6, 3 * 13, 6 * 4),
        ({"do_sample": True, "num_return_sequences": 2}, 4, 2 * 13, 4 * 4),
        ({"prefill_chunk_size": 3}, 2, 13, 2 * 4),
    ],
    ids=["batch", "beams", "sequences", "chunked"],
)
def test_sums(instrumented, llama, options, rows, prefill, decode):
    """Prompt tokens are computed once per computed row, output tokens but the first in decode steps."""
    ids, mask = torch.full((2, 9), 5), torch.ones(2, 9, dtype=torch.long)
    mask[0, :5] = 0
    llama.generate(ids, attention_mask=mask, max_new_tokens=5, **options)
    call = instrumented.only
    assert len(call.children) == len(set(call.children)) == rows
    assert call.work == (prefill, decode, 0)


def test_without_cache(instrumented, llama):
    """Without a cache every step computes everything again, and says so."""
    llama.generate(PROMPT, use_cache=False, max_new_tokens=3)
    assert instrumented.only.work == (4 + 5 + 6, 0, 0)


def test_encoder_decoder(instrumented):
    """An encoder-decoder computes its prompt in step 1 too."""
    tiny_model.t5(eos=None).generate(PROMPT, max_new_tokens=4)
    assert instrumented.only.work == (4, 3, 0)


def test_assisted(instrumented, llama):
    """Assisted steps compute the drafts and one more; their contexts are what was accepted before."""
    llama.generate(PROMPT, assistant_model=tiny_model.assistant(), max_new_tokens=10, do_sample=False)
    call = instrumented.only
    first, *rest = call.steps
    assert [(row.tokens, row.context) for row in first.prefill] == [(4, 0)]
    assert rest
    assert all(step.decode.n == 0 and len(step.computed) == 1 and step.computed[0].tokens >= 1 for step in rest)
    contexts = [step.computed[0].context for step in rest]
    assert contexts[0] >= 4
    assert contexts == sorted(set(contexts))


def test_assisted_by_itself(instrumented, llama):
    """With the very same model as assistant all drafts are accepted: fewer steps than tokens, no step of the drafts."""
    llama.generate(
        PROMPT,
        assistant_model=llama,
        max_new_tokens=12,
        do_sample=False,
        num_assistant_tokens=3,
        assistant_confidence_threshold=0,
    )
    call = instrumented.only
    assert call.ended.output_tokens == 12
    assert 1 < len(call.steps) < 12
    assert call.steps[1].computed[0].context == 4 + call.begin.probe.__self__._loops[0].steps.drafts[0][1]


def test_prompt_lookup(instrumented, llama):
    """Drafts looked up in the prompt are counted like an assistant's."""
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    llama.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=6, do_sample=False, eos_token_id=2)
    call = instrumented.only
    assert call.ended.output_tokens == 6
    assert call.work[0] == 8
    assert call.work[2] >= len(call.steps) - 1


def test_lanes(instrumented, llama):
    """Every call has a lane of its own, whose steps are numbered from 1."""
    for _ in range(3):
        llama.generate(PROMPT, max_new_tokens=2)
    assert len({(step.engine, step.lane) for step in instrumented.meter.steps}) == 3
    assert [step.seq for step in instrumented.meter.steps] == [1, 2] * 3


def test_concurrent_lanes(instrumented, llama):
    """Two calls at once stand on two lanes."""

    class Inside(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            worker = threading.Thread(target=llama.generate, args=(PROMPT,), kwargs={"max_new_tokens": 2})
            worker.start()
            worker.join()
            return torch.ones(input_ids.shape[0], dtype=torch.bool)

    llama.generate(PROMPT, max_new_tokens=5, stopping_criteria=transformers.StoppingCriteriaList([Inside()]))
    outer, inner = instrumented.made
    assert outer.steps[0].lane != inner.steps[0].lane


def test_probe_hands_over_once(instrumented, llama):
    """A probe in the middle hands over what is done; the end hands over the rest; nothing comes twice."""
    said = []

    class Probe(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            said.append((instrumented.only.begin.probe(), len(instrumented.meter.steps)))
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    llama.generate(PROMPT, max_new_tokens=5, stopping_criteria=transformers.StoppingCriteriaList([Probe()]))
    call = instrumented.only
    assert said == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]
    assert [step.seq for step in call.steps] == [1, 2, 3, 4, 5]
    assert call.work == (4, 4, 0)
    assert call.begin.probe() == 5
    assert len(call.steps) == 5


def steps_of(given, **options):
    return Steps(0, request_of(None, Arguments(None, (given,), options)))


def test_probe_does_not_wait(calls):
    """A probe during another hand-over says the tokens and hands nothing over."""
    steps = steps_of(PROMPT)
    steps.report_to(calls.meter, EngineId("g", 0), Lane(0), (), ("a",))
    steps.ticks.extend([10, 20, 30])
    with steps._lane.lock:
        assert steps.probe() == 2
    assert calls.meter.steps == []
    steps.close()
    steps.probe()
    assert len(calls.meter.steps) == 2


def test_nothing_after_the_last_probe(calls):
    """The probe that follows the close hands over what is left; after it no step comes, whoever asks."""
    steps = steps_of(PROMPT)
    steps.report_to(calls.meter, EngineId("g", 0), Lane(0), (), ("a",))
    steps.ticks.extend([10, 20])
    steps.close()
    assert calls.meter.steps == []
    steps.probe()
    steps.ticks.append(30)
    steps.probe()
    assert len(calls.meter.steps) == 1


def test_two_threads_hand_over_once(calls):
    """However two threads interleave, every step comes once and in order."""
    steps = steps_of(PROMPT)
    steps.report_to(calls.meter, EngineId("g", 0), Lane(0), (), ("a",))
    steps.ticks.append(0)
    stop = threading.Event()

    def probing():
        while not stop.is_set():
            steps.probe()

    prober = threading.Thread(target=probing)
    prober.start()
    for tick in range(1, 2000):
        steps.ticks.append(tick)
    stop.set()
    prober.join()
    steps.close()
    steps.probe()
    assert [step.seq for step in calls.meter.steps] == list(range(1, 2000))


def test_unknown_prompt(calls):
    """Where the prompt's tokens are not known, no step is invented."""
    steps = steps_of(None, input_features=torch.zeros(1, 80, 30))
    steps.report_to(calls.meter, EngineId("g", 0), Lane(0), (), ("a",))
    steps.ticks.extend([10, 20])
    assert steps.probe() == 1
    steps.close()
    steps.probe()
    assert calls.meter.steps == []


def test_counts_that_arrive_late(calls):
    """Counts still on the accelerator are read with the first step, and then handed over."""
    steps = steps_of(PROMPT)
    steps.prompt.pending = (torch.tensor([4]), torch.tensor([3]))
    steps.prompt.tokens = steps.prompt.computed = None
    steps.prompt.early = True
    steps.report_to(calls.meter, EngineId("g", 0), Lane(0), (), ("a",))
    steps.ticks.append(10)
    steps.probe()
    assert steps.prompt.tokens is None
    steps.ticks.append(20)
    steps.probe()
    assert [(step.prefill) for step in calls.meter.steps] == [(Prefill("a", 3, 1),)]
