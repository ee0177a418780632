"""Which boards a program may use: nodes that may be opened, and what SLURM allotted."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

from melodi_otel.sources.base import Settings
from melodi_otel.sources.nvml import open_nvml
from melodi_otel.sources.nvml_allotted import allotted, may_open, openable
from melodi_otel.sources.nvml_visible import BoardId, visible
from melodi_otel.testing.clock import ManualClock
from melodi_otel.testing.nvml import FakeGpu, FakeNvml, build_fake_nvml

FOUR = tuple(BoardId(f"GPU-{n}", n, "X", (0, n + 1, 0), 1.0, minor=n) for n in range(4))
NODES = tuple(BoardId(f"GPU-{n}", n, "X", (0, n + 1, 0), 1.0) for n in range(4))


def names(boards: list[BoardId]) -> list[str]:
    return [board.uuid for board in boards]


@pytest.mark.parametrize(
    ("answers", "kept"),
    [
        ([True, True, True, True], "0123"),
        ([False, True, False, True], "13"),
        ([False, False, False, False], "0123"),
        ([None, None, None, None], "0123"),
        ([False, None, False, False], "0123"),
        ([True, None, False, False], "01"),
    ],
)
def test_boards_whose_node_is_closed_are_somebody_elses(answers: list[bool | None], kept: str) -> None:
    """A closed node takes its board away where another is open; a missing node says nothing."""
    assert names(openable(FOUR, lambda minor: answers[minor])[0]) == [f"GPU-{n}" for n in kept]


def test_a_board_without_a_minor_number_stays() -> None:
    """Where the driver does not tell the node, no node is asked."""
    kept, notes = openable(NODES, lambda minor: pytest.fail(f"asked for {minor}"))
    assert (names(kept), notes) == (["GPU-0", "GPU-1", "GPU-2", "GPU-3"], [])


def test_the_note_names_the_node() -> None:
    """Who is left out is said with the node that is closed."""
    assert openable(FOUR, lambda minor: minor != 2)[1] == [
        "GPU GPU-2 (/dev/nvidia2) may not be opened by this process: it is somebody else's"
    ]


def test_a_node_is_asked_without_being_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, closed, and not there are three answers."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidia1").touch()
    monkeypatch.setattr(os, "access", lambda path, mode, **_: path.name == "nvidia0" and mode == os.R_OK | os.W_OK)
    monkeypatch.setattr(os, "supports_effective_ids", {os.access})
    monkeypatch.setattr(os, "open", lambda *_, **__: pytest.fail("opened"))
    assert [may_open(minor, str(tmp_path)) for minor in range(3)] == [True, False, None]


@pytest.mark.parametrize(
    ("environ", "given"),
    [
        ({}, "0123"),
        ({"SLURM_JOB_GPUS": "1"}, "0123"),
        ({"SLURM_JOB_ID": "7"}, "0123"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "1,3"}, "13"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "1-2"}, "12"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "0-3"}, "0123"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "4"}, "0123"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "gpu:1"}, "0123"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "1,1"}, "0123"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "1", "SLURM_STEP_GPUS": "2"}, "1"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_GPUS": "1", "SLURM_STEP_GPUS": "2"}, "2"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_GPUS": "1"}, "0123"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "GPU_DEVICE_ORDINAL": "3"}, "3"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "1", "CUDA_VISIBLE_DEVICES": "2"}, "0123"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "1", "CUDA_VISIBLE_DEVICES": ""}, "0123"),
    ],
)
def test_what_slurm_allotted_counts_where_cuda_is_told_nothing(environ: dict[str, str], given: str) -> None:
    """Only in a job, only without CUDA_VISIBLE_DEVICES, the step's before the job's; what cannot be read changes nothing."""
    assert names(allotted(FOUR, environ)[0]) == [f"GPU-{n}" for n in given]


def test_numbers_of_nodes_that_are_not_pci_order_are_not_guessed() -> None:
    """Where node 0 is not the first board by address, or a board was taken away, a node's number says nothing certain."""
    swapped = (*(BoardId(f"GPU-{n}", n, "X", (0, n + 1, 0), minor=1 - n) for n in range(2)), *FOUR[2:])
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "1"}
    assert len(allotted(swapped, job)[0]) == 4
    assert names(allotted(FOUR[1:], job)[0]) == ["GPU-1", "GPU-2", "GPU-3"]


