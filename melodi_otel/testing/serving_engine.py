"""A simulated engine: requests arrive, are batched continuously, their prompts computed in chunks; its steps one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from melodi_otel.testing.serving_power import Chip, Floats, Model, shapley

BUDGET = 2048
"""Tokens that a step may compute."""

RUNNING = 256
"""Requests that run at once; the others wait."""

_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal numbers of tokens: ``median``, ``sigma`` of the logarithm, and the most."""

    median: float
    sigma: float
    most: int

    def draw(self, rng: np.random.Generator) -> int:
        """One of them, at least 1."""
        return int(min(self.most, max(1.0, self.median * np.exp(self.sigma * rng.standard_normal()))))


CHAT_IN = Lengths(320.0, 0.9, 6000)
CHAT_OUT = Lengths(250.0, 0.7, 2000)


@dataclass(frozen=True, slots=True)
class Load:
    """What one engine is asked.

    Attributes:
        rate: requests per second (Poisson).
        model: who answers.
        prompt, output: lengths in tokens.
        hits: part of the requests whose prompt is half or more in the prefix cache.
        aborted: part of the requests that are given up on their way.
        host_s: how long the host prepares each step, in the median, while the device does nothing.
    """

    rate: float
    model: Model
    prompt: Lengths = CHAT_IN
    output: Lengths = CHAT_OUT
    hits: float = 0.0
    aborted: float = 0.0
    host_s: float = 0.0


@dataclass(slots=True, eq=False)
class Request:
    """One request on its way; times in s, lengths in tokens.

    ``place`` is its row in the tables of joules, ``planned`` the tokens after which it ends (or is given up).
    """

    id: str
    place: int
    arrival: float
    prompt: int
    cached: int
    planned: int
    abort: bool = False
    context: int = 0
    made: int = 0
    first_token: float | None = None
    end: float = 0.0

    @property
    def due(self) -> int:
        """Tokens of the prompt that are still to be computed."""
        return self.prompt - self.context if self.made == 0 else 0


@dataclass(slots=True)
class Step:
    """One step: when, whose, and what it cost.

    Attributes:
        places: rows of its members.
        work: id -> [prefill tokens, decode tokens, context after].
        joules: dynamic energy of one device, without that device's gain.
        begins: when the devices begin with it: ``t0``, or later.
        shares: J of each member, in the order of ``places``; their sum is ``joules``.
        ended: requests for which it was the last.
    """

    engine: str
    t0: float
    t1: float
    places: list[int]
    work: dict[str, list[int]]
    joules: float
    shares: Floats
    begins: float
    ended: list[Request] = field(default_factory=list[Request])


def arrivals(load: Load, begin: float, seconds: float, prefix: str, place: int, seed: list[int]) -> list[Request]:
    """The requests of ``seconds`` s of traffic from ``begin`` on; the first comes at once."""
    rng = np.random.default_rng(seed)
    found: list[Request] = []
    t = begin
    while t < begin + seconds:
        prompt = max(2, load.prompt.draw(rng))
        planned, hit, given_up = load.output.draw(rng), rng.random(), rng.random()
        cached, early = rng.uniform(0.5, 0.97), rng.uniform(0.05, 0.95)
        abort = given_up < load.aborted and planned > 2
        found.append(
            Request(
                f"{prefix}{len(found)}",
                place + len(found),
                t,
                prompt,
                # The last token is always computed, and entries are kept in whole blocks.
                min(int(prompt * cached), prompt - 1) // _BLOCK * _BLOCK if hit < load.hits else 0,
                max(1, int(planned * early)) if abort else planned,
                abort,
            )
        )
        t += rng.exponential(1.0 / load.rate)
    return found


def serve(
    engine: str, load: Load, requests: list[Request], chip: Chip, split: int, noise: float, seed: list[int]
) -> Iterator[Step]:
    """The steps of an engine that answers ``requests``, until all are answered.

    Args:
        engine: its name.
        load: what it is asked; its model counts.
        requests: in order of arrival; first token, end and tokens made are written into them.
        chip: where it runs.
        split: devices that share each step.
        noise: 1 sigma of a step's energy (as a fraction); its time varies half as much.
        seed: of the noise and the sampled orders.
    """
    rng = np.random.default_rng(seed)
    waiting, running, coming = deque[Request](), list[Request](), deque(requests)
    model = load.model
    t = 0.0

    def worth(sums: Floats) -> Floats:
        return chip.cost(model, sums, split)[1]

    while coming or waiting or running:
        while coming and coming[0].arrival <= t:
            waiting.append(coming.popleft())
        if not waiting and not running:
            # The loop that finds the request and plans the step is not instant.
            t = coming[0].arrival + 2e-4
            continue
        plan = _plan(running, waiting)
        rows = np.empty((4, len(plan)))
        rows[0] = 1.0
        rows[1] = [tokens for _, tokens in plan]
        rows[2] = [request.context for request, _ in plan]
        rows[3] = rows[1] * (rows[2] + rows[1] / 2)
        took, joules = chip.cost(model, rows.sum(axis=1), split)
        shares = shapley(worth, rows, rng)
        factor = float(np.exp(noise * rng.standard_normal()))
        t0 = begins = t
        if load.host_s:
            begins += load.host_s * float(np.exp(0.25 * rng.standard_normal()))
        t = begins + float(took) * float(np.exp(noise / 2 * rng.standard_normal()))
        step = Step(
            engine,
            t0,
            t,
            [request.place for request, _ in plan],
            {},
            float(joules) * factor,
            shares * (float(joules) * factor / float(shares.sum())),
            begins,
        )
        for request, tokens in plan:
            _advance(step, request, tokens)
        if step.ended:
            running = [request for request in running if not request.end]
        yield step


def _plan(running: list[Request], waiting: deque[Request]) -> list[tuple[Request, int]]:
    """Who computes how many tokens in the next step: first those that run, then those that wait, while there is budget."""
    budget = BUDGET
    plan: list[tuple[Request, int]] = []
    for request in running:
        tokens = min(request.due or 1, budget)
        if tokens:
            plan.append((request, tokens))
            budget -= tokens
    while waiting and budget and len(running) < RUNNING:
        request = waiting.popleft()
        request.context = request.cached
        running.append(request)
        plan.append((request, min(request.due, budget)))
        budget -= plan[-1][1]
    return plan


def _advance(step: Step, request: Request, tokens: int) -> None:
    prefill = request.made == 0
    request.context += tokens
    step.work[request.id] = [tokens, 0, request.context] if prefill else [0, tokens, request.context]
    if prefill and request.context < request.prompt:
        return
    # The last chunk of the prompt makes the first token.
    request.made += 1
    if prefill:
        request.first_token = step.t1
    if request.made >= request.planned:
        request.end = step.t1
        step.ended.append(request)
