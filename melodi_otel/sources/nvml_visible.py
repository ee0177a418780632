"""Which boards does this program use? ``CUDA_VISIBLE_DEVICES`` against NVML's boards, by UUID.

An index there counts in CUDA's order, which is not NVML's: by PCI address where ``CUDA_DEVICE_ORDER=PCI_BUS_ID``, else
fastest first, which equals PCI order when all boards are alike and is an assumption, told as such, when they are not.
Pure: boards and environment are arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

_INDEX: Final = re.compile(r"\s*\+?(\d+)")
_PROFILE: Final = re.compile(r"(?:(\d+)c\.)?(\d+)g\.\d+gb")
_OLD_SLICE: Final = re.compile(r"MIG-(GPU-[^/]+)/(\d+)/(\d+)$")


@dataclass(frozen=True, slots=True)
class MigSlice:
    """A MIG device: its UUID, the ids of its instances, and its share of the board by compute slices (None: unknown)."""

    uuid: str
    gpu_instance: int | None = None
    compute_instance: int | None = None
    share: float | None = None


@dataclass(frozen=True, slots=True)
class BoardId:
    """What tells one board from another.

    Attributes:
        uuid: ``GPU-…``.
        index: NVML index.
        name: product name.
        pci: (domain, bus, device); None: unknown.
        speed: cores × clock, to guess CUDA's fastest-first order; None: unknown.
        mig: MIG is on.
        slices: its MIG devices as NVML shows them here.
        minor: N of its node ``/dev/nvidiaN``; None: unknown.
    """

    uuid: str
    index: int
    name: str = ""
    pci: tuple[int, int, int] | None = None
    speed: float | None = None
    mig: bool = False
    slices: tuple[MigSlice, ...] = ()
    minor: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A board that is visible, and the part of it that is: 1.0 and no slices where it is the whole board."""

    board: BoardId
    fraction: float = 1.0
    slices: tuple[MigSlice, ...] = ()


@dataclass(frozen=True, slots=True)
class Visible:
    """The visible boards in the order the program numbers them, and what a person should know about the mapping."""

    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()


def share_of_profile(name: str, slices_of_board: int) -> float | None:
    """Share of a board by the compute slices in a MIG profile's name (``1c.3g.20gb`` → 1); None: no profile in it."""
    match = _PROFILE.search(name)
    if match is None or slices_of_board <= 0:
        return None
    return min(1.0, int(match[1] or match[2]) / slices_of_board)


def visible(boards: Sequence[BoardId], environ: Mapping[str, str]) -> Visible:
    """Apply ``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER``.

    Args:
        boards: all boards that NVML shows, any order.
        environ: the program's environment.

    Returns:
        The visible boards; several slices of one board are one choice with their summed fraction.
    """
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return _all(boards, environ)
    notes: list[str] = []
    picks: list[tuple[BoardId, MigSlice | None]] = []
    ordered: list[BoardId] | None = None
    for entry in (word.strip() for word in wanted.split(",")):
        pick: tuple[BoardId, MigSlice | None] | None
        number = _INDEX.match(entry)
        if number is None:
            pick = _by_uuid(boards, entry)
        else:
            if ordered is None:
                ordered, doubt = _cuda_order(boards, environ)
                notes.extend(doubt)
            index = int(number[1])
            pick = _whole_or_first_slice(ordered[index], notes) if index < len(ordered) else None
        if pick is None:
            # CUDA hides everything from the first entry that it does not know; -1 is how users ask for that.
            if entry not in ("", "-1"):
                notes.append(f"CUDA_VISIBLE_DEVICES ends at {entry!r}, which names no device here")
            break
        if any(pick[0] is board and pick[1] is part for board, part in picks):
            notes.append(f"CUDA_VISIBLE_DEVICES names {entry!r} twice: CUDA then shows no device")
            return Visible((), tuple(notes))
        picks.append(pick)
    return Visible(_joined(picks, notes), tuple(notes))


