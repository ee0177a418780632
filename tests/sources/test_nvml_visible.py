from __future__ import annotations

import pytest

from melodi_otel.sources.nvml_visible import BoardId, MigSlice, share_of_profile, visible

A = BoardId("GPU-aaaa1111-0000", 0, "X", (0, 3, 0), 10.0)
B = BoardId("GPU-aaaa2222-0000", 1, "X", (0, 2, 0), 10.0)
C = BoardId("GPU-bbbb3333-0000", 2, "X", (0, 9, 0), 10.0)
ALIKE = (A, B, C)
SLICED = BoardId(
    "GPU-cccc",
    0,
    "A100",
    (0, 1, 0),
    mig=True,
    slices=(
        MigSlice("MIG-11111111", 1, 0, 1 / 7),
        MigSlice("MIG-22222222", 2, 0, 3 / 7),
        MigSlice("MIG-33333333", 3, 0, None),
    ),
)


def uuids(boards: tuple[BoardId, ...], wanted: str | None, **more: str) -> list[str]:
    environ = dict(more) if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted, **more}
    return [choice.board.uuid for choice in visible(boards, environ).choices]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, [A.uuid, B.uuid, C.uuid]),
        ("", []),
        ("0", [B.uuid]),
        ("1", [A.uuid]),
        ("2,0", [C.uuid, B.uuid]),
        (" 2 , 0 ", [C.uuid, B.uuid]),
        ("0,-1", [B.uuid]),
        ("-1", []),
        ("-1,0", []),
        ("0,7,1", [B.uuid]),
        ("0,x,1", [B.uuid]),
        ("NoDevFiles", []),
        ("0,0", []),
        ("GPU-bbbb3333-0000", [C.uuid]),
        ("GPU-bbbb", [C.uuid]),
        ("GPU-bbbb,GPU-aaaa1", [C.uuid, A.uuid]),
        ("GPU-aaaa", []),
        ("GPU-", []),
        ("GPU-bbbb,GPU-zzzz,GPU-aaaa1", [C.uuid]),
        ("GPU-bbbb,GPU-bbbb3333", []),
        ("bbbb3333", []),
        ("MIG-11111111", []),
    ],
)
def test_a_list_is_read_as_cuda_reads_it(wanted: str | None, found: list[str]) -> None:
    """Indices count in PCI order, UUIDs and unique prefixes name boards, and a list ends at its first bad entry."""
    assert uuids(ALIKE, wanted) == found


def test_equal_gpus_need_no_assumption() -> None:
    """Boards of one model are in PCI order whatever CUDA_DEVICE_ORDER says, and nothing is noted."""
    assert visible(ALIKE, {"CUDA_VISIBLE_DEVICES": "0"}).notes == ()


def test_unlike_gpus_are_taken_fastest_first_and_that_is_said() -> None:
    """With unlike boards an index counts from the fastest, and the note names the variable that would make it sure."""
    boards = (BoardId("GPU-slow", 0, "T4", (0, 1, 0), 1.0), BoardId("GPU-fast", 1, "H100", (0, 2, 0), 9.0))
    seen = visible(boards, {"CUDA_VISIBLE_DEVICES": "0"})
    assert [choice.board.uuid for choice in seen.choices] == ["GPU-fast"]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in seen.notes[0]


def test_unlike_gpus_of_unknown_speed_are_taken_in_pci_order_and_that_is_said() -> None:
    """Where the speed of a board is unknown the order is that of PCI, still noted as assumed."""
    boards = (BoardId("GPU-late", 0, "T4", (0, 5, 0)), BoardId("GPU-early", 1, "H100", (0, 2, 0), 9.0))
    seen = visible(boards, {"CUDA_VISIBLE_DEVICES": "0"})
    assert [choice.board.uuid for choice in seen.choices] == ["GPU-early"]
    assert "assumed" in seen.notes[0]


