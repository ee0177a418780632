"""A fake ``AppleEnergyMonitor``.

::

    chip = FakeAppleMonitor(cpu=10.0, gpu=20.0, dram=2.0)
    source = open_apple(settings, monitor=lambda: chip, platform="darwin", machine="arm64")
    chip.advance(10.0)                       # 100, 200 and 20 J later
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Final

_FIELDS: Final = {"cpu": "cpu_total_mj", "gpu": "gpu_mj", "dram": "dram_mj", "sram": "gpu_sram_mj", "ane": "ane_mj"}


class FakeAppleMonitor:
    """A chip.

    Args:
        watts: power by part: ``cpu``, ``gpu``, ``dram``, ``sram``, ``ane``; a part that is left out is not told.

    Attributes:
        fails: errors that the next calls raise, one each.
    """

    def __init__(self, **watts: float) -> None:
        self.fails: list[Exception] = []
        self._watts = watts
        self._joules = dict.fromkeys(watts, 0.0)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        for part, watts in self._watts.items():
            self._joules[part] += watts * seconds

    def forget(self, part: str) -> None:
        """Let a part be told no more."""
        del self._watts[part], self._joules[part]

    def get_cumulative_energy(self) -> SimpleNamespace:
        """As ``AppleEnergyMetrics``: mJ, or None."""
        if self.fails:
            raise self.fails.pop(0)
        told = {_FIELDS[part]: int(joules * 1000) for part, joules in self._joules.items()}
        return SimpleNamespace(**{**dict.fromkeys(_FIELDS.values()), **told})
