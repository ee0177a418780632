"""Reading MELODI's published files: units, what is missing, what contradicts itself, and files that are broken."""

from __future__ import annotations

import csv
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from melodi_otel.dataset.published import COLUMNS, Defect, Row, defects_of, duplicates, read
from melodi_otel.errors import DataSetError

GOOD = {
    "model_name": "gemma:2b",
    "created_at": "2024-05-20T10:00:02.5Z",
    "total_duration": "2000000000",
    "load_duration": "100000000",
    "prompt_duration": "400000000",
    "response_duration": "1500000000",
    "prompt_token_length": "12",
    "response_token_length": "100",
    "prompt": "Give three tips, please.\nThanks",
    "response": 'One, "two", three',
    "energy_consumption_monitoring": "1e-7",
    "energy_consumption_llm_cpu": "1e-5",
    "energy_consumption_llm_gpu": "4e-5",
    "energy_consumption_llm_total": "5e-5",
    "energy_consumption_llm": "5e-5",
    "type": "unknown",
    "clock_duration": "0 days 00:00:02.004000",
    "start_time": "2024-05-20 10:00:00.500000+00:00",
    "end_time": "2024-05-20 10:00:02.504000+00:00",
    "index": "0",
    "word_count": "4",
}


def written(path: Path, *rows: dict[str, str], heads: list[str] | None = None) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        sheet = csv.writer(file)
        names = heads or list(GOOD)
        sheet.writerow(names)
        sheet.writerows([row.get(name, "") for name in names] for row in rows)
    return path


def parts(path: Path) -> tuple[list[Row], list[Defect]]:
    found = list(read(path))
    return [one for one in found if isinstance(one, Row)], [one for one in found if isinstance(one, Defect)]


def test_units_are_ours(tmp_path: Path) -> None:
    """kWh become J, ns become s; texts keep their lines and quotes; nothing is wrong with it."""
    (row,), defects = parts(written(tmp_path / "a.csv", GOOD))
    assert defects == []
    assert (row.cpu_j, row.gpu_j, row.joules) == pytest.approx((36.0, 144.0, 180.0))
    assert (row.total_s, row.load_s, row.prompt_s, row.response_s, row.clock_s) == (2.0, 0.1, 0.4, 1.5, 2.004)
    assert (row.prompt_tokens, row.response_tokens, row.joules_per_token) == (12, 100, pytest.approx(1.8))
    assert (row.prompt, row.response) == (GOOD["prompt"], GOOD["response"])
    assert row.end is not None
    assert row.start is not None
    assert row.end - row.start == timedelta(seconds=2.004)
    assert row.start.astimezone(UTC) == datetime(2024, 5, 20, 10, 0, 0, 500_000, tzinfo=UTC)


def test_all_columns_of_measurements_are_known() -> None:
    assert set(COLUMNS) < set(GOOD)
    assert len(COLUMNS) == 20


@pytest.mark.parametrize("missing", ["", "nan", "NaN", "inf", "None", "-3"])
def test_what_is_missing_is_not_0(missing: str, tmp_path: Path) -> None:
    """A prompt count that Ollama leaves out is unknown, and said so once."""
    (row,), defects = parts(written(tmp_path / "a.csv", GOOD | {"prompt_token_length": missing}))
    assert row.prompt_tokens is None
    assert [defect.kind for defect in defects] == ["no prompt count"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"clock_duration": "0 days 00:00:03.000000"}, "clock"),
        ({"energy_consumption_llm_total": "6e-5"}, "sum"),
        ({"response_token_length": "285702"}, "runaway"),
        ({"response_token_length": "0"}, "no ratio"),
        ({"energy_consumption_llm_total": ""}, "no ratio"),
    ],
)
def test_a_row_that_contradicts_itself_is_named(change: dict[str, str], kind: str, tmp_path: Path) -> None:
    """By file and line, and it is still there."""
    rows, defects = parts(written(tmp_path / "a.csv", GOOD, GOOD | change))
    assert len(rows) == 2
    assert [defect.kind for defect in defects] == [kind]
    # The first row's prompt has two lines, so the second row begins in the fourth.
    assert str(defects[0]).startswith(f"a.csv:4: {kind}: ")


def test_leftovers_of_merges_are_tolerated(tmp_path: Path) -> None:
    heads = ["", "Unnamed: 0", "Unnamed: 0.1", *GOOD, "Unnamed: 0.2"]
    rows, defects = parts(written(tmp_path / "a.csv", GOOD, heads=heads))
    assert (len(rows), defects) == (1, [])


def test_columns_twice_are_told_and_the_first_counts(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", GOOD, heads=[*GOOD, "type"])
    path.write_text(path.read_text().replace(",unknown\n", ",other\n"))
    (row,), defects = parts(path)
    assert [defect.kind for defect in defects] == ["columns twice"]
    assert row.task == "unknown"


def test_a_broken_line_is_lost_alone(tmp_path: Path) -> None:
    """Its line is named, and what stands behind it is read."""
    path = written(tmp_path / "a.csv", GOOD, GOOD)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "half,a,row\n", *lines[3:]]))
    rows, defects = parts(path)
    assert len(rows) == 2
    assert [(defect.line, defect.kind, defect.lost) for defect in defects] == [(4, "broken", True)]


def test_other_encodings_are_told(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 do not end the file."""
    path = written(tmp_path / "a.csv", GOOD | {"prompt": "caf\xe9"}, GOOD)
    path.write_bytes(path.read_bytes().replace("\xe9".encode(), b"\xe9"))
    rows, defects = parts(path)
    assert len(rows) == 2
    assert [defect.kind for defect in defects] == ["encoding"]


def test_a_response_of_300_000_tokens_is_read(tmp_path: Path) -> None:
    """It is longer than what the csv module takes by itself."""
    long = "word " * 300_000
    (row,), _ = parts(written(tmp_path / "a.csv", GOOD | {"response": long}))
    assert row.response == long


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_empty_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "empty.csv"
    path.write_text(text)
    with pytest.raises(DataSetError, match=r"empty\.csv is empty"):
        list(read(path))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", GOOD, heads=[name for name in GOOD if name != "energy_consumption_llm_total"])
    with pytest.raises(DataSetError, match=r"a\.csv, line 1: no column energy_consumption_llm_total"):
        list(read(path))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataSetError, match=r"none\.csv cannot be read: No such file"):
        list(read(tmp_path / "none.csv"))


def test_duplicate_files_are_found_by_their_bytes(tmp_path: Path) -> None:
    one, two = written(tmp_path / "1.csv", GOOD), written(tmp_path / "2.csv", GOOD)
    other = written(tmp_path / "3.csv", GOOD | {"type": "code"})
    assert duplicates([one, other, two]) == [(one, two)]


def test_a_good_row_has_no_defect(tmp_path: Path) -> None:
    (row,), _ = parts(written(tmp_path / "a.csv", GOOD))
    assert list(defects_of(row)) == []
