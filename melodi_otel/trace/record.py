"""Record: what the ledger is told, written as a trace while it runs.

The recorder is the ledger's tap: it sees every message on the settle thread, in the order in which it took effect, and
writes the line that says the same. Counters are written repaired (a wrap does not fall, a reset does); steps are written with
their full work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from melodi_otel.attribution.engines import Work, by_id, with_host
from melodi_otel.attribution.meter import EngineId, Key, Late
from melodi_otel.devices import Device
from melodi_otel.timeline.counter import Counter
from melodi_otel.trace import lines as form
from melodi_otel.trace.again import Standing
from melodi_otel.trace.files import TraceFiles
from melodi_otel.trace.step_bytes import StepBytes
from melodi_otel.units import seconds

log = logging.getLogger("melodi_otel")

_BUFFER: Final = 1 << 16


class Recorder:
    """Writes a trace file.

    Args:
        path: the file; it is replaced. A name that ends in ``.gz`` or ``.zst`` is packed. Where another process is writing it
            now, ``NAME.PID.jsonl`` beside it is used.
        host_devices: ids that the ledger adds to every engine and request.
        rotate: bytes from which on the next file, ``NAME.1.jsonl``, is begun; None: there is one file.
        keep: how many files are left, the newest; 0: all.
        clock: seconds, for how long packed lines may wait.

    Raises:
        OSError: the file cannot be written.
        MissingDependency: the module that packs it is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        host_devices: Sequence[str] = (),
        *,
        rotate: int | None = None,
        keep: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._standing = Standing()
        self._files = TraceFiles(Path(path), rotate, keep, self._standing.lines, clock)
        self._buffer = bytearray()
        self._host = tuple(host_devices)
        self._counters: dict[str, tuple[Counter, float]] = {}
        self._lanes: dict[tuple[EngineId, int], StepBytes] = {}
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
        if writer is None or not self._files.open:
            return
        try:
            writer(*arguments)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        """Hand what is buffered to the operating system; packed lines at most once a second."""
        try:
            self._write_out()
            self._files.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Finish the file."""
        try:
            self._write_out()
            self._files.close()
        except OSError as error:
            self._give_up(error)

    def forked(self) -> None:
        """In a child: the parent goes on writing, and what its buffer held is not written a second time."""
        self._buffer = bytearray()
        self._files.leave()

    def _give_up(self, error: OSError) -> None:
        log.warning("melodi_otel: recording stops, the trace cannot be written: %s", error)
        self._files.leave()

    def _line(self, line: msgspec.Struct) -> None:
        if self._files.rotating:
            self._standing.take(line)
        self._put(form.encode(line))

    def _put(self, line: bytes) -> None:
        self._buffer += line
        if len(self._buffer) >= _BUFFER:
            self._write_out()

    def _write_out(self) -> None:
        whole, self._buffer = self._buffer, bytearray()
        if whole:
            self._files.write(whole)

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
        run = self._lanes.get((engine, lane))
        if run is None:
            run = self._lanes[engine, lane] = StepBytes(engine_name(engine), lane, self._all)
        run.follow(seq)
        line = run.line(t0_ns, t1_ns, devices, *delta)
        if line:
            self._put(line)
        if not run.members:
            del self._lanes[engine, lane]

    def _work(
        self,
        engine: EngineId,
        t0_ns: int,
        t1_ns: int,
        devices: tuple[str, ...] | None,
        work: Sequence[Work],
        lane: int | None,
    ) -> None:
        rows = by_id(work)
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


def engine_name(engine: EngineId) -> str:
    """The trace's name of an engine."""
    return f"{engine.group[:8]}/{engine.number}"
