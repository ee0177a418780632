"""Which of several processes this one is, where that is certain, and over how many a model is spread."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple


class Place(NamedTuple):
    """This process among ``world`` processes that run the same program."""

    rank: int
    world: int


class Ranks:
    """Finds the place of this process.

    Args:
        environ: where a launcher (``torchrun``, ``accelerate``, ``deepspeed``) leaves ``RANK`` and ``WORLD_SIZE``; read once.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._launched = _launched(environ)

    def place(self) -> Place | None:
        """The rank that torch has initialised, else the launcher's; None for a process that stands alone."""
        distributed: Any = sys.modules.get("torch.distributed")
        try:
            if distributed is not None and distributed.is_available() and distributed.is_initialized():
                world = int(distributed.get_world_size())
                return Place(int(distributed.get_rank()), world) if world > 1 else None
        except Exception:
            return self._launched
        return self._launched


def _launched(environ: Mapping[str, str]) -> Place | None:
    try:
        rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    return Place(rank, world) if 0 <= rank < world and world > 1 else None


def spread(model: Any) -> int | None:
    """Processes whose devices together hold one copy of ``model``; None where this one holds all of it, as far as it says.

    Sharded parameters tell: those of tensor parallel and FSDP know their mesh, those that DeepSpeed has partitioned carry
    its mark, and so does whoever flattened them into one.
    """
    sizes = [size for parameter in model.parameters() if (size := _shards(parameter)) > 1]
    return max(sizes, default=None)


def _shards(parameter: Any) -> int:
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None:
        return _sharded_over(mesh, getattr(parameter, "placements", ()))
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_sharding_strategy"):
        distributed: Any = sys.modules.get("torch.distributed")
        return int(distributed.get_world_size()) if distributed is not None and distributed.is_initialized() else 1
    return 1


def _sharded_over(mesh: Any, placements: Any) -> int:
    """Only dimensions of the mesh along which it is cut: along the others every process has a copy."""
    size = 1
    for dimension, placement in enumerate(placements):
        if placement.is_shard():
            size *= int(mesh.size(dimension))
    return size
