"""One thread: sources → timelines.

It reads counters just after they moved (:mod:`melodi_otel.phase_lock`), at full rate only while somebody is at work::

    state    from … until                        counters and gauges        a GPU nobody uses
    active   first open … 2 s after last close   MELODI_SAMPLE_HZ (≤ 10)    same
    idle     then                                once a second              same, for 60 s
    asleep   60 s of idleness                    once a second              every 30 s, so that it can go to sleep

CPU meters keep the idle pace for good: RAPL may wrap within two minutes and must be seen at least once in each. A learning
burst is inside the budget, never beside it: no more than 20 reads in any 2 s, and after a burst the rest is spread out.

A counter whose reads cost more than 1 ms of CPU time (an H200: 3.3 ms) is read every third step where the driver remembers
the power, and :mod:`melodi_otel.power_shape` tells what was between: a third of the cost, and joules are final within 0.35 s.
With so many such GPUs that this were more than 1.5 % of a core they are read more seldom, at least once in ten steps.

What a round read is handed on only if the whole round of that source succeeded. The thread never dies of an exception, is a
daemon, and does not exist in a forked child until started there. The loop body is :meth:`Sampler.tick`, so tests need no
thread: ``clock.advance(sampler.tick())``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from melodi_otel.clock import Clock
from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.pace import WINDOW_READS, Track
from melodi_otel.phase_lock import DEAR_NS, LATE_NS
from melodi_otel.sources.base import (
    CounterReading,
    GpuState,
    PowerReading,
    Source,
)
from melodi_otel.units import NS_PER_S, ns
from melodi_otel.wall_time import WallTime
from melodi_otel.worker import Worker

log = logging.getLogger("melodi_otel")

_WORKING: Final = 0.9
"""Part of a read that its thread must have run: below, it was the host that was busy and not the driver."""
BUSY: Final = 0.1
"""A GPU that is used more than that while no request is open does not show its idle power; a desktop draws with less."""
AFTERGLOW_NS: Final = 2 * NS_PER_S
"""Full rate goes on this long after the last close: tail power and the last request's border need it."""


class Sink(Protocol):
    """Where readings go. Called by the sampler's thread only; joules, watts, CPU seconds and monotonic ns."""

    def counter(self, device_id: str, t_ns: int, joules: float, range_j: float | None) -> None:
        """Cumulative joules at ``t_ns``. A sink that has a method ``shaped`` of the same arguments gets those there that no
        reading showed: points between two readings, placed by the power history, which come before the second of them.
        """
        ...

    def gauge(self, device_id: str, t_ns: int, watts: float) -> None: ...

    def cpu(self, t_ns: int, device_ids: Sequence[str], busy_s: float, host_busy_s: float) -> None:
        """Cumulative CPU time of our processes and of the host, read with the counters of ``device_ids``."""
        ...

    def failed(self, device_ids: Sequence[str], t_ns: int, reason: str) -> None:
        """A round failed: ``read_failed``, ``permission_denied`` or ``error``; nothing of it was handed on."""
        ...

    def gone(self, device_id: str, t_ns: int) -> None:
        """No reading of this device will come any more."""
        ...

    def round_done(self, t_ns: int, moved: bool) -> None:
        """Readings up to ``t_ns`` were handed on; ``moved``: some counter or gauge shows another figure than before."""
        ...


