"""A labelled estimate of CPU power, for machines whose meter is out of reach. Never used unless asked for.

``watts = idle + (max - idle) * utilisation``, the linear model of Cloud Carbon Footprint and of Etsy's Cloud Jewels. Its
integral needs no sampling: joules are ``idle * time + (max - idle) / CPUs * busy CPU seconds``, and both are counters. So
this is a counter source; what is uncertain are the watts, not the sums.

The coefficients are the averages that Cloud Carbon Footprint publishes for an unknown processor, in watts per vCPU:
AWS 0.74 to 3.5, Google Cloud 0.71 to 4.26, Azure 0.78 to 3.76
(https://www.cloudcarbonfootprint.org/docs/methodology/, section "Compute"; derived from SPECpower, so they hold the share
of a whole server, memory and power supply included). Their mean is 0.74 and 3.84.

How wrong is it? The same source lists ten processor families; against the mean above they draw between 0.44 and 2.9 times
as much, and at half load their standard deviation is 56 % of their mean. The linear shape adds to that. We state 60 %
(1 sigma). With ``MELODI_ESTIMATE_WATTS`` the two ends are the user's own and the linear shape and unknown clock
frequencies remain; we assume 25 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from melodi_otel.clock import Clock
from melodi_otel.devices import Device
from melodi_otel.errors import Refused
from melodi_otel.sources.base import CounterReading, Settings
from melodi_otel.sources.procstat import HostBusy, cpu_count, cpu_model
from melodi_otel.units import seconds

DEVICE_ID: Final = "estimate:cpu"
IDLE_WATTS_PER_CPU: Final = 0.74
MAX_WATTS_PER_CPU: Final = 3.84
PUBLISHED_UNCERTAINTY: Final = 0.6
"""1 sigma as a fraction where the processor is unknown: see the module's text."""
USERS_UNCERTAINTY: Final = 0.25
"""1 sigma as a fraction with the user's own idle and maximum watts: the shape between them is assumed."""


def open_estimate(settings: Settings) -> EstimateSource:
    """The estimate, if it was asked for.

    Raises:
        Refused: not asked for (``not_asked``), or the host's CPU times cannot be read.
    """
    if "estimate" not in settings.asked:
        raise Refused(
            "joules are not estimated unless asked for",
            fix="MELODI_SOURCES=estimate",
            state="not_asked",
        )
    try:
        cpus = cpu_count(settings.procfs)
        busy = HostBusy(settings.procfs)
    except (OSError, ValueError) as error:
        raise Refused(
            f"the CPU times of the host cannot be read: {error}",
            fix="the estimate needs Linux and a readable /proc/stat (MELODI_PROCFS_ROOT moves it)",
            state="no_device",
        ) from error
    return EstimateSource(settings.clock, busy, cpus, settings.estimate_watts, cpu_model(settings.procfs))


class EstimateSource:
    """Joules of all CPUs of the host from their utilisation.

    Args:
        clock: the time that idle power is multiplied with.
        busy: where CPU time comes from.
        cpus: number of CPUs that ``busy`` covers.
        watts: (idle, maximum) of the machine in W; None: the published coefficients times ``cpus``.
        name: the CPU's model name.
    """

    name = "estimate"

    def __init__(
        self, clock: Clock, busy: HostBusy, cpus: int, watts: tuple[float, float] | None, name: str | None = None
    ) -> None:
        self._clock = clock
        self._busy = busy
        idle, most = watts or (IDLE_WATTS_PER_CPU * cpus, MAX_WATTS_PER_CPU * cpus)
        self._idle_w = idle
        self._joules_per_busy_s = (most - idle) / cpus
        self._start_ns: int | None = None
        self._last_busy_s = 0.0
        self._dynamic_j = 0.0
        self._devices = (
            Device(
                id=DEVICE_ID,
                type="cpu",
                source="estimate.cpu_utilization",
                name=name,
                idle_watts=idle,
                period_s=0.01,
                estimated=True,
                relative_uncertainty=USERS_UNCERTAINTY if watts else PUBLISHED_UNCERTAINTY,
            ),
        )

    @property
    def devices(self) -> Sequence[Device]:
        return self._devices

    def counters(self) -> Sequence[CounterReading]:
        """Estimated joules since the first call, which is the baseline.

        Raises:
            Transient: the CPU times could not be read this time; the next reading covers the gap exactly.
        """
        busy_s = self._busy.read()
        now_ns = self._clock.monotonic_ns()
        if self._start_ns is None:
            self._start_ns = now_ns
        else:
            # CPU time of the host falls when a CPU is taken offline; that is no negative energy.
            self._dynamic_j += self._joules_per_busy_s * max(0.0, busy_s - self._last_busy_s)
        self._last_busy_s = busy_s
        idle_j = self._idle_w * seconds(now_ns - self._start_ns)
        return (CounterReading(DEVICE_ID, now_ns, math.fsum((idle_j, self._dynamic_j))),)

    def close(self) -> None:
        """Give the descriptor back."""
        self._busy.close()

    forked = close  # the copy of a child; the parent's stays open
