"""The books go on in another ledger: nothing twice, nothing lost, and nobody is charged for the time in between."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from melodi_otel.attribution.books import Books
from melodi_otel.attribution.finishing import accrued_in
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.merging import merge_shares
from melodi_otel.attribution.meter import EngineId, Key
from melodi_otel.attribution.state import State
from melodi_otel.devices import Device
from melodi_otel.timeline.counter import Reading

S = 1_000_000_000
ENGINE = EngineId("g", 0)
A = Key("g", "a")
GPU = Device("D", "gpu", idle_watts=20.0)


def started(device: Device = GPU) -> Ledger:
    made = Ledger(patience_s=None)
    made.device(device)
    made.counter(device.id, 0, 0.0)
    return made


def after(state: State, *devices: Device) -> Ledger:
    """A second ledger that continues from the first, by way of bytes."""
    made = Ledger(patience_s=None)
    for device in devices or (GPU,):
        made.device(device)
    made.restore(msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=State))
    return made


def killed() -> State:
    """100 W; a request since 0; booked up to 1 s, read up to 2 s, where the step that runs is not reported yet."""
    made = started()
    made.open(A, 0, engine=ENGINE, devices=("D",), model="m")
    made.counter("D", S, 100.0)
    made.settle(10 * S)
    made.counter("D", 2 * S, 200.0)
    made.settle(2 * S)
    return made.state(2 * S)


def books(made: Ledger, device: str = "D") -> Books:
    return made.snapshot().books[device]


def test_a_state_says_what_is_booked_and_what_is_not() -> None:
    """Up to 1 s in the books, up to 2 s read: 100 J in flight, 100 J pending, the reading, the request's share so far."""
    state = killed()
    (device,) = state.devices
    assert (device.measured, device.in_flight, device.pending, device.settled) == (100.0, 100.0, 100.0, 0.0)
    assert (device.closed_ns, device.reading, device.idle_watts) == (S, Reading(2 * S, 200.0), 20.0)
    assert [(share.key, share.t1_ns, share.joules) for share in accrued_in(state)[A]] == [(A, S, 100.0)]
    assert {(part.who.model, part.phase): part.joules for part in device.attributed} == {
        ("m", "static"): 20.0,
        ("m", "unsplit"): 80.0,
    }


def test_a_state_survives_bytes() -> None:
    """Encoded and decoded it is equal, in msgpack and in JSON, to the last digit."""
    state = killed()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=State) == state
    assert msgspec.json.decode(msgspec.json.encode(state), type=State) == state


def test_what_was_in_flight_is_settled_and_what_was_pending_is_unsampled() -> None:
    """Before any reading the second ledger has 200 J: 100 of the request, 100 unsampled."""
    made = after(killed())
    assert books(made) == Books("D", measured=200.0, attributed=100.0, unsampled=100.0)
    assert sum(made.snapshot().attributed.values()) == 100.0


def test_the_gap_is_nobodys_and_lowers_coverage() -> None:
    """First reading at 5 s: 300 J unsampled. Who was there from 3 s to 6 s has the last second's 100 J, a third covered."""
    made = after(killed())
    b = Key("g", "b")
    made.open(b, 3 * S, engine=ENGINE, devices=("D",))
    made.counter("D", 5 * S, 500.0)
    made.settle(5 * S)
    assert (books(made).measured, books(made).unsampled) == (500.0, 400.0)
    made.counter("D", 6 * S, 600.0)
    future = made.close(b, 6 * S, 1, "stop")
    made.settle(6 * S)
    made.flush(6 * S)
    (share,) = future.result(0)
    assert (share.joules, share.quality, share.reason) == (100.0, "partial", "no_samples")
    assert share.coverage == pytest.approx(1 / 3)
    assert books(made).imbalance() == 0.0


