"""Costs of steps, fitted while they run: what a step of this engine takes on this device, from the meter's own readings.

Non-negative least squares over sensor intervals: ``dynamic joules = Σ theta x features``. Only sums of products are kept, with
exponential forgetting, so the fit follows drift and its size does not grow. Durations of steps give a prior that needs no meter
(a step that takes twice as long costs about twice as much), and until there are enough steps the roofline is the prior. Several
engines on one device are fitted together, each with coefficients of its own.

Source of form, weights and half-life: recursive ridge regression towards a prior with about 30 pseudo-observations; rows weighted
for relative errors. A fit decides shares only; the joules stay the measured ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from melodi_otel.attribution.meter import EngineId
from melodi_otel.attribution.weights import Features, Theta

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

WIDTH: Final = len(Features._fields)
HALF_LIFE_S: Final = 300.0
PSEUDO_ROWS: Final = 30.0
FADING_ROWS: Final = 200.0
"""The prior counts as :data:`PSEUDO_ROWS` rows in the beginning, and as half of them after so many."""
ENOUGH_ROWS: Final = 8
"""Rows after which the fit is used; before, its prior."""
ENOUGH_STEPS: Final = 30
"""Steps after which durations are a better prior than the roofline."""
ODD_S: Final = 0.5
ODD: Final = 4.0
"""A step longer than this and than so many times what such steps take is none to learn from."""
ROW_S: Final = 0.2
"""Intervals are merged to rows of this length at least: borders of steps weigh less in them."""
WANDER_ROWS: Final = 200
"""Half-life of what is known of how errors last."""
LASTS: Final = 0.8
"""Correlation of neighbouring rows' errors above which they are a wandering gain; below, they are what a linear cost cannot
describe, which is no worse fitted as it is.
"""
ALIKE_AT_MOST: Final = 0.98
"""So much of the row before is taken off at most: of two rows that are alike something has to be left."""
_ENGINES: Final = 8
"""Engines on one device that are fitted together."""
_OUTLIER: Final = 1.5
"""Measured over predicted joules from which on a row is no usual one."""
_RIDGE: Final = 1e-9
_BUSY: Final = 0.2
_RECENT: Final = 101


def nnls(gram: Array, moment: Array, near: Array | None = None) -> Array:
    """The non-negative x that minimises ``x'Gx/2 - h'x`` (active set method of Lawson and Hanson, 1974, on normal equations).

    Args:
        gram: G, symmetric and positive definite, n x n.
        moment: h, n.
        near: a solution of something similar: the search begins with what is above 0 in it, which is most often right.
    """
    import numpy as np

    n = len(moment)
    x = np.zeros(n)
    free = np.zeros(n, dtype=bool)
    if near is not None and len(near) == n and (near > 0.0).any():
        index = np.flatnonzero(near > 0.0)
        trial = np.linalg.solve(gram[np.ix_(index, index)], moment[index])
        if (trial > 0.0).all():
            free[index] = True
            x[index] = trial
    tolerance = 1e-10 * max(1e-300, float(np.abs(moment).max(initial=0.0)))
    for _ in range(3 * n):
        slope = moment - gram @ x
        slope[free] = -np.inf
        at = int(slope.argmax())
        if slope[at] <= tolerance:
            break
        free[at] = True
        while True:
            index = np.flatnonzero(free)
            trial = np.linalg.solve(gram[np.ix_(index, index)], moment[index])
            if (trial > 0.0).all():
                x[:] = 0.0
                x[index] = trial
                break
            low = trial <= 0.0
            steps = x[index][low] / (x[index][low] - trial[low])
            x[index] += float(steps.min()) * (trial - x[index])
            x[index[low][steps <= steps.min()]] = 0.0
            free &= x > 0.0
            if not free.any():
                break
    return x


class Durations:
    """How long steps of one engine take: a model of time, whose coefficients are a prior for those of energy."""

    def __init__(self) -> None:
        self.steps = 0
        self._new: list[Sequence[float]] = []
        self._seconds: list[float] = []
        self._numbers: list[int] = []
        self._gram: Array | None = None
        self._moment: Array | None = None
        self._last: Array | None = None
        self._theta: Array | None = None

    def add(self, x: Features, seconds: float, number: int = 1) -> None:
        """``number`` steps with these features took so long each."""
        if seconds > 0.0:
            self.steps += number
            if len(self._new) < 512:
                self._new.append(x)
                self._seconds.append(seconds)
                self._numbers.append(number)

    def odd(self, x: Features, seconds: float) -> bool:
        """Whether a step of this length is none of the usual ones: kernels are built in it, or something held it up."""
        if seconds <= ODD_S:
            return False
        return self._theta is None or seconds > ODD * float(self._theta @ x)

    def theta(self) -> Array | None:
        """Seconds per unit of each feature; None while too few steps were seen."""
        if self.steps < ENOUGH_STEPS:
            return None
        import numpy as np

        if self._new:
            # Relative errors: each row is divided by its duration.
            rows = np.array(self._new) / np.array(self._seconds)[:, None]
            numbers = np.array(self._numbers, dtype=np.float64)
            self._new.clear()
            self._seconds.clear()
            self._numbers.clear()
            keep = 0.5 ** (float(numbers.sum()) / 20_000)
            gram, moment = (rows * numbers[:, None]).T @ rows, numbers @ rows
            self._gram = gram if self._gram is None else keep * self._gram + gram
            self._moment = moment if self._moment is None else keep * self._moment + moment
        assert self._gram is not None
        assert self._moment is not None
        scale = np.sqrt(np.maximum(self._gram.diagonal(), 1e-300))
        gram = self._gram / np.outer(scale, scale) + _RIDGE * np.eye(WIDTH)
        self._last = nnls(gram, self._moment / scale, self._last)
        self._theta = self._last / scale
        return self._theta


class Wander:
    """Whether what is left unexplained lasts from one row to the next.

    Attributes:
        alike: correlation of neighbours, 0..1; 0 until it is known.
    """

    def __init__(self) -> None:
        self.alike = 0.0
        self._last = 0.0
        self._rows = 0
        self._squares = self._products = 0.0

    def add(self, ratio: float) -> None:
        """Measured over predicted joules of the newest row."""
        residual = max(-0.5, min(0.5, ratio - 1.0))
        self._rows += 1
        keep = 0.5 ** (1.0 / WANDER_ROWS)
        self._squares = keep * self._squares + residual * residual
        self._products = keep * self._products + residual * self._last
        self._last = residual
        if self._rows >= WANDER_ROWS // 4 and self._squares > 0.0:
            self.alike = max(0.0, min(ALIKE_AT_MOST, self._products / self._squares))


class Fit:
    """Costs on one device.

    Attributes:
        rows: rows that have been added.
        misfit: relative spread of measured about predicted joules, 1 sigma (robust), of coefficients from the past only;
            None: not known yet.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.misfit: float | None = None
        self._blocks: dict[EngineId, int] = {}
        self._durations: dict[EngineId, Durations] = {}
        self._gram: Array | None = None
        self._moment: Array | None = None
        self._row: dict[EngineId, list[float]] = {}
        self._row_s = self._row_busy_s = self._row_joules = 0.0
        self._sizes: deque[float] = deque(maxlen=_RECENT)
        self._errors: deque[float] = deque(maxlen=_RECENT)
        self._unsorted = 0
        self._floor = 0.0
        self._thetas: dict[EngineId, Theta] = {}
        self._last: Array | None = None
        self._before: tuple[Array, float] | None = None
        self._wander = Wander()
        self._since_s = 0.0

    @property
    def holds(self) -> bool:
        """Whether it predicts joules."""
        return self.rows >= ENOUGH_ROWS and bool(self._thetas)

    @property
    def engines(self) -> Collection[EngineId]:
        """Those that are fitted together."""
        return self._blocks.keys()

    @property
    def wanders(self) -> bool:
        """Whether what it leaves unexplained is most of all a gain that wanders."""
        return self._wander.alike > LASTS

    def theta(self, engine: EngineId) -> Theta | None:
        """What a step of ``engine`` costs; None: use weights without a fit."""
        return self._thetas.get(engine)

    def known(self) -> Iterable[EngineId]:
        """Engines that have been seen at work."""
        return self._blocks.keys() | self._durations.keys()

    def state(self) -> tuple[tuple[EngineId, ...], tuple[float, ...], tuple[float, ...]] | None:
        """(engines, sums of products, moments) for :meth:`resume`; None: there are none."""
        if self._gram is None or self._moment is None:
            return None
        return tuple(self._blocks), tuple(map(float, self._gram.ravel())), tuple(map(float, self._moment))

    def resume(self, engines: Sequence[EngineId], gram: Sequence[float], moment: Sequence[float], rows: int) -> None:
        """Go on from the sums of another process; sums of another form than this version's are left out."""
        import numpy as np

        size = WIDTH * len(engines)
        if not engines or len(moment) != size or len(gram) != size * size:
            return
        found, sums = np.array(gram).reshape(size, size), np.array(moment)
        if not np.isfinite(found).all() or not np.isfinite(sums).all():
            return
        self._gram, self._moment, self.rows = found, sums, rows
        self._blocks = {engine: WIDTH * at for at, engine in enumerate(engines)}
        self._since_s = math.inf  # solve with the next interval

    def step(self, engine: EngineId, x: Features, seconds: float, number: int = 1) -> None:
        """``number`` steps took so long each."""
        durations = self._durations.get(engine)
        if durations is None:
            durations = self._durations[engine] = Durations()
        durations.add(x, seconds, number)

    def odd(self, engine: EngineId, x: Features, seconds: float) -> bool:
        """See :meth:`Durations.odd`."""
        durations = self._durations.get(engine)
        return seconds > ODD_S and (durations is None or durations.odd(x, seconds))

    def predicted(self, work: Mapping[EngineId, Sequence[float]]) -> float | None:
        """Dynamic J of this work; None where coefficients are not known."""
        if not self.holds:
            return None
        joules = 0.0
        for engine, x in work.items():
            theta = self._thetas.get(engine)
            if theta is None:
                return None
            joules += price(theta, x)
        return joules

    def add(
        self,
        work: Mapping[EngineId, Sequence[float]],
        joules: float,
        seconds: float,
        busy: float,
        *,
        trusted: bool = True,
    ) -> None:
        """An interval: this work, ``joules`` above idle, and the part of it in which somebody worked.

        Not ``trusted``: something unknown took part; the row that it is in teaches nothing.
        """
        if not trusted:
            self._before = None
            self._begin_row()
            return
        expected = self.predicted(work)
        if expected is not None and busy > 0.5 and max(joules, expected) > 0.0:
            self._errors.append(abs(joules - expected) / max(joules, expected))
            self._unsorted += 1
            if len(self._errors) >= 20 and (self._unsorted >= 5 or self.misfit is None):
                self._unsorted = 0
                self.misfit = 1.4826 * sorted(self._errors)[len(self._errors) // 2]
        self._row_s += seconds
        self._row_busy_s += seconds * busy
        self._row_joules += joules
        for engine, x in work.items():
            held = self._row.get(engine)
            self._row[engine] = list(x) if held is None else [a + b for a, b in zip(held, x, strict=True)]
        self._since_s += seconds
        if self._row_s >= ROW_S - 1e-6:
            if self._row_busy_s > _BUSY * self._row_s:
                self._take()
            else:
                self._before = None
            self._begin_row()

    def due(self) -> bool:
        """Whether new rows are worth solving for: often in the beginning, at last every 4 s."""
        return self._since_s >= (4.0 if self.rows > FADING_ROWS else 2.0 if self.rows > 50 else 0.4)

    def solve(self, roofline: Callable[[EngineId], Theta]) -> None:
        """Renew the coefficients; ``roofline``: weights without a fit, in any unit."""
        import numpy as np

        self._since_s = 0.0
        priors: dict[EngineId, Array] = {}
        # Durations of all engines have one unit: what takes as long on a device costs about as much.
        alike = True
        for engine in self.known():
            known = self._durations[engine].theta() if engine in self._durations else None
            alike &= known is not None
            priors[engine] = np.array(roofline(engine)) if known is None else known
        if self._gram is None or self._moment is None:
            usable = alike or len(priors) == 1
            self._thetas = {engine: Theta(*map(float, prior)) for engine, prior in priors.items()} if usable else {}
            return
        size = len(self._moment)
        prior = np.zeros((size, len(self._blocks)))
        for at, (engine, start) in enumerate(self._blocks.items()):
            prior[start : start + WIDTH, at] = priors[engine]
        pull = PSEUDO_ROWS / max(1, self.rows) / (1.0 + self.rows / FADING_ROWS)
        guess = prior @ _units(prior.T @ self._gram @ prior, prior.T @ self._moment, 0.25 * pull if alike else 0.0)
        scale = np.sqrt(np.maximum(self._gram.diagonal(), 1e-300))
        seen = self._gram.diagonal() > 0.0
        gram = self._gram / np.outer(scale, scale) + (pull + _RIDGE) * np.eye(size)
        self._last = nnls(gram, self._moment / scale + pull * guess * scale, self._last)
        found = self._last / scale
        found = np.where(seen, found, guess)
        if not np.isfinite(found).all():
            self.start_over()  # figures that no engine has
            return
        self._thetas = {
            engine: Theta(*map(float, found[start : start + WIDTH])) for engine, start in self._blocks.items()
        }

    def start_over(self) -> None:
        """What it has learnt does not hold any more."""
        self.rows = 0
        self.misfit = None
        self._gram = self._moment = None
        self._blocks.clear()
        self._thetas.clear()
        self._errors.clear()
        self._sizes.clear()
        self._before = None
        self._wander = Wander()
        self._begin_row()

    def _take(self) -> None:
        import numpy as np

        if len(self._blocks.keys() | self._row.keys()) > _ENGINES:
            self.start_over()  # most of them are gone by now
            return
        for engine in self._row:
            if engine not in self._blocks:
                self._blocks[engine] = WIDTH * len(self._blocks)
        size = WIDTH * len(self._blocks)
        gram, moment = self._gram, self._moment
        if gram is None or moment is None:
            gram, moment = np.zeros((size, size)), np.zeros(size)
        elif len(moment) < size:
            more = size - len(moment)
            gram, moment = np.pad(gram, (0, more)), np.pad(moment, (0, more))
        x = np.zeros(size)
        for engine, values in self._row.items():
            start = self._blocks[engine]
            x[start : start + WIDTH] = values
        self._sizes.append(abs(self._row_joules))
        if self.rows < ENOUGH_ROWS or self.rows % 8 == 0:
            self._floor = 0.4 * sorted(self._sizes)[len(self._sizes) // 2]
        expected = self.predicted(self._row)
        # By what was predicted, whose noise is none of this row's; a row that is far above it counts less.
        size_of = abs(self._row_joules) if expected is None else max(expected, abs(self._row_joules) / _OUTLIER)
        weight = 1.0 / max(size_of, self._floor, 1e-9)
        keep = 0.5 ** (self._row_s / HALF_LIFE_S)
        x *= weight
        y = weight * self._row_joules
        row, joules = x, y
        before, alike = self._before, self._wander.alike
        if before is not None and alike > LASTS:
            # Errors that last (a gain that wanders) are taken off with the row before (Cochrane and Orcutt, 1949): else the
            # fit would take slow changes of the batch for their cause.
            row, joules = x.copy(), y - alike * before[1]
            row[: len(before[0])] -= alike * before[0]
            spare = math.sqrt(1.0 - alike * alike)
            row /= spare
            joules /= spare
        self._before = (x, y)
        if expected is not None:
            self._wander.add(self._row_joules / max(expected, 1e-9))
        gram *= keep
        gram += row[:, None] * row
        moment *= keep
        moment += row * joules
        self._gram, self._moment = gram, moment
        self.rows += 1

    def _begin_row(self) -> None:
        self._row = {}
        self._row_s = self._row_busy_s = self._row_joules = 0.0


def price(theta: Theta, x: Sequence[float]) -> float:
    """What features cost."""
    a, b, c, d, e, f, g = theta
    return a * x[0] + b * x[1] + c * x[2] + d * x[3] + e * x[4] + f * x[5] + g * x[6]


def _units(gram: Array, moment: Array, pull: float) -> Array:
    """How many joules a unit of each engine's prior is, drawn towards one unit for all."""
    import numpy as np

    scale = np.sqrt(np.maximum(gram.diagonal(), 1e-300))
    common = max(0.0, float(moment.sum())) / max(1e-300, float(gram.sum()))
    scaled = gram / np.outer(scale, scale) + (pull + _RIDGE) * np.eye(len(moment))
    return nnls(scaled, moment / scale + pull * common * scale) / scale
