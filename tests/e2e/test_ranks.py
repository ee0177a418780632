"""Two real processes that generate together: a span per process, and each says which it is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from melodi_otel.testing.powercap import FakePowercap
from melodi_otel.testing.telemetry import OtlpReceiver, plain

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
PROGRAM = Path(__file__).with_name("ranks.py")


@pytest.mark.parametrize(("how", "spread"), [("tensor", "2"), ("data", "None")])
def test_two_ranks(tmp_path: Path, need: Callable[..., None], how: str, spread: str) -> None:
    """Each rank has its own span with all tokens, its rank, and a whole CPU meter: nothing of it is elsewhere."""
    need("torch", "transformers")
    from melodi_otel.testing import tiny_model

    tiny_model.llama().save_pretrained(tmp_path / "tiny")
    tree = FakePowercap(tmp_path / "sys")
    tree.package(0, watts=60.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MELODI_", "OTEL_"))}
    with tree.live(), OtlpReceiver() as receiver:
        env |= {
            "MELODI_SYSFS_ROOT": str(tree.root),
            "MELODI_NVML_LIBRARY": "/nowhere/libnvidia-ml.so.1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": "2",
        }
        words = [sys.executable, str(PROGRAM), str(tmp_path / "tiny"), how]
        ranks = [
            subprocess.Popen(
                words,
                env=env | {"RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1")
        ]
        try:
            for rank in ranks:
                out, err = rank.communicate(timeout=150)
                assert rank.returncode == 0, err
                assert f"spread {spread}" in out
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        found = [plain(span.attributes) for span in receiver.spans(2)]
    assert sorted(attributes["melodi.parallel.rank"] for attributes in found) == [0, 1]
    for attributes in found:
        assert attributes["melodi.parallel.world_size"] == 2
        assert (attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]) == (4, 6)
        assert attributes["melodi.energy.total"] > 0
        assert "melodi.energy.reason" not in attributes
