"""Continuous batching: one call per request, exact counts, exactly one end, whatever happens to the request or the loop."""

from __future__ import annotations

import asyncio
import gc
import itertools
import queue
import threading
from contextvars import ContextVar

import pytest
import transformers
from transformers.generation.continuous_batching import continuous_api

from melodi_otel.instrumentation.transformers import TransformersInstrumentor
from melodi_otel.testing.whole_steps import WholeSteps as Lane

SIZED = getattr(transformers, "ContinuousBatchingConfig", None)
five = pytest.mark.skipif(SIZED is None, reason="continuous batching of 4.57 has no such thing")
WAIT_S = 30


def results(manager, count):
    """The next ``count`` complete results by id."""
    found = {}
    while len(found) < count:
        result = manager.get_result(timeout=WAIT_S)
        assert result is not None
        if result.status.name in ("FINISHED", "FAILED"):
            found[result.request_id] = result
    return found


def computed(calls):
    """Per step (tokens computed, sum of their positions), and per id the tokens computed, by what the meter was told."""
    lanes, steps, work = {}, [], {}
    for step in calls.meter.steps:
        lane = lanes.setdefault(step.lane, Lane())
        assert lane.follow(step.seq)
        rows = lane.advance(step.decode, step.prefill, step.computed, step.joined, step.left)
        decoding = [row for row in rows if row.decode]
        assert (len(decoding), sum(row.context for row in decoding)) == step.decode
        steps.append(
            (
                sum(row.prefill + row.decode for row in rows),
                sum(row.context + at for row in rows for at in range(row.prefill + row.decode)),
            )
        )
        for row in rows:
            prefill, decode = work.get(row.id, (0, 0))
            work[row.id] = prefill + row.prefill, decode + row.decode
    return steps, work


WASTED = 0 if SIZED else 1
"""Tokens that 4.57 computes for a request beyond the last that it keeps."""


def test_sixteen_requests(instrumented, served):
    """16 requests of different lengths in one manager: each a call with its own tokens; steps are what was computed."""
    asked = {}
    with served.running(tokens=32) as manager:
        for index in range(16):
            prompt = list(range(10 + index, 10 + index + 1 + 3 * index))
            asked[manager.add_request(prompt, max_new_tokens=1 + index % 5)] = len(prompt), 1 + index % 5
        found = results(manager, 16)
    steps, work = computed(instrumented)
    assert steps == served.passes
    assert len(instrumented.made) == 16
    for call, (name, (prompt, output)) in zip(instrumented.made, asked.items(), strict=True):
        end = call.ended
        assert len(found[name].generated_tokens) == output
        assert (call.begin.prompt_tokens, end.prompt_tokens, end.output_tokens) == (prompt, prompt, output)
        assert (end.outcome, end.finish_reasons, end.cached_tokens) == ("length", ("length",), 0)
        assert call.begin.start_ns < end.first_token_ns < end.end_ns
        assert work[call.children[0]] == (prompt, output - 1 + WASTED)
    assert {step.lane for step in instrumented.meter.steps} == {0}


def test_times(instrumented, served):
    """Steps follow each other without a gap while there is work; the first ends with the first token.

    The last one ends before the request does.
    """
    with served.running() as manager:
        manager.add_request([5, 6, 7], max_new_tokens=4)
        results(manager, 1)
    steps, end = instrumented.meter.steps, instrumented.only.ended
    assert steps[0].t0_ns > instrumented.only.begin.start_ns
    assert steps[0].t1_ns == end.first_token_ns
    assert all(before.t1_ns == after.t0_ns for before, after in itertools.pairwise(steps))
    assert steps[-1].t1_ns < end.end_ns
    assert instrumented.only.steps_at_end == len(steps)


def test_what_was_asked_for(instrumented, served):
    """``gen_ai.request.*`` are those of generate(): the manager's settings and the request's own."""
    settings = {"do_sample": True, "temperature": 0.5, "top_k": 7}
    with served.running(settings=settings) as manager:
        manager.add_request([5, 6, 7], max_new_tokens=2)
        results(manager, 1)
    begin = instrumented.only.begin
    assert begin.attributes == {
        "gen_ai.request.max_tokens": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": 7.0,
    }
    assert (begin.provider, begin.model, begin.operation) == ("transformers", "LlamaForCausalLM", "text_completion")
    assert begin.engine == instrumented.meter.engines[0][0]
    assert (begin.devices, begin.thread, begin.probe) == ((), None, None)


