"""A ``Calls`` that is a list, a clock that moves by being read, and one tiny model of each kind."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's library is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import defaultdict
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from melodi_otel.attribution.meter import Decode, Key, current
from melodi_otel.instrumentation.transformers import TransformersInstrumentor
from melodi_otel.testing import tiny_model

TICK_NS = 1000
"""How far one reading moves the clock."""


@dataclass
class Step:
    engine: Any
    lane: int
    seq: int
    t0_ns: int
    t1_ns: int
    devices: Any
    decode: Decode
    prefill: tuple
    computed: tuple
    joined: tuple
    left: tuple


class RecordingMeter:
    """What was said, in order."""

    def __init__(self) -> None:
        self.engines: list[tuple[Any, dict[str, Any]]] = []
        self.steps: list[Step] = []

    def engine(self, engine, t_ns, state="ready", **facts):
        self.engines.append((engine, {"state": state, **facts}))

    def step(self, engine, lane, seq, t0_ns, t1_ns, devices=None, *, decode=Decode(0, 0), prefill=(), computed=(),
             joined=(), left=()):  # fmt: skip
        self.steps.append(
            Step(
                engine,
                lane,
                seq,
                t0_ns,
                t1_ns,
                devices,
                decode,
                tuple(prefill),
                tuple(computed),
                tuple(joined),
                tuple(left),
            )
        )

    def close(self, *args, **kwargs):
        return Future()


@dataclass
class Recorded:
    """One call, as an ``OpenCall``."""

    key: Key
    begin: Any
    calls: Any
    children: list[str] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)
    entered: int = 0
    left_with: list[Any] = field(default_factory=list)
    steps_at_end: int = 0

    @contextmanager
    def active(self):
        self.entered += 1
        token = current.set(self.key)
        try:
            yield
        except BaseException as error:
            self.left_with.append(error)
            raise
        else:
            self.left_with.append(None)
        finally:
            current.reset(token)

    def bind(self, child_id):
        self.children.append(child_id)

    def end(self, end):
        if self.begin.probe is not None:
            self.begin.probe()  # as a meter does before a close takes effect
        self.steps_at_end = len(self.calls.meter.steps)
        self.ends.append(end)

    @property
    def ended(self):
        """Its only end."""
        assert len(self.ends) == 1
        return self.ends[0]

    @property
    def steps(self):
        """The steps on its lane."""
        steps = self.calls.meter.steps
        lanes = {(s.engine, s.lane) for s in steps if any(row.id in self.children for row in s.prefill)}
        return [step for step in steps if (step.engine, step.lane) in lanes]

    @property
    def work(self):
        """Tokens by kind over all its steps: prefill, decode, computed."""
        total = defaultdict(int)
        for step in self.steps:
            total["prefill"] += sum(row.tokens for row in step.prefill)
            total["decode"] += step.decode.n
            total["computed"] += sum(row.tokens for row in step.computed)
        return total["prefill"], total["decode"], total["computed"]


class RecordingCalls:
    """A list that is a ``Calls``."""

    group = "g"

    def __init__(self) -> None:
        self.meter = RecordingMeter()
        self.made: list[Recorded] = []
        self._now = 1_000_000
        self.here = None

    def now_ns(self):
        self._now += TICK_NS
        return self._now

    def origin(self):
        return self.here

    def begin(self, begin):
        call = Recorded(Key(self.group, f"r{len(self.made)}"), begin, self)
        self.made.append(call)
        return call

    def so_far(self, answer, keys):
        return {"id": answer, "of": [key.request for key in keys], "final": False}

    @property
    def only(self):
        """The only call."""
        assert len(self.made) == 1
        return self.made[0]


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def calls():
    return RecordingCalls()


@pytest.fixture
def instrumented(calls):
    """``calls``, with transformers instrumented for it."""
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    yield calls
    instrumentor.uninstrument()


@pytest.fixture
def without_and_with(calls):
    """A function: what its argument returns or raises, first without the instrumentation, then with it."""

    def ask(act):
        found = []
        for instrument in (False, True):
            instrumentor = TransformersInstrumentor(calls)
            if instrument:
                instrumentor.instrument()
            try:
                found.append(act())
            except Exception as error:
                found.append(error)
            finally:
                instrumentor.uninstrument()
        return found

    return ask


@pytest.fixture(scope="session")
def llama():
    return tiny_model.llama()


@pytest.fixture(scope="session")
def t5():
    return tiny_model.t5()


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_model.tokenizer()


class Served:
    """A model that is served by continuous batching, and what its forward passes were given."""

    def __init__(self, monkeypatch):
        import transformers

        self._transformers = transformers
        self._five = hasattr(transformers, "ContinuousBatchingConfig")
        self.model = tiny_model.llama()
        self.passes = []
        self.before = lambda step: None
        """Called in the loop's thread before every forward pass, with its number."""
        forward = self.model.forward

        def watched(*args, **kwargs):
            self.before(len(self.passes))
            self.passes.append((kwargs["input_ids"].shape[-1], int(kwargs["position_ids"].sum())))
            return forward(*args, **kwargs)

        monkeypatch.setattr(self.model, "forward", watched)
        if not self._five:
            import torch

            # 4.57 asks an accelerator for its memory, and records metrics in a way that the oldest API does not know
            package = "transformers.generation.continuous_batching"
            monkeypatch.setattr(
                f"{package}.cache.get_device_and_memory_breakdown", lambda: (torch.device("cpu"), 1 << 30, 0, 0)
            )
            monkeypatch.setattr("transformers.utils.metrics._has_opentelemetry", False)
            self.model.set_attn_implementation("sdpa_paged")

    def sized(self, *, blocks=16, tokens=64, page=64, **more):
        """Small caches: by default they are as large as the free memory allows, which takes its time."""
        return self._transformers.ContinuousBatchingConfig(
            num_blocks=blocks, max_batch_tokens=tokens, page_size=page, **more
        )

    def manager(self, *, streaming=False, settings=None, **sizes):
        settings = self._transformers.GenerationConfig(**{"do_sample": False, **(settings or {})})
        settings.eos_token_id = settings.eos_token_id or -1
        if self._five:
            return self.model.init_continuous_batching(settings, self.sized(**sizes))
        settings.num_blocks, settings.max_batch_tokens = sizes.get("blocks", 16), sizes.get("tokens", 64)
        return self.model.init_continuous_batching(settings, streaming=streaming)

    @contextmanager
    def running(self, **options):
        manager = self.manager(**options)
        manager.start()
        try:
            yield manager
        finally:
            manager.stop(block=True, timeout=30)


@pytest.fixture
def served(monkeypatch):
    return Served(monkeypatch)
