"""Shares of one request from two ledgers, joined; figures by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from melodi_otel.attribution.merging import merge_shares
from melodi_otel.attribution.meter import Key, Share

S = 1_000_000_000
FIRST = Share(
    key=Key("g", "a"),
    device="GPU-0",
    t0_ns=0,
    t1_ns=4 * S,
    joules=100.0,
    dynamic=80.0,
    static=20.0,
    prefill=30.0,
    decode=50.0,
    uncertainty=3.0,
    method="step",
    quality="measured",
    coverage=1.0,
    concurrency=2.0,
    final_ns=4 * S,
    exclusive=True,
    rollup=110.0,
)
SECOND = replace(
    FIRST,
    t0_ns=4 * S,
    t1_ns=10 * S,
    joules=200.0,
    dynamic=150.0,
    static=50.0,
    prefill=0.0,
    decode=150.0,
    uncertainty=4.0,
    concurrency=7.0,
    final_ns=11 * S,
    rollup=200.0,
)
UNKNOWN = replace(
    SECOND,
    joules=None,
    dynamic=None,
    static=None,
    prefill=None,
    decode=None,
    uncertainty=None,
    quality="unavailable",
    coverage=0.0,
    reason="device_lost",
    exclusive=None,
    rollup=None,
)


def test_joules_add_and_uncertainties_add_in_squares() -> None:
    """100 ± 3 J in 4 s and 200 ± 4 J in the 6 s that follow: 300 ± 5 J in 10 s, with 2 x 0.4 + 7 x 0.6 requests."""
    assert merge_shares([FIRST], [SECOND]) == [
        replace(
            FIRST,
            t1_ns=10 * S,
            joules=300.0,
            dynamic=230.0,
            static=70.0,
            prefill=30.0,
            decode=200.0,
            uncertainty=5.0,
            concurrency=pytest.approx(5.0),  # type: ignore[arg-type]
            final_ns=11 * S,
            rollup=310.0,
        )
    ]


def test_a_gap_between_them_lowers_coverage() -> None:
    """4 s and 4 s of 10 s, 2 s without a ledger: coverage 0.8, partial, and concurrency is the mean of what was seen."""
    (share,) = merge_shares([FIRST], [replace(SECOND, t0_ns=6 * S)])
    assert (share.coverage, share.quality, share.reason) == (0.8, "partial", "no_samples")
    assert share.concurrency == pytest.approx(4.5)


def test_opened_again_from_its_own_start_says_the_same() -> None:
    """The second ledger was told of all 10 s and covered the last 4 of them: 0.8 again."""
    (share,) = merge_shares([FIRST], [replace(SECOND, t0_ns=0, coverage=0.4)])
    assert (share.coverage, share.quality) == (0.8, "partial")
    assert share.concurrency == pytest.approx(4.5)


def test_a_small_gap_is_full() -> None:
    """50 ms of 10 s are missing: 0.995 is covered enough."""
    (share,) = merge_shares([FIRST], [replace(SECOND, t0_ns=4 * S + S // 20)])
    assert (share.coverage, share.quality, share.reason) == (pytest.approx(0.995), "measured", None)


def test_a_reason_that_is_there_stays() -> None:
    """A gap does not hide that the counter was reset, whichever of the two says so."""
    reset = replace(SECOND, t0_ns=6 * S, coverage=0.5, quality="partial", reason="counter_reset")
    (share,) = merge_shares([replace(FIRST, reason="no_samples")], [reset])
    assert (share.reason, share.quality, share.coverage) == ("counter_reset", "partial", pytest.approx(0.6))


@pytest.mark.parametrize(("joules", "method"), [(4.0, "step"), (6.0, "window")])
def test_the_method_holds_five_percent(joules: float, method: str) -> None:
    """4 J of 104 J by a worse tier do not count, 6 J of 106 J do."""
    (share,) = merge_shares([FIRST], [replace(SECOND, joules=joules, method="window", quality="interpolated")])
    assert (share.method, share.quality) == (method, "interpolated")


@pytest.mark.parametrize("known_first", [True, False])
def test_the_known_part_stands(known_first: bool) -> None:
    """One part has no joules: the other's stand, as partial, with the reason why; both unknown stays unavailable."""
    known, unknown = (FIRST, UNKNOWN) if known_first else (replace(SECOND, joules=100.0), replace(UNKNOWN, t0_ns=0))
    (share,) = merge_shares([known], [unknown]) if known_first else merge_shares([unknown], [known])
    assert (share.joules, share.uncertainty, share.rollup) == (100.0, known.uncertainty, known.rollup)
    assert (share.quality, share.reason) == ("partial", "device_lost")
    assert share.coverage == pytest.approx(0.4 if known_first else 0.6)
    (neither,) = merge_shares([UNKNOWN], [UNKNOWN])
    assert (neither.joules, neither.quality, neither.coverage, neither.reason) == (
        None,
        "unavailable",
        0.0,
        "device_lost",
    )


def test_a_split_is_known_where_both_know_it() -> None:
    """50 J without phases: prefill and decode of the sum are unknown, dynamic and static are known; 0 J hide nothing."""
    plain = replace(SECOND, joules=50.0, dynamic=40.0, static=10.0, prefill=None, decode=None)
    (share,) = merge_shares([FIRST], [plain])
    assert (share.dynamic, share.static, share.prefill, share.decode) == (120.0, 30.0, None, None)
    idle = replace(plain, joules=10.0, dynamic=0.0)
    (share,) = merge_shares([FIRST], [idle])
    assert (share.dynamic, share.static, share.prefill, share.decode) == (80.0, 30.0, 30.0, 50.0)
    unsplit = replace(plain, dynamic=None, static=None)
    (share,) = merge_shares([FIRST], [unsplit])
    assert (share.joules, share.dynamic, share.static, share.prefill) == (150.0, None, None, None)


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [(True, True, True), (True, False, False), (None, False, False), (True, None, None), (None, None, None)],
)
def test_exclusive_needs_both(one: bool | None, other: bool | None, both: bool | None) -> None:
    """Alone on the device only if it was so in both parts; not alone in one part is not alone."""
    (share,) = merge_shares([replace(FIRST, exclusive=one)], [replace(SECOND, exclusive=other)])
    assert share.exclusive is both


def test_a_device_of_one_part_keeps_its_share() -> None:
    """Devices of either part are there, in the order of the first, each as its ledger told it."""
    cpu, memory = replace(FIRST, device="cpu-0"), replace(SECOND, device="dram-0")
    assert merge_shares([cpu, FIRST], [memory])[0] is cpu
    assert merge_shares([cpu, FIRST], [memory])[2] is memory
    assert merge_shares([], [SECOND]) == [SECOND]
    assert merge_shares([FIRST], []) == [FIRST]


def test_an_instant_has_the_lower_coverage() -> None:
    """Two parts without length: nothing can be weighed by time."""
    point = replace(FIRST, t1_ns=0, coverage=1.0, concurrency=1.0)
    (share,) = merge_shares([point], [replace(point, coverage=0.0, concurrency=3.0, joules=1.0)])
    assert (share.coverage, share.concurrency, share.joules) == (0.0, 3.0, 101.0)


def test_many_small_parts_lose_nothing() -> None:
    """A thousand parts of 0.1 J on top of 1e9 J: their sum to the last digit that a float has."""
    whole = [replace(FIRST, joules=1e9)]
    for number in range(1000):
        whole = merge_shares(whole, [replace(SECOND, joules=0.1, t1_ns=(5 + number) * S)])
    assert whole[0].joules is not None
    assert math.isclose(whole[0].joules, 1e9 + 100.0, rel_tol=1e-12)
