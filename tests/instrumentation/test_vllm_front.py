"""A server's front end: every request once, its answers untouched, and who leaves is seen at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from melodi_otel.instrumentation.seam import Incoming, incoming
from melodi_otel.instrumentation.vllm.answers import Answers
from melodi_otel.instrumentation.vllm.complaints import Complaints
from melodi_otel.instrumentation.vllm.front import FrontEnd


def config(**more: Any) -> Any:
    """As much of a ``VllmConfig`` as is read."""
    return SimpleNamespace(model_config=SimpleNamespace(model="/m", served_model_name="tiny"), **more)


class Processor:
    """An output processor that keeps a state per sequence."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}

    def add_request(self, request: Any) -> str:
        self.request_states[request.request_id] = SimpleNamespace(
            prompt_len=3, detokenizer=None, num_cached_tokens=0, stats=None, output_kind=None, request_id="in"
        )
        return "added"


class Engine:
    """An engine client that answers twice for each of ``n`` sequences' sake, and notes how its stream was left."""

    def __init__(self, front: FrontEnd, vllm_config: Any = None, *, stepping: bool = True) -> None:
        self.vllm_config = vllm_config or config()
        self.processor = Processor()
        self.note = front.note(Processor.add_request)
        self.left: list[str] = []
        self.answers = [self.answer(False), self.answer(True)]
        self.fails: BaseException | None = None
        front.made(self, stepping=stepping)

    @staticmethod
    def answer(finished: bool) -> Any:
        part = SimpleNamespace(index=0, token_ids=[1], finish_reason="stop" if finished else None)
        return SimpleNamespace(outputs=[part], finished=finished, prompt_token_ids=[1, 2, 3])

    async def generate(self, prompt: Any, params: Any, request_id: str, **_: Any) -> AsyncIterator[Any]:
        self.note(self.processor, SimpleNamespace(request_id=f"{request_id}-in"))
        try:
            for answer in self.answers:
                await asyncio.sleep(0)
                yield answer
            if self.fails is not None:
                raise self.fails
        except GeneratorExit:
            self.left.append("closed")
            raise


@pytest.fixture
def front(calls: Any) -> FrontEnd:
    return FrontEnd(calls, Complaints(), lambda headers: ("from", dict(headers)))


@pytest.fixture
def engine(front: FrontEnd) -> Engine:
    return Engine(front)


def ask(front: FrontEnd, engine: Engine, *args: Any, **kwargs: Any) -> list[Any]:
    """All answers of a metered stream."""

    async def all_of_them() -> list[Any]:
        stream = front.stream(Engine.generate)(engine, "p", *args, **kwargs)
        return [answer async for answer in stream]

    return asyncio.run(all_of_them())


def params(**more: Any) -> Any:
    return SimpleNamespace(max_tokens=4, **more)


def test_a_request_and_its_answers(front: FrontEnd, engine: Engine, calls: Any) -> None:
    """One call for one request; every answer passes as the very object; the engine's id is bound."""
    assert [id(one) for one in ask(front, engine, params(), "cmpl-1-0")] == [id(one) for one in engine.answers]
    begin = calls.only.begin
    assert (begin.operation, begin.provider, begin.model) == ("text_completion", "vllm", "tiny")
    assert begin.attributes["gen_ai.response.id"] == "cmpl-1-0"
    assert calls.only.children == ["cmpl-1-0-in"]
    assert calls.only.ended.outcome == "stop"


def test_arguments_by_name(front: FrontEnd, engine: Engine, calls: Any) -> None:
    """What is given by name is found as well."""
    ask(front, engine, params=params(), request_id="chatcmpl-1")
    assert calls.only.begin.operation == "chat"


@pytest.mark.parametrize(
    ("request_id", "operation"),
    [("cmpl-1", "text_completion"), ("chatcmpl-1", "chat"), ("resp_1", "chat"), ("msg_1", "chat")],
)
def test_operations(front: FrontEnd, engine: Engine, calls: Any, request_id: str, operation: str) -> None:
    """How an id begins tells a chat from a completion."""
    ask(front, engine, params(), request_id)
    assert calls.only.begin.operation == operation


