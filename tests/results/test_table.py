from __future__ import annotations

import builtins
import json
import sys

import pytest

from melodi_otel.attribution.books import Books, Snapshot
from melodi_otel.attribution.meter import Key
from melodi_otel.attribution.summary import summarize
from melodi_otel.errors import MissingDependency
from melodi_otel.results import Results
from melodi_otel.results.notebook import load_ipython_extension
from melodi_otel.results.table import COLUMNS, number
from melodi_otel.results.terminal import not_measured, plain, print_summary, summary


def test_rows_are_flat_and_json_able(kit):
    """A row has the documented columns, units in their names, and survives JSON."""
    (row,) = Results([kit.record(trace_id=1, span_id=2)]).to_dicts()
    assert tuple(row) == COLUMNS
    assert json.loads(json.dumps(row)) == row
    assert (row["joules"], row["uncertainty_joules"], row["joules_per_output_token"]) == (3.0, 0.3, 0.5)
    assert (row["duration_seconds"], row["time_to_first_token_seconds"]) == (2.0, 0.25)
    assert row["start_time"] == "2023-11-14T22:13:20+00:00"
    assert (row["trace_id"], row["span_id"]) == (f"{1:032x}", f"{2:016x}")


def test_unknown_is_none(kit):
    """What was not measured is None in a row and a dash in a table, never 0."""
    results = Results([kit.unknown()])
    (row,) = results.to_dicts()
    assert {row[name] for name in COLUMNS if name.endswith("joules")} == {None}
    assert (row["quality"], row["reason"]) == ("unavailable", "no_source")
    assert "unavailable (no_source)" in repr(results)
    assert " 0.00 " not in repr(results)


def test_labels_are_columns_of_their_own(kit):
    """A configured label is the column label_NAME."""
    (row,) = Results([kit.record(labels={"tenant": "a"})]).to_dicts()
    assert row["label_tenant"] == "a"


def test_behaves_as_a_list(kit):
    """Length, index, slice, iteration, equality."""
    records = [kit.record(name) for name in "abc"]
    results = Results(records)
    assert (len(results), results[-1].name, [r.name for r in results[:2]]) == (3, "c", ["a", "b"])
    assert isinstance(results[:2], Results)
    assert results == Results(records)
    assert list(results) == records


def test_pandas_frame(kit):
    """to_pandas has the columns of to_dicts, also when it is empty."""
    pytest.importorskip("pandas")
    frame = Results([kit.record(), kit.record("b", labels={"tenant": "a"})]).to_pandas()
    assert list(frame.columns) == [*COLUMNS, "label_tenant"]
    assert frame["joules"].sum() == 6.0
    assert list(Results().to_pandas().columns) == list(COLUMNS)


def test_missing_pandas_names_the_pip_line(kit, monkeypatch):
    """Without pandas the error is the line that installs it."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependency, match=r"pip install \"melodi-otel\[dataset\]\""):
        Results([kit.record()]).to_pandas()


def test_terminal_and_notebook_show_the_same_cells(kit):
    """Both tables carry name, joules, uncertainty, method and quality; HTML is escaped."""
    results = Results([kit.record("<b>chat</b>", model=None)])
    text, html = repr(results), results._repr_html_()
    for cell in ("3.00", "0.30", "0.500", "exclusive", "measured"):
        assert cell in text
        assert f"<td>{cell}</td>" in html
    assert "&lt;b&gt;chat&lt;/b&gt;" in html
    assert "<b>chat</b>" in text
    assert repr(Results()) == "no finished requests yet"


def test_a_block_shows_its_sum(kit):
    """A measured block shows the joules with everything nested in it, marked, and no uncertainty that is not its own."""
    energy = summarize([kit.share(Key("g", "b"), 1.0, rollup=4.0)], kit.DEVICES)
    text = repr(Results([kit.record("b", kind="measure", energy=energy, output_tokens=None)]))
    assert "Σ 4.00" in text
    assert "0.30" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0.00"), (1234.5, "1,234.50"), (0.0004, "0.0004"), (-2.2e-17, "0.00"), (-2.0, "-2.00")],
)
def test_numbers(value, text):
    """Small figures do not vanish, unknown ones are a dash."""
    assert number(value) == text


def test_summary_has_requests_books_and_what_is_missing(kit):
    """The summary shows the rows, the balance per device, and one line on what is not measured."""
    books = {"intel-rapl:0": Books("intel-rapl:0", measured=10.0, attributed=6.0, idle=3.0, tail=1.0)}
    text = plain(summary([kit.record()] * 25, Snapshot(1, books, {}, {}, {}), kit.DEVICES), width=200)
    assert "… and 5 earlier ones" in text
    assert "Some CPU" in text
    assert [line.split()[-1] for line in text.splitlines() if line.strip().startswith("= measured")] == ["10.00"]
    assert "0e+00" in text
    assert "Not measured: the GPU, memory (DRAM), disks, fans" in text
    assert "Estimated" not in text


def test_summary_says_when_nothing_is_measured():
    """Without a meter and without a request the summary says both."""
    text = plain(summary([], None, {}))
    assert "No request was measured." in text
    assert not_measured({}).startswith("Nothing is measured")


def test_summary_marks_estimates(kit):
    """Joules from a model of the load are called estimated."""
    from dataclasses import replace

    assert "Estimated" in plain(summary([], None, {"x": replace(kit.CPU, estimated=True)}))


def test_printed_summary_goes_where_it_is_told(kit, capsys):
    """print_summary writes to standard error and leaves standard output alone."""
    print_summary([kit.record()], None, kit.DEVICES)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Energy per request" in captured.err


def test_joules_magic(bench):
    """%%joules runs the cell inside a measurement and returns its table."""

    class Shell:
        ran: list[str] = []

        def register_magic_function(self, function, magic_kind, magic_name):
            assert (magic_kind, magic_name) == ("cell", "joules")
            self.magic = function

        def run_cell(self, cell):
            self.ran.append(cell)

    shell = Shell()
    load_ipython_extension(shell, bench.measure)
    assert [r.name for r in shell.magic(" tea ", "1 + 1")] == ["tea"]
    assert [r.name for r in shell.magic("", "2")] == ["cell"]
    assert shell.ran == ["1 + 1", "2"]


def test_tables_need_no_optional_package(kit, monkeypatch):
    """Rows and HTML work without pandas and IPython."""
    real = builtins.__import__

    def guarded(name, *args, **kwargs):
        assert name.split(".")[0] not in ("pandas", "IPython")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    results = Results([kit.record()])
    assert results.to_dicts()
    assert results._repr_html_()
