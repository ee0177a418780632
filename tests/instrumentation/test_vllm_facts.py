"""What a configuration says of an engine, and how its cores are declared."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from melodi_otel.attribution.meter import EngineId
from melodi_otel.config import VLLM_ENGINE_VARIABLE
from melodi_otel.instrumentation.vllm import facts
from melodi_otel.instrumentation.vllm.complaints import Complaints
from melodi_otel.instrumentation.vllm.cores import Cores
from melodi_otel.instrumentation.vllm.facts import (
    Shape,
    devices_of,
    model_of,
    nth_engine,
    number_engine,
    number_of,
    parameters_in,
    shape_of,
    size_of,
)
from melodi_otel.testing.vllm_scheduler import FakeScheduler


def config(model: str = "/models/tiny", **parallel: Any) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel), model_config=SimpleNamespace(model=model, served_model_name="tiny")
    )


@pytest.mark.parametrize(
    ("parallel", "shape"),
    [
        ({}, Shape()),
        ({"world_size": 4, "pipeline_parallel_size": 2}, Shape(world=4, stages=2)),
        (
            {
                "data_parallel_size": 2,
                "data_parallel_size_local": 2,
                "data_parallel_index": 1,
                "data_parallel_rank_local": 1,
            },
            Shape(rank=1, ranks=2, local_rank=1),
        ),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2}, Shape(ranks=4, elsewhere=True)),
        ({"world_size": 16, "nnodes": 2}, Shape(world=16, elsewhere=True)),
        ({"world_size": 16, "local_world_size": 8}, Shape(world=16, elsewhere=True)),
        ({"data_parallel_rank_local": None, "world_size": None}, Shape()),
    ],
)
def test_shapes(parallel: dict[str, Any], shape: Shape) -> None:
    """Tensor, pipeline and data parallel, and what is on other hosts."""
    assert shape_of(config(**parallel)) == shape


@pytest.mark.parametrize(
    ("path", "served", "name"),
    [
        ("/models/a", "tiny", "tiny"),
        ("/models/a", ["first", "second"], "first"),
        ("meta/Llama", None, "meta/Llama"),
        ("meta/Llama", "meta/Llama", "meta/Llama"),
        (None, None, None),
    ],
)
def test_names(path: str | None, served: Any, name: str | None) -> None:
    """The name by which clients ask for it."""
    assert model_of(SimpleNamespace(model_config=SimpleNamespace(model=path, served_model_name=served))) == name


def test_each_core_has_its_part_of_the_list() -> None:
    """``MELODI_ENGINE_DEVICES`` lists the devices of all cores in order; a list that is too short is everybody's."""
    given = ["G0", "G1", "G2", "G3"]
    assert devices_of(Shape(world=2, local_rank=1), given) == ("G2", "G3")
    assert devices_of(Shape(world=2, local_rank=2), given) == ("G0", "G1", "G2", "G3")


def platform(monkeypatch: pytest.MonkeyPatch, **of: Any) -> None:
    """vLLM's platform says this."""
    module: Any = ModuleType("vllm.platforms")
    module.current_platform = SimpleNamespace(**{"is_cpu": lambda: False, "is_cuda": lambda: False, **of})
    monkeypatch.setitem(sys.modules, "vllm.platforms", module)


def test_devices_by_vllms_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the first visible devices after the ranks before it, by UUID; on a CPU none; elsewhere not known."""
    platform(monkeypatch, is_cuda=lambda: True, get_device_uuid=lambda number: f"uuid-{number}")
    assert devices_of(Shape(world=2, local_rank=1)) == ("GPU-uuid-2", "GPU-uuid-3")
    platform(monkeypatch, is_cpu=lambda: True)
    assert devices_of(Shape()) == ()
    platform(monkeypatch)
    assert devices_of(Shape()) is None


def test_a_platform_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that cannot be asked leaves the devices unknown."""

    def fail(_: int) -> str:
        raise RuntimeError("no driver")

    platform(monkeypatch, is_cuda=lambda: True, get_device_uuid=fail)
    assert devices_of(Shape()) is None


