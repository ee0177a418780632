"""Replay of hand-made traces: every line kind, with shares that can be checked by eye."""

from __future__ import annotations

import json
from typing import Any

import pytest

from melodi_otel.trace.replay import Report, replay

Lines = list[dict[str, Any]]
BUCKETS = ("attributed", "in_flight", "idle", "tail", "loading", "foreign", "unsampled", "residual")


def gpu(idle_watts: float | None = 50.0, name: str = "G", **more: Any) -> dict[str, Any]:
    return {"kind": "device", "id": name, "type": "gpu", "idle_watts": idle_watts, **more}


def at(t: float, joules: float, device: str = "G") -> dict[str, Any]:
    return {"kind": "sample", "t": t, "device": device, "joules": joules}


def opened(t: float, name: str, **more: Any) -> dict[str, Any]:
    return {"kind": "open", "t": t, "id": name, "engine": "e", "devices": ["G"], "prompt_tokens": 100, **more}


def closed(t: float, name: str, tokens: int | None = 10, outcome: str = "stop", **more: Any) -> dict[str, Any]:
    return {"kind": "close", "t": t, "id": name, "output_tokens": tokens, "outcome": outcome, **more}


def step(t0: float, t1: float, **work: list[int]) -> dict[str, Any]:
    return {"kind": "step", "t0": t0, "t1": t1, "engine": "e", "devices": ["G"], "work": work}


ENGINE = {"kind": "engine", "id": "e", "devices": ["G"], "model": "m", "service": "s"}


def run(lines: Lines, **options: Any) -> tuple[dict[tuple[str, str], dict[str, Any]], dict[str, dict[str, Any]]]:
    """(shares by (id, device), books by device); the books of every trace here balance to 1e-9."""
    out = list(replay([json.dumps(line) for line in lines], **options))
    shares = {(row["id"], row["device"]): row for row in out if row["kind"] == "share"}
    books = {row["device"]: row for row in out if row["kind"] == "books"}
    assert len(shares) == sum(row["kind"] == "share" for row in out), "an id was settled twice"
    for row in books.values():
        assert row["measured"] == pytest.approx(sum(row[name] for name in BUCKETS), abs=1e-9 * max(1, row["measured"]))
    for row in shares.values():
        if row["joules"] is not None:
            assert row["joules"] == row["dynamic"] + row["static"]
    return shares, books


def test_alone_gets_everything_but_idle() -> None:
    """One request from 2 s to 8 s of a device at 100 W with 50 W idle: idle keeps 4 s x 50 W, the request the rest."""
    shares, books = run([gpu(), at(0, 0), opened(2, "a"), at(5, 500), closed(8, "a"), at(10, 1000)])
    share = shares["a", "G"]
    assert (share["joules"], share["static"], share["dynamic"]) == (800.0, 300.0, 500.0)
    assert (share["method"], share["quality"], share["coverage"]) == ("exclusive", "measured", 1.0)
    assert (books["G"]["idle"], books["G"]["attributed"]) == (200.0, 800.0)


def test_two_alike_get_the_same() -> None:
    """Two requests with the same work in the same steps share every joule equally."""
    work = {"a": [100, 0, 100], "b": [100, 0, 100]}
    lines = [gpu(), ENGINE, at(1, 0), opened(1, "a"), opened(1, "b"), step(1, 2, **work), at(2, 200)]
    lines += [step(2, 3, a=[0, 1, 101], b=[0, 1, 101]), closed(3, "a", 2), closed(3, "b", 2), at(3, 300)]
    shares, _ = run(lines)
    for name in ("a", "b"):
        share = shares[name, "G"]
        assert share["joules"] == pytest.approx(150.0, abs=1e-9)
        assert (share["prefill"], share["decode"]) == (pytest.approx(75.0), pytest.approx(25.0))
        assert share["static"] == pytest.approx(50.0)
        assert share["method"] == "step"


