"""While idle power is not known, nobody says how much of a request's joules it was."""

from __future__ import annotations

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import EngineId, Key, Late, Prefill, Share
from melodi_otel.attribution.summary import summarize
from melodi_otel.devices import Device

S = 1_000_000_000
ENGINE = EngineId("g", 0)


class Meter:
    """One GPU of 100 W whose idle power (20 W, if it idles) has to be learnt, read every second."""

    def __init__(self, *others: Device) -> None:
        self.ledger = Ledger(patience_s=None)
        self.devices = {device.id: device for device in (Device("D", "gpu"), *others)}
        for device in self.devices.values():
            self.ledger.device(device)
            self.ledger.counter(device.id, 0, 0.0)
        self.joules = 0.0
        self.now_s = 0

    def second(self, watts: float) -> None:
        self.now_s += 1
        self.joules += watts
        for name in self.devices:
            self.ledger.counter(name, self.now_s * S, self.joules)
        self.ledger.settle(self.now_s * S)

    def request(self, name: str, seconds: int) -> list[Share]:
        """A request that computes its prompt all the time."""
        key, start = Key("g", name), self.now_s
        self.ledger.open(key, start * S, engine=ENGINE, devices=tuple(self.devices), model="m")
        for number in range(seconds):
            t0 = (start + number) * S
            self.ledger.step(ENGINE, 0, start + number, t0, t0 + S, tuple(self.devices), prefill=[Prefill(name, 9, 0)])
            self.second(100.0)
        future = self.ledger.close(key, self.now_s * S, 1, "stop")
        self.ledger.settle(self.now_s * S)
        return future.result(0)

    def phases(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for (_, _, phase, _), joules in self.ledger.snapshot().attributed.items():
            found[phase] = found.get(phase, 0.0) + joules
        return found


def parts(share: Share) -> tuple[float | None, ...]:
    return share.joules, share.static, share.dynamic, share.prefill, share.decode


def test_the_first_request_of_a_cold_meter_has_joules_and_no_parts() -> None:
    """Nothing idled yet: 200 J, none of which is called static or dynamic, and metrics do not say prefill either."""
    meter = Meter()
    (share,) = meter.request("a", 2)
    assert parts(share) == (200.0, None, None, None, None)
    assert (share.quality, share.rollup) == ("measured", 200.0)
    assert meter.phases() == {"unsplit": 200.0}


def test_once_it_is_learnt_the_parts_are_there() -> None:
    """Some idle seconds at 20 W later: 20 J of 100 J are static, the rest is prefill."""
    meter = Meter()
    for _ in range(3):
        meter.second(20.0)
    (share,) = meter.request("a", 1)
    assert parts(share) == (100.0, 20.0, 80.0, 80.0, 0.0)
    assert meter.phases() == {"static": 20.0, "prefill": 80.0}


def test_known_half_way_is_not_known() -> None:
    """Idle power was learnt while the request waited in a queue, after its first second: 200 J without parts."""
    meter = Meter()
    key = Key("g", "a")
    meter.ledger.open(key, 0, engine=ENGINE, devices=("D",))
    for number, watts in enumerate((100.0, 20.0, 20.0, 20.0, 100.0)):
        work = [Prefill("a", 9, 0)] if watts > 20.0 else []
        meter.ledger.step(ENGINE, 0, number, number * S, (number + 1) * S, ("D",), prefill=work)
        meter.second(watts)
    future = meter.ledger.close(key, 5 * S, 1, "stop")
    meter.ledger.settle(5 * S)
    assert parts(future.result(0)[0]) == (200.0, None, None, None, None)
    assert meter.phases() == {"unsplit": 100.0, "static": 20.0, "prefill": 80.0}


def test_late_work_knows_as_much_as_its_intervals_did() -> None:
    """Reported when it is over: what it takes from intervals without idle power has no parts, what follows has."""
    meter = Meter()
    meter.second(20.0)
    meter.second(20.0)
    shares: list[Share] = []
    for name, start in (("cold", 0), ("warm", 1)):
        meter.ledger.open(Key("g", name), start * S, late=Late())
        future = meter.ledger.close(Key("g", name), (start + 1) * S, None, "stop")
        meter.ledger.settle(2 * S)
        shares += future.result(0)
    assert [parts(share)[:3] for share in shares] == [(20.0, None, None), (20.0, 20.0, 0.0)]


def test_a_sum_over_devices_is_told_where_all_can_tell() -> None:
    """A CPU that knows its idle power beside a GPU that does not: static + dynamic would not be the total."""
    meter = Meter(Device("C", "cpu", idle_watts=10.0))
    energy = summarize(meter.request("a", 1), meter.devices)
    assert (energy.total, energy.gpu, energy.cpu) == (200.0, 100.0, 100.0)
    assert (energy.static, energy.dynamic, energy.prefill, energy.decode) == (None, None, None, None)
    assert energy.quality == "measured"