def test_a_request_in_both_ledgers_is_whole() -> None:
    """0 to 1 s in the first, 5 to 6 s in the second: 200 J, of 6 s two are covered."""
    state = killed()
    made = after(state)
    made.counter("D", 5 * S, 500.0)
    made.open(A, 5 * S, engine=ENGINE, devices=("D",))
    made.counter("D", 6 * S, 600.0)
    future = made.close(A, 6 * S, 1, "stop")
    made.flush(6 * S)
    (share,) = merge_shares(accrued_in(state)[A], future.result(0))
    assert (share.t0_ns, share.t1_ns, share.joules, share.quality) == (0, 6 * S, 200.0, "partial")
    assert share.coverage == pytest.approx(1 / 3)
    assert books(made) == Books("D", measured=600.0, attributed=200.0, unsampled=400.0)


def gap(reading_j: float, range_j: float | None, last_j: float, t_s: float = 1.1) -> Ledger:
    """Read at 1 s (``last_j``) by the first ledger and at ``t_s`` by the second."""
    first = Ledger(patience_s=None)
    first.device(GPU)
    first.counter("D", S, last_j, range_j)
    first.settle(S)
    made = after(first.state(S))
    made.counter("D", round(t_s * S), reading_j, range_j)
    made.settle(20 * S)
    return made


def test_a_wrap_in_the_gap_is_repaired() -> None:
    """690 J to 10 J of a counter that wraps at 700 J, in 0.1 s: 20 J."""
    assert books(gap(10.0, 700.0, 690.0)) == Books("D", measured=20.0, unsampled=20.0)


def test_a_reset_in_the_gap_is_not_known() -> None:
    """A counter that starts over says nothing of the gap: the books stay as they were."""
    assert books(gap(10.0, None, 690.0)) == Books("D")


def test_a_gap_in_which_a_turn_may_be_missing_is_not_known() -> None:
    """10 s at up to 5,000 W hold many turns of 700 J: 50 J more on the counter is not what was used. With 1e6 J it is."""
    assert books(gap(150.0, 700.0, 100.0, 11.0)) == Books("D")
    assert books(gap(150.0, 1e6, 100.0, 11.0)) == Books("D", measured=50.0, unsampled=50.0)


def test_the_joules_of_the_gap_are_known_for_the_whole_device() -> None:
    """Whose they were is not known, how many they were is: a window in the gap has its joules."""
    made = gap(1100.0, None, 100.0, 11.0)
    assert made.between("D", 3 * S, 5 * S) == 200.0


