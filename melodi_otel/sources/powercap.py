"""The powercap tree: which RAPL zones there are, and why there are none.

``/sys/class/powercap`` holds links, ``/sys/devices/virtual/powercap`` the directories; container runtimes mask the second,
so links lead nowhere there, and whoever mounts only one of them elsewhere has only that one. Both are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from melodi_otel.errors import Refused
from melodi_otel.sources.base import Settings
from melodi_otel.sources.procstat import cpu_fact
from melodi_otel.units import microjoules

_ZONE: Final = re.compile(r"intel-rapl(?P<view>-[a-z]+)?:(?P<package>\d+)(?::(?P<sub>\d+))?")
_VIEWS: Final = ("", "-tpmi", "-mmio")
"""Registers, the newer mailbox, the memory-mapped copy: three views of one package, the first that is there is kept."""
_MASKED: Final = "devices/virtual/powercap"

Kind = Literal["package", "dram", "psys"]


@dataclass(frozen=True, slots=True)
class Zone:
    """A RAPL zone that is used.

    Attributes:
        id: directory name, e.g. ``intel-rapl:0:1``.
        name: what its ``name`` file says, e.g. ``package-0``, ``dram``.
        kind: what that means.
        package: name of the package it is or belongs to.
        parent: id of that package, for DRAM.
        energy_path: the counter's file.
        range_j: where the counter wraps, J; None: the file does not say, then a fall is taken for a reset.
    """

    id: str
    name: str
    kind: Kind
    package: str
    parent: str | None
    energy_path: str
    range_j: float | None


def find_zones(settings: Settings, platform: str) -> list[Zone]:
    """Zones to read: packages, their DRAM, psys; each physical thing once.

    Raises:
        Refused: there is none; the reason says whether that is the platform, a container, a virtual machine or a module.
    """
    directories = _directories(Path(settings.sysfs))
    names = {path.name: text_of(path / "name") for path in directories.values()}
    chosen: list[Zone] = []
    owners: dict[str, str] = {}
    seen: dict[tuple[str, str], str] = {}
    for path in sorted(directories.values(), key=_order):
        zone, view = _zone(path, names), path.name.partition(":")[0]
        # By name: package-0 is one thing whether registers or memory show it. Two zones of one view are two things.
        if zone is None or seen.setdefault((zone.package, zone.name), view) != view:
            continue
        if zone.kind == "package":
            owners.setdefault(zone.package, zone.id)
        elif zone.parent is not None and zone.parent not in {other.id for other in chosen}:
            zone = replace(zone, parent=owners.get(zone.package))
        chosen.append(zone)
    if not chosen:
        raise _absent(settings, platform)
    return chosen


def permission_fix(zone: Zone, environ: Mapping[str, str] | None = None) -> str:
    """What lets an ordinary user read ``zone``, for its very path."""
    path = zone.energy_path
    if in_container(environ or {}):
        return _mount_fix()
    return (
        f"now, until reboot: sudo chmod a+r {path} — or for good, for one group (the counter can leak secrets to whoever "
        "reads it): sudo groupadd -f melodi && sudo usermod -aG melodi $USER, and in /etc/udev/rules.d/70-melodi.rules: "
        'SUBSYSTEM=="powercap", ACTION=="add", RUN+="/bin/sh -c \'chgrp melodi /sys%p/energy_uj; chmod 440 /sys%p/energy_uj\'", '
        "then sudo udevadm trigger --subsystem-match=powercap --action=add and log in again"
    )


def _mount_fix() -> str:
    return (
        f"start the container with -v /sys/{_MASKED}:/host/sys/{_MASKED}:ro -e MELODI_SYSFS_ROOT=/host/sys (as a user that "
        "may read energy_uj on the host), or measure on the host"
    )


def _directories(sysfs: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for base, depth in ((sysfs / "class/powercap", 1), (sysfs / _MASKED, 4)):
        for path in _walk(base, depth):
            found.setdefault(path.name, path)
    return found


def _walk(base: Path, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(base.iterdir())
    except OSError:
        return
    for entry in entries:
        # Control types (`intel-rapl`) and zones look alike but for the number; both may hold zones.
        if not entry.name.startswith("intel-rapl") or not _is_dir(entry):
            continue
        if _ZONE.fullmatch(entry.name):
            yield entry
        if depth > 1:
            yield from _walk(entry, depth - 1)


def _order(path: Path) -> tuple[int, int, int]:
    match = _ZONE.fullmatch(path.name)
    assert match is not None
    view = match["view"] or ""
    sub = match["sub"]
    return (
        _VIEWS.index(view) if view in _VIEWS else len(_VIEWS),
        int(match["package"]),
        -1 if sub is None else int(sub),
    )


def _zone(path: Path, names: Mapping[str, str | None]) -> Zone | None:
    name = names[path.name]
    if name is None:
        return None
    top, _, sub = path.name.rpartition(":")
    nested = ":" in top and sub != ""
    parent = top if nested else None
    kind: Kind
    if name == "psys":
        kind = "psys"
    elif name.startswith("package") and not nested:
        kind = "package"
    elif name == "dram":
        kind = "dram"
    else:
        return None  # core, uncore and whatever else lies inside a package
    package = (names.get(parent) if parent else None) or name
    limit = text_of(path / "max_energy_range_uj")
    range_j = microjoules(int(limit)) if limit is not None and limit.isdigit() and int(limit) > 0 else None
    return Zone(path.name, name, kind, package, parent, str(path / "energy_uj"), range_j)


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a directory above it may not be entered
        return False


def text_of(path: Path) -> str | None:
    """A file of sysfs or procfs without blanks around; None: it is empty or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _absent(settings: Settings, platform: str) -> Refused:
    sysfs = Path(settings.sysfs)
    links = sysfs / "class/powercap"
    if not platform.startswith("linux") and not _is_dir(links):
        return _elsewhere(platform)
    if not _is_dir(sysfs):
        return Refused(
            f"{sysfs} does not exist or may not be entered",
            fix="set MELODI_SYSFS_ROOT to where sysfs is",
            state="no_device",
        )
    if _masked(sysfs, links):
        return Refused("the container runtime hides the powercap tree", fix=_mount_fix(), state="masked")
    if is_wsl(settings.procfs):
        return Refused(
            "the kernel of WSL has no powercap: Windows keeps the RAPL counters to itself",
            fix="NVIDIA GPUs are measured here (nvml); for the CPU boot Linux itself, or estimate with "
            "MELODI_SOURCES=nvml,estimate",
            state="virtual_machine",
        )
    if "hypervisor" in (cpu_fact(settings.procfs, "flags") or "").split():
        return Refused(
            "this is a virtual machine: the hypervisor shows no RAPL counters",
            fix="measure on the physical host, or estimate with MELODI_SOURCES=estimate",
            state="virtual_machine",
        )
    if in_container(settings.environ):
        return Refused("no powercap tree in this container", fix=_mount_fix(), state="masked")
    if _is_dir(links):
        return Refused(
            f"{links} holds no RAPL zone",
            fix="sudo modprobe intel_rapl_common intel_rapl_msr (also for AMD), if this CPU has RAPL",
            state="no_device",
        )
    return Refused(
        f"{links} does not exist: this kernel or CPU has no powercap",
        fix="estimate with MELODI_SOURCES=estimate",
        state="no_device",
    )


