"""A user's program whose work is done by four spawned processes: each instruments itself and generates with a tiny model."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path


def work(number: int, folder: str, requests: int) -> None:
    os.environ["OTEL_SERVICE_NAME"] = f"worker-{number}"
    import torch

    import melodi_otel
    from melodi_otel.testing import tiny_model

    torch.set_num_threads(1)
    runtime = melodi_otel.instrument()
    assert runtime is not None
    model, tokenizer = tiny_model.llama(), tiny_model.tokenizer()
    inputs = tokenizer("the quick brown fox", return_tensors="pt")
    runtime.wait_found(60)
    Path(folder, f"ready-{number}").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.01)
    for length in range(requests):
        model.generate(**inputs, max_new_tokens=20 + 10 * (length % 5), do_sample=False)


def main() -> None:
    folder, requests = sys.argv[1], int(sys.argv[2])
    spawning = multiprocessing.get_context("spawn")
    workers = [spawning.Process(target=work, args=(number, folder, requests)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(max(worker.exitcode or 0 for worker in workers))


if __name__ == "__main__":
    main()
