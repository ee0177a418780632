"""Joules of single answers: added up over their requests, final or not, bounded, and only for who knows the id."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from melodi_otel.attribution.record import RequestRecord
from melodi_otel.attribution.summary import unavailable
from melodi_otel.telemetry.answers import Answers, Part, figure

Make = Callable[..., RequestRecord]


@pytest.fixture
def record(kit: Any) -> Make:
    def make(answer: str | None = "a", joules: float | None = 30.0, sigma: float = 3.0, **energy: Any) -> RequestRecord:
        made = kit.record(answer=answer)
        if joules is None:
            return replace(made, energy=unavailable("no_source"))
        return replace(made, energy=replace(made.energy, total=joules, uncertainty=sigma, **energy))

    return make


def test_a_promise_is_not_final() -> None:
    """Before its joules are there an answer is known, without a figure."""
    answers = Answers()
    answers.promised("a")
    assert answers.get("a") == {"id": "a", "final": False}


def test_one_request(record: Make) -> None:
    """The figure of an answer of one request is that request's."""
    answers = Answers()
    answers.promised("a")
    answers.finished(record(scope="gpu"))
    assert answers.get("a") == {
        "id": "a", "joules": 30.0, "uncertainty": 3.0, "scope": "gpu", "quality": "measured", "final": True,
    }  # fmt: skip


def test_several_requests_are_added_up(record: Make) -> None:
    """Joules add, their uncertainties in squares, the worst quality holds; it is final with the last of them."""
    answers = Answers()
    answers.promised("a")
    answers.promised("a")
    answers.finished(record())
    assert answers.get("a") == {"id": "a", "final": False}
    answers.finished(record(joules=10.0, sigma=4.0, quality="interpolated"))
    known = answers.get("a") or {}
    assert (known["joules"], known["uncertainty"], known["quality"]) == (40.0, 5.0, "interpolated")
    assert known["final"] is True


def test_a_part_that_nobody_knows(record: Make) -> None:
    """Where one request's joules are unavailable, the answer has no figure, and says how good it is."""
    answers = Answers()
    for _ in range(2):
        answers.promised("a")
    answers.finished(record())
    answers.finished(record(joules=None))
    assert answers.get("a") == {"id": "a", "quality": "unavailable", "final": True}


def test_different_scopes_have_no_common_one() -> None:
    """A sum over requests that contain different kinds of devices does not say which it contains."""
    parts = [Part(1.0, 0.1, "gpu", "measured"), Part(1.0, 0.1, "gpu+cpu", "measured")]
    assert "scope" not in figure("a", parts, final=True)


def test_who_promised_nothing(record: Make) -> None:
    """A request without an answer's id leaves nothing, and an id that was never promised is not known."""
    answers = Answers()
    answers.finished(record(answer=None))
    answers.finished(record(answer="b"))
    assert answers.get("b") is None


def test_the_oldest_are_forgotten() -> None:
    """As many answers are remembered as the limit says."""
    answers = Answers(limit=2)
    for name in "abc":
        answers.promised(name)
    assert [answers.get(name) is not None for name in "abc"] == [False, True, True]


def test_nobody_makes_others_forgotten() -> None:
    """Answers of one user, however many, leave those of another where they are."""
    answers = Answers(limit=1)
    answers.promised("mine", 1000)
    for number in range(10):
        answers.promised(f"flood{number}", 1001)
    assert answers.get("mine") is not None


def test_nobody_adds_to_others(record: Make) -> None:
    """A request of another user does not count for an answer, even if he knows its id."""
    answers = Answers()
    answers.promised("a", 1000)
    answers.finished(record(), 1001)
    assert answers.get("a") == {"id": "a", "final": False}


def test_a_figure_is_json(record: Make) -> None:
    """What is told of an answer can be written as JSON."""
    assert json.loads(json.dumps(figure("a", [], final=False))) == {"id": "a", "final": False}