def test_pci_order_is_certain_when_it_is_asked_for() -> None:
    """CUDA_DEVICE_ORDER=PCI_BUS_ID orders unlike boards by address and leaves nothing to assume."""
    boards = (BoardId("GPU-late", 0, "H100", (0, 5, 0), 9.0), BoardId("GPU-early", 1, "T4", (0, 2, 0), 1.0))
    seen = visible(boards, {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    assert ([choice.board.uuid for choice in seen.choices], seen.notes) == (["GPU-early"], ())


def test_uuids_of_unlike_gpus_need_no_assumption() -> None:
    """A list of UUIDs does not depend on CUDA's order, so nothing is noted."""
    boards = (BoardId("GPU-1", 0, "T4", (0, 1, 0), 1.0), BoardId("GPU-2", 1, "H100", (0, 2, 0), 9.0))
    assert visible(boards, {"CUDA_VISIBLE_DEVICES": "GPU-2,GPU-1"}).notes == ()


@pytest.mark.parametrize(
    ("wanted", "fraction"),
    [
        ("MIG-11111111", 1 / 7),
        ("MIG-1", 1 / 7),
        ("MIG-11111111,MIG-22222222", 4 / 7),
        ("MIG-GPU-cccc/2/0", 3 / 7),
        ("MIG-33333333", 1.0),
        ("MIG-22222222,MIG-33333333", 1.0),
        ("0", 1 / 7),
        ("GPU-cccc", 1.0),
    ],
)
def test_slices_are_their_board_with_a_fraction(wanted: str, fraction: float) -> None:
    """MIG ids of either form give one device per board, with the sum of their shares, at most 1."""
    choices = visible((SLICED,), {"CUDA_VISIBLE_DEVICES": wanted}).choices
    assert [choice.board.uuid for choice in choices] == ["GPU-cccc"]
    assert choices[0].fraction == pytest.approx(fraction, rel=1e-12)


@pytest.mark.parametrize(
    ("wanted", "parts"),
    [
        ("MIG-11111111,MIG-22222222", ["MIG-11111111", "MIG-22222222"]),
        ("0", ["MIG-11111111"]),
        ("GPU-cccc", []),
        ("MIG-11111111,GPU-cccc", []),
    ],
)
def test_a_choice_knows_its_slices(wanted: str, parts: list[str]) -> None:
    """Which MIG devices are ours is kept, to ask for their processes; none where the whole board is ours."""
    choices = visible((SLICED,), {"CUDA_VISIBLE_DEVICES": wanted}).choices
    assert [part.uuid for part in choices[0].slices] == parts


@pytest.mark.parametrize("wanted", ["MIG-", "MIG-9", "MIG-GPU-cccc/9/0", "MIG-GPU-dddd/1/0", "MIG-11111111,MIG-1"])
def test_slices_that_are_not_here_or_named_twice_show_nothing(wanted: str) -> None:
    """An unknown, empty or repeated MIG id leaves no device visible."""
    assert visible((SLICED,), {"CUDA_VISIBLE_DEVICES": wanted}).choices == ()


def test_a_slice_is_noted_as_of_low_confidence() -> None:
    """The share of a slice is a model of its energy, and the note says so."""
    notes = visible((SLICED,), {"CUDA_VISIBLE_DEVICES": "MIG-1"}).notes
    assert "low confidence" in notes[0]


def test_a_container_with_a_slice_sees_its_share() -> None:
    """Where the container runtime was handed MIG devices and CUDA's variable is unset, those are what is visible."""
    choices = visible((SLICED,), {"NVIDIA_VISIBLE_DEVICES": "MIG-11111111,MIG-11111111"}).choices
    assert [(choice.board.uuid, choice.fraction) for choice in choices] == [("GPU-cccc", 1 / 7)]


@pytest.mark.parametrize(
    ("name", "slices", "share"),
    [
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 7, 1 / 7),
        ("NVIDIA H100 MIG 7g.80gb", 7, 1.0),
        ("MIG 1c.3g.20gb", 7, 1 / 7),
        ("NVIDIA A30 MIG 2g.12gb", 4, 0.5),
        ("MIG 1g.10gb+me", 7, 1 / 7),
        ("NVIDIA A100", 7, None),
        ("MIG 1g.5gb", 0, None),
    ],
)
def test_a_profile_name_gives_its_share(name: str, slices: int, share: float | None) -> None:
    """Compute slices of the profile over those of the board; None where no profile is named."""
    assert share_of_profile(name, slices) == share
