from __future__ import annotations

from melodi_otel.attribution.meter import Key
from melodi_otel.results import Results, Store


def test_keeps_the_last_ones(kit):
    """The oldest record leaves when the limit is reached; the total still counts it."""
    store = Store(limit=2)
    for name in "abc":
        store.finished(kit.record(name))
    assert [r.name for r in store.recent()] == ["b", "c"]
    assert [r.name for r in store.recent(1)] == ["c"]
    assert (len(store.recent(0)), len(store), store.total) == (0, 2, 3)


def test_last_of_a_kind(kit):
    """last() finds the newest of the asked kind, None where there is none."""
    store = Store()
    assert store.last() is None
    store.finished(kit.record("block", kind="measure"))
    store.finished(kit.record("chat"))
    assert store.last().name == "chat"
    assert store.last("measure").name == "block"
    store.clear()
    assert store.last() is None


def test_nested_at_any_depth_and_in_any_order(kit):
    """Descendants are found although the inner one finished before, or after, the one around it."""
    store = Store()
    top = Key("g", "top")
    store.finished(kit.record("leaf", parent=Key("g", "middle")))
    store.finished(kit.record("middle", parent=top))
    store.finished(kit.record("other"))
    assert [r.name for r in store.nested(top)] == ["leaf", "middle"]
    assert store.nested(Key("g", "leaf")) == []


def test_recent_is_a_snapshot(kit):
    """What was asked for earlier does not change afterwards."""
    store = Store()
    before = store.recent()
    store.finished(kit.record())
    assert before == Results()