def test_roofline_weights_of_a_mixed_step() -> None:
    """A step of one prefill and one decode row is divided by the bytes that each moves.

    8e9 parameters: fixed 16e9 B, 64e6 B per token, 131,072 B per cached token.
      a: prefill 1000 tokens    8e9 + 1000 x 64e6              = 72e9
      b: decode over 500        8e9 + 64e6 + 500 x 131,072     =  8.129536e9
    """
    a, b = 72e9, 8e9 + 64e6 + 500 * 131_072
    lines = [gpu(0.0), ENGINE, at(1, 0), opened(1, "a"), opened(1, "b"), step(1, 2, a=[1000, 0, 1000], b=[0, 1, 501])]
    lines += [closed(2, "a"), closed(2, "b"), at(2, 80.0)]
    shares, _ = run(lines)
    assert shares["a", "G"]["prefill"] == pytest.approx(80 * a / (a + b), rel=1e-12)
    assert shares["b", "G"]["decode"] == pytest.approx(80 * b / (a + b), rel=1e-12)


def test_a_step_across_samples_is_cut_by_time() -> None:
    """A step from 1 s to 4 s pays in each of three intervals what the meter shows there."""
    lines = [gpu(10.0), ENGINE, at(0, 0), opened(1, "a"), at(1, 10), at(2, 110), at(3, 310)]
    lines += [step(1, 4, a=[100, 0, 100]), closed(4, "a", 1), at(4, 400)]
    shares, books = run(lines)
    assert shares["a", "G"]["joules"] == pytest.approx(390.0)
    assert books["G"]["idle"] == pytest.approx(10.0)


def test_queued_pays_nothing() -> None:
    """A request that waits while another computes gets 0 J until it is scheduled."""
    lines = [gpu(), ENGINE, at(0, 0), opened(0, "a"), opened(0, "b"), step(0, 1, a=[100, 0, 100]), closed(1, "a", 1)]
    lines += [at(1, 100), step(1, 2, b=[100, 0, 100]), closed(2, "b", 1), at(2, 200)]
    shares, _ = run(lines)
    assert shares["a", "G"]["joules"] == pytest.approx(100.0)
    assert shares["b", "G"]["joules"] == pytest.approx(100.0)


def test_never_scheduled_is_zero() -> None:
    """A request aborted in the queue used nothing, and that is known."""
    lines = [gpu(), ENGINE, at(0, 0), opened(0, "a"), opened(0, "b"), step(0, 1, a=[100, 0, 100])]
    lines += [closed(1, "a", 1), closed(1, "b", 0, "abort"), at(1, 100), at(2, 150)]
    shares, _ = run(lines)
    assert shares["b", "G"]["joules"] == 0.0
    assert shares["a", "G"]["joules"] == pytest.approx(100.0)


def test_cached_tokens_are_not_charged() -> None:
    """Of two alike prompts the one whose tokens come from the cache pays the cache reads, not the computation."""
    lines = [gpu(0.0), ENGINE, at(0, 0), opened(0, "a"), opened(0, "b", cached_tokens=90)]
    lines += [step(0, 1, a=[100, 0, 100], b=[10, 0, 100]), closed(1, "a", 1), closed(1, "b", 1), at(1, 100)]
    shares, _ = run(lines)
    own = {"a": 8e9 + 100 * 64e6, "b": 8e9 + 10 * 64e6 + 90 * 131_072}
    for name, weight in own.items():
        assert shares[name, "G"]["joules"] == pytest.approx(100 * weight / sum(own.values()), rel=1e-12)


def test_tensor_parallel_sums_devices() -> None:
    """An engine on two devices: each device's joules, divided by the same weights, one share per device."""
    both = ["G", "H"]
    engine = {**ENGINE, "devices": both}
    lines = [gpu(0.0), gpu(0.0, "H"), engine, at(0, 0), at(0, 0, "H"), opened(0, "a", devices=both)]
    lines += [{**step(0, 1, a=[10, 0, 10]), "devices": both}, closed(1, "a", 1), at(1, 100), at(1, 60, "H")]
    shares, _ = run(lines)
    assert (shares["a", "G"]["joules"], shares["a", "H"]["joules"]) == (100.0, 60.0)


def test_engines_on_one_device_share_its_instants() -> None:
    """Static power is divided by the participants of all steps that run at an instant, over all engines."""
    other = {"kind": "engine", "id": "f", "devices": ["G"]}
    lines = [gpu(60.0), ENGINE, other, at(0, 0), opened(0, "a"), opened(0, "b"), opened(0, "c", engine="f")]
    lines += [step(0, 2, a=[0, 1, 101], b=[0, 1, 101]), {**step(0, 2, c=[0, 1, 101]), "engine": "f"}]
    lines += [closed(2, "a", 1), closed(2, "b", 1), closed(2, "c", 1), at(2, 120)]
    shares, _ = run(lines)
    assert [shares[name, "G"]["static"] for name in "abc"] == [pytest.approx(40.0)] * 3


