"""The machine: its processor and its GPUs, as the kernel and the driver tell them in files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from melodi_otel import semconv as names
from melodi_otel.identity.facts import Facts, Places, read

_CPUINFO: Final = 16_384
"""Enough for the first processor of the list; the others say the same."""
_MOST_GPUS: Final = 64
_AMD: Final = "0x1002"

_ARCHITECTURES: Final = {
    "x86_64": "amd64",
    "amd64": "amd64",
    "aarch64": "arm64",
    "arm64": "arm64",
    "i386": "x86",
    "i586": "x86",
    "i686": "x86",
    "x86": "x86",
    "ppc64le": "ppc64",
    "ppc64": "ppc64",
    "ppc": "ppc32",
    "s390x": "s390x",
    "ia64": "ia64",
}
_ARM_MAKERS: Final = {
    0x41: "ARM",
    0x42: "Broadcom",
    0x43: "Cavium",
    0x46: "Fujitsu",
    0x48: "HiSilicon",
    0x4E: "NVIDIA",
    0x51: "Qualcomm",
    0x61: "Apple",
    0x6D: "Microsoft",
    0xC0: "Ampere",
}
# Windows keeps it in the environment: "Intel64 Family 6 Model 140 Stepping 1, GenuineIntel".
_WINDOWS_CPU: Final = re.compile(r"Family (\d+) Model (\d+) Stepping (\d+), *(\S+)")


def architecture(machine: str) -> str | None:
    """``host.arch`` of what the system calls its machine; a name that is not in the conventions stays as it is."""
    plain = machine.strip().lower()
    if plain.startswith("armv"):
        return "arm64" if plain.startswith("armv8") and plain.endswith("64") else "arm32"
    return _ARCHITECTURES.get(plain, plain or None)


def processor(facts: Facts, places: Places, environ: Mapping[str, str]) -> None:
    """Model, maker, family and stepping of the first processor."""
    origin = "/proc/cpuinfo"
    fields = _first_processor(read(Path(places.procfs, "cpuinfo"), _CPUINFO))
    # POWER says "cpu" where others say "model name".
    facts.say(names.HOST_CPU_MODEL_NAME, fields.get("model name") or fields.get("cpu"), origin)
    if "cpu implementer" in fields:
        facts.say(names.HOST_CPU_VENDOR_ID, _arm_maker(fields["cpu implementer"]), origin)
        facts.say(names.HOST_CPU_FAMILY, fields.get("cpu architecture"), origin)
        facts.say(names.HOST_CPU_MODEL_ID, fields.get("cpu part"), origin)
        variant, revision = _number(fields.get("cpu variant")), _number(fields.get("cpu revision"))
        if variant is not None and revision is not None:
            facts.say(names.HOST_CPU_STEPPING, f"r{variant}p{revision}", origin)
    else:
        facts.say(names.HOST_CPU_VENDOR_ID, fields.get("vendor_id"), origin)
        facts.say(names.HOST_CPU_FAMILY, fields.get("cpu family"), origin)
        facts.say(names.HOST_CPU_MODEL_ID, fields.get("model"), origin)
        facts.say(names.HOST_CPU_STEPPING, fields.get("stepping"), origin)
    if (windows := _WINDOWS_CPU.search(environ.get("PROCESSOR_IDENTIFIER", ""))) is not None:
        for name, value in zip(_WINDOWS_NAMES, windows.groups(), strict=True):
            facts.say(name, value, "PROCESSOR_IDENTIFIER")


_WINDOWS_NAMES: Final = (
    names.HOST_CPU_FAMILY,
    names.HOST_CPU_MODEL_ID,
    names.HOST_CPU_STEPPING,
    names.HOST_CPU_VENDOR_ID,
)


def gpus(facts: Facts, places: Places) -> None:
    """Model names of the GPUs, each once, and the version of their driver."""
    nvidia = Path(places.procfs, "driver/nvidia")
    models = dict.fromkeys(model for model in _nvidia_models(nvidia) if model)
    facts.say(names.GPU_MODEL, tuple(models), "/proc/driver/nvidia/gpus")
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", read(nvidia / "version"))
    facts.say(names.GPU_DRIVER_VERSION, found and found[1], "/proc/driver/nvidia/version")
    modules = Path(places.sysfs, "module")
    facts.say(names.GPU_DRIVER_VERSION, read(modules / "nvidia/version"), "/sys/module/nvidia/version")
    models = dict.fromkeys(model for model in _amd_models(Path(places.sysfs, "class/drm")) if model)
    facts.say(names.GPU_MODEL, tuple(models), "/sys/class/drm")
    if models:
        facts.say(names.GPU_DRIVER_VERSION, read(modules / "amdgpu/version"), "/sys/module/amdgpu/version")


def _first_processor(cpuinfo: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        if not line.strip() and fields:
            break
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    return fields


def _arm_maker(code: str) -> str:
    number = _number(code)
    return code if number is None else _ARM_MAKERS.get(number, code)


def _number(text: str | None) -> int | None:
    try:
        return int(text or "", 0)
    except ValueError:
        return None


def _nvidia_models(nvidia: Path) -> Iterator[str]:
    for board in _listed(nvidia / "gpus"):
        if (found := re.search(r"^Model:[ \t]*(.+)$", read(board / "information"), re.MULTILINE)) is not None:
            yield found[1].strip()


def _amd_models(drm: Path) -> Iterator[str]:
    for card in _listed(drm):
        # card0 is the board, card0-DP-1 one of its sockets.
        if re.fullmatch(r"card\d+", card.name) and read(card / "device/vendor") == _AMD:
            yield read(card / "device/product_name")


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())[:_MOST_GPUS]
    except (OSError, ValueError):
        return []
