"""Two concurrent ``generate()`` calls on a real model and a package counter that moves in real time: the books balance."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from melodi_otel.config import Config
from melodi_otel.runtime import Runtime
from melodi_otel.testing.powercap import FakePowercap

pytestmark = pytest.mark.e2e

WATTS = 80.0


@pytest.fixture
def powercap(tmp_path: Path) -> Iterator[FakePowercap]:
    """A package of 80 W and its DRAM of 6 W that count as time passes."""
    tree = FakePowercap(tmp_path / "sys")
    package = tree.package(0, watts=WATTS)
    tree.dram(package, watts=6.0)
    with tree.live():
        yield tree


def test_two_requests_share_one_package(
    powercap: FakePowercap, capsys: pytest.CaptureFixture[str], need: Callable[..., None]
) -> None:
    """Joules of both requests + buckets = what the counter counted, to 1e-9, where naive windows count twice."""
    need("torch")
    import torch

    from melodi_otel.testing import tiny_model

    torch.set_num_threads(1)
    model, tokenizer = tiny_model.llama(), tiny_model.tokenizer()
    inputs = tokenizer("the quick brown fox", return_tensors="pt")
    runtime = Runtime(Config(sysfs_root=str(powercap.root), sources=("rapl",)), environ={})
    runtime.start()
    runtime.instrument_libraries()
    try:
        both = threading.Barrier(2)

        def ask(tokens: int) -> None:
            both.wait()
            model.generate(**inputs, max_new_tokens=tokens, do_sample=False)

        threads = [threading.Thread(target=ask, args=(tokens,)) for tokens in (300, 360)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert runtime.wait_settled(20.0)
    finally:
        runtime.shutdown()
    records = [record for record in runtime.store.recent() if record.kind == "request"]
    assert [record.output_tokens for record in sorted(records, key=lambda r: r.output_tokens or 0)] == [300, 360]
    books = runtime.snapshot().books
    assert set(books) == {"intel-rapl:0", "intel-rapl:0:0"}
    for book in books.values():
        assert book.in_flight == 0.0
        assert abs(book.imbalance()) <= 1e-9
        spans = sum(share.joules or 0.0 for record in records for share in record.shares if share.device == book.device)
        assert spans == pytest.approx(book.attributed, rel=1e-9)
    naive = WATTS * sum(record.duration_s for record in records)
    union = max(r.end_ns for r in records) - min(r.start_ns for r in records)
    package = books["intel-rapl:0"]
    overlap = naive / (WATTS * union / 1e9)
    with capsys.disabled():
        print(
            f"\n  requests {package.attributed:.3f} J + buckets {package.measured - package.attributed:.3f} J", end=""
        )
        print(f" = counter {package.measured:.3f} J; naive windows {naive:.3f} J, overlap factor {overlap:.2f}")
    assert overlap >= 1.5
    assert all(record.energy.scope == "cpu+memory" for record in records)
    assert {record.energy.method for record in records} == {"process"}
