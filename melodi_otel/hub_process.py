"""The process of a hub: the meters of the host, one ledger for all its programs, and what the world sees of both.

``python -m melodi_otel.runtime hub PATH`` is a user's shared hub, started by whichever program needs it first; ``melodi-otel
agent`` is the host's. Both are one :class:`HubProcess`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Final, Literal

from melodi_otel import __version__, semconv
from melodi_otel.attribution.finishing import accrued_in
from melodi_otel.attribution.meter import Key, Share
from melodi_otel.attribution.record import Observer, RequestRecord
from melodi_otel.attribution.summary import unavailable
from melodi_otel.clock import Clock, SystemClock
from melodi_otel.config import LINGER_VARIABLE, Config
from melodi_otel.errors import ConfigError, HubBusy, HubError
from melodi_otel.group_clocks import GroupClocks
from melodi_otel.hub import wire
from melodi_otel.hub.journal import Journal
from melodi_otel.hub.server import Host, Server
from melodi_otel.hub.session import Session
from melodi_otel.hub.settings import RELOADABLE
from melodi_otel.hub.sockets import listen, peer
from melodi_otel.publishing import Publisher
from melodi_otel.sources.discovery import gpus_of
from melodi_otel.station import Station
from melodi_otel.status import HubStatus, ModelTotals, Reporter
from melodi_otel.telemetry.answers import Answers
from melodi_otel.telemetry.detector import host_resource
from melodi_otel.telemetry.guard import guard_of
from melodi_otel.telemetry.http import Endpoint, serve
from melodi_otel.telemetry.metrics import Configured, Views
from melodi_otel.telemetry.providers import MeterSeam, ScrapePipeline
from melodi_otel.telemetry.whose import Whose

log = logging.getLogger("melodi_otel")

LINGER_S: Final = 60.0
"""A shared hub stays so long after its last program has left."""
Tier = Literal["agent", "shared"]


class HubProcess:
    """A hub in this process.

    Args:
        config: what it may do.
        environ: where ``OTEL_*`` and the identity of the host are looked up.
        listener: the bound and listening Unix socket; closed by :meth:`close`.
        mode: the host's ``agent`` or a user's ``shared`` hub.
        journal: where the books survive a killed hub; None: nowhere.
        clock: its time.
        linger_s: seconds without programs after which a shared hub ends.
        publisher: the name that publishes the machine's energy.
    """

    def __init__(
        self,
        config: Config,
        environ: Mapping[str, str],
        listener: socket.socket,
        *,
        mode: Tier,
        journal: Path | None = None,
        clock: Clock | None = None,
        linger_s: float = LINGER_S,
        publisher: Publisher | None = None,
    ) -> None:
        self.config = config
        self.mode: Final[Tier] = mode
        self.name: Final = secrets.token_hex(8)
        self._environ = environ
        self._listener = listener
        self._linger_s = linger_s
        path = getattr(listener, "path", None)
        self._address = None if path is None else path.with_name(f"{path.name}.metrics")
        self._clock: Clock = clock or SystemClock()
        self._journal = Journal(journal, now=self._clock.monotonic_ns)
        self._whose = Whose(config)
        self._publisher = publisher or Publisher(tier=mode)
        self._stop = threading.Event()
        self._closed = False
        self._models = ModelTotals()
        self._answers = Answers()
        self._observers: list[Observer] = [self._models]
        self._reporter: Reporter | None = None
        self._guard = guard_of(config)
        self._meters: MeterSeam | None = None
        self._scrape: ScrapePipeline | None = None
        self._endpoint: Endpoint | None = None
        self._told: str | None = None
        self.server: Server | None = None
        self._clocks = GroupClocks(config.procfs_root)
        self.station = Station(
            config,
            self._clock,
            environ,
            who=self._whose.who,
            sampled=self._sampled,
            moved=self._moved,
            clocks=self._clocks,
        )

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the meters, go on from the journal, serve.

        Raises:
            ConfigError: a configured value cannot be used.
        """
        station = self.station
        station.find()
        known = self._go_on()
        self._open_telemetry()
        self.server = Server(
            self._listener,
            station.ledger,
            Host(
                tier=self.mode,
                release=__version__,
                hub=self.name,
                devices=lambda: list(station.devices.values()),
                denied=station.denied,
                wait_s=station.span_wait_s,
                url=lambda: self.endpoint_url,
                status=self.status,
                observed=self._observed,
                joined=self._clocks.add,
                left=self._left,
                settled=station.settled,
            ),
            self._journal,
            known,
            peer=_peer,
            now_ns=self._clock.monotonic_ns,
        )
        station.begin()
        self.server.start()
        self._publisher()

    def wait(self) -> None:
        """Serve until :meth:`request_stop`, or until nobody needs a shared hub any more."""
        while not self._stop.wait(0.5):
            self._publisher.attend()
            self._publisher()
            self._tell_address()
            self.station.sampler.wall.note()
            server = self.server
            if self.mode == "shared" and server is not None and server.idle_s() > self._linger_s:
                log.info("the last program left %g s ago: this hub ends", self._linger_s)
                return

    def request_stop(self) -> None:
        """Let :meth:`wait` return; callable from a signal handler."""
        self._stop.set()

    def reload(self, config: Config) -> list[str]:
        """Take over what may change while it runs; what changed, in words."""
        before = self.config
        changed = [
            field.name
            for field in fields(Config)
            if field.name in RELOADABLE and getattr(before, field.name) != getattr(config, field.name)
        ]
        self.config = replace(before, **{name: getattr(config, name) for name in changed})
        if "idle_watts" in changed:
            self.station.idle(dict(before.idle_watts), dict(config.idle_watts))
        if "label_limit" in changed:
            self._whose.metric.bound(config.label_limit)
        said = [f"{name} = {getattr(config, name)}" for name in changed]
        guarded = self._guard.tls is not None or self._guard.passwords is not None
        if guarded and self._endpoint is not None and self._endpoint.reload():
            said.append("certificates and users of the endpoint were read again")
        return said

    def close(self, timeout: float = 10.0) -> None:
        """Read the meters once more, settle, tell, write the journal, give everything back."""
        if self._closed:
            return
        self._closed = True
        self._stop.set()
        station = self.station
        station.sampler.stop()
        # Programs that are here now go on with the next hub, and that one with the books.
        needed = self.server is not None and self.server.connected_now > 0
        if self.server is not None:
            self.server.stop(timeout / 2)
        self._listener.close()
        if station.started:
            station.ledger.flush(self._clock.monotonic_ns())
        if self._meters is not None:
            self._meters.close()
        if self._endpoint is not None:
            self._endpoint.close()
            if self._address is not None:
                with contextlib.suppress(OSError):
                    self._address.unlink(missing_ok=True)
        if self._scrape is not None:
            self._scrape.close()
        self._publisher.close()
        self._clocks.close()
        station.close()
        if self.mode == "shared" and not needed:
            self._journal.remove()

    # --- what it tells ------------------------------------------------------------------------------------------------

    @property
    def endpoint_url(self) -> str | None:
        """Where ``/metrics`` is served, or None."""
        return self._endpoint.url if self._endpoint else None

    def ready(self) -> str | None:
        """None: it serves, and every meter that there is has been read; else why not.

        Waits for the ledger: where that is stuck, so is whoever asks, and a service manager that watches starts it again.
        """
        if self.server is None or not self.server.serving:
            return "the hub does not serve"
        self.station.ledger.present()
        return None if not self.station.discovery.sources else self.station.not_ready()

    def status(self) -> dict[str, Any]:
        """The data of the status page."""
        return {} if self._reporter is None else self._reporter.json()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _go_on(self) -> dict[Key, tuple[bool, list[Share]]]:
        page = self._journal.load()
        if page is None:
            return {}
        self.station.ledger.restore(page.state)
        known = {key: (False, shares) for key, shares in accrued_in(page.state).items()}
        for promise in page.promises:
            known[Key(promise.group, promise.request)] = (promise.final, promise.shares)
        log.info("the books of the hub before this one are gone on with")
        return known

    def _open_telemetry(self) -> None:
        station, config = self.station, self.config
        resource = host_resource(config, self._environ, *gpus_of(station.discovery))
        host_id = resource.attributes.get(semconv.HOST_ID)
        self._reporter = station.reporter(
            self.mode,
            models=self._models,
            publisher=self._publisher,
            hub=self._counts,
            host_id=None if host_id is None else str(host_id),
        )
        views = Views(
            snapshot=station.snapshot,
            devices=lambda: station.devices,
            hardware=station.hardware,
            configured=self._configured,
            publisher=self._publisher,
            metric_labels=config.metric_labels,
            clip=self._whose.metric.clip,
            calls=False,
        )
        self._meters = MeterSeam(views, self._environ, resource)
        self._meters.instruments()
        self._observers.append(self._meters)
        if config.metrics_addr != "off":
            self._scrape = ScrapePipeline(replace(views, calls=True, whose=True, page=True), resource)
            self._observers.append(self._scrape.instruments)
            self._endpoint = serve(
                config.metrics_addr,
                self._scrape.registry,
                status=self.status,
                ready=self.ready,
                answer=self._answers.get,
                guard=self._guard,
            )
            self._tell_address()

    def _configured(self) -> Configured:
        config = self.config
        return Configured(config.intensity, config.pue, config.energy_price, config.energy_budget)

    def _counts(self) -> HubStatus | None:
        server = self.server
        return None if server is None else HubStatus(server.connected_now, sum(server.refusals.counts.values()))

    def _tell_address(self) -> None:
        """Write beside the socket where the page is, for people and for ``top``; a busy address is bound later."""
        url = self.endpoint_url
        if self._address is not None and url not in (None, self._told):
            self._told = url
            with contextlib.suppress(OSError):
                self._address.write_text(f"{url}\n", encoding="utf-8")

    def _moved(self) -> None:
        if self.server is not None:
            self.server.moved()

    def _left(self, group: str, pid: int) -> None:
        for gone in self._clocks.remove(group, pid):
            self.station.ledger.cpu_gone(gone)

    def _sampled(self, seconds: float) -> None:
        if self._meters is not None:
            self._meters.sampled(seconds)
        if self._scrape is not None:
            self._scrape.instruments.sampled(seconds)

    def _observed(self, session: Session, told: wire.Observed | wire.Promised) -> None:
        hello = session.hello
        if hello is None:
            return
        if isinstance(told, wire.Promised):
            self._answers.promised(told.answer, session.uid)
            return
        record = _record(session.group, hello, told)
        for observer in self._observers:
            try:
                observer.finished(record)
            except Exception:
                log.exception("a finished request cannot be shown")
        self._answers.finished(record, session.uid)


