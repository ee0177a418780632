"""The ledger's own promises: devices, late opens, shares without a meter, books of a forked child."""

from __future__ import annotations

import logging

import pytest

from melodi_otel.attribution.engines import Work
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import EngineId, Key, Prefill, Share
from melodi_otel.devices import Device

S = 1_000_000_000
ENGINE = EngineId("g", 0)


def ledger(*names: str, **options: object) -> Ledger:
    made = Ledger(patience_s=None, **options)  # type: ignore[arg-type]
    for name in names:
        made.device(Device(name, "cpu" if name.startswith("cpu") else "gpu", idle_watts=0.0))
        made.counter(name, 0, 0.0)
    return made


def one(made: Ledger, **opened: object) -> list[Share]:
    """A request of one second at 100 W on every device."""
    made.open(Key("g", "a"), 0, **opened)  # type: ignore[arg-type]
    future = made.close(Key("g", "a"), S, 1, "stop")
    for name in made._core.accounts or [device.id for device in made._devices]:
        made.counter(name, S, 100.0)
    made.settle(S)
    return future.result(0)


def test_cpu_and_memory_are_always_there() -> None:
    """A request with its own accelerator is charged for that and for the host's packages, not for other accelerators."""
    made = ledger("GPU-0", "GPU-1", "cpu-0", host_devices=("cpu-0",))
    assert {share.device for share in one(made, engine=ENGINE, devices=("GPU-1",))} == {"GPU-1", "cpu-0"}


def test_unknown_devices_are_assumed() -> None:
    """An engine that does not know its devices gets all of them, and every share says that this was assumed."""
    shares = one(ledger("GPU-0", "GPU-1"), engine=ENGINE)
    assert {share.device for share in shares} == {"GPU-0", "GPU-1"}
    assert {(share.reason, share.quality) for share in shares} == {("devices_assumed", "interpolated")}


def test_configured_devices_win() -> None:
    """MELODI_ENGINE_DEVICES says where every engine runs."""
    made = ledger("GPU-0", "GPU-1", engine_devices=("GPU-1",))
    made.engine(ENGINE, 0, devices=("GPU-0",))
    assert [share.device for share in one(made, engine=ENGINE, devices=("GPU-0",))] == ["GPU-1"]


def test_a_slice_is_charged_on_its_board() -> None:
    """Who computes on a MIG device gets joules of its board, and they are assumed where the board is metered as a whole."""
    made = ledger("GPU-0", "GPU-1")
    made.slice_of("MIG-a", "GPU-0")
    shares = one(made, engine=ENGINE, devices=("MIG-a",))
    assert [(share.device, share.joules) for share in shares] == [("GPU-0", 100.0)]
    assert (shares[0].quality, shares[0].reason) == ("interpolated", "devices_assumed")


def test_a_step_on_a_slice_is_one_on_its_board() -> None:
    """Steps that name a slice count on its board."""
    made = ledger("GPU-0")
    made.slice_of("MIG-a", "GPU-0")
    made.open(Key("g", "a"), 0, engine=ENGINE, devices=("MIG-a",))
    made.step(ENGINE, 0, 1, 0, S, ("MIG-a",), prefill=[Prefill("a", 10, 0)])
    future = made.close(Key("g", "a"), S, 1, "stop")
    made.counter("GPU-0", S, 100.0)
    made.settle(S)
    assert [(share.device, share.joules, share.method) for share in future.result(0)] == [("GPU-0", 100.0, "exclusive")]


def test_one_phase_of_a_request_is_partial() -> None:
    """Of a request whose other phase another engine computes everything here is covered, and it says that it is a part."""
    (share,) = one(ledger("GPU-0"), engine=ENGINE, devices=("GPU-0",), reason="phase_elsewhere")
    assert (share.joules, share.coverage, share.quality, share.reason) == (100.0, 1.0, "partial", "phase_elsewhere")


def test_part_of_a_group_is_partial() -> None:
    """Two GPUs seen of a world of four: coverage one half, and the reason why."""
    made = ledger("GPU-0", "GPU-1")
    made.engine(ENGINE, 0, devices=("GPU-0", "GPU-1"), world=4)
    for share in one(made, engine=ENGINE):
        assert (share.quality, share.reason, share.coverage) == ("partial", "devices_elsewhere", 0.5)


def test_without_devices_the_future_still_comes() -> None:
    """No meter: a closed request is settled at once, with no share."""
    made = Ledger()
    made.open(Key("g", "a"), 0)
    future = made.close(Key("g", "a"), S, 1, "stop")
    made.settle(S)
    assert future.result(0) == []