def test_pooling(front: FrontEnd, engine: Engine, calls: Any) -> None:
    """``encode`` with a task for embeddings is one; other tasks keep their name."""
    for task, operation in (("embed", "embeddings"), ("classify", "classify")):

        async def encode(stream: Any = front.stream(Engine.generate, pooling=True), task: str = task) -> None:
            async for _ in stream(engine, "p", SimpleNamespace(task=task), "r"):
                pass

        asyncio.run(encode())
        assert calls.made[-1].begin.operation == operation


def test_an_adapter_is_the_model(front: FrontEnd, engine: Engine, calls: Any) -> None:
    """A LoRA adapter is what was asked for."""
    ask(front, engine, params(), "r", lora_request=SimpleNamespace(lora_name="poet"))
    assert (calls.only.begin.model, calls.only.begin.adapter) == ("poet", "poet")


def test_trace_headers(front: FrontEnd, engine: Engine, calls: Any) -> None:
    """The headers that vLLM passes on say where the request came from."""
    ask(front, engine, params(), "r", trace_headers={"traceparent": "00-a"})
    assert calls.only.begin.origin == ("from", {"traceparent": "00-a"})


def test_a_served_request_knows_better(front: FrontEnd, engine: Engine, calls: Any) -> None:
    """What the server's request said, with its baggage, wins over vLLM's own headers."""
    with arrived(Incoming({}, origin="asgi")):
        ask(front, engine, params(), "r", trace_headers={"traceparent": "00-a"})
    assert calls.only.begin.origin == "asgi"


@contextmanager
def arrived(request: Incoming) -> Iterator[None]:
    token = incoming.set(request)
    try:
        yield
    finally:
        incoming.reset(token)


def test_who_leaves_closes_the_engines_stream(front: FrontEnd, engine: Engine, calls: Any) -> None:
    """A caller that stops early ends the request as an abort, and the engine hears it then, not when garbage is collected."""

    async def leave() -> None:
        stream = front.stream(Engine.generate)(engine, "p", params(), "r")
        await anext(stream)
        await stream.aclose()
        assert engine.left == ["closed"]

    asyncio.run(leave())
    assert calls.only.ended.outcome == "abort"


def test_a_cancelled_task_aborts(front: FrontEnd, engine: Engine, calls: Any) -> None:
    """A task that is cancelled in the middle, as a server does when its client hangs up, ends it as an abort."""
    gate = asyncio.Event()

    async def waits(*_: Any, **__: Any) -> AsyncIterator[Any]:
        yield engine.answers[0]
        await gate.wait()

    async def cancel() -> None:
        async def consume() -> None:
            async for _ in front.stream(waits)(engine, "p", params(), "r"):
                started.set()

        started = asyncio.Event()
        task = asyncio.create_task(consume())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert calls.only.ended.outcome == "abort"


def test_what_the_engine_raises_comes_through(front: FrontEnd, engine: Engine, calls: Any) -> None:
    """An error passes as it is and ends the request as one."""
    engine.answers = engine.answers[:1]
    engine.fails = ValueError("no")
    with pytest.raises(ValueError, match="no"):
        ask(front, engine, params(), "r")
    assert calls.only.ended.error is engine.fails