def calm_collector() -> None:
    """Let Python's garbage collector leave the loaded program alone and look at everything less often.

    For a process that is a hub and nothing else: a full collection stops it for 20 to 60 ms, and whoever waits for joules with
    it (``bench/hub.py``).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 50)


def _record(group: str, hello: wire.Hello, told: wire.Observed) -> RequestRecord:
    return RequestRecord(
        key=Key(group, told.request),
        name=told.operation or "",
        kind="request",
        operation=told.operation,
        provider=told.provider,
        model=told.model,
        start_ns=told.start_ns,
        end_ns=told.end_ns,
        start_wall_ns=0,
        first_token_ns=told.first_token_ns,
        prompt_tokens=told.prompt_tokens,
        cached_tokens=None,
        output_tokens=told.output_tokens,
        outcome=told.outcome,
        error_type=told.error_type,
        finish_reasons=(),
        energy=replace(
            unavailable("no_source"),
            total=told.total,
            uncertainty=told.uncertainty,
            scope=told.scope,
            quality=told.quality,
            reason=None,
        ),
        trace_id=int.from_bytes(told.trace, "big"),
        span_id=int.from_bytes(told.span, "big"),
        sampled=bool(told.trace),
        labels=told.labels,
        instrumented=told.instrumented,
        service=hello.service,
        namespace=hello.namespace,
        rendered=hello.renders or told.rendered,
        answer=told.answer,
    )


def _peer(sock: socket.socket) -> tuple[int, int | None]:
    found = peer(sock)
    return (0, None) if found is None else (found.pid, found.uid)


def main(arguments: Sequence[str]) -> int:
    """``python -m melodi_otel.runtime hub PATH``: a user's shared hub; the exit code.

    0: it ended as it should, or another one is there already; 2: it cannot be one. What it says is in ``PATH.log``.
    """
    if len(arguments) != 2 or arguments[0] != "hub":
        sys.stderr.write("usage: python -m melodi_otel.runtime hub PATH\n")
        return 2
    path = Path(arguments[1])
    try:
        listener = listen(path, mode=0o600)
    except HubBusy:
        return 0  # two programs started one at the same time
    except HubError as error:
        sys.stderr.write(f"melodi-otel: {error}\n")
        return 2
    handler = RotatingFileHandler(path.with_name(f"{path.name}.log"), maxBytes=1 << 20, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    log.setLevel(logging.INFO)
    calm_collector()
    try:
        linger_s = float(os.environ.get(LINGER_VARIABLE) or LINGER_S)
        config = Config.from_env(os.environ)
        hub = HubProcess(
            config,
            os.environ,
            listener,
            mode="shared",
            journal=path.with_name(f"{path.name}.journal"),
            linger_s=linger_s,
        )

        def stop(_number: int, _frame: object) -> None:
            hub.request_stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        hub.start()
        log.info("a shared hub serves at %s", path)
        hub.wait()
        hub.close()
    except ConfigError as error:
        log.error("%s", error)
        return 2
    finally:
        listener.close()
        handler.close()
    return 0
