"""The books balance: a property over random requests, steps, readings, wraps, resets and lost samples."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass, field

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from melodi_otel.attribution.evidence import WHOLE
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Decode, EngineId, Joined, Key, Late, Prefill, Share
from melodi_otel.devices import Device

S = 1_000_000_000
GPU = Device("GPU-0", "gpu", idle_watts=40.0)
TWIN = Device("GPU-1", "gpu")
GAUGE = Device("GPU-2", "gpu", window_s=0.2)
CPU = Device("cpu-0", "cpu")
RANGE_J = 700.0


@dataclass
class Host:
    """A random host: true joules per device, and what the ledger was told of it."""

    ledger: Ledger
    now_ns: int = 1000 * S
    joules: dict[str, float] = field(default_factory=dict)
    offset: dict[str, float] = field(default_factory=dict)
    cpu_s: tuple[float, float] = (0.0, 0.0)
    series: dict[EngineId | None, float] = field(default_factory=lambda: {None: 1.0})
    open: dict[str, EngineId | None] = field(default_factory=dict)
    futures: list[Future[list[Share]]] = field(default_factory=list)
    seq: dict[int, int] = field(default_factory=dict)
    members: dict[int, dict[str, int]] = field(default_factory=dict)
    last_step: dict[int, int] = field(default_factory=dict)
    count: int = 0


ENGINES = (EngineId("g", 0), EngineId("g", 1))
ENGINE_DEVICES = {0: ("GPU-0", "GPU-1"), 1: ("GPU-0",)}

actions = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "time",
                "time",
                "time",
                "open",
                "open",
                "nested",
                "measure",
                "tokens",
                "step",
                "step",
                "close",
                "reset",
                "foreign",
                "groups",
                "late",
                "unseen",
            ]
        ),
        st.integers(0, 7),
        st.floats(0.0, 1.0),
    ),
    max_size=60,
)


def sample(host: Host, dt_s: float, lost: int) -> None:
    host.now_ns += round(dt_s * S)
    watts = {"GPU-0": 90.0, "GPU-1": 200.0 * dt_s, "GPU-2": 120.0, "cpu-0": 65.0}
    for number, (device, power) in enumerate(watts.items()):
        host.joules[device] = host.joules.get(device, 0.0) + power * dt_s
        if number == lost:
            continue
        if device == "GPU-2":
            host.ledger.gauge(device, host.now_ns, power * (1 + dt_s))
        else:
            reading = host.joules[device] - host.offset.get(device, 0.0)
            host.ledger.counter(device, host.now_ns, reading % RANGE_J, RANGE_J if device == "cpu-0" else None)
    host.cpu_s = (host.cpu_s[0] + 0.7 * dt_s, host.cpu_s[1] + 1.1 * dt_s)
    for series, part in host.series.items():
        host.ledger.cpu("cpu-0", series, host.now_ns, part * host.cpu_s[0], host.cpu_s[1])


def step(host: Host, which: int, part: float) -> None:
    engine = which % 2
    present = [name for name, at in host.open.items() if at == ENGINES[engine]]
    members = host.members.setdefault(engine, {})
    left = [name for name in members if name not in present]
    for name in left:
        del members[name]
    new = [name for name in present if name not in members]
    t0 = max(host.last_step.get(engine, 0), host.now_ns - round(part * 0.3 * S))
    prefill = [Prefill(name, 10 + which, which) for name in new[:1]]
    joined = [Joined(name, 20) for name in new[1:]]
    for name, context in joined:
        members[name] = context
    stray = [Prefill(f"unknown-{which}", 5, 0)] if part > 0.9 else []
    host.seq[engine] = host.seq.get(engine, 0) + (2 if part > 0.95 else 1)
    host.ledger.step(
        ENGINES[engine],
        0,
        host.seq[engine],
        t0,
        host.now_ns,
        ENGINE_DEVICES[engine],
        decode=Decode(len(members), 20 * len(members)),
        prefill=prefill + stray,
        joined=joined,
        left=left,
    )
    host.last_step[engine] = host.now_ns


def act(host: Host, action: str, which: int, part: float) -> None:
    if action == "time":
        sample(host, 0.02 + part * 0.4, which)
    elif action in ("open", "nested", "measure"):
        host.count += 1
        name = f"r{host.count}"
        engine = None if action == "measure" or which > 5 else ENGINES[which % 2]
        parent = Key("g", next(iter(host.open))) if action == "nested" and host.open else None
        host.ledger.open(
            Key("g", name),
            host.now_ns,
            engine=engine,
            devices=None if which == 3 else ("GPU-0", "cpu-0", "GPU-2"),
            prompt_tokens=None if part < 0.2 else int(part * 900),
            cached_tokens=int(part * 90),
            parent=parent,
            thread=1 if part < 0.3 else None,
        )
        host.open[name] = engine
    elif action == "step":
        step(host, which, part)
    elif action == "reset":
        host.offset["GPU-0"] = host.joules.get("GPU-0", 0.0)
    elif action == "late":
        host.count += 1
        key, start = Key("g", f"r{host.count}"), host.now_ns - round((0.1 + part) * S)
        beside = tuple(start + number * S // 5 for number in range(which % 3))
        devices = ("GPU-0", "cpu-0", "GPU-1") if which < 5 else None
        host.ledger.open(key, start, devices=devices, late=Late(beside, elsewhere=which % 2 == 0))
        host.futures.append(host.ledger.close(key, host.now_ns - which * S // 20, None, "stop"))
    elif action == "unseen":
        host.ledger.unseen(host.now_ns, 1 if which < 4 else -1)
    elif action == "groups":
        series = [None, EngineId("g", WHOLE), EngineId("g", 0), EngineId("h", WHOLE)][which % 4]
        if series in host.series:
            del host.series[series]
            host.ledger.cpu_gone(series)
        else:
            host.series[series] = part
    elif action == "foreign":
        host.ledger.foreign("GPU-1", host.now_ns, part)
    elif host.open:
        name = list(host.open)[which % len(host.open)]
        if action == "tokens":
            first = host.now_ns if part < 0.1 else None
            host.ledger.progress(Key("g", name), host.now_ns, int(part * 40), first_token_ns=first)
        else:
            outcome = "abort" if part < 0.3 else "stop"
            host.futures.append(host.ledger.close(Key("g", name), host.now_ns, int(part * 50), outcome))
            del host.open[name]
            if which % 2:
                host.ledger.settle(host.now_ns)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions, st.sampled_from(["busy_shared", "dynamic"]), st.booleans())
@example(
    [("open", 0, 0.0), ("groups", 1, 1.0), ("time", 3, 1.0), ("late", 0, 0.0), ("time", 0, 0.0)], "busy_shared", False
)
def test_books_balance(listed: list[tuple[str, int, float]], policy: str, often: bool) -> None:
    """At every settling and at the end, every measured joule of every device is in exactly one place."""
    host = Host(Ledger(policy=policy, patience_s=None))  # type: ignore[arg-type]
    for device in (GPU, TWIN, GAUGE, CPU):
        host.ledger.device(device)
    host.ledger.engine(ENGINES[0], host.now_ns, "loading", model="m", devices=ENGINE_DEVICES[0])
    host.ledger.engine(ENGINES[0], host.now_ns + S, "ready", model="m")
    sample(host, 0.1, 9)
    for action, which, part in listed:
        act(host, action, which, part)
        if often:
            host.ledger.settle(host.now_ns)
            check(host)
    host.ledger.flush(host.now_ns)
    check(host)
    assert host.ledger.refused == 0
    assert all(future.done() for future in host.futures)
    for share in (share for future in host.futures for share in future.result()):
        if share.joules is None:
            assert share.quality == "unavailable"
            continue
        if share.dynamic is None or share.static is None:
            assert share.device != GPU.id  # its idle power is given
            assert (share.dynamic, share.static, share.prefill, share.decode) == (None, None, None, None)
        else:
            assert share.joules == share.dynamic + share.static
        assert share.joules >= 0.0
        assert 0.0 <= share.coverage <= 1.0
        if share.prefill is not None and share.decode is not None:
            assert share.dynamic is not None
            assert math.isclose(share.prefill + share.decode, share.dynamic, rel_tol=1e-12)


def check(host: Host) -> None:
    view = host.ledger.snapshot()
    for name, books in view.books.items():
        assert abs(books.imbalance()) <= 1e-9, books
        attributed = math.fsum(j for (device, *_), j in view.attributed.items() if device == name)
        unattributed = math.fsum(j for (device, *_), j in view.unattributed.items() if device == name)
        scale = max(1.0, books.measured)
        assert abs(attributed - books.attributed - books.in_flight) <= 1e-9 * scale
        assert abs(attributed + unattributed + books.residual - books.measured) <= 1e-9 * scale
        assert min(books.idle, books.tail, books.loading, books.foreign, books.attributed) >= -1e-9