def test_end_of_sequence(instrumented, served):
    """A request that ends with its end token has stopped, and the token counts."""
    with served.running() as manager:
        manager.add_request([5, 6, 7, 8], max_new_tokens=5)
        third = next(iter(results(manager, 1).values())).generated_tokens[2]
    with served.running(settings={"eos_token_id": third}) as manager:
        manager.add_request([5, 6, 7, 8], max_new_tokens=5)
        results(manager, 1)
    end = instrumented.made[1].ended
    assert (end.outcome, end.finish_reasons, end.output_tokens) == ("stop", ("stop",), 3)


def test_context_of_the_caller(instrumented, served, monkeypatch):
    """A request begins in the context of whoever adds it, though another thread computes it."""
    who, seen = ContextVar("who", default=None), []
    begin = instrumented.begin
    monkeypatch.setattr(instrumented, "begin", lambda what: seen.append(who.get()) or begin(what))
    with served.running() as manager:
        for name in ("a", "b"):
            token = who.set(name)
            manager.add_request([5, 6, 7], max_new_tokens=2)
            who.reset(token)
        results(manager, 2)
    assert seen == ["a", "b"]


def test_generate_batch(instrumented, served):
    """generate_batch() is one call per prompt."""
    prompts = [[5, 6, 7], [9, 8], [4, 4, 4, 4]]
    if SIZED is not None:
        served.model.generate_batch(prompts, continuous_batching_config=served.sized(), max_new_tokens=3)
    else:
        settings = transformers.GenerationConfig(do_sample=False, eos_token_id=-1)
        settings.num_blocks, settings.max_batch_tokens = 16, 64
        served.model.generate_batch(prompts, settings, progress_bar=False, max_new_tokens=3)
    assert sorted((call.ended.prompt_tokens, call.ended.output_tokens) for call in instrumented.made) == [
        (2, 3),
        (3, 3),
        (4, 3),
    ]


def test_long_prompt(instrumented, served):
    """A prompt longer than a batch is computed in chunks that are its prefill; the last one gives the first token."""
    with served.running(tokens=16) as manager:
        manager.add_request(list(range(5, 55)), max_new_tokens=2)
        results(manager, 1)
    steps, work = computed(instrumented)
    assert steps == served.passes
    assert work[instrumented.only.children[0]] == (50, 1 + WASTED)
    chunks = [step for step in instrumented.meter.steps if step.prefill]
    assert [step.prefill[0].context for step in chunks] == [0, 16, 32, 48]
    assert instrumented.only.ended.first_token_ns == chunks[-1].t1_ns


def test_streaming(instrumented, served):
    """A streamed request is one call that says so, and ends with its last token."""
    with served.running(streaming=True) as manager:
        options = {"streaming": True} if SIZED else {}
        name = manager.add_request([5, 6, 7], max_new_tokens=4, **options)
        ends = []
        for _ in manager.request_id_iter(name):
            ends.append(len(instrumented.only.ends))
    assert ends[0] in (0, 1)
    assert instrumented.only.begin.attributes["gen_ai.request.stream"] is True
    assert (instrumented.only.ended.outcome, instrumented.only.ended.output_tokens) == ("length", 4)


@five
def test_handler(instrumented, served):
    """Results that go to a handler end their requests too."""

    async def ask(manager):
        done = asyncio.Event()
        name = manager.add_request([5, 6, 7], request_id="mine", max_new_tokens=3)
        manager.register_result_handler(name, lambda result: done.set())
        await asyncio.wait_for(done.wait(), WAIT_S)

    with served.running() as manager:
        asyncio.run(ask(manager))
    assert instrumented.only.ended.output_tokens == 3


def test_cancelled_while_it_runs(instrumented, served):
    """A cancelled request is never delivered: it ends as aborted with the tokens that it has."""
    reached, go = threading.Event(), threading.Event()

    def hold(step):
        if step == 4:
            reached.set()
            assert go.wait(WAIT_S)

    served.before = hold
    with served.running() as manager:
        name = manager.add_request([5, 6, 7], max_new_tokens=50)
        assert reached.wait(WAIT_S)
        manager.cancel_request(name)
        go.set()
    end = instrumented.only.ended
    assert (end.outcome, end.output_tokens, end.finish_reasons, end.error) == ("abort", 5, (), None)
    steps, _ = computed(instrumented)
    assert steps == served.passes
    assert len(steps) == 5


