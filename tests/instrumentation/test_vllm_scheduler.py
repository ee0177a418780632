"""A watched scheduler: each step once, with its work and the time that was its own, and never a harm to vLLM."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from melodi_otel.attribution.meter import Decode, EngineId, Joined, Prefill
from melodi_otel.instrumentation.vllm.complaints import Complaints
from melodi_otel.instrumentation.vllm.scheduler import WatchedScheduler
from melodi_otel.testing.clock import ManualClock
from melodi_otel.testing.vllm_scheduler import FakeScheduler

ENGINE = EngineId("g", 1000)
MS = 1_000_000
Rows = dict[str, tuple[int, int]]


class Core:
    """An engine core's use of a watched scheduler, by a manual clock that begins at 0 ms."""

    def __init__(self, meter: Any, lanes: int = 1) -> None:
        self.meter = meter
        self.scheduler = FakeScheduler()
        self.clock = ManualClock()
        self.began_ns = self.clock.monotonic_ns()
        self.watched = WatchedScheduler(
            self.scheduler,
            ENGINE,
            lambda: self.meter,
            lanes=lanes,
            now_ns=self.clock.monotonic_ns,
            complaints=Complaints(),
        )

    def schedule(self, rows: Rows) -> Any:
        output, _ = self.scheduler.plan(rows)
        self.scheduler.given.append(output)
        return self.scheduler.schedule()

    def update(self, output: Any, rows: Rows | None = None) -> Any:
        result = self.scheduler.update_from_output(output, "tokens")
        self.scheduler.computed(rows or {}, {})
        return result

    def step(self, rows: Rows, ms: float = 10.0) -> Any:
        output = self.schedule(rows)
        self.clock.advance(ms / 1e3)
        return self.update(output, rows)

    @property
    def times(self) -> list[tuple[float, float]]:
        """Of each step, in ms."""
        return [((s.t0_ns - self.began_ns) / MS, (s.t1_ns - self.began_ns) / MS) for s in self.meter.steps]


@pytest.fixture
def core(calls: Any) -> Core:
    return Core(calls.meter)


def test_a_step_is_told_when_it_is_over(core: Core) -> None:
    """From the call that schedules it to the one that hands its output in; with its number and its work."""
    core.scheduler.admit("a", 8)
    output = core.schedule({"a": (8, 0)})
    assert core.meter.steps == []
    core.clock.advance(0.01)
    core.update(output, {"a": (8, 0)})
    (step,) = core.meter.steps
    assert (step.engine, step.lane, step.seq, step.prefill) == (ENGINE, 0, 1, (Prefill("a", 8, 0),))
    assert core.times == [(0.0, 10.0)]


def test_results_are_untouched(core: Core) -> None:
    """What the scheduler returns passes as it is, and it is called once."""
    core.scheduler.admit("a", 8)
    output = core.schedule({"a": (8, 0)})
    assert core.update(output, {"a": (8, 0)}) == {0: (output, "tokens")}
    assert output.num_scheduled_tokens == {"a": 8}


def test_asynchronous_scheduling(core: Core) -> None:
    """The next step is scheduled while one runs: its time begins where that one ended, and no two overlap."""
    core.scheduler.admit("a", 8)
    first = core.schedule({"a": (8, 0)})
    core.scheduler.computed({"a": (8, 0)}, {})
    core.clock.advance(0.002)
    second = core.schedule({"a": (1, 0)})
    core.clock.advance(0.008)
    core.update(first)
    core.clock.advance(0.01)
    core.update(second)
    assert core.times == [(0.0, 10.0), (10.0, 20.0)]
    assert [step.seq for step in core.meter.steps] == [1, 2]


def test_a_pause_between_steps_is_nobodys(core: Core) -> None:
    """A step that is scheduled after a pause does not begin before that."""
    core.scheduler.admit("a", 8)
    core.step({"a": (8, 0)})
    core.clock.advance(0.5)
    core.step({"a": (1, 0)})
    assert core.times == [(0.0, 10.0), (510.0, 520.0)]


def test_batches_in_a_pipeline_are_lanes(calls: Any) -> None:
    """With two stages two batches run beside each other, each in a lane of its own with its own numbers and decode set."""
    core = Core(calls.meter, lanes=2)
    core.scheduler.admit("a", 8)
    core.scheduler.admit("b", 8)
    first, second = core.schedule({"a": (8, 0)}), core.schedule({"b": (8, 0)})
    core.clock.advance(0.01)
    core.update(first, {"a": (8, 0)})
    core.update(second, {"b": (8, 0)})
    assert [(step.lane, step.seq) for step in core.meter.steps] == [(0, 1), (1, 1)]
    assert core.times == [(0.0, 10.0), (0.0, 10.0)]


