"""The ledger: the meter of one process (and of a hub), and the keeper of the books.

Requests, steps and readings are put into an inbox by whoever knows them (an append, no lock, no I/O); the settle thread
drains it, closes the intervals whose evidence is complete and finishes the requests whose end is covered. So nothing in a
request's path ever waits for the meter, and the same code replays a trace: put the lines in, call :meth:`Ledger.settle`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Final

from melodi_otel.attribution.books import Present, Snapshot, Who
from melodi_otel.attribution.core import Core
from melodi_otel.attribution.engines import Work, devices_given
from melodi_otel.attribution.meter import (
    Decode,
    EngineId,
    EngineState,
    Joined,
    Key,
    Late,
    Outcome,
    Prefill,
    Probe,
    Reason,
    Share,
    Tier,
)
from melodi_otel.attribution.policy import StaticPolicy
from melodi_otel.attribution.state import State
from melodi_otel.attribution.summary import FULL_COVERAGE
from melodi_otel.attribution.weights import CostModel
from melodi_otel.devices import Device

log = logging.getLogger("melodi_otel")

_EMPTY: Final = Snapshot(0, {}, {}, {}, {})


class Ledger:
    """In-process implementation of :class:`melodi_otel.attribution.meter.Meter`.

    Args:
        policy: who pays idle power while requests run.
        model: where weights come from; None: :class:`melodi_otel.attribution.weights.Roofline`.
        host_devices: ids of CPU packages and memory, which every request uses beside its accelerators. Empty in replay. It is
            not copied: a list may be filled until the first :meth:`settle`.
        engine_devices: accelerators of every engine (``MELODI_ENGINE_DEVICES``), of which it may name its own; None: as it says.
        patience_s: how long a closed request waits for readings before it is settled with what is covered; None: until
            :meth:`flush`.
        best: use no better evidence than this tier (to compare tiers on one trace); None: the best there is.
        who: makes the metric identity of a request from its model and labels.
        finished: called with (key, shares) for every settled activity, anonymous ones included, on the settling thread.
        deliveries: joules are told to somebody who says when they have arrived (:meth:`delivered`); until then they can be
            forgone.
        step_wait_s: how long an interval waits for steps that run across it; None: a part of ``closing.wait_s`` of the device.
        tap: sees every message (its name and arguments) before it takes effect, on the settling thread; the recorder.
        watch: called with (open requests, monotonic ns) on every open and close, on the request's thread; must be quick.
    """

    def __init__(
        self,
        *,
        policy: StaticPolicy = "busy_shared",
        model: CostModel | None = None,
        host_devices: Sequence[str] = (),
        engine_devices: Sequence[str] | None = None,
        patience_s: float | None = 30.0,
        best: Tier | None = None,
        who: Callable[[str | None, Mapping[str, str]], Who] | None = None,
        finished: Callable[[Key, list[Share]], None] | None = None,
        step_wait_s: float | None = None,
        deliveries: bool = False,
        tap: Callable[[str, tuple[Any, ...]], None] | None = None,
        watch: Callable[[int, int], None] | None = None,
    ) -> None:
        self._make = lambda: Core(policy, model, host_devices, patience_s, best, who, finished, step_wait_s, deliveries)
        self._engine_devices = tuple(engine_devices) if engine_devices else None
        self._tap = tap
        self._watch = watch
        self._devices: list[Device] = []
        self.reset()

    def tap(self, tap: Callable[[str, tuple[Any, ...]], None] | None) -> None:
        """Let ``tap`` see every message from now on, those that wait in the inbox included; None: nobody."""
        self._tap = tap

    def wait_for_steps(self, seconds: float | None) -> None:
        """Change ``step_wait_s``."""
        self._core.step_wait_s = seconds

    def reset(self) -> None:
        """Start over with empty books and the same devices: in a forked child, whose parent keeps the old ones."""
        self._inbox: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._open = 0
        self._settling = 0
        self._core = self._make()
        self._snapshot = _EMPTY
        self.refused = 0
        for device in self._devices:
            self._inbox.append((self._core.device, (device,)))

    # --- what the hardware says (called by the sampler's sink, or by replay) ---------------------------------------

    def device(self, device: Device, *, ahead: bool = False) -> None:
        """Make a device known; its books start with its first reading. ``ahead``: before all that waits in the inbox."""
        self._devices.append(device)
        put = self._inbox.appendleft if ahead else self._inbox.append
        put((self._core.device, (device,)))

    def slice_of(self, part: str, device: str) -> None:
        """``part`` names a slice (MIG device) of ``device``: who computes there is charged on the board.

        Where the device's ``fraction`` is 1.0, the other slices' part is not taken off beforehand, so such a request's quality is
        at best ``interpolated``, with the reason ``devices_assumed``.
        """
        self._inbox.append((self._core.slice_of, (part, device)))

    def idle(self, device: str, watts: float | None) -> None:
        """The idle power of a device is given as ``watts`` from the next interval on; None: it is learnt anew."""
        self._inbox.append((self._core.idle, (device, watts)))

    def counter(
        self, device: str, t_ns: int, joules: float, range_j: float | None = None, *, shaped: bool = False
    ) -> None:
        """A cumulative reading in J; ``shaped``: a point between two readings, placed by the history of a gauge."""
        self._inbox.append((self._core.counter, (device, t_ns, joules, range_j, shaped)))

    def gauge(self, device: str, t_ns: int, watts: float) -> None:
        """A power reading in W."""
        self._inbox.append((self._core.gauge, (device, t_ns, watts)))

    def gone(self, device: str, t_ns: int) -> None:
        """A device is lost: nobody waits for it any more."""
        self._inbox.append((self._core.device_gone, (device, t_ns)))

    def cpu(self, device: str, engine: EngineId | None, t_ns: int, busy_s: float, host_busy_s: float) -> None:
        """Cumulative CPU seconds of processes, and of the host.

        ``engine``: of that engine's process tree; ``EngineId(group, WHOLE)`` (see ``evidence.WHOLE``): of all processes that
        open requests under this group token, whatever their engine; None: of this process's tree. Work counts as the first
        of these that has a series. What the processes of a series use outside of any request is idle or tail, and only what
        nobody's series holds is ``foreign``.
        """
        self._inbox.append((self._core.cpu, (device, engine, t_ns, busy_s, host_busy_s)))

    def cpu_gone(self, engine: EngineId | None) -> None:
        """The processes of this series are gone: it counts up to its last reading, and is waited for no more."""
        self._inbox.append((self._core.cpu_gone, (engine,)))

    def busy(self, device: str, t_ns: int) -> None:
        """Whoever it is, somebody computes on the device at ``t_ns``: what it draws there teaches no idle power."""
        self._inbox.append((self._core.busy, (device, t_ns)))

    def foreign(self, device: str, t_ns: int, share: float, others: bool | None = False) -> None:
        """From ``t_ns`` on other processes use ``share`` (0..1) of the device's dynamic energy.

        ``others`` True: somebody else computes there, of whom no share is known; None: whether anybody does is not known.
        """
        self._inbox.append((self._core.foreign, (device, t_ns, share, others)))

    # --- the meter interface ---------------------------------------------------------------------------------------

    def engine(
        self,
        engine: EngineId,
        t_ns: int,
        state: EngineState = "ready",
        *,
        model: str | None = None,
        devices: Sequence[str] | None = None,
        world: int | None = None,
        pids: Sequence[int] = (),
        parameters: float | None = None,
        active_parameters: float | None = None,
        kv_bytes_per_token: float | None = None,
        layers: int | None = None,
        hidden: int | None = None,
        experts: int | None = None,
        experts_per_token: int | None = None,
        service: str | None = None,
    ) -> None:
        """See :meth:`melodi_otel.attribution.meter.Meter.engine`; ``service`` names the holder in idle joules."""
        facts = (parameters, active_parameters, kv_bytes_per_token, layers, hidden, experts, experts_per_token)
        named = devices_given(self._engine_devices, devices)
        self._inbox.append((self._core.engine, (engine, t_ns, state, model, named, world, facts, service)))

    def open(
        self,
        key: Key,
        t_ns: int,
        *,
        engine: EngineId | None = None,
        devices: Sequence[str] | None = None,
        model: str | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
        labels: Mapping[str, str] | None = None,
        parent: Key | None = None,
        thread: int | None = None,
        probe: Probe | None = None,
        late: Late | None = None,
        reason: Reason | None = None,
    ) -> None:
        """See :meth:`melodi_otel.attribution.meter.Meter.open`."""
        named = devices_given(self._engine_devices if engine is not None else None, devices)
        tokens = (prompt_tokens, cached_tokens)
        arguments = (key, t_ns, engine, named, model, *tokens, labels, parent, thread, probe, late, reason)
        self._inbox.append((self._core.open, arguments))
        self._count(1, t_ns)

    def unseen(self, t_ns: int, change: int) -> None:
        """From ``t_ns`` on, ``change`` more pieces of work run (or fewer, below 0) that will be reported late.

        Meanwhile the meters are read as if requests were open, and no idle power is learnt.
        """
        self._inbox.append((self._core.work_unseen, (t_ns, change)))
        self._count(change, t_ns)

    def bind(self, key: Key, child_id: str) -> None:
        """See :meth:`melodi_otel.attribution.meter.Meter.bind`."""
        self._inbox.append((self._core.bind, (key, child_id)))

    def progress(
        self,
        key: Key,
        t_ns: int,
        output_tokens: int,
        *,
        first_token_ns: int | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
    ) -> None:
        """See :meth:`melodi_otel.attribution.meter.Meter.progress`."""
        self._inbox.append(
            (self._core.progress, (key, t_ns, output_tokens, first_token_ns, prompt_tokens, cached_tokens))
        )

    def step(
        self,
        engine: EngineId,
        lane: int,
        seq: int,
        t0_ns: int,
        t1_ns: int,
        devices: Sequence[str] | None = None,
        *,
        decode: Decode = Decode(0, 0),
        prefill: Sequence[Prefill] = (),
        computed: Sequence[Prefill] = (),
        joined: Sequence[Joined] = (),
        left: Sequence[str] = (),
    ) -> None:
        """See :meth:`melodi_otel.attribution.meter.Meter.step`."""
        named = None if devices is None else devices_given(self._engine_devices, devices)
        arguments = (engine, lane, seq, t0_ns, t1_ns, named, decode, prefill, computed, joined, left)
        if threading.get_ident() == self._settling:
            self._take(
                self._core.arrivals.step, arguments
            )  # a probe hands over steps: they come before whatever follows it
        else:
            self._inbox.append((self._core.arrivals.step, arguments))

    def heard(self, engine: EngineId, t_ns: int) -> None:
        """All steps of an engine in another process that ended by ``t_ns`` have been told.

        Once this was said of an engine, an interval in which one of its requests ended waits until it is said again, of that
        end; as long as for a step that runs.
        """
        self._inbox.append((self._core.heard, (engine, t_ns)))

    def work(
        self,
        engine: EngineId,
        t0_ns: int,
        t1_ns: int,
        devices: Sequence[str] | None,
        work: Iterable[Work],
        lane: int | None = None,
    ) -> None:
        """A step with its full work instead of a delta (the trace format's form); None: lanes are found by overlap."""
        named = None if devices is None else tuple(devices)
        self._inbox.append((self._core.arrivals.work, (engine, t0_ns, t1_ns, named, list(work), lane)))

    def whole(
        self,
        engine: EngineId,
        t0_ns: int,
        t1_ns: int,
        devices: Sequence[str] | None,
        work: Mapping[str, tuple[int, int, int]],
        lane: int | None = None,
    ) -> None:
        """:meth:`work` as traces have it: by id, (prompt tokens, decode tokens, context after)."""
        named = None if devices is None else tuple(devices)
        self._inbox.append((self._core.arrivals.whole, (engine, t0_ns, t1_ns, named, work, lane)))

    def close(
        self,
        key: Key,
        t_ns: int,
        output_tokens: int | None,
        outcome: Outcome,
        *,
        first_token_ns: int | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
    ) -> Future[list[Share]]:
        """See :meth:`melodi_otel.attribution.meter.Meter.close`."""
        future: Future[list[Share]] = Future()
        arguments = (key, t_ns, output_tokens, outcome, first_token_ns, prompt_tokens, cached_tokens, future)
        self._inbox.append((self._close, arguments))
        self._count(-1, t_ns)
        return future

    def forgo(self, key: Key) -> None:
        """Nobody waits for the joules of this request any more: its span has gone out as ``unavailable``.

        Before or after its close, and after it was settled until :meth:`delivered`; a key that is not known changes nothing. What
        it accrues stays its own in the books, and stands in ``attributed`` under the quality ``unavailable`` as soon as it is
        settled, so that the other qualities sum to what spans tell. It still has to be closed.
        """
        self._inbox.append((self._core.forgo, (key,)))

    def delivered(self, key: Key) -> None:
        """The joules of this settled request have arrived, or never will."""
        self._inbox.append((self._core.delivered, (key,)))

    # --- closing ---------------------------------------------------------------------------------------------------

    def stir(self, now_ns: int) -> bool:
        """Drain the inbox and close nothing: whether :meth:`settle` should wait for news of requests.

        True where the sensor has moved since the last settling and a request is open, or one's last steps are on their way.
        A hub then asks its clients, gives them a moment, and settles; what is never answered is settled all the same. May be
        called any number of times; ``now_ns`` is the time of the question.
        """
        with self._lock, self._as_settler():
            self._drain()
            return self._core.progress_wanted()

    def intervals_wait(self) -> bool:
        """Whether an interval is measured and waits for evidence of who was at work; for whoever settles after each message."""
        return any(account.waiting for account in self._core.accounts.values())

    def settle(self, now_ns: int, *, show: bool = True) -> None:
        """Drain the inbox, close what can be closed at ``now_ns``, finish what is covered, renew the snapshot.

        ``show``: whether anybody looks at the snapshot before the next settling.
        """
        with self._lock, self._as_settler():
            self._drain()
            if self._core.sensor_moved():
                self._read_probes(now_ns)
            self._core.advance(now_ns)
            if show and self._core.changed:
                self._snapshot = self._core.snapshot(now_ns)

    def flush(self, now_ns: int) -> None:
        """The end: decide what was held back, close every covered interval, settle every closed request."""
        with self._lock, self._as_settler():
            self._drain()
            self._read_probes(now_ns)
            self._core.flush(now_ns)
            self._snapshot = self._core.snapshot(now_ns)

    def snapshot(self) -> Snapshot:
        """The books as of the last settling; immutable, free to read from any thread."""
        return self._snapshot

    def accrued(self) -> dict[Key, list[Share]]:
        """What every request has accrued that is open or closed and not settled yet, as provisional shares.

        Over the intervals that were closed at the last :meth:`settle`, and made as final shares are; one per device on which
        an interval has closed since the request was opened, so a request without any is left out, as are anonymous ones.
        ``t1_ns`` is the time up to which the device's books are closed, or the request's end where that is earlier;
        ``coverage`` relates to ``[t0_ns, t1_ns]``; ``final_ns`` is the time of those books, for nothing here is final: the
        next call gives shares that take the place of these.
        """
        with self._lock:
            return self._core.accrued()

    def state(self, now_ns: int) -> State:
        """The books as of the last :meth:`settle` and what unsettled requests have accrued, for :meth:`restore`.

        Whoever lets requests know their accruals or final shares writes this down first: then a ledger that continues from
        it gives no joule to a second request, whatever happens in between.
        """
        with self._lock:
            return self._core.state(now_ns)

    def present(self) -> list[Present]:
        """The requests that are open, as of the last settling."""
        with self._lock:
            return self._core.present()

    def pause(self) -> None:
        """The meters are not read any more; readings that come later are a new beginning, with a gap before it.

        What the machine used meanwhile is in the books of another meter, and so never in these.
        """
        with self._lock, self._as_settler():
            self._drain()
            self._core.pause()

    def restore(self, state: State) -> None:
        """Continue the books of a ledger that is gone, from its ``state``, before the first reading.

        Devices that are known by now go on from their accounts. What was in flight is settled: those requests keep the shares
        in ``state.accrued``, are opened here anew for the time from now on, and
        :func:`melodi_otel.attribution.merging.merge_shares` joins both parts. Joules that were pending, and those that the
        counter shows for the time without a ledger, are ``unsampled``; that time lowers the coverage of who lived in it. A
        device that is not known keeps its books, which stand still until it is. Where readings came first the books are
        continued all the same, and the joules of the gap are in none. The state has to be of this boot of the machine.
        """
        with self._lock, self._as_settler():
            self._drain()
            self._core.restore(state)
            self._snapshot = self._core.snapshot(state.t_ns)

    def between(self, device: str, t0_ns: int, t1_ns: int) -> float | None:
        """J that the whole device used in [t0, t1], whoever used them; None where that is not fully known."""
        with self._lock:
            found = self._core.between(device, t0_ns, t1_ns)
        return found.joules if found is not None and found.coverage >= FULL_COVERAGE else None

    @property
    def open_count(self) -> int:
        """Requests that are open now, those that will be reported late included."""
        return self._open

    def waiting(self) -> int:
        """Requests that are closed and not settled yet."""
        return self._core.pending + sum(1 for call, _ in list(self._inbox) if call == self._close)

    def join(self) -> None:
        """Wait for the settling that runs now, and so for whoever listens to what it finishes."""
        if threading.get_ident() != self._settling:
            with self._lock:
                pass

    def _close(self, key: Key, *rest: Any) -> None:
        # The last probe hands over the steps that are left, and then the close takes effect.
        self._core.last_probe(key)
        self._take(self._core.close, (key, *rest))

    def _count(self, change: int, t_ns: int) -> None:
        if self._watch is not None:
            with self._counting:
                self._open += change
                now_open = self._open
            self._watch(now_open, t_ns)

    @contextmanager
    def _as_settler(self) -> Generator[None]:
        self._settling = threading.get_ident()
        try:
            yield
        finally:
            self._settling = 0

    def _read_probes(self, now_ns: int) -> None:
        for key, tokens in self._core.read_probes():
            self._inbox.append((self._core.progress, (key, now_ns, tokens, None, None, None)))
        self._drain()

    def _drain(self) -> None:
        inbox = self._inbox
        while inbox:
            call, arguments = inbox.popleft()
            if call == self._close:
                call(*arguments)
            else:
                self._take(call, arguments)

    def _take(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            if self._tap is not None:
                self._tap(call.__name__, arguments)
            call(*arguments)
        except Exception:
            # One bad message must not stop the books of everybody else.
            self.refused += 1
            log.warning("melodi_otel: a message to the ledger was refused", exc_info=True)
