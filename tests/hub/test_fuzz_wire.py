from __future__ import annotations

import gc
import importlib.util
import logging
import sys
import tracemalloc
from pathlib import Path

import pytest


@pytest.fixture
def fuzzer(monkeypatch):
    path = Path(__file__).with_name("fuzz_wire.py")
    spec = importlib.util.spec_from_file_location("fuzz_wire", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fuzz_wire", module)
    spec.loader.exec_module(module)
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # what is refused is logged, and much is refused
    yield module
    logging.disable(level)


def test_a_short_run(fuzzer):
    """A hundred small worlds of programs that say anything: no exception but `WireError`, and books that balance."""
    tally = fuzzer.run(seed=7, cases=100)
    assert tally.frames > 5000
    assert tally.messages > 5000
    assert tally.refused > 500


def test_it_repeats(fuzzer):
    """The same seed is the same case, so what it finds can be looked at."""
    first, second = (fuzzer.run(seed=3, cases=2) for _ in range(2))
    assert (first.frames, first.messages, first.settlings) == (second.frames, second.messages, second.settlings)


def test_it_notices(fuzzer, monkeypatch):
    """With a hub that lets requests nest in circles it fails, and names the case."""
    monkeypatch.setattr("melodi_otel.attribution.core.may_hold", lambda outer, inner: True)
    with pytest.raises((AssertionError, RecursionError)) as caught:
        fuzzer.run(seed=1, cases=50)
    assert "--seed" in caught.value.__notes__[0]


def test_nothing_is_kept_of_what_was_refused(fuzzer):
    """After a thousand broken frames on connections that ended, a reader holds no more memory than before."""
    chance = fuzzer.Chance(5)
    world = fuzzer.World(chance, fuzzer.Tally())

    def feed():
        for _ in range(1000):
            frames = fuzzer.wire.Frames(fuzzer.wire.ToHub)
            try:
                frames.feed(world.broken(fuzzer.framed(0, [world.message()])))
            except fuzzer.wire.WireError:
                continue

    feed()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        feed()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 100_000
        assert tracemalloc.get_traced_memory()[1] - before < 8 << 20
    finally:
        tracemalloc.stop()
