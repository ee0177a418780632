"""What a device's intervals teach: costs of steps, the meter's delay, and when somebody unknown takes part."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from melodi_otel.attribution.fit import Fit
from melodi_otel.attribution.lag import Lag, Row
from melodi_otel.attribution.lanes import Did
from melodi_otel.attribution.meter import EngineId
from melodi_otel.attribution.state import Learnt
from melodi_otel.attribution.uncertainty import PROMPT, PROMPT_OF_MIXTURE
from melodi_otel.attribution.weights import Features, Theta

UNFIT: Final = 0.025
"""Lasting misfit above which the costs do not describe what runs (unknown experts, contention): figures are called estimated."""
LEAST: Final = 0.003
"""Relative 1 sigma of what fitted weights divide, at least."""
_NOISE: Final = 0.03
_PLACED: Final = 0.16
"""Single intervals scatter by :data:`_NOISE` about what is predicted, for steps differ. Where they scatter more, work is not at
the times that the engine tells (a host that prepares steps while the device waits), and costs are learnt less well: they are off
by this part of it.
"""
_WIDER: Final = 1.3
"""What a request's share is off, in lasting misfits: the sum of all shares is right by construction, their ratios are not."""
_UNKNOWN_EXPERTS: Final = 0.07
"""The same for a mixture of experts of which it is not known how many there are."""
_MIXTURE: Final = 0.012
"""The same for a mixture whose experts are known: tokens do not choose them independently of each other."""
_SEVERAL: Final = 0.015
"""The same where several engines run: what one takes is what the others leave."""
_WANDERING: Final = 0.012
"""The same where the gain wanders: what is learnt of one minute fits the next less well."""
_BLURRED: Final = 0.014
"""The same where one reading averages over several intervals: who was there in which of them is told less apart."""
_CONTENDED: Final = 0.10
"""An engine by itself that takes so much more or less than the costs say, which were learnt beside others, does not add up with
them: each slows the other down, or lets it use less.
"""
_SURE: Final = 0.3
"""How far off its intervals have to be, times the root of their number, for that to be no chance."""
_UNSURE: Final = 0.10
"""The same while few rows have been seen; it falls with their number."""
_LIMIT: Final = 0.08
"""Measured joules this part, or four misfits, above nearly all that such work has taken are somebody else's."""
_USUAL: Final = 50
"""Intervals that say how much such work takes."""
_CONVERGED: Final = 60
"""Rows after which a fit may say so."""
_TRUSTED_MISFIT: Final = 0.10
_ACCEPT_S: Final = 180.0
"""Who takes part for so long is no episode any more: the costs are learnt anew with it."""


@dataclass(slots=True)
class Judgement:
    """Of one interval: J of somebody unknown, the relative error of its weights (None: they are not fitted), whether the costs
    describe badly what runs, the relative error of what prompts cost against decoded tokens, whether somebody is a mixture of
    experts, and how far engines are from adding up.
    """

    foreign: float = 0.0
    error: float | None = None
    unfit: bool = False
    prompt: float = 0.0
    mixture: bool = False
    contended: float = 0.0


