"""Replay: a recorded trace through the ledger that runs live.

Lines are read one by one and handed to the same :class:`~melodi_otel.attribution.ledger.Ledger`; after each the ledger may
settle at the time the line became known, so a share's ``t_final`` is the time at which it would have been final. Memory
does not grow with the trace.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from melodi_otel.attribution.closing import MAX_WAIT_S
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import EngineId, Key, Late, Share, Tier
from melodi_otel.attribution.policy import StaticPolicy
from melodi_otel.attribution.weights import CostModel
from melodi_otel.devices import Device
from melodi_otel.trace import lines as form
from melodi_otel.units import ns, seconds

log = logging.getLogger("melodi_otel")

GROUP: Final = "trace"
METHODS: Final[tuple[Tier, ...]] = ("step", "slice", "phase", "window", "equal")
_EVIDENCE: Final = (form.StepLine, form.TokensLine)
_STATES: Final = ("loading", "ready", "gone")
_OUTCOMES: Final = ("stop", "length", "abort", "error")


@dataclass(slots=True)
class Report:
    """What a replay met: good lines, broken ones (number and why, the first hundred), kinds and keys left out."""

    lines: int = 0
    broken: int = 0
    first_broken: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    unknown: dict[str, int] = field(default_factory=dict[str, int])


class Replay:
    """One replay.

    Args:
        policy: who pays idle power while requests run.
        method: use no better evidence than this tier; None: the best there is.
        model: weights of steps that stay as they are; None: they are fitted, as live.
    """

    def __init__(
        self, policy: StaticPolicy = "busy_shared", method: Tier | None = None, model: CostModel | None = None
    ) -> None:
        self.report = Report()
        self._method = method if method != "step" else None
        self._ready: list[dict[str, Any]] = []
        self._engines: dict[str, EngineId] = {}
        self._by_devices: dict[tuple[str, ...], str] = {}
        self._engine_devices: dict[str, tuple[str, ...]] = {}
        self._made: dict[str, int] = {}
        self._first: dict[str, int] = {}
        self._now_ns: int | None = None
        self._known: set[str] = set()
        # A file has no reader who waits: steps that run across a reading get the longest time that the design allows.
        self._ledger = Ledger(
            policy=policy,
            model=model,
            patience_s=None,
            best=self._method,
            finished=self._finished,
            step_wait_s=MAX_WAIT_S,
        )

    def run(self, source: Iterable[str | bytes]) -> Iterator[dict[str, Any]]:
        """Shares as they become final, then the books of every device."""
        for number, raw in enumerate(source, 1):
            if not raw.strip():
                continue
            try:
                line = form.decode(raw)
                self._look_for_unknown(raw)
                self._take(line)
            except form.UnknownKind as error:
                self._unknown(f"kind {error}")
                continue
            except (ValueError, KeyError, TypeError) as error:
                self.report.broken += 1
                if len(self.report.first_broken) < 100:
                    self.report.first_broken.append((number, str(error)))
                continue
            self.report.lines += 1
            # A step or a count can only complete an interval that waits for it; everything else may close or finish something.
            if self._now_ns is not None and (type(line) not in _EVIDENCE or self._ledger.intervals_wait()):
                self._ledger.settle(self._now_ns, show=False)
            if self._ready:
                yield from self._drain()
        self._ledger.flush(self._now_ns or 0)
        yield from self._drain()
        for books in self._ledger.snapshot().books.values():
            yield {
                "kind": "books",
                "device": books.device,
                "measured": books.measured,
                "attributed": books.attributed,
                "in_flight": books.in_flight,
                "idle": books.idle,
                "tail": books.tail,
                "loading": books.loading,
                "foreign": books.foreign,
                "unsampled": books.unsampled,
                "residual": books.residual,
            }

    def _drain(self) -> Iterator[dict[str, Any]]:
        ready, self._ready = self._ready, []
        yield from ready

    def _finished(self, key: Key, shares: list[Share]) -> None:
        self._made.pop(key.request, None)
        self._first.pop(key.request, None)
        self._ready += [share_line(share) for share in shares]

    def _look_for_unknown(self, raw: str | bytes) -> None:
        # Reading a line twice is slow; a few hundred lines show every key that a writer uses.
        if self.report.lines < 500:
            for key in form.unknown_keys(raw):
                self._unknown(f"key {key}")

    def _unknown(self, what: str) -> None:
        if what not in self.report.unknown:
            log.warning("trace: unknown %s is left out", what)
        self.report.unknown[what] = self.report.unknown.get(what, 0) + 1

    def _now(self, t: float) -> int:
        t_ns = ns(t)
        self._now_ns = t_ns if self._now_ns is None else max(self._now_ns, t_ns)
        return t_ns

    def _take(self, line: form.Line) -> None:
        match line:
            case form.SampleLine():
                self._sample(line)
            case form.StepLine():
                self._step(line)
            case form.TokensLine():
                self._tokens(line)
            case form.OpenLine():
                self._open(line)
            case form.CloseLine():
                self._close(line)
            case form.BindLine():
                self._now(line.t)
                self._ledger.bind(Key(GROUP, line.id), line.child)
            case form.CpuLine():
                engine = self._engine_id(line.engine) if line.engine is not None else None
                self._ledger.cpu(line.device, engine, self._now(line.t), line.busy_s, line.host_busy_s)
            case form.ForeignLine():
                self._ledger.foreign(line.device, self._now(line.t), line.share, line.others)
            case form.BusyLine():
                self._ledger.busy(line.device, self._now(line.t))
            case form.UnseenLine():
                self._ledger.unseen(self._now(line.t), line.change)
            case form.HeardLine():
                t_ns = self._now(line.t)
                if self._method is None:
                    self._ledger.heard(self._engine_id(line.engine), t_ns)
            case form.DeviceLine():
                self._device(line)
            case form.EngineLine():
                self._engine(line)

    def _device(self, line: form.DeviceLine) -> None:
        self._known.add(line.id)
        if line.live:
            self._ledger.wait_for_steps(None)
        kind = line.type if line.type in ("gpu", "cpu", "memory", "host") else "gpu"
        self._ledger.device(
            Device(
                line.id,
                kind,
                name=line.name,
                idle_watts=line.idle_watts,
                window_s=line.window_s,
                period_s=line.period_s,
                peak_flops=line.peak_flops,
                bytes_per_s=line.bytes_per_s,
                source=line.source,
                estimated=line.estimated,
                relative_uncertainty=line.relative_uncertainty,
                fraction=line.fraction,
            )
        )

    def _engine_id(self, name: str) -> EngineId:
        if name not in self._engines:
            self._engines[name] = EngineId(GROUP, len(self._engines))
        return self._engines[name]

    def _engine(self, line: form.EngineLine) -> None:
        if line.devices is not None:
            self._engine_devices[line.id] = tuple(line.devices)
            self._by_devices.setdefault(tuple(sorted(line.devices)), line.id)
        state = line.state if line.state in _STATES else "ready"
        self._ledger.engine(
            self._engine_id(line.id),
            self._now(line.t) if line.t is not None else (self._now_ns or 0),
            state,
            model=line.model,
            devices=line.devices,
            world=line.world,
            parameters=line.parameters,
            active_parameters=line.active_parameters,
            kv_bytes_per_token=line.kv_bytes_per_token,
            layers=line.layers,
            hidden=line.hidden,
            experts=line.experts,
            experts_per_token=line.experts_per_token,
            service=line.service,
        )

    def _implied(self, engine: str | None, devices: list[str] | None) -> EngineId:
        """The engine of a line: named, else the one declared for its devices, else one per set of devices."""
        if engine is not None:
            return self._engine_id(engine)
        if devices is None and len(self._engine_devices) == 1:
            return self._engine_id(next(iter(self._engine_devices)))
        at = tuple(sorted(devices or ()))
        name = self._by_devices.setdefault(at, "devices:" + ",".join(at))
        return self._engine_id(name)

    def _sample(self, line: form.SampleLine) -> None:
        t_ns = self._now(line.t)
        if line.device not in self._known:
            self._device(form.DeviceLine(line.device))
        if line.joules is not None:
            self._ledger.counter(line.device, t_ns, line.joules)
        elif line.watts is not None:
            self._ledger.gauge(line.device, t_ns, line.watts)
        else:
            raise ValueError("a sample needs joules or watts")

    def _open(self, line: form.OpenLine) -> None:
        self._ledger.open(
            Key(GROUP, line.id),
            self._now(line.t),
            engine=None if line.engine == form.NO_ENGINE else self._implied(line.engine, line.devices),
            devices=line.devices,
            model=line.model,
            prompt_tokens=line.prompt_tokens,
            cached_tokens=line.cached_tokens,
            parent=None if line.parent is None else Key(GROUP, line.parent),
            thread=line.thread,
            late=None if line.beside is None else Late(tuple(ns(start) for start in line.beside), line.elsewhere),
            reason="phase_elsewhere" if line.reason == "phase_elsewhere" else None,
        )

    def _step(self, line: form.StepLine) -> None:
        t0_ns, t1_ns = ns(line.t0), self._now(line.t1)
        if self._method is None:
            self._ledger.whole(
                self._implied(line.engine, line.devices), t0_ns, t1_ns, line.devices, line.work, line.lane
            )
        else:
            self._as_counters(line.work, t1_ns)

    def _as_counters(self, work: Mapping[str, tuple[int, int, int]], t1_ns: int) -> None:
        # A weaker method than steps: what a token counter would have shown at the end of each step.
        for name, (prefill, decode, _) in work.items():
            before = self._made.get(name, 0)
            made = before + (decode or (1 if prefill and not before else 0))
            self._made[name] = made
            if self._method == "slice":
                first = self._first.setdefault(name, t1_ns) if made else None
                self._ledger.progress(Key(GROUP, name), t1_ns, made, first_token_ns=first)
            elif made and self._method == "phase" and name not in self._first:
                self._first[name] = t1_ns
                self._ledger.progress(Key(GROUP, name), t1_ns, 1, first_token_ns=t1_ns)

    def _tokens(self, line: form.TokensLine) -> None:
        t_ns = self._now(line.t)
        if self._method in ("phase", "window", "equal"):
            if line.first_token_t is not None and self._method == "phase" and line.id not in self._first:
                first_ns = self._first[line.id] = ns(line.first_token_t)
                self._ledger.progress(Key(GROUP, line.id), t_ns, 1, first_token_ns=first_ns)
            return
        self._ledger.progress(
            Key(GROUP, line.id),
            t_ns,
            line.output_tokens or 0,
            first_token_ns=None if line.first_token_t is None else ns(line.first_token_t),
            prompt_tokens=line.prompt_tokens,
            cached_tokens=line.cached_tokens,
        )

    def _close(self, line: form.CloseLine) -> None:
        first = None if line.first_token_t is None else ns(line.first_token_t)
        if self._method == "phase":
            first = first or self._first.get(line.id)
        elif self._method in ("window", "equal"):
            first = None
        outcome = line.outcome if line.outcome in _OUTCOMES else "stop"
        self._ledger.close(
            Key(GROUP, line.id),
            self._now(line.t),
            line.output_tokens,
            outcome,
            first_token_ns=first,
            prompt_tokens=line.prompt_tokens,
            cached_tokens=line.cached_tokens,
        )


def share_line(share: Share) -> dict[str, Any]:
    """The shares file's form of a share; times in seconds."""
    return {
        "kind": "share",
        "id": share.key.request,
        "device": share.device,
        "joules": share.joules,
        "dynamic": share.dynamic,
        "static": share.static,
        "prefill": share.prefill,
        "decode": share.decode,
        "uncertainty": share.uncertainty,
        "method": share.method,
        "quality": share.quality,
        "coverage": share.coverage,
        "t_final": seconds(share.final_ns),
    }


def replay(
    source: Iterable[str | bytes],
    policy: StaticPolicy = "busy_shared",
    method: Tier | None = None,
    report: Report | None = None,
) -> Iterator[dict[str, Any]]:
    """Shares and books of a trace, as dicts; see :class:`Replay`. ``report`` is filled while it runs."""
    run = Replay(policy, method)
    if report is not None:
        run.report = report
    return run.run(source)
