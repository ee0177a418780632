"""For whom a request ran: labels such as tenant, team or user, from ordered sources, with a limit on what metrics see.

``MELODI_LABELS="tenant=baggage:tenant.id|header:x-tenant-id,team=resource:team"``: the first source that has a value wins.
On spans and rows all configured labels appear; on metrics only those of ``MELODI_METRIC_LABELS``, each with at most
``MELODI_LABEL_LIMIT`` values, after which new ones are counted as ``other``. Sums over any label stay the attributed total.

Values come from outside and nobody has vouched for them: :func:`clean` makes each one short and printable, once, before
anything of ours sees it.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from melodi_otel import semconv
from melodi_otel.errors import ConfigError
from melodi_otel.semconv_metrics import label_name

KEYED: Final = ("baggage", "header", "span", "resource")
BARE: Final = ("user", "adapter")
OTHER: Final = "other"
MAX_LENGTH: Final = 256
"""Longer values are cut: a label is a name, not a document."""

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_RESERVED: Final = frozenset(
    label_name(attribute.name)
    for attribute in (*semconv.SPAN_ATTRIBUTES, *semconv.GEN_AI_ATTRIBUTES, *semconv.METRIC_ATTRIBUTES)
) | {label_name(semconv.HOST_ID), "le", "quantile"}

Lookup = Callable[[str], str | None]
"""Finds the value of one key of a source; the key is ``""`` for a source without keys."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One label and where its value may come from, in order: (kind, key) pairs."""

    name: str
    sources: tuple[tuple[str, str], ...]


def parse(spec: str) -> tuple[Rule, ...]:
    """The rules of ``MELODI_LABELS``.

    Raises:
        ConfigError: the text is not of the form ``name=kind:key|…``, a kind is unknown, or a name is taken.
    """
    rules: list[Rule] = []
    for part in (part.strip() for part in spec.split(",")):
        if not part:
            continue
        name, equals, listed = part.partition("=")
        name = name.strip()
        sources: list[tuple[str, str]] = []
        for source in listed.split("|"):
            kind, _, key = (word.strip() for word in source.partition(":"))
            if (kind in KEYED and key) or (kind in BARE and not key):
                sources.append((kind, key.lower() if kind == "header" else key))
            else:
                sources.clear()
                break
        if not equals or not name or not sources or name in {rule.name for rule in rules}:
            raise ConfigError(
                f"MELODI_LABELS={spec!r} cannot be used at {part!r}: allowed is name=kind:key|kind:key,… with each name"
                f" once and kind one of {', '.join(KEYED)}, or {', '.join(BARE)} without a key"
            )
        scraped = label_name(name)
        if not _NAME.fullmatch(name) or scraped in _RESERVED | {label_name(rule.name) for rule in rules}:
            raise ConfigError(
                f"MELODI_LABELS={spec!r} cannot be used at {part!r}: allowed is a name of letters, digits, '_', '.' and"
                f" '-' that does not read like another one's ({scraped!r} when it is scraped)"
            )
        rules.append(Rule(name, tuple(sources)))
    return tuple(rules)


def clean(value: str) -> str:
    """``value`` as a label may carry it: at most 256 characters, each one printable, no space around it.

    What cannot be printed (control characters, line ends, undecodable bytes, characters that turn the writing direction)
    reads ``_``. Empty where nothing is left.
    """
    cut = value[: 4 * MAX_LENGTH].strip()[:MAX_LENGTH].rstrip()
    return cut if cut.isprintable() else "".join(one if one.isprintable() else "_" for one in cut)


def resolve(
    rules: Sequence[Rule], found: Mapping[str, Lookup], *, digest: Callable[[str], str] | None = None
) -> dict[str, str]:
    """Label values of one request, cleaned.

    Args:
        rules: what is configured.
        found: how to look into each kind of source; a kind that is missing has no values.
        digest: replaces each value, so that the raw one appears in no signal.
    """
    values: dict[str, str] = {}
    for rule in rules:
        for kind, key in rule.sources:
            lookup = found.get(kind)
            raw = None if lookup is None else lookup(key)
            value = clean(raw) if raw else ""
            if value:
                values[rule.name] = value if digest is None else digest(value)
                break
    return values


class Digest:
    """16 hexadecimal digits that stand for a value.

    Args:
        key: a secret. Without one, whoever can guess a value can check the guess.
    """

    def __init__(self, key: str | None = None) -> None:
        raw = (key or "").encode("utf-8", "surrogateescape")
        self._key = raw if len(raw) <= hashlib.blake2b.MAX_KEY_SIZE else hashlib.blake2b(raw).digest()

    def __call__(self, value: str) -> str:
        return hashlib.blake2b(value.encode(), digest_size=8, key=self._key).hexdigest()


class MetricLabels:
    """The labels that metrics carry, each with a limited number of values.

    Args:
        names: label names in the order in which metrics carry them.
        limit: values per label before ``other``.
        allowed: by label, the only values that metrics may carry; every other one is counted as ``other``.
    """

    def __init__(self, names: Sequence[str], limit: int, allowed: Mapping[str, Sequence[str]] | None = None) -> None:
        self._names = tuple(names)
        self._limit = limit
        self._allowed = {name: frozenset(values) for name, values in (allowed or {}).items()}
        self._seen: dict[str, set[str]] = {name: set() for name in self._names}
        self._lock = threading.Lock()

    def clip(self, labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        """(name, value) pairs for metrics; a request without a label has none."""
        return tuple((name, self._shown(name, labels[name])) for name in self._names if name in labels)

    def bound(self, limit: int) -> None:
        """From now on ``limit`` values per label; values that are shown already stay."""
        self._limit = limit

    def forked(self) -> None:
        """In a forked child: the lock may be held by a thread that is not here."""
        self._lock = threading.Lock()

    def _shown(self, name: str, value: str) -> str:
        allowed = self._allowed.get(name)
        if allowed is not None:
            return value if value in allowed else OTHER
        seen = self._seen[name]
        if value in seen or value == OTHER:
            return value
        # Joules and requests are counted on different threads, which must not both take the last place.
        with self._lock:
            if len(seen) < self._limit:
                seen.add(value)
        return value if value in seen else OTHER
