"""A simulated LLM server with its GPUs and their sensors: a trace in the project's format, and whose joules they really were.

The truth of a request is, for every step it is in, its Shapley value of the energy that the step really drew, and at every
instant an equal part of the idle power among those who are computed. None of it has the form that the meter fits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

import msgspec
import numpy as np

from melodi_otel.testing.serving_board import TICK_S, Board, Sensor, grid, read, smeared, tail, wander
from melodi_otel.testing.serving_engine import CHAT_OUT, Lengths, Load, Request, Step, arrivals, serve
from melodi_otel.testing.serving_power import LLAMA_3B, LLAMA_8B, QWEN_30B_A3B, Chip, Floats
from melodi_otel.trace import lines

QUIET_S: Final = 4.0
"""Seconds without traffic at the begin and at the end."""

_TAIL_WATTS, _TAIL_S = 45.0, 0.13


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated.

    Attributes:
        loads: one per engine.
        seconds: how long requests arrive, where nothing else is asked for.
        devices: GPUs that share every step.
        chip: what each of them is.
        idle_watts: power of an idle device with its model loaded; it wanders by 1.5 %.
        gain: how far (1 sigma) the dynamic power of a device wanders; ``gain_s``: within what time.
        noise: 1 sigma of a step's energy.
        sensor: how the devices are read.
        told_experts: whether the trace says what experts a model has.
        intruder_watts: drawn in episodes by a process that nobody knows of.
        contention: what a step draws more while another engine's step runs, as a part of it.
    """

    name: str
    loads: tuple[Load, ...]
    seconds: float = 180.0
    devices: int = 1
    chip: Chip = Chip()  # noqa: RUF009  # frozen
    idle_watts: float = 118.0
    gain: float = 0.01
    gain_s: float = 40.0
    noise: float = 0.03
    sensor: Sensor = Sensor()  # noqa: RUF009  # frozen
    told_experts: bool = True
    intruder_watts: float = 0.0
    contention: float = 0.0


def _at(name: str, rate: float, seconds: float = 180.0) -> Scenario:
    return Scenario(name, (Load(rate, LLAMA_8B),), seconds)


_TWO = _at("load 2", 2.0)
_FIVE = _at("load 5", 5.0)

SCENARIOS: Final[dict[str, Scenario]] = {
    scenario.name: scenario
    for scenario in (
        _at("load 0.1", 0.1, 600.0),
        _at("load 0.5", 0.5, 300.0),
        _TWO,
        _FIVE,
        _at("load 8", 8.0),
        Scenario("load 8, long answers", (Load(8.0, LLAMA_8B, output=Lengths(520.0, 0.7, 3000)),)),
        replace(_FIVE, name="cold start", seconds=45.0),
        replace(_FIVE, name="drift", gain=0.15, gain_s=30.0),
        replace(_FIVE, name="cap", chip=Chip(limit_watts=270.0)),
        replace(_FIVE, name="tensor parallel", devices=2, gain=0.02),
        Scenario("two engines", (Load(2.5, LLAMA_8B), Load(2.0, LLAMA_3B)), chip=Chip(limit_watts=480.0)),
        Scenario(
            "contention", (Load(2.5, LLAMA_8B), Load(2.0, LLAMA_3B)), chip=Chip(limit_watts=480.0), contention=0.5
        ),
        Scenario("moe known", (Load(3.0, QWEN_30B_A3B),)),
        Scenario("moe unknown", (Load(3.0, QWEN_30B_A3B),), told_experts=False),
        replace(_TWO, name="gauge 1 s", sensor=Sensor("gauge", window_s=1.0)),
        replace(_TWO, name="poll 1 s", sensor=Sensor(read="free", every_s=1.0)),
        replace(_TWO, name="gauge 25 ms", sensor=Sensor("gauge", window_s=0.025)),
        replace(_TWO, name="free running", sensor=Sensor(read="free")),
        replace(_TWO, name="intruder", intruder_watts=150.0),
        Scenario("short", (Load(0.22, LLAMA_8B, Lengths(120.0, 0.6, 800), Lengths(23.0, 0.2, 30)),), 600.0),
        Scenario("long prompts", (Load(1.2, LLAMA_8B, Lengths(4500.0, 0.6, 16000), Lengths(160.0, 0.6, 800)),)),
        Scenario("prefix", (Load(4.0, LLAMA_8B, Lengths(900.0, 0.8, 8000), hits=0.5),)),
        replace(_TWO, name="lost samples", sensor=Sensor(lost=0.06)),
        replace(_TWO, name="reset", sensor=Sensor(resets=3)),
        Scenario("host bound", (Load(3.0, LLAMA_8B, host_s=0.045),)),
        Scenario("aborted", (Load(4.0, LLAMA_8B, output=replace(CHAT_OUT, median=300.0), aborted=0.25),)),
    )
}


