"""Joules of each request in a batch that many requests share: a tiny random model, no network, seconds.

Run it with ``python examples/continuous_batching.py``. On a machine without a meter, put ``MELODI_SOURCES=estimate`` in
front to see figures that are estimated, and say so.
"""

from __future__ import annotations

import transformers

import melodi_otel
from melodi_otel.testing import tiny_model


def main() -> None:
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        print("0 J: this transformers batches on accelerators only")
        return
    melodi_otel.instrument()  # from here on every request of every batch is measured

    tokenizer, model = tiny_model.tokenizer(), tiny_model.llama()
    prompts = ["The quick brown fox", "A joule is one watt for one second", "Energy belongs to an interval"]
    # by default the cache is as large as the free memory
    sizes = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)

    with melodi_otel.measure("batch") as batch:
        with model.continuous_batching_context_manager(continuous_batching_config=sizes) as manager:
            for repeat, prompt in enumerate(prompts, start=1):
                manager.add_request(tokenizer(prompt)["input_ids"], max_new_tokens=150 * repeat)
            for _ in prompts:
                manager.get_result()

    batch.wait(5.0)  # joules are known once the meter has read past the end
    print(f"the batch: {batch.joules} J, {batch.quality}")
    print(melodi_otel.recent())
    melodi_otel.uninstrument()


if __name__ == "__main__":
    main()
