"""A model served by continuous batching on a real NVIDIA GPU: requests that share it, divided by the fitted model.

    python bench/gpu_serving.py --out DIR [--seconds 60] [--rates 0.5,2,6]

Random weights, random prompts, exact lengths; one loop serves all rates in turn. ``DIR`` gets ``trace.jsonl.gz`` (what the
meter saw, for ``melodi-otel replay``), ``history.jsonl`` (the driver's power history, a second witness of the same joules,
one value in 20 ms) and ``serving.json`` (what the meter said of each request). :mod:`bench.gpu_witness` compares them.
Needs torch with CUDA and transformers 5. Exit code 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VOCABULARY = 32_000


def model_of(layers: int) -> Any:
    """A Llama of wide layers: the GPU, not the host, is what a step waits for."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=6144,
        intermediate_size=24_576,
        num_hidden_layers=layers,
        num_attention_heads=48,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        made = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    made.eval()
    made.generation_config.eos_token_id = None
    made.generation_config.do_sample = False
    made.generation_config.pad_token_id = 0
    return made


def watch_history(index: int, out: Path, stop: threading.Event) -> None:
    """The driver's samples of total power as (monotonic seconds, watts) lines, fetched once a second.

    Stamps of the driver are microseconds of the wall clock; they are moved by the difference seen at each fetch.
    """
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    last = 0
    with out.open("w") as file:
        while not stop.wait(1.0):
            try:
                _, samples = pynvml.nvmlDeviceGetSamples(handle, pynvml.NVML_TOTAL_POWER_SAMPLES, last)
            except pynvml.NVMLError:
                continue  # a value came between the binding's two questions: the next fetch has it
            ahead = time.time() - time.monotonic()
            for sample in samples:
                last = max(last, sample.timeStamp)
                file.write(json.dumps([sample.timeStamp / 1e6 - ahead, sample.sampleValue.uiVal / 1e3]) + "\n")


def serve(manager: Any, rate: float, seconds: float, dice: random.Random) -> int:
    """Requests by a Poisson process for so long, then wait for all of them; how many there were."""
    asked = 0
    end = time.monotonic() + seconds
    while True:
        time.sleep(dice.expovariate(rate))
        if time.monotonic() >= end:
            break
        prompt = [dice.randrange(5, VOCABULARY) for _ in range(min(1024, int(dice.lognormvariate(5.0, 0.8)) + 8))]
        manager.add_request(prompt, max_new_tokens=min(512, int(dice.lognormvariate(4.6, 0.7)) + 8))
        asked += 1
    for _ in range(asked):
        if manager.get_result(timeout=60) is None:
            raise SystemExit("gpu_serving: a request has not been answered for a minute")
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each rate")
    parser.add_argument("--rates", default="0.5,2,6", help="requests a second, one after another")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    import torch
    import transformers

    if not torch.cuda.is_available():
        print("gpu_serving: torch sees no CUDA device here; nothing to measure", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MELODI_RECORD", str(options.out / "trace.jsonl.gz"))
    import melodi_otel

    dice = random.Random(options.seed)
    model = model_of(options.layers)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{torch.cuda.get_device_name()}, {parameters / 1e9:.3f}e9 parameters", flush=True)
    wanted = {"num_blocks": 1024, "max_batch_tokens": 2048, "use_cuda_graph": False, "use_async_batching": False}
    known = inspect.signature(transformers.ContinuousBatchingConfig).parameters
    sizes = transformers.ContinuousBatchingConfig(**{k: v for k, v in wanted.items() if k in known})
    melodi_otel.instrument()
    stop = threading.Event()
    watcher = threading.Thread(target=watch_history, args=(0, options.out / "history.jsonl", stop), daemon=True)
    watcher.start()
    phases: list[dict[str, float]] = []
    time.sleep(3)
    with model.continuous_batching_context_manager(continuous_batching_config=sizes) as manager:
        serve(manager, 6.0, 8.0, dice)  # kernels are built and memory is taken once
        for rate in map(float, options.rates.split(",")):
            time.sleep(3)
            begin = time.monotonic()
            asked = serve(manager, rate, options.seconds, dice)
            phases.append({"rate": rate, "begin": begin, "end": time.monotonic(), "asked": asked})
            print(phases[-1], flush=True)
    time.sleep(3)
    stop.set()
    watcher.join(5)
    rows = [
        {
            "t0": record.start_ns / 1e9,
            "t1": record.end_ns / 1e9,
            "prompt": record.prompt_tokens,
            "output": record.output_tokens,
            "joules": record.energy.total,
            "uncertainty": record.energy.uncertainty,
            "method": record.energy.method,
            "quality": record.energy.quality,
            "concurrency": record.energy.concurrency,
            "final_s": (max(share.final_ns for share in record.shares) - record.end_ns) / 1e9,
        }
        for record in melodi_otel.recent()
        if record.kind == "request"
    ]
    said: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "parameters": parameters,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "phases": phases,
        "requests": rows,
    }
    (options.out / "serving.json").write_text(json.dumps(said, indent=1))
    waits = sorted(row["final_s"] for row in rows)
    print(
        f"{len(rows)} requests on record, final after {waits[len(rows) // 2]:.3f} s, p99 {waits[int(0.99 * len(rows))]:.3f} s"
    )
    melodi_otel.uninstrument()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
