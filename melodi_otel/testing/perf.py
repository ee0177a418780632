"""Fake perf events: the ``power`` PMU below a fake ``/sys``, and the kernel's calls for it, over the zones of a fake
powercap tree.

::

    tree = FakePowercap(tmp_path)
    perf = FakePerf(tree)
    perf.cpu(0, package=tree.package(0, watts=50.0))
    source = open_perf_rapl(settings, api=perf)
    tree.advance(10.0)                       # both ways have counted 500 J
"""

from __future__ import annotations

import errno
import os
from typing import Final

from melodi_otel.sources.perf_events import READING
from melodi_otel.testing.powercap import FakePowercap, FakeZone

SCALE_J: Final = 2.0**-32
_CONFIG: Final = {"energy-cores": 1, "energy-pkg": 2, "energy-ram": 3, "energy-gpu": 4, "energy-psys": 5}


class FakePerf:
    """The PMU and its system calls.

    Args:
        tree: where the PMU is built, and whose zones are counted.
        kind: the PMU's number.

    Attributes:
        refuses: errno of every opening; None: it works.
        refuses_event: errno of opening one event by name.
        breaks: what the next reads do instead, one each: an errno, or bytes that come back.
        gain: by how much perf events count more than powercap.
        stopped_ns: how long events were enabled without counting.
        jump_j: joules that are in the count and were never used.
        opened: (event, CPU) in the order of opening.
        reads: how many reads there were.
    """

    def __init__(self, tree: FakePowercap, kind: int = 10) -> None:
        self.refuses: int | None = None
        self.refuses_event: dict[str, int] = {}
        self.breaks: list[int | bytes] = []
        self.gain = 1.0
        self.stopped_ns = 0
        self.jump_j = 0.0
        self.opened: list[tuple[str, int]] = []
        self.reads = 0
        self._kind = kind
        self._zones: dict[tuple[int, int], FakeZone] = {}
        self._fds: dict[int, tuple[FakeZone, float]] = {}
        self._cpus: list[int] = []
        self._sysfs = tree.root
        self.path = tree.root / "bus/event_source/devices/power"
        (self.path / "events").mkdir(parents=True)
        (self.path / "type").write_text(f"{kind}\n", encoding="ascii")

    @property
    def open_fds(self) -> int:
        """Descriptors that were not given back."""
        return len(self._fds)

    def event(self, name: str, *, scale: str = "2.3283064365386962890625e-10", unit: str = "Joules") -> None:
        """Let the PMU list an event."""
        path = self.path / "events" / name
        path.write_text(f"event=0x{_CONFIG[name]:02x}\n", encoding="ascii")
        path.with_name(f"{name}.scale").write_text(f"{scale}\n", encoding="ascii")
        path.with_name(f"{name}.unit").write_text(f"{unit}\n", encoding="ascii")

    def cpu(
        self,
        number: int,
        *,
        package: FakeZone,
        dram: FakeZone | None = None,
        psys: FakeZone | None = None,
        socket: int | None = 0,
        die: int = 0,
    ) -> None:
        """A CPU of the mask, and the zones that its counters count; ``socket`` None: its topology is not told."""
        self._cpus.append(number)
        (self.path / "cpumask").write_text(",".join(map(str, self._cpus)) + "\n", encoding="ascii")
        for name, zone in (("energy-pkg", package), ("energy-ram", dram), ("energy-psys", psys)):
            if zone is not None:
                self.event(name)
                self._zones[_CONFIG[name], number] = zone
        if socket is not None:
            topology = self._sysfs / f"devices/system/cpu/cpu{number}/topology"
            topology.mkdir(parents=True)
            (topology / "physical_package_id").write_text(f"{socket}\n", encoding="ascii")
            (topology / "die_id").write_text(f"{die}\n", encoding="ascii")

    def open(self, kind: int, config: int, cpu: int) -> int:
        """As the kernel: a count that begins at 0."""
        name = next(name for name, number in _CONFIG.items() if number == config)
        code = self.refuses or self.refuses_event.get(name)
        if code is None and (kind != self._kind or (config, cpu) not in self._zones):
            code = errno.EINVAL
        if code is not None:
            raise OSError(code, os.strerror(code))
        self.opened.append((name, cpu))
        fd = 10_000 + len(self.opened)
        zone = self._zones[config, cpu]
        self._fds[fd] = (zone, zone.counted_j)
        return fd

    def read(self, fd: int) -> bytes:
        """Count, ns enabled, ns counting."""
        self.reads += 1
        if self.breaks:
            broken = self.breaks.pop(0)
            if isinstance(broken, bytes):
                return broken
            raise OSError(broken, os.strerror(broken))
        zone, start_j = self._fds[fd]
        count = round(((zone.counted_j - start_j) * self.gain + self.jump_j) / SCALE_J)
        return READING.pack(count, 10**12, 10**12 - self.stopped_ns)

    def close(self, fd: int) -> None:
        """Forget it."""
        self._fds.pop(fd, None)
