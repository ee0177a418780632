"""One figure out of many shares: what a span, a metric, a row or ``m.joules`` says about a request.

The rules are the design's (section 4, "several devices on one span"): total is the sum; the method is the least exact tier
that holds at least 5 % of the joules of the main device type; quality is the worst; coverage the joule-weighted mean;
uncertainties add in squares. A device type without a meter makes nothing partial: ``scope`` says what total contains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from melodi_otel.attribution.meter import Quality, Reason, Share, Tier
from melodi_otel.devices import Device

TIERS: Final[tuple[Tier, ...]] = ("exclusive", "step", "slice", "process", "phase", "window", "equal")
"""From the most to the least exact."""
QUALITIES: Final[tuple[Quality, ...]] = ("measured", "interpolated", "estimated", "partial", "unavailable")
"""From the best to the worst."""
FULL_COVERAGE: Final = 0.99
"""With less of its time covered a share is partial."""
_TYPES: Final = ("gpu", "cpu", "memory")


@dataclass(frozen=True, slots=True)
class Energy:
    """A request's energy over all its devices; joules throughout, None = not measured.

    Attributes are those of the span contract (``melodi.energy.*``): ``gpu``, ``cpu`` and ``memory`` sum to ``total``, as do
    ``dynamic`` and ``static`` where the idle power of every device was known; ``source`` and ``devices`` are sorted and free
    of repeats; ``scope`` names the device types in ``total``; ``rollup`` is the total with all nested requests.
    """

    total: float | None
    gpu: float | None
    cpu: float | None
    memory: float | None
    dynamic: float | None
    static: float | None
    prefill: float | None
    decode: float | None
    uncertainty: float | None
    method: Tier | None
    quality: Quality
    coverage: float
    concurrency: float | None
    exclusive: bool | None
    source: tuple[str, ...]
    scope: str | None
    devices: tuple[str, ...]
    reason: Reason | None
    rollup: float | None

    def per_token(self, output_tokens: int | None) -> float | None:
        """J per output token, or None where either is unknown or there was no token."""
        if self.total is None or not output_tokens:
            return None
        return self.total / output_tokens


def unavailable(reason: Reason | None, shares: Sequence[Share] = ()) -> Energy:
    """The energy of a request whose joules are not known, and why."""
    return Energy(
        *([None] * 10),
        quality="unavailable",
        coverage=0.0,
        concurrency=None,
        exclusive=None,
        source=(),
        scope=None,
        devices=tuple(sorted({share.device for share in shares})),
        reason=reason,
        rollup=None,
    )


def summarize(shares: Sequence[Share], devices: Mapping[str, Device]) -> Energy:
    """Sum the shares of one request.

    Devices of type ``host`` (psys) contain the others and are left out of every sum.
    """
    known = [s for s in shares if s.joules is not None and _type(s, devices) != "host"]
    if not known:
        reasons: list[Reason] = [s.reason for s in shares if s.reason] or ["no_source"]
        return unavailable(reasons[0], shares)
    by_type = {kind: _sum(s.joules for s in known if _type(s, devices) == kind) for kind in _TYPES}
    total = math.fsum(s.joules or 0.0 for s in known)
    weights = [abs(s.joules or 0.0) for s in known]
    spread = math.fsum(weights)
    if spread == 0.0:
        weights, spread = [1.0] * len(known), float(len(known))
    present = [kind for kind in _TYPES if by_type[kind] is not None]
    exclusive = {s.exclusive for s in known}
    main = present[0]
    return Energy(
        total=total,
        gpu=by_type["gpu"],
        cpu=by_type["cpu"],
        memory=by_type["memory"],
        dynamic=_all(s.dynamic for s in known),
        static=_all(s.static for s in known),
        prefill=_all(s.prefill for s in known),
        decode=_all(s.decode for s in known),
        uncertainty=math.sqrt(math.fsum((s.uncertainty or 0.0) ** 2 for s in known)),
        method=_method([s for s in known if _type(s, devices) == main]),
        quality=QUALITIES[max(QUALITIES.index(s.quality) for s in known)],
        coverage=math.fsum(w * s.coverage for w, s in zip(weights, known, strict=True)) / spread,
        concurrency=max(s.concurrency for s in known if _type(s, devices) == main),
        exclusive=False if False in exclusive else (True if exclusive == {True} else None),
        source=tuple(
            sorted({devices[s.device].source for s in known if s.device in devices and devices[s.device].source})
        ),
        scope="+".join(present),
        devices=tuple(sorted({s.device for s in known})),
        reason=next((s.reason for s in known if s.reason), None),
        rollup=_all(s.rollup for s in known),
    )


def _type(share: Share, devices: Mapping[str, Device]) -> str:
    device = devices.get(share.device)
    return device.type if device else "gpu"


def _sum(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return math.fsum(present) if present else None


def _all(values: Iterable[float | None]) -> float | None:
    listed = list(values)
    present = [value for value in listed if value is not None]
    return math.fsum(present) if present and len(present) == len(listed) else None


def _method(shares: Sequence[Share]) -> Tier:
    total = math.fsum(abs(s.joules or 0.0) for s in shares)
    held = {
        tier: math.fsum(abs(s.joules or 0.0) for s in shares if s.method == tier) for tier in {s.method for s in shares}
    }
    enough = [tier for tier, joules in held.items() if joules >= 0.05 * total]
    return TIERS[max(TIERS.index(tier) for tier in enough)]
