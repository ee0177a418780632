"""Closing one interval of one device: gather its cells, divide its joules, book every one of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from melodi_otel.attribution.account import TAIL_NS, Account, Holder
from melodi_otel.attribution.activity import ASSUMED_PREFILL_TOKENS_PER_S, Accrual, Activity
from melodi_otel.attribution.books import Bucket, Phase, Who
from melodi_otel.attribution.engines import EngineState
from melodi_otel.attribution.evidence import WHOLE
from melodi_otel.attribution.lanes import Change, Step, WorkRow
from melodi_otel.attribution.late import Left, Unseen
from melodi_otel.attribution.learning import Judgement
from melodi_otel.attribution.meter import EngineId, Late, Tier
from melodi_otel.attribution.policy import StaticPolicy, shared_static
from melodi_otel.attribution.riding import Mode
from melodi_otel.attribution.roster import Roster
from melodi_otel.attribution.settle import Cell, Given, Pack, Pool, Row, divide, unworked_part
from melodi_otel.attribution.slices import slice_cells
from melodi_otel.attribution.uncertainty import FEW_SLICES, FITTED, PROMPT_OF_SLICE, STRUCTURE
from melodi_otel.attribution.weights import CostModel, EngineFacts, Features, Theta
from melodi_otel.timeline.timeline import Interval

DENSEST: Final = 20.0
"""Work that fills a part of an interval claims at most this many times that part of its dynamic joules."""
ASSUMING: tuple[Tier, ...] = ("phase", "window", "equal")
"""Tiers whose figures are interpolated rather than measured."""
_PHASES: Final[tuple[Phase, ...]] = ("prefill", "decode", "unsplit", "static")
_CACHE: Final = Features._fields.index("cache")


class IntervalCloser:
    """Closes intervals.

    Args:
        roster: who is there.
        model: where weights come from.
        policy: who pays idle power while requests run.
        best: use no better evidence than this tier.
        learn: fit the costs of steps; else ``model`` prices them for good.
    """

    def __init__(
        self, roster: Roster, model: CostModel, policy: StaticPolicy, best: Tier | None, *, learn: bool = True
    ) -> None:
        self._roster = roster
        self._model = model
        self._policy: StaticPolicy = policy
        self._best: Tier | None = best
        self._learn = learn
        self.unseen = Unseen()

    def close(self, account: Account, interval: Interval, engines: list[EngineState]) -> None:
        """Divide ``interval`` of the device; afterwards every measured joule of it is booked."""
        if interval.gap:
            account.missed(interval)
            return
        if interval.joules is None:
            account.lost.append(interval)
            return
        if account.stuck(interval):
            account.lost.append(interval)
            return
        t0, t1, joules = interval.t0_ns, interval.t1_ns, interval.joules
        account.measured += joules
        if account.device.type == "host":
            # A meter of the whole machine contains the other devices: it is told as it is and divided among nobody.
            account.residual += joules
            return
        if account.device.fraction < 1.0:
            # Only a slice of the board is ours and only the board has a meter: its other slices' part is somebody else's.
            others = joules * (1.0 - account.device.fraction)
            account.book("foreign", others, None)
            joules -= others
        work: dict[EngineId, list[float]] = {}
        cells, known = self._cells(account, interval, engines, work)
        idle_part = unworked_part(t0, t1, cells)
        based = account.baseline.watts is not None
        if account.baseline.watts is None:
            # What is idle and what is work cannot be told apart yet: the border of the work is cut by time alone.
            static = 0.0
            unworked = joules * idle_part
        else:
            static = min(account.baseline.watts * (t1 - t0) / 1e9, joules)
            # A request that begins a millisecond before the end of a long interval did not cause what happened in it.
            unworked = (joules - static) * max(0.0, 1.0 - DENSEST * (1.0 - idle_part))
        dynamic = joules - static - unworked
        # A fit needs all that was done in the interval. Where idle power is not known its part is in what a step costs.
        judged = Judgement()
        busy = 1.0 - idle_part if cells else 0.0
        fits = self._learn and known and not account.cpu.series
        if fits:
            account.learner.based_on(based)
            judged = account.learner.judge(
                work,
                dynamic,
                (t1 - t0) / 1e9,
                busy,
                mixture=any(self._roster.engine(engine).facts.routed for engine in work),
                experts_unknown=any(self._roster.engine(engine).facts.experts_unknown for engine in work),
            )
        foreign, pools = self._pools(account, interval, cells, dynamic - judged.foreign)
        foreign += judged.foreign
        series = account.cpu.series if account.device.type != "gpu" else {}
        if series:
            for cell in cells:
                # Of a program whose process cannot be seen no CPU time is known: its part of the rest is that of its requests.
                if _pool_of(cell, series) in series:
                    cell.tier = "process"
        elif foreign > 0.0:
            for cell in cells:
                cell.alone = False
        quality = "estimated" if account.device.estimated or judged.unfit else "measured"
        for cell in cells:
            if cell.pack is not None:
                cell.pack.clock.become(Mode(cell.tier, quality, based))
                cell.pack.clock.error = _error(cell.tier, judged)
        shared = shared_static(self._policy, static)
        division = divide(t0, t1, shared, pools)
        idle_static = division.idle_static + (static - shared)
        unclaimed = division.unclaimed + unworked
        loading = max((engine.loading_part(t0, t1) for engine in engines), default=0.0)
        holder = self._holder(engines)
        account.book("foreign", foreign, None)
        account.book("loading", loading * (idle_static + unclaimed), holder)
        account.book("idle", (1.0 - loading) * idle_static, holder)
        recent = account.last_work_ns is not None and 0 <= t0 - account.last_work_ns < TAIL_NS
        bucket: Bucket = "tail" if recent else "idle"
        account.book(bucket, (1.0 - loading) * unclaimed, holder)
        account.leavings.keep(
            Left(
                t0,
                t1,
                free=(idle_part if cells else 1.0) * (1.0 - loading),
                static=(1.0 - loading) * division.idle_static,
                dynamic=(1.0 - loading) * unclaimed,
                foreign=foreign,
                bucket=bucket,
                holder=holder,
                based=based,
            )
        )
        _accrue(account, division.given, t1 - t0, based, foreign > 0.0, judged)
        for clock, (of_joules, prompts) in division.clocks.items():
            clock.close(of_joules, t1 - t0, foreign > 0.0, judged.unfit, prompts * judged.prompt)
        if fits:
            self._teach(account, interval, work, dynamic, busy, foreign == 0.0)
        if cells:
            account.shared(shared - division.idle_static, dynamic - foreign, (t1 - t0) / 1e9)
            account.worked(max([cell.t1_ns for cell in cells]))
        elif not self.unseen.any_in(t0, t1):
            account.learn(interval, loading > 0.0, foreign if account.device.type == "gpu" else 0.0)
        account.cpu.forget_before(t0)
        if account.lost:
            account.forget_before(min((a.open_ns for a in self._roster.activities.values()), default=t0))

    def _teach(
        self,
        account: Account,
        interval: Interval,
        work: dict[EngineId, list[float]],
        dynamic: float,
        busy: float,
        trusted: bool,
    ) -> None:
        t0, t1 = interval.t0_ns, interval.t1_ns
        ended = [did for step in account.steps if (did := step.ended(t0, t1)) is not None]
        odd = any(
            account.learner.fit.odd(step.engine, step.x, (step.t1_ns - step.t0_ns) / len(step.ends) / 1e9)
            for step in account.steps
            if step.t0_ns < t1
        )
        account.learner.learn(
            t0,
            t1,
            work,
            ended,
            dynamic,
            busy,
            lambda engine: self._roster.engine(engine).priced(self._model, [account.device]),
            trusted=trusted,
            odd=odd,
        )

    def take_late(self, account: Account, activity: Activity, late: Late) -> None:
        """Let work that was reported when it was over take its part of what closed intervals left to nobody."""
        end_ns = activity.close_ns or activity.open_ns
        covered = 0.0
        for taken in account.leavings.take(activity.open_ns, end_ns, late):
            left, dynamic = taken.left, taken.dynamic + taken.foreign
            account.book("idle", -taken.static, left.holder)
            account.book(left.bucket, -taken.dynamic, left.holder)
            account.book("foreign", -taken.foreign, None)
            given = Given(activity, "equal", unsplit=dynamic, static=taken.static, busy_ns=taken.length_ns)
            given.shared = dynamic * (1.0 - 1.0 / taken.company)
            given.company_ns = taken.company * taken.length_ns
            _accrue(account, [given], left.t1_ns - left.t0_ns, left.based, taken.foreign > 0.0, Judgement())
            covered += taken.covered_ns
        activity.late_covered_ns[account.device.id] = covered

    def _cells(
        self, account: Account, interval: Interval, engines: list[EngineState], work: dict[EngineId, list[float]]
    ) -> tuple[list[Cell], bool]:
        """What ran, and whether all of it is known by steps or token counts; ``work`` gets its features."""
        t0, t1 = interval.t0_ns, interval.t1_ns
        cells = self._step_cells(account, interval, work)
        known = True
        groups: dict[EngineId | None, list[tuple[Activity, list[tuple[int, int]]]]] = {}
        name = account.device.id
        candidates: list[tuple[EngineState | None, Collection[Activity]]] = [(None, self._roster.blocks.values())]
        for engine in engines:
            # Who stands in steps is seen there, unless a step that is running could not be waited for.
            seen = engine.evidence == "steps" and not any(lane.running(t1) for lane in engine.lanes.values())
            candidates.append((engine, (engine.unstepped if seen else engine.open).values()))
        for engine, activities in candidates:
            for activity in activities:
                if (
                    activity.open_ns >= t1
                    or (activity.close_ns is not None and activity.close_ns <= t0)
                    or activity.anonymous
                    or activity.late is not None
                    or (engine is None) is not (activity.engine is None)
                    or name not in (activity.step_devices or activity.devices)
                ):
                    continue
                if engine is None or engine.evidence != "steps":
                    segments = activity.segments(t0, t1)
                else:
                    segments = _beside_steps(engine, activity, t0, t1)
                if segments:
                    groups.setdefault(activity.engine, []).append((activity, segments))
        for engine_id, members in groups.items():
            engine = self._roster.engines[engine_id] if engine_id is not None else None
            theta = self._theta(account, engine_id) if engine_id is not None else self._model.theta(EngineFacts())
            speed = engine.speed.tokens_per_s if engine else ASSUMED_PREFILL_TOKENS_PER_S
            did = [0.0] * len(Features._fields)
            found = slice_cells(account.device.id, members, theta, speed, self._best, did)
            cells += found
            if engine_id is None or any(cell.tier != "slice" for cell in found):
                known = False
            elif engine_id in work:
                work[engine_id] = [a + b for a, b in zip(work[engine_id], did, strict=True)]
            else:
                work[engine_id] = did
        return cells, known

    def _step_cells(self, account: Account, interval: Interval, did: dict[EngineId, list[float]]) -> list[Cell]:
        t0, t1 = interval.t0_ns, interval.t1_ns
        cells: list[Cell] = []
        unsaid: dict[int, list[Change]] = {}
        thetas: dict[EngineId, Theta] = {}
        for step in account.steps_in(interval):
            part, places = step.part(t0, t1)
            at = id(step.lane)
            if part <= 0.0 or not step.participants:
                unsaid.setdefault(at, []).extend(step.changes)
                continue
            theta = thetas.get(step.engine)
            if theta is None:
                theta = thetas[step.engine] = self._theta(account, step.engine)
            # A settled share is never revised: what is left of its step when it could not be waited for is nobody's.
            rows = [row for row in step.rows if not row.activity.settled]
            changes = [*unsaid.pop(at), *step.changes] if at in unsaid else step.changes
            if not rows and not step.members:
                unsaid[at] = list(changes)
                continue
            held = did.get(step.engine)
            if held is None:
                did[step.engine] = [part * value for value in step.x]
            else:
                for k, value in enumerate(step.x):
                    held[k] += part * value
            if places:
                did[step.engine][_CACHE] += places * step.members
            cells.append(
                _cell(
                    account, step, theta, rows, changes, max(t0, step.t0_ns), min(t1, step.t1_ns), part, places / part
                )
            )
        return cells

    def _theta(self, account: Account, engine: EngineId) -> Theta:
        roofline = self._roster.engine(engine).priced(self._model, [account.device])
        return account.learner.theta(engine, roofline) if self._learn else roofline

    def _pools(
        self, account: Account, interval: Interval, cells: list[Cell], dynamic: float
    ) -> tuple[float, list[Pool]]:
        """(joules of other processes, the pools of the rest)."""
        t0, t1 = interval.t0_ns, interval.t1_ns
        shares = account.cpu.shares(t0, t1) if account.cpu.series else None
        if shares is None:
            foreign = dynamic * account.foreign.share(t0, t1) if account.foreign else 0.0
            return foreign, [Pool(dynamic - foreign, cells)]
        pools: list[Pool] = []
        used = 0.0
        for engine, share in shares.items():
            mine = [cell for cell in cells if _pool_of(cell, shares) == engine]
            pools.append(Pool(dynamic * share, mine))
            used += dynamic * share
        if None not in shares:
            left = [cell for cell in cells if _pool_of(cell, shares) is None]
            if left:
                # Work of a tree whose CPU time nobody reads: it is somewhere in the rest, which is then not foreign.
                pools.append(Pool(dynamic - used, left))
                used = dynamic
        return dynamic - used, pools

    def _holder(self, engines: list[EngineState]) -> Holder | None:
        held = [engine for engine in engines if not engine.gone and engine.model]
        if len(held) != 1:
            return None
        return held[0].service or "", held[0].model or ""


def _cell(
    account: Account,
    step: Step,
    theta: Theta,
    rows: Sequence[WorkRow],
    changes: Sequence[Change],
    t0_ns: int,
    t1_ns: int,
    part: float,
    place: float,
) -> Cell:
    """A step or a run, or the part of it in an interval, priced: the fixed cost is split equally among its participants.

    ``place``: that of the mean step of the run, from 0.
    """
    participants = step.members + sum([row.participants for row in rows])
    fixed = (theta.fixed_prefill if step.x.fixed_prefill else theta.fixed) / participants
    coverage = step.x.coverage
    priced: list[Row] = []
    for work in rows:
        row = Row(work.activity, work.participants)
        own = theta.prefill * work.prefill + theta.cache * work.cache + theta.attention * work.attention
        own += fixed * work.participants + theta.coverage * work.touched
        coverage -= work.touched
        if work.in_prefill:
            row.prefill, row.decode = own, theta.decode * work.decode
        else:
            row.decode = own + theta.decode * work.decode
        priced.append(row)
    each = fixed + theta.decode
    if step.members:
        each += theta.coverage * max(0.0, coverage) / step.members
    clock = account.clock(step.lane)
    pack = Pack(
        clock, step.number, changes, step.members, step.heads, step.only, each, theta.cache,
        step.tick + place, step.contexts + place * step.members,
    )  # fmt: skip
    return Cell(t0_ns, t1_ns, "step", priced, part, pack, step.engine)


def _beside_steps(engine: EngineState, activity: Activity, t0: int, t1: int) -> list[tuple[int, int]]:
    """The parts of [t0, t1] in which a request is seen as a slice although its engine reports steps."""
    if activity.own_lane and activity.last_step_ns is None:
        return activity.segments(t0, t1)
    # A request without a step here was not scheduled, unless its step is still running: the interval was then waited for in
    # vain, and what lies behind the lane's newest step is seen as a slice. So is who has tokens of which no step tells.
    if activity.close_ns is not None:
        return activity.segments(t0, t1) if activity.last_step_ns is None and activity.output_tokens else []
    lane = engine.lane_of(activity)
    if lane is not None and lane.t1_ns < t1:
        return activity.segments(max(t0, lane.t1_ns), t1)
    if lane is None and activity.last_step_ns is None:
        newest = max((other.t1_ns for other in engine.lanes.values()), default=0)
        if newest < t1:
            return activity.segments(max(t0, newest), t1)
    return []


def _error(tier: Tier, judged: Judgement) -> float:
    """Relative 1 sigma of what weights of this tier divide."""
    if judged.error is None or tier not in FITTED or (judged.mixture and tier == "slice"):
        return STRUCTURE[tier]
    return max(judged.contended, min(STRUCTURE[tier], max(judged.error, FITTED[tier])))


def _accrue(
    account: Account, all_given: Sequence[Given], length_ns: int, based: bool, foreign: bool, judged: Judgement
) -> None:
    """Add what an interval gave to what each has accrued on the device, and to the device's books."""
    name, estimated = account.device.id, account.device.estimated
    # The books are told once per identity, not once per request: there are few of them.
    sums: dict[tuple[int, str], list[float]] = {}
    whos: dict[int, Who] = {}
    for given in all_given:
        activity, tier = given.activity, given.tier
        accrual = activity.accruals.get(name)
        if accrual is None:
            accrual = activity.accruals[name] = Accrual()
        prefill, decode, unsplit, static = given.prefill, given.decode, given.unsplit, given.static
        accrual.prefill += prefill
        accrual.decode += decode
        accrual.unsplit += unsplit
        accrual.static += static
        accrual.busy_ns += given.busy_ns
        accrual.company_ns += round(given.company_ns)
        accrual.intervals += 1
        accrual.interval_ns += length_ns
        if not based:
            accrual.unbased = True
        if foreign:
            accrual.foreign = True
        accrual.tiers[tier] = accrual.tiers.get(tier, 0.0) + (prefill + decode + unsplit) + static
        accrual.shared[tier] = accrual.shared.get(tier, 0.0) + given.shared
        error = _error(tier, judged)
        if tier == "slice" and given.busy_ns:
            error *= 1.0 + FEW_SLICES / max(1.0, given.company_ns / given.busy_ns - 1.0)
        accrual.spread += error * given.shared
        accrual.tilt += (max(judged.prompt, PROMPT_OF_SLICE) if tier == "slice" else judged.prompt) * given.tilt
        unfit = judged.unfit and tier != "exclusive"
        if unfit:
            accrual.unfit += prefill + decode + unsplit + static
        quality = "estimated" if estimated or unfit else "interpolated" if tier in ASSUMING else "measured"
        # Without idle power the phases cannot be told from it, neither on spans (see finishing) nor in metrics.
        if not based:
            prefill, decode, unsplit, static = 0.0, 0.0, prefill + decode + unsplit + static, 0.0
        who, booked = activity.who, accrual.booked
        if prefill != 0.0:
            at = (who, "prefill", quality)
            booked[at] = booked.get(at, 0.0) + prefill
        if decode != 0.0:
            at = (who, "decode", quality)
            booked[at] = booked.get(at, 0.0) + decode
        if unsplit != 0.0:
            at = (who, "unsplit", quality)
            booked[at] = booked.get(at, 0.0) + unsplit
        if static != 0.0:
            at = (who, "static", quality)
            booked[at] = booked.get(at, 0.0) + static
        both = (id(who), quality)
        held = sums.get(both)
        if held is None:
            whos[id(who)] = who
            sums[both] = [prefill, decode, unsplit, static]
        else:
            held[0] += prefill
            held[1] += decode
            held[2] += unsplit
            held[3] += static
    for (who_id, quality), held in sums.items():
        for phase, joules in zip(_PHASES, held, strict=True):
            account.attribute((whos[who_id], phase, quality), joules)


def _pool_of(cell: Cell, known: Collection[EngineId | None]) -> EngineId | None:
    """Whose CPU time a cell's work is in: its engine's, else its group's, else (None) the tree's or what is left."""
    activity = cell.rows[0].activity if cell.rows else None
    engine = cell.engine if activity is None else activity.engine
    if engine in known:
        return engine
    group = activity.key.group if activity is not None else engine.group if engine is not None else ""
    whole = EngineId(group, WHOLE)
    return whole if whole in known else None