def test_gauge_is_integrated() -> None:
    """100 W for 10 s are 1000 J, whatever the window; a request of 4 s at 20 W idle gets its 4 s."""
    watts = [{"kind": "sample", "t": float(t), "device": "G", "watts": 100.0} for t in range(11)]
    lines = [gpu(20.0, window_s=None), *watts[:4], opened(3, "a"), *watts[4:8], closed(7, "a"), *watts[8:]]
    shares, books = run(lines)
    assert books["G"]["measured"] == pytest.approx(1000.0)
    assert shares["a", "G"]["joules"] == pytest.approx(400.0)


def test_counter_wins_over_gauge() -> None:
    """A device that shows joules and watts is read by its counter."""
    lines: Lines = [gpu(0.0), {"kind": "sample", "t": 0, "device": "G", "joules": 0, "watts": 900}, opened(0, "a")]
    lines += [{"kind": "sample", "t": 1, "device": "G", "watts": 900}, closed(2, "a")]
    lines += [{"kind": "sample", "t": 2, "device": "G", "joules": 10, "watts": 900}]
    assert run(lines)[0]["a", "G"]["joules"] == 10.0


def test_reset_is_not_energy() -> None:
    """A counter that falls has been reset: that second is unknown, coverage says so, nothing is invented."""
    lines = [gpu(0.0), at(0, 1000), opened(0, "a"), at(1, 1100), at(2, 50), at(3, 150), closed(3, "a"), at(4, 151)]
    shares, books = run(lines)
    share = shares["a", "G"]
    assert (share["joules"], share["quality"]) == (200.0, "partial")
    assert share["coverage"] == pytest.approx(2 / 3)
    assert books["G"]["measured"] == 201.0


def test_children_stand_for_their_request() -> None:
    """Rows bound to a request are charged to it; a request of three rows has three parts of the fixed cost."""
    lines = [gpu(0.0), ENGINE, at(0, 0), opened(0, "a"), opened(0, "b")]
    lines += [{"kind": "bind", "t": 0, "id": "a", "child": f"a.{n}"} for n in range(3)]
    lines += [step(0, 1, **{"a.0": [0, 1, 1], "a.1": [0, 1, 1], "a.2": [0, 1, 1], "b": [0, 1, 1]})]
    lines += [closed(1, "a", 3), closed(1, "b", 1), at(1, 100)]
    shares, _ = run(lines)
    assert shares["a", "G"]["joules"] == pytest.approx(75.0)
    assert shares["b", "G"]["joules"] == pytest.approx(25.0)


def test_cpu_time_parts_the_package() -> None:
    """The tree had 6 of the host's 8 busy CPU seconds: it gets 3/4 of the dynamic joules, the rest is foreign."""
    cpu = {"kind": "device", "id": "C", "type": "cpu", "idle_watts": 20.0}
    lines: Lines = [cpu, at(0, 0, "C"), {"kind": "cpu", "t": 0, "device": "C", "busy_s": 1, "host_busy_s": 2}]
    lines += [opened(0, "a", devices=["C"]), closed(10, "a"), at(10, 1000, "C")]
    lines += [{"kind": "cpu", "t": 10, "device": "C", "busy_s": 7, "host_busy_s": 10}]
    shares, books = run(lines)
    share = shares["a", "C"]
    assert (share["static"], share["dynamic"]) == (pytest.approx(200.0), pytest.approx(600.0))
    assert (share["method"], share["quality"]) == ("process", "measured")
    assert books["C"]["foreign"] == pytest.approx(200.0)


def test_foreign_share_is_kept_apart() -> None:
    """A quarter of the dynamic joules belongs to other processes from the time it is told."""
    foreign = {"kind": "foreign", "t": 0, "device": "G", "share": 0.25}
    shares, books = run([gpu(), at(0, 0), foreign, opened(0, "a"), closed(10, "a"), at(10, 900)])
    assert shares["a", "G"]["dynamic"] == pytest.approx(300.0)
    assert shares["a", "G"]["static"] == pytest.approx(500.0)
    assert books["G"]["foreign"] == pytest.approx(100.0)