@dataclass(frozen=True, slots=True)
class Truth:
    """What a request used of a device, in J, from its arrival to the end of its last step, in s."""

    joules: float
    dynamic: float
    static: float
    start: float
    end: float
    engine: str


@dataclass(slots=True)
class Simulated:
    """A simulated run.

    Attributes:
        scenario: of what.
        lines: the trace, in the order in which each line became known.
        truth: (request, device) -> its joules.
        buckets: device -> ``dynamic`` and ``static`` of requests, ``idle``, ``tail``, ``intruder``, and ``measured``: J.
        engines: (engine, device) -> J of its requests.
        boards: device -> its power.
        output_tokens: request -> tokens it made.
        first, last: of the traffic: first arrival and end of the last step, in s.
        mean_batch: members of a step, weighted by its time.
        busy: part of that time in which something is computed.
    """

    scenario: Scenario
    lines: list[bytes] = field(default_factory=list[bytes])
    truth: dict[tuple[str, str], Truth] = field(default_factory=dict[tuple[str, str], Truth])
    buckets: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    engines: dict[tuple[str, str], float] = field(default_factory=dict[tuple[str, str], float])
    boards: dict[str, Board] = field(default_factory=dict[str, Board])
    output_tokens: dict[str, int] = field(default_factory=dict[str, int])
    first: float = 0.0
    last: float = 0.0
    mean_batch: float = 0.0
    busy: float = 0.0


def simulate(scenario: Scenario, *, seed: int = 1, seconds: float | None = None) -> Simulated:
    """Run a scenario.

    Args:
        scenario: which.
        seed: same seed, same run.
        seconds: of arriving requests; None: what the scenario says. What has arrived is answered.
    """
    done = Simulated(scenario)
    traffic_s = scenario.seconds if seconds is None else seconds
    requests: list[list[Request]] = []
    steps: list[list[Step]] = []
    place = 0
    for number, load in enumerate(scenario.loads):
        asked = arrivals(load, QUIET_S, traffic_s, f"e{number}r", place, [seed, number, 1])
        place += len(asked)
        requests.append(asked)
        steps.append(
            list(serve(f"e{number}", load, asked, scenario.chip, scenario.devices, scenario.noise, [seed, number, 2]))
        )
    flat = [step for of_engine in steps for step in of_engine]
    done.first = QUIET_S
    done.last = max(step.t1 for step in flat)
    done.mean_batch = sum(len(step.places) * (step.t1 - step.t0) for step in flat) / sum(s.t1 - s.t0 for s in flat)
    ticks = grid(done.last + QUIET_S)
    edges, company = _company(flat)
    done.busy = float((np.diff(edges) * (company > 0)).sum() / (done.last - done.first))
    for number in range(scenario.devices):
        rng = np.random.default_rng([seed, number, 3])
        device = f"GPU-{number}"
        _device(done, device, steps, requests, ticks, edges, company, rng)
    done.lines = _trace(done, requests, steps, seed)
    return done


def _company(steps: list[Step]) -> tuple[Floats, Floats]:
    """Times at which a step begins or ends, and how many members run between each and the next."""
    edges = np.array([edge for step in steps for edge in (step.t0, step.t1)])
    change = np.array([sign * len(step.places) for step in steps for sign in (1.0, -1.0)])
    order = np.argsort(edges, kind="stable")
    return edges[order], np.cumsum(change[order])[:-1]


