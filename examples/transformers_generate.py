"""Joules of three generations, the last two at the same time: a tiny random model, no network, seconds.

Run it with ``python examples/transformers_generate.py``. On a machine without a meter, put ``MELODI_SOURCES=estimate`` in
front to see figures that are estimated, and say so.
"""

from __future__ import annotations

import asyncio

import melodi_otel
from melodi_otel.testing import tiny_model


async def main() -> None:
    melodi_otel.instrument(console=True)  # from here on every generate() is measured; a summary is printed at the end

    tokenizer, model = tiny_model.tokenizer(), tiny_model.llama()
    prompt = tokenizer("The quick brown fox", return_tensors="pt")
    options = {"input_ids": prompt["input_ids"], "attention_mask": prompt["attention_mask"], "max_new_tokens": 300}

    with melodi_otel.measure("one at a time") as alone:
        model.generate(**options)

    with melodi_otel.measure("two at a time") as together:
        # to_thread carries the context along, so both calls belong to this block; a bare thread's would not
        await asyncio.gather(*(asyncio.to_thread(model.generate, **options) for _ in range(2)))

    for name, block in {"one": alone, "two": together}.items():
        block.wait(5.0)  # joules are known once the meter has read past the end
        print(f"{name} at a time: {block.joules} J, {block.quality}")


if __name__ == "__main__":
    asyncio.run(main())