def test_loading_has_its_own_bucket() -> None:
    """Joules while an engine loads are loading, before any request; afterwards idle."""
    engine = {**ENGINE, "t": 0.0, "state": "loading"}
    ready = {**ENGINE, "t": 4.0, "state": "ready"}
    lines = [gpu(), at(0, 0), engine, at(2, 300), ready, at(4, 700), at(10, 1000)]
    _, books = run(lines)
    assert books["G"]["loading"] == pytest.approx(700.0)
    assert books["G"]["idle"] == pytest.approx(300.0)


def test_tail_after_the_last_work() -> None:
    """Power above idle in the first second after work is the work's tail, later it is idle."""
    lines = [gpu(), at(0, 0), opened(0, "a"), closed(1, "a"), at(1, 200), at(1.5, 265), at(2.5, 325)]
    _, books = run(lines)
    assert books["G"]["tail"] == pytest.approx(40.0 + 10.0)
    assert books["G"]["idle"] == pytest.approx(75.0)


def test_token_counters_make_slices() -> None:
    """Without steps the token counts known at each sample divide: 30 and 10 tokens over the same context."""
    lines = [gpu(0.0), ENGINE, at(0, 0), opened(0, "a", prompt_tokens=0), opened(0, "b", prompt_tokens=0)]
    for second, (a, b) in enumerate([(30, 10), (60, 20)], 1):
        lines += [at(second, 100.0 * second)]
        for name, tokens in (("a", a), ("b", b)):
            lines.append({"kind": "tokens", "t": float(second), "id": name, "output_tokens": tokens})
    lines += [closed(2, "a", 60), closed(2, "b", 20), at(3, 200.5)]
    shares, _ = run(lines)
    assert {row["method"] for row in shares.values()} == {"slice"}
    assert shares["a", "G"]["joules"] / shares["b", "G"]["joules"] == pytest.approx(3.0, rel=0.02)
    assert sum(row["joules"] for row in shares.values()) == pytest.approx(200.0)


def test_phases_split_prefill_from_decode() -> None:
    """A first-token time gives the phases: alone, all joules, and a split of the dynamic ones."""
    lines = [gpu(0.0), at(0, 0), opened(0, "a"), opened(0, "b"), closed(4, "a", 20, first_token_t=1.0)]
    lines += [closed(4, "b", 20, first_token_t=1.0), at(4, 400)]
    shares, _ = run(lines)
    for share in shares.values():
        assert share["method"] == "phase"
        assert share["quality"] == "interpolated"
        assert share["joules"] == pytest.approx(200.0)
        assert share["prefill"] + share["decode"] == pytest.approx(200.0)
        assert share["prefill"] > 0 < share["decode"]


def test_start_and_end_only_is_equal() -> None:
    """Without any count the joules of an instant are shared equally: 10 s alone and 10 s together."""
    bare = {"prompt_tokens": None}
    lines = [gpu(0.0), at(0, 0), opened(0, "a", **bare), at(10, 1000), opened(10, "b", **bare), at(20, 2000)]
    lines += [closed(20, "a", None), closed(20, "b", None), at(21, 2000.5)]
    shares, _ = run(lines)
    assert shares["a", "G"]["joules"] == pytest.approx(1500.0)
    assert shares["b", "G"]["joules"] == pytest.approx(500.0)
    assert shares["b", "G"]["method"] == "equal"


def test_anonymous_work_is_booked() -> None:
    """An id without `open` is charged under its own name."""
    shares, books = run([gpu(0.0), ENGINE, at(0, 0), step(0, 1, x=[0, 1, 5]), at(1, 100), at(9, 101)])
    assert shares["x", "G"]["joules"] == pytest.approx(100.0)
    assert books["G"]["attributed"] == pytest.approx(100.0)


def test_a_late_open_adopts_its_steps() -> None:
    """An open that comes within 5 s of the first step takes that step over."""
    lines = [
        gpu(0.0),
        ENGINE,
        at(0, 0),
        step(0, 1, a=[0, 1, 5]),
        at(1, 100),
        opened(0, "a"),
        closed(1, "a", 1),
        at(2, 101),
    ]
    assert run(lines)[0]["a", "G"]["joules"] == pytest.approx(100.0)


