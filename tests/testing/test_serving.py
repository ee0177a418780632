"""The simulated server: its energies add up, and its truth is what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from melodi_otel.testing.serving import SCENARIOS, simulate
from melodi_otel.testing.serving_board import Sensor
from melodi_otel.testing.serving_power import LLAMA_8B, QWEN_30B_A3B, Chip, Floats, Model, shapley
from melodi_otel.trace import lines

DECODE = [1.0, 1.0, 700.0, 700.5]
PREFILL = [1.0, 900.0, 0.0, 405_000.0]


def worth(model: Model) -> Callable[[Floats], Floats]:
    """J of a step of ``model``, given the sums of its members' rows."""
    return lambda sums: Chip().cost(model, sums, 1)[1]


@pytest.mark.parametrize("name", ["load 2", "tensor parallel", "two engines", "aborted"])
def test_energies_add_up(name: str):
    """What requests, idle, tail and an intruder drew is what the board drew, on every device."""
    run = simulate(SCENARIOS[name], seconds=8.0)
    for device, bucket in run.buckets.items():
        parts = sum(joules for key, joules in bucket.items() if key != "measured")
        assert parts == pytest.approx(bucket["measured"], rel=1e-6)
        of_requests = sum(truth.joules for (_, on), truth in run.truth.items() if on == device)
        assert of_requests == pytest.approx(bucket["dynamic"] + bucket["static"], rel=1e-9)
        assert of_requests == pytest.approx(sum(j for (_, on), j in run.engines.items() if on == device), rel=1e-9)
        assert bucket["measured"] == pytest.approx(float(run.boards[device].energy(run.boards[device].seconds)))


def test_an_intruder_is_nobodys():
    """An intruder's joules are in the counter, and in no request's."""
    with_it = simulate(SCENARIOS["intruder"], seconds=70.0)
    without = simulate(replace(SCENARIOS["intruder"], intruder_watts=0.0), seconds=70.0)
    found, other = with_it.buckets["GPU-0"], without.buckets["GPU-0"]
    assert found["intruder"] > 150.0
    assert found["measured"] == pytest.approx(other["measured"] + found["intruder"], rel=1e-6)
    assert with_it.truth == without.truth


def test_a_seed_is_a_run():
    """The same seed gives the same trace, another one another."""
    first, again, other = (simulate(SCENARIOS["load 2"], seed=seed, seconds=5.0) for seed in (3, 3, 4))
    assert first.lines == again.lines
    assert first.truth == again.truth
    assert first.lines != other.lines


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_every_line_is_of_the_format(name: str):
    """Lines decode, have no unknown keys, and say what a request computed."""
    run = simulate(SCENARIOS[name], seconds=5.0)
    found = [lines.decode(line) for line in run.lines]
    assert not any(lines.unknown_keys(line) for line in run.lines)
    opened = {line.id: line for line in found if isinstance(line, lines.OpenLine)}
    closed = {line.id: line for line in found if isinstance(line, lines.CloseLine)}
    assert set(opened) == set(closed) == {request for request, _ in run.truth}
    computed: dict[str, list[int]] = {request: [0, 0] for request in opened}
    for line in found:
        if isinstance(line, lines.StepLine):
            assert line.t1 > line.t0
            for request, (prefill, decode, _) in line.work.items():
                computed[request][0] += prefill
                computed[request][1] += decode
    for request, (prefill, decode) in computed.items():
        prompt, cached = opened[request].prompt_tokens, opened[request].cached_tokens
        assert prompt is not None
        assert cached is not None
        assert prefill == prompt - cached
        assert closed[request].output_tokens == decode + 1 == run.output_tokens[request]


def test_more_requests_are_larger_batches():
    """The mean batch grows with the rate."""
    batches = [simulate(SCENARIOS[f"load {rate}"], seconds=15.0).mean_batch for rate in ("0.5", "2", "5", "8")]
    assert batches == sorted(batches)
    assert batches[0] < 3.0 < batches[-1]


@pytest.mark.parametrize("model", [LLAMA_8B, QWEN_30B_A3B], ids=lambda model: model.name)
@pytest.mark.parametrize("members", [2, 5, 8, 9, 40])
def test_shares_sum_to_the_step(model: Model, members: int):
    """Shapley values sum to what all together cost, tried and sampled."""
    rows = np.array([PREFILL] + [DECODE] * (members - 1)).T
    shares = shapley(worth(model), rows, np.random.default_rng(1))
    assert float(shares.sum()) == pytest.approx(float(worth(model)(rows.sum(axis=1))), rel=1e-12)


@pytest.mark.parametrize("members", [2, 5, 8])
def test_twins_pay_the_same(members: int):
    """Members who compute the same pay the same, whoever else is there."""
    rows = np.array([PREFILL] + [DECODE] * (members - 1)).T
    shares = shapley(worth(LLAMA_8B), rows, np.random.default_rng(1))
    assert shares[1:] == pytest.approx(np.full(members - 1, shares[1]), rel=1e-12)
    assert shares[0] > shares[1]


def test_sampled_orders_agree_with_all_subsets():
    """Where subsets are not all tried, the mean over steps is what they would have given."""
    rng = np.random.default_rng(5)
    contexts = rng.lognormal(6.2, 0.8, 7)
    base = np.array([PREFILL, *([1.0, 1.0, c, c + 0.5] for c in contexts)]).T

    game = worth(LLAMA_8B)
    exact = shapley(game, base, rng)
    # A ninth member who computes nothing and has no sequence of its own pays only the part that is due to being there;
    # the game without that part is the same one.
    fixed = float(game(np.zeros((4, 1)))[0])
    nobody = np.concatenate([base, np.zeros((4, 1))], axis=1)
    sampled = np.mean([shapley(game, nobody, rng) for _ in range(60)], axis=0)
    assert sampled[:8] - fixed / 9 == pytest.approx(exact - fixed / 8, rel=0.01)
    assert sampled[8] == pytest.approx(fixed / 9, rel=1e-9)


def test_a_step_is_not_linear_in_its_members():
    """A step of all costs less than its parts alone, and a power limit makes it longer for less power."""
    both = np.array(PREFILL) + np.array(DECODE)
    assert worth(LLAMA_8B)(both) < worth(LLAMA_8B)(np.array(PREFILL)) + worth(LLAMA_8B)(np.array(DECODE))
    (free_s, free_j), (low_s, low_j) = (Chip(limit_watts=w).cost(LLAMA_8B, both, 1) for w in (570.0, 270.0))
    assert low_s > free_s
    assert low_j / low_s < free_j / free_s
    assert low_j / low_s < 270.0


def samples(sensor: Sensor) -> list[lines.SampleLine]:
    run = simulate(replace(SCENARIOS["load 2"], sensor=sensor), seconds=10.0)
    return [line for line in map(lines.decode, run.lines) if isinstance(line, lines.SampleLine)]


def test_sensors_are_what_they_say():
    """A counter never falls but where it is reset; lost readings are gone; a second between polls is one."""
    joules = [line.joules for line in samples(Sensor()) if line.joules is not None]
    assert all(a <= b for a, b in pairwise(joules))
    falling = [line.joules for line in samples(Sensor(resets=2)) if line.joules is not None]
    assert sum(a > b for a, b in pairwise(falling)) == 2
    assert len(samples(Sensor(lost=0.3))) < 0.95 * len(joules)
    polled = [line.t for line in samples(Sensor(read="free", every_s=1.0))]
    assert np.diff(polled) == pytest.approx(1.0, abs=0.02)
    assert all(line.watts is not None for line in samples(Sensor("gauge", window_s=1.0)))
