"""What intervals teach about engines that share a device."""

from __future__ import annotations

import random

import pytest

from melodi_otel.attribution.fit import price
from melodi_otel.attribution.lanes import Did
from melodi_otel.attribution.learning import Judgement, Learner
from melodi_otel.attribution.meter import EngineId
from melodi_otel.attribution.weights import EngineFacts, Features, Roofline

A, B = EngineId("a", 0), EngineId("b", 0)
SECONDS = 0.1


def taught(together: float, alone: int) -> Judgement:
    """Engines of 20 and 10 J per interval that take ``together`` times the sum side by side; B is alone ``alone`` times."""
    chance, learner = random.Random(1), Learner()
    found = Judgement()
    order = [(True, True)] * 600 + [(True, False)] * 200 + [(False, True)] * alone
    chance.shuffle(order)
    for at, (a, b) in enumerate([*order, (True, True)]):
        work = {}
        joules = 0.0
        for engine, there, each in ((A, a, 0.5), (B, b, 0.25)):
            if there:
                steps = chance.randint(30, 50)
                work[engine] = Features(float(steps), 8.0 * steps, 0.0, 8e3 * steps)
                joules += each * steps
        joules *= together if a and b else 1.0
        found = learner.judge(work, joules, SECONDS, 1.0)
        t0 = round(at * SECONDS * 1e9)
        learner.learn(
            t0,
            t0 + round(SECONDS * 1e9),
            work,
            [],
            joules,
            1.0,
            lambda _: Roofline().theta(EngineFacts()),
            trusted=True,
        )
    return found


def test_engines_that_do_not_add_up_are_said_to() -> None:
    """Side by side they take half as much again: what B takes by itself is far from its part, and shares are called estimated."""
    found = taught(1.5, alone=20)
    assert found.unfit
    assert found.contended > 0.1


@pytest.mark.parametrize("alone", [0, 20])
def test_engines_that_add_up_are_measured(alone: int) -> None:
    found = taught(1.0, alone)
    assert not found.unfit
    assert found.contended == 0.0


def scattered(scatter: float) -> float:
    """The relative error that is stated after ten minutes of single intervals that scatter by so much about what is predicted."""
    chance, learner = random.Random(2), Learner()
    error = 0.0
    for at in range(3000):
        steps = chance.randint(30, 50)
        work = {A: Features(float(steps), 8.0 * steps, 0.0, 8e3 * steps)}
        joules = 0.5 * steps * (1.0 + chance.gauss(0.0, scatter))
        error = learner.judge(work, joules, SECONDS, 1.0).error or 0.0
        t0, t1 = round(at * SECONDS * 1e9), round((at + 1) * SECONDS * 1e9)
        roofline = Roofline().theta(EngineFacts())
        learner.learn(t0, t1, work, [], joules, 1.0, lambda _, theta=roofline: theta, trusted=True)
    return error


def test_work_that_is_not_where_it_is_told_makes_less_sure() -> None:
    """Where intervals scatter by 10 % and not by the 2 % that steps differ by, a share is more than twice as unsure."""
    assert scattered(0.10) > 2.0 * scattered(0.02) > 0.0


def test_nobody_learns_from_a_step_in_which_kernels_are_built() -> None:
    """Ten seconds of prompts whose step takes a second for 2 J, then usual ones: what a prompt costs is known within a tenth."""
    learner = Learner()
    chance = random.Random(3)
    theta = Roofline().theta(EngineFacts())
    t0 = 0

    def told(x: Features, joules: float, seconds: float) -> None:
        nonlocal t0
        t1 = t0 + round(seconds * 1e9)
        odd = learner.fit.odd(A, x, seconds)
        for at in range(round(seconds / 0.1)):
            part = Features(*[0.1 / seconds * value for value in x])
            begin = t0 + round(at * 1e8)
            done = [Did(A, t0, t1, 1, x)] if at == round(seconds / 0.1) - 1 else []
            learner.learn(
                begin,
                begin + 100_000_000,
                {A: part},
                done,
                joules * 0.1 / seconds,
                1.0,
                lambda _: theta,
                trusted=True,
                odd=odd,
            )
        t0 = t1

    for _ in range(10):
        told(Features(0.0, 0.0, 512.0, 0.0, 0.0, 1.0), 2.0, 1.0)
    for _ in range(600):
        if chance.random() < 0.3:
            told(Features(0.0, 8.0, 512.0, 4e3, 0.0, 1.0), 12.0, 0.2)
        else:
            told(Features(1.0, 8.0, 0.0, 4e3), 2.0, 0.1)
    found = learner.fit.theta(A)
    assert found is not None
    assert price(found, Features(0.0, 8.0, 512.0, 4e3, 0.0, 1.0)) == pytest.approx(12.0, rel=0.1)
