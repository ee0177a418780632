"""For whom a request ran: labels such as tenant, team or user, from ordered sources, with a limit on what metrics see.

``MELODI_LABELS="tenant=baggage:tenant.id|header:x-tenant-id,team=resource:team"``: the first source that has a value wins.
On spans and rows all configured labels appear; on metrics only those of ``MELODI_METRIC_LABELS``, each with at most
``MELODI_LABEL_LIMIT`` values, after which new ones are counted as ``other``. Sums over any label stay the attributed total.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from melodi_otel.errors import ConfigError

KEYED: Final = ("baggage", "header", "span", "resource")
BARE: Final = ("user", "adapter")
OTHER: Final = "other"
MAX_LENGTH: Final = 256
"""Longer values are cut: a label is a name, not a document."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One label and where its value may come from, in order: (kind, key) pairs."""

    name: str
    sources: tuple[tuple[str, str], ...]


def parse(spec: str) -> tuple[Rule, ...]:
    """The rules of ``MELODI_LABELS``.

    Raises:
        ConfigError: the text is not of the form ``name=kind:key|…``, or a kind is unknown.
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
        rules.append(Rule(name, tuple(sources)))
    return tuple(rules)


def resolve(rules: Sequence[Rule], found: Mapping[str, Mapping[str, str]], *, hashed: bool = False) -> dict[str, str]:
    """Label values of one request.

    Args:
        rules: what is configured.
        found: values by kind and key (``{"baggage": {"tenant.id": "a"}, "user": {"": "u1"}}``).
        hashed: replace values by a hash, so that the raw one appears in no signal.
    """
    values: dict[str, str] = {}
    for rule in rules:
        for kind, key in rule.sources:
            value = found.get(kind, {}).get(key)
            if value:
                values[rule.name] = digest(value) if hashed else value[:MAX_LENGTH]
                break
    return values


def digest(value: str) -> str:
    """16 hexadecimal digits that stand for ``value``."""
    return hashlib.blake2b(value.encode(), digest_size=8).hexdigest()


class MetricLabels:
    """The labels that metrics carry, each with a limited number of values.

    Args:
        names: label names in the order in which metrics carry them.
        limit: values per label before ``other``.
    """

    def __init__(self, names: Sequence[str], limit: int) -> None:
        self._names = tuple(names)
        self._limit = limit
        self._seen: dict[str, set[str]] = {name: set() for name in self._names}

    def clip(self, labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        """(name, value) pairs for metrics; a request without a label has none."""
        pairs: list[tuple[str, str]] = []
        for name in self._names:
            value = labels.get(name)
            if value is None:
                continue
            seen = self._seen[name]
            if value not in seen:
                if len(seen) >= self._limit:
                    value = OTHER
                else:
                    seen.add(value)
            pairs.append((name, value))
        return tuple(pairs)
