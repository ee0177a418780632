from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from melodi_otel.attribution.meter import current
from melodi_otel.attribution.summary import summarize


def test_joules_are_those_of_the_block(bench):
    """A block alone: joules, watt-hours, uncertainty, quality, method, duration of its share."""
    with bench.measure() as m:
        bench.clock.advance(4.0)
    assert m.wait(0.0)
    assert (m.joules, m.watt_hours, m.uncertainty) == (2.0, 2.0 / 3600, 0.3)
    assert (m.quality, m.method, m.duration, m.reason) == ("measured", "exclusive", 4.0, None)
    assert m.energy.cpu == 2.0


def test_nothing_is_known_inside_the_block(bench):
    """Inside the block every figure is None, never 0, and nothing waits."""
    m = bench.measure(wait_s=60.0)
    assert (m.joules, m.duration, m.wait(0.0)) == (None, None, False)
    with m:
        bench.clock.advance(1.0)
        assert (m.joules, m.watt_hours, m.uncertainty, m.quality, m.energy, m.method) == (None,) * 6
        assert m.duration == 1.0
        assert not m.wait(60.0)


def test_a_late_figure_is_unavailable_and_then_known(bench, kit):
    """While the meter has not settled the quality says unavailable and late; afterwards the figures are there."""
    bench.meter.answer = None
    with bench.measure() as m:
        pass
    assert (m.joules, m.quality, m.reason, m.wait(0.0)) == (None, "unavailable", "late", False)
    (key,) = bench.meter.futures
    bench.meter.futures[key].set_result([kit.share(key, 7.0)])
    assert (m.joules, m.quality, m.wait(0.0)) == (7.0, "measured", True)
    assert [r.name for r in bench.store.recent()] == ["block"]


def test_nested_blocks_have_the_outer_one_as_parent(bench):
    """The inner block's parent is the outer one, and after both nothing is current."""
    with bench.measure("outer"):
        outer = current.get()
        with bench.measure("inner"):
            inner = current.get()
        assert current.get() == outer
    assert current.get() is None
    assert bench.meter.opened == {outer: None, inner: outer}


def test_joules_contain_what_is_nested(bench, kit):
    """joules is the roll-up; uncertainties of the parts add in squares and the worst quality wins."""
    key = None

    def answer(k):
        return [kit.share(k, 1.0, rollup=5.0, uncertainty=0.3)]

    bench.meter.answer = answer
    with bench.measure() as m:
        key = current.get()
        child = kit.record("r", parent=key)
        energy = summarize(
            [kit.share(child.key, 4.0, uncertainty=0.4, quality="interpolated", method="window")], kit.DEVICES
        )
        bench.store.finished(kit.record("r", parent=key, energy=energy))
    assert m.joules == 5.0
    assert m.energy.total == 1.0
    assert m.uncertainty == pytest.approx(0.5)
    assert (m.quality, m.method) == ("interpolated", "window")
    assert [r.name for r in m.results()] == ["r", "block"]


def test_estimates_are_wrong_together(bench, kit):
    """Uncertainties of estimates add up as they are: the model that is behind them is the same."""
    bench.meter.answer = lambda k: [kit.share(k, 1.0, rollup=5.0, uncertainty=0.6, quality="estimated")]
    with bench.measure() as m:
        child = kit.record("r", parent=current.get())
        energy = summarize([kit.share(child.key, 4.0, uncertainty=2.4, quality="estimated")], kit.DEVICES)
        bench.store.finished(kit.record("r", parent=current.get(), energy=energy))
    assert m.uncertainty == pytest.approx(3.0)
    assert m.quality == "estimated"


def test_uncertainty_is_unknown_where_a_nested_request_is_forgotten(bench, kit):
    """Where the parts do not make the sum, nobody can tell its uncertainty."""
    bench.meter.answer = lambda k: [kit.share(k, 1.0, rollup=5.0)]
    with bench.measure() as m:
        pass
    assert (m.joules, m.uncertainty) == (5.0, None)


def test_unavailable_is_none_with_its_reason(bench, kit):
    """No joules: every figure None, the quality and the reason say why."""
    bench.meter.answer = lambda k: [kit.share(k, None)]
    with bench.measure() as m:
        pass
    assert (m.joules, m.watt_hours, m.uncertainty, m.method) == (None,) * 4
    assert (m.quality, m.reason) == ("unavailable", "no_samples")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(ValueError("x"), "error"), (KeyboardInterrupt(), "abort"), (asyncio.CancelledError(), "abort")],
)
def test_a_raising_block_is_closed_once_and_raises_the_same(bench, error, outcome):
    """Whatever leaves the block, it is closed exactly once and the exception is the caller's own."""
    with pytest.raises(type(error)) as caught, bench.measure():
        raise error
    assert caught.value is error
    assert [how for _, how in bench.meter.closed.values()] == [outcome]
    assert current.get() is None
    assert bench.store.last().error_type == type(error).__name__


def test_a_failing_meter_is_not_noticed(bench):
    """A meter that raises in open or close changes nothing for the block; the figures are unavailable."""

    class Broken:
        def open(self, *a, **k):
            raise RuntimeError("broken")

        close = open

    with bench.measure(meter=Broken()) as m:
        value = 7
    assert value == 7
    assert (m.joules, m.quality, m.reason) == (None, "unavailable", "no_source")