def test_patience_ends(caplog: pytest.LogCaptureFixture) -> None:
    """A meter that falls silent holds a request for so long; then it is settled with what is covered."""
    made = Ledger(patience_s=5.0)
    made.device(Device("GPU-0", "gpu"))
    made.counter("GPU-0", 0, 0.0)
    made.open(Key("g", "a"), 0)
    made.counter("GPU-0", S, 50.0)
    future = made.close(Key("g", "a"), 2 * S, 1, "stop")
    made.settle(6 * S)
    assert not future.done()
    made.settle(8 * S)
    (share,) = future.result(0)
    assert (share.joules, share.quality, share.reason) == (50.0, "partial", "no_samples")


def test_a_bad_message_hurts_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    """A message that cannot be used is refused and counted; what follows takes effect."""
    made = ledger("GPU-0")
    made.step(ENGINE, 0, 1, 0, "later")  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        assert one(made)[0].joules == 100.0
    assert made.refused == 1


def test_a_failing_probe_is_left_alone() -> None:
    """A probe that raises is not asked again, and its request is settled."""
    made = ledger("GPU-0")

    def broken() -> int:
        raise RuntimeError

    assert one(made, probe=broken)[0].joules == 100.0


def test_reset_starts_over() -> None:
    """After a fork the child has the same devices and empty books; what was open belongs to the parent."""
    made = ledger("GPU-0")
    made.open(Key("g", "parent's"), 0)
    made.settle(0)
    made.reset()
    made.settle(0)
    view = made.snapshot()
    assert view.active == {}
    assert view.books["GPU-0"].measured == 0.0


def test_watch_counts_open_requests() -> None:
    """Whoever paces the sampler learns of every open and close."""
    seen: list[tuple[int, int]] = []
    made = Ledger(watch=lambda count, t_ns: seen.append((count, t_ns)))
    made.open(Key("g", "a"), 1)
    made.open(Key("g", "b"), 2)
    made.close(Key("g", "a"), 3, None, "stop")
    assert seen == [(1, 1), (2, 2), (1, 3)]


def test_opened_twice_is_once(caplog: pytest.LogCaptureFixture) -> None:
    """The second open of a key is left out with a warning; closing twice gives an empty result."""
    made = ledger("GPU-0")
    made.open(Key("g", "a"), 0)
    with caplog.at_level(logging.WARNING):
        shares = one(made)
    assert "opened twice" in caplog.text
    assert shares[0].joules == 100.0
    again = made.close(Key("g", "a"), S, 1, "stop")
    made.settle(S)
    assert again.result(0) == []


def test_a_neighbour_is_no_idle_power() -> None:
    """What a GPU draws while somebody else computes on it, and no request is open, is not learnt as its idle power."""
    for busy, watts in ((True, 50.0), (False, 500.0)):
        made = Ledger(patience_s=None)
        made.device(Device("GPU-0", "gpu"))
        joules = 0.0
        for second in range(30):
            there = second >= 10
            if there and busy:
                made.busy("GPU-0", second * S)
            made.counter("GPU-0", second * S, joules)
            joules += 500.0 if there else 50.0
            made.settle(second * S)
        made.open(Key("g", "a"), 30 * S, engine=ENGINE, devices=("GPU-0",))
        made.counter("GPU-0", 30 * S, joules)
        future = made.close(Key("g", "a"), 31 * S, 1, "stop")
        made.counter("GPU-0", 31 * S, joules + 600.0)
        made.settle(31 * S)
        assert future.result(0)[0].static == pytest.approx(watts)


def test_a_meter_that_is_early_closes_nothing_ahead_of_time() -> None:
    """It is thought to be 60 ms early: its interval up to 1.06 s waits until then, so the step up to 1.05 s gets its joules."""
    ledger = Ledger(patience_s=None, step_wait_s=60.0)
    ledger.device(Device("G", "gpu", idle_watts=0.0))
    ledger.counter("G", 0, 0.0)
    ledger.settle(0)
    ledger._core.accounts["G"].learner.lag.ns = -60_000_000
    ledger.counter("G", 1_000_000_000, 100.0)
    ledger.settle(1_000_000_000)
    assert ledger.snapshot().books["G"].measured == 0.0
    ledger.open(Key("g", "r"), 1_010_000_000, engine=EngineId("g", 0), devices=("G",))
    ledger.work(EngineId("g", 0), 1_010_000_000, 1_050_000_000, ("G",), [Work("r", 10, 0, 0)])
    future = ledger.close(Key("g", "r"), 1_050_000_000, 1, "stop")
    ledger.settle(1_060_000_000)
    (share,) = future.result(0)
    assert share.joules is not None
    assert share.joules > 0.0