def test_cancelled_before_it_runs(instrumented, served):
    """A request that is cancelled while it waits has no tokens; the others go on."""
    manager = served.manager()
    first, second = (manager.add_request([5, 6, 7], max_new_tokens=3) for _ in range(2))
    if SIZED is not None:
        manager.cancel_request(first)
    else:  # 4.57 forgets a cancellation that comes before the loop
        served.before = lambda step: manager.cancel_request(first) if step == 0 else None
    manager.start()
    while not instrumented.made[1].ends:
        assert manager.get_result(timeout=WAIT_S).request_id == second
    manager.stop(block=True, timeout=WAIT_S)
    lost, kept = (call.ended for call in instrumented.made)
    assert (lost.outcome, lost.output_tokens) == ("abort", 0 if SIZED else 1)
    assert (kept.outcome, kept.output_tokens) == ("length", 3)


def test_failed_pass(instrumented, served, caplog):
    """A forward pass that fails is the end of the loop: its requests are errors with what they had."""
    boom = ValueError("boom")

    def fail(step):
        if step == 3:
            raise boom

    served.before = fail
    manager = served.manager()
    for _ in range(2):
        manager.add_request([5, 6, 7], max_new_tokens=9)
    manager.start()
    found = results(manager, 2)
    manager.stop(block=True, timeout=WAIT_S)
    assert all("boom" in result.error for result in found.values())
    assert [(call.ended.outcome, call.ended.output_tokens, call.ended.error) for call in instrumented.made] == [
        ("error", 3, boom)
    ] * 2
    assert not [record for record in caplog.records if "instrumentation" in record.message]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_loop_that_dies(instrumented, served):
    """Not even a loop that is torn down leaves a request open."""

    def exit_loop(step):
        if step == 2:
            raise KeyboardInterrupt

    served.before = exit_loop
    manager = served.manager()
    manager.add_request([5, 6, 7], max_new_tokens=9)
    manager.start()
    manager._generation_thread.join(WAIT_S)
    end = instrumented.only.ended
    assert (end.outcome, end.output_tokens, type(end.error)) == ("abort", 2, KeyboardInterrupt)
    manager.stop(block=True, timeout=WAIT_S)


@five
def test_stopped_with_requests(instrumented, served):
    """A manager that is stopped at once fails what is left: waiting and running."""
    reached, go = threading.Event(), threading.Event()

    def hold(step):
        if step == 2:
            reached.set()
            assert go.wait(WAIT_S)

    served.before = hold
    manager = served.manager(max_requests_per_batch=1)
    for _ in range(3):
        manager.add_request([5, 6, 7], max_new_tokens=50)
    manager.start()
    assert reached.wait(WAIT_S)
    manager.stop(block=False, hard_stop=True, keep_for_next_session=True)
    go.set()
    manager._generation_thread.join(WAIT_S)
    assert [(call.ended.outcome, call.ended.output_tokens) for call in instrumented.made] == [
        ("error", 3),
        ("error", 0),
        ("error", 0),
    ]
    assert all(isinstance(call.ended.error, RuntimeError) for call in instrumented.made)
    assert manager.add_request([5, 6]) is None  # refused: no request
    assert len(instrumented.made) == 3


def test_never_started(instrumented, served):
    """Requests of a manager that is thrown away without having run end when somebody looks next."""
    manager = served.manager()
    manager.add_request([5, 6, 7], max_new_tokens=9)
    del manager
    gc.collect()
    with served.running() as manager:
        manager.add_request([5, 6], max_new_tokens=2)
        results(manager, 1)
    lost, kept = instrumented.made
    assert (lost.ended.outcome, lost.ended.output_tokens) == ("abort", 0)
    assert kept.ended.output_tokens == 2


def test_full_queue(instrumented, served, monkeypatch):
    """A request that the queue does not take is an error, and the program gets its exception."""
    manager = served.manager()
    full = queue.Full()

    def put(*args, **kwargs):
        raise full

    monkeypatch.setattr(manager.input_queue, "put", put)
    with pytest.raises(queue.Full):
        manager.add_request([5, 6, 7])
    assert (instrumented.only.ended.outcome, instrumented.only.ended.error) == ("error", full)


