"""A fake ``libnvidia-ml.so.1``: GPUs that a test or a demo makes up, behind the real ``pynvml``.

:func:`build_fake_nvml` compiles ``fake_nvml.c`` with gcc; :class:`FakeNvml` writes the state file that lies beside the
library (or that ``MELODI_FAKE_NVML_STATE`` names) and moves it. Point ``MELODI_NVML_LIBRARY`` at the library and every
program sees these GPUs: counters in millijoules that move in steps, gauges with a window, errors, lost boards, MIG.

Time is by hand (``monotonic=False``: exact joules without a sleep) or the host's ``CLOCK_MONOTONIC`` (live demos). From
a shell, two GPUs of 100 W and 50 W in real time::

    eval "$(python -m melodi_otel.testing.nvml fake-nvml --watts 100 --watts 50)"
    melodi-otel doctor
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from melodi_otel.testing import nvml_state as layout
from melodi_otel.testing.nvml_gpus import FakeGpu, FakeSlice, write_gpu

__all__ = ["ANSWER_ZERO", "STATE_VARIABLE", "CompilerMissing", "FakeGpu", "FakeNvml", "FakeSlice", "build_fake_nvml"]

SOURCE: Final = Path(__file__).with_name("fake_nvml.c")
STATE_VARIABLE: Final = "MELODI_FAKE_NVML_STATE"
_WALL_S: Final = 1_700_000_000.0
ANSWER_ZERO: Final = -1
"""Code for :meth:`FakeNvml.fail`: the call succeeds and its value is 0."""


class CompilerMissing(RuntimeError):
    """The fake library cannot be built because there is no C compiler; the message says what to install."""


def build_fake_nvml(directory: Path, *, without: Sequence[str] = ()) -> Path:
    """Compile the fake library into ``directory``.

    Args:
        directory: where ``libnvidia-ml.so.1`` is written; made if it is not there.
        without: NVML functions to leave out, for a library that is too old.

    Returns:
        The path of the library.

    Raises:
        CompilerMissing: there is no gcc.
        RuntimeError: the compiler failed; the message is what it said.
    """
    compiler = shutil.which("gcc")
    if compiler is None:
        raise CompilerMissing("the fake NVML library needs the C compiler gcc (Debian: apt-get install gcc libc6-dev)")
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / "libnvidia-ml.so.1"
    missing = [f"-DFAKE_WITHOUT_{function}" for function in without]
    command = [compiler, "-O2", "-shared", "-fPIC", *missing, "-o", str(library), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"gcc could not build the fake NVML library:\n{done.stderr}")
    return library


class FakeNvml:
    """A fake library and the state that drives it.

    Args:
        directory: where library and state lie; one directory per fake, because a loader loads one path once.
        gpus: the boards, in NVML order.
        library: a library built before, to be copied; None: it is compiled here.
        monotonic: False: time stands at 0 until :meth:`advance`; True: time is ``CLOCK_MONOTONIC`` from now on, and
            goes on when this object is closed.
        driver: driver version.
        init_error: code that ``nvmlInit`` answers, 0 for none.
        wall_s: seconds since the epoch at time 0, for what the driver stamps with it (utilisation of processes); None:
            now where time is the host's, else that of :class:`melodi_otel.testing.clock.ManualClock`.
    """

    def __init__(
        self,
        directory: Path,
        gpus: Sequence[FakeGpu] = (),
        *,
        library: Path | None = None,
        monotonic: bool = False,
        driver: str = "570.86.15",
        init_error: int = 0,
        wall_s: float | None = None,
    ) -> None:
        if len(gpus) > layout.MAX_GPUS:
            raise ValueError(f"a fake NVML library has at most {layout.MAX_GPUS} GPUs")
        directory.mkdir(parents=True, exist_ok=True)
        if library is None:
            self.library = build_fake_nvml(directory)
        else:
            self.library = directory / "libnvidia-ml.so.1"
            if library != self.library:
                shutil.copyfile(library, self.library)
        self.state_file = directory / "fake_nvml.state"
        with self.state_file.open("wb") as file:
            file.truncate(ctypes.sizeof(layout.State))
        with self.state_file.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), ctypes.sizeof(layout.State))
        state = layout.State.from_buffer(self._memory)
        self._state: layout.State | None = state
        state.size = ctypes.sizeof(layout.State)
        state.driver = driver.encode()
        state.monotonic = int(monotonic)
        state.origin_ns = time.monotonic_ns()
        if wall_s is None:
            wall_s = time.time() if monotonic else _WALL_S
        state.epoch_us = round(wall_s * 1e6)
        state.init_error = init_error
        for index, gpu in enumerate(gpus):
            write_gpu(state.gpus[index], gpu, index)
        state.gpu_count = len(gpus)
        state.magic = layout.MAGIC

    @property
    def environ(self) -> dict[str, str]:
        """The variable that makes a program see these GPUs (the library finds the state file beside it)."""
        return {"MELODI_NVML_LIBRARY": str(self.library)}

    @property
    def initialized(self) -> int:
        """References that the last process holds on the library (``nvmlInit`` less ``nvmlShutdown``)."""
        return int(self._now().initialized)

    def calls(self) -> dict[str, int]:
        """How often each NVML function was called, over all processes; absent = never."""
        return {call.function.decode(): int(call.count) for call in self._now().calls if call.count}

    def advance(self, seconds: float) -> None:
        """Move the time on by ``seconds`` (only where time is by hand)."""
        state = self._now()
        if state.monotonic:
            raise ValueError("this fake follows CLOCK_MONOTONIC; its time cannot be moved by hand")
        state.now_ns += round(seconds * 1e9)

    def seconds(self) -> float:
        """The fake's time in seconds since its start."""
        return self._time_ns() / 1e9

    def watts(self, gpu: int, watts: float, *, at: float | None = None) -> None:
        """From ``at`` (seconds since the start; None: now) on, board ``gpu`` draws ``watts``.

        Raises:
            ValueError: the times of a board do not rise, or its script is full.
        """
        board = self._now().gpus[gpu]
        t_ns = self._time_ns() if at is None else round(at * 1e9)
        count = int(board.segment_count)
        if count and board.segments[count - 1].t_ns > t_ns:
            raise ValueError("the times of a board's power script must rise")
        if count and board.segments[count - 1].t_ns == t_ns:
            board.segments[count - 1].mw = round(watts * 1000)
            return
        if count == layout.MAX_SEGMENTS:
            raise ValueError(f"a board's power script has at most {layout.MAX_SEGMENTS} entries")
        board.segments[count].t_ns = t_ns
        board.segments[count].mw = round(watts * 1000)
        board.segment_count = count + 1

    def reset_counter(self, gpu: int) -> None:
        """The energy counter of ``gpu`` starts again at 0, as after a driver reload."""
        self.shows(gpu, 0.0)

    def shows(self, gpu: int, joules: float) -> None:
        """The energy counter of ``gpu`` stands at so many joules from now on, for boards whose readings are known beforehand."""
        board = self._now().gpus[gpu]
        board.base_mj = round(joules * 1000)
        board.reset_ns = self._time_ns()

    def lose(self, gpu: int, *, lost: bool = True) -> None:
        """Board ``gpu`` falls off the bus: every call about it answers GPU_IS_LOST."""
        self._now().gpus[gpu].lost = int(lost)

    def load(self, gpu: int, *, utilization: float | None, memory_used: int) -> None:
        """What the slow calls report about ``gpu``: utilisation 0..1 (None: not supported), used memory in bytes."""
        board = self._now().gpus[gpu]
        board.has_utilization = int(utilization is not None)
        board.utilization_percent = round((utilization or 0.0) * 100)
        board.memory_used = memory_used

    def processes(
        self, gpu: int, pids: Sequence[int], *, graphics: Sequence[int] = (), slices: Sequence[int | None] = ()
    ) -> None:
        """The processes on ``gpu``.

        Args:
            gpu: the board.
            pids: those that compute; 0: one that the driver does not name.
            graphics: those that draw.
            slices: for each of ``pids`` the number of the board's MIG device that it is on; None: the board itself.
        """
        board = self._now().gpus[gpu]
        if max(len(pids), len(graphics)) > layout.MAX_PIDS:
            raise ValueError(f"a fake board has at most {layout.MAX_PIDS} processes")
        board.pid_count = board.graphics_count = 0
        for index, pid in enumerate(pids):
            place = slices[index] if index < len(slices) else None
            board.pids[index] = pid
            board.pid_slices[index] = 0 if place is None else place + 1
        for index, pid in enumerate(graphics):
            board.graphics[index] = pid
        board.pid_count, board.graphics_count = len(pids), len(graphics)

    def used(self, gpu: int, *loads: tuple[int, int], at: float | None = None) -> None:
        """In the sample period that ends at ``at`` (seconds since the start; None: now) processes used ``gpu``.

        Args:
            gpu: the board.
            loads: (pid, percent of the time in which its kernels ran).
            at: when; the driver shows it from then on.

        The driver's buffer is short: where it is full, its oldest half is forgotten.
        """
        state = self._now()
        board = state.gpus[gpu]
        t_us = int(state.epoch_us) + round((self._time_ns() / 1e9 if at is None else at) * 1e6)
        for pid, percent in loads:
            count = int(board.load_count)
            if count == layout.MAX_LOADS:
                half = layout.MAX_LOADS // 2
                board.load_count = 0
                for index in range(half):
                    board.loads[index] = board.loads[count - half + index]
                count = half
            load = board.loads[count]
            load.t_us, load.pid, load.sm, load.memory = t_us, pid, percent, 0
            board.load_count = count + 1

    def fail(
        self,
        function: str,
        code: int,
        *,
        gpu: int | None = None,
        after: int = 0,
        times: int | None = None,
        delay_s: float = 0.0,
    ) -> None:
        """Make a function fail.

        Args:
            function: its exported name, e.g. ``nvmlDeviceGetFieldValues`` or ``nvmlDeviceGetCount_v2``.
            code: the NVML error; 0: it works (use it with ``delay_s``); :data:`ANSWER_ZERO`: it works and answers 0.
            gpu: only for this board; None: for all.
            after: calls from now on that still work.
            times: how many calls then fail; None: all.
            delay_s: how long each of these calls takes.
        """
        state = self._now()
        count = int(state.rule_count)
        if count == layout.MAX_RULES:
            raise ValueError(f"a fake NVML library follows at most {layout.MAX_RULES} rules")
        rule = state.rules[count]
        rule.function = function.encode()
        rule.gpu = -1 if gpu is None else gpu
        rule.code = code
        rule.after = after
        rule.times = -1 if times is None else times
        rule.seen = 0
        rule.delay_us = round(delay_s * 1e6)
        state.rule_count = count + 1

    def heal(self) -> None:
        """Forget every rule of :meth:`fail`."""
        self._now().rule_count = 0

    def close(self) -> None:
        """Let go of the state file; the library and what it shows stay."""
        self._state = None
        with contextlib.suppress(BufferError):
            self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _now(self) -> layout.State:
        if self._state is None:
            raise ValueError("this fake NVML library is closed")
        return self._state

    def _time_ns(self) -> int:
        state = self._now()
        return time.monotonic_ns() - int(state.origin_ns) if state.monotonic else int(state.now_ns)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a fake library that lives in real time and print the variables that select it."""
    parser = argparse.ArgumentParser(description="Make fake NVIDIA GPUs of constant power, in real time.")
    parser.add_argument("directory", type=Path, help="where library and state are written")
    parser.add_argument("--watts", type=float, action="append", help="one GPU of this power; may be repeated")
    chosen = parser.parse_args(arguments)
    gpus = [
        FakeGpu(f"GPU-{index:08x}-fa4e-4000-8000-000000000000", name="Fake GPU", watts=watts)
        for index, watts in enumerate(chosen.watts or [100.0])
    ]
    try:
        fake = FakeNvml(chosen.directory.resolve(), gpus, monotonic=True)
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for name, value in fake.environ.items():
        sys.stdout.write(f"export {name}={shlex.quote(value)}\n")
    fake.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
