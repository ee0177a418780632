"""Joules per tenant of a FastAPI server: the tenant is a request header, and the server knows nothing of labels.

    python examples/fastapi_tenants.py

A tiny random model, no network but the loopback, seconds. On a machine without a meter, put ``MELODI_SOURCES=estimate`` in
front to see figures that are estimated, and say so. In a deployment the settings are variables: MELODI_LABELS,
MELODI_METRIC_LABELS, MELODI_METRICS_ADDR.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import uvicorn
from fastapi import FastAPI

import melodi_otel
from melodi_otel.testing import tiny_model

app = FastAPI()
tokenizer, model = tiny_model.tokenizer(), tiny_model.llama()


@app.get("/answer")
def answer(tokens: int) -> int:  # FastAPI runs it in a thread, which carries the request's labels
    prompt = tokenizer("The quick brown fox", return_tensors="pt")
    return int(model.generate(**prompt, max_new_tokens=tokens).shape[1])


def main() -> None:
    settings = {
        "MELODI_LABELS": "tenant=header:x-tenant-id",
        "MELODI_METRIC_LABELS": "tenant",
        "MELODI_LABEL_VALUES": "tenant=acme|globex",  # whoever calls himself something else is counted as "other"
        "MELODI_METRICS_ADDR": "127.0.0.1:0",
        **os.environ,
    }
    runtime = melodi_otel.instrument(config=melodi_otel.Config.from_env(settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client, ThreadPoolExecutor(3) as pool:
            asked = [("acme", 200), ("globex", 100), ("acme", 100), ("forged", 50)]
            for reply in pool.map(
                lambda one: client.get("/answer", params={"tokens": one[1]}, headers={"x-tenant-id": one[0]}), asked
            ):
                reply.raise_for_status()
    finally:
        server.should_exit = True
        thread.join()

    for row in melodi_otel.recent().to_dicts():  # waits until the joules are known
        joules = "no joules" if row["joules"] is None else f"{row['joules']:.2f} J"
        print(f"{row['label_tenant']:8} {row['output_tokens']:4} tokens  {joules}  {row['quality']}")
    if runtime is not None and runtime.endpoint_url:
        lines = httpx.get(runtime.endpoint_url).text.splitlines()
        print(*(line for line in lines if line.startswith("melodi_energy_attributed")), sep="\n")
    melodi_otel.uninstrument()


if __name__ == "__main__":
    main()
