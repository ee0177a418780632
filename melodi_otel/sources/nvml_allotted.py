"""Which boards may this program use? What the control group opens, and what SLURM says it allotted.

SLURM hands GPUs to a job in two ways. With ``ConstrainDevices`` the job's control group opens only the nodes
``/dev/nvidiaN`` of its GPUs; CUDA then numbers those alone, whatever ``CUDA_VISIBLE_DEVICES`` says. Without it only the
environment says which GPUs are the job's: ``CUDA_VISIBLE_DEVICES``, and where a program has lost that,
``SLURM_STEP_GPUS``, ``SLURM_JOB_GPUS`` or ``GPU_DEVICE_ORDINAL``. Every answer that cannot be read with certainty changes
nothing: then all boards stay.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from melodi_otel.sources.nvml_visible import BoardId

__all__ = ["allotted", "may_open", "openable"]

_RANGE: Final = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


def may_open(minor: int, devices: str = "/dev") -> bool | None:
    """Whether this process may open ``/dev/nvidia<minor>``; None: there is no such node.

    ``access`` is enough: the kernel asks the device control group (the list of version 1 and the program of version 2) there
    too, and nothing is opened, which could wake the GPU.
    """
    node = Path(devices, f"nvidia{minor}")
    if not node.exists():
        return None
    return os.access(node, os.R_OK | os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def openable(boards: Sequence[BoardId], ask: Callable[[int], bool | None]) -> tuple[list[BoardId], list[str]]:
    """The boards whose node may be opened, and what to say of the others.

    A board without a known node stays. Where no node at all may be opened the nodes say nothing (a runtime that does not
    use them), and all boards stay.
    """
    answers = {board.uuid: None if board.minor is None else ask(board.minor) for board in boards}
    if True not in answers.values():
        return list(boards), []
    kept = [board for board in boards if answers[board.uuid] is not False]
    notes = [
        f"GPU {board.uuid} (/dev/nvidia{board.minor}) may not be opened by this process: it is somebody else's"
        for board in boards
        if answers[board.uuid] is False
    ]
    return kept, notes


def allotted(boards: Sequence[BoardId], environ: Mapping[str, str]) -> tuple[list[BoardId], list[str]]:
    """Of ``boards`` those that SLURM gave to this job or step, where ``CUDA_VISIBLE_DEVICES`` says nothing.

    ``SLURM_STEP_GPUS`` counts inside a step, ``SLURM_JOB_GPUS`` outside one (in a step that was started from a batch script
    on another node it names that node's). Both are numbers of the node, so they are read only where no control group
    has taken boards away, and only where numbers of nodes and PCI order agree. ``GPU_DEVICE_ORDINAL`` counts the boards
    that are left.
    """
    if "CUDA_VISIBLE_DEVICES" in environ or not environ.get("SLURM_JOB_ID"):
        return list(boards), []
    ordered = sorted(boards, key=lambda board: (board.pci is None, board.pci or (0, 0, 0), board.index))
    minors = [board.minor for board in ordered]
    step = "SLURM_STEP_GPUS" if environ.get("SLURM_STEP_ID") else "SLURM_JOB_GPUS"
    for name in (step, "GPU_DEVICE_ORDINAL"):
        numbers = _numbers(environ.get(name, ""))
        if not numbers or max(numbers) >= len(ordered) or len(numbers) == len(ordered):
            continue
        if name == step and minors != list(range(len(ordered))) and any(minor is not None for minor in minors):
            continue
        note = f"CUDA_VISIBLE_DEVICES is not set; {name}={environ[name]} says which GPUs are this job's"
        return [ordered[number] for number in numbers], [note]
    return list(boards), []


def _numbers(text: str) -> list[int]:
    """``0,2-3`` as numbers, each once; empty where any of it is something else."""
    found: list[int] = []
    for word in text.split(","):
        match = _RANGE.fullmatch(word.strip())
        if match is None:
            return []
        first = int(match[1])
        found += range(first, int(match[2] or first) + 1)
    return found if len(set(found)) == len(found) else []