@five
def test_refused_by_the_loop(instrumented, served):
    """A request that the loop cannot take is an error of its own; the others go on."""
    with served.running(per_request_processors=True) as manager:
        manager.add_request([5, 6, 7], max_new_tokens=2, nonsense=1)
        manager.add_request([5, 6, 7], max_new_tokens=2)
        found = results(manager, 2)
    assert [found[f"req_{index}"].error is None for index in range(2)] == [False, True]
    assert [(call.ended.outcome, call.ended.output_tokens) for call in instrumented.made] == [
        ("error", 0),
        ("length", 2),
    ]


@five
def test_several_sequences(instrumented, served):
    """Sequences that are forked off a request are its own: their tokens are summed, the prompt is computed once."""
    with served.running(settings={"num_return_sequences": 3, "do_sample": True}) as manager:
        manager.add_request([5, 6, 7, 8, 9], max_new_tokens=4)
        results(manager, 3)
    call = instrumented.only
    steps, work = computed(instrumented)
    assert steps == served.passes
    assert call.begin.attributes["gen_ai.request.choice.count"] == 3
    assert (call.ended.prompt_tokens, call.ended.output_tokens) == (5, 12)
    assert call.ended.finish_reasons == ("length",) * 3
    assert set(work) == set(call.children)
    assert len(call.children) == 3
    # the last position of the prompt gives the first token of each
    assert [sum(kind) for kind in zip(*work.values(), strict=True)] == [4 + 3, 3 * 3]


@five
def test_shared_prefix(instrumented, served):
    """Prompt tokens whose keys another request has computed are cached, and not among those computed."""
    with served.running(page=16) as manager:
        for _ in range(2):
            manager.add_request(list(range(5, 45)), max_new_tokens=2)
            results(manager, 1)
    first, second = instrumented.made
    _, work = computed(instrumented)
    assert (first.ended.cached_tokens, second.ended.cached_tokens) == (0, 32)
    assert (work[first.children[0]], work[second.children[0]]) == ((40, 1), (8, 1))
    assert second.ended.prompt_tokens == 40


@five
def test_preempted(instrumented, served):
    """What is computed again after the cache was full is prefill of the request that lost its place."""
    with served.running(blocks=4, page=16, tokens=64, allow_block_sharing=False, safety_margin=0.0) as manager:
        for _ in range(3):
            manager.add_request([5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], max_new_tokens=20)
        found = results(manager, 3)
    steps, work = computed(instrumented)
    assert steps == served.passes
    assert {len(result.generated_tokens) for result in found.values()} == {20}
    for call in instrumented.made:
        assert (call.ended.prompt_tokens, call.ended.output_tokens, call.ended.outcome) == (11, 20, "length")
    prefill = sum(row[0] for row in work.values())
    assert prefill > 3 * 11
    assert sum(map(sum, work.values())) == sum(tokens for tokens, _ in served.passes)


@five
def test_pause(instrumented, served):
    """A loop that is held up by its program does not step meanwhile."""
    with served.running() as manager:
        manager.add_request([5, 6, 7], max_new_tokens=400)
        with manager.pause():
            begun = instrumented.now_ns()
            for _ in range(50):
                over = instrumented.now_ns()
        results(manager, 1)
    assert not [step for step in instrumented.meter.steps if step.t0_ns < begun and step.t1_ns > over]


def test_one_lane_after_another(instrumented, served):
    """Managers that follow each other go on with the same lane, one beside another has its own."""
    for _ in range(2):
        with served.running() as manager:
            manager.add_request([5, 6, 7], max_new_tokens=2)
            results(manager, 1)
    with served.running() as first, served.running() as second:
        for manager in (first, second):
            manager.add_request([5, 6, 7], max_new_tokens=2)
            results(manager, 1)
    steps, work = computed(instrumented)
    assert steps == served.passes
    assert len(work) == 4
    assert {step.lane for step in instrumented.meter.steps} == {0, 1}


def test_uninstrumented_in_flight(calls, served):
    """Uninstrumenting takes the entry back at once, the rest when the last request in flight has ended as it would have."""
    owners = (
        continuous_api.ContinuousBatchingManager,
        continuous_api.ContinuousBatchProcessor,
        continuous_api.RequestState,
    )
    before = [dict(vars(owner)) for owner in owners]
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    reached, go = threading.Event(), threading.Event()

    def hold(step):
        if step == 2:
            reached.set()
            assert go.wait(WAIT_S)

    served.before = hold
    with served.running() as manager:
        manager.add_request([5, 6, 7], max_new_tokens=6)
        assert reached.wait(WAIT_S)
        instrumentor.uninstrument()
        assert continuous_api.ContinuousBatchingManager.add_request is before[0]["add_request"]
        manager.add_request([9, 9], max_new_tokens=3)  # nobody's any more
        go.set()
        results(manager, 2)
        assert (calls.only.ended.outcome, calls.only.ended.output_tokens) == ("length", 6)
        assert [dict(vars(owner)) for owner in owners] == before


