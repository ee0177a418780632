"""What is patched in vLLM and when: nothing before there is an engine, what is missing is left out, and all can be undone."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from melodi_otel import program, vllm_plugin
from melodi_otel.config import VLLM_ENGINE_VARIABLE
from melodi_otel.errors import ConfigError
from melodi_otel.instrumentation.vllm import VllmInstrumentor, awaken
from melodi_otel.instrumentation.vllm.instrumentor import ASYNC, CORE, EXECUTOR, SYNC
from melodi_otel.testing.vllm_scheduler import FakeScheduler

CONFIG = SimpleNamespace(
    parallel_config=SimpleNamespace(),
    model_config=SimpleNamespace(model="/m", served_model_name="tiny"),
    scheduler_config=SimpleNamespace(get_scheduler_cls=lambda: FakeScheduler),
)


class Vllm:
    """Modules with vLLM's names and as much of its classes as is patched."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

        class AsyncLLM:
            def __init__(self, vllm_config: Any) -> None:
                self.vllm_config = vllm_config

            async def generate(self, *_: Any, **__: Any) -> Any:
                yield

            async def encode(self, *_: Any, **__: Any) -> Any:
                yield

        class LLMEngine:
            def __init__(self, vllm_config: Any) -> None:
                self.vllm_config = vllm_config

            def add_request(self, *_: Any) -> None: ...

            def step(self) -> list[Any]:
                return []

            def abort_request(self, *_: Any) -> None: ...

        class Executor:
            def __init__(self, vllm_config: Any) -> None: ...

        class EngineCore:
            def __init__(self, vllm_config: Any) -> None:
                self.vllm_config = vllm_config
                self.scheduler = FakeScheduler()
                Executor(vllm_config)

            def shutdown(self) -> None: ...

        class EngineCoreProc(EngineCore):
            def run_busy_loop(self) -> str:
                return "ran"

        class DPEngineCoreProc(EngineCoreProc):
            def run_busy_loop(self) -> str:
                return "ran beside others"

        self.AsyncLLM = self.add(ASYNC, AsyncLLM)
        self.LLMEngine = self.add(SYNC, LLMEngine)
        self.EngineCore = self.add(CORE, EngineCore)
        self.EngineCoreProc = self.add(CORE, EngineCoreProc)
        self.DPEngineCoreProc = self.add(CORE, DPEngineCoreProc)
        self.Executor = self.add(EXECUTOR, Executor)

    def add(self, module: str, cls: type) -> Any:
        if module not in sys.modules or isinstance(sys.modules[module], _Made) is False:
            self._patch.setitem(sys.modules, module, _Made(module))
        setattr(sys.modules[module], cls.__name__, cls)
        return cls

    def classes(self) -> dict[str, dict[str, Any]]:
        """Every attribute of every class, to compare."""
        return {
            cls.__name__: dict(vars(cls))
            for cls in (
                self.AsyncLLM,
                self.LLMEngine,
                self.EngineCore,
                self.EngineCoreProc,
                self.DPEngineCoreProc,
                self.Executor,
            )
        }


class _Made(ModuleType):
    pass


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Vllm:
    monkeypatch.setenv(VLLM_ENGINE_VARIABLE, "1")
    return Vllm(monkeypatch)


@pytest.fixture
def instrumentor(calls: Any, vllm: Vllm) -> Iterator[VllmInstrumentor]:
    made = VllmInstrumentor(calls)
    yield made
    made.uninstrument()


def states(calls: Any) -> list[str]:
    return [told["state"] for _, told in calls.meter.engines]


def test_a_core_is_told_from_loading_on(instrumentor: VllmInstrumentor, vllm: Vllm, calls: Any) -> None:
    """Loading when its executor is made, ready when it is, gone when it is shut down; its scheduler is watched meanwhile."""
    instrumentor.instrument()
    core = vllm.EngineCore(CONFIG)
    assert states(calls) == ["loading", "ready"]
    assert "schedule" in vars(core.scheduler)
    core.shutdown()
    assert states(calls) == ["loading", "ready", "gone"]


