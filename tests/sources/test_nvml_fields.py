"""Field values: the raw figures of NVML's types, by the built-once call and by the binding's own."""

from __future__ import annotations

import pytest

from melodi_otel.sources.nvml_library import FieldCall, _figure

CASES = [
    (0, 0x4059000000000000, 100),  # double 100.0
    (1, 0xDEADBEEF00000007, 7),  # unsigned int: the upper half is whatever was there
    (2, 2**40, 2**40),
    (3, 2**63 + 5, 2**63 + 5),
    (4, 2**64 - 2, -2),
    (5, 0xFFFFFFFE, -2),
    (6, 0x1_0003, 3),
    (7, 1, None),  # a type of a later NVML
]


@pytest.mark.parametrize(("kind", "raw", "expected"), CASES)
def test_figure(kind: int, raw: int, expected: int | None) -> None:
    """64 raw bits are read as NVML's value type says."""
    assert _figure(kind, raw) == expected


class Answer:
    """One answer as the binding gives it."""

    def __init__(self, code: int, joules: int) -> None:
        self.nvmlReturn = code
        self.valueType = 3
        self.value = type("Value", (), {"ullVal": joules})()


class Binding:
    """A binding that hands out no function pointers."""

    def nvmlDeviceGetFieldValues(self, handle: object, fields: object) -> list[Answer]:
        return [Answer(0, 42), Answer(3, 0)]


def test_binding_without_function_pointers() -> None:
    """The binding's own call serves, with None for a field that was not answered."""
    call = FieldCall(Binding(), [(83, 0), (186, 0)])  # type: ignore[arg-type]
    assert call("handle") == {83: 42, 186: None}
