"""The state behind the ledger: what each message changes. Single-threaded by contract (the settle thread, or replay)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from melodi_otel.attribution import views
from melodi_otel.attribution.account import Account
from melodi_otel.attribution.activity import Accrual, Activity, ask, may_hold
from melodi_otel.attribution.arrivals import Arrivals
from melodi_otel.attribution.baseline import Baseline
from melodi_otel.attribution.books import Present, Snapshot, Who
from melodi_otel.attribution.closing import may_close, unheard
from melodi_otel.attribution.engines import EngineState, with_host
from melodi_otel.attribution.finishing import shares_of
from melodi_otel.attribution.interval import IntervalCloser
from melodi_otel.attribution.meter import EngineId, Key, Late, Outcome, Probe, Reason, Share, Tier
from melodi_otel.attribution.policy import StaticPolicy
from melodi_otel.attribution.riding import reckon
from melodi_otel.attribution.roster import ADOPT_NS, Roster
from melodi_otel.attribution.state import State
from melodi_otel.attribution.weights import CostModel, EngineFacts, Roofline
from melodi_otel.devices import Device
from melodi_otel.timeline.timeline import Between, Interval

log = logging.getLogger("melodi_otel")

Facts = tuple[float | None, float | None, float | None, int | None, int | None, int | None, int | None]


def _model_only(model: str | None, _labels: Mapping[str, str]) -> Who:
    return Who(model)


class Core:
    """See :class:`melodi_otel.attribution.ledger.Ledger` for the arguments and the meaning of the messages."""

    def __init__(
        self,
        policy: StaticPolicy,
        model: CostModel | None,
        host_devices: Sequence[str],
        patience_s: float | None,
        best: Tier | None,
        who: Callable[[str | None, Mapping[str, str]], Who] | None,
        finished: Callable[[Key, list[Share]], None] | None,
        step_wait_s: float | None,
        deliveries: bool = False,
    ) -> None:
        self.step_wait_s = step_wait_s
        self._told: dict[Key, Mapping[str, Accrual]] | None = {} if deliveries else None
        self.model: CostModel = model or Roofline()
        self.host_devices = host_devices
        self.patience_ns = None if patience_s is None else round(patience_s * 1e9)
        self.accounts: dict[str, Account] = {}
        # Devices of an earlier ledger that are not there now: their books stand still, and nobody waits for them.
        self.absent: dict[str, Account] = {}
        self.roster = Roster()
        self.closing: dict[Key, Activity] = {}
        self._who = who or _model_only
        self._same: dict[Who, Who] = {}  # one object for each: what is the same object need not be compared
        self._finished = finished
        self.slices: dict[str, str] = {}
        self.arrivals = Arrivals(self.roster, self.accounts, host_devices, self._board)
        self._closer = IntervalCloser(self.roster, self.model, policy, best, learn=model is None)
        self._moved = False
        self.changed = False

    @property
    def pending(self) -> int:
        """Closed requests that wait for their joules."""
        return len(self.closing)

    # --- hardware ---------------------------------------------------------------------------------------------------

    def device(self, device: Device) -> None:
        if device.id not in self.accounts:
            account = self.accounts[device.id] = Account(device)
            before = self.absent.pop(device.id, None)
            if before is not None:
                account.restore(before.state(0.0))
            self.changed = True

    def idle(self, device: str, watts: float | None) -> None:
        account = self._account(device)
        if account is not None:
            account.baseline = Baseline(watts)

    def slice_of(self, part: str, device: str) -> None:
        self.slices[part] = device

    def counter(self, device: str, t_ns: int, joules: float, range_j: float | None, shaped: bool = False) -> None:
        account = self._account(device)
        if account is not None:
            account.timeline.counter(t_ns - account.learner.lag.ns, joules, range_j)
            account.begin()
            self._moved = account.collect() or self._moved

    def gauge(self, device: str, t_ns: int, watts: float) -> None:
        account = self._account(device)
        if account is not None:
            account.timeline.gauge(t_ns - account.learner.lag.ns, watts)
            account.begin()
            self._moved = account.collect() or self._moved

    def device_gone(self, device: str, t_ns: int) -> None:
        account = self.accounts.get(device)
        if account is not None:
            account.timeline.lose(t_ns)
            account.gone = True
            self._moved = account.collect() or self._moved

    def cpu(self, device: str, engine: EngineId | None, t_ns: int, busy_s: float, host_busy_s: float) -> None:
        account = self._account(device)
        if account is not None:
            account.cpu.read(engine, t_ns, busy_s, host_busy_s)

    def cpu_gone(self, engine: EngineId | None) -> None:
        for account in self.accounts.values():
            account.cpu.end(engine)

    def busy(self, device: str, t_ns: int) -> None:
        account = self._account(device)
        if account is not None:
            account.busy_ns = t_ns

    def foreign(self, device: str, t_ns: int, share: float, others: bool | None = False) -> None:
        account = self._account(device)
        if account is not None:
            account.foreign.tell(t_ns, share, others)

    def _account(self, device: str) -> Account | None:
        account = self.accounts.get(device)
        if account is None:
            log.warning("melodi_otel: a reading of the unknown device %s was left out", device)
        return account

    # --- engines and requests ----------------------------------------------------------------------------------------

    def engine(
        self,
        engine: EngineId,
        t_ns: int,
        state: str,
        model: str | None,
        devices: tuple[str, ...] | None,
        world: int | None,
        facts: Facts,
        service: str | None,
    ) -> None:
        known = self.roster.engine(engine)
        known.model = model or known.model
        known.service = service or known.service
        known.world = world or known.world
        if devices is not None:
            known.devices = with_host(self._board(devices), self.host_devices)
        if any(fact is not None for fact in facts):
            known.facts = EngineFacts(*facts)
            known.theta = None
        if state == "loading" and (not known.loading_ns or known.loading_ns[-1][1] is not None):
            known.loading_ns.append((t_ns, None))
        elif state != "loading" and known.loading_ns and known.loading_ns[-1][1] is None:
            known.loading_ns[-1] = (known.loading_ns[-1][0], t_ns)
        known.gone = state == "gone"

    def heard(self, engine: EngineId, t_ns: int) -> None:
        known = self.roster.engine(engine)
        known.heard_ns = max(t_ns, known.heard_ns or 0)

    def open(
        self,
        key: Key,
        t_ns: int,
        engine: EngineId | None,
        devices: tuple[str, ...] | None,
        model: str | None,
        prompt_tokens: int | None,
        cached_tokens: int | None,
        labels: Mapping[str, str] | None,
        parent: Key | None,
        thread: int | None,
        probe: Probe | None,
        late: Late | None,
        reason: Reason | None,
    ) -> None:
        if key in self.roster.activities and not self.roster.activities[key].anonymous:
            log.warning("melodi_otel: request %s was opened twice; the second time is left out", key.request)
            return
        activity = self.roster.adopt(key, t_ns) or Activity(key, t_ns)
        self.closing.pop(key, None)
        activity.anonymous = False
        who = self._who(model, labels or {})
        activity.model = model
        self.roster.named(activity, self._same.setdefault(who, who), self.accounts)
        activity.prompt_tokens, activity.cached_tokens = prompt_tokens, cached_tokens
        activity.probe, activity.own_lane, activity.late = probe, thread is not None, late
        activity.reason = reason
        self.roster.add(activity)
        self.changed = True
        state = None if engine is None else self.roster.engine(engine)
        activity.devices, activity.assumed = self._devices_for(engine, devices)
        if state is not None:
            activity.engine = engine
            state.add(activity)
        elif late is None:
            self.roster.blocks[key] = activity
        outer = self.roster.activities.get(parent) if parent is not None else self.roster.only_block(activity)
        if outer is not None and may_hold(outer, activity):
            activity.parent = outer
            outer.nested.append(activity)

    def work_unseen(self, t_ns: int, change: int) -> None:
        self._closer.unseen.change(t_ns, change)

    def bind(self, key: Key, child_id: str) -> None:
        activity = self.roster.activities.get(key)
        if activity is None:
            return
        stray = self.roster.bind(activity, child_id)
        if stray is not None:
            if self.closing.get(stray.key) is stray:
                del self.closing[stray.key]  # its joules are the request's now, and settle with it alone
            self.roster.merge(stray, activity, self.accounts.values())

    def progress(
        self,
        key: Key,
        t_ns: int,
        output_tokens: int,
        first_token_ns: int | None,
        prompt_tokens: int | None,
        cached_tokens: int | None,
    ) -> None:
        activity = self.roster.activities.get(key)
        if activity is not None and activity.close_ns is None:
            self._learn_counts(activity, first_token_ns, prompt_tokens, cached_tokens)
            activity.told(t_ns, output_tokens)
            activity.counted = True
            # A request that computes on a thread of its own hands over its steps; until then its engine's kind is open.
            if not activity.own_lane:
                self._seen(activity, "tokens")

    def close(
        self,
        key: Key,
        t_ns: int,
        output_tokens: int | None,
        outcome: Outcome,
        first_token_ns: int | None,
        prompt_tokens: int | None,
        cached_tokens: int | None,
        future: Future[list[Share]],
    ) -> None:
        activity = self.roster.activities.get(key)
        if activity is None or activity.close_ns is not None:
            future.set_result([])
            return
        activity.future = future
        self._learn_counts(activity, first_token_ns, prompt_tokens, cached_tokens)
        if output_tokens is not None:
            activity.told(t_ns, output_tokens)
            activity.output_tokens = output_tokens
        self._end(activity, t_ns, outcome)

    def forgo(self, key: Key) -> None:
        activity = self.roster.activities.get(key)
        if activity is not None:
            activity.forgone = self.changed = True
            reckon(activity)
            self._withdraw(activity.accruals)
        elif self._told is not None and key in self._told:
            self.changed = True
            self._withdraw(self._told.pop(key))

    def delivered(self, key: Key) -> None:
        if self._told is not None:
            self._told.pop(key, None)

    # --- closing -----------------------------------------------------------------------------------------------------

    def sensor_moved(self) -> bool:
        """Whether intervals wait to be closed or requests for readings."""
        return self._moved or any(account.waiting for account in self.accounts.values())

    def progress_wanted(self) -> bool:
        """Whether a request could say how far it is since the sensor moved, or one's last steps may be on their way."""
        return (self._moved and bool(self.roster.active)) or any(
            unheard(self.roster.engines.values(), ended, ended.close_ns or ended.open_ns)
            for ended in self.closing.values()
        )

    def read_probes(self) -> list[tuple[Key, int]]:
        """Ask every open request how many tokens it has; steps that it hands over meanwhile land in the inbox."""
        told: list[tuple[Key, int]] = []
        for activity in list(self.roster.probed.values()):
            tokens = ask(activity) if activity.close_ns is None else None
            if tokens is not None:
                told.append((activity.key, tokens))
        self._moved = False
        return told

    def last_probe(self, key: Key) -> None:
        """A request is about to close: what it has not handed over yet lands in the inbox now."""
        activity = self.roster.activities.get(key)
        if activity is not None and activity.close_ns is None:
            ask(activity)
            activity.probe = None

    def advance(self, now_ns: int, *, force: bool = False) -> None:
        """Close intervals and finish requests."""
        self._retire_strays(now_ns, force)
        for account in self.accounts.values():
            engines, everywhere = self._engines_on(account), self.roster.engines.values()
            while account.waiting and (
                force or may_close(account, account.waiting[0], now_ns, engines, self.step_wait_s, everywhere)
            ):
                self._close_interval(account, account.waiting.popleft(), engines)
        for activity in list(self.closing.values()):
            ended: Activity | None = activity
            # Whoever waited only for what is nested in it settles with the last of that, not a round later.
            while (
                ended is not None and self.closing.get(ended.key) is ended and (force or self._covered(ended, now_ns))
            ):
                self._finish(ended, now_ns)
                ended = ended.parent

    def flush(self, now_ns: int) -> None:
        """End of all readings."""
        for account in self.accounts.values():
            account.timeline.flush()
            account.collect()
        self.advance(now_ns)
        self.advance(now_ns, force=True)

    def between(self, device: str, t0_ns: int, t1_ns: int) -> Between | None:
        """Energy of a whole device in a window."""
        account = self.accounts.get(device)
        return None if account is None else account.timeline.between(t0_ns, t1_ns)

    def accrued(self) -> dict[Key, list[Share]]:
        """See :func:`melodi_otel.attribution.views.accrued`."""
        return views.accrued(self.roster, self.accounts)

    def snapshot(self, now_ns: int) -> Snapshot:
        """An immutable copy of the books."""
        self.changed = False
        return views.snapshot(now_ns, self.roster, {**self.absent, **self.accounts})

    def state(self, now_ns: int) -> State:
        """What the next ledger needs to continue the books."""
        return views.state(now_ns, self.roster, {**self.absent, **self.accounts})

    def present(self) -> list[Present]:
        """See :meth:`melodi_otel.attribution.ledger.Ledger.present`."""
        return [
            Present(activity.key, activity.model, activity.who, activity.open_ns, activity.output_tokens)
            for activity in self.roster.activities.values()
            if activity.close_ns is None and not activity.anonymous
        ]

    def pause(self) -> None:
        """Another meter goes on: see :meth:`melodi_otel.attribution.ledger.Ledger.pause`."""
        for account in self.accounts.values():
            account.timeline.pause()

    def restore(self, state: State) -> None:
        """Continue the books of another ledger."""
        self.changed = True
        for known in state.devices:
            account = self.accounts.get(known.device.id)
            if account is None:
                account = self.absent[known.device.id] = Account(known.device)
            account.restore(known)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _devices_for(self, engine: EngineId | None, devices: tuple[str, ...] | None) -> tuple[tuple[str, ...], bool]:
        if devices is not None:
            # Of a slice only the board has a meter. Where its fraction is not taken off, what the slice used is assumed.
            whole = any(name in self.slices and self._is_whole(self.slices[name]) for name in devices)
            return with_host(self._board(devices), self.host_devices), whole
        if engine is not None:
            known = self.roster.engines[engine].devices
            if known is not None:
                return known, False
        # Without an engine it is a block of code, which may use the whole host: nothing is assumed.
        names = tuple(name for name, account in self.accounts.items() if account.device.type != "host")
        return names, engine is not None

    def _board(self, devices: tuple[str, ...]) -> tuple[str, ...]:
        if not self.slices:
            return devices
        return tuple(dict.fromkeys(self.slices.get(name, name) for name in devices))

    def _is_whole(self, device: str) -> bool:
        account = self.accounts.get(device)
        return account is not None and account.device.fraction == 1.0

    def _engines_on(self, account: Account) -> list[EngineState]:
        name = account.device.id
        return [
            engine
            for engine in self.roster.engines.values()
            if engine.devices is None or name in engine.devices or name in engine.on
        ]

    def _seen(self, activity: Activity, evidence: str) -> None:
        if activity.engine is None:
            return
        engine = self.roster.engines[activity.engine]
        if evidence == "steps":
            engine.evidence = "steps"
        elif engine.evidence in ("unknown", "none"):
            engine.evidence = "tokens" if evidence == "tokens" else "none"

    def _learn_counts(
        self, activity: Activity, first_token_ns: int | None, prompt_tokens: int | None, cached_tokens: int | None
    ) -> None:
        if prompt_tokens is not None:
            activity.prompt_tokens = prompt_tokens
        if cached_tokens is not None:
            activity.cached_tokens = cached_tokens
        if first_token_ns is not None:
            if activity.first_token_ns is None and activity.engine is not None:
                seconds = (first_token_ns - activity.open_ns) / 1e9
                self.roster.engines[activity.engine].speed.observe(activity.computed_prompt, seconds)
            activity.first_token_ns = first_token_ns

    def _end(self, activity: Activity, t_ns: int, outcome: Outcome) -> None:
        self.changed = True
        activity.close_ns = max(t_ns, activity.open_ns)
        activity.outcome = outcome
        self._seen(activity, "none")
        self.closing[activity.key] = activity
        self.roster.ended(activity)

    def _retire_strays(self, now_ns: int, force: bool) -> None:
        for activity in list(self.roster.strays.values()):
            last_ns = activity.last_step_ns
            if activity.close_ns is None and last_ns is not None:
                if not force and now_ns <= last_ns + ADOPT_NS:
                    continue
                self._end(activity, last_ns, "stop")

    def _close_interval(self, account: Account, interval: Interval, engines: list[EngineState]) -> None:
        self.changed = True
        self._closer.close(account, interval, engines)
        account.closed_until = interval.t1_ns
        if not interval.gap:
            account.interval_s += 0.1 * ((interval.t1_ns - interval.t0_ns) / 1e9 - account.interval_s)

    def _withdraw(self, accruals: Mapping[str, Accrual]) -> None:
        for name, accrual in accruals.items():
            if name in self.accounts:
                self.accounts[name].withdraw(accrual)

    def _covered(self, activity: Activity, now_ns: int) -> bool:
        end = activity.end_ns or 0
        if any(not child.settled for child in activity.nested):
            return False
        if self.patience_ns is not None and now_ns > end + self.patience_ns:
            return True
        for name in activity.charged():
            account = self.accounts.get(name)
            if account is None or (account.gone and not account.waiting):
                continue
            if account.closed_until is None or account.closed_until < end:
                return False
        return True

    def _finish(self, activity: Activity, now_ns: int) -> None:
        self.changed = True
        self.closing.pop(activity.key, None)
        if activity.late is not None:
            for name in activity.on():
                if name in self.accounts:
                    self._closer.take_late(self.accounts[name], activity, activity.late)
        self.roster.remove(activity)
        self.roster.disown(activity, self.accounts)
        shares = shares_of(
            activity, self.accounts, now_ns, self.roster.engines.get(activity.engine) if activity.engine else None
        )
        for share in shares:
            if share.joules is not None:
                self.accounts[share.device].settled += share.joules
        if activity.forgone:
            self._withdraw(activity.accruals)
        elif self._told is not None and not activity.anonymous:
            self._told[activity.key] = activity.accruals
        activity.settled = True
        if self._finished is not None:
            self._finished(activity.key, shares)
        try:
            activity.future.set_result(shares)
        except Exception:
            log.warning("melodi_otel: a listener to finished requests failed", exc_info=True)
