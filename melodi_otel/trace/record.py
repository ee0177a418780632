"""Record: what the ledger is told, written as a trace while it runs.

The recorder is the ledger's tap: it sees every message on the settle thread, in the order in which it took effect, and
writes the line that says the same. Counters are written repaired (a wrap does not fall, a reset does); steps are written with
their full work.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import sys
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Final

import msgspec

from melodi_otel.attribution.engines import Work, with_host
from melodi_otel.attribution.meter import EngineId, Key, Late
from melodi_otel.devices import Device
from melodi_otel.timeline.counter import Counter
from melodi_otel.trace import lines as form
from melodi_otel.trace.whole import WholeSteps as Lane
from melodi_otel.units import seconds

log = logging.getLogger("melodi_otel")

_BUFFER: Final = 1 << 16


class Recorder:
    """Writes a trace file.

    Args:
        path: the file; it is replaced. Where another process is writing it now, ``NAME.PID.jsonl`` beside it is used.
        host_devices: ids that the ledger adds to every engine and request.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, host_devices: Sequence[str] = ()) -> None:
        # Unbuffered, with a buffer of our own: the lock of a buffered file may be held when the process forks.
        self._file: FileIO | None = _own_file(Path(path))
        self._buffer = bytearray()
        self._host = tuple(host_devices)
        self._counters: dict[str, tuple[Counter, float]] = {}
        self._lanes: dict[tuple[EngineId, int], Lane] = {}
        self._t_ns = 0
        self._write: dict[str, Callable[..., None]] = {
            "device": self._device,
            "counter": self._counter,
            "gauge": self._gauge,
            "cpu": self._cpu,
            "foreign": self._foreign,
            "busy": self._busy,
            "engine": self._engine,
            "open": self._open,
            "work_unseen": self._unseen,
            "heard": self._heard,
            "bind": self._bind,
            "progress": self._progress,
            "step": self._step,
            "work": self._work,
            "close": self._close,
        }

    def tap(self, message: str, arguments: tuple[Any, ...]) -> None:
        """Write the line of one message; a failing disk ends the recording with one warning, nothing else."""
        writer = self._write.get(message)
        if writer is None or self._file is None:
            return
        try:
            writer(*arguments)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        try:
            self._write_out()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Finish the file."""
        self.flush()
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def forked(self) -> None:
        """In a child: the parent goes on writing, and what its buffer held is not written a second time."""
        file, self._file = self._file, None
        self._buffer = bytearray()
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def _give_up(self, error: OSError) -> None:
        log.warning("melodi_otel: recording stops, the trace cannot be written: %s", error)
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def _line(self, line: msgspec.Struct) -> None:
        self._buffer += form.encode(line)
        if len(self._buffer) >= _BUFFER:
            self._write_out()

    def _write_out(self) -> None:
        whole, self._buffer = self._buffer, bytearray()
        rest = memoryview(whole)
        while rest and self._file is not None:
            rest = rest[self._file.write(rest) or 0 :]

    def _all(self, devices: Sequence[str] | None) -> list[str] | None:
        return None if devices is None else list(with_host(devices, self._host))

    def _device(self, device: Device) -> None:
        self._line(
            form.DeviceLine(
                device.id,
                device.type,
                device.idle_watts,
                device.window_s,
                device.period_s,
                device.peak_flops,
                device.bytes_per_s,
                device.name,
                device.source,
                device.estimated,
                device.relative_uncertainty,
                device.fraction,
                live=True,
            )
        )

    def _counter(self, device: str, t_ns: int, joules: float, range_j: float | None, shaped: bool = False) -> None:
        repair, total = self._counters.get(device) or (Counter(), joules)
        change = repair.read(t_ns, joules, range_j)
        if change.joules is not None:
            total += change.joules
        elif change.event == "reset":
            total = 0.0 if total > 0.0 else -1.0
        self._counters[device] = (repair, total)
        self._line(form.SampleLine(seconds(t_ns), device, joules=total, shaped=shaped))

    def _gauge(self, device: str, t_ns: int, watts: float) -> None:
        self._line(form.SampleLine(seconds(t_ns), device, watts=watts))

    def _cpu(self, device: str, engine: EngineId | None, t_ns: int, busy_s: float, host_busy_s: float) -> None:
        name = None if engine is None else engine_name(engine)
        self._line(form.CpuLine(seconds(t_ns), device, busy_s, host_busy_s, name))

    def _busy(self, device: str, t_ns: int) -> None:
        self._line(form.BusyLine(seconds(t_ns), device))

    def _foreign(self, device: str, t_ns: int, share: float, others: bool | None = False) -> None:
        self._line(form.ForeignLine(seconds(t_ns), device, share, others))

    def _engine(
        self,
        engine: EngineId,
        t_ns: int,
        state: str,
        model: str | None,
        devices: tuple[str, ...] | None,
        world: int | None,
        facts: tuple[Any, ...],
        service: str | None,
    ) -> None:
        self._line(
            form.EngineLine(
                engine_name(engine),
                self._all(devices),
                *facts,
                t=seconds(t_ns),
                state=state,
                world=world,
                model=model,
                service=service,
            )
        )

    def _open(
        self,
        key: Key,
        t_ns: int,
        engine: EngineId | None,
        devices: tuple[str, ...] | None,
        model: str | None,
        prompt_tokens: int | None,
        cached_tokens: int | None,
        labels: object,
        parent: Key | None,
        thread: int | None,
        probe: object,
        late: Late | None,
        reason: str | None,
    ) -> None:
        self._t_ns = t_ns
        self._line(
            form.OpenLine(
                seconds(t_ns),
                key.request,
                form.NO_ENGINE if engine is None else engine_name(engine),
                self._all(devices),
                model,
                prompt_tokens,
                cached_tokens,
                None if parent is None else parent.request,
                thread,
                None if late is None else [seconds(start) for start in late.beside],
                late is not None and late.elsewhere,
                reason,
            )
        )

    def _unseen(self, t_ns: int, change: int) -> None:
        self._line(form.UnseenLine(seconds(t_ns), change))

    def _heard(self, engine: EngineId, t_ns: int) -> None:
        self._line(form.HeardLine(seconds(t_ns), engine_name(engine)))

    def _bind(self, key: Key, child_id: str) -> None:
        self._line(form.BindLine(seconds(self._t_ns), key.request, child_id))

    def _progress(
        self,
        key: Key,
        t_ns: int,
        output_tokens: int,
        first_token_ns: int | None,
        prompt_tokens: int | None,
        cached_tokens: int | None,
    ) -> None:
        first = None if first_token_ns is None else seconds(first_token_ns)
        self._line(form.TokensLine(seconds(t_ns), key.request, output_tokens, first, prompt_tokens, cached_tokens))

    def _step(
        self,
        engine: EngineId,
        lane: int,
        seq: int,
        t0_ns: int,
        t1_ns: int,
        devices: tuple[str, ...] | None,
        *delta: Any,
    ) -> None:
        run = self._lanes.setdefault((engine, lane), Lane())
        run.follow(seq)
        self._work(engine, t0_ns, t1_ns, devices, run.advance(*delta), lane)
        if not run.members:
            del self._lanes[(engine, lane)]

    def _work(
        self,
        engine: EngineId,
        t0_ns: int,
        t1_ns: int,
        devices: tuple[str, ...] | None,
        work: Sequence[Work],
        lane: int | None,
    ) -> None:
        rows = {row.id: [row.prefill, row.decode, row.context + row.prefill + row.decode] for row in work}
        if rows:
            named = self._all(devices)
            self._line(form.StepLine(seconds(t0_ns), seconds(t1_ns), rows, engine_name(engine), named, lane))

    def _close(
        self,
        key: Key,
        t_ns: int,
        output_tokens: int | None,
        outcome: str,
        first_token_ns: int | None,
        prompt_tokens: int | None,
        cached_tokens: int | None,
        future: object,
    ) -> None:
        first = None if first_token_ns is None else seconds(first_token_ns)
        self._line(
            form.CloseLine(seconds(t_ns), key.request, output_tokens, outcome, first, prompt_tokens, cached_tokens)
        )


def _own_file(path: Path) -> FileIO:
    # Opened without cutting it: a process that finds it in use must leave it as it is.
    file = path.open("ab", buffering=0)
    if not _lock(file):
        file.close()
        path = path.with_name(f"{path.stem}.{os.getpid()}{path.suffix}")
        log.info("another process records to the trace file; this one writes %s", path)
        file = path.open("ab", buffering=0)
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.truncate(0)
    return file


def _lock(file: FileIO) -> bool:
    if sys.platform == "win32" or not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def engine_name(engine: EngineId) -> str:
    """The trace's name of an engine."""
    return f"{engine.group[:8]}/{engine.number}"