def _all(boards: Sequence[BoardId], environ: Mapping[str, str]) -> Visible:
    """Everything, unless the container runtime was told to hand out MIG devices: then those."""
    notes: list[str] = []
    handed = [word.strip() for word in environ.get("NVIDIA_VISIBLE_DEVICES", "").split(",")]
    picks = [pick for word in handed if word.startswith("MIG-") and (pick := _by_uuid(boards, word)) is not None]
    if picks:
        return Visible(_joined(list(dict.fromkeys(picks)), notes), tuple(notes))
    return Visible(tuple(Choice(board) for board in sorted(boards, key=lambda board: board.index)))


def _by_uuid(boards: Sequence[BoardId], entry: str) -> tuple[BoardId, MigSlice | None] | None:
    if entry.startswith("GPU-"):
        found = [board for board in boards if board.uuid.startswith(entry)]
        # More than the prefix, or it would name any only board.
        return (found[0], None) if len(found) == 1 and len(entry) > len("GPU-") else None
    if not entry.startswith("MIG-") or entry == "MIG-":
        return None
    parts = [(board, part) for board in boards for part in board.slices if part.uuid.startswith(entry)]
    exact = [pair for pair in parts if pair[1].uuid == entry]
    if exact or len(parts) == 1:
        return (exact or parts)[0]
    old = _OLD_SLICE.match(entry)
    if old is None:
        return None
    for board in boards:
        for part in board.slices:
            if (board.uuid, part.gpu_instance, part.compute_instance) == (old[1], int(old[2]), int(old[3])):
                return board, part
    return None


def _whole_or_first_slice(board: BoardId, notes: list[str]) -> tuple[BoardId, MigSlice | None]:
    """What an index means: the board, or its first MIG device, which is all that CUDA shows of a partitioned board."""
    if not board.slices:
        return board, None
    notes.append(f"an index names the partitioned board {board.uuid}: CUDA shows its first MIG device only")
    return board, board.slices[0]


def _joined(picks: Sequence[tuple[BoardId, MigSlice | None]], notes: list[str]) -> tuple[Choice, ...]:
    fractions: dict[str, float] = {}
    boards: dict[str, BoardId] = {}
    slices: dict[str, tuple[MigSlice, ...]] = {}
    whole: set[str] = set()
    for board, part in picks:
        share = 1.0
        if part is None:
            whole.add(board.uuid)
        else:
            slices[board.uuid] = (*slices.get(board.uuid, ()), part)
            if part.share is None:
                notes.append(f"the size of {part.uuid} is unknown: the whole board {board.uuid} is taken for it")
            else:
                share = part.share
                notes.append(
                    f"{part.uuid} is {share:.3g} of the board {board.uuid} by compute slices; a slice has no meter of its "
                    "own, so its energy is the board's by that share, with low confidence"
                )
        boards[board.uuid] = board
        fractions[board.uuid] = min(1.0, fractions.get(board.uuid, 0.0) + share)
    return tuple(
        Choice(board, fractions[uuid], () if uuid in whole else slices.get(uuid, ())) for uuid, board in boards.items()
    )


def _cuda_order(boards: Sequence[BoardId], environ: Mapping[str, str]) -> tuple[list[BoardId], list[str]]:
    by_pci = sorted(boards, key=lambda board: (board.pci is None, board.pci or (0, 0, 0), board.index))
    if environ.get("CUDA_DEVICE_ORDER", "").strip() == "PCI_BUS_ID" or len({board.name for board in boards}) <= 1:
        return by_pci, []
    note = (
        "CUDA's order of these unlike GPUs is assumed (fastest first); set CUDA_DEVICE_ORDER=PCI_BUS_ID or name GPUs by "
        "UUID in CUDA_VISIBLE_DEVICES to be sure"
    )
    if any(board.speed is None for board in boards):
        return by_pci, [note]
    return sorted(by_pci, key=lambda board: -(board.speed or 0.0)), [note]