@pytest.mark.parametrize("what", ["begin", "now_ns"])
def test_our_failures_are_ours(
    front: FrontEnd,
    engine: Engine,
    calls: Any,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where we fail the caller has all its answers, and it is said once."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(calls, what, fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert ask(front, engine, params(), "r") == engine.answers
    assert len(caplog.records) == 1


def test_requests_of_an_engine_that_is_not_watched(front: FrontEnd, calls: Any) -> None:
    """Where steps are not seen each request answers how many tokens it has."""
    ask(front, Engine(front, stepping=False), params(), "r")
    assert calls.only.begin.probe is not None


def test_beams_are_one_request(front: FrontEnd, engine: Engine, calls: Any) -> None:
    """Whatever a server's beam search asks of the engine, it is one request with the beams that were returned."""
    inner = front.stream(Engine.generate)

    async def beam_search(serving: Any, prompt: Any, request_id: str, beams: Any, *_: Any) -> AsyncIterator[Any]:
        for number in range(3):
            async for _ in inner(serving.engine_client, prompt, params(), f"{request_id}-b{number}"):
                pass
        yield SimpleNamespace(
            outputs=[SimpleNamespace(index=0, token_ids=[1, 2], finish_reason="stop")],
            finished=True,
            prompt_token_ids=[1, 2, 3],
        )

    async def search() -> list[Any]:
        serving = SimpleNamespace(engine_client=engine)
        return [answer async for answer in front.beams(beam_search)(serving, "p", "cmpl-1", params())]

    assert len(asyncio.run(search())) == 1
    assert calls.only.children == [f"cmpl-1-b{number}-in" for number in range(3)]
    assert calls.only.ended.output_tokens == 2


@pytest.mark.parametrize(
    ("role", "extra", "reason"),
    [
        (None, None, None),
        ("kv_producer", None, "phase_elsewhere"),
        ("kv_both", None, None),
        ("kv_both", {"kv_transfer_params": {"do_remote_decode": True}}, "phase_elsewhere"),
        ("kv_both", {"kv_transfer_params": {"do_remote_prefill": True}}, "phase_elsewhere"),
        ("kv_both", {"kv_transfer_params": {"do_remote_prefill": False}}, None),
    ],
)
def test_phases_elsewhere(front: FrontEnd, calls: Any, role: Any, extra: Any, reason: Any) -> None:
    """Where another engine computes the other phase, by this engine's role or by what a router says, the request says so."""
    engine = Engine(front, config(kv_transfer_config=SimpleNamespace(kv_role=role)))
    ask(front, engine, params(extra_args=extra), "r")
    assert calls.only.begin.reason == reason


class Usage:
    """Like vLLM's ``UsageInfo``: any field may be added."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


def tell(calls: Any, *, energy: bool = True, requests: int = 1, done: bool = True) -> dict[str, Any]:
    """The usage of an answer that is made while its request is served."""
    answers = Answers(calls, Complaints(), energy=energy, show_on=None)
    front = FrontEnd(calls, Complaints(), None, answers)
    engine = Engine(front)
    original = Usage.__init__
    wrapped = answers.usage(original)
    with arrived(Incoming({})):
        for number in range(requests):
            if done:
                ask(front, engine, params(), f"r{number}")
            else:
                front.begin(engine, params(), f"r{number}")
        usage = Usage()
        wrapped(usage, prompt_tokens=3)
    return usage.__dict__


def test_usage_tells_energy(calls: Any) -> None:
    """An answer's usage has what is known of all its requests, under the id that each of them was begun with."""
    told = tell(calls, requests=2)
    (answer,) = {call.begin.answer for call in calls.made}
    assert told == {"prompt_tokens": 3, "energy": {"id": answer, "of": ["r0", "r1"], "final": False}}
    assert len(answer) == 32


@pytest.mark.parametrize("how", [{"energy": False}, {"done": False}, {"requests": 0}])
def test_usage_as_it_was(calls: Any, how: dict[str, Any]) -> None:
    """Nobody asked for it, the answer is not over yet, or it is for no request: nothing is added."""
    assert tell(calls, **how) == {"prompt_tokens": 3}


def test_usage_outside_of_a_request(calls: Any) -> None:
    """A usage that is made for nobody has nothing."""
    usage = Usage()
    Answers(calls, Complaints(), energy=True, show_on=None).usage(Usage.__init__)(usage, prompt_tokens=1)
    assert usage.__dict__ == {"prompt_tokens": 1}


def attach(show_on: Any, monkeypatch: pytest.MonkeyPatch, calls: Any) -> Any:
    """What a server's ``attach_router`` returns with our requests on its page."""
    monkeypatch.setitem(globals(), "get_prometheus_registry", lambda: "the registry")
    answers = Answers(calls, Complaints(), energy=False, show_on=show_on)
    return answers.page(lambda app: f"attached to {app}")("app")


def test_requests_go_on_the_servers_page(calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one server the registry that it shows is told of, after it has attached its page."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    shown: list[Any] = []
    assert attach(shown.append, monkeypatch, calls) == "attached to app"
    assert shown == ["the registry"]


def test_several_servers_have_no_page_of_their_own(calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where several processes write one page nothing of ours is on it."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere")
    shown: list[Any] = []
    attach(shown.append, monkeypatch, calls)
    assert shown == []


def test_a_page_that_refuses(calls: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A registry that has such families already costs our page there, and the server nothing."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)

    def refuse(_: Any) -> bool:
        raise ValueError("Duplicated timeseries")

    assert attach(refuse, monkeypatch, calls) == "attached to app"
    assert "cannot be shown on vLLM's own /metrics" in caplog.text
