"""A fake ``/sys/cray/pm_counters``: counters of whole joules that move together, ten times a second.

::

    node = FakeCray(tmp_path / "sys", node=600.0, cpu=200.0, memory=50.0, accel0=300.0)
    node.advance(10.0)                       # 6000, 2000, 500 and 3000 J later
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

UPDATES_PER_S: Final = 10


class FakeCray:
    """The tree.

    Args:
        root: the directory that stands for ``/sys``.
        watts: power by counter: ``node``, ``cpu``, ``memory``, ``accel0``, ….

    Attributes:
        watts: as above; may be changed.
        path: the tree's directory.
    """

    def __init__(self, root: Path, **watts: float) -> None:
        self.path = root / "cray/pm_counters"
        self.path.mkdir(parents=True)
        self.watts = watts
        self._t_s = 0.0
        self._updates = 1000
        self._joules = {name: 5000.0 * (watt > 0.0) for name, watt in watts.items()}
        self._shown = dict(self._joules)
        for name, text in (("version", "2"), ("raw_scan_hz", "10"), ("startup", "1"), ("generation", "1")):
            (self.path / name).write_text(f"{text}\n", encoding="ascii")
        self.update()

    def file(self, name: str) -> Path:
        """The file of a counter."""
        return self.path / ("energy" if name == "node" else f"{name}_energy")

    def update(self) -> None:
        """Let the controller write all counters anew."""
        self._updates += 1
        self._shown = dict(self._joules)
        for name, joules in self._shown.items():
            self.write(
                self.file(name), f"{int(joules)} J {1_700_000_000_000_000 + round(self._t_s * 1e6)} us\n".encode()
            )
        self.write(self.path / "freshness", f"{self._updates}\n".encode())

    def advance(self, seconds: float) -> None:
        """Let time pass; what is shown is the state of the last update."""
        before, self._t_s = self._t_s, self._t_s + seconds
        first, last = round(before * UPDATES_PER_S, 6) // 1, round(self._t_s * UPDATES_PER_S, 6) // 1
        if last > first:
            at_s = last / UPDATES_PER_S
            for name, watts in self.watts.items():
                self._joules[name] += watts * (at_s - first / UPDATES_PER_S)
            self.update()

    def write(self, path: Path, raw: bytes) -> None:
        """Any bytes into one of the files, in place."""
        path.touch()
        with path.open("r+b", buffering=0) as file:
            file.write(raw)
            file.truncate(len(raw))