def test_steps_after_a_close_are_not_its_own() -> None:
    """The share ends with the last step that began before the close; what comes later is anonymous."""
    lines = [gpu(0.0), ENGINE, at(0, 0), opened(0, "a"), step(0, 1, a=[10, 0, 10]), closed(0.5, "a", 0, "abort")]
    lines += [at(1, 100), step(1, 2, a=[0, 1, 11]), at(2, 200), at(9, 201)]
    shares, _ = run(lines)
    assert shares["a", "G"]["joules"] == pytest.approx(100.0)
    assert shares["anonymous", "G"]["joules"] == pytest.approx(100.0)


def test_open_requests_are_in_flight() -> None:
    """A request that never closes holds what it has accrued."""
    _, books = run([gpu(), ENGINE, at(0, 0), opened(0, "a"), step(0, 1, a=[10, 0, 10]), at(1, 100)])
    assert books["G"]["in_flight"] == pytest.approx(100.0)


def test_nested_request_owns_its_time() -> None:
    """While a nested request is open its outer one gets nothing."""
    bare = {"prompt_tokens": None, "engine": None}
    lines = [gpu(0.0), at(0, 0), opened(0, "out", **bare), at(4, 40), opened(4, "in", parent="out", **bare), at(6, 260)]
    lines += [closed(6, "in", None), at(10, 300), closed(10, "out", None), at(11, 300.5)]
    shares, _ = run(lines)
    assert shares["in", "G"]["joules"] == pytest.approx(220.0)
    assert shares["out", "G"]["joules"] == pytest.approx(80.0)


def test_policy_dynamic_leaves_static_idle() -> None:
    """Under `dynamic` requests pay what they add."""
    shares, books = run([gpu(), at(0, 0), opened(0, "a"), closed(10, "a"), at(10, 900)], policy="dynamic")
    assert (shares["a", "G"]["static"], shares["a", "G"]["dynamic"]) == (0.0, 400.0)
    assert books["G"]["idle"] == pytest.approx(500.0)


def test_baseline_is_learnt_without_requests() -> None:
    """Idle seconds before the first request teach 30 W, which idle keeps afterwards."""
    idle = [at(t, 30.0 * t) for t in range(6)]
    lines = [gpu(None), *idle, opened(5, "a"), closed(7, "a"), at(7, 350.0)]
    shares, _ = run(lines)
    assert shares["a", "G"]["static"] == pytest.approx(60.0)
    assert shares["a", "G"]["dynamic"] == pytest.approx(140.0)


def test_a_held_counter_waits_for_its_update() -> None:
    """A reading that repeats the last value within two periods is no 0 J interval: the next change covers both."""
    lines = [gpu(0.0, period_s=0.1), at(0, 0), opened(0, "a"), at(0.1, 0), at(0.2, 20), closed(0.2, "a"), at(0.3, 21)]
    assert run(lines)[0]["a", "G"]["joules"] == pytest.approx(20.0)


def test_lost_samples_are_one_interval() -> None:
    """Readings that are missing merge: the steps inside shape the longer interval."""
    lines = [gpu(0.0), ENGINE, at(0, 0), opened(0, "a"), step(0, 1, a=[10, 0, 10]), closed(1, "a", 1), opened(1, "b")]
    lines += [step(1, 2, b=[10, 0, 10]), closed(2, "b", 1), at(2, 200)]
    shares, _ = run(lines)
    assert [shares[name, "G"]["joules"] for name in "ab"] == [pytest.approx(100.0)] * 2


@pytest.mark.parametrize("method", ["slice", "phase", "window", "equal"])
def test_method_limits_the_evidence(method: str) -> None:
    """A weaker method on a trace with steps is used and named, and the books still balance."""
    lines = [gpu(), ENGINE, at(0, 0), opened(0, "a"), opened(0, "b", prompt_tokens=400)]
    lines += [step(0, 0.5, a=[100, 0, 100], b=[400, 0, 400]), at(0.5, 60)]
    for n in range(1, 6):
        lines += [step(0.5 * n, 0.5 * n + 0.5, a=[0, 1, 100 + n], b=[0, 1, 400 + n]), at(0.5 * n + 0.5, 60.0 * (n + 1))]
    lines += [closed(3, "a", 6), closed(3, "b", 6), at(4, 410)]
    shares, _ = run(lines, method=method)
    assert {row["method"] for row in shares.values()} == {method}
    assert shares["a", "G"]["joules"] + shares["b", "G"]["joules"] == pytest.approx(360.0)