@pytest.mark.parametrize(("name", "ran"), [("EngineCoreProc", "ran"), ("DPEngineCoreProc", "ran beside others")])
def test_a_core_that_was_made_before(
    instrumentor: VllmInstrumentor, vllm: Vllm, calls: Any, name: str, ran: str
) -> None:
    """A core in a process of its own loads its plug-ins while it is made: its loop comes early enough."""
    core = getattr(vllm, name)(CONFIG)
    instrumentor.instrument()
    assert core.run_busy_loop() == ran
    assert states(calls) == ["ready"]


@pytest.mark.parametrize("make", ["AsyncLLM", "LLMEngine"])
def test_it_says_once_what_it_does(
    instrumentor: VllmInstrumentor, vllm: Vllm, make: str, caplog: pytest.LogCaptureFixture
) -> None:
    """When a front end is made the log says what is metered and how."""
    instrumentor.instrument()
    with caplog.at_level(logging.INFO, "vllm.melodi_otel"):
        getattr(vllm, make)(CONFIG)
    assert [record.getMessage() for record in caplog.records] == [
        "melodi_otel meters the requests of tiny; joules are divided by engine steps"
    ]


def test_a_scheduler_of_another_kind(
    instrumentor: VllmInstrumentor, vllm: Vllm, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the scheduler's class lacks what is watched, requests tell their tokens, and the log says so."""
    instrumentor.instrument()
    other = SimpleNamespace(
        **{**vars(CONFIG), "scheduler_config": SimpleNamespace(get_scheduler_cls=lambda: SimpleNamespace)}
    )
    with caplog.at_level(logging.INFO, "vllm.melodi_otel"):
        vllm.AsyncLLM(other)
    assert "by their tokens, because its steps are not seen from here" in caplog.text


def test_a_name_that_is_missing(
    instrumentor: VllmInstrumentor, vllm: Vllm, calls: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What this vLLM lacks is named in a warning; the rest is patched."""
    del vllm.AsyncLLM.generate
    with caplog.at_level(logging.WARNING, "vllm.melodi_otel"):
        instrumentor.instrument()
    assert [record.getMessage() for record in caplog.records] == [
        f"melodi_otel: this vLLM has no {ASYNC}.AsyncLLM.generate"
    ]
    vllm.EngineCore(CONFIG)
    assert states(calls) == ["loading", "ready"]


def test_what_may_be_missing(instrumentor: VllmInstrumentor, vllm: Vllm, caplog: pytest.LogCaptureFixture) -> None:
    """A name that other versions lack is no warning."""
    del vllm.AsyncLLM.encode
    with caplog.at_level(logging.WARNING, "vllm.melodi_otel"):
        instrumentor.instrument()
    assert caplog.records == []


def test_everything_is_put_back(instrumentor: VllmInstrumentor, vllm: Vllm) -> None:
    """After the end every class is what it was, and a second beginning patches once more."""
    before = vllm.classes()
    instrumentor.instrument()
    assert vllm.classes() != before
    instrumentor.uninstrument()
    assert vllm.classes() == before
    instrumentor.instrument()
    assert vllm.classes() != before


def test_a_second_time_changes_nothing(instrumentor: VllmInstrumentor, vllm: Vllm) -> None:
    """Instrumented twice, everything is wrapped once."""
    instrumentor.instrument()
    once = vllm.classes()
    instrumentor.instrument()
    assert vllm.classes() == once


def test_an_engine_whose_description_fails(
    instrumentor: VllmInstrumentor, vllm: Vllm, caplog: pytest.LogCaptureFixture
) -> None:
    """A configuration that cannot be read costs the joules, never the engine."""
    instrumentor.instrument()
    engine = vllm.AsyncLLM(SimpleNamespace())
    assert engine.vllm_config == SimpleNamespace()
    assert "cannot be described" in caplog.text


# --- before there is an engine ---


class Woken:
    """Counts how often it was woken, and is the instrumentation then."""

    def __init__(self, library: VllmInstrumentor | None) -> None:
        self.times = 0
        self._library = library

    def __call__(self) -> VllmInstrumentor | None:
        self.times += 1
        if self._library is not None:
            self._library.instrument()
        return self._library


def test_nothing_before_there_is_an_engine(instrumentor: VllmInstrumentor, vllm: Vllm) -> None:
    """Classes are there, and nobody is woken."""
    woken = Woken(instrumentor)
    awaken.when_made(woken)
    assert woken.times == 0


@pytest.mark.parametrize("make", ["AsyncLLM", "LLMEngine", "EngineCore", "Executor"])
def test_whoever_is_made_first_wakes_it(instrumentor: VllmInstrumentor, vllm: Vllm, make: str) -> None:
    """The first engine, front end, core or executor wakes it; those that come later do not."""
    woken = Woken(instrumentor)
    awaken.when_made(woken)
    getattr(vllm, make)(CONFIG)
    vllm.AsyncLLM(CONFIG)
    vllm.EngineCore(CONFIG)
    assert woken.times == 1


def test_the_first_core_is_told_from_loading_on(instrumentor: VllmInstrumentor, vllm: Vllm, calls: Any) -> None:
    """The core that wakes it is seen loading and ready as any other."""
    awaken.when_made(Woken(instrumentor))
    core = vllm.EngineCore(CONFIG)
    assert states(calls) == ["loading", "ready"]
    assert "schedule" in vars(core.scheduler)


def test_the_first_core_of_a_process(instrumentor: VllmInstrumentor, vllm: Vllm, calls: Any) -> None:
    """A core whose loop runs in a process that had no plug-in when it began is seen from its loop on."""
    core = vllm.DPEngineCoreProc(CONFIG)
    awaken.when_made(Woken(instrumentor))
    assert core.run_busy_loop() == "ran beside others"
    assert states(calls) == ["ready"]


def test_an_engine_has_its_number_before_its_cores(instrumentor: VllmInstrumentor, vllm: Vllm) -> None:
    """A front end numbers its engine before it is made, for the processes that it starts; one that joins others does not."""
    awaken.when_made(Woken(instrumentor))
    vllm.AsyncLLM(CONFIG)
    numbered = os.environ[VLLM_ENGINE_VARIABLE]
    assert numbered != "1"
    vllm.AsyncLLM(CONFIG)
    assert os.environ[VLLM_ENGINE_VARIABLE] != numbered


def test_a_meter_that_cannot_be_woken(vllm: Vllm, caplog: pytest.LogCaptureFixture) -> None:
    """Where waking fails the engine is made, it is said, and nobody tries again."""

    def fail() -> None:
        raise RuntimeError("no meter")

    awaken.when_made(fail)
    assert vllm.EngineCore(CONFIG).vllm_config is CONFIG
    vllm.AsyncLLM(CONFIG)
    assert caplog.text.count("vLLM is not metered") == 1


# --- the plug-in ---


@pytest.mark.parametrize(
    "error", [ConfigError("MELODI_SAMPLE_HZ='x' cannot be used"), RuntimeError("no"), ImportError("no")]
)
def test_the_plug_in_never_raises(
    monkeypatch: pytest.MonkeyPatch, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM does not catch what a plug-in raises: whatever fails is one line in the log."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(program, "prepare", fail)
    vllm_plugin.register()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "melodi_otel is off" in caplog.text


def test_the_plug_in_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM calls it in every process, perhaps twice: the second time changes nothing."""
    melodi = program.uninstrument
    melodi()
    vllm_plugin.register()
    first = program._standby
    vllm_plugin.register()
    assert program._standby is first
    assert first is not None
    assert first.libraries == {"vllm", "asgi"}
    assert first.runtime is None
    melodi()


def test_the_plug_in_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``MELODI_DISABLED=1`` nothing is prepared."""
    program.uninstrument()
    monkeypatch.setenv("MELODI_DISABLED", "1")
    vllm_plugin.register()
    assert program._standby is None
