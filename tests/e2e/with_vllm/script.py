"""What a script may ask of vLLM, in one process: ``script.py SPEC``, SPEC being JSON.

``model`` (a folder), ``engine`` (arguments of the engine), ``do`` (which of the functions below), ``out`` (where it tells what it
had: by the name of each call its answers, as [prompt tokens, output token ids, …]).
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

PROMPTS = ["the quick brown fox", "a joule is a watt second", "one"]


def rows(answers: Any) -> list[list[Any]]:
    return [
        [len(answer.prompt_token_ids), *(list(output.token_ids) for output in answer.outputs)] for answer in answers
    ]


def language_model(spec: dict[str, Any]) -> dict[str, Any]:
    """``generate`` (with n = 2 for one prompt), ``chat``, ``enqueue`` and a beam search, in this order."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import BeamSearchParams

    llm = LLM(model=spec["model"], **spec["engine"])

    def params(tokens: int, n: int = 1) -> Any:
        return SamplingParams(max_tokens=tokens, ignore_eos=True, n=n, seed=7)

    found = {
        "generate": rows(llm.generate(PROMPTS, [params(7), params(12, n=2), params(3)], use_tqdm=False)),
        "chat": rows(llm.chat([{"role": "user", "content": "a watt"}], params(5), use_tqdm=False)),
    }
    llm.enqueue(PROMPTS[:2], params(4), use_tqdm=False)
    found["enqueue"] = rows(llm.wait_for_completion(use_tqdm=False))
    beams = llm.beam_search([{"prompt": PROMPTS[0]}], BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True))
    found["beams"] = [[beam.tokens for beam in beams[0].sequences]]
    return found


def engine_of_a_server(spec: dict[str, Any]) -> dict[str, Any]:
    """``AsyncLLM``: three streams at once by deltas, and one that is left at its fifth token."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    async def all_of_them() -> dict[str, Any]:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=spec["model"], **spec["engine"]))

        async def one(name: str, prompt: str, tokens: int, leave: int | None = None) -> list[Any]:
            kinds = (RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY)
            kind = kinds[len(name) % 3] if leave is None else RequestOutputKind.DELTA
            params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=7, output_kind=kind)
            seen: list[int] = []
            answers = engine.generate(prompt, params, name)
            async for answer in answers:
                new = list(answer.outputs[0].token_ids)
                seen = [*seen, *new] if kind is RequestOutputKind.DELTA else new
                prompt_tokens = len(answer.prompt_token_ids or ())
                if leave is not None and len(seen) >= leave:
                    break
            await answers.aclose()
            return [prompt_tokens, seen]

        named = [("a", PROMPTS[0], 9), ("bb", PROMPTS[1], 5), ("ccc", PROMPTS[2], 14)]
        found = {"streams": await asyncio.gather(*(one(*ask) for ask in named))}
        found["left"] = [await one("gone", PROMPTS[0], 400, leave=5)]
        engine.shutdown()
        return found

    return asyncio.run(all_of_them())


def embeddings(spec: dict[str, Any]) -> dict[str, Any]:
    """``embed`` of the same prompts."""
    from vllm import LLM

    llm = LLM(model=spec["model"], runner="pooling", **spec["engine"])
    return {"embed": [[len(answer.prompt_token_ids), []] for answer in llm.embed(PROMPTS, use_tqdm=False)]}


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    Path(told["out"]).write_text(json.dumps(globals()[told["do"]](told)))
