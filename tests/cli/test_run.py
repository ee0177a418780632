from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from typer.testing import CliRunner

from melodi_otel.cli import run as command
from melodi_otel.cli.app import app
from melodi_otel.cli.run import SITE, start, with_meter

SHELL = [sys.executable, "-m", "melodi_otel.cli.app", "run"]


@pytest.fixture
def outside(tmp_path):
    """An environment in which the meter is a module that says what it was asked for."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "sitecustomize.py").write_text("print('theirs')\n")
    return fake


def python(code, env, *more, **kwargs):
    words = [sys.executable, "-c", textwrap.dedent(code), *more]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=False, **kwargs)


@pytest.fixture
def fake_meter(tmp_path):
    """A melodi_otel that only tells that it was turned on, on the path of the started program."""
    package = tmp_path / "site"
    (package / "melodi_otel").mkdir(parents=True)
    (package / "melodi_otel" / "__init__.py").write_text("def instrument(console):\n    print('metered', console)\n")
    return package


def test_our_directory_comes_first_and_once():
    """PYTHONPATH keeps what was there; a second run adds nothing."""
    once = with_meter({"PYTHONPATH": "/a"})
    assert once["PYTHONPATH"] == os.pathsep.join([str(SITE), "/a"])
    assert with_meter(once) == once
    assert with_meter({})["PYTHONPATH"] == str(SITE)


def test_program_is_metered_and_their_sitecustomize_runs(outside, fake_meter):
    """A started Python turns the meter on with its summary, and the sitecustomize that ours hides runs too."""
    env = with_meter({**os.environ, "PYTHONPATH": os.pathsep.join([str(outside), str(fake_meter)])})
    done = python("print('program')", env)
    assert done.stdout.splitlines() == ["theirs", "metered True", "program"]
    assert done.stderr == ""


def test_console_can_be_turned_off(fake_meter):
    """MELODI_CONSOLE=0 keeps the summary away."""
    env = with_meter({**os.environ, "PYTHONPATH": str(fake_meter), "MELODI_CONSOLE": "0"})
    assert python("pass", env).stdout == "metered False\n"


def test_a_broken_meter_does_not_stop_the_program(fake_meter):
    """Whatever the meter raises is one line on standard error; the program runs."""
    (fake_meter / "melodi_otel" / "__init__.py").write_text("def instrument(console):\n    raise RuntimeError('no')\n")
    done = python("print('program')", with_meter({**os.environ, "PYTHONPATH": str(fake_meter)}))
    assert done.stdout == "program\n"
    assert done.stderr == "melodi-otel run: nothing is measured: no\n"


def test_exit_code_and_arguments_are_the_programs_own(fake_meter):
    """Options behind the program belong to it, with or without --, and its exit code is ours."""
    env = {**os.environ, "PYTHONPATH": str(fake_meter)}
    for dashes in ([], ["--"]):
        code = "import sys; print(sys.argv[1:]); sys.exit(7)"
        words = [*SHELL, *dashes, sys.executable, "-c", code, "--verbose", "-x"]
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p and "site-packages" not in p)
        done = subprocess.run(
            words, env={**env, "MELODI_DISABLED": "1"}, capture_output=True, text=True, timeout=120, check=False
        )
        assert "['--verbose', '-x']" in done.stdout, done.stderr
        assert done.returncode == 7


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_signals_reach_the_program():
    """The program takes the place of the command, so a signal is its own."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    env = {**os.environ, "MELODI_DISABLED": "1"}
    done = subprocess.run([*SHELL, sys.executable, "-c", code], env=env, capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGTERM


def test_not_found_and_not_executable(tmp_path, capsys):
    """127 and 126, as a shell says it."""
    assert start(["no-such-program-at-all"], os.environ) == 127
    plain = tmp_path / "plain"
    plain.write_text("x")
    assert start([str(plain)], os.environ) == 126
    assert "not found" in capsys.readouterr().err


def test_where_a_process_cannot_be_replaced(monkeypatch):
    """The child's exit code is waited for."""
    code = command._EXECUTE["nt"](sys.executable, [sys.executable, "-c", "raise SystemExit(5)"], os.environ)
    assert code == 5


def test_record_sets_the_file(tmp_path, monkeypatch):
    """record hands MELODI_RECORD with an absolute path to the program."""
    seen = {}
    monkeypatch.setattr(command, "_EXECUTE", {os.name: lambda program, words, env: seen.update(env, words=words) or 3})
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["record", "--out", "t.jsonl", "--", "prog", "--out", "x"])
    assert result.exit_code == 3
    assert seen["MELODI_RECORD"] == str(tmp_path / "t.jsonl")
    assert seen["words"] == ["prog", "--out", "x"]
    assert seen["PYTHONPATH"].startswith(str(SITE))


def test_record_refuses_a_file_that_cannot_be_written(tmp_path):
    """A directory, or a place that does not exist, is refused before the program starts."""
    assert CliRunner().invoke(app, ["record", "--out", str(tmp_path), "--", "prog"]).exit_code == 1
    assert CliRunner().invoke(app, ["record", "--out", str(tmp_path / "no" / "t.jsonl"), "--", "prog"]).exit_code == 1


@pytest.mark.parametrize("words", [[], ["doctor"], ["demo"], ["run"], ["record"], ["replay"]])
def test_help_has_an_example(words):
    """Every command explains itself, with an example and its exit codes."""
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    if words:
        assert f"Example: melodi-otel {words[0]}" in result.stdout


def test_version():
    """--version is the package's."""
    import melodi_otel

    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == melodi_otel.__version__
