"""Who else computes on our GPUs, and how much of them.

One thread of its own, because these questions to the driver are slow (4.5 ms for a list of graphics processes, up to 100 ms
on a partitioned board). It looks only while requests are open and :data:`AFTER_NS` longer, at most every
:data:`PERIOD_NS` (once more where the first request after a pause came too lately to tell), and less often where a look is
dear: looking takes at most a hundredth of the time. Utilisation is asked only where somebody else is on the list.

What a look says of a device, told when it is news:

========================================  ======  ========
what the driver shows                     share   others
========================================  ======  ========
only us                                   0       False
others that did not compute for 15 s      0       False
others that computed                      theirs  True
others, and no utilisation told           0       True
others, but on other slices of the board  0       True
not enough to say                         0       None
========================================  ======  ========

``share`` is the others' part of the SM time of all while requests were open, from the samples since the look before, at most
those of the last ten seconds. What was between requests counts for the others only, so where requests were open for a part f of
that time, our SM time u and theirs o make it ``o / (o + u / f)``. A look at a request that has just begun knows f = 0: it tells
what was last known, and is made again soon. ``others`` None is said only where something else was said before: until then
nothing was claimed.

The driver books each of its samples to one process, whoever ran at that moment (an H200: a sample every 200 ms, 25 in five
seconds). So a share of one half is told with a scatter of 0.1, right in the mean; and who runs a tenth of the time is in none
of 25 samples once in fourteen looks. Nobody is called alone on that: ``others`` turns False only when none of the samples of
:data:`MEMORY_NS` is theirs.

Who we are, see :mod:`melodi_otel.host_pids`. The rules, in this order:

1. On the machine itself the driver's pids are ours: who is not ours is somebody else. Where it names nobody at all, and never
   named us, nothing is said (a driver that does not tell).
2. In a PID namespace with the machine's ``/proc`` at hand: the same by the machine's numbers, where one of ours is named.
3. In a PID namespace where every pid that the driver names is a process of the namespace, and one of them ours: the driver
   shows this namespace only. Others in it are told; that there are none elsewhere is not.
4. In a PID namespace otherwise: if one process is on a GPU on which we are at work, it is us. Else nothing is said.
5. Behind NVIDIA's MPS server the SM time of its clients is told as the server's: nobody's share is known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, runtime_checkable

from melodi_otel.clock import Clock
from melodi_otel.devices import Device
from melodi_otel.errors import Gone, Refused
from melodi_otel.host_pids import HostPids
from melodi_otel.sources.nvml_processes import GpuProcesses, ProcessLoad
from melodi_otel.units import NS_PER_S
from melodi_otel.worker import Worker

__all__ = ["AFTER_NS", "MEMORY_NS", "PERIOD_NS", "Neighbours", "ProcessSource"]

log = logging.getLogger("melodi_otel")

PERIOD_NS: Final = 5 * NS_PER_S
"""The least time between two looks."""
AFTER_NS: Final = 2 * NS_PER_S
"""A look that falls due this long after the last request is still made: it settles the last request's surroundings."""
MEMORY_NS: Final = 15 * NS_PER_S
"""Who computed within this time is still called a neighbour (an H200's driver remembers samples of 14 s)."""
_SOON_NS: Final = 2 * NS_PER_S
"""The next look after one that came too early in a request to tell a share."""
_LEAST_OPEN: Final = 0.1
"""Part of the time since the look before in which requests must have been open, for a share to be told."""
_RARELY: Final = 100
"""A look that took t is followed by this many t of rest."""
_PATIENCE: Final = 3
"""Looks in a row that may fail before what was told is taken back."""
_KNOWN_NS: Final = 60 * NS_PER_S
"""For this long a list of nobody but ours is believed without asking again who ours are (a walk over all processes)."""
_EPOCH_US: Final = 1_000_000_000_000_000
"""Time stamps above (the year 2001) count from the epoch; below, from the machine's start."""
_MPS: Final = "nvidia-cuda-mps"


@runtime_checkable
class ProcessSource(Protocol):
    """A source that knows who is on its GPUs. Asked by the thread of :class:`Neighbours` only."""

    @property
    def devices(self) -> Sequence[Device]: ...

    def processes(self, device_id: str) -> GpuProcesses:
        """Who is on a device; raises ``Refused`` where the driver does not tell, ``Transient``, ``Gone``."""
        ...

    def process_loads(self, device_id: str, since_us: int) -> Sequence[ProcessLoad]:
        """What processes used since then, in the driver's time; raises as :meth:`processes`."""
        ...