def is_wsl(procfs: str) -> bool:
    """Whether the kernel is Microsoft's, as in WSL 1 and 2."""
    return "microsoft" in (text_of(Path(procfs) / "sys/kernel/osrelease") or "").lower()


def _elsewhere(platform: str) -> Refused:
    if platform == "darwin":
        why, fix = (
            "macOS has no RAPL interface",
            'on Apple silicon: pip install "melodi-otel[apple]"; else measure on Linux',
        )
    elif platform in ("win32", "cygwin"):
        why, fix = "Windows has no powercap", "NVIDIA GPUs are measured here (nvml); for the CPU measure on Linux"
    else:
        why, fix = f"this is {platform}", "measure on Linux"
    return Refused(f"RAPL is read through Linux sysfs; {why}", fix=fix, state="unsupported_platform")


def _masked(sysfs: Path, links: Path) -> bool:
    """A mask leaves an empty directory, and links that lead nowhere."""
    try:
        if any(entry.is_symlink() and not entry.exists() for entry in links.iterdir()):
            return True
    except OSError:
        pass
    try:
        return not any((sysfs / _MASKED).iterdir())
    except OSError:
        return False


def in_container(environ: Mapping[str, str]) -> bool:
    """Whether the environment says so: Kubernetes, or systemd's ``container``."""
    return bool(environ.get("KUBERNETES_SERVICE_HOST") or environ.get("container"))
