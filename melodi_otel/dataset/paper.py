"""The figures that MELODI's paper prints (arXiv 2407.16893 v2), and what its own numbers say about its sentences.

Energies are kWh, as printed; tokens are response tokens, means of a data set. Nothing here is measured by this project.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, Literal

J_PER_KWH: Final = 3.6e6

PromptSet = Literal["alpaca", "code-feedback"]


@dataclass(frozen=True, slots=True)
class Measured:
    """A row of Table 5: one data set.

    Attributes:
        number: the paper's.
        prompts, model, size, hardware: what was asked of what, where; ``size`` in 1e9 parameters.
        n: responses.
        kwh: mean energy of a response.
        tokens: mean tokens of a response.
    """

    number: int
    prompts: PromptSet
    model: str
    size: int
    hardware: str
    n: int
    kwh: float
    tokens: float

    @property
    def joules(self) -> float:
        """Mean J of a response."""
        return self.kwh * J_PER_KWH

    @property
    def joules_per_token(self) -> float:
        """Ratio of the means, which is not the mean of the ratios: that cannot be known from the table."""
        return self.joules / self.tokens


TABLE_5: Final[tuple[Measured, ...]] = (
    Measured(1, "code-feedback", "codellama", 7, "laptop1", 5347, 1.85e-4, 403.63),
    Measured(2, "code-feedback", "codellama", 7, "laptop2", 3572, 2.46e-4, 518.40),
    Measured(3, "code-feedback", "codellama", 7, "workstation", 1000, 2.73e-4, 685.06),
    Measured(4, "code-feedback", "codellama", 70, "workstation", 1000, 3.33e-3, 342.64),
    Measured(5, "alpaca", "gemma", 2, "laptop1", 5347, 1.85e-4, 401.64),
    Measured(6, "alpaca", "gemma", 2, "laptop2", 5101, 4.70e-5, 181.52),
    Measured(7, "alpaca", "gemma", 2, "workstation", 1000, 3.84e-5, 184.30),
    Measured(8, "code-feedback", "gemma", 2, "laptop2", 5008, 7.33e-5, 303.98),
    Measured(9, "code-feedback", "gemma", 2, "workstation", 1000, 6.60e-5, 324.14),
    Measured(10, "alpaca", "gemma", 7, "laptop2", 5099, 9.81e-5, 160.60),
    Measured(11, "alpaca", "gemma", 7, "workstation", 1000, 8.05e-5, 164.90),
    Measured(12, "code-feedback", "gemma", 7, "laptop2", 3405, 2.00e-4, 332.62),
    Measured(13, "code-feedback", "gemma", 7, "workstation", 1000, 1.65e-4, 339.21),
    Measured(14, "alpaca", "llama3", 8, "laptop2", 5101, 1.34e-4, 255.20),
    Measured(15, "alpaca", "llama3", 70, "server", 1026, 2.26e-3, 251.46),
    Measured(16, "alpaca", "phi", 2, "laptop2", 674, 3.22e-5, 221.63),
    Measured(17, "alpaca", "phi", 2, "workstation", 1000, 3.15e-5, 136.98),
    Measured(18, "alpaca", "qwen2", 7, "laptop2", 821, 1.22e-4, 300.70),
    Measured(19, "alpaca", "qwen2", 7, "workstation", 1000, 1.11e-4, 97.99),
    Measured(20, "alpaca", "qwen2", 72, "workstation", 1000, 2.25e-3, 210.82),
)
TABLE_2: Final[dict[PromptSet, tuple[float, float]]] = {
    "alpaca": (4.49e-4, 213.98),
    "code-feedback": (5.68e-4, 405.96),
}
"""Prompt set -> printed mean (kWh, tokens)."""
TABLE_3: Final[dict[tuple[str, int], tuple[float, float]]] = {
    ("codellama", 7): (2.35e-4, 535.03),
    ("codellama", 70): (3.33e-3, 342.64),
    ("gemma", 2): (8.18e-5, 279.11),
    ("gemma", 7): (1.36e-4, 249.33),
    ("llama3", 8): (1.34e-4, 255.20),
    ("llama3", 70): (2.26e-3, 251.46),
    ("phi", 2): (3.14e-5, 179.30),
    ("qwen2", 7): (8.37e-5, 199.34),
    ("qwen2", 72): (2.25e-3, 210.82),
}
"""(model, size) -> printed mean (kWh, tokens)."""
TABLE_6: Final[dict[str, float]] = {
    "response_duration": 0.770,
    "total_duration": 0.766,
    "response_token_length": 0.755,
    "prompt_duration": 0.129,
    "adj_count": 0.101,
    "polysyllabcount": 0.087,
    "long_word_count": 0.085,
    "syllable_count": 0.079,
    "letter_count": 0.079,
    "char_count": 0.076,
    "reading_time": 0.076,
    "lexicon_count": 0.075,
    "adverb_count": 0.073,
    "prompt_token_length": 0.073,
    "stop_word_count": 0.070,
    "noun_count": 0.070,
    "verb_count": 0.068,
    "monosyllabcount": 0.067,
    "word_count": 0.065,
    "sentence_count": 0.058,
}
"""Pearson's r with the energy of a response, over all samples."""
TABLE_7: Final[dict[str, tuple[tuple[float, int], tuple[float, int]]]] = {
    "DT": ((0.87, 0), (-156.14, 0)),
    "GB": ((0.89, 5), (-134.72, 10)),
    "LR": ((0.96, 13), (-18.34, 0)),
    "RF": ((0.89, 2), (-48.01, 6)),
    "SVM": ((-12392.08, 0), (-12392.08, 0)),
    "XGB": ((-1.17, 0), (-0.47, 4)),
}
"""Model -> (mean R², data sets it is best for), by response length, and by prompt features."""
RQ4_KWH_PER_TOKEN: Final = 5.28e-7
"""Slope of the paper's closed form (equation 1)."""
RQ6: Final[dict[str, tuple[float, float]]] = {
    "MELODI": (6.40e-11, 1.22e-7),
    "CodeCarbon": (1.40e-7, 2.57e-7),
    "EnergyMeter": (8.13e-8, 2.53e-7),
    "PyJoules": (1.46e-7, 2.81e-10),
}
"""Tool -> kWh per token of (CPU, GPU), one model on one laptop."""
DUPLICATE: Final = 5
"""The row of Table 5 whose published file is reported to be row 1's, byte for byte."""


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A sentence of the paper beside what its own tables give.

    Attributes:
        where: table or research question.
        says: the sentence, shortened.
        gives: what its numbers give, in words with figures.
    """

    where: str
    says: str
    gives: str


def rows(model: str, size: int, *, without: Iterable[int] = ()) -> list[Measured]:
    """Table 5's data sets of one model."""
    left_out = set(without)
    return [row for row in TABLE_5 if (row.model, row.size) == (model, size) and row.number not in left_out]