class Tell(Protocol):
    """Where it is told: others' part of the SM time (0..1) from ``t_ns`` on, and whether others compute (None: not known)."""

    def __call__(self, device: str, t_ns: int, share: float, others: bool | None) -> None: ...


class _Seen(NamedTuple):
    share: float
    others: bool | None


_UNKNOWN: Final = _Seen(0.0, None)


@dataclass(slots=True)
class _Watched:
    """What is remembered of a device between two looks."""

    told: _Seen = _UNKNOWN
    failures: int = 0
    mute: bool = False
    newest_us: int | None = None


class _Us(NamedTuple):
    """Which pids on the driver's lists are ours, whether that is known, and whether the lists hold everybody."""

    pids: frozenset[int]
    complete: bool
    known: bool = True


class Neighbours:
    """Watches for other processes on the GPUs of ``sources``.

    Args:
        sources: those that can list processes; others are left out.
        clock: time.
        ours: pids of our processes as this process sees them (``family`` of what is known to work for us).
        tell: called by the thread with what is news; it must not block.
        numbers: which pids are the machine's; None: found out from ``/proc``.
        working: ids of the devices on which requests are open, so that only those are asked; None: not known, all are.
        period_s: the least seconds between two looks, not below 5.
    """

    def __init__(
        self,
        sources: Iterable[object],
        clock: Clock,
        ours: Callable[[], Collection[int]],
        tell: Tell,
        *,
        numbers: HostPids | None = None,
        working: Callable[[], Collection[str]] | None = None,
        period_s: float = PERIOD_NS / NS_PER_S,
    ) -> None:
        self._sources = [source for source in sources if isinstance(source, ProcessSource)]
        self._clock = clock
        self._ours = ours
        self._tell = tell
        self._numbers = numbers if numbers is not None else HostPids()
        self._working = working
        self._period_ns = max(PERIOD_NS, round(period_s * NS_PER_S))
        self._open = 0
        self._opened_ns: int | None = None
        self._worked_ns = 0
        self._looked_ns: int | None = None
        self._soon = False
        self._closed_ns = clock.monotonic_ns() - AFTER_NS
        self._due_ns = clock.monotonic_ns()
        self._watched: dict[str, _Watched] = {}
        self._before: frozenset[int] = frozenset()
        self._family: frozenset[int] = frozenset()
        self._family_ns: int | None = None
        self._seen_us = False
        self._said: set[str] = set()
        self._worker = Worker("melodi-otel-neighbours", self._run)

    @property
    def running(self) -> bool:
        """Whether the thread of this process is alive."""
        return self._worker.running

    @property
    def useful(self) -> bool:
        """Whether any source can list processes; without one the thread need not be started."""
        return any(device.type == "gpu" for source in self._sources for device in source.devices)

    def start(self) -> None:
        """Start the thread; a second call does nothing. Works again after :meth:`stop` and in a forked child."""
        self._worker.start()

    def stop(self, timeout: float = 2.0) -> None:
        """End the thread; waits at most ``timeout`` seconds (a call to the driver may hang)."""
        self._worker.stop(timeout)

    def activity(self, open_count: int, t_ns: int) -> None:
        """``open_count`` requests are open as of ``t_ns``, as the sampler is told. Cheap; callable from any thread."""
        was, self._open = self._open, open_count
        opened_ns = self._opened_ns
        if open_count == 0:
            self._closed_ns = t_ns
            if opened_ns is not None:
                self._opened_ns, self._worked_ns = None, self._worked_ns + max(0, t_ns - opened_ns)
        elif opened_ns is None:
            self._opened_ns = t_ns
            if t_ns - self._closed_ns >= 2 * self._period_ns:
                self._worked_ns = 0  # too long ago for any sample that will be asked for
        if was == 0 < open_count and t_ns >= self._due_ns:
            self._worker.event.set()

    def tick(self) -> float | None:
        """Look, if it is time and somebody is at work; seconds until the next time, None: not before work. Never raises."""
        started_ns = self._clock.monotonic_ns()
        if started_ns >= self._due_ns:
            if self._open == 0 and started_ns - self._closed_ns >= AFTER_NS:
                return None
            try:
                self._look()
            except Exception:
                self._once("look", "looking for other processes on the GPU failed", logging.WARNING, exc_info=True)
            now_ns = self._clock.monotonic_ns()
            soon, self._soon = self._soon, False
            self._due_ns = now_ns + max(_SOON_NS if soon else self._period_ns, _RARELY * (now_ns - started_ns))
        return max(0, self._due_ns - self._clock.monotonic_ns()) / NS_PER_S

    def _run(self) -> None:
        event = self._worker.event
        while not self._worker.stopping:
            if self._clock.wait(event, self.tick()):
                event.clear()

    def _look(self) -> None:
        open_part = self._open_part()
        asked: list[tuple[ProcessSource, str, GpuProcesses]] = []
        at_work = None if self._working is None else frozenset(self._working())
        for source in self._sources:
            for device in source.devices:
                if device.type == "gpu" and (at_work is None or device.id in at_work):
                    found = self._list(source, device.id)
                    if found is not None:
                        asked.append((source, device.id, found))
        lists = [found for _, _, found in asked]
        us = self._us(self._us_here(lists), lists)
        alone = at_work is None and len(asked) == 1
        for source, device, found in asked:
            self._say(device, self._judge(source, device, found, us, alone or (at_work is not None), open_part))

    def _list(self, source: ProcessSource, device: str) -> GpuProcesses | None:
        """Who is on a device; None: not told now."""
        watched = self._watched.setdefault(device, _Watched())
        if watched.mute:
            return None
        try:
            found = source.processes(device)
        except (Refused, Gone) as error:
            watched.mute = True
            self._once(f"{device} mute", f"other processes on {device} cannot be seen: {error}", logging.DEBUG)
            self._say(device, _UNKNOWN)
            return None
        except Exception as error:
            watched.failures += 1
            if watched.failures >= _PATIENCE:
                self._once(f"{device} failed", f"other processes on {device} cannot be seen: {error}", logging.DEBUG)
                self._say(device, _UNKNOWN)
            return None
        watched.failures = 0
        return found

    def _us_here(self, lists: Sequence[GpuProcesses]) -> frozenset[int]:
        """Our pids as this process sees them; found again where somebody is listed who was none of ours, and at times."""
        now_ns = self._clock.monotonic_ns()
        if not _everybody(lists) <= self._family or self._family_ns is None or now_ns - self._family_ns >= _KNOWN_NS:
            self._family, self._family_ns = frozenset(self._ours()), now_ns
        return self._family

    def _us(self, ours: frozenset[int], lists: Sequence[GpuProcesses]) -> _Us | None:
        """Which of the listed pids are ours; None: nothing can be said of anybody."""
        everybody = _everybody(lists)
        host = self._numbers.host(ours)
        if not self._numbers.nested:
            self._seen_us = self._seen_us or bool(everybody & ours)
            believed = self._seen_us or bool(everybody) or any(found.unnamed for found in lists)
            return self._remember(ours, complete=True) if believed else None
        if host is not None and host & everybody:
            return self._remember(host, complete=True)
        if ours & everybody and self._numbers.live_here(everybody):
            return self._remember(ours, complete=False)
        # Where our numbers are known and none of them is listed, a lone process is not us either.
        return _Us(frozenset(), complete=False, known=False) if host is None else None

    def _remember(self, pids: frozenset[int], *, complete: bool) -> _Us:
        # A child of ours that ended since the last look still has its SM time in this window.
        us, self._before = _Us(pids | self._before, complete), pids
        return us

    def _judge(
        self, source: ProcessSource, device: str, found: GpuProcesses, us: _Us | None, at_work: bool, open_part: float
    ) -> _Seen:
        if us is None:
            return _UNKNOWN
        if not us.known:
            lone = len(found.pids) + found.unnamed == 1
            return self._nobody(found, frozenset()) if lone and at_work else _UNKNOWN
        servers = frozenset(pid for pid in found.pids - us.pids if self._name(pid, us).startswith(_MPS))
        others = found.pids - us.pids - servers
        if found.unnamed and not found.pids & us.pids:
            return _UNKNOWN  # one of those without a name may be us
        if not others and not found.unnamed:
            return self._nobody(found, us.pids) if us.complete and not servers else _UNKNOWN
        share = None if servers or found.unnamed else self._share(source, device, us.pids, open_part)
        if share == 0.0 and not self._computed(source, device, others):
            return self._nobody(found, us.pids) if us.complete else _UNKNOWN
        return _Seen(share or 0.0, others=True)

    def _nobody(self, found: GpuProcesses, ours: frozenset[int]) -> _Seen:
        """Nobody else computes on what is ours of the board: is there somebody on the rest of it?"""
        if found.elsewhere is None:
            return _UNKNOWN
        return _Seen(0.0, others=bool(found.elsewhere - ours))

    def _name(self, pid: int, us: _Us) -> str:
        return self._numbers.name(pid) if us.complete else self._numbers.name_here(pid)

    def _share(self, source: ProcessSource, device: str, ours: frozenset[int], open_part: float) -> float | None:
        """Others' part of the SM time while requests were open, since the look before; None: not known."""
        watched = self._watched[device]
        wall_us = self._clock.wall_ns() // 1000
        newest_us = watched.newest_us
        since_us = wall_us - self._period_ns // 1000
        if newest_us is not None:
            # What others did long ago, while nobody looked, says nothing about now.
            since_us = max(newest_us, wall_us - 2 * self._period_ns // 1000) if newest_us > _EPOCH_US else newest_us
        try:
            loads = source.process_loads(device, since_us)
            if not loads and newest_us is None:
                # The driver may count from the machine's start: its newest sample says where it is, and no more.
                watched.newest_us = max((load.t_us for load in source.process_loads(device, 0)), default=None)
                return None
        except Exception as error:
            self._once(f"{device} loads", f"what processes use of {device} is not told: {error}", logging.DEBUG)
            return None
        if not loads:
            return 0.0
        watched.newest_us = max(load.t_us for load in loads)
        theirs = sum(load.sm_percent for load in loads if load.pid not in ours)
        if not theirs:
            return 0.0
        if open_part < _LEAST_OPEN:
            self._soon = self._open > 0
            return watched.told.share or None
        own = sum(load.sm_percent for load in loads if load.pid in ours)
        return theirs / (theirs + own / open_part)

    def _open_part(self) -> float:
        """The part of the time since the look before in which requests were open, at most of the last two periods."""
        now_ns, opened_ns, looked_ns = self._clock.monotonic_ns(), self._opened_ns, self._looked_ns
        worked_ns = self._worked_ns + (0 if opened_ns is None else max(0, now_ns - opened_ns))
        window_ns = min(2 * self._period_ns, self._period_ns if looked_ns is None else now_ns - looked_ns)
        self._looked_ns, self._worked_ns = now_ns, 0
        if opened_ns is not None:
            self._opened_ns = now_ns
        return min(1.0, worked_ns / window_ns) if window_ns > 0 else 0.0

    def _computed(self, source: ProcessSource, device: str, others: frozenset[int]) -> bool:
        """Whether any of ``others`` used the device lately, or may have: a share of 0 in a few samples does not tell."""
        newest_us, wall_us = self._watched[device].newest_us, self._clock.wall_ns() // 1000
        now_us = wall_us if newest_us is None or newest_us > _EPOCH_US else newest_us
        try:
            loads = source.process_loads(device, max(0, now_us - MEMORY_NS // 1000))
        except Exception as error:
            self._once(f"{device} loads", f"what processes use of {device} is not told: {error}", logging.DEBUG)
            return True
        return any(load.sm_percent > 0 and load.pid in others for load in loads)

    def _say(self, device: str, seen: _Seen) -> None:
        watched = self._watched[device]
        if seen == watched.told:
            return
        if seen.others:
            self._once(f"{device} others", f"another process is on {device}; what it uses is booked as foreign")
        self._tell(device, self._clock.monotonic_ns(), seen.share, seen.others)
        watched.told = seen

    def _once(self, kind: str, text: str, level: int = logging.INFO, *, exc_info: bool = False) -> None:
        if kind not in self._said:
            self._said.add(kind)
            log.log(level, "%s (said once)", text, exc_info=exc_info)


def _everybody(lists: Iterable[GpuProcesses]) -> frozenset[int]:
    return frozenset(pid for found in lists for pid in found.pids | (found.elsewhere or frozenset()))