class Learner:
    """State of one device whose readings average over ``window_s``."""

    def __init__(self, window_s: float = 0.0) -> None:
        self._window_s = window_s
        self.fit = Fit()
        self.lag = Lag()
        self._ratios: deque[float] = deque(maxlen=301)
        self._usual = self._most = 1.0
        self._strange = 0
        self._based = True
        self._since_usual = 0
        self._strange_s = 0.0
        self._unfit = False
        self._lasting = Lasting()
        self._alone: dict[EngineId, tuple[int, float]] = {}

    def theta(self, engine: EngineId, roofline: Theta) -> Theta:
        """Weights of a step of ``engine``."""
        return self.fit.theta(engine) or roofline

    def state(self) -> Learnt | None:
        """What another process can go on from."""
        found = self.fit.state()
        if found is None and not self.lag.known:
            return None
        engines, gram, moment = found or ((), (), ())
        return Learnt(engines, gram, moment, self.fit.rows, self.lag.ns, self.lag.known)

    def resume(self, learnt: Learnt) -> None:
        """Go on from what another process has learnt; where this one has learnt something itself, that stays."""
        if not self.fit.rows:
            self.fit.resume(learnt.engines, learnt.gram, learnt.moment, learnt.rows)
        if not self.lag.known:
            self.lag.ns, self.lag.known = learnt.lag_ns, learnt.lag_known

    @property
    def rough(self) -> float | None:
        """Relative 1 sigma of one interval about what is predicted for it; None: not known."""
        return self.fit.misfit if self.fit.holds else None

    def based_on(self, idle_known: bool) -> None:
        """Whether joules are those above idle; costs that were learnt of others hold no more."""
        if idle_known is not self._based:
            self._based = idle_known
            self._start_over()
            self.lag.skip()

    def judge(
        self,
        work: Mapping[EngineId, Sequence[float]],
        dynamic: float,
        seconds: float,
        busy: float,
        *,
        mixture: bool = False,
        experts_unknown: bool = False,
    ) -> Judgement:
        """What the costs so far make of an interval with ``dynamic`` joules above idle."""
        fit = self.fit
        expected = fit.predicted(work) if work else None
        if expected is None or expected <= 0.0:
            return Judgement()
        misfit = fit.misfit
        lasting = self._lasting.value
        error = max(LEAST, _WIDER * lasting if lasting is not None else _UNSURE / 4.0)
        error = max(
            error,
            _BLURRED * (self._lasting.blur > 1),
            _WANDERING * fit.wanders,
            _MIXTURE * mixture,
            _SEVERAL * (len(work) > 1),
            _UNKNOWN_EXPERTS * experts_unknown,
        )
        error += _PLACED * max(0.0, self._lasting.short - _NOISE)
        found = Judgement(error=error + _UNSURE / (1.0 + fit.rows / 8.0))
        found.prompt = PROMPT_OF_MIXTURE if mixture or experts_unknown else PROMPT
        contended = self._contended(work, dynamic / expected, busy)
        if contended > _CONTENDED:
            found.unfit = True
            found.contended = contended if len(work) > 1 else 0.0
        found.mixture = mixture or experts_unknown
        found.unfit |= experts_unknown
        if misfit is not None and fit.rows >= _CONVERGED:
            if lasting is not None:
                # A single border would flicker.
                self._unfit = lasting > (0.8 * UNFIT if self._unfit else UNFIT)
            found.unfit |= self._unfit
            if busy > 0.5 and misfit <= _TRUSTED_MISFIT:
                found.foreign = self._excess(dynamic, expected, seconds, misfit)
        self._lasting.wanders = fit.wanders
        self._lasting.blur = min(60, round(self._window_s / seconds)) if seconds > 0.0 else 0
        self._lasting.add(dynamic / expected - 1.0 if busy > 0.5 and not self._strange else None)
        return found

    def _contended(self, work: Mapping[EngineId, Sequence[float]], ratio: float, busy: float) -> float:
        """How far an engine by itself is off what it costs beside others, 0 or more; ``ratio``: measured over predicted J."""
        if len(work) == 1 and busy > 0.9 and len(self.fit.engines) > 1 and self.fit.rows >= _CONVERGED:
            (engine,) = work
            number, mean = self._alone.get(engine, (0, 1.0))
            number += 1
            self._alone[engine] = (number, mean + (min(3.0, ratio) - mean) / min(number, 50))
        off = [
            abs(mean - 1.0)
            for number, mean in self._alone.values()
            if abs(mean - 1.0) * math.sqrt(min(number, 50)) > _SURE
        ]
        return max(off, default=0.0)

    def _excess(self, dynamic: float, expected: float, seconds: float, misfit: float) -> float:
        """J that are more than this work has ever taken, where that lasts; 0.0: it is as usual."""
        ratio = dynamic / expected
        if len(self._ratios) >= _USUAL and ratio > self._most * (1.0 + max(_LIMIT, 4.0 * misfit)):
            self._strange_s += seconds
            self._strange += 1
            if self._strange_s < _ACCEPT_S:
                # One interval alone is a border that was placed badly.
                return dynamic - self._usual * expected if self._strange > 1 else 0.0
            self._start_over()
        self._strange = 0
        self._strange_s = max(0.0, self._strange_s - seconds)
        self._ratios.append(ratio)
        self._since_usual += 1
        if self._since_usual >= 10:
            self._since_usual = 0
            ratios = sorted(self._ratios)
            self._usual, self._most = ratios[len(ratios) // 2], ratios[int(0.95 * len(ratios))]
        return 0.0

    def learn(
        self,
        t0_ns: int,
        t1_ns: int,
        work: Mapping[EngineId, Sequence[float]],
        steps: Iterable[Did],
        dynamic: float,
        busy: float,
        roofline: Callable[[EngineId], Theta],
        *,
        trusted: bool,
        odd: bool = False,
    ) -> None:
        """An interval has closed: ``steps`` ended in it, ``work`` is what was done in it, of all of which something is known
        (``trusted``); ``odd``: a step ran in it that was none of the usual ones; ``roofline`` gives weights without a fit.
        """
        fit = self.fit
        time, place = fit.step, self.lag.step
        for engine, since_ns, until_ns, number, x in steps:
            time(engine, x, (until_ns - since_ns) / 1e9 / number, number)
            place(since_ns, until_ns, engine, x if number == 1 else Features(*[number * value for value in x]))
        if work:
            fit.add(work, dynamic, (t1_ns - t0_ns) / 1e9, busy, trusted=trusted and not odd)
            if fit.due() and trusted:
                fit.solve(roofline)
        if not odd and self.lag.interval(t0_ns, t1_ns, dynamic):
            again = self.lag.look()
            if again is not None:
                self._learn_again(again, roofline)

    def _start_over(self) -> None:
        """What was learnt of costs does not hold any more, nor that of engines by themselves."""
        self._drop_costs()
        self._alone.clear()

    def _drop_costs(self) -> None:
        self.fit.start_over()
        self._ratios.clear()

    def _learn_again(self, rows: Iterable[Row], roofline: Callable[[EngineId], Theta]) -> None:
        """The delay was another one: what was learnt with it does not hold, and ``rows`` say what was done when."""
        self._drop_costs()
        scatter = self._lasting.short
        self._lasting = Lasting()
        self._lasting.short = scatter
        for row in rows:
            if row.work:
                self.fit.add(row.work, row.joules, row.seconds, row.busy)
                if self.fit.due():
                    self.fit.solve(roofline)
        if self.fit.rows:
            self.fit.solve(roofline)


_DRIFT: Final = 100
_WANDER: Final = 16
"""Intervals over which a mean is a gain that all shares have alike: usually, and where it wanders."""


class Lasting:
    """The part of the misfit that lasts from one interval to the next ones.

    Borders that are placed badly and the noise of single steps are gone in the next interval; what a linear cost cannot
    describe stays as long as the batch does. So it is what residuals a few intervals apart have in common (their
    autocovariance), after what changes over many seconds (the drift of a gain, which all shares have alike) is taken off.

    Attributes:
        blur: intervals that one reading averages over; what lasts no longer than that is the meter's.
        wanders: whether the gain is known to wander.
        value: relative 1 sigma, with the part that the number of intervals cannot rule out; None: not known yet.
        short: relative 1 sigma of single intervals, slow changes taken off; 0.0: not known yet.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self.short = 0.0
        self._residuals: deque[float] = deque(maxlen=1500)
        self._new = 0
        self.wanders = False
        self.blur = 0

    def add(self, residual: float | None) -> None:
        """Measured over predicted joules of an interval, minus 1; None: it was hardly used."""
        self._residuals.append(math.nan if residual is None else max(-0.3, min(0.3, residual)))
        self._new += 1
        if self._new >= 40:
            self._new = 0
            self._look()

    def _look(self) -> None:
        import numpy as np

        values = np.array(self._residuals)
        known = ~np.isnan(values)
        filled = np.where(known, values, 0.0)
        window = np.ones(min(_DRIFT if not self.wanders else _WANDER, len(values)))
        near = np.convolve(known, window, "same")
        rest = np.where(known, filled - np.convolve(filled, window, "same") / np.maximum(near, 1.0), 0.0)
        together, pairs = 0.0, 0
        for apart in range(2 + self.blur, 6 + self.blur):
            both = known[apart:] & known[:-apart]
            together += float(rest[apart:][both] @ rest[:-apart][both])
            pairs += int(both.sum())
        number = int(known.sum())
        if number < 30 or pairs < 100:
            return
        self.short = math.sqrt(float(rest @ rest) / number)
        noise = float(rest @ rest) / number / math.sqrt(4.0 * pairs)
        self.value = math.sqrt(max(0.0, together / pairs) + noise)
