"""Steps are written as bytes: what they decode to is what a general encoder says of their full work."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from melodi_otel.attribution.meter import Decode, EngineId, Joined, Prefill
from melodi_otel.trace import lines as form
from melodi_otel.trace.read import lines_of
from melodi_otel.trace.record import Recorder

ENGINE = EngineId("0123456789", 3)


def written(path: Path, steps: list[tuple[Any, ...]], host: tuple[str, ...] = ()) -> list[Any]:
    recorder = Recorder(path, host)
    for step in steps:
        recorder.tap("step", step)
    recorder.close()
    return [form.decode(line) for line in lines_of([path])]


def test_full_work_of_every_member(tmp_path: Path) -> None:
    """Prefill, recompute and decode rows, names that need escapes, devices with the host's, in the order of the rows."""
    odd = 'a"%d\\ü\n'
    steps = [
        (ENGINE, 1, 7, 10**9, 2 * 10**9, ("G",), Decode(0, 0), [Prefill(odd, 5, 2)], (), (), ()),
        (ENGINE, 1, 8, 2 * 10**9, 2_500_000_001, ("G",), Decode(2, 0), (), (), [Joined(odd, 7), Joined("b", 3)], ()),
        (ENGINE, 1, 9, 3 * 10**9, 4 * 10**9, None, Decode(1, 0), [Prefill("c", 4, 0)], [Prefill(odd, 3, 8)], (), ()),
        (ENGINE, 1, 10, 4 * 10**9, 5 * 10**9, ("G",), Decode(0, 0), (), (), (), ()),
        (ENGINE, 1, 11, 5 * 10**9, 6 * 10**9, ("G",), Decode(1, 0), (), (), [Joined("c", 4)], ["b"]),
    ]
    one, two, three, last = written(tmp_path / "t.jsonl", steps, ("P",))
    assert one == form.StepLine(1.0, 2.0, {odd: (5, 0, 7)}, "01234567/3", ["G", "P"], 1)
    assert two == form.StepLine(2.0, 2.500000001, {odd: (0, 1, 8), "b": (0, 1, 4)}, "01234567/3", ["G", "P"], 1)
    assert three == form.StepLine(3.0, 4.0, {"c": (4, 0, 4), odd: (0, 3, 11), "b": (0, 1, 5)}, "01234567/3", None, 1)
    assert list(three.work) == ["c", odd, "b"]
    assert last.work == {"c": (0, 1, 5)}


def test_a_member_with_a_row_of_its_own_decodes(tmp_path: Path) -> None:
    """An id in the decode set and among the prompts stands in the line once."""
    steps = [
        (ENGINE, 0, 1, 0, 1, None, Decode(1, 0), [Prefill("a", 5, 0)], (), [Joined("a", 9), Joined("b", 2)], ()),
        (ENGINE, 0, 2, 1, 2, None, Decode(2, 0), (), (), (), ()),
    ]
    lines = written(tmp_path / "t.jsonl", steps)
    assert [line.work for line in lines] == [{"a": (0, 1, 10), "b": (0, 1, 3)}, {"a": (0, 1, 11), "b": (0, 1, 4)}]


def test_a_lost_step_ends_the_decode_set(tmp_path: Path) -> None:
    """Where a number is missing nobody is assumed to be still there."""
    steps = [
        (ENGINE, 0, 1, 0, 1, None, Decode(1, 0), (), (), [Joined("a", 9), Joined("b", 9)], ()),
        (ENGINE, 0, 3, 1, 2, None, Decode(2, 0), (), (), (), ()),
        (ENGINE, 0, 4, 2, 3, None, Decode(1, 0), (), (), [Joined("c", 1)], ()),
    ]
    assert [list(line.work) for line in written(tmp_path / "t.jsonl", steps)] == [["a", "b"], ["c"]]


def test_any_deltas(tmp_path: Path) -> None:
    """Random joins, leaves, prompts and recomputes of two lanes: contexts are those of a plain account."""
    chance, sets, steps, expected = random.Random(5), ({}, {}), [], []
    for n in range(400):
        lane = n % 2
        members: dict[str, int] = sets[lane]
        left = [name for name in members if chance.random() < 0.1]
        joined = [Joined(f"{lane}-{chance.randrange(30)}", chance.randrange(5000)) for _ in range(chance.randrange(3))]
        prefill = [Prefill(f"{lane}-{chance.randrange(60)}", 8, n) for _ in range(chance.randrange(2))]
        computed = [Prefill(name, 3, 1) for name in members if chance.random() < 0.02]
        decode = Decode(chance.randrange(4), 0)
        for name in left:
            members.pop(name, None)
        members.update({row.id: row.context for row in joined})
        work = {row.id: (row.tokens, 0, row.context + row.tokens) for row in prefill}
        for row in computed:
            members.pop(row.id, None)
            work[row.id] = (0, row.tokens, row.context + row.tokens)
        if decode.n:
            for name, context in members.items():
                members[name] = context + 1
                work[name] = (0, 1, context + 1)
        if work:
            expected.append(list(work.items()))
        steps.append((ENGINE, lane, n // 2, n, n + 1, ("G",), decode, prefill, computed, joined, left))
    assert [list(line.work.items()) for line in written(tmp_path / "t.jsonl", steps)] == expected
