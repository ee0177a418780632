from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from melodi_otel.cli.app import app

TRACE = [
    {"kind": "device", "id": "g", "type": "gpu", "idle_watts": 0.0},
    {"kind": "sample", "t": 0.0, "device": "g", "joules": 0.0},
    {"kind": "open", "t": 1.0, "id": "r", "devices": ["g"], "model": "m", "prompt_tokens": 4},
    {"kind": "close", "t": 2.0, "id": "r", "output_tokens": 4, "outcome": "stop"},
    {"kind": "sample", "t": 3.0, "device": "g", "joules": 30.0},
    {"kind": "sample", "t": 4.0, "device": "g", "joules": 30.0},
    {"kind": "sample", "t": 8.0, "device": "g", "joules": 40.0},
]


def text(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(text(TRACE))
    return path


def rows(output):
    return [json.loads(line) for line in output.splitlines()]


def test_shares_and_books_go_to_the_file(trace, tmp_path):
    """One share per request and device, one books line per device; the table goes to standard error."""
    out = tmp_path / "shares.jsonl"
    result = CliRunner().invoke(app, ["replay", str(trace), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    share, books = rows(out.read_text())
    assert (share["kind"], share["id"], share["device"]) == ("share", "r", "g")
    assert books["kind"] == "books"
    booked = sum(value for name, value in books.items() if name not in ("kind", "device", "measured"))
    assert booked == pytest.approx(books["measured"], rel=1e-9)
    assert "1 requests, 1 shares, 7 lines, 0 warnings" in result.stderr
    assert "The books" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shares.jsonl", "trace.jsonl"]


def test_standard_input_and_output(trace):
    """- reads standard input and writes standard output, nothing else."""
    piped = CliRunner().invoke(app, ["replay", "-"], input=trace.read_bytes())
    file = CliRunner().invoke(app, ["replay", str(trace), "--out", "-"])
    assert piped.exit_code == file.exit_code == 0
    assert rows(piped.stdout) == rows(file.stdout)


def test_policy_and_method_reach_the_attribution(trace):
    """The static policy and the evidence are chosen by options."""
    result = CliRunner().invoke(app, ["replay", str(trace), "--policy", "dynamic", "--method", "equal"])
    assert result.exit_code == 0
    assert rows(result.stdout)[0]["static"] == 0.0
    assert CliRunner().invoke(app, ["replay", str(trace), "--method", "best"]).exit_code == 2


def test_broken_lines_are_counted(tmp_path):
    """A broken line and an unknown kind are left out, named and counted; the rest is attributed."""
    path = tmp_path / "t.jsonl"
    path.write_text("{broken\n" + text([{"kind": "weather"}, *TRACE]))
    result = CliRunner().invoke(app, ["replay", str(path)])
    assert result.exit_code == 0, result.output
    assert "line 1 is left out" in result.stderr
    assert "unknown kind weather is left out (1 times)" in result.stderr
    assert "2 warnings" in result.stderr


def test_no_trace_at_all(tmp_path):
    """A file that is no trace is exit code 1 with file and line, and no output appears."""
    path = tmp_path / "t.jsonl"
    path.write_text("hello\nworld\n")
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(app, ["replay", str(path), "--out", str(out)])
    assert result.exit_code == 1
    assert f"{path}, line 1:" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def test_missing_files(tmp_path, trace):
    """An unreadable input or an unwritable output is exit code 1, not a stack."""
    assert CliRunner().invoke(app, ["replay", str(tmp_path / "no.jsonl")]).exit_code == 1
    result = CliRunner().invoke(app, ["replay", str(trace), "--out", str(tmp_path / "no" / "x.jsonl")])
    assert result.exit_code == 1
    assert "No such file" in result.stderr


def test_binary_rubbish(tmp_path):
    """Bytes that are no text are broken lines."""
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\xff\xfe\x00\n" + text(TRACE).encode())
    result = CliRunner().invoke(app, ["replay", str(path)])
    assert result.exit_code == 0, result.output
    assert "1 warning" in result.stderr


def test_an_empty_trace(tmp_path):
    """An empty trace has no shares and no warning."""
    path = tmp_path / "t.jsonl"
    path.write_text("")
    result = CliRunner().invoke(app, ["replay", str(path)])
    assert (result.exit_code, result.stdout) == (0, "")