def mean(of: Sequence[Measured]) -> tuple[float, float]:
    """(kWh, tokens): every data set counts the same, as in the paper's tables 2 and 3."""
    return fmean(row.kwh for row in of), fmean(row.tokens for row in of)


def per_token(model: str, large: int, small: int) -> list[float]:
    """How many times the J per token of the small model the large one needs, wherever the table has both.

    Same prompts and hardware where there are any such pairs, else the same prompts.
    """
    pairs = [(a, b) for a in rows(model, large) for b in rows(model, small) if a.prompts == b.prompts]
    there = [(a, b) for a, b in pairs if a.hardware == b.hardware]
    return [a.joules_per_token / b.joules_per_token for a, b in there or pairs]


def laptop_over_workstation() -> dict[tuple[PromptSet, str, int], float]:
    """J per token on laptop 2, divided by that on the workstation."""
    found: dict[tuple[PromptSet, str, int], float] = {}
    for row in TABLE_5:
        for other in TABLE_5:
            same = (row.prompts, row.model, row.size) == (other.prompts, other.model, other.size)
            if same and (row.hardware, other.hardware) == ("laptop2", "workstation"):
                found[row.prompts, row.model, row.size] = row.joules_per_token / other.joules_per_token
    return found


def contradictions() -> list[Contradiction]:
    """Where the paper's numbers do not say what its sentences do."""
    found: list[Contradiction] = []

    def say(where: str, says: str, gives: str) -> None:
        found.append(Contradiction(where, says, gives))

    large = [*per_token("codellama", 70, 7), *per_token("llama3", 70, 8), *per_token("qwen2", 72, 7)]
    say(
        "RQ1, Table 5",
        "70B models need about two orders of magnitude more energy per token",
        f"{min(large):.1f} to {max(large):.1f} times",
    )
    gemma = per_token("gemma", 7, 2)
    say(
        "RQ1, Table 5",
        "gemma-7b needs about 10 times what gemma-2b does",
        f"{min(gemma):.2f} to {max(gemma):.2f} times",
    )
    whole, clean = mean(rows("gemma", 2))[0], mean(rows("gemma", 2, without=(DUPLICATE,)))[0]
    say(
        "RQ1, Tables 3 and 5",
        "laptop 1 needs as much for a 2b model as for a 7b one",
        f"row {DUPLICATE} is reported to be row 1's file; it raises gemma-2b's mean by {100 * (whole / clean - 1):.0f} %",
    )
    apart = laptop_over_workstation()
    less = sorted(f"{model}-{size}b {ratio:.2f}" for (_, model, size), ratio in apart.items() if ratio < 1.0)
    say(
        "RQ1, Table 5",
        "laptops consistently need more than the workstation",
        f"{len(less)} of {len(apart)} pairs need less per token: {', '.join(less)} times",
    )
    lowest = min(TABLE_3, key=lambda key: TABLE_3[key][0])
    say(
        "RQ1, Table 3",
        f"gemma-2b has the lowest mean ({TABLE_3['gemma', 2][0]:.3g} kWh)",
        f"{lowest[0]}-{lowest[1]}b is lower ({TABLE_3[lowest][0]:.3g} kWh)",
    )
    for (model, size), (printed, _) in TABLE_3.items():
        reckoned = mean(rows(model, size))[0]
        if abs(printed / reckoned - 1.0) > 0.05:
            say("Table 3", f"{model}-{size}b: {printed:.3g} kWh", f"Table 5 gives {reckoned:.4g} kWh")
    others = [cpu / RQ6["MELODI"][0] for tool, (cpu, _) in RQ6.items() if tool != "MELODI"]
    say(
        "RQ6",
        "MELODI's figure of the CPU is the more precise one",
        f"it is {min(others):,.0f} to {max(others):,.0f} times below the three others: probably another process was measured",
    )
    agreeing = fmean((RQ6["CodeCarbon"][1], RQ6["EnergyMeter"][1]))
    say(
        "RQ6",
        f"PyJoules: {RQ6['PyJoules'][1]:.3g} kWh per token of the GPU",
        f"{agreeing / RQ6['PyJoules'][1]:.0f} times below CodeCarbon and EnergyMeter: a slip of units by 1,000",
    )
    best = max(TABLE_7, key=lambda name: TABLE_7[name][1][0])
    say(
        "RQ3, Table 7",
        "LR has the best mean R² by prompt features",
        f"{best} has: {TABLE_7[best][1][0]:g} against {TABLE_7['LR'][1][0]:g}",
    )
    twice = [name for name, (response, prompt) in TABLE_7.items() if response == prompt]
    say("RQ3, Table 7", f"{', '.join(twice)}: {TABLE_7[twice[0]][0][0]:g}", "the same figure stands in both columns")
    return found