def test_broken_and_unknown_lines_are_counted() -> None:
    """A broken line is skipped with its number; an unknown kind or key is left out with one warning."""
    raw = [json.dumps(gpu(0.0, colour="red")), "{oops", '{"kind":"weather","t":1}', json.dumps(at(0, 0))]
    raw += ['{"kind":"sample","t":1,"device":"G"}', json.dumps(opened(0, "a")), json.dumps(closed(1, "a"))]
    raw += [json.dumps(at(1, 5))]
    report = Report()
    rows = list(replay(raw, report=report))
    assert [number for number, _ in report.first_broken] == [2, 5]
    assert report.unknown == {"key colour": 1, "kind weather": 1}
    assert rows[0]["joules"] == 5.0


def test_final_times_are_when_it_was_known() -> None:
    """A share is final when the timeline covers its end and the step then running is known."""
    lines = [gpu(0.0), ENGINE, at(0, 0), opened(0, "a"), opened(0, "b"), step(0, 0.4, a=[9, 0, 9], b=[9, 0, 9])]
    lines += [closed(0.4, "a", 1), at(0.5, 50), step(0.4, 0.8, b=[0, 1, 10]), closed(0.8, "b", 2), at(1.0, 100)]
    shares, _ = run(lines)
    assert shares["a", "G"]["t_final"] == 0.8
    assert shares["b", "G"]["t_final"] == 1.0


def test_a_request_of_another_thread_is_in_the_only_block() -> None:
    """A request without a parent belongs to the one block that is open, which then owns only the rest."""
    bare = {"prompt_tokens": None}
    lines = [gpu(0.0), ENGINE, {**opened(0, "block", **bare), "engine": "", "devices": None}, at(0, 0)]
    lines += [
        opened(1, "a"),
        step(1, 2, a=[9, 0, 9]),
        at(1, 10),
        closed(2, "a", 1),
        at(2, 110),
        closed(3, "block", None),
    ]
    lines += [at(3, 120)]
    shares, _ = run(lines)
    assert shares["a", "G"]["joules"] == pytest.approx(100.0)


def test_a_sliver_does_not_claim_the_interval() -> None:
    """A request that begins 1 ms before the end of a busy second gets at most 20 times its time's part of the second."""
    lines = [gpu(0.0), at(0, 0), opened(0.999, "a"), at(1.0, 100), closed(2, "a"), at(2, 150)]
    shares, books = run(lines)
    assert shares["a", "G"]["joules"] == pytest.approx(100 * 0.001 * 20 + 50)
    assert books["G"]["idle"] == pytest.approx(98.0)


def test_a_device_may_be_unannounced() -> None:
    """A sample of a device without a line of its own makes it known; its idle power is learnt."""
    shares, _ = run([at(0, 0), at(1, 20), opened(1, "a"), at(2, 120), closed(2, "a"), at(3, 141)])
    assert shares["a", "G"]["static"] == pytest.approx(20.0)
    assert shares["a", "G"]["dynamic"] == pytest.approx(80.0)


def test_engines_may_be_implied() -> None:
    """Neither open nor step names an engine: the steps still find their requests, and are waited for."""
    bare = {"engine": None, "devices": None}
    lines = [gpu(0.0), at(0, 0), {**opened(0, "a"), **bare}, {**opened(0, "b"), **bare}, at(1, 100)]
    for t0, work in ((0, {"a": [0, 1, 11], "b": [0, 1, 11]}), (1.5, {"a": [0, 1, 12]})):
        lines.append({"kind": "step", "t0": t0, "t1": t0 + 1.5, "devices": ["G"], "work": work})
        lines.append(at(t0 + 1.5, 100 * (t0 + 1.5)))
    lines += [closed(3, "a", 2), closed(3, "b", 1), at(4, 301)]
    shares, _ = run(lines)
    assert shares["b", "G"]["joules"] == pytest.approx(75.0)
    assert shares["a", "G"]["joules"] == pytest.approx(225.0)
    assert shares["b", "G"]["method"] == "step"


