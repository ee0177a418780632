"""``%load_ext melodi_otel`` and ``%%joules``: the energy of a notebook cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from melodi_otel.results.measure import Measurement
from melodi_otel.results.table import Results


def load_ipython_extension(ipython: Any, measure: Callable[[str], Measurement]) -> None:
    """Add the cell magic ``%%joules [name]`` to ``ipython``.

    Args:
        ipython: the ``InteractiveShell``.
        measure: makes a measurement of that name and sees to it that the meter runs.
    """

    def joules(line: str, cell: str) -> Results:
        """Run the cell and show what it used: a table with the cell itself and the requests in it."""
        with measure(line.strip() or "cell") as measurement:
            ipython.run_cell(cell)
        return measurement.results()

    ipython.register_magic_function(joules, "cell", "joules")
