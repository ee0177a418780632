"""The decode set of a lane as the program keeps it, against what the ledger makes of the same differences."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from melodi_otel.attribution.activity import Activity
from melodi_otel.attribution.lanes import Lane, Step
from melodi_otel.attribution.meter import Decode, EngineId, Joined, Key, Prefill
from melodi_otel.hub import lanes
from melodi_otel.hub.lanes import LaneMirror, Lanes


def test_the_set_is_told_to_whoever_is_new() -> None:
    """A new listener gets every member with the context it has now, and a number that is not the next one."""
    mirror = LaneMirror()
    mirror.take(0, Decode(2, 30), [], [Joined("a", 10), Joined("b", 20)], [], fresh=True)
    mirror.take(1, Decode(2, 32), [], [], [], fresh=False)
    before = mirror.number
    assert mirror.take(2, Decode(2, 34), [], [], [], fresh=True) == [Joined("a", 12), Joined("b", 22)]
    assert mirror.number == before + 2


def test_a_gap_of_the_callers() -> None:
    """Steps that the caller lost void the set, and the listener hears of it by the number."""
    mirror = LaneMirror()
    mirror.take(0, Decode(1, 10), [], [Joined("a", 10)], [], fresh=True)
    before = mirror.number
    assert mirror.take(5, Decode(1, 7), [], [Joined("b", 7)], [], fresh=False) is None
    assert (mirror.number, list(mirror.members)) == (before + 2, ["b"])


def test_lanes_are_forgotten(monkeypatch: object) -> None:
    """Of more lanes than are remembered the one that was silent for longest goes, also where its set was never left."""
    kept = Lanes()
    engine = EngineId("g", 0)
    for number in range(lanes.LIMIT + 10):
        kept.of(engine, number).take(0, Decode(1, 1), [], [Joined("r", 1)], [], fresh=True)
        kept.of(engine, 0)
    assert len(kept) == lanes.LIMIT
    assert kept.of(engine, 0).members
    assert not kept.of(engine, 1).members


steps = st.lists(
    st.tuples(
        st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 50)), max_size=2),
        st.lists(st.sampled_from("abcd"), max_size=2),
        st.lists(st.sampled_from("abcd"), max_size=1),
        st.booleans(),
        st.booleans(),
        st.integers(1, 3),
    ),
    max_size=30,
)


@given(steps)
def test_mirror_and_ledger_agree(
    told: list[tuple[list[tuple[str, int]], list[str], list[str], bool, bool, int]],
) -> None:
    """Whatever joins, leaves, drafts, is lost or is told anew: the listener's set is the program's."""
    mirror, lane, seq = LaneMirror(), Lane(), 0
    for joins, left, drafted, decoding, fresh, stride in told:
        seq += stride
        joined, computed = [Joined(*member) for member in joins], [Prefill(name, 2, 5) for name in drafted]
        decode = Decode(1, 0) if decoding else Decode(0, 0)
        whole = mirror.take(seq, decode, computed, joined, left, fresh=fresh)
        lane.follow(mirror.number)
        for name in left if whole is None else []:
            lane.leave(name)
        for member in joined if whole is None else whole:
            lane.join(member.id, Activity(Key("g", member.id), 0), member.context)
        for row in computed:
            lane.leave(row.id)
        Step(EngineId("g", 0), lane, 0, 1, (), lane.changes, decode.n > 0, 0.0)
        count = mirror._count
        found = {name: offset + lane.tick for name, (_, offset) in lane.members.items()}
        assert found == {name: context + count - since for name, (context, since) in mirror.members.items()}
