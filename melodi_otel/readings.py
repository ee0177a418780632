"""What the sampler reads, on its way into the ledger, and what the meters show now for the gauges of the metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import EngineId
from melodi_otel.clock import Clock
from melodi_otel.devices import Device
from melodi_otel.sampler import Sampler
from melodi_otel.sources.base import Discovery
from melodi_otel.sources.discovery import QUIET
from melodi_otel.telemetry.metrics import Hardware
from melodi_otel.timeline.counter import Counter


class Readings:
    """The sampler's :class:`~melodi_otel.sampler.Sink`.

    Args:
        ledger: where readings go.
        devices: the devices by ``hw.id``.
        moved: called when a round is complete, to wake the settling.
        clock: for the age of the newest reading.
        groups: in a hub, cumulative CPU seconds of every group of its programs; None: this process is all there is.
        calibration: true joules per joule that a device shows, by ``hw.id``; 1 where none is given.
    """

    def __init__(
        self,
        ledger: Ledger,
        devices: Mapping[str, Device],
        moved: Callable[[], None],
        clock: Clock,
        groups: Callable[[], Mapping[EngineId, float]] | None = None,
        calibration: Mapping[str, float] | None = None,
    ) -> None:
        self._calibration = dict(calibration or {})
        self._groups = groups
        self._ledger = ledger
        self._devices = devices
        self._moved = moved
        self._clock = clock
        self._seen_ns: dict[str, int] = {}
        self._watts: dict[str, float] = {}
        self._gauged: set[str] = set()
        self._counters: dict[str, tuple[Counter, int]] = {}
        self._failing: set[str] = set()
        self._gone: set[str] = set()

    def counter(self, device_id: str, t_ns: int, joules: float, range_j: float | None) -> None:
        """Cumulative joules; also the mean power since the last change, where no gauge shows it."""
        joules, range_j = self._true(device_id, joules, range_j)
        self._ledger.counter(device_id, t_ns, joules, range_j)
        self._shown(device_id, t_ns, joules, range_j)

    def shaped(self, device_id: str, t_ns: int, joules: float, range_j: float | None) -> None:
        """A point between two readings, placed by the driver's power history; the sums stay the counter's."""
        joules, range_j = self._true(device_id, joules, range_j)
        self._ledger.counter(device_id, t_ns, joules, range_j, shaped=True)
        self._shown(device_id, t_ns, joules, range_j)

    def _true(self, device_id: str, joules: float, range_j: float | None) -> tuple[float, float | None]:
        factor = self._calibration.get(device_id, 1.0)
        return joules * factor, None if range_j is None else range_j * factor

    def _shown(self, device_id: str, t_ns: int, joules: float, range_j: float | None) -> None:
        self._alive(device_id, t_ns)
        if device_id in self._gauged:
            return
        counter, before_ns = self._counters.get(device_id) or (Counter(), t_ns)
        change = counter.read(t_ns, joules, range_j)
        if change.joules and t_ns > before_ns:
            self._watts[device_id] = change.joules / ((t_ns - before_ns) / 1e9)
        if change.event == "first" or change.joules != 0.0:
            before_ns = t_ns
        self._counters[device_id] = (counter, before_ns)

    def gauge(self, device_id: str, t_ns: int, watts: float) -> None:
        """Watts of a gauge."""
        watts *= self._calibration.get(device_id, 1.0)
        self._ledger.gauge(device_id, t_ns, watts)
        self._alive(device_id, t_ns)
        self._gauged.add(device_id)
        self._watts[device_id] = watts

    def cpu(self, t_ns: int, device_ids: Sequence[str], busy_s: float, host_busy_s: float) -> None:
        """CPU time of this process's tree and of the host."""
        busy: Mapping[EngineId | None, float] = {None: busy_s} if self._groups is None else {**self._groups()}
        for device_id in device_ids:
            if self._devices[device_id].type in ("cpu", "memory"):
                for engine, seconds in busy.items():
                    self._ledger.cpu(device_id, engine, t_ns, seconds, host_busy_s)

    def failed(self, device_ids: Sequence[str], t_ns: int, reason: str) -> None:
        """A round failed: nothing of it was handed on."""
        self._failing.update(device_ids)

    def gone(self, device_id: str, t_ns: int) -> None:
        """A device is lost."""
        self._gone.add(device_id)
        self._watts.pop(device_id, None)
        self._ledger.gone(device_id, t_ns)

    def busy(self, device_id: str, t_ns: int) -> None:
        """Somebody computes on a GPU: what it draws now is not its idle power."""
        self._ledger.busy(device_id, t_ns)

    def round_done(self, t_ns: int, moved: bool) -> None:
        """Readings up to now are in the ledger's inbox."""
        self._moved()

    def forked(self, moved: Callable[[], None]) -> None:
        """In a child: another event to wake, nothing read yet."""
        self._moved = moved
        self._seen_ns.clear()

    def hardware(self, discovery: Discovery, sampler: Sampler) -> Hardware:
        """What the meters show now."""
        now_ns = self._clock.monotonic_ns()
        states = sampler.states
        up: dict[tuple[str, str | None], bool] = {
            (r.source, None): False for r in discovery.refusals if r.state not in QUIET
        }
        for source in discovery.sources:
            for device in source.devices:
                up[(source.name, device.id)] = device.id not in self._gone and device.id not in self._failing
        return Hardware(
            watts=dict(self._watts),
            utilization={name: s.utilization for name, s in states.items() if s.utilization is not None},
            memory_bytes={name: s.memory_bytes for name, s in states.items() if s.memory_bytes is not None},
            sample_age_s={name: (now_ns - t_ns) / 1e9 for name, t_ns in list(self._seen_ns.items())},
            up=up,
            self_joules=sampler.cost.joules,
        )

    def _alive(self, device_id: str, t_ns: int) -> None:
        self._seen_ns[device_id] = t_ns
        self._failing.discard(device_id)
