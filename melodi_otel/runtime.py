"""The composition root: the only module that imports every room and knows how they fit together.

:class:`Runtime` builds the meter of one process (sources -> sampler -> ledger -> spans, metrics, results) and owns its threads.
:func:`instrument` starts one for the program; :func:`measure`, :func:`last` and :func:`recent` speak to it.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from melodi_otel import semconv
from melodi_otel.attribution.books import Snapshot, Who
from melodi_otel.attribution.closing import wait_s
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Meter, Reason
from melodi_otel.attribution.record import Observer
from melodi_otel.clock import Clock, SystemClock
from melodi_otel.config import Config
from melodi_otel.devices import Device
from melodi_otel.errors import ConfigError
from melodi_otel.instrumentation.asgi import AsgiInstrumentor
from melodi_otel.instrumentation.transformers import TransformersInstrumentor
from melodi_otel.processes import ProcessClock
from melodi_otel.publishing import Publisher
from melodi_otel.readings import Readings
from melodi_otel.results.measure import Measurement
from melodi_otel.results.notebook import load_ipython_extension as _load_magic
from melodi_otel.results.store import Store
from melodi_otel.results.table import Results
from melodi_otel.results.terminal import print_summary
from melodi_otel.sampler import Sampler
from melodi_otel.sources.base import Discovery, Settings
from melodi_otel.sources.discovery import describe, discover, gpus_of
from melodi_otel.telemetry.deferral import Deferral
from melodi_otel.telemetry.detector import host_resource
from melodi_otel.telemetry.foreign import ForeignSpans
from melodi_otel.telemetry.forks import in_child
from melodi_otel.telemetry.http import Endpoint, serve
from melodi_otel.telemetry.metrics import Configured, Views
from melodi_otel.telemetry.providers import MeterSeam, ScrapePipeline, TracerSeam
from melodi_otel.telemetry.requests import RequestCalls
from melodi_otel.telemetry.whose import Whose
from melodi_otel.trace.record import Recorder

log = logging.getLogger("melodi_otel")

GROUP_VARIABLE: Final = "MELODI_GROUP_TOKEN"
_EXIT_WAIT_S: Final = 2.0


class Runtime:
    """The meter of one process.

    Args:
        config: what it may do.
        clock: its time.
        environ: where ``OTEL_*``, ``CUDA_VISIBLE_DEVICES`` and the group token are looked up.
        tracer_provider, meter_provider: use these instead of the global ones.

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
    ) -> None:
        self.config = config
        self.clock: Clock = clock or SystemClock()
        self.group = environ.get(GROUP_VARIABLE) or secrets.token_hex(8)
        self.store = Store()
        whose = Whose(config)
        self.discovery: Discovery = discover(_settings(config, self.clock, environ), config.sources)
        self._devices = MappingProxyType({device.id: _with_idle(device, config) for device in self.discovery.devices})
        host = tuple(device.id for device in self._devices.values() if device.type in ("cpu", "memory"))
        resource = host_resource(config, environ, *gpus_of(self.discovery))
        service = _service(resource.attributes.get(semconv.SERVICE_NAME))
        namespace = _service(resource.attributes.get(semconv.SERVICE_NAMESPACE))
        self._metric_labels = whose.metric
        self._host = host
        self._recorder: Recorder | None = None
        self.ledger = Ledger(
            policy=config.static_policy,
            host_devices=host,
            engine_devices=config.engine_devices,
            who=self._who,
            watch=self._watch,
        )
        for device in self._devices.values():
            self.ledger.device(device)
        self._moved = threading.Event()
        self._readings = Readings(self.ledger, self._devices, self._moved.set, self.clock)
        self._environ = environ
        self._stale = False
        self._process = ProcessClock(config.procfs_root)
        self.sampler = self._make_sampler()
        self._publisher = Publisher()
        longest = max((wait_s(device) for device in self._devices.values()), default=1.0)
        span_wait_s = longest if config.span_wait is None else config.span_wait
        self._deferral = Deferral(
            self.clock, wait_s=lambda: span_wait_s, limit=config.span_limit, devices=self.devices, why=self._why
        )
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
        self._tracers = TracerSeam(self._deferral, environ, resource, tracer_provider)
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
        )
        if config.foreign_spans != "off":
            self._deferral.watch(
                ForeignSpans(
                    self.ledger,
                    self.group,
                    self.calls.lineage,
                    self.calls.reports,
                    self._monotonic_ns,
                    owning=config.foreign_spans == "on",
                    local_providers=config.local_providers,
                    identity=views.identity,
                    labels=labels,
                )
            )
        self._libraries = [
            TransformersInstrumentor(self.calls, environ),
            AsgiInstrumentor(whose.headers, user=whose.body, active=whose.served),
        ]
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

    def start(self) -> None:
        """Start sampling, settling and, where asked for, the scrape endpoint; a second call does nothing.

        Raises:
            ConfigError: the trace file of ``MELODI_RECORD`` cannot be written.
        """
        with self._lock:
            if self._started:
                return
            if self.config.record:
                self._recorder = _recorder(self.config.record, self._host)
                self.ledger.tap(self._recorder.tap)
            self._started = True
            self._stopping = False
            # Without any meter the line says which variable would help, and is worth being seen.
            log.log(logging.INFO if self.discovery.sources else logging.WARNING, "%s", describe(self.discovery))
            if self.config.hub not in ("auto", "local"):
                log.warning(
                    "MELODI_HUB=%s: there is no shared meter in this version; this process has its own", self.config.hub
                )
            # Before the first request is traced, so that a provider that is there already is wrapped from its first span.
            self._tracers.tracer()
            self._meters.instruments()
            if self.discovery.sources:
                # The first reading is a baseline: taken here, the first request is covered from its first instant.
                self.sampler.tick()
            self._run_threads()
            if self._scrape is not None and self._endpoint is None:
                self._endpoint = serve(self.config.metrics_addr, self._scrape.registry)

    def instrument_libraries(self) -> None:
        """Patch the supported engines, now or when they are imported."""
        for library in self._libraries:
            library.instrument()

    def uninstrument_libraries(self) -> None:
        """Leave the engines as they were."""
        for library in self._libraries:
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
        return not self.ledger.waiting() and self.calls.drain(max(0.0, end - time.monotonic()))

    def force_flush(self, timeout: float = 5.0) -> bool:
        """Wait for joules and send what waits; True where everything went out in time."""
        settled = self.wait_settled(timeout)
        return self._tracers.force_flush(timeout) and self._meters.force_flush(timeout) and settled

    def shutdown(self, timeout: float = _EXIT_WAIT_S) -> None:
        """Read the meters once more, settle what is covered, send it, and leave everything as it was found."""
        with self._lock:
            if not self._started:
                return
            self._started = False
        self.uninstrument_libraries()
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
        self._publisher.release()
        self._process.close()
        for source in self.discovery.sources:
            source.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _monotonic_ns(self, wall_ns: int) -> int:
        return self.sampler.wall.monotonic_ns(wall_ns)

    def _make_sampler(self) -> Sampler:
        return Sampler(
            self.discovery.sources,
            self._readings,
            self.clock,
            cpu=self._process.read,
            hz=self.config.sample_hz,
            observe=self._sampled,
        )

    def _renew_sources(self) -> None:
        # In a forked child, on the settle thread: a driver's handles do not survive a fork, and opening them takes time.
        self._stale = False
        self._process = ProcessClock(self.config.procfs_root)
        found = discover(_settings(self.config, self.clock, self._environ), self.config.sources)
        self.discovery = found
        self.sampler = self._make_sampler()
        self.sampler.start()
        self.sampler.activity(self.ledger.open_count, self.clock.monotonic_ns())

    def _run_threads(self) -> None:
        if self.discovery.sources and not self._stale:
            self.sampler.start()
        if self._settler is None or not self._settler.is_alive():
            self._settler = threading.Thread(target=self._settle, name="melodi-otel-settle", daemon=True)
            self._settler.start()

    def _settle(self) -> None:
        if self._stale:
            self._renew_sources()
        while not self._stopping:
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
        self._settler = None
        self._stale = True
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

    def _why(self) -> Reason:
        return (
            "permission_denied" if any(r.state == "permission_denied" for r in self.discovery.refusals) else "no_source"
        )


