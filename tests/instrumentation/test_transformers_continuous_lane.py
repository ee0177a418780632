"""The lane of a loop: batches in, deltas out. With two batches in flight, as only an accelerator has them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from melodi_otel.attribution.meter import Decode, EngineId, Joined, Prefill
from melodi_otel.instrumentation.transformers.continuous_steps import Lane, Scheduled
from melodi_otel.testing.whole_steps import WholeSteps

ENGINE = EngineId("g", 0)


class Row:
    def __init__(self, child):
        self.child, self.reached, self.state, self.first_ns = child, 0, None, None

    def scheduled(self, context, state, gives_token):
        self.state = state
        return gives_token and self.first_ns is None

    def first_token(self, t_ns):
        self.first_ns = t_ns


class Loop:
    """Sequences, a lane, and the steps that a meter was told."""

    def __init__(self):
        self.steps, self.rows, self.states, self.numbers = [], {}, {}, []
        self.lane = Lane(3)
        self.lane.report_to(self, ENGINE, ("GPU-0",))
        self.whole = WholeSteps()

    def step(self, engine, lane, seq, t0_ns, t1_ns, devices, **work):
        assert (engine, lane, devices) == (ENGINE, 3, ("GPU-0",))
        self.numbers.append(seq)
        self.steps.append((t0_ns, t1_ns, work))

    def find(self, name):
        return self.rows.setdefault(name, Row(f"r.{name}"))

    def state(self, name, prompt, *, at=0):
        self.states[name] = state = SimpleNamespace(request_id=name, initial_tokens=[1] * prompt, position_offset=at)
        return state

    def launch(self, **tokens):
        """Schedule so many tokens per name; contexts advance with it, as the engine's do."""
        batch = []
        for name, count in tokens.items():
            state = self.states[name]
            state.position_offset += count
            batch.append(Scheduled(state, count, state.position_offset >= len(state.initial_tokens)))
        self.lane.launch(batch, self.find)

    @property
    def work(self):
        """All steps as whole work: id, prefill, decode, context."""
        whole = WholeSteps()
        return [
            sorted(tuple(row) for row in whole.advance(w["decode"], w["prefill"], (), w["joined"], w["left"]))
            for _, _, w in self.steps
        ]


@pytest.fixture
def loop():
    return Loop()


def test_deltas(loop):
    """A prompt in two chunks, then a member; a second one joins, the first leaves.

    ====  ==============  ==============
    step  a (prompt 5)    b (prompt 2)
    ====  ==============  ==============
    1     4 after 0
    2     1 after 4       2 after 0
    3     1 after 5       1 after 2
    4     1 after 6       1 after 3
    5                     1 after 4
    ====  ==============  ==============
    """
    loop.state("a", 5)
    loop.state("b", 2)
    for at, tokens in enumerate(({"a": 4}, {"a": 1, "b": 2}, {"a": 1, "b": 1}, {"a": 1, "b": 1}, {"b": 1})):
        loop.lane.begin(10 * at)
        loop.launch(**tokens)
        loop.lane.land(10 * at + 8)
        if at == 3:
            loop.lane.leave(loop.rows["a"])
    assert [step[2] for step in loop.steps] == [
        {"decode": Decode(0, 0), "prefill": [Prefill("r.a", 4, 0)], "joined": [], "left": []},
        {"decode": Decode(0, 0), "prefill": [Prefill("r.a", 1, 4), Prefill("r.b", 2, 0)], "joined": [], "left": []},
        {"decode": Decode(2, 7), "prefill": [], "joined": [Joined("r.a", 5), Joined("r.b", 2)], "left": []},
        {"decode": Decode(2, 9), "prefill": (), "joined": (), "left": ()},
        {"decode": Decode(1, 4), "prefill": [], "joined": [], "left": ["r.a"]},
    ]
    assert [(t0, t1) for t0, t1, _ in loop.steps] == [(0, 8), (8, 18), (18, 28), (28, 38), (38, 48)]
    assert (loop.rows["a"].first_ns, loop.rows["b"].first_ns) == (18, 18)


def test_left_out_and_back(loop):
    """A member that is not scheduled leaves, and joins again where it was."""
    loop.state("a", 2)
    loop.state("b", 2)
    for tokens in ({"a": 2, "b": 2}, {"a": 1, "b": 1}, {"b": 1}, {"a": 1, "b": 1}):
        loop.launch(**tokens)
        loop.lane.land(1)
    assert loop.work == [
        [("r.a", 2, 0, 0), ("r.b", 2, 0, 0)],
        [("r.a", 0, 1, 2), ("r.b", 0, 1, 2)],
        [("r.b", 0, 1, 3)],
        [("r.a", 0, 1, 3), ("r.b", 0, 1, 4)],
    ]


