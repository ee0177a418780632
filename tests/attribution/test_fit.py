"""The fit of step costs: it solves what scipy solves, follows its prior where rows are silent, and finds what it was given."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls as reference

from melodi_otel.attribution.fit import ENOUGH_ROWS, ENOUGH_STEPS, Durations, Fit, nnls, price
from melodi_otel.attribution.meter import EngineId
from melodi_otel.attribution.weights import EngineFacts, Features, Roofline, Theta

A, B = EngineId("g", 0), EngineId("g", 1)
TRUE = Theta(4.0, 0.02, 0.003, 1e-5, 0.0, 5.0)


def work(chance: random.Random, steps: int = 10) -> Features:
    """What some steps did: a third of them with a prompt's chunk."""
    n = chance.randint(1, 40)
    with_prompt = chance.randint(0, steps // 3)
    tokens = with_prompt * chance.randint(50, 900)
    return Features(
        float(steps - with_prompt),
        float(steps * n),
        float(tokens),
        steps * n * chance.uniform(200, 2000),
        0.0,
        float(with_prompt),
    )


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 10_000))
def test_as_scipy_solves_it(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, y = rng.standard_normal((3 * size, size)), rng.standard_normal(3 * size)
    expected, _ = reference(rows, y)
    assert nnls(rows.T @ rows, rows.T @ y) == pytest.approx(expected, abs=1e-7)


def test_costs_are_found_again() -> None:
    """From 300 rows without noise a step is priced to 15 % (the prior still weighs a tenth), the middle interval to 4 %."""
    chance, fit = random.Random(1), Fit()
    for _ in range(600):
        x = work(chance)
        fit.add({A: x}, price(TRUE, x), 0.1, 1.0)
        if fit.due():
            fit.solve(lambda _: Roofline().theta(EngineFacts()))
    theta = fit.theta(A)
    assert theta is not None
    for x in (Features(1.0, 8.0, 0.0, 8e3), Features(0.0, 8.0, 512.0, 8e3, 0.0, 1.0), Features(1.0, 32.0, 0.0, 3e4)):
        assert price(theta, x) == pytest.approx(price(TRUE, x), rel=0.15)
    assert fit.misfit is not None
    assert fit.misfit < 0.04


def test_two_engines_are_told_apart() -> None:
    """One costs three times the other; nothing but the sum is measured."""
    chance, fit = random.Random(2), Fit()
    other = Theta(*(3.0 * value for value in TRUE))
    for _ in range(800):
        x, y = work(chance), work(chance, chance.randint(0, 12))
        for engine, did, theta in ((A, x, TRUE), (B, y, other)):
            fit.step(engine, Features(1.0, 8.0, 0.0, 8e3), price(theta, Features(1.0, 8.0, 0.0, 8e3)) / 300.0)
            assert did is not None
        fit.add({A: x, B: y}, price(TRUE, x) + price(other, y), 0.1, 1.0)
        if fit.due():
            fit.solve(lambda _: Roofline().theta(EngineFacts()))
    found = {engine: price(fit.theta(engine) or TRUE, Features(1.0, 8.0, 0.0, 8e3)) for engine in (A, B)}
    assert found[B] / found[A] == pytest.approx(3.0, rel=0.03)


def test_durations_are_a_prior() -> None:
    """Before any reading a step that takes twice as long costs twice as much."""
    fit = Fit()
    for n in range(ENOUGH_STEPS):
        fit.step(A, Features(1.0, float(1 + n % 20), 0.0, 0.0), 0.010 + 0.001 * (1 + n % 20))
    fit.solve(lambda _: Roofline().theta(EngineFacts()))
    theta = fit.theta(A)
    assert theta is not None
    small, large = price(theta, Features(1.0, 2.0)), price(theta, Features(1.0, 14.0))
    assert large / small == pytest.approx(24.0 / 12.0, rel=1e-3)
    assert not fit.holds


def test_few_steps_say_nothing() -> None:
    durations = Durations()
    for _ in range(ENOUGH_STEPS - 1):
        durations.add(Features(1.0, 1.0), 0.01)
    assert durations.theta() is None


def test_rows_with_somebody_unknown_teach_nothing() -> None:
    fit = Fit()
    for _ in range(40):
        fit.add({A: Features(10.0, 80.0)}, 50.0, 0.1, 1.0, trusted=False)
    assert fit.rows == 0


def test_idle_rows_teach_nothing() -> None:
    fit = Fit()
    for _ in range(40):
        fit.add({A: Features(1.0, 1.0)}, 5.0, 0.1, 0.1)
    assert fit.rows == 0


def test_it_predicts_from_the_eighth_row_on() -> None:
    fit, x = Fit(), Features(10.0, 80.0)
    for n in range(2 * ENOUGH_ROWS):
        assert (fit.predicted({A: x}) is None) == (n < 2 * ENOUGH_ROWS)
        fit.add({A: x}, 50.0, 0.1, 1.0)
        fit.solve(lambda _: Roofline().theta(EngineFacts()))
    assert fit.predicted({A: x}) == pytest.approx(50.0, rel=0.01)
    assert fit.predicted({A: x, B: x}) is None


def test_starting_over_forgets_costs() -> None:
    fit, x = Fit(), Features(10.0, 80.0)
    for _ in range(40):
        fit.add({A: x}, 50.0, 0.1, 1.0)
        fit.solve(lambda _: Roofline().theta(EngineFacts()))
    fit.start_over()
    assert (fit.rows, fit.theta(A), fit.misfit) == (0, None, None)


def test_another_process_goes_on_from_the_sums() -> None:
    """After one interval it prices as the first one did."""
    chance, first, second = random.Random(3), Fit(), Fit()
    for _ in range(100):
        x = work(chance)
        first.add({A: x}, price(TRUE, x), 0.1, 1.0)
    first.solve(lambda _: Roofline().theta(EngineFacts()))
    state = first.state()
    assert state is not None
    second.resume(*state, first.rows)
    assert second.due()
    second.solve(lambda _: Roofline().theta(EngineFacts()))
    assert (second.theta(A), second.rows, second.holds) == (first.theta(A), 50, True)


def test_sums_of_another_form_are_left_out() -> None:
    fit = Fit()
    fit.resume([A], [1.0] * 48, [1.0] * 7, 50)
    fit.resume([A], [float("nan")] * 49, [1.0] * 7, 50)
    assert (fit.rows, fit.state()) == (0, None)


def test_a_gain_that_wanders_is_not_taken_for_the_batch() -> None:
    """The gain goes up by half while the batch grows, slowly, and back: a large step costs as many small ones as it does."""
    chance, fit = random.Random(3), Fit()
    small, large = Features(1.0, 2.0, 0.0, 2e3), Features(1.0, 40.0, 0.0, 4e4)
    for row in range(900):
        slow = 0.5 - 0.5 * math.cos(row / 60.0)
        n = 2.0 + 30.0 * slow + chance.uniform(0.0, 8.0)
        x = Features(10.0, 10.0 * n, 0.0, 1e4 * n)
        gain = (1.0 + 0.5 * slow) * (1.0 + chance.gauss(0.0, 0.01))
        fit.add({A: x}, gain * price(TRUE, x), 0.2, 1.0)
        if fit.due():
            fit.solve(lambda _: Roofline().theta(EngineFacts()))
    theta = fit.theta(A)
    assert theta is not None
    assert fit.wanders
    assert price(theta, large) / price(theta, small) == pytest.approx(price(TRUE, large) / price(TRUE, small), rel=0.06)


def test_noise_is_no_wandering_gain() -> None:
    chance, fit = random.Random(4), Fit()
    for _ in range(400):
        x = work(chance)
        fit.add({A: x}, price(TRUE, x) * (1.0 + chance.gauss(0.0, 0.1)), 0.2, 1.0)
        if fit.due():
            fit.solve(lambda _: Roofline().theta(EngineFacts()))
    assert not fit.wanders


def test_what_is_not_seen_for_long_is_not_forgotten() -> None:
    """Ten minutes of all kinds of steps, then an hour of one decode set, from which nobody could tell two costs apart: what a
    prompt costs is still known, to a twentieth.
    """
    chance, fit = random.Random(4), Fit()
    for _ in range(6000):
        x = work(chance)
        fit.add({A: x}, price(TRUE, x) * chance.gauss(1.0, 0.02), 0.1, 1.0)
        if fit.due():
            fit.solve(lambda _: Roofline().theta(EngineFacts()))
    before = fit.theta(A)
    assert before is not None
    prompt = Features(0.0, 0.0, 512.0, 0.0, 0.0, 1.0)
    priced = price(before, prompt)
    for _ in range(36_000):
        x = Features(10.0, 160.0, 0.0, 160_000.0)
        fit.add({A: x}, price(TRUE, x) * chance.gauss(1.0, 0.02), 0.1, 1.0)
        if fit.due():
            fit.solve(lambda _: Roofline().theta(EngineFacts()))
    after = fit.theta(A)
    assert after is not None
    assert price(after, prompt) == pytest.approx(priced, rel=0.05)
