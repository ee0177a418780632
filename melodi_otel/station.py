"""A metering station: the meters of this machine, the thread that reads them, the ledger, and the thread that settles.

A program without a hub has one; a hub's process has one for everybody. It runs when it is first needed: a program that is
served by a hub never opens a meter of its own.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from melodi_otel import __version__
from melodi_otel.attribution.books import Snapshot, Who
from melodi_otel.attribution.closing import MIN_WAIT_S, STEP_PART, wait_s
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Reason
from melodi_otel.carbon import LiveCarbon, installed
from melodi_otel.clock import Clock
from melodi_otel.config import Config
from melodi_otel.devices import Device
from melodi_otel.errors import ConfigError, MissingDependency
from melodi_otel.group_clocks import GroupClocks
from melodi_otel.host_pids import HostPids, family
from melodi_otel.neighbours import Neighbours
from melodi_otel.processes import ProcessClock
from melodi_otel.readings import Readings
from melodi_otel.sampler import Sampler
from melodi_otel.sources.base import Discovery, Forkable, Settings, Sliced
from melodi_otel.sources.discovery import describe, discover
from melodi_otel.status import HubStatus, Mode, ModelTotals, OpenRequest, Reporter, StatusViews, not_ready
from melodi_otel.telemetry.metrics import Hardware
from melodi_otel.trace.record import Recorder

log = logging.getLogger("melodi_otel")

_SPAN_WAIT_S: Final = 5.0


class Station:
    """The meters and the books of one process.

    Args:
        config: what it may do.
        clock: its time.
        environ: where visible devices are looked up.
        who: makes the metric identity of a request.
        sampled: called with the seconds of every round of readings.
        turn: called on the settle thread before each settling.
        later: open the meters on the settle thread instead of in :meth:`find`.
        moved: called when a round of readings is in the ledger's inbox; None: the settle thread is woken.
        clocks: in a hub, the CPU time of its programs; None: this process is the only one.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock,
        environ: Mapping[str, str],
        *,
        who: Callable[[str | None, Mapping[str, str]], Who],
        sampled: Callable[[float], None],
        turn: Callable[[], None] = lambda: None,
        later: bool = False,
        moved: Callable[[], None] | None = None,
        clocks: GroupClocks | None = None,
    ) -> None:
        self.config: Final = config
        self.clock: Final = clock
        self.discovery = Discovery()
        self._environ = environ
        self._sampled = sampled
        self._turn = turn
        self._found: dict[str, Device] = {}
        self._host: list[str] = []
        self._span_wait_s = _SPAN_WAIT_S if config.span_wait is None else config.span_wait
        self._recorder: Recorder | None = None
        self.devices: Final[Mapping[str, Device]] = MappingProxyType(self._found)
        self.ledger: Final = Ledger(
            policy=config.static_policy,
            host_devices=self._host,
            engine_devices=config.engine_devices,
            who=who,
            watch=self._watch,
            deliveries=clocks is not None,
            # Who lets spans wait longer than their meter needs does it for long steps, whose evidence comes at their end.
            step_wait_s=None if config.span_wait is None else STEP_PART * max(MIN_WAIT_S, config.span_wait),
        )
        self._moved = threading.Event()
        self._elsewhere = moved
        self._clocks = clocks
        groups = None if clocks is None else clocks.groups
        self.readings: Final = Readings(
            self.ledger, self.devices, moved or self._moved.set, clock, groups, dict(config.calibration)
        )
        self._stale = later
        self._child = False
        self._complete = threading.Event()
        self.process = ProcessClock(config.procfs_root)
        self.sampler = self._make_sampler()
        self._neighbours: Neighbours | None = None
        self._carbon: LiveCarbon | None = None
        self._settler: threading.Thread | None = None
        self._stopping = False
        self._started = False
        self._turning = threading.Lock()
        self._resting = False

    # --- what it knows ------------------------------------------------------------------------------------------------

    @property
    def working(self) -> bool:
        """Whether its threads run in this process."""
        return self._settler is not None

    @property
    def started(self) -> bool:
        """Whether it was started and not stopped since."""
        return self._started

    def snapshot(self) -> Snapshot:
        """The books as of the last settling."""
        return self.ledger.snapshot()

    def hardware(self) -> Hardware:
        """What the meters show now."""
        shown, carbon = self.readings.hardware(self.discovery, self.sampler), self._carbon
        return shown if carbon is None else replace(shown, intensity=carbon.intensity, emissions=carbon.grams)

    def _joules(self) -> float:
        # What `hw.energy` shows: the host's own figure (psys) holds the others.
        books, found = self.snapshot().books, self._found
        mine = [book for name, book in books.items() if name in found and found[name].type != "host"]
        return math.fsum(book.measured for book in mine)

    def span_wait_s(self) -> float:
        """The longest time that a span waits for its joules, in seconds."""
        return self._span_wait_s

    def why(self) -> Reason:
        """The reason to give where a request has no share of any device."""
        return "permission_denied" if self.denied() else "no_source"

    def denied(self) -> bool:
        """Whether there is a meter that may not be read."""
        return any(refusal.state == "permission_denied" for refusal in self.discovery.refusals)

    def wait_found(self, timeout: float) -> bool:
        """Wait until meters that are looked for later are known; whether they are."""
        return self._settler is None or self._complete.wait(timeout)

    def not_ready(self) -> str | None:
        """Why it does not measure yet; None: every source has given a reading."""
        return not_ready(self.discovery, self.hardware(), found=self._complete.is_set())

    def reporter(
        self,
        mode: Mode,
        *,
        models: ModelTotals,
        publisher: Callable[[], bool],
        spans_waiting: Callable[[], int | None] = lambda: None,
        hub: Callable[[], HubStatus | None] = lambda: None,
        host_id: str | None = None,
    ) -> Reporter:
        """What the status page shows of it."""

        def requests() -> list[OpenRequest]:
            return [
                OpenRequest(
                    key=found.key,
                    name=found.model,
                    model=found.model,
                    service=found.who.service,
                    start_ns=found.open_ns,
                    output_tokens=found.output_tokens,
                )
                for found in self.ledger.present()
            ]

        views = StatusViews(
            self.snapshot,
            lambda: self.devices,
            self.hardware,
            models=models.models,
            accrued=self.ledger.accrued,
            requests=requests,
            refusals=lambda: self.discovery.refusals,
            cost=lambda: self.sampler.cost,
            spans_waiting=spans_waiting,
            publisher=publisher,
            hub=hub,
        )
        return Reporter(views, self.clock, version=__version__, mode=mode, host_id=host_id)

    # --- life ---------------------------------------------------------------------------------------------------------

    def find(self) -> None:
        """Open the meters of this machine.

        Raises:
            ConfigError: a name in ``MELODI_SOURCES`` is no source.
        """
        self._find()
        self._stale = False
        self._complete.set()

    def postpone(self) -> None:
        """Open the meters only when it begins, on the settle thread: a hub meters, and this station may never be needed."""
        self._stale = True

    def rest(self, needed: Callable[[], bool]) -> None:
        """Stop reading: another meter is used. :meth:`begin` starts anew, with the time between left out.

        Takes as long as a reading does; where it is ``needed`` again meanwhile, it begins again when it has come to rest.
        """
        with self._turning:
            if needed() or not self._started:
                return
            self._resting = True
        try:
            self._stale = True  # its meters are closed from here on
            self.end()
            self.ledger.tap(None)
            self._recorder = None
            self.ledger.pause()
            self._complete = threading.Event()
        finally:
            with self._turning:
                self._resting = False
        if needed():
            self.begin()

    def begin(self) -> None:
        """Start sampling and settling; a second call does nothing.

        Raises:
            ConfigError: the trace file of ``MELODI_RECORD`` cannot be written.
        """
        with self._turning:
            if self._started or self._resting:
                return  # whoever puts it to rest sees that it is needed again
        if not self._stale:
            self._open_recorder()
        self._started = True
        self._stopping = False
        if not self._stale:
            self._tell()
        if self.discovery.sources and not self._stale:
            # The first reading is a baseline: taken here, the first request is covered from its first instant.
            self.sampler.tick()
        if (name := self.config.carbon_provider) is not None and self._carbon is None:
            self._carbon = LiveCarbon(installed(name), self.config.carbon_region, self._joules, self.clock)
        self.run_threads()

    def run_threads(self) -> None:
        """The sampler's and the settling thread, where they do not run."""
        if self._resting:
            return
        if self.discovery.sources and not self._stale:
            self.sampler.start()
            self._start_neighbours()
            if self._carbon is not None:
                self._carbon.start()
        if self._elsewhere is None and (self._settler is None or not self._settler.is_alive()):
            self._settler = threading.Thread(target=self._settle, name="melodi-otel-settle", daemon=True)
            self._settler.start()

    def idle(self, before: Mapping[str, float], given: Mapping[str, float]) -> None:
        """Other idle watts by ``hw.id`` are given than before; those that are given no longer are learnt."""
        for name in self._found:
            if before.get(name) != given.get(name):
                self._found[name] = replace(self._found[name], idle_watts=given.get(name))
                self.ledger.idle(name, given.get(name))

    def nudge(self) -> None:
        """Settle now."""
        (self._elsewhere or self._moved.set)()

    def end(self) -> None:
        """Read the meters once more, settle what is covered, give every meter back."""
        if not self._started:
            return
        self._started = False
        self.sampler.stop()
        self._stop_settling()
        self.ledger.flush(self.clock.monotonic_ns())
        self.close()

    def close(self) -> None:
        """Give files and meters back."""
        if self._recorder is not None:
            self._recorder.close()
        self.process.close()
        if self._carbon is not None:
            self._carbon.stop()
        if self._neighbours is not None:
            self._neighbours.stop()
            self._neighbours = None
        for source in self.discovery.sources:
            source.close()

    def forked(self) -> None:
        """In a child: empty books, no threads, and meters that are opened anew when they are needed.

        The parent settles, counts and exports what was open when it forked.
        """
        self._turning = threading.Lock()
        self._resting = False
        self._moved = threading.Event()
        self.readings.forked(self._elsewhere or self._moved.set)
        self._complete = threading.Event()
        self._child = True
        self._settler = None
        self._neighbours = None
        self._carbon = None
        self._stale = True
        # Copies of descriptors would keep files open for as long as the child lives, whether it meters or not.
        self.process.close()
        for source in self.discovery.sources:
            if isinstance(source, Forkable):
                source.forked()
        if self._recorder is not None:
            self._recorder.forked()
            self._recorder = None
        self.ledger.tap(None)
        self.ledger.reset()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _make_sampler(self) -> Sampler:
        return Sampler(
            self.discovery.sources,
            self.readings,
            self.clock,
            cpu=self.process.read if self._clocks is None else self._clocks.read,
            hz=self.config.sample_hz,
            observe=lambda seconds, _late: self._sampled(seconds),
        )

    def _find(self) -> None:
        self.discovery = discover(_settings(self.config, self.clock, self._environ), self.config.sources)
        if not self._found:
            self._found.update({device.id: _with_idle(device, self.config) for device in self.discovery.devices})
            self._host += [device.id for device in self._found.values() if device.type in ("cpu", "memory")]
            for device in reversed(self._found.values()):
                self.ledger.device(device, ahead=True)  # before the requests that came meanwhile
            if self.config.span_wait is None:
                self._span_wait_s = max((wait_s(device) for device in self._found.values()), default=1.0)
        for source in self.discovery.sources:
            if isinstance(source, Sliced):
                for part, board in source.slices.items():
                    self.ledger.slice_of(part, board)
        self.sampler = self._make_sampler()
        made = Neighbours(
            self.discovery.sources,
            self.clock,
            self._ours,
            self._neighbour,
            numbers=HostPids(self.config.procfs_root),
        )
        self._neighbours = made if made.useful else None

    def _start_neighbours(self) -> None:
        if self._neighbours is not None and not self._neighbours.running:
            self._neighbours.start()
            self._neighbours.activity(self.ledger.open_count, self.clock.monotonic_ns())

    def _neighbour(self, device: str, t_ns: int, share: float, others: bool | None) -> None:
        if self._clocks is not None and self._clocks.hidden:
            # A program whose process cannot be seen from here may be the one that the driver lists.
            share, others = 0.0, None
        self.ledger.foreign(device, t_ns, share, others)

    def _ours(self) -> frozenset[int]:
        return family([os.getpid()] if self._clocks is None else self._clocks.pids())

    def _find_later(self) -> None:
        """On the settle thread: the meters of a station that was made with ``later``, or a forked child's own.

        A driver's handles do not survive a fork, and opening them takes time.
        """
        self._stale = False
        self.process = ProcessClock(self.config.procfs_root)
        try:
            self._find()
            if not self._child:
                self._open_recorder()
                self._tell()
        except ConfigError as error:
            log.error("melodi_otel: %s", error)
        except Exception:
            log.warning("melodi_otel: no meter can be used; requests go without joules", exc_info=True)
        try:
            if self.discovery.sources and not self._stopping:
                self.sampler.start()
                self.sampler.activity(self.ledger.open_count, self.clock.monotonic_ns())
                self._start_neighbours()
        finally:
            self._complete.set()

    def _tell(self) -> None:
        # Without any meter the line says which variable would help, and is worth being seen.
        log.log(logging.INFO if self.discovery.sources else logging.WARNING, "%s", describe(self.discovery))

    def _open_recorder(self) -> None:
        if self.config.record:
            self._recorder = _recorder(self.config.record, self._host, self.config)
            self.ledger.tap(self._recorder.tap)

    def _settle(self) -> None:
        if self._stale:
            self._find_later()
        while not self._stopping:
            self._turn()
            # Without a meter there is nothing to wait for but the requests themselves.
            idle = 1.0 if self.discovery.sources or not self.ledger.waiting() else 0.05
            self._moved.wait(idle)
            self._moved.clear()
            self.settle()

    def settle(self) -> None:
        """Settle once; never raises."""
        try:
            self.ledger.settle(self.clock.monotonic_ns())
            self.settled()
        except Exception:
            log.exception("melodi_otel: settling failed; it goes on with the next reading")

    def settled(self) -> None:
        """What follows each settling of the books, whoever settles them.

        A meter may find out late by which method a device is measured, and the recorder writes what it holds.
        """
        for device in self.discovery.devices:
            known = self._found.get(device.id)
            if known is not None and known.source != device.source:
                self._found[device.id] = replace(known, source=device.source)
        if self._recorder is not None:
            self._recorder.flush()

    def _stop_settling(self) -> None:
        self._stopping = True
        self._moved.set()
        if self._settler is not None and self._settler is not threading.current_thread():
            self._settler.join(timeout=5.0)
        self._settler = None

    def _watch(self, open_count: int, t_ns: int) -> None:
        # On the request's thread. After a fork nothing runs here yet: the child's first request starts it.
        if self._settler is None and self._started and self._elsewhere is None:
            self.run_threads()
        self.sampler.activity(open_count, t_ns)
        if self._neighbours is not None:
            self._neighbours.activity(open_count, t_ns)
        if not self.discovery.sources:
            self._moved.set()


def _settings(config: Config, clock: Clock, environ: Mapping[str, str]) -> Settings:
    return Settings(
        clock,
        environ,
        config.sysfs_root,
        config.procfs_root,
        config.nvml_library,
        config.estimate_watts,
        frozenset(config.sources),
    )


def _recorder(path: str, host_devices: Sequence[str], config: Config) -> Recorder:
    try:
        return Recorder(path, host_devices, rotate=config.record_rotate, keep=config.record_keep)
    except MissingDependency as error:
        raise ConfigError(f"MELODI_RECORD={path!r} cannot be used: {error}") from None
    except OSError as error:
        raise ConfigError(
            f"MELODI_RECORD={path!r} cannot be used ({error.strerror}): allowed is a file that can be written"
        ) from None


def _with_idle(device: Device, config: Config) -> Device:
    given = dict(config.idle_watts)
    return replace(device, idle_watts=given[device.id]) if device.id in given else device