def test_computed_again(loop):
    """After a reset the prompt and what was generated are prefill; so is a position that is rolled back."""
    loop.state("a", 3)
    for tokens in (3, 1, 1, 1):
        loop.launch(a=tokens)
        loop.lane.land(1)
    loop.states["a"].position_offset -= 1  # restored from the host, its last position once more
    loop.launch(a=1)
    loop.lane.land(1)
    loop.launch(a=1)
    loop.lane.land(1)
    loop.state("a", 8)  # reset: admitted again with what it had
    loop.launch(a=8)
    loop.lane.land(1)
    loop.launch(a=1)
    loop.lane.land(1)
    assert [row for step in loop.work for row in step] == [
        ("r.a", 3, 0, 0),
        ("r.a", 0, 1, 3),
        ("r.a", 0, 1, 4),
        ("r.a", 0, 1, 5),
        ("r.a", 1, 0, 5),
        ("r.a", 0, 1, 6),
        ("r.a", 8, 0, 0),
        ("r.a", 0, 1, 8),
    ]


def test_last_prompt_token_alone(loop):
    """One token is prefill while it is the prompt's, and decode after it."""
    loop.state("a", 1)
    loop.launch(a=1)
    loop.lane.land(1)
    loop.launch(a=1)
    loop.lane.land(2)
    assert loop.work == [[("r.a", 1, 0, 0)], [("r.a", 0, 1, 1)]]


def test_idle_between(loop):
    """Time in which the loop found nothing is in no step."""
    loop.state("a", 2)
    loop.lane.begin(0)
    loop.launch(a=2)
    loop.lane.land(5)
    loop.lane.begin(6)
    loop.lane.idle(7, lambda: True)
    loop.lane.begin(100)
    loop.launch(a=1)
    loop.lane.land(104)
    assert [(t0, t1) for t0, t1, _ in loop.steps] == [(0, 5), (100, 104)]


def test_two_in_flight(loop):
    """With two batches in flight a step lasts from update to update, and the deltas keep the order of the batches."""
    loop.state("a", 2)
    loop.lane.begin(0)
    loop.launch(a=2)
    for now_ns in (10, 20, 30):
        loop.lane.begin(now_ns - 5)
        loop.launch(a=1)
        loop.lane.land(now_ns)
    loop.lane.land(40)  # the last one, when the loop ends
    assert [(t0, t1) for t0, t1, _ in loop.steps] == [(0, 10), (10, 20), (20, 30), (30, 40)]
    assert [row[3] for step in loop.work for row in step] == [0, 2, 3, 4]


def test_idle_with_one_in_flight(loop):
    """A batch whose result nobody waits for ends when the device is seen to be done, and not later than its like."""
    loop.state("a", 2)
    loop.lane.begin(0)
    loop.launch(a=2)
    loop.launch(a=1)
    loop.lane.land(10)
    loop.lane.idle(12, lambda: False)
    loop.lane.idle(112, lambda: True)
    loop.lane.idle(212, lambda: True)
    assert [(t0, t1) for t0, t1, _ in loop.steps] == [(0, 10), (10, 20)]
    loop.state("b", 4)
    loop.lane.begin(1000)
    loop.launch(b=4)
    loop.lane.land(1001)  # the update of the batch that is over
    loop.lane.land(1009)
    assert [(t0, t1) for t0, t1, _ in loop.steps[2:]] == [(1000, 1009)]
    assert loop.work[2] == [("r.b", 4, 0, 0)]


def test_next_loop(loop):
    """Whoever goes on with the lane finds nobody in it."""
    loop.state("a", 2)
    loop.launch(a=2)
    loop.lane.land(5)
    loop.launch(a=1)
    loop.lane.land(6)
    loop.launch(a=1)  # lost with the loop
    loop.lane.clear()
    loop.rows = {"a": Row("s.a")}
    loop.state("a", 2)
    loop.lane.begin(50)
    loop.launch(a=2)
    loop.lane.land(60)
    assert loop.steps[-1][:2] == (50, 60)
    assert loop.steps[-1][2]["left"] == ["r.a"]
    assert loop.work[-1] == [("s.a", 2, 0, 0)]


def test_lost_step(loop):
    """After a failure of ours the next step sends the whole set, and the gap in the numbers says so."""
    for name in "ab":
        loop.state(name, 2)
    for tokens in (2, 1, 1):
        loop.launch(a=tokens, b=tokens)
        loop.lane.land(1)
    loop.lane.lost()
    loop.launch(a=1, b=1)
    loop.lane.land(9)
    assert loop.numbers == [1, 2, 3, 5]
    assert loop.steps[-1][2] == {
        "decode": Decode(2, 8),
        "prefill": [],
        "joined": [Joined("r.a", 4), Joined("r.b", 4)],
        "left": [],
    }
