"""The laws of a fair division, on the ledger as it runs: each joule once, equals get equal parts, who does nothing pays nothing,
parts add up, more work never costs less, and the phase of the sensor does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from melodi_otel.attribution.engines import Work
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import EngineId, Key, Share
from melodi_otel.attribution.weights import EngineFacts, Roofline
from melodi_otel.devices import Device

S = 1_000_000_000
MS = 1_000_000
ENGINE = EngineId("g", 0)
IDLE_W = 50.0
NAMES = ("a", "b", "c", "d")
Schedule = list[tuple[int, dict[str, tuple[int, int]]]]
"""Steps that follow each other: (length in ms, id -> (prompt tokens, decode tokens))."""

parts = st.one_of(
    st.tuples(st.integers(1, 900), st.just(0)),
    st.just((0, 1)),
    st.just((0, 1)),
    st.tuples(st.just(0), st.integers(2, 4)),
)
steps = st.lists(
    st.tuples(st.integers(3, 60), st.dictionaries(st.sampled_from(NAMES), parts, min_size=1, max_size=4)),
    min_size=2,
    max_size=40,
)
readings = st.lists(st.tuples(st.integers(20, 300), st.floats(0.0, 80.0)), min_size=1, max_size=12)


def run(
    schedule: Schedule,
    read: Sequence[tuple[int, float]],
    *,
    fixed: bool = True,
    bound: Mapping[str, str] | None = None,
    queued: Sequence[str] = (),
    context: Mapping[str, int] | None = None,
) -> tuple[dict[str, Share], Ledger]:
    """Shares of all requests; ``read`` is (ms since the reading before, J above idle); ``bound`` names the request of an id."""
    ledger = Ledger(patience_s=None, model=Roofline() if fixed else None, step_wait_s=60.0)
    ledger.device(Device("G", "gpu", idle_watts=IDLE_W))
    ledger.engine(ENGINE, 0, devices=("G",), parameters=1e9, active_parameters=1e9)
    owners = bound or {}
    futures = {}
    for name in dict.fromkeys([*(owners.get(name, name) for name in NAMES), *queued]):
        ledger.open(Key("g", name), 0, engine=ENGINE, devices=("G",))
    for child, owner in owners.items():
        ledger.bind(Key("g", owner), child)
    told: list[tuple[int, int, float | tuple[int, list[Work]]]] = []
    contexts, at = dict.fromkeys(NAMES, 0) | dict(context or {}), 0
    for length, work in schedule:
        rows: list[Work] = []
        for name, (prompt, decode) in work.items():
            rows.append(Work(name, prompt, decode, contexts[name]))
            contexts[name] += prompt + min(decode, 1)
        told.append(((at + length) * MS, 1, (at * MS, rows)))
        at += length
    joules, when = 0.0, 0
    told.append((0, 0, 0.0))
    for gap, more in read:
        when += gap
        joules += IDLE_W * gap / 1e3 + more
        told.append((when * MS, 0, joules))
    end = max(at, when) + 1
    joules += IDLE_W * (end - when) / 1e3 + 20.0
    told.append((end * MS, 0, joules))
    for t_ns, kind, what in sorted(told, key=lambda one: one[:2]):
        if kind == 0:
            assert isinstance(what, float)
            ledger.counter("G", t_ns, what)
        else:
            assert isinstance(what, tuple)
            ledger.work(ENGINE, what[0], t_ns, ("G",), what[1])
        ledger.settle(t_ns)
    for name in dict.fromkeys([*(owners.get(name, name) for name in NAMES), *queued]):
        futures[name] = ledger.close(Key("g", name), at * MS, None, "stop")
    ledger.flush(end * MS)
    return {name: future.result(0)[0] for name, future in futures.items()}, ledger


def directly(schedule: Schedule, read: Sequence[tuple[int, float]]) -> dict[str, float]:
    """The same by the formula, step by step and request by request."""
    theta = Roofline().theta(EngineFacts(1e9, 1e9))
    at, contexts = 0, dict.fromkeys(NAMES, 0)
    weights: list[tuple[int, int, dict[str, float]]] = []
    for length, work in schedule:
        fixed = (theta.fixed_prefill if any(prompt for prompt, _ in work.values()) else theta.fixed) / len(work)
        row: dict[str, float] = {}
        for name, (prompt, decode) in work.items():
            context = contexts[name]
            row[name] = fixed + theta.prefill * prompt + theta.decode * decode + theta.cache * context
            row[name] += theta.attention * prompt * (context + prompt / 2.0)
            contexts[name] += prompt + min(decode, 1)
        weights.append((at, at + length, row))
        at += length
    edges = [0]
    for gap, _ in read:
        edges.append(edges[-1] + gap)
    found = dict.fromkeys(NAMES, 0.0)
    ends = [*zip(edges, edges[1:], (more for _, more in read), strict=False), (edges[-1], max(at, edges[-1]) + 1, 20.0)]
    for t0, t1, dynamic in ends:
        inside = [(max(0, min(b, t1) - max(a, t0)), b - a, row) for a, b, row in weights]
        covered = sum(overlap for overlap, _, _ in inside)
        # Work that fills a sliver of an interval did not cause what happened in it.
        claimed = dynamic * min(1.0, 20.0 * covered / (t1 - t0))
        total = sum(overlap / length * sum(row.values()) for overlap, length, row in inside)
        for overlap, length, row in inside:
            for name, weight in row.items():
                found[name] += claimed * overlap / length * weight / total if overlap else 0.0
                found[name] += IDLE_W * overlap / 1e3 / len(row)
    return found


@settings(deadline=None, max_examples=150)
@given(steps, readings)
def test_clocks_give_what_the_formula_gives(schedule: Schedule, read: list[tuple[int, float]]) -> None:
    """Members of decode sets are charged without being looked at; request by request comes out the same, and the books close."""
    shares, ledger = run(schedule, read)
    expected = directly(schedule, read)
    for name in NAMES:
        assert shares[name].joules == pytest.approx(expected[name], rel=1e-9, abs=1e-9)
    assert abs(ledger.snapshot().books["G"].imbalance()) <= 1e-9


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.sets(st.sampled_from(NAMES), min_size=1), st.lists(st.integers(3, 9), min_size=1, max_size=90)),
        min_size=1,
        max_size=4,
    ),
    readings,
)
def test_runs_give_what_the_formula_gives(
    sets: list[tuple[set[str], list[int]]], read: list[tuple[int, float]]
) -> None:
    """Steps of a set that goes on are one run, longer than the longest one too, and cut by every reading where it falls."""
    schedule: Schedule = [(length, dict.fromkeys(names, (0, 1))) for names, lengths in sets for length in lengths]
    shares, ledger = run(schedule, read)
    expected = directly(schedule, read)
    for name in NAMES:
        assert shares[name].joules == pytest.approx(expected[name], rel=1e-9, abs=1e-9)
    assert abs(ledger.snapshot().books["G"].imbalance()) <= 1e-9


@settings(deadline=None, max_examples=60)
@given(steps, readings)
def test_fitted_books_close(schedule: Schedule, read: list[tuple[int, float]]) -> None:
    _, ledger = run(schedule, read, fixed=False)
    assert abs(ledger.snapshot().books["G"].imbalance()) <= 1e-9


@settings(deadline=None, max_examples=60)
@given(steps, readings, st.booleans())
def test_equals_get_equal_parts(schedule: Schedule, read: list[tuple[int, float]], fixed: bool) -> None:
    """Whatever ``a`` does, ``b`` does beside it."""
    twins = [
        (length, {**work, "b": work["a"]} if "a" in work else {n: w for n, w in work.items() if n != "b"})
        for length, work in schedule
    ]
    twins = [(length, work or {"c": (0, 1)}) for length, work in twins]
    shares, _ = run(twins, read, fixed=fixed)
    assert shares["a"].joules == pytest.approx(shares["b"].joules, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(steps, readings)
def test_who_is_queued_pays_nothing(schedule: Schedule, read: list[tuple[int, float]]) -> None:
    shares, _ = run(schedule, read, queued=["q"])
    assert (shares["q"].joules, shares["q"].dynamic) == (0.0, 0.0)


@settings(deadline=None, max_examples=60)
@given(steps, readings)
def test_parts_add_up(schedule: Schedule, read: list[tuple[int, float]]) -> None:
    """One request with the sequences of two gets what both get."""
    apart, _ = run(schedule, read)
    together, _ = run(schedule, read, bound={"a": "ab", "b": "ab"})
    both = (apart["a"].joules or 0.0) + (apart["b"].joules or 0.0)
    assert together["ab"].joules == pytest.approx(both, rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(steps, readings, st.integers(1, 5000))
def test_more_work_never_costs_less(schedule: Schedule, read: list[tuple[int, float]], more: int) -> None:
    """The same steps and joules, but ``a`` reads a longer context in all of them."""
    less, _ = run(schedule, read)
    long, _ = run(schedule, read, context={"a": more})
    assert (long["a"].joules or 0.0) >= (less["a"].joules or 0.0) - 1e-9