CpuReader = Callable[[], "tuple[float, float] | None"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What sampling itself cost since the start.

    Attributes:
        rounds: reads of a source that succeeded.
        failures: those that did not.
        seconds: time spent in rounds, s.
        cpu_s: CPU time of the thread, s.
        joules: its part of the CPU meters' energy, J; None without such a meter or without CPU times.
    """

    rounds: int = 0
    failures: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    joules: float | None = None


class Sampler:
    """Reads all sources of a machine in one thread.

    Args:
        sources: what to read.
        sink: where readings go.
        clock: time.
        cpu: (busy_s, host_busy_s) of our processes, see :class:`melodi_otel.processes.ProcessClock`; None: not known.
        hz: the most reads per second while active.
        idle_hz: reads per second while nobody is at work.
        gpu_sleep_s: idle seconds after which a source of GPUs alone is left to sleep.
        asleep_every_s: seconds between its reads then; ``math.inf``: none until the next open.
        observe: called with (seconds of the round, seconds it came late).
        thread_time_ns: CPU time of the calling thread.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        sink: Sink,
        clock: Clock,
        *,
        cpu: CpuReader | None = None,
        hz: float = 10.0,
        idle_hz: float = 1.0,
        gpu_sleep_s: float = 60.0,
        asleep_every_s: float = 30.0,
        observe: Callable[[float, float], None] | None = None,
        thread_time_ns: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        self.wall = WallTime(clock)
        self._sink = sink
        # A sink that wants to tell them apart has a method for points between two readings; to others they are readings.
        self._shaped: Callable[[str, int, float, float | None], None] = getattr(sink, "shaped", None) or sink.counter
        self._clock = clock
        self._cpu = cpu
        self._spacing_ns = ns(1 / min(hz, WINDOW_READS / 2))
        self._idle_ns = ns(1 / idle_hz)
        self._sleep_after_ns = ns(gpu_sleep_s)
        self._asleep_ns = ns(min(asleep_every_s, 1e9))
        self._observe = observe
        self._thread_time_ns = thread_time_ns
        self._tracks = [Track(source) for source in sources]
        self._open = 0
        self._closed_ns = clock.monotonic_ns()
        self._urgent = True
        self._rounds = self._failures = 0
        self._seconds = self._cpu_s = 0.0
        self._joules: float | None = None
        self._self_before: tuple[float, float, float] | None = None
        self._states: dict[str, GpuState] = {}
        self._said: set[str] = set()
        self._worker = Worker("melodi-otel-sampler", self._run)

    @property
    def running(self) -> bool:
        """Whether the thread of this process is alive."""
        return self._worker.running

    @property
    def cost(self) -> Cost:
        """What sampling cost so far; an immutable snapshot."""
        return Cost(self._rounds, self._failures, self._seconds, self._cpu_s, self._joules)

    @property
    def states(self) -> Mapping[str, GpuState]:
        """Utilisation and memory of GPUs, at most a second old while active."""
        return dict(self._states)

    @property
    def periods(self) -> Mapping[str, float]:
        """Learnt update period by device, s; only counters whose steps were seen."""
        locks = ((device, lock.period_s) for track in self._tracks for device, lock in track.locks.items())
        return {device: period for device, period in locks if period is not None}

    def start(self) -> None:
        """Start the thread; a second call does nothing. Works again after :meth:`stop` and in a forked child."""
        if not self.running:
            self._urgent = True
            self._worker.start()

    def stop(self, timeout: float = 2.0) -> None:
        """Read everything once more and end the thread; waits at most ``timeout`` seconds."""
        self._worker.stop(timeout)

    def wake(self) -> None:
        """Read at once: somebody begins to work. Cheap and without waiting; callable from any thread."""
        self._urgent = True
        self._worker.event.set()

    def activity(self, open_count: int, t_ns: int) -> None:
        """``open_count`` requests are open as of ``t_ns``. Wakes the thread where it is the first; callable from any thread."""
        was, self._open = self._open, open_count
        if open_count == 0:
            self._closed_ns = t_ns
        elif was == 0 and t_ns - self._closed_ns > AFTERGLOW_NS:
            self.wake()

    def tick(self) -> float:
        """Read what is due; returns the seconds until something is due again. Never raises."""
        moved: list[bool] = []
        try:
            self.wall.note()
            urgent, self._urgent = self._urgent, False
            started = self._thread_time_ns()
            for track in self._tracks:
                now_ns = self._clock.monotonic_ns()
                due_ns = track.allowed_ns() if urgent else track.due_ns
                if urgent or now_ns - due_ns > LATE_NS:
                    # Not at the time that was meant: a moment later where the counter is just stepping.
                    due_ns = track.clear_ns(max(due_ns, now_ns)) if track.reads else due_ns
                if track.alive() and now_ns >= due_ns:
                    moved += [self._round(track)]
            if moved:
                spent = (self._thread_time_ns() - started) / NS_PER_S
                self._cpu_s += spent
                self._sink.round_done(self._clock.monotonic_ns(), any(moved))
        except Exception:
            self._once("tick", "a sampling round failed", exc_info=True)
        try:
            now_ns = self._clock.monotonic_ns()
            self._plan(now_ns)
            due = min((track.due_ns for track in self._tracks if track.alive()), default=now_ns + self._idle_ns)
            return max(0.0, min(due - now_ns, self._idle_ns) / NS_PER_S)
        except Exception:
            self._once("schedule", "the next sampling round cannot be planned", exc_info=True)
            return 1.0

    def _run(self) -> None:
        event = self._worker.event
        while not self._worker.stopping:
            if self._clock.wait(event, max(self.tick(), 0.0005)):
                event.clear()
        self._urgent = True
        for track in self._tracks:
            track.reads.clear()  # the last round ends everybody's time: it is not saved for later
        self.tick()

    def _round(self, track: Track) -> bool:
        start_ns = self._clock.monotonic_ns()
        late_s = max(0.0, (start_ns - track.due_ns) / NS_PER_S) if track.due_ns else 0.0
        track.reads.append(start_ns)
        counters: Sequence[CounterReading] = ()
        watts: Sequence[PowerReading] = ()
        try:
            # Nothing is handed on before every read of the round succeeded.
            began = self._thread_time_ns() if track.only_gpu else 0
            counters = track.counter.counters() if track.counter is not None else ()
            spent_ns = self._thread_time_ns() - began if track.only_gpu else 0
            watts = track.gauge.power() if track.gauge is not None else ()
        except Exception as error:
            self._failure(track, error)
            return False
        cpu = self._read_cpu() if track.cpu_ids else None
        track.failures = 0
        self._look_at_states(track, start_ns)  # before its readings: whether they show idle power
        self._recall(track, start_ns)
        moved = self._commit(track, start_ns, spent_ns, counters, watts)
        t_ns = max((reading.t_ns for reading in (*counters, *watts)), default=start_ns)
        if cpu is not None:
            self._sink.cpu(t_ns, [device for device in track.cpu_ids if device not in track.gone], *cpu)
            self._own_energy(track, counters, cpu[1])
        spent_s = (self._clock.monotonic_ns() - start_ns) / NS_PER_S
        self._rounds += 1
        self._seconds += spent_s
        if self._observe is not None:
            try:
                self._observe(spent_s, late_s)
            except Exception:
                self._once("observe", "the observer of sampling rounds failed", exc_info=True)
        return moved

    def _commit(
        self,
        track: Track,
        start_ns: int,
        spent_ns: int,
        counters: Sequence[CounterReading],
        watts: Sequence[PowerReading],
    ) -> bool:
        moved = False
        ended_ns = start_ns
        whole_ns = max((reading.t_ns for reading in counters), default=start_ns) - start_ns
        # Time in which the thread did not run is no cost, and says nothing about the driver.
        working = min(1.0, spent_ns / whole_ns) if whole_ns > 0 else 0.0
        for reading in counters:
            began_ns, ended_ns = min(ended_ns, reading.t_ns), reading.t_ns
            waited_ns = track.costs[reading.device].note(round(working * (ended_ns - began_ns)))
            before = track.values.get(reading.device)
            changed = before is None or before != reading.joules
            track.values[reading.device] = reading.joules
            lock = track.locks.get(reading.device)
            followed = lock is not None and (track.lead is None or track.lead is lock)
            if lock is not None and followed:
                lock.dear = track.costs[reading.device].usual_ns >= DEAR_NS
                lock.seen(began_ns, ended_ns, changed, waited_ns if working > _WORKING else 0)
            moved |= changed
            # A stepping counter shows the energy of its last step: that is when the figure was true.
            shown_ns = ended_ns if changed else began_ns
            t_ns = (lock.stepped_ns(shown_ns) if lock is not None and followed else None) or reading.t_ns
            if reading.device in track.shapes and reading.range_j is None:
                for at_ns, joules in track.shapes[reading.device].between(t_ns, reading.joules):
                    self._shaped(reading.device, at_ns, joules, None)
            self._sink.counter(reading.device, t_ns, reading.joules, reading.range_j)
        for reading in watts:
            moved |= track.values.get(f"{reading.device} W") != reading.watts
            track.values[f"{reading.device} W"] = reading.watts
            self._sink.gauge(reading.device, reading.t_ns, reading.watts)
        present = {device.id for device in track.source.devices}
        for device in track.alive():
            if device not in present:  # a source may find out later that a device is not one (mirrored counters)
                self._lose(track, device)
        return moved

    def _recall(self, track: Track, now_ns: int) -> None:
        """Ask for the power since the last reading of counters that are too dear to be read at every step."""
        if track.history is None or track.steps() == 1:
            return
        for device in track.alive():
            shape = track.shapes[device]
            if not shape.reaches(now_ns):
                continue
            try:
                shape.add(track.history.history(device, shape.since_ns))
            except Refused as refused:
                track.history = None
                log.debug("%s: %s; counters are read at every step", track.source.name, refused.reason)
                return
            except Transient as error:
                log.debug("%s: %s; nothing is told between two readings", track.source.name, error)
            except Exception:
                self._once(f"{track.source.name} history", f"{track.source.name}: no power history", exc_info=True)

    def _failure(self, track: Track, error: Exception) -> None:
        track.failures += 1
        self._failures += 1
        name = track.source.name
        now_ns = self._clock.monotonic_ns()
        if isinstance(error, Gone):
            lost = track.alive() if error.device is None else (error.device,)
            self._once(f"{name} gone {error.device}", f"{name}: {error}; it is not asked any more")
            for device in lost:
                self._lose(track, device)
            if not track.alive():
                try:
                    track.source.close()
                except Exception:
                    self._once(f"{name} close", f"{name} cannot be closed", exc_info=True)
            return
        if isinstance(error, Refused):
            reason, text = error.state, f"{name}: {error.reason}" + (f" (to repair: {error.fix})" if error.fix else "")
        elif isinstance(error, Transient):
            reason, text = "read_failed", f"{name}: {error}; this round is not used, the next one covers its time"
        else:
            reason, text = "error", f"{name} failed with {type(error).__name__}: {error}"
        self._once(f"{name} {reason} {type(error).__name__}", text)
        self._sink.failed(track.alive(), now_ns, reason)

    def _lose(self, track: Track, device: str) -> None:
        if device in track.gone or device not in track.known:
            return
        track.gone.add(device)
        track.lead = None if track.lead is track.locks.get(device) else track.lead
        self._sink.gone(device, self._clock.monotonic_ns())

    def _read_cpu(self) -> tuple[float, float] | None:
        try:
            return None if self._cpu is None else self._cpu()
        except Exception:
            self._once("cpu", "CPU times cannot be read", exc_info=True)
            return None

    def _own_energy(self, track: Track, counters: Sequence[CounterReading], host_busy_s: float) -> None:
        joules = math.fsum(
            r.joules for r in counters if track.known.get(r.device) and track.known[r.device].type == "cpu"
        )
        before, now = self._self_before, (joules, host_busy_s, self._cpu_s)
        self._self_before = now
        if before is None:
            return
        used_j, host_s, own_s = (after - then for after, then in zip(now, before, strict=True))
        if used_j >= 0 and host_s > 0:  # a wrap is left out: this is a figure about ourselves, not in any sum
            share = min(1.0, own_s / host_s)
            self._joules = (self._joules or 0.0) + used_j * share

    def _look_at_states(self, track: Track, now_ns: int) -> None:
        if track.state is None or now_ns - track.states_ns < NS_PER_S:
            return
        track.states_ns = now_ns
        try:
            states = track.state.states()
        except Exception:
            self._once(f"{track.source.name} states", f"{track.source.name}: utilisation cannot be read", exc_info=True)
            return
        self._states |= {state.device: state for state in states}
        busy = getattr(self._sink, "busy", None)
        for state in states:
            if busy is not None and state.utilization is not None and state.utilization > BUSY:
                busy(state.device, now_ns)

    def _active(self, now_ns: int) -> bool:
        return self._open > 0 or now_ns - self._closed_ns < AFTERGLOW_NS

    def _plan(self, now_ns: int) -> None:
        for track in self._tracks:
            track.due_ns = self._next(track, now_ns)
        if not self._active(now_ns):
            return
        # Who may be read at any time is read along with whoever must be read at a certain time: half the wake-ups, and
        # all devices are cut at the same moments.
        leads = [track.due_ns for track in self._tracks if track.follows() and track.alive()]
        for track in self._tracks:
            if leads and track.reads and track.failures == 0 and not track.follows():
                near = min(leads, key=lambda due_ns: abs(due_ns - track.due_ns))
                # Where its own budget has no room a moment earlier, it leaves one out rather than fall out of step.
                if -self._spacing_ns // 2 <= near - track.due_ns < self._spacing_ns:
                    track.due_ns = near if near >= track.allowed_ns() else near + self._spacing_ns

    def _next(self, track: Track, now_ns: int) -> int:
        if not track.reads:
            return now_ns
        if self._active(now_ns):
            due_ns = track.next_active(self._spacing_ns, self._idle_ns)
            return due_ns if due_ns >= now_ns - LATE_NS else track.clear_ns(now_ns)
        idle_ns = now_ns - self._closed_ns
        asleep = track.only_gpu and idle_ns > self._sleep_after_ns
        # A GPU that sleeps is left alone, whatever becomes of the phase.
        return track.clear_ns(track.reads[-1] + self._asleep_ns) if asleep else track.next_idle(self._idle_ns)

    def _once(self, kind: str, text: str, *, exc_info: bool = False) -> None:
        if kind not in self._said:
            self._said.add(kind)
            log.warning("%s (said once)", text, exc_info=exc_info)
