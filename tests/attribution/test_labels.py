"""Labels: where values come from, what becomes of them, and how many of them metrics see."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest

from melodi_otel.attribution.labels import MAX_LENGTH, Digest, Lookup, MetricLabels, Rule, clean, parse, resolve
from melodi_otel.errors import ConfigError


def lookups(found: Mapping[str, Mapping[str, str]]) -> dict[str, Lookup]:
    return {kind: values.get for kind, values in found.items()}


def test_rules_are_ordered() -> None:
    """The first source that has a value wins; header names do not care for case."""
    rules = parse("tenant=baggage:tenant.id|header:X-Tenant-Id, team=resource:team")
    assert rules[0] == Rule("tenant", (("baggage", "tenant.id"), ("header", "x-tenant-id")))
    found = {"header": {"x-tenant-id": "h"}, "resource": {"team": "t"}}
    assert resolve(rules, lookups(found)) == {"tenant": "h", "team": "t"}
    assert resolve(rules, lookups({**found, "baggage": {"tenant.id": "b"}}))["tenant"] == "b"


def test_absent_is_absent() -> None:
    """A label without a value is not there, and a value of nothing but spaces is none: the next source is asked."""
    assert resolve(parse("user=user"), lookups({"user": {"": ""}})) == {}
    rules = parse("tenant=header:a|header:b")
    assert resolve(rules, lookups({"header": {"a": " \t", "b": "x"}})) == {"tenant": "x"}


@pytest.mark.parametrize(
    "spec", ["tenant", "tenant=cookie:x", "tenant=baggage:", "=user", "a=user,a=adapter", "a=user:x"]
)
def test_bad_rules_are_named(spec: str) -> None:
    """A rule that cannot be used says variable, value and what is allowed."""
    with pytest.raises(ConfigError, match=r"MELODI_LABELS=.* allowed is name=kind:key"):
        parse(spec)


@pytest.mark.parametrize("spec", ["hw.id=user", "hw_id=user", "le=user", "a.b=user,a_b=adapter", "ä=user", "a b=user"])
def test_names_stay_apart(spec: str) -> None:
    """A name that reads like another attribute, or like another label once it is scraped, cannot be used."""
    with pytest.raises(ConfigError, match=r"MELODI_LABELS=.* that does not read like another one's"):
        parse(spec)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        (" acme ", "acme"),
        ("Müller & Söhne", "Müller & Söhne"),
        ("a\r\nb\x00c\x1b[31m", "a__b_c_[31m"),
        ("a\u2028b\u202ec", "a_b_c"),
        ("a\udcffb", "a_b"),
        ("\n\t ", ""),
        ("x" * 300, "x" * MAX_LENGTH),
        (" " * 100 + "x" * 2_000_000, "x" * MAX_LENGTH),
    ],
)
def test_values_are_made_harmless(raw: str, cleaned: str) -> None:
    """A value is short and printable: no control, no line end, no undecodable byte, no change of direction."""
    assert clean(raw) == cleaned
    clean(raw).encode()


def test_metrics_see_a_limited_number() -> None:
    """After the limit new values are `other`; known ones stay themselves; who calls himself `other` takes no place."""
    metric = MetricLabels(["tenant"], 2)
    seen = [metric.clip({"tenant": value, "team": "x"}) for value in ("other", "a", "b", "c", "a", "d")]
    assert [pairs[0][1] for pairs in seen] == ["other", "a", "b", "other", "a", "other"]
    assert metric.clip({"team": "x"}) == ()


def test_listed_values_cannot_be_pushed_out() -> None:
    """Where values are listed, metrics carry those and no others, whoever comes first and however many they are."""
    metric = MetricLabels(["tenant", "user"], 1, {"tenant": ["a", "b"]})
    seen = [metric.clip({"tenant": value, "user": value}) for value in ("x", "y", "a", "b")]
    assert seen[0] == (("tenant", "other"), ("user", "x"))
    assert [pairs[0][1] for pairs in seen] == ["other", "other", "a", "b"]
    assert [pairs[1][1] for pairs in seen] == ["x", "other", "other", "other"]


def test_the_limit_holds_on_many_threads() -> None:
    """Threads that bring new values at the same moment do not get more of them in."""
    metric = MetricLabels(["tenant"], 100)
    begin = threading.Barrier(4)

    def bring(first: int) -> None:
        begin.wait()
        for number in range(first, first + 500):
            metric.clip({"tenant": str(number)})

    threads = [threading.Thread(target=bring, args=(500 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({metric.clip({"tenant": str(number)}) for number in range(2000)}) == 101


def test_hash_hides_the_value() -> None:
    """Hashed labels are stable and do not contain the raw value."""
    digest = Digest()
    values = resolve(parse("user=user"), {"user": lambda _: "jane@example.org"}, digest=digest)
    assert values == {"user": digest("jane@example.org")}
    assert "jane" not in values["user"]
    assert len(values["user"]) == 16


def test_a_key_makes_the_hash_ones_own() -> None:
    """With a key, of whatever length, the same name has another hash than without it or with another key."""
    keys = (None, "k", "k2", "k" * 64, "k" * 65, "ключ")
    assert len({Digest(key)("acme") for key in keys}) == len(keys)
    assert Digest("k")("acme") == Digest("k")("acme")