def test_instrumented_under_way(calls, served):
    """A loop that was running before is followed from the next request on."""
    with served.running() as manager:
        manager.add_request([5, 6, 7], max_new_tokens=2)
        results(manager, 1)
        instrumentor = TransformersInstrumentor(calls)
        instrumentor.instrument()
        try:
            manager.add_request([5, 6, 7, 8], max_new_tokens=3)
            results(manager, 1)
        finally:
            instrumentor.uninstrument()
    assert (calls.only.ended.prompt_tokens, calls.only.ended.output_tokens) == (4, 3)
    assert computed(calls)[0] == served.passes[-len(calls.meter.steps) :]


def test_instrumented_while_one_runs(calls, served):
    """What was running before has no call, but its part of each step is told, so it is nobody else's."""
    reached, go = threading.Event(), threading.Event()

    def hold(step):
        if step == 3:
            reached.set()
            assert go.wait(WAIT_S)

    served.before = hold
    instrumentor = TransformersInstrumentor(calls)
    with served.running() as manager:
        manager.add_request([5, 6, 7], max_new_tokens=20)
        assert reached.wait(WAIT_S)
        instrumentor.instrument()
        try:
            manager.add_request([5, 6, 7, 8], max_new_tokens=3)
            go.set()
            results(manager, 2)
        finally:
            instrumentor.uninstrument()
    assert calls.only.ended.output_tokens == 3
    steps, work = computed(calls)
    assert steps[0] == served.passes[4]
    assert set(work) == {calls.only.children[0], "batch0.req_0"}
    assert work[calls.only.children[0]] == (4, 2 + WASTED)


@pytest.mark.parametrize("broken", ["begin", "step", "now_ns"])
def test_failures_of_ours(calls, served, monkeypatch, caplog, broken):
    """Whatever of ours fails, the program gets its results."""

    def fail(*args, **kwargs):
        raise RuntimeError("ours")

    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    monkeypatch.setattr(calls.meter if broken == "step" else calls, broken, fail)
    try:
        with served.running() as manager:
            manager.add_request([5, 6, 7], max_new_tokens=3)
            assert len(next(iter(results(manager, 1).values())).generated_tokens) == 3
    finally:
        instrumentor.uninstrument()
    said = [record.levelname for record in caplog.records if "the program's own" in record.message]
    assert said.count("WARNING") == 1


def test_without_the_parts(calls, monkeypatch, caplog):
    """A version that lacks a part is left alone as a whole, with one warning."""
    before = vars(continuous_api.ContinuousBatchingManager)["add_request"]
    instrumentor = TransformersInstrumentor(calls)
    with monkeypatch.context() as patch:
        patch.delattr(continuous_api.ContinuousBatchProcessor, "update_batch")
        instrumentor.instrument()
        assert vars(continuous_api.ContinuousBatchingManager)["add_request"] is before
        instrumentor.uninstrument()
    assert [record.message for record in caplog.records] == [
        "continuous batching of this transformers cannot be instrumented"
    ]


def test_two_side_by_side(calls, served):
    """Two instrumentations see the same requests and steps; one that goes hears of nothing more."""
    other = type(calls)()
    first, second = TransformersInstrumentor(calls), TransformersInstrumentor(other)
    first.instrument()
    second.instrument()
    try:
        with served.running() as manager:
            for _ in range(2):
                manager.add_request([5, 6, 7], max_new_tokens=3)
                results(manager, 1)
                second.uninstrument()
    finally:
        second.uninstrument()
        first.uninstrument()
    assert [call.ended.output_tokens for call in calls.made] == [3, 3]
    assert other.only.ended.output_tokens == 3
    assert len(calls.meter.steps) == 2 * len(other.meter.steps)


def test_same_name_twice(instrumented, served):
    """Of two requests with one id the engine knows the newer one only; the older ends as aborted."""
    manager = served.manager()
    for tokens in (5, 2):
        manager.add_request([5, 6, 7], request_id="mine", max_new_tokens=tokens)
    older, newer = instrumented.made
    assert (older.ended.outcome, older.ended.output_tokens) == ("abort", 0)
    assert newer.ends == []