def safetensors(path: Path, **tensors: tuple[str, list[int]]) -> None:
    header = json.dumps(
        {"__metadata__": {"format": "pt"}}
        | {name: {"dtype": kind, "shape": shape} for name, (kind, shape) in tensors.items()}
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def test_parameters_are_counted_in_the_files(tmp_path: Path) -> None:
    """All tensors of all files, and those of routed experts beside."""
    safetensors(tmp_path / "a.safetensors", **{"embed": ("BF16", [10, 4]), "mlp.experts.0.up": ("BF16", [4, 8])})
    safetensors(tmp_path / "b.safetensors", norm=("F32", [4]))
    assert parameters_in(tmp_path) == (40 + 32 + 4, 32)


def test_packed_weights_are_not_counted(tmp_path: Path) -> None:
    """Integers hold several weights each: how many there are is not known."""
    safetensors(tmp_path / "a.safetensors", packed=("I32", [10, 4]))
    assert parameters_in(tmp_path) == (0, 0)
    assert parameters_in(None) == (0, 0)


def cache(heads_on: int, tensor: int, stages: int = 1, name: str = "FullAttentionSpec") -> float | None:
    """Bytes of cache per token of two layers of 4,096-byte pages of 16 tokens."""
    spec: Any = type(name, (), {"page_size_bytes": 4096 // heads_on, "block_size": 16})()
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["0", "1"])
    scheduler = SimpleNamespace(kv_cache_config=SimpleNamespace(kv_cache_groups=[group]))
    made = config(tensor_parallel_size=tensor, pipeline_parallel_size=stages)
    return size_of(made, scheduler).get("kv_bytes_per_token")


def test_cache_bytes() -> None:
    """As vLLM laid it out: heads are divided among devices, layers among stages, latent attention is on every device once."""
    assert cache(1, 1) == 2 * 4096 / 16
    assert cache(2, 2) == 2 * 4096 / 16
    assert cache(1, 1, stages=2) == 2 * 2 * 4096 / 16
    assert cache(1, 8, name="MLAAttentionSpec") == 2 * 4096 / 16


def test_a_name_that_the_cache_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is no repository (a bucket's address) has uncounted parameters; all else is known of it."""
    library: Any = ModuleType("huggingface_hub")

    def refuse(repository: str, _: str) -> None:
        raise ValueError(f"{repository} is no name of a repository")

    library.try_to_load_from_cache = refuse
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    assert cache(1, 1) == 2 * 4096 / 16


def test_engines_of_a_program_have_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each engine that a process makes has its own, which its cores find in the environment; without one it is the first."""
    monkeypatch.setattr(facts, "_made", 0)
    monkeypatch.setenv(VLLM_ENGINE_VARIABLE, "")
    assert nth_engine() == 1
    numbers = []
    for _ in range(3):
        number_engine()
        numbers.append(nth_engine())
    assert len(set(numbers)) == 3
    assert number_of(2, 3) == 2003


@pytest.fixture
def core() -> Any:
    core = SimpleNamespace(vllm_config=config(world_size=2, pipeline_parallel_size=1), scheduler=FakeScheduler())
    return type("Core", (), vars(core))()


def test_a_core_from_loading_to_gone(calls: Any, core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told as loading, ready and gone, with its devices and what it is spread over; ready only once."""
    monkeypatch.delenv(VLLM_ENGINE_VARIABLE, raising=False)
    cores = Cores(calls, Complaints(), ["G0", "G1"])
    cores.loading(core.vllm_config)
    cores.ready(core)
    cores.ready(core)
    cores.ended(core)
    assert [(engine, told["state"]) for engine, told in calls.meter.engines] == [
        (EngineId("g", 1000), state) for state in ("loading", "ready", "gone")
    ]
    told = calls.meter.engines[1][1]
    assert (told["devices"], told["world"], told["model"]) == (("G0", "G1"), 2, "tiny")
    assert "schedule" not in core.scheduler.__dict__


def test_a_scheduler_that_cannot_be_watched(calls: Any, core: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A core whose scheduler has other methods is declared all the same, and it is said that its steps are not seen."""
    core.scheduler = SimpleNamespace()
    cores = Cores(calls, Complaints())
    cores.ready(core)
    assert [told["state"] for _, told in calls.meter.engines] == ["ready"]
    assert "steps cannot be watched" in caplog.text
    cores.ended(core)
    assert calls.meter.engines[-1][1]["state"] == "gone"