def test_metering_turned_off(bench):
    """Without a meter the block runs and says `disabled`."""
    with bench.measure(meter=None) as m:
        pass
    assert (m.joules, m.quality, m.reason) == (None, "unavailable", "disabled")


def test_decorator_measures_every_call(bench):
    """Each call of a decorated function is its own block; the return value is untouched."""

    @bench.measure("f")
    def double(x: int) -> int:
        """Doc."""
        return 2 * x

    assert [double(1), double(2)] == [2, 4]
    assert (double.__name__, double.__doc__) == ("double", "Doc.")
    assert [r.name for r in bench.store.recent()] == ["f", "f"]


def test_coroutines_and_async_with(bench):
    """A decorated coroutine function stays one, and `async with` measures as `with` does."""

    @bench.measure("f")
    async def work() -> int:
        await asyncio.sleep(0)
        return 5

    async def main() -> int:
        async with bench.measure("block") as m:
            value = await work()
        assert await m.settled(0.0)
        return value

    assert asyncio.run(main()) == 5
    names = [r.name for r in bench.store.recent()]
    assert names == ["f", "block"]
    inner, outer = bench.store.recent()
    assert inner.parent == outer.key


def test_parallel_tasks_do_not_nest_in_each_other(bench):
    """Two tasks in one block are both its children; one measurement entered by both stays apart."""
    m = bench.measure("task")

    async def task(first: asyncio.Event, second: asyncio.Event) -> None:
        with m:
            first.set()
            await second.wait()

    async def main() -> None:
        with bench.measure("outer"):
            a, b = asyncio.Event(), asyncio.Event()
            await asyncio.gather(task(a, b), task(b, a))

    asyncio.run(main())
    outer = bench.store.recent()[-1]
    assert [r.parent for r in bench.store.recent()[:2]] == [outer.key, outer.key]


def test_parallel_threads(bench):
    """Threads measure apart; `within` nests another thread's work in the block."""
    barrier = threading.Barrier(2)

    def work() -> None:
        with bench.measure("thread"):
            barrier.wait(10)

    with bench.measure("outer") as m, ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work), pool.submit(m.within(work))]:
            future.result(10)
    outer = bench.store.recent()[-1]
    parents = {r.parent for r in bench.store.recent()[:2]}
    assert parents == {None, outer.key}


def test_one_measurement_nested_in_itself(bench):
    """The same object entered twice closes the inner block first."""
    m = bench.measure()
    with m:
        outer = current.get()
        with m:
            inner = current.get()
        assert list(bench.meter.closed) == [inner]
        assert current.get() == outer
    assert list(bench.meter.closed) == [inner, outer]


def test_leaving_in_another_context(bench):
    """A block entered in one context and left in another is closed once and raises nothing."""
    m = bench.measure()
    contextvars.Context().run(m.__enter__)
    m.__exit__(None, None, None)
    m.__exit__(None, None, None)
    assert len(bench.meter.closed) == 1


def test_generator_is_current_only_while_it_runs(bench):
    """Inside a measured generator its activity is current; its consumer's work is not nested in it."""
    seen = []

    @bench.measure("gen")
    def numbers():
        seen.append(current.get())
        got = yield 1
        seen.append(current.get())
        yield got
        return "end"

    generator = numbers()
    assert next(generator) == 1
    assert current.get() is None
    assert generator.send("x") == "x"
    with pytest.raises(StopIteration) as stop:
        next(generator)
    assert stop.value.value == "end"
    assert seen == list(bench.meter.opened) * 2
    assert [how for _, how in bench.meter.closed.values()] == ["stop"]


def test_generator_dropped_or_thrown_into(bench):
    """A dropped generator is an abort; an exception thrown in reaches the code inside."""

    @bench.measure("gen")
    def numbers():
        try:
            yield 1
        except KeyError:
            yield "caught"

    dropped = numbers()
    next(dropped)
    dropped.close()
    thrown = numbers()
    next(thrown)
    assert thrown.throw(KeyError()) == "caught"
    assert list(thrown) == []
    assert [how for _, how in bench.meter.closed.values()] == ["abort", "stop"]


def test_async_generator(bench):
    """An asynchronous generator is measured from its first to its last item."""

    @bench.measure("gen")
    async def numbers():
        yield current.get()
        await asyncio.sleep(0)
        yield current.get()

    async def main():
        outside = []
        inside = []
        async for key in numbers():
            inside.append(key)
            outside.append(current.get())
        return inside, outside

    inside, outside = asyncio.run(main())
    assert inside == list(bench.meter.opened) * 2
    assert outside == [None, None]
    assert len(bench.meter.closed) == 1


def test_settled_does_not_cancel_the_meter(bench):
    """A wait that times out leaves the future alone, so the figure still arrives."""
    bench.meter.answer = None

    async def main() -> bool:
        async with bench.measure() as m:
            pass
        return await m.settled(0.0)

    assert asyncio.run(main()) is False
    (future,) = bench.meter.futures.values()
    assert not future.cancelled()


def test_repr(bench):
    """The measurement says what it knows."""
    m = bench.measure()
    assert repr(m) == "<measure 'block': not entered>"
    with m:
        assert repr(m) == "<measure 'block': not final yet>"
    assert repr(m) == "<measure 'block': 2.00 J ± 0.30 J, measured>"
