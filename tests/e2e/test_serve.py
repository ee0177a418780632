"""The real ``transformers serve``, metered without knowing it: usage as its own, context across threads, clients that leave."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from melodi_otel.testing.telemetry import OtlpReceiver, plain

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

TRACED = Path(__file__).with_name("serve_traced.py")
QUESTION = [{"role": "user", "content": "the quick brown fox"}]
TRACE = "0af7651916cd43dd8448eb211c80319c"


class Server:
    """A running server and what it says of itself.

    Args:
        folder: the model.
        port: where it listens.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.model = str(folder)
        self.url = f"http://127.0.0.1:{port}"

    def body(self, tokens: int, *, stream: bool = False) -> dict[str, Any]:
        return {"model": self.model, "messages": QUESTION, "max_tokens": tokens, "stream": stream, "temperature": 0}

    def ask(self, tokens: int, **headers: str) -> dict[str, Any]:
        """An answer in one piece."""
        import httpx

        done = httpx.post(f"{self.url}/v1/chat/completions", json=self.body(tokens), headers=headers, timeout=60)
        assert done.status_code == 200, done.text
        return done.json()

    def stream(self, tokens: int, *, leave_after: int | None = None, **headers: str) -> list[dict[str, Any]]:
        """The chunks of a streamed answer; the client may leave after some of them."""
        import httpx

        chunks: list[dict[str, Any]] = []
        body = self.body(tokens, stream=True)
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunks.append(json.loads(line[6:]))
                if leave_after is not None and len(chunks) >= leave_after:
                    break
        return chunks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, need: Callable[..., None]) -> Path:
    """A tiny model that never ends by itself, slow enough to be left, with its tokenizer, in a directory."""
    need("torch", "transformers", "fastapi", "uvicorn", "httpx")
    from melodi_otel.testing import tiny_model

    folder = tmp_path_factory.mktemp("serve") / "tiny"
    tiny_model.llama(layers=6).save_pretrained(folder)
    tiny_model.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def served(
    model: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    environment: Callable[..., dict[str, str]],
    receiver: OtlpReceiver,
    free_port: Callable[[], int],
) -> Iterator[tuple[Server, OtlpReceiver]]:
    """A server under ``melodi-otel run`` and where its telemetry goes; the parameter says which command."""
    import importlib.util

    import httpx

    if importlib.util.find_spec("transformers.cli") is None:
        pytest.skip("this transformers serves by plain threads and has no server of its own to wrap")
    port = free_port()
    scripts = Path(sys.executable).parent
    command: list[str] = {
        "transformers serve": [str(scripts / "transformers")],
        "traced": [sys.executable, str(TRACED)],
        "continuous": [str(scripts / "transformers")],
    }[request.param]
    command += ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--log-level", "warning"]
    if request.param == "continuous":
        command += ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "64"]
    env = environment(receiver, MELODI_LABELS="tenant=baggage:tenant.id", MELODI_CONSOLE="0")
    runner = [str(scripts / "melodi-otel"), "run", "--", *command]
    said = tmp_path / "said"
    with said.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(runner, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, said.read_text(encoding="utf-8")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                assert time.monotonic() < deadline, said.read_text(encoding="utf-8")
                time.sleep(0.2)
        yield Server(model, port), receiver
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    text = said.read_text(encoding="utf-8")
    assert "Traceback" not in text, text
    assert "melodi" not in text, text


def arrived(receiver: OtlpReceiver, number: int, which: Callable[[Any], bool]) -> list[Any]:
    """``number`` spans of that sort, in the order of their starts."""
    found = receiver.spans(number, timeout_s=30, where=which)
    assert len(found) == number
    return sorted(found, key=lambda span: span.start_time_unix_nano)


def is_generation(span: Any) -> bool:
    return "gen_ai.operation.name" in plain(span.attributes)


def is_request(span: Any) -> bool:
    return span.kind == span.SPAN_KIND_SERVER and "completions" in span.name


@pytest.mark.parametrize("served", ["transformers serve"], indirect=True)
def test_usage_and_clients_that_leave(served: tuple[Server, OtlpReceiver]) -> None:
    """One span per request with the server's own usage and joules; a client that leaves ends its span as an abort."""
    server, receiver = served
    answer = server.ask(20)
    chunks = server.stream(30)
    left = server.stream(900, leave_after=4)
    after = server.ask(5)
    spans = arrived(receiver, 4, is_generation)
    found = [plain(span.attributes) for span in spans]
    for attributes, usage in zip(
        (found[0], found[1], found[3]), (answer["usage"], chunks[-1]["usage"], after["usage"]), strict=True
    ):
        assert attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    for attributes in found:
        assert attributes["gen_ai.request.model"] == "tiny"
        assert attributes["melodi.energy.total"] > 0
        assert "error.type" not in attributes
    assert [bool(attributes.get("gen_ai.request.stream")) for attributes in found] == [False, True, True, False]
    assert [attributes["gen_ai.response.finish_reasons"] for attributes in found] == [
        ["length"],
        ["length"],
        ["abort"],
        ["length"],
    ]
    assert len(left) <= found[2]["gen_ai.usage.output_tokens"] + 1 < 900
    assert spans[2].status.code == 0
    assert not any(span.parent_span_id for span in spans)


@pytest.mark.parametrize("served", ["traced"], indirect=True)
def test_context_reaches_the_inference_thread(served: tuple[Server, OtlpReceiver], need: Callable[..., None]) -> None:
    """Each generation is a child of its own HTTP request, in the caller's trace, with its baggage, and no other's."""
    need("opentelemetry.instrumentation.fastapi")
    server, receiver = served

    def headers(number: int) -> dict[str, str]:
        return {"traceparent": f"00-{TRACE[:-1]}{number}-00f067aa0ba902b{number}-01", "baggage": f"tenant.id=t{number}"}

    clients = [
        threading.Thread(target=server.ask, args=(12,), kwargs=headers(1)),
        threading.Thread(target=server.stream, args=(12,), kwargs=headers(2)),
        threading.Thread(target=server.ask, args=(12,), kwargs=headers(3)),
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    server.ask(3)
    spans = arrived(receiver, 4, is_generation)
    traced = {span.trace_id.hex(): span for span in spans}
    arrived(receiver, 4, is_request)
    known = {span.span_id: span for span in receiver.spans()}

    def caller(span: Any) -> str:
        """Who called the HTTP request around ``span``: instrumentations may put spans of their own in between."""
        while span.kind != span.SPAN_KIND_SERVER:
            span = known[span.parent_span_id]
        return span.parent_span_id.hex()

    for number in (1, 2, 3):
        span = traced.pop(f"{TRACE[:-1]}{number}")
        assert plain(span.attributes)["tenant"] == f"t{number}"
        assert caller(span) == f"00f067aa0ba902b{number}"
    (alone,) = traced.values()
    assert "tenant" not in plain(alone.attributes)
    assert not caller(alone)


@pytest.mark.parametrize("served", ["continuous"], indirect=True)
def test_continuous_batching(served: tuple[Server, OtlpReceiver]) -> None:
    """With --continuous-batching too, a request is one span with the server's own usage, by the steps of the shared loop."""
    server, receiver = served
    answer = server.ask(20)
    chunks = server.stream(30)
    found = [plain(span.attributes) for span in arrived(receiver, 2, is_generation)]
    for attributes, usage in zip(found, (answer["usage"], chunks[-1]["usage"]), strict=True):
        assert attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
        assert attributes["melodi.energy.total"] > 0
