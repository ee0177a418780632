"""One reading for what other people's GenAI spans say."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Status, StatusCode

from melodi_otel.telemetry.genai import Seen, is_this_host, kind_of, read


def span(name: str = "chat m", scope: str = "x", status: Status | None = None, **attributes: Any) -> ReadableSpan:
    dotted = {key.replace("__", "."): value for key, value in attributes.items()}
    return ReadableSpan(
        name, attributes=dotted, instrumentation_scope=InstrumentationScope(scope), status=status or Status()
    )


# As the released packages write them, recorded from a call each.
OPENLLMETRY_OPENAI = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "m",
    "gen_ai.openai.api_base": "http://127.0.0.1:8000/v1/",
    "gen_ai.response.finish_reasons": ("stop",),
    "gen_ai.usage.input_tokens": 3,
    "gen_ai.usage.output_tokens": 2,
}
OPENLLMETRY_OLLAMA = {
    "gen_ai.system": "Ollama",
    "llm.request.type": "completion",
    "gen_ai.request.model": "m",
    "gen_ai.usage.input_tokens": 3,
    "gen_ai.usage.output_tokens": 2,
}
OPENLIT_OLLAMA = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "ollama",
    "server.address": "127.0.0.1",
    "server.port": 11434,
    "gen_ai.request.model": "m",
    "gen_ai.usage.input_tokens": 3,
    "gen_ai.usage.output_tokens": 2,
}
OPENINFERENCE_OPENAI = {
    "openinference.span.kind": "LLM",
    "llm.system": "openai",
    "llm.model_name": "m",
    "llm.token_count.prompt": 3,
    "llm.token_count.completion": 2,
    "llm.finish_reason": "length",
}
OTEL_OPENAI = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "m",
    "server.address": "api.openai.com",
    "gen_ai.usage.input_tokens": 3,
    "gen_ai.usage.output_tokens": 2,
}
VLLM = {"gen_ai.request.id": "r", "gen_ai.usage.prompt_tokens": 3, "gen_ai.usage.completion_tokens": 2}


@pytest.mark.parametrize(
    ("name", "attributes", "expected"),
    [
        ("openai.chat", OPENLLMETRY_OPENAI, ("chat", "openai", "m", "host")),
        ("ollama.completion", OPENLLMETRY_OLLAMA, ("text_completion", "ollama", "m", "unknown")),
        ("chat m", OPENLIT_OLLAMA, ("chat", "ollama", "m", "host")),
        ("ChatCompletion", OPENINFERENCE_OPENAI, ("chat", "openai", "m", "unknown")),
        ("chat m", OTEL_OPENAI, ("chat", "openai", "m", "remote")),
        ("llm_request", VLLM, (None, "vllm", None, "here")),
    ],
    ids=["OpenLLMetry openai", "OpenLLMetry ollama", "OpenLIT ollama", "OpenInference", "OpenTelemetry", "vLLM"],
)
def test_dialects(name: str, attributes: dict[str, Any], expected: tuple[Any, ...]) -> None:
    """Every instrumentation's names give the same reading, with the counts as the server told them."""
    seen = read(span(name, **{key.replace(".", "__"): value for key, value in attributes.items()}))
    assert seen is not None
    assert seen.role == "inference"
    assert (seen.operation, seen.provider, seen.model, seen.place) == expected
    assert (seen.prompt_tokens, seen.output_tokens) == (3, 2)


@pytest.mark.parametrize(
    "attributes",
    [
        {"gen_ai.operation.name": "invoke_agent"},
        {"gen_ai.operation.name": "execute_tool"},
        {"openinference.span.kind": "CHAIN"},
        {"traceloop.span.kind": "workflow"},
        {"gen_ai.conversation.id": "c"},
    ],
    ids=lambda attributes: "-".join(map(str, attributes.values())),
)
def test_what_encloses_calls_is_no_call(attributes: dict[str, str]) -> None:
    """Agents, tools, chains and workflows are around the requests, not requests."""
    seen = read(span(**{key.replace(".", "__"): value for key, value in attributes.items()}))
    assert seen is not None
    assert seen.role == "around"


def test_other_spans_say_nothing() -> None:
    """A span of a web server or a database is not read."""
    assert read(span("GET /", http__request__method="GET", server__address="127.0.0.1")) is None


def test_listed_providers_are_on_this_host() -> None:
    """A client whose spans name no server is work of this host only where the operator says so."""
    ollama = span("ollama.chat", gen_ai__system="Ollama", llm__request__type="chat")
    assert [read(ollama, frozenset(names)).place for names in ((), ("ollama",))] == ["unknown", "host"]  # type: ignore[union-attr]


def test_guessed_tokens_are_left_out() -> None:
    """OpenLIT divides characters by two for engines in the process: that is no count."""
    attributes = {"gen_ai__operation__name": "chat", "gen_ai__provider__name": "huggingface"}
    counts = {"gen_ai__usage__input_tokens": 10, "gen_ai__usage__output_tokens": 23}
    seen = read(span("chat m", "openlit.instrumentation.transformers", **attributes, **counts))
    assert isinstance(seen, Seen)
    assert (seen.prompt_tokens, seen.output_tokens) == (None, None)


@pytest.mark.parametrize("told", [("length",), "length", '["length"]'], ids=["a list", "a text", "JSON"])
def test_finish_reasons(told: Any) -> None:
    """However they are written, the reasons are a list, and only `length` is a cut answer."""
    seen = read(span(gen_ai__operation__name="chat", gen_ai__response__finish_reasons=told))
    assert seen is not None
    assert (seen.finish_reasons, seen.outcome) == (("length",), "length")


def test_errors() -> None:
    """A failed call says so, with its type where the span has one."""
    status = Status(StatusCode.ERROR)
    failed = [
        read(span(status=status, gen_ai__operation__name="chat", **more)) for more in ({}, {"error__type": "Timeout"})
    ]
    assert [(seen.outcome, seen.error_type) for seen in failed if seen] == [("error", "_OTHER"), ("error", "Timeout")]


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("localhost", True),
        ("LOCALHOST.", True),
        ("api.localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", True),
        ("/run/engine.sock", True),
        ("unix:/run/engine.sock", True),
        (socket.gethostname(), True),
        ("10.0.0.7", False),
        ("api.openai.com", False),
        ("localhost.example.com", False),
    ],
)
def test_addresses_of_this_host(address: str, here: bool) -> None:
    """Loopback, the host's own name and sockets are here; whatever would need a name server is not asked for."""
    assert is_this_host(address) is here


def test_kinds() -> None:
    """Spans of one scope whose names differ in the model only are of one kind."""
    assert kind_of(span("chat a", "s")) == kind_of(span("chat b", "s")) != kind_of(span("chat a", "t"))