def test_a_counter_that_stands_still_prolongs_the_gap() -> None:
    """The first reading repeats the last one: the gap ends at the next change, with all its joules."""
    first = started()
    first.settle(0)
    made = after(first.state(0))
    made.counter("D", S // 10, 0.0)
    made.settle(S)
    assert books(made).measured == 0.0
    made.counter("D", S // 2, 50.0)
    made.settle(S)
    assert books(made) == Books("D", measured=50.0, unsampled=50.0)


def test_a_gauge_knows_nothing_of_the_gap() -> None:
    """100 W before and after: the gap has no joules, and a reading whose window began before it counts nothing twice."""
    gauge = Device("D", "gpu", window_s=1.0, idle_watts=0.0)
    first = Ledger(patience_s=None)
    first.device(gauge)
    for t_s in (1.0, 2.0, 3.0):
        first.gauge("D", round(t_s * S), 100.0)
        first.settle(20 * S)
    state = first.state(3 * S)
    assert (state.devices[0].measured, state.devices[0].closed_ns, state.devices[0].reading) == (
        200.0,
        5 * S // 2,
        None,
    )
    made = after(state, gauge)
    made.open(A, 5 * S // 2, engine=ENGINE, devices=("D",))
    for t_s in (2.9, 4.0, 5.0):  # centres 2.4 (booked already), 3.5, 4.5
        made.gauge("D", round(t_s * S), 100.0)
        made.settle(20 * S)
    assert (books(made).measured, books(made).unsampled, books(made).in_flight) == (300.0, 0.0, 100.0)
    assert made.accrued()[A][0].coverage == 0.5


def test_idle_power_is_taken_over_and_not_learnt_from_a_gap() -> None:
    """20 W learnt; then a gap at 100 W and 5 s in which old requests may not be back yet teach nothing; what follows does."""
    learning = Device("D", "gpu")
    first = started(learning)
    for tick in range(1, 40):
        first.counter("D", tick * S, 20.0 * tick)
        first.settle(tick * S + S)
    assert first.state(40 * S).devices[0].idle_watts == pytest.approx(20.0)
    made = after(first.state(40 * S), learning)

    def watts() -> float:
        return made.state(0).devices[0].idle_watts or 0.0

    joules = 780.0
    for tick in range(50, 56):
        joules += 1000.0 if tick == 50 else 100.0
        made.counter("D", tick * S, joules)
        made.settle(tick * S + S)
    assert watts() == pytest.approx(20.0)
    for tick in range(56, 60):
        joules += 40.0
        made.counter("D", tick * S, joules)
        made.settle(tick * S + 2 * S)
    assert watts() == pytest.approx(40.0)  # four of the last five quiet seconds


def test_a_given_idle_power_stays() -> None:
    """What the device or the configuration says is not replaced by what was learnt."""
    first = started(Device("D", "gpu"))
    state = first.state(0)
    learnt = replace(state, devices=tuple(replace(one, idle_watts=77.0) for one in state.devices))
    assert after(learnt).state(0).devices[0].idle_watts == 20.0


def test_a_device_that_is_not_there_keeps_its_books() -> None:
    """Its joules stay, requests are not charged for it, the next state has it again, and it goes on when it comes back."""
    other = Device("E", "gpu", idle_watts=0.0)
    made = after(killed(), other)
    made.counter("E", 3 * S, 0.0)
    made.open(Key("g", "b"), 3 * S, engine=ENGINE)
    made.counter("E", 4 * S, 10.0)
    future = made.close(Key("g", "b"), 4 * S, 1, "stop")
    made.settle(4 * S)
    made.flush(4 * S)
    assert [share.device for share in future.result(0)] == ["E"]
    assert books(made) == Books("D", measured=200.0, attributed=100.0, unsampled=100.0)
    third = after(made.state(4 * S), other)
    third.device(GPU)
    third.counter("D", 5 * S, 500.0)
    third.settle(20 * S)
    assert books(third) == Books("D", measured=500.0, attributed=100.0, unsampled=400.0)
    assert books(third, "E").attributed == 10.0


def test_a_new_device_starts_fresh() -> None:
    """A device that the state does not know has no gap: its first reading is its beginning."""
    other = Device("E", "gpu", idle_watts=0.0)
    made = after(killed(), GPU, other)
    made.counter("E", 3 * S, 5000.0)
    made.counter("E", 4 * S, 5010.0)
    made.settle(20 * S)
    assert (books(made, "E").measured, books(made, "E").unsampled) == (10.0, 0.0)


def test_a_meter_of_the_whole_machine_is_divided_among_nobody() -> None:
    """psys: pending joules and those of the gap are where its others are."""
    host = Device("D", "host")
    first = started(host)
    first.counter("D", S, 100.0)
    first.settle(S)
    made = after(first.state(S), host)
    made.counter("D", 5 * S, 500.0)
    made.settle(20 * S)
    assert books(made) == Books("D", measured=500.0, residual=500.0)


def test_readings_that_came_first_break_nothing() -> None:
    """A restore that comes too late still has the old books; the joules of the gap are in none."""
    made = started()
    made.counter("D", 3 * S, 300.0)
    made.settle(3 * S)
    made.restore(killed())
    assert books(made).measured == pytest.approx(500.0)
    assert books(made).imbalance() == 0.0


def test_a_gap_does_not_stretch_the_waits() -> None:
    """An hour without a ledger is no sensor interval: how long steps are waited for stays as it was."""
    made = gap(1e5, None, 0.0, 3600.0)
    made.open(A, 3600 * S, engine=ENGINE, devices=("D",))
    made.counter("D", 3600 * S + S // 10, 1e5 + 10.0)
    made.settle(3600 * S + S)
    assert made.accrued()[A][0].joules == pytest.approx(10.0)


def test_shares_of_finished_requests_are_in_no_state() -> None:
    """What was settled before is in the books alone: nobody may add it once more."""
    made = started()
    made.open(A, 0, engine=ENGINE, devices=("D",))
    made.counter("D", S, 100.0)
    made.close(A, S, 1, "stop")
    made.settle(20 * S)
    state = made.state(S)
    assert state.accrued == ()
    assert (state.devices[0].settled, state.devices[0].in_flight) == (100.0, 0.0)