def test_nothing_scheduled_is_no_step(core: Core) -> None:
    """An iteration without work, as a data-parallel core does for its neighbours' sake, is no step: its joules are nobody's."""
    output = core.schedule({})
    core.clock.advance(0.01)
    core.update(output)
    assert core.meter.steps == []


def test_a_lost_step_leaves_a_gap(core: Core) -> None:
    """A step that is never handed in is missing in the numbers, and the next one tells the whole decode set again."""
    for name in "ab":
        core.scheduler.admit(name, 8)
    core.step({"a": (8, 0), "b": (8, 0)})
    core.step({"a": (1, 0), "b": (1, 0)})
    core.schedule({"a": (1, 0), "b": (1, 0)})
    core.scheduler.computed({"a": (1, 0), "b": (1, 0)}, {})
    core.step({"a": (1, 0), "b": (1, 0)})
    core.step({"a": (1, 0), "b": (1, 0)})
    assert [step.seq for step in core.meter.steps] == [1, 2, 4, 5]
    assert set(core.meter.steps[-1].joined) == {Joined("a", 11), Joined("b", 11)}


def test_drafts_are_computed(core: Core) -> None:
    """A row with drafts is no member of the decode set: all its tokens are computed, whatever is accepted."""
    core.scheduler.admit("a", 8)
    core.step({"a": (8, 0)})
    core.step({"a": (4, 3)})
    assert core.meter.steps[-1].computed == (Prefill("a", 4, 8),)
    assert core.meter.steps[-1].decode == Decode(0, 0)


def test_recompute_is_prefill(core: Core) -> None:
    """What a preempted request computes a second time is prefill, up to where it was."""
    core.scheduler.admit("a", 8)
    core.step({"a": (8, 0)})
    core.step({"a": (1, 0)})
    core.step({"a": (1, 0)})
    core.scheduler.preempt("a")
    core.step({"a": (11, 0)})
    assert core.meter.steps[-1].prefill == (Prefill("a", 11, 0),)


def test_nothing_is_kept_of_who_is_gone(core: Core) -> None:
    """A hundred requests that came, were aborted or ended, leave nothing behind."""
    for number in range(100):
        core.scheduler.admit(f"r{number}", 4)
        core.step({f"r{number}": (4, 0)})
        core.scheduler.finish(f"r{number}")
    core.schedule({})
    assert [lane.reader.held() for lane in core.watched._lanes] == [0]
    assert not core.watched._flying


@pytest.mark.parametrize("broken", [SimpleNamespace(), None, SimpleNamespace(num_scheduled_tokens=3)])
def test_an_output_of_another_kind(core: Core, broken: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Where an output cannot be read the scheduler goes on and is not watched any more, which is said once."""
    for _ in range(2):
        core.scheduler.given.append(broken)
        assert core.scheduler.schedule() is broken
        assert core.scheduler.update_from_output(broken, 1) == {0: (broken, 1)}
    assert core.meter.steps == []
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_a_meter_that_fails(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """A meter that raises costs the steps, never the engine."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(core.meter, "step", fail)
    core.scheduler.admit("a", 8)
    output = core.schedule({"a": (8, 0)})
    assert core.update(output) == {0: (output, "tokens")}


def test_the_schedulers_errors_are_its_own(core: Core) -> None:
    """What the scheduler raises comes through."""
    with pytest.raises(IndexError):
        core.scheduler.schedule()


def test_stop_leaves_the_scheduler_as_it_was(core: Core) -> None:
    """After the end its methods are those of its class again, and no step is told."""
    core.watched.stop()
    assert not {"schedule", "update_from_output"} & core.scheduler.__dict__.keys()
    core.scheduler.admit("a", 8)
    core.step({"a": (8, 0)})
    assert core.meter.steps == []


def test_stop_leaves_what_others_put_there(core: Core) -> None:
    """A wrapper that somebody put around ours stays, and ours lets everything pass."""
    ours: Callable[..., Any] = core.scheduler.schedule
    theirs = core.scheduler.schedule = lambda *args: ours(*args)  # type: ignore[method-assign]
    core.watched.stop()
    assert core.scheduler.schedule is theirs
    core.scheduler.admit("a", 8)
    core.step({"a": (8, 0)})
    assert core.meter.steps == []


def test_a_scheduler_without_the_methods(calls: Any) -> None:
    """One that lacks what is watched is refused, and nothing of it is changed."""
    other = SimpleNamespace(schedule=len)
    with pytest.raises(AttributeError):
        WatchedScheduler(other, ENGINE, lambda: calls.meter, lanes=1, now_ns=lambda: 0, complaints=Complaints())
    assert other.__dict__ == {"schedule": len}
