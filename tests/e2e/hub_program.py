"""A user's program of many short requests on a made-up engine; its one argument says in JSON how many, and what then.

``requests``, ``parallel``, ``seconds`` (of a middling request), ``busy`` (CPU seconds per second, 0..1), ``go`` (a file to wait
for before the first one), ``more`` (a file to wait for before it ends), ``out`` (where it tells what it had), ``end``
(``return`` or ``_exit``), ``until`` (a file: ``held`` requests stay open until it is there, and short ones go on beside them).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import melodi_otel
from melodi_otel.instrumentation.seam import Begin, End

spec: dict[str, Any] = json.loads(sys.argv[1])
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")


def wait_for(name: str) -> None:
    path = spec.get(name)
    while path and not Path(path).exists():
        time.sleep(0.01)


def tell(**found: Any) -> None:
    if out := spec.get("out"):
        Path(f"{out}.new").write_text(json.dumps(found))
        Path(f"{out}.new").rename(out)


runtime = melodi_otel.instrument()
assert runtime is not None
busy = spec.get("busy", 0.2)
until = Path(spec.get("until", "/"))


def request(number: int, *, held: bool = False) -> None:
    tokens = [0]
    begin = Begin("chat", "test", "m", time.monotonic_ns(), prompt_tokens=10, probe=lambda: tokens[0])
    call = runtime.calls.begin(begin)
    end = time.monotonic() + spec.get("seconds", 0.2) * (0.5 + number % 7 / 6)
    while time.monotonic() < end or (held and not until.exists()):
        turn = time.monotonic() + 0.01 * busy
        while time.monotonic() < turn:
            pass
        tokens[0] += 1
        time.sleep(0.01 * (1 - busy))
    call.end(End(end_ns=time.monotonic_ns(), output_tokens=tokens[0], outcome="stop"))


runtime.wait_found(30)
tell(ready=True, local=runtime.hub is None, pid=os.getpid())
wait_for("go")
with ThreadPoolExecutor(spec.get("parallel", 4)) as pool:
    list(pool.map(request, range(spec.get("requests", 10))))
if held := spec.get("held"):
    with ThreadPoolExecutor(held) as pool:
        waiting = [pool.submit(request, number, held=True) for number in range(held)]
        while not until.exists():
            request(0)
        for one in waiting:
            one.result()
if spec.get("end") == "_exit":
    runtime.wait_settled(20)
    os._exit(0)
if spec.get("settle", True):
    runtime.wait_settled(20)
wait_for("more")
for number in range(spec.get("again", 0)):
    request(number)
runtime.wait_settled(20 if spec.get("settle", True) else 0)
rows = [
    {
        "joules": {share.device: share.joules for share in record.shares},
        "total": record.energy.total,
        "span": f"{record.span_id:016x}",
        "quality": record.quality,
        "reason": record.energy.reason,
        "method": record.energy.method,
    }
    for record in runtime.store.recent(None)
]
books = {
    name: {"attributed": book.attributed, "measured": book.measured, "imbalance": book.imbalance()}
    for name, book in runtime.snapshot().books.items()
}
tell(done=True, cpu_s=time.process_time(), local=runtime.hub is None, rows=rows, books=books, page=runtime.endpoint_url)
