"""Other people's instrumentations in the same process, as they are released: one total per request in every trace."""

from __future__ import annotations

import json
import math
import subprocess
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from melodi_otel.testing.telemetry import OtlpReceiver, plain

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
PROGRAM = Path(__file__).with_name("others.py")
SECONDS = 0.6


class ModelServer(BaseHTTPRequestHandler):
    """Speaks what the clients of OpenAI and Ollama expect; takes its time, as a model would.

    No Ollama server comes from a package index: these answers follow the published API.
    """

    protocol_version = "HTTP/1.1"
    busy = threading.Event()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.busy.wait(SECONDS)
        body = json.dumps(self._openai(asked) if self.path.startswith("/v1/") else self._ollama(asked)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @staticmethod
    def _openai(asked: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": "jumps"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
        found = {"id": "c1", "object": "chat.completion", "created": 1, "model": asked["model"], "choices": [choice]}
        return {**found, "usage": usage}

    @staticmethod
    def _ollama(asked: dict[str, Any]) -> dict[str, Any]:
        times = {"total_duration": 9, "load_duration": 1, "prompt_eval_duration": 4, "eval_duration": 4}
        counts = {"prompt_eval_count": 4, "eval_count": 2}
        message = {"role": "assistant", "content": "jumps"}
        found = {"model": asked["model"], "created_at": "2026-01-01T00:00:00Z", "message": message, "done": True}
        return {**found, "done_reason": "stop", **times, **counts}

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Tests print what matters."""


@pytest.fixture
def model_server() -> Iterator[str]:
    """URL of a model server in this process, which is another one than the program's."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), ModelServer)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(5)


def run(python: str, env: dict[str, str], *words: str) -> str:
    """Output of the program, which must succeed; what the meter logs is a failure."""
    done = subprocess.run(
        [python, str(PROGRAM), *words], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "melodi_otel" not in done.stderr, done.stderr
    return done.stdout


def by_trace(spans: list[Any]) -> dict[bytes, list[tuple[str, dict[str, Any]]]]:
    traces: defaultdict[bytes, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for span in spans:
        traces[span.trace_id].append((span.name, plain(span.attributes)))
    return traces


def told(out: str) -> float:
    return float(out.split("told ")[1].split(maxsplit=1)[0])


def test_openllmetry_and_openlit_around_a_pipeline(
    peers_python: str, receiver: OtlpReceiver, environment: Callable[..., dict[str, str]]
) -> None:
    """Both wrap the pipeline, we the model: in every trace ours has total, theirs rollup, and the sum counts once."""
    out = run(peers_python, environment(receiver), "pipeline")
    traces = by_trace(receiver.spans(8))
    assert len(traces) == 2
    for spans in traces.values():
        found = {name: attributes for name, attributes in spans if "melodi.energy.quality" in attributes}
        owners = [name for name, attributes in found.items() if "melodi.energy.total" in attributes]
        assert len(owners) == 1
        assert owners[0].startswith("text_completion")
        total = found[owners[0]]["melodi.energy.total"]
        around = [attributes for name, attributes in found.items() if name not in owners]
        assert len(around) == 2
        assert [attributes["melodi.energy.rollup"] for attributes in around] == [total, total]
    everything = [attributes for spans in traces.values() for _, attributes in spans]
    assert math.fsum(a.get("melodi.energy.total", 0.0) for a in everything) == pytest.approx(told(out), rel=1e-12)


@pytest.mark.parametrize("which", ["openllmetry", "openlit", "openinference", "opentelemetry", "logfire"])
def test_clients_of_servers_on_this_host(
    which: str,
    peers_python: str,
    receiver: OtlpReceiver,
    environment: Callable[..., dict[str, str]],
    model_server: str,
) -> None:
    """Every call is one span with joules from its start to its end; three at once share, and the books balance."""
    # OpenInference, Logfire and OpenLLMetry's Ollama spans do not say where their server is.
    out = run(
        peers_python, environment(receiver, MELODI_LOCAL_PROVIDERS="ollama,openai"), "clients", which, model_server
    )
    spans = [s for s in receiver.spans(5) if any(a.key == "melodi.energy.quality" for a in s.attributes)]
    assert len(spans) == 5
    found = [plain(span.attributes) for span in spans]
    assert all(attributes["melodi.energy.total"] > 0 for attributes in found)
    assert {attributes["melodi.energy.method"] for attributes in found} == {"equal"}
    assert {attributes["melodi.energy.quality"] for attributes in found} <= {"interpolated", "partial"}
    assert math.fsum(a["melodi.energy.total"] for a in found) == pytest.approx(told(out), rel=1e-9)
    _, attributed, imbalance = out.split("books ")[1].split()[:3]
    assert abs(float(imbalance)) <= 1e-9
    assert float(attributed) == pytest.approx(told(out), rel=1e-9)
    alone, together = found[:2], found[2:]
    shared = math.fsum(a["melodi.energy.total"] for a in together)
    # Three at the same time use what one uses in that time, not three times as much.
    assert shared < 1.7 * max(a["melodi.energy.total"] for a in alone)
    assert all(attributes["melodi.energy.concurrency"] > 1.5 for attributes in together)


def test_two_instrumentations_of_one_client(
    peers_python: str, receiver: OtlpReceiver, environment: Callable[..., dict[str, str]], model_server: str
) -> None:
    """OpenLLMetry around OpenLIT around the same call: the inner span has total, the outer one rollup."""
    # OpenLLMetry's Ollama spans do not say where their server is.
    out = run(peers_python, environment(receiver, MELODI_LOCAL_PROVIDERS="ollama"), "clients", "both", model_server)
    spans = [s for s in receiver.spans(10) if any(a.key == "melodi.energy.quality" for a in s.attributes)]
    for listed in by_trace(spans).values():
        totals = [a["melodi.energy.total"] for _, a in listed if "melodi.energy.total" in a]
        rollups = [a["melodi.energy.rollup"] for _, a in listed if "melodi.energy.rollup" in a]
        assert len(totals) == 1
        assert rollups == totals
    everything = math.fsum(plain(s.attributes).get("melodi.energy.total", 0.0) for s in spans)
    assert everything == pytest.approx(told(out), rel=1e-9)


def test_a_server_elsewhere_gets_no_joules(
    peers_python: str, receiver: OtlpReceiver, environment: Callable[..., dict[str, str]], model_server: str
) -> None:
    """Spans that do not say where their model ran, and whose provider nobody called local, stay as they are."""
    run(peers_python, environment(receiver), "clients", "openinference", model_server)
    assert not [s for s in receiver.spans(5) if any(a.key.startswith("melodi.") for a in s.attributes)]