def test_cuda_counts_the_boards_that_are_left() -> None:
    """CUDA_VISIBLE_DEVICES=0 in a job whose control group opens nodes 2 and 3 is the board of node 2."""
    kept, _ = openable(FOUR, lambda minor: minor >= 2)
    environ = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert [choice.board.uuid for choice in visible(kept, environ).choices] == ["GPU-2", "GPU-3"]
    assert [choice.board.uuid for choice in visible(kept, {"CUDA_VISIBLE_DEVICES": "0"}).choices] == ["GPU-2"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        reason = "gcc is not installed: the fake NVML library cannot be compiled"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return build_fake_nvml(tmp_path_factory.mktemp("fake-nvml"))


def test_the_source_leaves_out_what_the_job_may_not_open(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two boards whose nodes exist the source has the one that may be opened, and notes why the other is not there."""
    for minor in range(2):
        (tmp_path / f"nvidia{minor}").touch()
    monkeypatch.setattr(os, "access", lambda path, *_, **__: str(path).endswith("nvidia1"))
    monkeypatch.setattr(os, "supports_effective_ids", {os.access})
    with FakeNvml(tmp_path / "fake", [FakeGpu("GPU-a", minor=0), FakeGpu("GPU-b", minor=1)], library=library) as fake:
        settings = Settings(clock=ManualClock(), environ={}, nvml_library=str(fake.library))
        source = open_nvml(settings, devices=str(tmp_path))
        assert [device.id for device in source.devices] == ["GPU-b"]
        assert "/dev/nvidia0" in source.notes[0]
        source.close()


def test_a_gpu_of_another_job_is_no_warning(tmp_path: Path, library: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A board that the driver does not hand out is noted without a warning; one that is broken is warned of."""
    gpus = [FakeGpu(f"GPU-{n}") for n in range(3)]
    with FakeNvml(tmp_path / "fake", gpus, library=library) as fake:
        fake.fail("nvmlDeviceGetHandleByIndex_v2", 4, gpu=0)
        fake.fail("nvmlDeviceGetHandleByIndex_v2", 999, gpu=1)
        settings = Settings(clock=ManualClock(), environ={}, nvml_library=str(fake.library))
        with caplog.at_level(logging.WARNING):
            source = open_nvml(settings, devices=str(tmp_path))
        assert [device.id for device in source.devices] == ["GPU-2"]
        assert [note.split(":")[0] for note in source.notes] == ["GPU 0 is left out", "GPU 1 is left out"]
        assert [record.getMessage()[:23] for record in caplog.records] == ["nvml: GPU 1 is left out"]
        source.close()


def test_the_source_follows_slurm(tmp_path: Path, library: Path) -> None:
    """In a job without CUDA_VISIBLE_DEVICES the source has the job's boards."""
    gpus = [FakeGpu(f"GPU-{n}", minor=n) for n in range(3)]
    with FakeNvml(tmp_path / "fake", gpus, library=library) as fake:
        environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "0,2"}
        settings = Settings(clock=ManualClock(), environ=environ, nvml_library=str(fake.library))
        source = open_nvml(settings, devices=str(tmp_path))
        assert [device.id for device in source.devices] == ["GPU-0", "GPU-2"]
        assert source.notes == ("CUDA_VISIBLE_DEVICES is not set; SLURM_JOB_GPUS=0,2 says which GPUs are this job's",)
        source.close()
