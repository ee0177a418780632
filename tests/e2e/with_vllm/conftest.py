"""Real vLLM on the CPU; without its environment these tests are skipped, in CI they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from melodi_otel.testing.nvml import CompilerMissing, build_fake_nvml
from tests.e2e.with_vllm.rig import IN_PROCESS, Meters, VllmServer, environ, run_program

CHECKOUT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def vllm_python(interpreter: Callable[..., Path]) -> Path:
    """The interpreter of vLLM's environment; ``MELODI_VLLM_PYTHON`` names another one."""
    return interpreter("vllm", " torch")


@pytest.fixture(scope="session")
def checkpoint(need: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model with tokenizer and chat template."""
    need("torch", "transformers")
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    # In a process of its own: torch stays out of this one, where no other test here needs it.
    words = [sys.executable, "-m", "melodi_otel.testing.tiny_checkpoint", str(directory)]
    env = os.environ | {"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fake NVML library, compiled once."""
    try:
        return build_fake_nvml(tmp_path_factory.mktemp("nvml"))
    except CompilerMissing as missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(missing))
        raise


@pytest.fixture(scope="session")
def vllm_server(
    vllm_python: Path, checkpoint: Path, nvml_library: Path, new_hub_place: Callable[[], Any]
) -> Iterator[Callable[..., VllmServer]]:
    """``vllm_server(*flags, env={…}, gpus=1, agent=False)``: a server with these further flags and variables, healthy.

    With ``agent`` its hub is an agent that records a trace, else the shared one that it starts itself; ``before`` are words in
    front of its command.

    It is the one that an earlier test had, where that asked for the same and it still runs. Only one runs at a time: two cores
    are few, so tests of one set of flags stand together.
    """
    running: dict[Any, VllmServer] = {}
    failed: dict[Any, Exception] = {}

    def stop_all() -> None:
        while running:
            running.popitem()[1].close()

    def serve(
        *flags: str,
        env: dict[str, str | None] | None = None,
        gpus: int = 1,
        agent: bool = False,
        before: tuple[str, ...] = (),
    ) -> VllmServer:
        key = (flags, tuple(sorted((env or {}).items(), key=str)), gpus, agent, before)
        found = running.get(key)
        if found is not None and found.process.poll() is None:
            return found
        if key in failed:  # what did not start for one test is not waited for by the next ones too
            raise RuntimeError("no such server started for an earlier test") from failed[key]
        stop_all()
        place = new_hub_place()
        made = VllmServer(
            vllm_python, checkpoint, place, Meters(place, gpus, nvml_library), flags, env, agent=agent, before=before
        )
        running[key] = made
        try:
            made.ready()
        except Exception as error:
            failed[key] = error
            stop_all()
            raise
        return made

    yield serve
    stop_all()


@pytest.fixture
def vllm_program(
    vllm_python: Path, checkpoint: Path, nvml_library: Path, hub_place: Any, receiver: Any
) -> Iterator[Callable[..., dict[str, Any]]]:
    """``vllm_program(script, env={…}, …)``: run a program with vLLM's engine inside it; what it told.

    Its argument is JSON: the further arguments, ``model`` and ``out``. Its books are in ``hub_place``, its spans at ``receiver``;
    meters count from before its start, and stand still when it has ended.
    """
    meters = Meters(hub_place, 1, nvml_library)

    def run(script: Path, env: dict[str, str | None] | None = None, **spec: Any) -> dict[str, Any]:
        given = environ(hub_place, meters, receiver, {**IN_PROCESS, **(env or {})})
        meters.go()
        told = run_program(vllm_python, script, given, hub_place, **{"model": str(checkpoint), **spec})
        return told | {"counted": meters.still()}

    yield run
    meters.close()