# --- the program's own runtime ---------------------------------------------------------------------------------------

_lock = threading.RLock()
_current: Runtime | None = None
_console = False


def instrument(
    *,
    config: Config | None = None,
    console: bool | None = None,
    tracer_provider: object = None,
    meter_provider: object = None,
) -> Runtime | None:
    """Meter this program: every ``generate()`` gets a span with tokens and joules, metrics and a result.

    Uses the application's tracer and meter provider where there is one, also if it is set later. Twice is once: the running
    runtime is returned and later arguments change nothing.

    Args:
        config: what to do; None: from ``MELODI_*``.
        console: print a summary when the program ends; None: as ``MELODI_CONSOLE`` says.
        tracer_provider, meter_provider: use these instead of the global ones.

    Returns:
        The runtime, or None where ``MELODI_DISABLED=1`` turned everything off.

    Raises:
        ConfigError: a ``MELODI_*`` value cannot be used.
    """
    global _current, _console
    with _lock:
        if _current is not None:
            return _current
        settings = config or Config.from_env(os.environ)
        if settings.disabled:
            log.info("melodi_otel is off: MELODI_DISABLED=1")
            return None
        runtime = Runtime(settings, tracer_provider=tracer_provider, meter_provider=meter_provider)
        runtime.start()
        runtime.instrument_libraries()
        _current = runtime
        _console = settings.console if console is None else console
        atexit.register(_at_exit)
        return runtime


def uninstrument() -> None:
    """Stop metering, leave everything as it was; nothing happens where it does not run."""
    global _current
    with _lock:
        runtime, _current = _current, None
        atexit.unregister(_at_exit)
    if runtime is not None:
        runtime.shutdown()


def running() -> Runtime | None:
    """The program's runtime, or None."""
    return _current


def measure(name: str) -> Measurement:
    """Joules of a block: ``with melodi_otel.measure("x") as m: …``, then ``m.joules``; starts metering if need be.

    Also a decorator, and ``async with``. With ``MELODI_DISABLED=1`` every figure is None.
    """
    runtime = _current or instrument()
    if runtime is not None:
        return runtime.measure(name)
    return Measurement(name, meter=None, clock=SystemClock(), devices=dict, group="disabled")


def last() -> Results:
    """The request (or measured block) that became final last, as a table of one row; empty where there is none."""
    return recent(1)


def recent(n: int | None = None) -> Results:
    """The last ``n`` finished requests and blocks (None: all that are kept), oldest first."""
    runtime = _current
    if runtime is None:
        return Results([])
    runtime.wait_settled(_EXIT_WAIT_S)
    return runtime.store.recent(n)


def load_ipython_extension(ipython: Any) -> None:
    """``%load_ext melodi_otel``."""
    _load_magic(ipython, measure)


def _at_exit() -> None:
    runtime = _current
    if runtime is None:
        return
    uninstrument()
    # A helper process that ran no model has nothing to say.
    if _console and runtime.store.total:
        print_summary(runtime.store.recent(), runtime.snapshot(), runtime.devices())


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
