"""A scheduler's outputs become the work of steps: in delta form, and the deltas add up to the truth."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from melodi_otel.attribution.meter import Decode, Joined, Prefill
from melodi_otel.instrumentation.vllm.work import WorkReader
from melodi_otel.testing.vllm_scheduler import FakeScheduler
from melodi_otel.testing.whole_steps import WholeSteps as Lane


@pytest.fixture
def scheduler() -> FakeScheduler:
    return FakeScheduler()


def reader_of(scheduler: FakeScheduler) -> WorkReader:
    return WorkReader(lambda name: one.num_tokens if (one := scheduler.requests.get(name)) else None)


def step(scheduler: FakeScheduler, reader: WorkReader, rows: dict[str, tuple[int, int]], **accepted: int) -> Any:
    output, _ = scheduler.plan(rows)
    work = reader.read(output)
    scheduler.computed(rows, accepted)
    return work


def test_a_prompt_then_tokens(scheduler: FakeScheduler) -> None:
    """A prompt is prefill; the first token behind it joins the decode set; later steps say only how many and how far."""
    reader = reader_of(scheduler)
    scheduler.admit("a", 10)
    assert step(scheduler, reader, {"a": (10, 0)}) == (Decode(0, 0), [Prefill("a", 10, 0)], [], [], [])
    assert step(scheduler, reader, {"a": (1, 0)}) == (Decode(1, 10), [], [], [Joined("a", 10)], [])
    assert step(scheduler, reader, {"a": (1, 0)}) == (Decode(1, 11), (), (), (), ())


def test_chunks_and_the_cache(scheduler: FakeScheduler) -> None:
    """Chunks of a prompt are prefill with what is in the cache before them, also a last one of a single token."""
    reader = reader_of(scheduler)
    scheduler.admit("a", 101, cached=36)
    found = [step(scheduler, reader, {"a": (tokens, 0)}) for tokens in (64, 1)]
    assert [work.prefill for work in found] == [[Prefill("a", 64, 36)], [Prefill("a", 1, 100)]]
    assert step(scheduler, reader, {"a": (1, 0)}).joined == [Joined("a", 101)]


def test_who_is_not_scheduled_has_left(scheduler: FakeScheduler) -> None:
    """A member that sits out a step leaves, and joins again with the context that it has."""
    reader = reader_of(scheduler)
    for name in "ab":
        scheduler.admit(name, 5)
    step(scheduler, reader, {"a": (5, 0), "b": (5, 0)})
    step(scheduler, reader, {"a": (1, 0), "b": (1, 0)})
    assert step(scheduler, reader, {"a": (1, 0)}) == (Decode(1, 6), [], [], [], ["b"])
    assert step(scheduler, reader, {"a": (1, 0), "b": (1, 0)}).joined == [Joined("b", 6)]


def test_drafts(scheduler: FakeScheduler) -> None:
    """A row with drafts stands outside the set, with all tokens that it computes; what is rejected is not context."""
    reader = reader_of(scheduler)
    scheduler.admit("a", 8)
    step(scheduler, reader, {"a": (8, 0)})
    assert step(scheduler, reader, {"a": (4, 3)}, a=1).computed == [Prefill("a", 4, 8)]
    assert step(scheduler, reader, {"a": (4, 3)}, a=3).computed == [Prefill("a", 4, 10)]
    assert step(scheduler, reader, {"a": (1, 0)}).joined == [Joined("a", 14)]


def test_recompute_is_prefill(scheduler: FakeScheduler) -> None:
    """After a preemption what it had produced is computed again with its prompt, and is prefill up to the last token."""
    reader = reader_of(scheduler)
    scheduler.admit("a", 10)
    for tokens in (10, 1, 1, 1):
        step(scheduler, reader, {"a": (tokens, 0)})
    scheduler.preempt("a")
    assert step(scheduler, reader, {"a": (8, 0)}).prefill == [Prefill("a", 8, 0)]
    assert step(scheduler, reader, {"a": (6, 0)}).prefill == [Prefill("a", 6, 8)]
    assert step(scheduler, reader, {"a": (1, 0)}).joined == [Joined("a", 14)]


def test_nothing_scheduled(scheduler: FakeScheduler) -> None:
    """A step that computes nothing is none, and what is finished meanwhile is forgotten."""
    reader = reader_of(scheduler)
    scheduler.admit("a", 3)
    step(scheduler, reader, {"a": (3, 0)})
    scheduler.finish("a")
    assert reader.read(scheduler.plan({})[0]) is None
    assert reader.held() == 0


def test_an_id_that_comes_again_is_another(scheduler: FakeScheduler) -> None:
    """A caller may use an id twice: the second request's prompt is a prompt."""
    reader = reader_of(scheduler)
    scheduler.admit("a", 4)
    step(scheduler, reader, {"a": (4, 0)})
    step(scheduler, reader, {"a": (1, 0)})
    scheduler.finish("a")
    scheduler.admit("a", 9)
    work = step(scheduler, reader, {"a": (9, 0)})
    assert (work.prefill, work.left, work.decode) == ([Prefill("a", 9, 0)], ["a"], Decode(0, 0))


def test_what_is_no_scheduler_output() -> None:
    """It raises: the caller stops reading rather than telling something made up."""
    with pytest.raises(AttributeError):
        WorkReader(lambda _: None).read(SimpleNamespace(num_scheduled_tokens={"a": 1}))


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_deltas_add_up_to_the_truth(seed: int) -> None:
    """Whatever is admitted, chunked, drafted, preempted, left out and finished: the meter's rows are the scheduler's."""
    draw = random.Random(seed)
    scheduler = FakeScheduler()
    reader, lane = reader_of(scheduler), Lane()
    made = 0
    for _ in range(draw.randint(1, 40)):
        for _ in range(draw.randint(0, 2)):
            prompt = draw.randint(1, 12)
            scheduler.admit(f"r{made}", prompt, cached=draw.randint(0, prompt - 1))
            made += 1
        rows: dict[str, tuple[int, int]] = {}
        for name, one in list(scheduler.requests.items()):
            act = draw.choice(["run", "run", "run", "run", "wait", "preempt", "finish"])
            if act == "finish" and one.scheduled_before:
                scheduler.finish(name)
            elif act == "preempt" and one.computed > one.known:
                scheduler.preempt(name, cached=draw.randint(0, one.num_tokens - 1))
            elif act == "run":
                left = one.num_tokens - one.computed
                behind = one.computed >= one.known and left == 1
                drafts = draw.choice([0, 0, 1, 3]) if behind else 0
                rows[name] = (1 + drafts if behind else draw.randint(1, left), drafts)
        output, truth = scheduler.plan(rows)
        work = reader.read(output)
        if work is None:
            assert truth == []
            continue
        assert sorted(lane.advance(*work)) == sorted(truth)
        assert work.decode.n == len(lane.members)
        assert work.decode.context == sum(row.context for row in truth if row.id in lane.members)
        scheduler.computed(rows, {name: draw.randint(0, drafts) for name, (_, drafts) in rows.items() if drafts})
    for name in list(scheduler.requests):
        scheduler.finish(name)
    reader.read(scheduler.plan({})[0])
    assert reader.held() == 0
