"""A fake ``/sys`` with RAPL zones, laid out as Linux does it: directories below ``devices/virtual/powercap`` and links to
them below ``class/powercap``.

::

    tree = FakePowercap(tmp_path)
    package = tree.package(0, watts=50.0)
    dram = tree.dram(package, watts=8.0)
    tree.advance(10.0)                       # 500 J and 80 J later; counters wrap at their range
    Settings(clock=clock, environ={}, sysfs=str(tree.root))
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

INTEL_RANGE_UJ: Final = 262_143_328_850
AMD_RANGE_UJ: Final = 65_532_610_987


class FakeZone:
    """One zone: a directory with ``name``, ``energy_uj`` and ``max_energy_range_uj``.

    Attributes:
        id: directory name, e.g. ``intel-rapl:0``.
        watts: power that :meth:`FakePowercap.advance` adds.
        counted_j: what it has counted by :meth:`advance`, without any wrap.
    """

    def __init__(self, path: Path, name: str, energy_uj: int, range_uj: int, watts: float) -> None:
        self.path = path
        self.id = path.name
        self.range_uj = range_uj
        self.watts = watts
        self.counted_j = 0.0
        self._exact_uj = float(energy_uj)
        self._mirrors: list[FakeZone] = []
        path.mkdir(parents=True)
        (path / "name").write_text(f"{name}\n", encoding="ascii")
        (path / "max_energy_range_uj").write_text(f"{range_uj}\n", encoding="ascii")
        self.energy_path = path / "energy_uj"
        self.energy_path.write_bytes(b"")
        self.set(energy_uj)

    @property
    def energy_uj(self) -> int:
        """What the counter shows."""
        return int(self._exact_uj)

    def set(self, energy_uj: float) -> None:
        """Let the counter show this, in uJ; from its range on it begins at 0 again."""
        self._exact_uj = energy_uj % self.range_uj
        self.write(b"%020d\n" % int(self._exact_uj))
        for mirror in self._mirrors:
            mirror.set(energy_uj)

    def advance(self, joules: float) -> None:
        """Let the counter count ``joules``."""
        self.counted_j += joules
        self.set(self._exact_uj + joules * 1e6)

    def write(self, raw: bytes) -> None:
        """Put any bytes into the counter's file, e.g. ``b""`` for a torn read.

        The file is written in place, in one write of constant length, because readers keep it open and may read at any time.
        """
        with self.energy_path.open("r+b", buffering=0) as file:
            file.write(raw)
            if len(raw) != 21:
                file.truncate(len(raw))

    def mirror(self, other: FakeZone) -> None:
        """Let ``other`` show this very counter from now on, as the dies of older AMD sockets do."""
        self._mirrors.append(other)
        other.set(self._exact_uj)
        other.watts = 0.0


class FakePowercap:
    """The tree. Zones begin at different figures, as real ones do: equal counters would look like one counter.

    Args:
        root: an empty directory that stands for ``/sys``.
        range_uj: where counters wrap that are not told otherwise.
    """

    def __init__(self, root: Path, range_uj: int = INTEL_RANGE_UJ) -> None:
        self.root = root
        self.zones: list[FakeZone] = []
        self._range_uj = range_uj
        self._devices = root / "devices/virtual/powercap"
        self._links = root / "class/powercap"
        for directory in (self._devices / "intel-rapl", self._links):
            directory.mkdir(parents=True, exist_ok=True)

    def package(
        self,
        number: int,
        *,
        name: str | None = None,
        watts: float = 0.0,
        energy_uj: int | None = None,
        range_uj: int | None = None,
        view: str = "",
    ) -> FakeZone:
        """A CPU package; ``view="-mmio"`` for its memory-mapped copy."""
        control = f"intel-rapl{view}"
        path = self._devices / control / f"{control}:{number}"
        return self._zone(path, name or f"package-{number}", watts, energy_uj, range_uj)

    def psys(self, number: int, *, watts: float = 0.0, energy_uj: int | None = None) -> FakeZone:
        """The meter of the whole platform, numbered among the packages."""
        return self.package(number, name="psys", watts=watts, energy_uj=energy_uj)

    def child(
        self,
        package: FakeZone,
        name: str,
        *,
        watts: float = 0.0,
        energy_uj: int | None = None,
        range_uj: int | None = None,
    ) -> FakeZone:
        """A zone below a package: ``core``, ``uncore``, ``dram``."""
        number = sum(zone.path.parent == package.path for zone in self.zones)
        return self._zone(package.path / f"{package.id}:{number}", name, watts, energy_uj, range_uj)

    def dram(self, package: FakeZone, *, watts: float = 0.0, energy_uj: int | None = None) -> FakeZone:
        """The memory beside a package."""
        return self.child(package, "dram", watts=watts, energy_uj=energy_uj)

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass at each zone's ``watts``."""
        for zone in self.zones:
            if zone.watts:
                zone.advance(zone.watts * seconds)

    @contextmanager
    def live(self, every_s: float = 0.005) -> Generator[FakePowercap]:
        """While entered the zones count in real time, each at its ``watts``."""
        stop = threading.Event()

        def count() -> None:
            before = time.monotonic()
            while not stop.wait(every_s):
                now = time.monotonic()
                self.advance(now - before)
                before = now

        thread = threading.Thread(target=count, name="fake-powercap", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()

    def _zone(self, path: Path, name: str, watts: float, energy_uj: int | None, range_uj: int | None) -> FakeZone:
        start = energy_uj if energy_uj is not None else 1_000_000_000 + 7_654_321 * len(self.zones)
        zone = FakeZone(path, name, start, range_uj or self._range_uj, watts)
        (self._links / zone.id).symlink_to(Path("../..") / path.relative_to(self.root))
        self.zones.append(zone)
        return zone
