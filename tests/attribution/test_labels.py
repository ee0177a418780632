"""Labels: where values come from, and how many of them metrics see."""

from __future__ import annotations

import pytest

from melodi_otel.attribution.labels import MetricLabels, Rule, digest, parse, resolve
from melodi_otel.errors import ConfigError


def test_rules_are_ordered() -> None:
    """The first source that has a value wins; header names do not care for case."""
    rules = parse("tenant=baggage:tenant.id|header:X-Tenant-Id, team=resource:team")
    assert rules[0] == Rule("tenant", (("baggage", "tenant.id"), ("header", "x-tenant-id")))
    found = {"header": {"x-tenant-id": "h"}, "resource": {"team": "t"}}
    assert resolve(rules, found) == {"tenant": "h", "team": "t"}
    assert resolve(rules, {**found, "baggage": {"tenant.id": "b"}})["tenant"] == "b"


def test_absent_is_absent() -> None:
    """A label without a value is not there, and an empty value is none."""
    assert resolve(parse("user=user"), {"user": {"": ""}}) == {}


@pytest.mark.parametrize(
    "spec", ["tenant", "tenant=cookie:x", "tenant=baggage:", "=user", "a=user,a=adapter", "a=user:x"]
)
def test_bad_rules_are_named(spec: str) -> None:
    """A rule that cannot be used says variable, value and what is allowed."""
    with pytest.raises(ConfigError, match=r"MELODI_LABELS=.* allowed is name=kind:key"):
        parse(spec)


def test_metrics_see_a_limited_number() -> None:
    """After the limit new values are `other`; known ones stay themselves."""
    metric = MetricLabels(["tenant"], 2)
    seen = [metric.clip({"tenant": value, "team": "x"}) for value in ("a", "b", "c", "a", "d")]
    assert [pairs[0][1] for pairs in seen] == ["a", "b", "other", "a", "other"]


def test_hash_hides_the_value() -> None:
    """Hashed labels are stable and do not contain the raw value."""
    values = resolve(parse("user=user"), {"user": {"": "jane@example.org"}}, hashed=True)
    assert values == {"user": digest("jane@example.org")}
    assert "jane" not in values["user"]
