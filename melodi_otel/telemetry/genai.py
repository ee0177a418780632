"""What other people's GenAI spans say: one reading for all their attribute names.

OpenTelemetry's GenAI conventions, their older form (OpenLLMetry, OpenLIT, vLLM) and OpenInference's name the same things
differently. Nothing is invented: a count that its instrumentation made up from the length of a text is left out.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from melodi_otel import semconv as names
from melodi_otel.attribution.meter import Outcome

Role = Literal["inference", "around"]
Kind = tuple[str, str]
Place = Literal["here", "host", "remote", "unknown"]

IN_PROCESS: Final = frozenset(
    {
        "transformers",
        "huggingface",
        "hugging_face",
        "vllm",
        "llama_cpp",
        "llamacpp",
        "ctranslate2",
        "onnxruntime",
        "mlx",
    }
)
"""Providers whose client is the engine: without a server's address their work is done by this process and its children."""
_INFERENCE: Final = frozenset({"chat", "text_completion", "generate_content", "completion", "embeddings", "embedding"})
_OPERATION: Final = {"completion": "text_completion", "embedding": "embeddings"}
_OPENINFERENCE: Final = {"LLM": "chat", "EMBEDDING": "embeddings"}
_VLLM: Final = "llm_request"
_MAKERS: Final = re.compile(r"gen_?ai|llm|openai|ollama|anthropic|openlit|openinference|traceloop|langchain|litellm")
"""In the scopes of instrumentations whose spans have no attributes of their kind when they begin."""
_MAY_BE: Final = re.compile(r"^(?:gen_ai|llm|openinference|traceloop)\.", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a span says of itself.

    Attributes:
        role: ``inference``: a call of a model; ``around``: a chain, an agent, a tool, a workflow.
        operation, provider, model: ``gen_ai.*`` values, or None.
        place: where the model ran: ``here`` (this process and its children), ``host`` (another process of this host),
            ``remote``, ``unknown``.
        prompt_tokens, output_tokens: as the model's server counted them, or None.
        outcome, error_type, finish_reasons: how it ended.
        request: the engine's id of the request, which a span of ours may name as well, or None.
    """

    role: Role
    operation: str | None
    provider: str | None
    model: str | None
    place: Place
    prompt_tokens: int | None
    output_tokens: int | None
    outcome: Outcome
    error_type: str | None
    finish_reasons: tuple[str, ...]
    request: str | None = None


def read(span: ReadableSpan, local_providers: frozenset[str] = frozenset()) -> Seen | None:
    """What ``span`` says, or None where it is no GenAI span.

    Args:
        span: an ended span.
        local_providers: providers whose spans without a server's address are work of another process on this host.
    """
    attributes = span.attributes or {}
    if not _named(attributes):
        return None  # nearly all spans of a program: one look at all the names
    found: dict[str, Any] = dict(attributes)
    role = _role(span.name, found)
    provider = _text(found, "gen_ai.provider.name", "gen_ai.system", "llm.provider", "llm.system")
    provider = None if provider is None else provider.lower()
    if span.name == _VLLM:
        provider = provider or "vllm"
    kind = _text(found, "openinference.span.kind")
    operation = _text(found, "gen_ai.operation.name", "llm.request.type") or _OPENINFERENCE.get(kind or "")
    place = _place(found, provider, local_providers)
    # Characters divided by two are no tokens: that is what OpenLIT tells of engines that run in the process itself.
    guessed = place == "here" and scope_of(span).startswith("openlit")
    listed = _listed(found.get("gen_ai.response.finish_reasons", found.get("llm.finish_reason", ())))
    failed = span.status.status_code is StatusCode.ERROR
    return Seen(
        role=role,
        operation=_OPERATION.get(operation or "", operation),
        provider=provider,
        model=_text(found, "gen_ai.request.model", "gen_ai.response.model", "llm.model_name", "llm.request.model"),
        place=place,
        prompt_tokens=None
        if guessed
        else _count(found, "gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt"),
        output_tokens=None
        if guessed
        else _count(
            found, "gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens", "llm.token_count.completion"
        ),
        outcome="error" if failed else "length" if listed and set(listed) <= {"length", "max_tokens"} else "stop",
        error_type=(_text(found, names.ERROR_TYPE) or "_OTHER") if failed else None,
        finish_reasons=listed,
        request=_text(found, "gen_ai.request.id"),
    )


def may_be(span: ReadableSpan) -> bool:
    """Whether a span, begun or ended, may be of a GenAI call: by its attributes, or by who makes it."""
    return _named(span.attributes or {}) or _MAKERS.search(scope_of(span)) is not None


def _named(attributes: Mapping[str, Any]) -> bool:
    return _MAY_BE.search("\n".join(attributes)) is not None


def kind_of(span: ReadableSpan) -> Kind:
    """What tells spans of one instrumentation and purpose from others: its scope, and the first word of its name."""
    return scope_of(span), span.name.partition(" ")[0]


def scope_of(span: ReadableSpan) -> str:
    """The name of the instrumentation that made the span."""
    scope = span.instrumentation_scope
    return "" if scope is None else scope.name


def _role(name: str, found: Mapping[str, Any]) -> Role:
    operation = found.get("gen_ai.operation.name")
    if operation is not None:
        return "inference" if operation in _INFERENCE else "around"
    kind = found.get("openinference.span.kind")
    if kind is not None:
        return "inference" if kind in _OPENINFERENCE else "around"
    if found.get("traceloop.span.kind") is not None:
        return "around"
    if found.get("llm.request.type") in _INFERENCE or (name == _VLLM and "gen_ai.request.id" in found):
        return "inference"
    called = "gen_ai.request.model" in found or "llm.model_name" in found
    return "inference" if called and ("gen_ai.system" in found or "gen_ai.provider.name" in found) else "around"


def _place(found: Mapping[str, Any], provider: str | None, local_providers: frozenset[str]) -> Place:
    if provider in IN_PROCESS:
        return "here"
    address = _text(found, "server.address", "net.peer.name")
    if address is None:
        base = _text(found, "gen_ai.openai.api_base", "openai.api_base", "llm.api_base")
        address = urlsplit(base).hostname if base else None
    if address is not None:
        return "host" if is_this_host(address) else "remote"
    return "host" if provider in local_providers else "unknown"


def is_this_host(address: str) -> bool:
    """Whether a server's address is this machine's: a loopback address, its name, or a socket in its file system.

    The name is compared and never looked up: a request must not wait for a name server.
    """
    name = address.strip().strip("[]").rstrip(".").lower()
    if name.startswith(("/", "unix:")) or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ip = ipaddress.ip_address(name)
    except ValueError:
        own = socket.gethostname().lower()
        return name in {own, own.partition(".")[0]}
    return ip.is_loopback or ip.is_unspecified


def _listed(value: Any) -> tuple[str, ...]:
    """A list of texts as it is, or as one text, or (Logfire) as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.startswith("[") else (value,)
        except ValueError:
            value = (value,)
    return tuple(str(one) for one in value or ())


def _text(found: Mapping[str, Any], *keys: str) -> str | None:
    for key in keys:
        value = found.get(key)
        if isinstance(value, str) and value:
            return value
    return None


def _count(found: Mapping[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = found.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return None
