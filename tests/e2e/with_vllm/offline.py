"""``LLM`` in one process: ``offline.py SPEC``, SPEC being JSON.

``model`` (a folder), ``engine`` (arguments of ``LLM``), ``prompts``, ``max_tokens`` (a number, or one per prompt), ``chat`` (ask
as chats), ``out`` (where it tells what it had).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    spec: dict[str, Any] = json.loads(sys.argv[1])
    began = time.monotonic()
    from vllm import LLM, SamplingParams

    imported = time.monotonic()
    llm = LLM(model=spec["model"], **spec["engine"])
    made = time.monotonic()
    prompts, tokens = spec["prompts"], spec["max_tokens"]
    lengths = tokens if isinstance(tokens, list) else [tokens] * len(prompts)
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
    if spec.get("chat"):
        answers = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], params, use_tqdm=False)
    else:
        answers = llm.generate(prompts, params, use_tqdm=False)
    done = time.monotonic()
    rows = [
        {
            "id": answer.request_id,
            "prompt_tokens": len(answer.prompt_token_ids),
            "completion_tokens": sum(len(output.token_ids) for output in answer.outputs),
            "cached_tokens": answer.num_cached_tokens,
        }
        for answer in answers
    ]
    seconds = {"import": imported - began, "init": made - imported, "generate": done - made}
    Path(spec["out"]).write_text(json.dumps({"rows": rows, "seconds": seconds}))


if __name__ == "__main__":
    main()
