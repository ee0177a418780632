"""The paper's tables, reckoned again from its own numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from melodi_otel.dataset import paper


@pytest.mark.parametrize("prompts", paper.TABLE_2)
def test_table_2_is_the_mean_of_table_5s_means(prompts: paper.PromptSet) -> None:
    """Every data set counts the same, however many responses it has."""
    kwh, tokens = paper.mean([row for row in paper.TABLE_5 if row.prompts == prompts])
    assert (kwh, tokens) == pytest.approx(paper.TABLE_2[prompts], rel=2e-3)


@pytest.mark.parametrize("which", [key for key in paper.TABLE_3 if key != ("qwen2", 7)])
def test_table_3_is_the_mean_of_table_5s_means(which: tuple[str, int]) -> None:
    kwh, tokens = paper.mean(paper.rows(*which))
    assert kwh == pytest.approx(paper.TABLE_3[which][0], rel=3e-2)
    assert tokens == pytest.approx(paper.TABLE_3[which][1], rel=5e-2)


def test_qwen2_7b_is_not() -> None:
    """Its mean energy is 1.17e-4 kWh by Table 5, and 8.37e-5 is printed."""
    kwh, tokens = paper.mean(paper.rows("qwen2", 7))
    assert kwh == pytest.approx(1.165e-4, rel=1e-3)
    assert tokens == pytest.approx(paper.TABLE_3["qwen2", 7][1], rel=1e-3)


@pytest.mark.parametrize(
    ("number", "joules", "per_token"),
    [(1, 666, 1.650), (4, 11988, 34.99), (7, 138, 0.750), (15, 8136, 32.36), (16, 116, 0.523), (19, 400, 4.078)],
)
def test_joules_of_table_5(number: int, joules: float, per_token: float) -> None:
    row = paper.TABLE_5[number - 1]
    assert row.number == number
    assert row.joules == pytest.approx(joules, abs=0.51)
    assert row.joules_per_token == pytest.approx(per_token, rel=5e-4)


def test_table_5_has_49_501_responses() -> None:
    assert sum(row.n for row in paper.TABLE_5) == 49_501


def test_large_models_need_9_to_24_times_per_token() -> None:
    """Codellama on one machine, llama3 on two, qwen2 on one."""
    assert paper.per_token("codellama", 70, 7) == [pytest.approx(24.4, abs=0.05)]
    assert paper.per_token("llama3", 70, 8) == [pytest.approx(17.1, abs=0.05)]
    assert paper.per_token("qwen2", 72, 7) == [pytest.approx(9.4, abs=0.05)]


def test_seven_over_two_is_2_3_to_2_5() -> None:
    found = paper.per_token("gemma", 7, 2)
    assert (min(found), max(found)) == (pytest.approx(2.34, abs=5e-3), pytest.approx(2.49, abs=5e-3))


def test_laptops_need_less_for_two_of_seven() -> None:
    found = paper.laptop_over_workstation()
    assert len(found) == 7
    assert {model: round(ratio, 2) for (_, model, _), ratio in found.items() if ratio < 1.0} == {
        "phi": 0.63,
        "qwen2": 0.36,
    }


def test_the_closed_forms_slope_is_1_9_joules_a_token() -> None:
    assert pytest.approx(1.90, abs=5e-3) == paper.RQ4_KWH_PER_TOKEN * paper.J_PER_KWH


def test_correlations_are_sorted_and_in_range() -> None:
    assert list(paper.TABLE_6.values()) == sorted(paper.TABLE_6.values(), reverse=True)
    assert all(-1.0 <= r <= 1.0 for r in paper.TABLE_6.values())


def test_wins_of_table_7_are_20_data_sets() -> None:
    for column in (0, 1):
        assert sum(columns[column][1] for columns in paper.TABLE_7.values()) == 20


def test_contradictions_are_listed_with_their_figures() -> None:
    """Each with what the numbers give; none of them written by hand."""
    told = {one.says: one.gives for one in paper.contradictions()}
    assert told["70B models need about two orders of magnitude more energy per token"] == "9.4 to 24.4 times"
    assert told["gemma-7b needs about 10 times what gemma-2b does"] == "2.34 to 2.49 times"
    assert told["laptop 1 needs as much for a 2b model as for a 7b one"].endswith("by 46 %")
    assert "2 of 7 pairs" in told["laptops consistently need more than the workstation"]
    assert told["qwen2-7b: 8.37e-05 kWh"] == "Table 5 gives 0.0001165 kWh"
    assert "phi-2b is lower" in told["gemma-2b has the lowest mean (8.18e-05 kWh)"]
    assert "1,270 to 2,281 times" in told["MELODI's figure of the CPU is the more precise one"]
    assert told["LR has the best mean R² by prompt features"] == "XGB has: -0.47 against -18.34"
    assert told["SVM: -12392.1"] == "the same figure stands in both columns"
    assert told["PyJoules: 2.81e-10 kWh per token of the GPU"].startswith("907 times")
    assert len(told) == 10


def test_the_page_has_the_same_list() -> None:
    """docs/dataset.md, line by line."""
    page = (Path(__file__).parents[2] / "docs/dataset.md").read_text(encoding="utf-8")
    for one in paper.contradictions():
        assert f"| {one.where} | {one.says} | {one.gives} |" in page
