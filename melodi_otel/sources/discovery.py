"""Which meters there are here, and why the others are not used.

Built-ins in the order of preference, then installed plug-ins (entry point group ``melodi_otel_source``), then the estimate,
which nobody gets who did not ask. Every refusal is kept with its reason and its fix: nobody has to guess why RAPL is not
used. A meter that crashes is a refusal too; looking for meters raises only for a name that does not exist.

No joule twice: a device whose id is measured already is refused here; a meter that sees the same silicon under another name
is told in ``Settings.measured`` which types of device the meters before it measure, and leaves those out.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Protocol, runtime_checkable

from melodi_otel.errors import ConfigError, MissingDependency, Refused
from melodi_otel.sources.base import DeviceType, Discovery, Refusal, Settings, Source

log = logging.getLogger("melodi_otel")

GROUP: Final = "melodi_otel_source"
UNCONFIRMED: Final = frozenset({"amd", "apple", "rapl", "rapl_perf", "powercap", "cray"})
"""Meters that have run on fakes only: no machine with the hardware was at hand yet. See ``docs/meters.md``."""
QUIET: Final = frozenset({"not_asked", "superseded", "absent"})
"""States of a refusal that nobody would act on: nothing is broken, and nothing is missing from the sums."""
Opener = Callable[[Settings], Source]


@runtime_checkable
class PartlyRefused(Protocol):
    """A source that works, but not with everything it found."""

    @property
    def refusals(self) -> Sequence[Refusal]: ...


def discover(
    settings: Settings, wanted: tuple[str, ...] = (), *, plugins: Mapping[str, Opener] | None = None
) -> Discovery:
    """Open the meters of this machine.

    Args:
        settings: what a meter may depend on.
        wanted: names of ``MELODI_SOURCES``; empty: all that measure.
        plugins: openers by name; None: the installed ones.

    Raises:
        ConfigError: a wanted name is no source; the message lists the valid ones.
    """
    found: dict[str, Opener] = {"nvml": _nvml, "amd": _amd, "apple": _apple, "rapl": _rapl}
    found |= {name: opener for name, opener in _ONE_WAY.items() if name in wanted}
    found["cray"] = _cray  # after everything that may measure a part of its node
    for name, opener in (_installed() if plugins is None else plugins).items():
        found.setdefault(name, opener)
    found["estimate"] = _estimate  # last: it only stands in for a meter that is not there
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise ConfigError(
            f"MELODI_SOURCES={','.join(wanted)!r} cannot be used: {unknown[0]!r} is no source; "
            f"allowed is a comma-separated list of {', '.join(dict.fromkeys((*found, *_ONE_WAY)))}"
        )
    settings = replace(settings, asked=settings.asked | frozenset(wanted))
    sources: list[Source] = []
    refusals: list[Refusal] = []
    for name, opener in found.items():
        if wanted and name not in wanted and name not in settings.asked:
            continue
        result = _open(name, opener, replace(settings, measured=_types(sources)), sources)
        if isinstance(result, Refusal):
            refusals.append(result)
            level = logging.ERROR if name in settings.asked and result.state != "superseded" else logging.DEBUG
            log.log(level, "%s", _sentence(result))
        else:
            sources.append(result)
            refusals += _partly(result)
    return Discovery(tuple(sources), tuple(refusals))


def describe(discovery: Discovery, platform: str = sys.platform) -> str:
    """The first line of the log: what is used and, where nothing measures, the variable that would help."""
    used = "; ".join(
        f"{source.name}: " + ", ".join(f"{d.id} ({d.name})" if d.name else d.id for d in source.devices)
        for source in discovery.sources
    )
    denied = [r for r in discovery.refusals if r.state not in QUIET]
    if not discovery.sources:
        why = " ".join(_sentence(refusal) + "." for refusal in denied)
        # The estimate reads /proc/stat: elsewhere it would be another refusal.
        help_ = " To estimate them from CPU load set MELODI_SOURCES=estimate." if platform.startswith("linux") else ""
        return f"no energy meter: joules will be absent. {why}{help_}"
    text = f"energy from {used}"
    if all(device.estimated for device in discovery.devices):
        text += " (ESTIMATED from CPU load, not measured)"
    doubtful = unconfirmed(discovery)
    if doubtful:
        text += f" ({', '.join(doubtful)} unconfirmed: not run on real hardware yet)"
    # A permission is worth a line even where another meter works: the joules of that device are missing from the sums.
    notable = [r for r in denied if r.state in ("permission_denied", "unreadable", "masked", "crashed")]
    return text + "".join(f"; not used: {_sentence(refusal)}" for refusal in notable)


def unconfirmed(discovery: Discovery) -> tuple[str, ...]:
    """Names of the meters in use that have never run on the hardware they are for."""
    return tuple(source.name for source in discovery.sources if source.name in UNCONFIRMED)


def gpus_of(discovery: Discovery) -> tuple[tuple[str, ...], str | None]:
    """Model names of the GPUs found, each once, and the version of their driver where a meter tells it."""
    models = dict.fromkeys(d.name for d in discovery.devices if d.type == "gpu" and d.name)
    versions = (getattr(source, "driver_version", None) for source in discovery.sources)
    return tuple(models), next((version for version in versions if isinstance(version, str)), None)


def _open(name: str, opener: Opener, settings: Settings, sources: Iterable[Source]) -> Source | Refusal:
    taken = {device.id: source.name for source in sources for device in source.devices}
    if name == "estimate" and "cpu" in settings.measured and "estimate" in settings.asked:
        return Refusal(name, "superseded", "a meter measures the CPU; its joules are not estimated beside it")
    source: Source | None = None
    try:
        source = opener(settings)
        ids = [device.id for device in source.devices]
        double = next((device for device in ids if device in taken), None)
        if not ids:
            refusal = Refusal(name, "no_device", "it found no device")
        elif double is not None:
            refusal = Refusal(name, "superseded", f"{double} is measured by {taken[double]} already")
        else:
            return source
    except Refused as error:
        refusal = Refusal(name, error.state, error.reason, error.fix)
    except MissingDependency as error:
        refusal = Refusal(name, "library_missing", f"{name} needs a package that is not installed", str(error))
    except Exception as error:
        log.debug("source %s crashed", name, exc_info=True)
        refusal = Refusal(name, "crashed", f"it failed with {type(error).__name__}: {error}")
    if source is not None:
        try:
            source.close()
        except Exception:
            log.debug("source %s cannot be closed", name, exc_info=True)
    return refusal


def _types(sources: Iterable[Source]) -> frozenset[DeviceType]:
    return frozenset(d.type for source in sources for d in source.devices if not d.estimated)


def _partly(source: Source) -> Sequence[Refusal]:
    try:
        return tuple(source.refusals) if isinstance(source, PartlyRefused) else ()
    except Exception:
        return ()


def _sentence(refusal: Refusal) -> str:
    return f"{refusal.source}: {refusal.reason}" + (f" (to repair: {refusal.fix})" if refusal.fix else "")


def _installed() -> dict[str, Opener]:
    try:
        return {entry.name: _plugin(entry) for entry in entry_points(group=GROUP)}
    except Exception:
        log.debug("installed sources cannot be listed", exc_info=True)
        return {}


def _plugin(entry: EntryPoint) -> Opener:
    def open_plugin(settings: Settings) -> Source:
        opener: Any = entry.load()
        return opener(settings)

    return open_plugin


def _nvml(settings: Settings) -> Source:
    from melodi_otel.sources.nvml import open_nvml

    return open_nvml(settings)


def _amd(settings: Settings) -> Source:
    from melodi_otel.sources.amd import open_amd

    return open_amd(settings)


def _apple(settings: Settings) -> Source:
    from melodi_otel.sources.apple import open_apple

    return open_apple(settings)


def _rapl(settings: Settings) -> Source:
    from melodi_otel.sources.rapl_ways import open_rapl_ways

    return open_rapl_ways(settings)


def _rapl_perf(settings: Settings) -> Source:
    from melodi_otel.sources.perf_rapl import open_perf_rapl

    return open_perf_rapl(settings)


def _powercap(settings: Settings) -> Source:
    from melodi_otel.sources.rapl import open_rapl

    return open_rapl(settings)


_ONE_WAY: Final[dict[str, Opener]] = {"rapl_perf": _rapl_perf, "powercap": _powercap}
"""Ways of ``rapl`` by themselves, for whom one of them is wrong; only by name."""


def _cray(settings: Settings) -> Source:
    from melodi_otel.sources.cray import open_cray

    return open_cray(settings)


def _estimate(settings: Settings) -> Source:
    from melodi_otel.sources.estimate import open_estimate

    return open_estimate(settings)
