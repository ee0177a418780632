"""The composition root: the only module that imports every room and knows how they fit together.

:class:`Runtime` builds the metering of one program: its meter (:class:`~melodi_otel.station.Station` in the process, or a hub),
spans, metrics, results. The program's own one, and the functions that users call, are in :mod:`melodi_otel.program`.
``python -m melodi_otel.runtime hub PATH`` runs a user's shared hub, see :mod:`melodi_otel.hub_process`.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Final

from melodi_otel import __version__, semconv
from melodi_otel.attribution.books import Snapshot
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Meter, Reason
from melodi_otel.attribution.record import Observer
from melodi_otel.clock import Clock, SystemClock
from melodi_otel.config import GROUP_VARIABLE, Config, new_group
from melodi_otel.devices import Device
from melodi_otel.forks import in_child
from melodi_otel.hub import wire
from melodi_otel.hub.choice import Choice
from melodi_otel.hub.client import HubClient, Onwards
from melodi_otel.hub.moving import MovingMeter
from melodi_otel.instrumentation.seam import Library
from melodi_otel.libraries import libraries
from melodi_otel.promising import Promises
from melodi_otel.publishing import Publisher
from melodi_otel.results.measure import Measurement
from melodi_otel.results.store import Store
from melodi_otel.sampler import Sampler
from melodi_otel.sources.base import Discovery
from melodi_otel.sources.discovery import gpus_of
from melodi_otel.station import Station
from melodi_otel.status import ModelTotals
from melodi_otel.telemetry.deferral import Deferral
from melodi_otel.telemetry.detector import host_resource, said
from melodi_otel.telemetry.foreign import ForeignSpans
from melodi_otel.telemetry.guard import guard_of
from melodi_otel.telemetry.http import Endpoint, serve
from melodi_otel.telemetry.metrics import Configured, Hardware, Views
from melodi_otel.telemetry.own_page import OwnPage
from melodi_otel.telemetry.providers import MeterSeam, ScrapePipeline
from melodi_otel.telemetry.requests import RequestCalls
from melodi_otel.telemetry.tracers import TracerSeam
from melodi_otel.telemetry.whose import Whose
from melodi_otel.tending import Tender

log = logging.getLogger("melodi_otel")

EXIT_WAIT_S: Final = 2.0


class Runtime:
    """The metering of one program.

    Args:
        config: what it may do.
        clock: its time.
        environ: where ``OTEL_*``, ``CUDA_VISIBLE_DEVICES`` and the group token are looked up.
        tracer_provider, meter_provider: use these instead of the global ones.
        tracers: the seam of spans, where one is there already.
        later: look for meters on the settle thread, which :meth:`start` starts, instead of now: a driver may take seconds,
            and whoever imports an engine shall not wait for it. Requests that begin meanwhile are measured from then on.
        choice, publisher: how a hub is found, and who publishes the host; None: as ``MELODI_HUB`` and the host say.

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
        choice: Choice | None = None,
        publisher: Publisher | None = None,
    ) -> None:
        self.config = config
        self.clock: Clock = clock or SystemClock()
        self.group = environ.get(GROUP_VARIABLE) or new_group()
        self.store = Store()
        whose = Whose(config)
        self._metric_labels = whose.metric
        self._guard = guard_of(config)
        self._environ = environ
        # A hub that answers now is used; no meter is opened here then.
        self._setting = (
            "local" if config.record and config.hub == "auto" else config.hub
        )  # a trace is this process's own
        self._choice = choice or Choice(self._setting, environ)
        self._connect = self._choice.first()
        self.station = Station(
            config, self.clock, environ, who=whose.who, sampled=self._sampled, turn=self._turn, later=later
        )
        if self._connect is not None:
            self.station.postpone()
        elif not later:
            self.station.find()
        self._name = secrets.token_hex(8)
        self._tender = Tender(self._tend)
        self._moving: MovingMeter | None = None
        if self._connect is not None or self._setting != "local":
            self._moving = MovingMeter(
                self.station.ledger,
                self._client,
                self._choice,
                local=self._local,
                quit_local=self._quit_local,
                changed=lambda: self._tender.soon(),
                engine_devices=config.engine_devices,
                now_ns=self.clock.monotonic_ns,
            )
        meter = self._moving or self.station.ledger
        self._meter = meter
        resource = host_resource(config, environ, *gpus_of(self.discovery))
        self._service = said(resource.attributes.get(semconv.SERVICE_NAME))
        self._namespace = said(resource.attributes.get(semconv.SERVICE_NAMESPACE))
        self._publisher = publisher or Publisher()
        if tracers is None:
            deferral = Deferral(
                self.clock, wait_s=self.span_wait_s, limit=config.span_limit, devices=self.devices, why=self.why
            )
            tracers = TracerSeam(deferral, environ, given=tracer_provider)
        tracers.resource = resource
        self._tracers = tracers
        self._deferral = tracers.deferral
        identity = ((semconv.SERVICE_NAME, self._service), (semconv.SERVICE_NAMESPACE, self._namespace))
        views = Views(
            snapshot=self.snapshot,
            devices=self.devices,
            hardware=self._hardware,
            spans=self._deferral.counts,
            configured=lambda: Configured(config.intensity, config.pue, config.energy_price, config.energy_budget),
            publisher=lambda: self._is_local() and self._publisher(),
            identity={name: value for name, value in identity if value},
            metric_labels=config.metric_labels,
            clip=self._metric_labels.clip,
            counting=self._is_local,
        )
        self._meters = MeterSeam(views, environ, resource, meter_provider)
        self._scrape: ScrapePipeline | None = None
        self._endpoint: Endpoint | None = None
        self._models = ModelTotals()
        self._own_page = OwnPage(views, resource)
        self._promises = Promises(lambda: self.ledger, lambda: self.hub)
        onwards = Onwards(lambda: self.hub)
        observers: list[Observer] = [self.store, self._meters, self._models, onwards, self._own_page, self._promises]
        self._reporter = self.station.reporter(
            "local",
            models=self._models,
            publisher=self._publisher,
            spans_waiting=lambda: self._deferral.counts().deferred,
            host_id=said(resource.attributes.get(semconv.HOST_ID)),
        )
        if config.metrics_addr and config.metrics_addr != "off":
            self._scrape = ScrapePipeline(replace(views, page=True), resource)
            observers.append(self._scrape.instruments)
        labels = whose.finder(resource.attributes)
        self.calls = RequestCalls(
            meter,
            self.group,
            self.clock,
            self._tracers.tracer,
            self._deferral,
            observers,
            service=self._service,
            namespace=self._namespace,
            labels=labels,
            late=self._tracers.late,
            rendered=lambda: self._own_page.on,
            promised=self._promises.promised,
            accrued=self._promises.accrued,
        )
        foreign = None
        if config.foreign_spans != "off":
            foreign = ForeignSpans(
                meter,
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
        self._libraries = libraries(self.calls, config, environ, whose, self._own_page, self)
        self._lock = threading.Lock()
        self._started = False
        in_child(self._forked)

    # --- what it knows ------------------------------------------------------------------------------------------------

    @property
    def meter(self) -> Meter:
        """The meter interface of this process."""
        return self._meter

    @property
    def ledger(self) -> Ledger:
        """The ledger of this process; unused while a hub meters."""
        return self.station.ledger

    @property
    def sampler(self) -> Sampler:
        """What reads the meters of this process; it rests while a hub meters."""
        return self.station.sampler

    @property
    def discovery(self) -> Discovery:
        """The meters that were found here; empty while a hub meters."""
        return self.station.discovery

    @property
    def hub(self) -> HubClient | None:
        """The hub in use, or None."""
        return self._moving.hub if self._moving else None

    @property
    def endpoint_url(self) -> str | None:
        """Where ``/metrics`` is served, by this process or its hub, or None."""
        hub = self.hub
        if hub is not None and hub.hub is not None:
            return hub.hub.url
        return self._endpoint.url if self._endpoint else None

    def devices(self) -> Mapping[str, Device]:
        """All devices by ``hw.id``."""
        hub = self.hub
        return self.station.devices if hub is None else {**self.station.devices, **hub.devices}

    def snapshot(self) -> Snapshot:
        """The books of this process as of the last settling; empty where a hub keeps them."""
        return self.station.snapshot()

    @property
    def sharing(self) -> bool:
        """Whether it looks things up in the environment that its children inherit."""
        return self._environ is os.environ

    @property
    def working(self) -> bool:
        """Whether this process settles requests: a forked child does so from its first one on."""
        return self.station.working or self.hub is not None

    def span_wait_s(self) -> float:
        """The longest time that a span waits for its joules, in seconds."""
        hub = self.hub
        if hub is not None and hub.hub is not None and self.config.span_wait is None:
            return hub.hub.wait_s
        return self.station.span_wait_s()

    def why(self) -> Reason:
        """The reason to give where a request has no share of any device."""
        hub = self.hub
        if hub is None:
            return self.station.why()
        return "permission_denied" if hub.hub is not None and hub.hub.denied else "no_source"

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start metering and, where asked for, the scrape endpoint; a second call does nothing.

        Raises:
            ConfigError: the trace file of ``MELODI_RECORD`` cannot be written.
        """
        with self._lock:
            if self._started:
                return
            self._started = True
            if self.sharing:
                os.environ.setdefault(GROUP_VARIABLE, self.group)
            # Before the first request is traced, so that a provider that is there already is wrapped from its first span.
            self._tracers.watch()
            self._tracers.tracer()
            self._meters.instruments()
            connect, self._connect = self._connect, None
            try:
                if self._moving is None:
                    self._local()
                else:
                    self._moving.begin(connect)
            except BaseException:
                self._started = False
                self._tracers.unwrap()
                raise
            if connect is not None:
                self._tender.soon()

    def wait_found(self, timeout: float) -> bool:
        """Wait until the meters, the hub's or those that are looked for later, are known; whether they are."""
        end = time.monotonic() + timeout
        if self._moving is not None and not self._moving.wait_known(timeout):
            return False
        return not self._is_local() or self.station.wait_found(max(0.0, end - time.monotonic()))

    def instrument_libraries(self, names: Collection[str] | None = None) -> None:
        """Patch supported engines, now or when they are imported.

        Args:
            names: which (a name that is not known does nothing); None: all.
        """
        for name in self._libraries:
            if names is None or name in names:
                self.instrument(name)

    def instrument(self, name: str) -> Library:
        """Patch one supported engine, now or when it is imported; its instrumentation."""
        library = self._libraries[name]
        library.instrument()
        return library

    def uninstrument_libraries(self, names: Collection[str] | None = None) -> None:
        """Leave the engines (None: all) as they were."""
        for name, library in self._libraries.items():
            if names is None or name in names:
                library.uninstrument()

    def measured_between(self, t0_ns: int, t1_ns: int) -> Mapping[str, float | None]:
        """J that each whole device used in [t0, t1] (monotonic ns), whoever used them; None where that is not known."""
        hub = self.hub
        between = self.ledger.between if hub is None else hub.between
        return {name: between(name, t0_ns, t1_ns) for name in self.devices()}

    def measure(self, name: str) -> Measurement:
        """A measurement of a block; see :class:`melodi_otel.results.measure.Measurement`."""
        return Measurement(
            name,
            meter=self._meter,
            clock=self.clock,
            devices=self.devices,
            group=self.group,
            observer=self.store,
            nested=self.store.nested,
        )

    def wait_settled(self, timeout: float = 10.0) -> bool:
        """Wait until every closed request has its joules and has been observed; whether that was so in time."""
        end = time.monotonic() + timeout
        while self._waiting() and time.monotonic() < end:
            self.station.nudge()
            time.sleep(0.01)
        self.ledger.join()  # the last request is finished a moment before its observers have heard of it
        return not self._waiting() and self.calls.drain(max(0.0, end - time.monotonic()))

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
        self._choice.end()
        self._tender.end(timeout)
        if self._moving is not None:
            self._moving.end(timeout)  # first: a hub that dies from here on brings no meter of ours back
        self.station.end()
        self.calls.close()
        self._tracers.unwrap()
        self._meters.close()
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
        if self._scrape is not None:
            self._scrape.close()
        self._own_page.close()
        self._publisher.close()
        if self.sharing and os.environ.get(GROUP_VARIABLE) == self.group:
            del os.environ[GROUP_VARIABLE]

    # --- inside -------------------------------------------------------------------------------------------------------

    def _is_local(self) -> bool:
        return self._moving is None or self._moving.is_local

    def _waiting(self) -> int:
        return self.ledger.waiting() if self._moving is None else self._moving.waiting()

    def _hardware(self) -> Hardware:
        return self.station.hardware() if self._is_local() else Hardware()

    def _local(self) -> None:
        """This process's own meter is used from now on."""
        if self.station.started:
            self.station.run_threads()
        else:
            self.station.begin()
        if self._scrape is not None and self._endpoint is None:
            self._endpoint = serve(
                self.config.metrics_addr,
                self._scrape.registry,
                environ=os.environ if self.sharing else None,
                status=self._reporter.json,
                ready=self.station.not_ready,
                answer=self._promises.get,
                guard=self._guard,
            )

    def _quit_local(self) -> None:
        self._publisher.release()
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            log.info("metrics of this process are on its hub's page from now on, no longer at %s", endpoint.url)
            endpoint.close()

    def _client(self, connect: Any, resume: Any, *, welcomed: Any, lost: Any) -> HubClient:
        alone = "vllm" not in sys.modules  # else requests and steps of one engine come from several processes
        hello = wire.Hello(
            wire.VERSION, __version__, self._name, self.group, alone, self._service, self._namespace,
            self._own_page.on, [],
        )  # fmt: skip
        return HubClient(
            connect,
            hello,
            resume=resume,
            welcomed=welcomed,
            lost=lost,
            wait_s=self.span_wait_s,
            now_ns=self.clock.monotonic_ns,
        )

    def _turn(self) -> None:
        """What has to be looked at now and then, on a thread of ours."""
        self._tracers.look()
        self._publisher.attend()
        moving = self._moving
        if moving is None:
            return
        if self._endpoint is not None:
            moving.seek()  # the page is the hub's, also where only forked workers have requests
        moving.look()
        moving.retire()
        if not moving.is_local:
            self.sampler.wall.note()
            if self.station.started and not self.ledger.waiting() and not self.ledger.open_count:
                self._tender.soon()  # the thread that may end the station's

    def _tend(self) -> None:
        # While a hub meters there is no settle thread that would take these turns.
        if not self.station.working:
            self._turn()
        elif not self.ledger.waiting() and not self.ledger.open_count:
            self.station.rest(self._is_local)

    def _forked(self) -> None:
        # The child's books start empty: the parent settles, counts and exports what was open when it forked.
        self._lock = threading.Lock()
        self._connect = None  # a connection made before the fork is the parent's
        self._publisher.forked()
        self._tender.forked()
        self._metric_labels.forked()
        self._models.forked()
        self._name = secrets.token_hex(8)
        self.station.forked()
        self.store.forked()
        if self._moving is not None:
            self._choice = self._choice.in_child()
            self._moving.forked(self._choice, self._chosen_in_child)

    def _chosen_in_child(self) -> Any:
        connect = self._choice.first()
        if connect is not None:
            self._tender.soon()
        return connect

    def _sampled(self, seconds: float) -> None:
        self._meters.sampled(seconds)
        if self._scrape is not None:
            self._scrape.instruments.sampled(seconds)


if __name__ == "__main__":
    from melodi_otel.hub_process import main

    sys.exit(main(sys.argv[1:]))
