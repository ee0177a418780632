"""RAPL by the better way that is allowed: perf events, else powercap. Which one it is, and why, is in ``notes``.

A process uses one way for all its zones and for its whole life. Ids and names are the same by both, so a switch from one
start to the next changes no series.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from melodi_otel.errors import Refused
from melodi_otel.sources.base import Settings, Source
from melodi_otel.sources.perf_rapl import PerfRaplSource, open_perf_rapl
from melodi_otel.sources.rapl import RaplSource, open_rapl

__all__ = ["open_rapl_ways"]

_QUIET = frozenset({"absent", "unsupported_platform"})
"""States of perf events that nobody can change, so nobody needs to hear of them."""


def open_rapl_ways(
    settings: Settings,
    *,
    perf: Callable[[Settings], PerfRaplSource] | None = None,
    powercap: Callable[[Settings], RaplSource] | None = None,
    platform: str = sys.platform,
) -> Source:
    """Open RAPL.

    Args:
        settings: clock and roots.
        perf, powercap: the openers; None: the real ones.
        platform: ``sys.platform``.

    Raises:
        Refused: neither way works; the reason of powercap, and that of perf events where something can be done about it.
    """
    by_perf = perf or partial(open_perf_rapl, platform=platform)
    by_powercap = powercap or partial(open_rapl, platform=platform)
    try:
        better = by_perf(settings)
    except Refused as denied:
        return _second(settings, by_powercap, denied)
    if not better.unseen:
        return better
    # A zone that only powercap shows would be missing from all sums: then that way is the better one, if it is open.
    missing = ", ".join(zone.id for zone in better.unseen)
    with suppress(Refused):
        whole = by_powercap(settings)
        if {zone.id for zone in better.unseen} <= {device.id for device in whole.devices}:
            better.close()
            whole.notes = ("read through powercap", f"perf events do not show {missing}")
            return whole
        whole.close()
    better.note(f"perf events do not show {missing}, and powercap may not be read: its joules are missing")
    return better


def _second(settings: Settings, powercap: Callable[[Settings], RaplSource], denied: Refused) -> Source:
    why = denied.reason + (f" (to repair: {denied.fix})" if denied.fix else "")
    try:
        source = powercap(settings)
    except Refused as error:
        if denied.state in _QUIET:
            raise
        state = denied.state if denied.state == "permission_denied" else error.state
        fix = " — or, through perf events: ".join(part for part in (error.fix, denied.fix) if part)
        raise Refused(f"{error.reason}; {denied.reason}", fix=fix, state=state) from denied
    source.notes = ("read through powercap", f"perf events are not used: {why}")
    return source
