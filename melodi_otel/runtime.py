"""The composition root: the only module that imports every room and knows how they fit together.

:class:`Runtime` builds the meter of one process (sources -> sampler -> ledger -> spans, metrics, results) and owns its threads.
The program's own one, and the functions that users call, are in :mod:`melodi_otel.program`.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from melodi_otel import semconv
from melodi_otel.attribution.books import Snapshot, Who
from melodi_otel.attribution.closing import wait_s
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Meter, Reason
from melodi_otel.attribution.record import Observer
from melodi_otel.clock import Clock, SystemClock
from melodi_otel.config import GROUP_VARIABLE, Config
from melodi_otel.devices import Device
from melodi_otel.errors import ConfigError
from melodi_otel.instrumentation.asgi import AsgiInstrumentor
from melodi_otel.instrumentation.seam import Library
from melodi_otel.instrumentation.transformers import TransformersInstrumentor
from melodi_otel.processes import ProcessClock
from melodi_otel.publishing import Publisher
from melodi_otel.readings import Readings
from melodi_otel.results.measure import Measurement
from melodi_otel.results.store import Store
from melodi_otel.sampler import Sampler
from melodi_otel.sources.base import Discovery, Forkable, Settings
from melodi_otel.sources.discovery import describe, discover, gpus_of
from melodi_otel.telemetry.deferral import Deferral
from melodi_otel.telemetry.detector import host_resource
from melodi_otel.telemetry.foreign import ForeignSpans
from melodi_otel.telemetry.forks import in_child
from melodi_otel.telemetry.http import Endpoint, serve
from melodi_otel.telemetry.metrics import Configured, Views
from melodi_otel.telemetry.providers import MeterSeam, ScrapePipeline
from melodi_otel.telemetry.requests import RequestCalls
from melodi_otel.telemetry.tracers import TracerSeam
from melodi_otel.telemetry.whose import Whose
from melodi_otel.trace.record import Recorder

log = logging.getLogger("melodi_otel")

EXIT_WAIT_S: Final = 2.0
_SPAN_WAIT_S: Final = 5.0
"""While the meters are being looked for, a span waits as long as the slowest of them would ask for."""


class Runtime:
    """The meter of one process.

    Args:
        config: what it may do.
        clock: its time.
        environ: where ``OTEL_*``, ``CUDA_VISIBLE_DEVICES`` and the group token are looked up.
        tracer_provider, meter_provider: use these instead of the global ones.
        tracers: the seam of spans, where one is there already.
        later: look for meters on the settle thread, which :meth:`start` starts, instead of now: a driver may take seconds,
            and whoever imports an engine shall not wait for it. Requests that begin meanwhile are measured from then on.

    Raises:
        ConfigError: a configured value cannot be used.
    """

    def __init__(
        self,
        config: Config,
        *,
        clock: Clock | None = None,
        environ: Mapping[str, str] = os.environ,
        tracer_provider: object = None,
        meter_provider: object = None,
        tracers: TracerSeam | None = None,
        later: bool = False,
    ) -> None:
        self.config = config
        self.clock: Clock = clock or SystemClock()
        self.group = environ.get(GROUP_VARIABLE) or secrets.token_hex(8)
        self.store = Store()
        whose = Whose(config)
        self._metric_labels = whose.metric
        self.discovery = Discovery()
        self._found: dict[str, Device] = {}
        self._devices = MappingProxyType(self._found)
        self._host: list[str] = []
        self._span_wait_s = _SPAN_WAIT_S if config.span_wait is None else config.span_wait
        self._recorder: Recorder | None = None
        self.ledger = Ledger(
            policy=config.static_policy,
            host_devices=self._host,
            engine_devices=config.engine_devices,
            who=self._who,
            watch=self._watch,
        )
        self._moved = threading.Event()
        self._readings = Readings(self.ledger, self._devices, self._moved.set, self.clock)
        self._environ = environ
        self._stale = later
        self._child = False
        self._complete = threading.Event()
        self._process = ProcessClock(config.procfs_root)
        self.sampler = self._make_sampler()
        if not later:
            self._find()
            self._complete.set()
        resource = host_resource(config, environ, *gpus_of(self.discovery))
        service = _service(resource.attributes.get(semconv.SERVICE_NAME))
        namespace = _service(resource.attributes.get(semconv.SERVICE_NAMESPACE))
        self._publisher = Publisher()
        if tracers is None:
            deferral = Deferral(
                self.clock, wait_s=self.span_wait_s, limit=config.span_limit, devices=self.devices, why=self.why
            )
            tracers = TracerSeam(deferral, environ, given=tracer_provider)
        tracers.resource = resource
        self._tracers = tracers
        self._deferral = tracers.deferral
        identity = ((semconv.SERVICE_NAME, service), (semconv.SERVICE_NAMESPACE, namespace))
        views = Views(
            snapshot=self.snapshot,
            devices=self.devices,
            hardware=lambda: self._readings.hardware(self.discovery, self.sampler),
            spans=self._deferral.counts,
            configured=Configured(config.carbon_intensity, config.pue, config.energy_price, config.energy_budget),
            publisher=self._publisher,
            identity={name: value for name, value in identity if value},
            metric_labels=config.metric_labels,
            clip=self._metric_labels.clip,
        )
        self._meters = MeterSeam(views, environ, resource, meter_provider)
        self._scrape: ScrapePipeline | None = None
        self._endpoint: Endpoint | None = None
        observers: list[Observer] = [self.store, self._meters]
        if config.metrics_addr and config.metrics_addr != "off":
            self._scrape = ScrapePipeline(views, resource)
            observers.append(self._scrape.instruments)
        labels = whose.finder(resource.attributes)
        self.calls = RequestCalls(
            self.ledger,
            self.group,
            self.clock,
            self._tracers.tracer,
            self._deferral,
            observers,
            service=service,
            namespace=namespace,
            labels=labels,
            late=self._tracers.late,
        )
        foreign = None
        if config.foreign_spans != "off":
            foreign = ForeignSpans(
                self.ledger,
                self.group,
                self.calls.lineage,
                self.calls.reports,
                lambda wall_ns: self.sampler.wall.monotonic_ns(wall_ns),
                owning=config.foreign_spans == "on",
                local_providers=config.local_providers,
                identity=views.identity,
                labels=labels,
            )
        self._deferral.watch(foreign)
        self._libraries: dict[str, Library] = {
            "transformers": TransformersInstrumentor(self.calls, environ),
            "asgi": AsgiInstrumentor(whose.headers, user=whose.body, active=whose.served),
        }
        self._lock = threading.Lock()
        self._settler: threading.Thread | None = None
        self._stopping = False
        self._started = False
        in_child(self._forked)

    @property
    def meter(self) -> Meter:
        """The meter interface of this process."""
        return self.ledger

    @property
    def endpoint_url(self) -> str | None:
        """Where ``/metrics`` is served, or None."""
        return self._endpoint.url if self._endpoint else None

    def devices(self) -> Mapping[str, Device]:
        """All devices by ``hw.id``."""
        return self._devices

    def snapshot(self) -> Snapshot:
        """The books as of the last settling."""
        return self.ledger.snapshot()

    @property
    def sharing(self) -> bool:
        """Whether it looks things up in the environment that its children inherit."""
        return self._environ is os.environ

    @property
    def working(self) -> bool:
        """Whether this process settles requests: a forked child does so from its first one on."""
        return self._settler is not None

    def span_wait_s(self) -> float:
        """The longest time that a span waits for its joules, in seconds."""
        return self._span_wait_s

    def start(self) -> None:
        """Start sampling, settling and, where asked for, the scrape endpoint; a second call does nothing.

        Raises:
            ConfigError: the trace file of ``MELODI_RECORD`` cannot be written.
        """
        with self._lock:
            if self._started:
                return
            if not self._stale:
                self._open_recorder()
            self._started = True
            self._stopping = False
            if self.sharing:
                os.environ.setdefault(GROUP_VARIABLE, self.group)
            if self.config.hub not in ("auto", "local"):
                log.warning(
                    "MELODI_HUB=%s: there is no shared meter in this version; this process has its own", self.config.hub
                )
            # Before the first request is traced, so that a provider that is there already is wrapped from its first span.
            self._tracers.watch()
            self._tracers.tracer()
            self._meters.instruments()
            if not self._stale:
                self._tell()
            if self.discovery.sources:
                # The first reading is a baseline: taken here, the first request is covered from its first instant.
                self.sampler.tick()
            self._run_threads()
            if self._scrape is not None and self._endpoint is None:
                self._endpoint = serve(
                    self.config.metrics_addr, self._scrape.registry, environ=os.environ if self.sharing else None
                )

    def wait_found(self, timeout: float) -> bool:
        """Wait until the meters of a runtime that was made with ``later`` are known; whether they are."""
        return self._settler is None or self._complete.wait(timeout)

    def instrument_libraries(self, names: Collection[str] | None = None) -> None:
        """Patch supported engines, now or when they are imported.

        Args:
            names: which (a name that is not known does nothing); None: all.
        """
        for name, library in self._libraries.items():
            if names is None or name in names:
                library.instrument()

    def uninstrument_libraries(self, names: Collection[str] | None = None) -> None:
        """Leave the engines (None: all) as they were."""
        for name, library in self._libraries.items():
            if names is None or name in names:
                library.uninstrument()

    def measured_between(self, t0_ns: int, t1_ns: int) -> Mapping[str, float | None]:
        """J that each whole device used in [t0, t1] (monotonic ns), whoever used them; None where that is not known."""
        return {name: self.ledger.between(name, t0_ns, t1_ns) for name in self._devices}

    def measure(self, name: str) -> Measurement:
        """A measurement of a block; see :class:`melodi_otel.results.measure.Measurement`."""
        return Measurement(
            name,
            meter=self.ledger,
            clock=self.clock,
            devices=self.devices,
            group=self.group,
            observer=self.store,
            nested=self.store.nested,
        )

    def wait_settled(self, timeout: float = 10.0) -> bool:
        """Wait until every closed request has its joules and has been observed; whether that was so in time."""
        end = time.monotonic() + timeout
        while self.ledger.waiting() and time.monotonic() < end:
            self._moved.set()
            time.sleep(0.01)
        self.ledger.join()  # the last request is finished a moment before its observers have heard of it
        return not self.ledger.waiting() and self.calls.drain(max(0.0, end - time.monotonic()))

    def force_flush(self, timeout: float = 5.0) -> bool:
        """Wait for joules and send what waits; True where everything went out in time."""
        settled = self.wait_settled(timeout)
        return self._tracers.force_flush(timeout) and self._meters.force_flush(timeout) and settled

    def shutdown(self, timeout: float = EXIT_WAIT_S) -> None:
        """Read the meters once more, settle what is covered, send it, and leave everything as it was found."""
        with self._lock:
            if not self._started:
                return
            self._started = False
        self.uninstrument_libraries()
        self.wait_found(timeout)
        self.wait_settled(timeout)
        self.sampler.stop()
        self._stop_settling()
        self.ledger.flush(self.clock.monotonic_ns())
        self.calls.close()
        if self._recorder is not None:
            self._recorder.close()
        self._tracers.unwrap()
        self._meters.close()
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        if self._scrape is not None:
            self._scrape.close()
        self._publisher.close()
        self._process.close()
        for source in self.discovery.sources:
            source.close()
        if self.sharing and os.environ.get(GROUP_VARIABLE) == self.group:
            del os.environ[GROUP_VARIABLE]

    # --- inside -------------------------------------------------------------------------------------------------------

    def _make_sampler(self) -> Sampler:
        return Sampler(
            self.discovery.sources,
            self._readings,
            self.clock,
            cpu=self._process.read,
            hz=self.config.sample_hz,
            observe=self._sampled,
        )

    def _find(self) -> None:
        """Open the meters of this machine.

        Raises:
            ConfigError: a name in ``MELODI_SOURCES`` is no source.
        """
        self.discovery = discover(_settings(self.config, self.clock, self._environ), self.config.sources)
        if not self._found:
            self._found.update({device.id: _with_idle(device, self.config) for device in self.discovery.devices})
            self._host += [device.id for device in self._found.values() if device.type in ("cpu", "memory")]
            for device in reversed(self._found.values()):
                self.ledger.device(device, ahead=True)  # before the requests that came meanwhile
            if self.config.span_wait is None:
                self._span_wait_s = max((wait_s(device) for device in self._found.values()), default=1.0)
        self.sampler = self._make_sampler()

    def _find_later(self) -> None:
        """On the settle thread: the meters of a runtime that was made with ``later``, or a forked child's own.

        A driver's handles do not survive a fork, and opening them takes time.
        """
        self._stale = False
        self._process = ProcessClock(self.config.procfs_root)
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
        finally:
            self._complete.set()

    def _tell(self) -> None:
        # Without any meter the line says which variable would help, and is worth being seen.
        log.log(logging.INFO if self.discovery.sources else logging.WARNING, "%s", describe(self.discovery))

    def _open_recorder(self) -> None:
        if self.config.record:
            self._recorder = _recorder(self.config.record, self._host)
            self.ledger.tap(self._recorder.tap)

    def _run_threads(self) -> None:
        if self.discovery.sources and not self._stale:
            self.sampler.start()
        if self._settler is None or not self._settler.is_alive():
            self._settler = threading.Thread(target=self._settle, name="melodi-otel-settle", daemon=True)
            self._settler.start()

    def _settle(self) -> None:
        if self._stale:
            self._find_later()
        while not self._stopping:
            self._tracers.look()
            # Without a meter there is nothing to wait for but the requests themselves.
            idle = 1.0 if self.discovery.sources or not self.ledger.waiting() else 0.05
            self._moved.wait(idle)
            self._moved.clear()
            try:
                self.ledger.settle(self.clock.monotonic_ns())
                if self._recorder is not None:
                    self._recorder.flush()
            except Exception:
                log.exception("melodi_otel: settling failed; it goes on with the next reading")

    def _stop_settling(self) -> None:
        self._stopping = True
        self._moved.set()
        if self._settler is not None and self._settler is not threading.current_thread():
            self._settler.join(timeout=5.0)
        self._settler = None

    def _watch(self, open_count: int, t_ns: int) -> None:
        # On the request's thread. After a fork nothing runs here yet: the child's first request starts it.
        if self._settler is None and self._started:
            self._run_threads()
        self.sampler.activity(open_count, t_ns)
        if not self.discovery.sources:
            self._moved.set()

    def _forked(self) -> None:
        # The child's books start empty: the parent settles, counts and exports what was open when it forked.
        self._lock = threading.Lock()
        self._moved = threading.Event()
        self._readings.forked(self._moved.set)
        self._metric_labels.forked()
        self._complete = threading.Event()
        self._child = True
        self._settler = None
        self._stale = True
        # Copies of descriptors would keep files open for as long as the child lives, whether it meters or not.
        self._process.close()
        for source in self.discovery.sources:
            if isinstance(source, Forkable):
                source.forked()
        if self._recorder is not None:
            self._recorder.forked()
            self._recorder = None
        self.ledger.tap(None)
        self.store.forked()
        self.ledger.reset()

    def _sampled(self, seconds: float, _late: float) -> None:
        self._meters.sampled(seconds)
        if self._scrape is not None:
            self._scrape.instruments.sampled(seconds)

    def _who(self, model: str | None, labels: Mapping[str, str]) -> Who:
        return Who(
            model,
            labels.get(semconv.GEN_AI_PROVIDER),
            labels.get(semconv.SERVICE_NAME),
            labels.get(semconv.SERVICE_NAMESPACE),
            self._metric_labels.clip(labels),
        )

    def why(self) -> Reason:
        """The reason to give where a request has no share of any device."""
        return (
            "permission_denied" if any(r.state == "permission_denied" for r in self.discovery.refusals) else "no_source"
        )


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


def _recorder(path: str, host_devices: Sequence[str]) -> Recorder:
    try:
        return Recorder(path, host_devices)
    except OSError as error:
        raise ConfigError(
            f"MELODI_RECORD={path!r} cannot be used ({error.strerror}): allowed is a file that can be written"
        ) from None


def _with_idle(device: Device, config: Config) -> Device:
    given = dict(config.idle_watts)
    return replace(device, idle_watts=given[device.id]) if device.id in given else device


def _service(value: object) -> str | None:
    text = str(value) if value else ""
    return None if not text or text.startswith("unknown_service") else text
