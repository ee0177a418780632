"""Which GPUs does this program use? ``ROCR_VISIBLE_DEVICES`` and then ``HIP_VISIBLE_DEVICES`` against amdsmi's boards.

The first is the runtime's and takes numbers or UUIDs (``GPU-`` and the GPU's serial number); the second is HIP's, takes
numbers, and counts in what the first has left; where it is not set, HIP takes ``CUDA_VISIBLE_DEVICES`` (ROCm documentation,
"GPU isolation techniques" and "HIP environment variables"). Pure: boards and environment are arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["AmdBoardId", "visible"]


@dataclass(frozen=True, slots=True)
class AmdBoardId:
    """What tells one board from another.

    Attributes:
        index: position in amdsmi's list.
        hip_index: position in HIP's own list; None: not told.
        uuids: everything by which ``ROCR_VISIBLE_DEVICES`` may name it, in lower case, each with ``gpu-`` in front.
    """

    index: int
    hip_index: int | None = None
    uuids: frozenset[str] = frozenset()


def visible(boards: Sequence[AmdBoardId], environ: Mapping[str, str]) -> tuple[tuple[AmdBoardId, ...], tuple[str, ...]]:
    """The boards that the program sees, in the order it numbers them, and what a person should know about that.

    Args:
        boards: all boards that amdsmi shows.
        environ: the program's environment.
    """
    notes: list[str] = []
    told = all(board.hip_index is not None for board in boards)
    left = sorted(boards, key=lambda board: board.hip_index if told and board.hip_index is not None else board.index)
    hip = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in environ else "CUDA_VISIBLE_DEVICES"
    for variable in ("ROCR_VISIBLE_DEVICES", hip):
        wanted = environ.get(variable)
        if wanted is None:
            continue
        if not told and any(word.strip().isdigit() for word in wanted.split(",")) and len(boards) > 1:
            notes.append(
                f"{variable} counts in HIP's order, which is taken for amdsmi's (this amdsmi does not tell it)"
            )
        left = _chosen(left, wanted, variable, notes)
    return tuple(left), tuple(notes)


def _chosen(boards: Sequence[AmdBoardId], wanted: str, variable: str, notes: list[str]) -> list[AmdBoardId]:
    chosen: list[AmdBoardId] = []
    for word in (part.strip() for part in wanted.split(",")):
        board = _named(boards, word)
        if board is None:
            # As CUDA, the runtimes hide everything from the first entry that they do not know.
            if word not in ("", "-1"):
                notes.append(f"{variable} ends at {word!r}, which names no device here")
            break
        if board not in chosen:
            chosen.append(board)
    return chosen


def _named(boards: Sequence[AmdBoardId], word: str) -> AmdBoardId | None:
    if word.isdigit():
        return boards[int(word)] if int(word) < len(boards) else None
    named = [board for board in boards if word.lower() in board.uuids]
    return named[0] if len(named) == 1 else None
