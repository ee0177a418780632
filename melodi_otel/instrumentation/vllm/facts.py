"""What vLLM's configuration says of an engine: its name, its devices, its size, and which of several it is."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from melodi_otel.config import VLLM_ENGINE_VARIABLE
from melodi_otel.instrumentation.sizes import known_name, size

log = logging.getLogger("melodi_otel")

_OF_ONE_ENGINE: Final = 1000
"""Numbers of one engine's data-parallel ranks; those below are of other instrumentations."""
_PER_PROCESS: Final = 64
"""Engines that one process is expected to make at most; the next one would share its number with another process's."""
_HEADER_LIMIT: Final = 64 << 20
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


def number_of(nth: int, rank: int) -> int:
    """The number of the engine core ``rank`` of the ``nth`` engine (from 1) that a program made."""
    return nth * _OF_ONE_ENGINE + rank


def nth_engine(environ: Mapping[str, str] = os.environ) -> int:
    """Which engine of its program this process belongs to, from 1."""
    said = environ.get(VLLM_ENGINE_VARIABLE, "")
    return int(said) if said.isdigit() and said != "0" else 1


def number_engine() -> None:
    """Another engine of this process is about to be made: its cores, here or in processes of their own, are told which."""
    global _made
    _made += 1
    os.environ[VLLM_ENGINE_VARIABLE] = str(os.getpid() * _PER_PROCESS + min(_made, _PER_PROCESS) - 1)


_made = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """How an engine is spread.

    Attributes:
        rank: data-parallel rank of this core.
        world: accelerators that one core computes on (tensor parallel x pipeline parallel).
        stages: of its pipeline: batches that may run beside each other.
        ranks: data-parallel cores.
        elsewhere: some of its cores or devices are on other hosts.
        local_rank: of this core among those on this host.
    """

    rank: int = 0
    world: int = 1
    stages: int = 1
    ranks: int = 1
    elsewhere: bool = False
    local_rank: int = 0


def shape_of(config: Any) -> Shape:
    """The shape of the engine that this ``VllmConfig`` makes."""
    parallel = getattr(config, "parallel_config", None)

    def number(*names: str, default: int = 1) -> int:
        for name in names:
            value: object = getattr(parallel, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
        return default

    world = max(1, number("world_size"))
    ranks = max(1, number("data_parallel_size"))
    local = number("data_parallel_size_local", default=ranks)
    return Shape(
        rank=number("data_parallel_index", "data_parallel_rank", default=0),
        world=world,
        stages=max(1, number("pipeline_parallel_size")),
        ranks=ranks,
        elsewhere=local < ranks or number("nnodes") > 1 or number("local_world_size", default=world) < world,
        local_rank=number("data_parallel_rank_local", default=0),
    )


def one_phase(config: Any) -> bool:
    """Whether the engine computes one phase of all its requests: it only gives, or only takes, the caches of prompts."""
    role = getattr(getattr(config, "kv_transfer_config", None), "kv_role", None)
    return role in ("kv_producer", "kv_consumer")  # the third, kv_both, leaves it to each request


def model_of(config: Any) -> str | None:
    """The name by which clients ask for the model: as it is served, else as people know its path."""
    model = getattr(config, "model_config", None)
    served: Any = getattr(model, "served_model_name", None)
    if isinstance(served, list | tuple):
        served = served[0] if served else None  # pyright: ignore[reportUnknownVariableType]
    path = getattr(model, "model", None)
    if isinstance(served, str) and served and served != path:
        return served
    return known_name(path) if isinstance(path, str) else None


def devices_of(shape: Shape, given: Sequence[str] = ()) -> tuple[str, ...] | None:
    """``hw.id`` of the accelerators of a core; ``()``: it computes on the CPU; None: not known.

    Of a list that was ``given`` for all cores of this host, each has its part, in order, where it is long enough.
    vLLM's own platform is asked, which names devices without touching them; this process may not do that.
    """
    if given:
        first = shape.local_rank * shape.world
        return tuple(given[first : first + shape.world]) if len(given) >= first + shape.world else tuple(given)
    platform: Any = getattr(sys.modules.get("vllm.platforms"), "current_platform", None)
    if platform is None:
        return None
    try:
        if platform.is_cpu():
            return ()
        if not platform.is_cuda():
            return None
        first = 0 if _assigned(sys.modules.get("vllm.platforms.interface")) else shape.local_rank * shape.world
        found = [str(platform.get_device_uuid(first + index)) for index in range(shape.world)]
        return tuple(name if name.startswith(("GPU-", "MIG-")) else f"GPU-{name}" for name in found)
    except Exception:
        log.debug("melodi_otel: the devices of a vLLM engine are not known", exc_info=True)
        return None


def _assigned(interface: Any) -> bool:
    """Whether vLLM numbers the devices of this core alone, from 0."""
    return getattr(interface, "_assigned_physical_gpu_ids", None) is not None


def size_of(config: Any, scheduler: Any = None) -> dict[str, Any]:
    """What ``Meter.engine`` may be told about the model's size; unknown parts are left out."""
    try:
        model = getattr(config, "model_config", None)
        itemsize = getattr(getattr(model, "dtype", None), "itemsize", None)
        total, expert = parameters_in(_folder(str(getattr(model, "model", ""))))
        found = size(
            getattr(model, "hf_text_config", None) or getattr(model, "hf_config", None), itemsize, total, expert
        )
        cache = _cache_bytes(config, scheduler)
        return found if cache is None else {**found, "kv_bytes_per_token": cache}
    except Exception:
        log.debug("melodi_otel: the size of a vLLM model is not known", exc_info=True)
        return {}


def _cache_bytes(config: Any, scheduler: Any) -> float | None:
    """Bytes of cache per token over all layers and devices, as vLLM laid it out."""
    groups = getattr(getattr(scheduler, "kv_cache_config", None), "kv_cache_groups", None)
    if not groups:
        return None
    try:
        parallel = config.parallel_config
        found = 0.0
        for group in groups:
            spec = group.kv_cache_spec
            # Latent attention keeps one cache on every device, heads are divided among them.
            heads = 1 if "MLA" in type(spec).__name__ else parallel.tensor_parallel_size
            found += heads * len(group.layer_names) * spec.page_size_bytes / spec.block_size
        return found * parallel.pipeline_parallel_size or None
    except Exception:
        return None


def _folder(model: str) -> Path | None:
    """Where the model's files are on this host, without looking for them on the network."""
    if Path(model).is_dir():
        return Path(model)
    cache: Any = sys.modules.get("huggingface_hub")
    try:
        found: Any = None if cache is None else cache.try_to_load_from_cache(model, "config.json")
    except Exception:  # it takes names of repositories alone: a bucket's address or a folder that is gone is none
        return None
    return Path(found).parent if isinstance(found, str) else None


def parameters_in(folder: Path | None) -> tuple[int, int]:
    """Parameters in the safetensors of a folder, and those of routed experts; 0 where that cannot be counted.

    Weights that are packed several to a number (integers) say nothing of how many there are.
    """
    total = expert = 0
    for path in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        for name, tensor in _tensors(path):
            if tensor.get("dtype") not in _FLOATS:
                return 0, 0
            count = 1
            for length in tensor["shape"]:
                count *= length
            total += count
            expert += count if ".experts." in name else 0
    return total, expert


def _tensors(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names, types and shapes from the header of a safetensors file (8 bytes of length, then JSON)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length)) if length <= _HEADER_LIMIT else {}
    for name, tensor in header.items():
        if name != "__metadata__":
            yield name, tensor
