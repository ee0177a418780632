"""Configuration: ``MELODI_*`` variables and :class:`Config`, same names.

One table (:data:`VARIABLES`) holds every variable with its parser and one sentence for people; ``Config.from_env`` reads
it, ``doctor`` and the docs print it. An unknown ``MELODI_*`` name is a warning with the nearest known name, a bad value
is a :class:`~melodi_otel.errors.ConfigError` that names variable, value and what is allowed.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, cast

from melodi_otel.errors import ConfigError
from melodi_otel.semconv import ANY_MODEL

log = logging.getLogger("melodi_otel")

StaticPolicy = Literal["busy_shared", "dynamic"]
ForeignSpans = Literal["on", "rollup", "off"]
BUILT_IN_SOURCES: Final = ("nvml", "amd", "apple", "rapl", "cray", "estimate")
"""In the order of preference; `rapl` is perf events where they are allowed, else powercap."""
ONE_WAY_SOURCES: Final = ("rapl_perf", "powercap")
"""One of the two ways of `rapl` alone; only by name."""


@dataclass(frozen=True, slots=True)
class Config:
    """What melodi_otel may be told. Every field is the lower-case name of its ``MELODI_*`` variable."""

    disabled: bool = False
    sources: tuple[str, ...] = ()
    hub: str = "auto"
    metrics_addr: str | None = None
    metrics_tls_cert: str | None = None
    metrics_tls_key: str | None = None
    metrics_tls_client_ca: str | None = None
    metrics_users: str | None = None
    sysfs_root: str = "/sys"
    procfs_root: str = "/proc"
    nvml_library: str | None = None
    estimate_watts: tuple[float, float] | None = None
    idle_watts: tuple[tuple[str, float], ...] = ()
    calibration: tuple[tuple[str, float], ...] = ()
    host_id: str | None = None
    engine_devices: tuple[str, ...] = ()
    static_policy: StaticPolicy = "busy_shared"
    span_wait: float | None = None
    span_limit: int = 10_000
    sample_hz: float = 10.0
    foreign_spans: ForeignSpans = "on"
    local_providers: tuple[str, ...] = ()
    labels: str = ""
    metric_labels: tuple[str, ...] = ()
    label_limit: int = 100
    label_values: tuple[tuple[str, tuple[str, ...]], ...] = ()
    label_hash: bool = False
    label_hash_key: str | None = field(default=None, repr=False)
    answer_energy: bool = False
    console: bool = False
    record: str | None = None
    record_rotate: int | None = None
    record_keep: int = 0
    carbon_intensity: float | None = None
    carbon_regions: tuple[tuple[str, float], ...] = ()
    carbon_region: str | None = None
    carbon_provider: str | None = None
    pue: float | None = None
    energy_price: float | None = None
    energy_budget: tuple[tuple[str, float], ...] = ()

    def _check_region(self) -> None:
        if not self.carbon_regions or self.intensity is not None:
            return
        known = ", ".join(sorted(dict(self.carbon_regions)))
        if self.carbon_region is None:
            log.warning("MELODI_CARBON_REGIONS is read and MELODI_CARBON_REGION is not set: one of %s", known)
        else:
            raise ConfigError(f"MELODI_CARBON_REGION={self.carbon_region!r} cannot be used: allowed is one of {known}")

    @property
    def intensity(self) -> float | None:
        """gCO2e per kWh, as configured: the figure itself, or that of the region."""
        if self.carbon_intensity is not None:
            return self.carbon_intensity
        return dict(self.carbon_regions).get(self.carbon_region or "")

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Config:
        """Read ``MELODI_*`` from ``environ``.

        Raises:
            ConfigError: a value cannot be used; the message names variable, value and what is allowed.
        """
        values: dict[str, Any] = {}
        for name, raw in environ.items():
            if not name.startswith("MELODI_"):
                continue
            variable = VARIABLES.get(name)
            if variable is None:
                if name not in INTERNAL:
                    near = difflib.get_close_matches(name, VARIABLES, n=1)
                    log.warning("unknown variable %s is ignored%s", name, f"; did you mean {near[0]}?" if near else "")
                continue
            if raw.strip() == "":
                continue
            try:
                values[variable.field] = variable.parse(raw.strip())
            except ValueError as error:
                why = f" ({error})" if str(error) else ""
                raise ConfigError(
                    f"{name}={variable.shown(raw)!r} cannot be used{why}: allowed is {variable.allowed}"
                ) from None
        made = cls(**values)
        made._check_region()
        return made


@dataclass(frozen=True, slots=True)
class Variable:
    """One ``MELODI_*`` variable: its field, parser, allowed values in words, and meaning; a secret is never printed."""

    field: str
    parse: Callable[[str], Any]
    allowed: str
    help: str
    secret: bool = False

    def shown(self, raw: str) -> str:
        """``raw`` as people may read it."""
        return "(set, not shown)" if self.secret else raw


def _flag(raw: str) -> bool:
    if raw.lower() in ("1", "true", "yes", "on"):
        return True
    if raw.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError


def _number(low: float, high: float = math.inf) -> Callable[[str], float]:
    def parse(raw: str) -> float:
        value = float(raw)
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError("out of range")
        return value

    return parse


def _whole(low: int) -> Callable[[str], int]:
    def parse(raw: str) -> int:
        value = int(raw)
        if value < low:
            raise ValueError("out of range")
        return value

    return parse


def _size(raw: str) -> int:
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(raw[-1].upper(), 1)
    value = int(raw if unit == 1 else raw[:-1]) * unit
    if value < 1 << 10:
        raise ValueError("out of range")
    return value


def _words(raw: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in raw.split(",") if word.strip())


def _policy(raw: str) -> StaticPolicy:
    if raw not in ("busy_shared", "dynamic"):
        raise ValueError
    return raw


def _foreign_spans(raw: str) -> ForeignSpans:
    if raw not in ("on", "rollup", "off"):
        raise ValueError
    return raw


def _address(raw: str) -> str:
    if raw.lower() == "off":
        return "off"
    host, colon, port = raw.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError
    return raw


def _watts(raw: str) -> tuple[float, float]:
    low, colon, high = raw.partition(":")
    if not colon:
        raise ValueError
    idle, most = float(low), float(high)
    if not (math.isfinite(most) and 0 <= idle <= most and most > 0):
        raise ValueError("idle must be >= 0 and not above max")
    return idle, most


def _idle(raw: str) -> tuple[tuple[str, float], ...]:
    pairs: list[tuple[str, float]] = []
    for word in _words(raw):
        device, equals, watts = word.rpartition("=")
        if not equals or not device:
            raise ValueError
        pairs.append((device, _number(0)(watts)))
    return tuple(pairs)


def _budgets(raw: str) -> tuple[tuple[str, float], ...]:
    if "=" not in raw:
        return ((ANY_MODEL, _number(0)(raw)),)
    return _idle(raw)


def _regions(raw: str) -> tuple[tuple[str, float], ...]:
    try:
        read: object = json.loads(Path(raw).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(error.strerror) from None
    if not isinstance(read, dict):
        raise ValueError("no object")  # noqa: TRY004  # what a parser raises
    return tuple((str(region), _number(0)(str(value))) for region, value in cast(dict[object, object], read).items())


def _factors(raw: str) -> tuple[tuple[str, float], ...]:
    pairs = _idle(raw)
    if any(not 0.5 <= factor <= 2.0 for _, factor in pairs):
        raise ValueError("out of range")
    return pairs


def _values(raw: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    found: dict[str, tuple[str, ...]] = {}
    for word in _words(raw):
        name, equals, listed = word.partition("=")
        values = tuple(value.strip() for value in listed.split("|"))
        if not equals or not name.strip() or not all(values) or name.strip() in found:
            raise ValueError
        found[name.strip()] = values
    return tuple(found.items())


def _hub(raw: str) -> str:
    if raw in ("auto", "local", "shared") or raw.startswith("/"):
        return raw
    raise ValueError


def _source_names(raw: str) -> tuple[str, ...]:
    names = _words(raw)
    if not names:
        raise ValueError
    return names


_FLAG: Final = "1 or 0"
_SOURCES: Final = (
    "a comma-separated list of source names: "
    + ", ".join((*BUILT_IN_SOURCES, *ONE_WAY_SOURCES))
    + " or an installed plug-in's"
)

VARIABLES: Final[dict[str, Variable]] = {
    "MELODI_DISABLED": Variable("disabled", _flag, _FLAG, "1 turns every seam off."),
    "MELODI_SOURCES": Variable(
        "sources",
        _source_names,
        _SOURCES,
        "Meters to use; default: all that measure. `estimate`, `rapl_perf` and `powercap` must be asked for by name.",
    ),
    "MELODI_HUB": Variable("hub", _hub, "auto, local, shared or an absolute socket path", "Where the meter lives."),
    "MELODI_METRICS_ADDR": Variable(
        "metrics_addr", _address, "HOST:PORT or off", "Where /metrics is served, e.g. 127.0.0.1:9464."
    ),
    "MELODI_METRICS_TLS_CERT": Variable(
        "metrics_tls_cert", str, "a PEM file", "Serve it by https with this certificate; read again when it changes."
    ),
    "MELODI_METRICS_TLS_KEY": Variable(
        "metrics_tls_key", str, "a PEM file without a passphrase", "The private key, where it is not in that file."
    ),
    "MELODI_METRICS_TLS_CLIENT_CA": Variable(
        "metrics_tls_client_ca",
        str,
        "a PEM file of CA certificates",
        "Only clients with a certificate of these may read.",
    ),
    "MELODI_METRICS_USERS": Variable(
        "metrics_users", str, "a file of lines USER:HASH", "Only these users may read; needs the extra `web`."
    ),
    "MELODI_SYSFS_ROOT": Variable("sysfs_root", str, "a directory", "Read sysfs below this directory."),
    "MELODI_PROCFS_ROOT": Variable("procfs_root", str, "a directory", "Read procfs below this directory."),
    "MELODI_NVML_LIBRARY": Variable("nvml_library", str, "a path to libnvidia-ml.so.1", "The NVML library to load."),
    "MELODI_ESTIMATE_WATTS": Variable(
        "estimate_watts", _watts, "IDLE:MAX in watts, e.g. 20:65", "Idle and maximum CPU power for the estimate source."
    ),
    "MELODI_IDLE_WATTS": Variable(
        "idle_watts", _idle, "DEVICE=WATTS,… with hw.id names", "Idle power per device instead of learning it."
    ),
    "MELODI_CALIBRATION": Variable(
        "calibration",
        _factors,
        "DEVICE=FACTOR,… with hw.id names and factors from 0.5 to 2",
        "True joules per joule that a device's meter shows, as found with a better meter.",
    ),
    "MELODI_HOST_ID": Variable("host_id", str, "any text", "host.id, where /etc/machine-id is a container's own."),
    "MELODI_ENGINE_DEVICES": Variable(
        "engine_devices", _words, "hw.id,… (GPU UUIDs)", "The devices this engine uses, those of its cores in order."
    ),
    "MELODI_STATIC_POLICY": Variable(
        "static_policy", _policy, "busy_shared or dynamic", "Who pays idle power while requests run."
    ),
    "MELODI_SPAN_WAIT": Variable(
        "span_wait",
        _number(0, 60),
        "seconds from 0 to 60",
        "The longest time a span waits for its joules, mostly for long engine steps; half as long again, once, if all stopped.",
    ),
    "MELODI_SPAN_LIMIT": Variable(
        "span_limit", _whole(1), "a whole number from 1", "The most spans that wait at a time."
    ),
    "MELODI_SAMPLE_HZ": Variable(
        "sample_hz", _number(0.1, 10), "0.1 to 10", "The most readings of a meter per second."
    ),
    "MELODI_FOREIGN_SPANS": Variable(
        "foreign_spans",
        _foreign_spans,
        "on, rollup or off",
        "Joules on other instrumentations' GenAI spans; `rollup`: only the sum of the requests in them.",
    ),
    "MELODI_LOCAL_PROVIDERS": Variable(
        "local_providers",
        _words,
        "gen_ai.provider.name values, e.g. ollama",
        "Whose servers run on this host, where their clients' spans name no address.",
    ),
    "MELODI_LABELS": Variable(
        "labels",
        str,
        "name=kind:key|…,… with kind baggage, header, span or resource, or user or adapter without a key",
        "Whose request it is.",
    ),
    "MELODI_METRIC_LABELS": Variable(
        "metric_labels", _words, "names out of MELODI_LABELS", "Labels that metrics carry."
    ),
    "MELODI_LABEL_LIMIT": Variable(
        "label_limit", _whole(1), "a whole number from 1", "Values per metric label before `other`."
    ),
    "MELODI_LABEL_VALUES": Variable(
        "label_values",
        _values,
        "name=value|value,… with names out of MELODI_METRIC_LABELS",
        "The only values that metrics carry; all others count as `other`.",
    ),
    "MELODI_LABEL_HASH": Variable("label_hash", _flag, _FLAG, "1 replaces label values by a hash."),
    "MELODI_LABEL_HASH_KEY": Variable(
        "label_hash_key",
        str,
        "any text, kept secret",
        "The key of that hash; setting it turns hashing on.",
        secret=True,
    ),
    "MELODI_ANSWER_ENERGY": Variable(
        "answer_energy", _flag, _FLAG, "1 puts the joules known so far into the `usage` of a server's answers."
    ),
    "MELODI_CONSOLE": Variable("console", _flag, _FLAG, "1 prints a summary when the program ends."),
    "MELODI_RECORD": Variable(
        "record", str, "a file name", "Write the trace of this process there; `auto` then means `local` for MELODI_HUB."
    ),
    "MELODI_RECORD_ROTATE": Variable(
        "record_rotate",
        _size,
        "bytes from 1K, with K, M or G for 1,024, its square or its cube of them",
        "The size at which the trace goes on in the next file, NAME.1.jsonl, NAME.2.jsonl, …; default: never.",
    ),
    "MELODI_RECORD_KEEP": Variable(
        "record_keep", _whole(0), "a whole number from 0", "How many files of the trace are left, the newest; 0: all."
    ),
    "MELODI_CARBON_INTENSITY": Variable("carbon_intensity", _number(0), "gCO2e per kWh", "Published as a gauge."),
    "MELODI_CARBON_REGIONS": Variable(
        "carbon_regions",
        _regions,
        'a readable JSON file, {"REGION": gCO2e per kWh, …}',
        "Carbon intensities by region; that of MELODI_CARBON_REGION counts where MELODI_CARBON_INTENSITY is not set.",
    ),
    "MELODI_CARBON_REGION": Variable(
        "carbon_region",
        str,
        "the name of a region",
        "Which intensity of MELODI_CARBON_REGIONS; handed to a live provider.",
    ),
    "MELODI_CARBON_PROVIDER": Variable(
        "carbon_provider",
        str,
        "the name of an entry point of melodi_otel_carbon",
        "Tells the intensity live; only then are emissions counted.",
    ),
    "MELODI_PUE": Variable("pue", _number(1), "a number from 1", "Power usage effectiveness, published as a gauge."),
    "MELODI_ENERGY_PRICE": Variable("energy_price", _number(0), "currency per kWh", "Published as a gauge."),
    "MELODI_ENERGY_BUDGET": Variable(
        "energy_budget",
        _budgets,
        "J per 1,000 output tokens, or MODEL=J,… with * for all other models",
        "Published as a gauge; requests above it are counted.",
    ),
}

GROUP_VARIABLE: Final = "MELODI_GROUP_TOKEN"
"""The token of a group of processes: the first one makes it, its children inherit it."""


def new_group() -> str:
    """A token for the processes that are started from here; it says who made it."""
    return f"{secrets.token_hex(8)}-{os.getpid()}"


def inherited_group(environ: Mapping[str, str]) -> bool:
    """Whether the token came from a parent: this is one of several processes of a group."""
    token = environ.get(GROUP_VARIABLE)
    return bool(token) and token.rpartition("-")[2] != str(os.getpid())


SERVER_VARIABLE: Final = "MELODI_METRICS_SERVER"
"""``PID@HOST:PORT`` of the process that serves metrics; its children leave that address to it."""

LINGER_VARIABLE: Final = "MELODI_HUB_LINGER"
"""Seconds that a shared hub stays without programs; for the tests."""

VLLM_ENGINE_VARIABLE: Final = "MELODI_VLLM_ENGINE"
"""Which engine of this program is being made, for the processes that vLLM starts for it."""

INTERNAL: Final = frozenset(
    {GROUP_VARIABLE, SERVER_VARIABLE, LINGER_VARIABLE, VLLM_ENGINE_VARIABLE, "MELODI_FAKE_NVML_STATE"}
)
"""Names that processes of this project and its test kit hand to their children; not for users."""


def unknown_fields() -> set[str]:
    """Fields of :class:`Config` without a variable, and the reverse (empty, or the table is wrong; a test asks)."""
    return {field.name for field in fields(Config)} ^ {variable.field for variable in VARIABLES.values()}
