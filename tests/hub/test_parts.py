"""Parts of a request: whatever becomes of one, whoever waits for their sum gets it."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from melodi_otel.attribution.meter import Key, Share
from melodi_otel.hub.client import give
from melodi_otel.hub.parts import Orphan, closed_part, settle_orphans, summed
from melodi_otel.hub.wire import Told

KEY = Key("g", "r")
S = 1_000_000_000


def share(t0: int, t1: int, joules: float, **more: Any) -> Share:
    """A share of GPU-0 in seconds and J."""
    known: dict[str, Any] = {"quality": "measured", "coverage": 1.0, "concurrency": 1.0, "final_ns": t1 * S, **more}
    return Share(
        Key("1:g", "r"), "GPU-0", t0 * S, t1 * S, joules, joules, 0.0, None, None, 0.0, method="exclusive", **known
    )


def orphan(*acknowledged: Share) -> Orphan:
    """One that ended at 4 s."""
    unknown = share(0, 4, 0.0, quality="unavailable", reason="no_samples")
    return Orphan(KEY, Future(), 4 * S, list(acknowledged), [unknown])


def test_what_the_next_hub_knows_wins() -> None:
    """Final joules are taken as they are; provisional ones get their gap; both under the program's own name."""
    final, so_far = orphan(share(0, 1, 1.0)), orphan(share(0, 1, 1.0))
    settle_orphans([final], {"r": Told("r", True, [share(0, 4, 40.0)])})
    settle_orphans([so_far], {"r": Told("r", False, [share(0, 2, 20.0)])})
    (whole,), (part,) = final.part.result(0), so_far.part.result(0)
    assert (whole.joules, whole.coverage, whole.key) == (40.0, 1.0, KEY)
    assert (part.joules, part.coverage, part.t1_ns, part.key) == (20.0, 0.5, 4 * S, KEY)


def test_else_what_was_acknowledged_else_nothing_known() -> None:
    """Without an answer the acknowledged joules count; without those the gap is told."""
    known, unknown = orphan(share(0, 1, 10.0)), orphan()
    settle_orphans([known, unknown], {})
    assert (known.part.result(0)[0].joules, known.part.result(0)[0].coverage) == (10.0, 0.25)
    assert unknown.part.result(0) == unknown.unknown


def test_an_answer_is_used_once() -> None:
    """A request with two orphaned parts gets the next hub's joules in one of them."""
    first, second = orphan(), orphan()
    settle_orphans([first, second], {"r": Told("r", False, [share(0, 4, 40.0)])})
    assert [first.part.result(0)[0].joules, second.part.result(0)[0].joules] == [40.0, 0.0]


def test_a_part_that_was_whole_is_left_alone() -> None:
    """Shares that reach the end have no gap."""
    assert closed_part(KEY, [share(0, 4, 40.0)], 4 * S) == [share(0, 4, 40.0)]


def test_the_sum_comes_whatever_a_part_is() -> None:
    """A part that failed or was cancelled counts as nothing; the sum carries the request's own name."""
    good: Future[list[Share]] = Future()
    failed: Future[list[Share]] = Future()
    cancelled: Future[list[Share]] = Future()
    whole = summed(KEY, [good, failed, cancelled])
    failed.set_exception(ValueError("lost"))
    cancelled.cancel()
    assert not whole.done()
    good.set_result([share(0, 4, 40.0)])
    assert [(part.key, part.joules) for part in whole.result(0)] == [(KEY, 40.0)]


def test_resolving_twice_changes_nothing() -> None:
    """Whoever comes second, or late, is not heard."""
    future: Future[int] = Future()
    give(future, 1)
    give(future, 2)
    assert future.result(0) == 1
    gone: Future[int] = Future()
    gone.cancel()
    give(gone, 1)
    assert gone.cancelled()