def _device(
    done: Simulated,
    device: str,
    steps: list[list[Step]],
    requests: list[list[Request]],
    ticks: Floats,
    edges: Floats,
    company: Floats,
    rng: np.random.Generator,
) -> None:
    """Power of one device, and whose it is."""
    scenario, seconds = done.scenario, float(ticks[-1])
    # Devices of one kind differ: by a few percent in what they draw for the same.
    apart = 1.0 + (0.03 * rng.standard_normal() if scenario.devices > 1 else 0.0)
    gain = apart * np.exp(wander(rng, seconds, scenario.gain, scenario.gain_s))
    idle_watts = scenario.idle_watts * (1.0 + wander(rng, seconds, 0.015, 60.0))
    idle = np.concatenate(([0.0], np.cumsum(idle_watts[:-1] * TICK_S)))
    # Idle J per member since the begin, at every edge.
    alone = np.diff(np.interp(edges, ticks, idle))
    each = np.concatenate(([0.0], np.cumsum(alone / np.maximum(company, 1.0) * (company > 0))))
    dynamic, static = np.zeros((2, sum(len(of_engine) for of_engine in requests)))
    drawn = np.zeros_like(ticks)
    for of_engine in steps:
        bounds = np.array([edge for step in of_engine for edge in (step.t0, step.t1)])
        factors = np.interp(bounds[::2], ticks, gain)
        parts = np.diff(np.interp(bounds, edges, each))[::2]
        if scenario.contention:
            factors = factors * (1.0 + scenario.contention * _beside(bounds, of_engine, steps))
        joules = np.zeros_like(bounds)
        joules[1::2] = factors * np.array([step.joules for step in of_engine])
        at_work = np.array([edge for step in of_engine for edge in (step.begins, step.t1)])
        drawn += np.interp(ticks, at_work, np.cumsum(joules))
        for step, factor, part in zip(of_engine, factors, parts, strict=True):
            dynamic[step.places] += step.shares * factor
            static[step.places] += part
    for number, of_engine in enumerate(requests):
        for request in of_engine:
            own, stood = float(dynamic[request.place]), float(static[request.place])
            done.truth[request.id, device] = Truth(own + stood, own, stood, request.arrival, request.end, f"e{number}")
            done.output_tokens[request.id] = request.made
        places = [request.place for request in of_engine]
        done.engines[f"e{number}", device] = float((dynamic + static)[places].sum())
    running = company > 0
    begins = edges[:-1][running & ~np.concatenate(([False], running[:-1]))]
    ends = edges[1:][running & ~np.concatenate((running[1:], [False]))]
    after = tail(ticks, begins, ends, _TAIL_WATTS, _TAIL_S)
    other = _intruder(scenario.intruder_watts, ticks, rng)
    energy = idle + smeared(drawn + after + other)
    done.boards[device] = Board(energy)
    done.buckets[device] = {
        "dynamic": float(dynamic.sum()),
        "static": float(static.sum()),
        "idle": float(idle[-1] - static.sum()),
        "tail": float(after[-1]),
        "intruder": float(other[-1]),
        "measured": float(energy[-1]),
    }


def _beside(bounds: Floats, of_engine: list[Step], steps: list[list[Step]]) -> Floats:
    """The part of each step of an engine in which another engine runs one, added up over these."""
    together = np.zeros(len(of_engine))
    for other in steps:
        if other is not of_engine:
            edges = np.array([edge for step in other for edge in (step.t0, step.t1)])
            spent = np.zeros_like(edges)
            spent[1::2] = np.diff(edges)[::2]
            together += np.diff(np.interp(bounds, edges, np.cumsum(spent)))[::2] / np.diff(bounds)[::2]
    return together


def _intruder(watts: float, ticks: Floats, rng: np.random.Generator) -> Floats:
    """Cumulative J of a process that works for some seconds and rests for some; the first time late."""
    power = np.zeros(len(ticks) - 1)
    t = rng.uniform(45.0, 60.0)
    while watts and t < ticks[-1] - 15.0:
        lasts = rng.uniform(5.0, 12.0)
        power[round(t / TICK_S) : round((t + lasts) / TICK_S)] = watts * rng.uniform(0.9, 1.1)
        t += lasts + rng.uniform(20.0, 40.0)
    return np.concatenate(([0.0], np.cumsum(power * TICK_S)))


def _trace(done: Simulated, requests: list[list[Request]], steps: list[list[Step]], seed: int) -> list[bytes]:
    """The lines of a run, in the order in which they became known."""
    scenario = done.scenario
    devices = list(done.boards)
    told: list[tuple[float, msgspec.Struct]] = []
    sensor = scenario.sensor
    period_s = max(sensor.period_s, sensor.every_s)
    told += [(0.0, lines.DeviceLine(device, window_s=sensor.window_s, period_s=period_s)) for device in devices]
    for number, load in enumerate(scenario.loads):
        model, known = load.model, scenario.told_experts
        told.append((
            0.0,
            lines.EngineLine(
                f"e{number}", devices, model.parameters, model.active_parameters, model.kv_bytes_per_token, model.layers,
                model.hidden, model.experts if known else None, model.experts_per_token if known else None,
                model=model.name,
            ),
        ))  # fmt: skip
    for number, device in enumerate(devices):
        samples = read(done.boards[device], sensor, np.random.default_rng([seed, number, 4]))
        if sensor.kind == "counter":
            told += [(s.known, lines.SampleLine(s.t, device, joules=s.value)) for s in samples]
        else:
            told += [(s.known, lines.SampleLine(s.t, device, watts=s.value)) for s in samples]
    for number, of_engine in enumerate(requests):
        for r in of_engine:
            name, model = f"e{number}", scenario.loads[number].model.name
            told.append((r.arrival, lines.OpenLine(r.arrival, r.id, name, devices, model, r.prompt, r.cached)))
            outcome = "abort" if r.abort else "stop"
            closed = lines.CloseLine(r.end + 5e-5, r.id, r.made, outcome, r.first_token)
            told.append((closed.t, closed))
    for of_engine in steps:
        for s in of_engine:
            work = {name: (did[0], did[1], did[2]) for name, did in s.work.items()}
            told.append((s.t1, lines.StepLine(s.t0, s.t1, work, s.engine, devices)))
    told.sort(key=lambda known: known[0])
    return [lines.encode(line) for _, line in told]