def test_a_long_step_is_waited_for() -> None:
    """A step of 4 s is known when it ends; the readings inside it wait for it."""
    lines = [gpu(0.0), ENGINE, at(0, 0), opened(0, "a"), opened(0, "b"), step(0, 0.1, a=[0, 1, 5], b=[0, 1, 5])]
    lines += [at(t, 100.0 * t) for t in (1, 2, 3, 4)]
    lines += [step(0.1, 4.1, a=[400, 0, 405], b=[0, 1, 6]), closed(4.1, "a", 1), closed(4.1, "b", 1), at(5, 410.5)]
    shares, _ = run(lines)
    assert {row["method"] for row in shares.values()} == {"step"}
    assert shares["a", "G"]["joules"] + shares["b", "G"]["joules"] == pytest.approx(410.5)
    assert shares["a", "G"]["prefill"] > 250.0


def test_peaks_of_the_device_balance_compute_and_memory() -> None:
    """A device of 100 FLOP per byte makes 2 x 8e9 / 100 = 160e6 bytes of a token."""
    a, b = 8e9 + 1000 * 160e6, 8e9 + 160e6 + 500 * 131_072
    lines = [gpu(0.0, peak_flops=1e14, bytes_per_s=1e12), at(1, 0)]
    lines += [opened(1, "a", engine=None), opened(1, "b", engine=None)]
    lines += [
        {**step(1, 2, a=[1000, 0, 1000], b=[0, 1, 501]), "engine": None},
        closed(2, "a"),
        closed(2, "b"),
        at(2, 80),
    ]
    shares, _ = run(lines)
    assert shares["a", "G"]["prefill"] == pytest.approx(80 * a / (a + b), rel=1e-12)


def test_devices_divide_their_slices_each_for_itself() -> None:
    """Two devices of the same power see the same prompt: both have the same share and the same prefill part."""
    both = ["G", "H"]
    lines = [gpu(0.0), gpu(0.0, "H"), {**ENGINE, "devices": both}, at(0, 0), at(0, 0, "H")]
    lines += [opened(0, "a", devices=both), opened(0, "b", devices=both, prompt_tokens=9)]
    lines += [closed(2, "a", 20, first_token_t=1.0), closed(2, "b", 30, first_token_t=0.2), at(2, 200), at(2, 200, "H")]
    shares, _ = run(lines)
    for name in ("a", "b"):
        one, other = shares[name, "G"], shares[name, "H"]
        assert one["prefill"] > 0
        assert (one["joules"], one["prefill"]) == (pytest.approx(other["joules"]), pytest.approx(other["prefill"]))


def test_late_work_while_late_work_settles() -> None:
    """Anonymous work that goes on after a pause of 6 s, while its first part still waits for a reading, is all booked."""
    lines = [gpu(0.0), ENGINE, at(0, 0), opened(0, "a"), step(0, 1, a=[9, 0, 9]), closed(1, "a", 1), at(1, 100)]
    lines += [step(1, 2, a=[0, 1, 10]), {"kind": "bind", "t": 8.0, "id": "none", "child": "x"}]
    lines += [step(8, 9, a=[0, 1, 11]), at(9, 300), at(20, 301)]
    shares, books = run(lines)
    assert shares["a", "G"]["joules"] == pytest.approx(100.0)
    assert shares["anonymous", "G"]["joules"] == pytest.approx(200.0)
    assert books["G"]["in_flight"] == 0.0


def test_an_open_may_come_after_its_id_was_given_up() -> None:
    """An id that nobody opened for more than 5 s, but that has not settled yet, is still adopted whole."""
    lines = [
        gpu(0.0),
        ENGINE,
        at(0, 0),
        step(0, 1, a=[9, 0, 9]),
        {"kind": "bind", "t": 8.0, "id": "none", "child": "x"},
    ]
    lines += [opened(0, "a"), step(8, 9, a=[0, 1, 10]), closed(9, "a", 2), at(9, 300), at(20, 301)]
    shares, _ = run(lines)
    assert shares["a", "G"]["joules"] == pytest.approx(300.0)
