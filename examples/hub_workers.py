"""A server of four worker processes that share one meter.

    MELODI_SOURCES=estimate gunicorn -c examples/gunicorn/hub_workers.conf.py
    curl http://127.0.0.1:8000/32          # 32 tokens, and what they cost
    melodi-otel top --once                 # all workers on one page, the machine's energy once

``instrument()`` stands where the model is loaded, before the workers are forked. The first of them that has a request starts
the hub, the others find it; nothing has to be set. Run as it is (``python examples/hub_workers.py``), it serves itself, asks
eight times and ends.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import melodi_otel
from melodi_otel.testing import tiny_model  # in your program: AutoModelForCausalLM and AutoTokenizer

if __name__ != "__main__":
    melodi_otel.instrument()
    model, tokenizer = tiny_model.llama(), tiny_model.tokenizer()


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    tokens = int(environ["PATH_INFO"].strip("/") or 16)
    with melodi_otel.measure("answer") as answer:
        model.generate(**tokenizer("A joule is", return_tensors="pt"), max_new_tokens=tokens, do_sample=False)
    answer.wait(5.0)  # joules are known once the meter has read past the end; a server would not wait for them
    told = {"worker": os.getpid(), "tokens": tokens, "joules": answer.joules, "quality": answer.quality}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(told).encode()]


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = Path(__file__).parent / "gunicorn" / "hub_workers.conf.py"
    words = [sys.executable, "-m", "gunicorn", "-c", str(config), "--bind", address, "--log-level", "warning"]
    server = subprocess.Popen(words)

    def ask(tokens: int) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://{address}/{tokens}", timeout=60) as answer:
            return json.loads(answer.read())

    try:
        while server.poll() is None:
            try:
                ask(1)
                break
            except OSError:
                time.sleep(0.2)
        with ThreadPoolExecutor(4) as pool:
            for told in pool.map(ask, [32, 64] * 4):
                joules = "no joules" if told["joules"] is None else f"{told['joules']:.2f} J"
                print(f"worker {told['worker']}: {told['tokens']} tokens, {joules}, {told['quality']}")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
