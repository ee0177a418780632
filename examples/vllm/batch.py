"""Joules per prompt of a vLLM script: nothing to call, the plug-in meters whatever engine the program makes.

pip install "melodi-otel[vllm]" next to vLLM, then: python batch.py MODEL
"""

import sys

from vllm import LLM, SamplingParams

import melodi_otel

PROMPTS = ["The capital of France is", "A joule is", "Photosynthesis, in one sentence:"]


def main() -> None:
    llm = LLM(model=sys.argv[1], max_model_len=512, enforce_eager=True)
    for answer in llm.generate(PROMPTS, SamplingParams(max_tokens=40), use_tqdm=False):
        print(f"{answer.prompt!r}: {len(answer.outputs[0].token_ids)} tokens")
    print(melodi_otel.recent())


if __name__ == "__main__":  # vLLM starts processes of its own, which load this file again
    main()
