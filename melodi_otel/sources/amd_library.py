"""The module ``amdsmi``: found, loaded, asked. The one file that imports it.

Importing it without AMD's library prints two lines on standard output and then fails, which the host program's users would
see; so it is imported only where the driver is loaded and the library can be. Its answers are plain numbers, or the text
``N/A`` where a GPU does not know::

    amdsmi_get_energy_count   energy_accumulator (power before ROCm 6.1) × counter_resolution = uJ     15.3 uJ a count
    amdsmi_get_power_info     W: current_socket_power on MI300, average_socket_power on MI200, one of them N/A
    amdsmi_get_gpu_vram_usage MB
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, cast

from melodi_otel.errors import Refused
from melodi_otel.sources.base import Settings
from melodi_otel.units import Joules, microjoules

__all__ = ["AmdApi", "energy_of", "load_amd", "power_of", "refusal", "uuids_of"]

INSTALL: Final = (
    'pip install "melodi-otel[amd]" (or: pip install /opt/rocm/share/amd_smi, of the very ROCm that is installed)'
)
NOT_SUPPORTED: Final = 2
NO_PERMISSION: Final = 10
DRIVER_NOT_LOADED: Final = 34
MEGABYTE: Final = 1024 * 1024
_NO_FIGURE: Final = 0xFFFF
_POWERS: Final = ("current_socket_power", "average_socket_power", "socket_power")
_NEEDED: Final = (
    "AmdSmiException",
    "amdsmi_init",
    "amdsmi_shut_down",
    "amdsmi_get_processor_handles",
    "amdsmi_get_gpu_device_uuid",
    "amdsmi_get_energy_count",
    "amdsmi_get_power_info",
)


class AmdApi(Protocol):
    """The functions of ``amdsmi`` that melodi_otel calls. A handle is opaque."""

    AmdSmiException: type[Exception]

    def amdsmi_init(self) -> None: ...
    def amdsmi_shut_down(self) -> None: ...
    def amdsmi_get_processor_handles(self) -> Sequence[Any]: ...
    def amdsmi_get_gpu_device_uuid(self, handle: Any) -> str: ...
    def amdsmi_get_gpu_device_bdf(self, handle: Any) -> str: ...
    def amdsmi_get_gpu_asic_info(self, handle: Any) -> Mapping[str, Any]: ...
    def amdsmi_get_gpu_enumeration_info(self, handle: Any) -> Mapping[str, Any]: ...
    def amdsmi_get_gpu_driver_info(self, handle: Any) -> Mapping[str, Any]: ...
    def amdsmi_get_energy_count(self, handle: Any) -> Mapping[str, Any]: ...
    def amdsmi_get_power_info(self, handle: Any) -> Mapping[str, Any]: ...
    def amdsmi_get_gpu_activity(self, handle: Any) -> Mapping[str, Any]: ...
    def amdsmi_get_gpu_vram_usage(self, handle: Any) -> Mapping[str, Any]: ...


def load_amd(settings: Settings, *, loads: Callable[[str], object] = ctypes.CDLL) -> AmdApi:
    """The module, if this machine has the driver, the library and the module.

    Args:
        settings: ``sysfs`` shows the driver, ``environ`` where ROCm is.
        loads: ``ctypes.CDLL``, or what stands for it in a test.

    Raises:
        Refused: with reason and fix; ``absent`` where there is no AMD GPU driver.
    """
    if not (Path(settings.sysfs) / "module/amdgpu").is_dir():
        raise Refused("the AMD GPU driver (amdgpu) is not loaded here", state="absent")
    try:
        spec = importlib.util.find_spec("amdsmi")
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise Refused("the Python module amdsmi is not installed", fix=INSTALL, state="module_missing")
    if not any(_loadable(path, loads) for path in _libraries(settings.environ, Path(spec.origin).parent)):
        raise Refused(
            "AMD's library libamd_smi.so is not installed here",
            fix="install amd-smi-lib of your ROCm, or name its directory with ROCM_PATH",
            state="library_missing",
        )
    try:
        module = importlib.import_module("amdsmi")
    except Exception as error:
        raise Refused(f"the module amdsmi cannot be imported ({error})", fix=INSTALL, state="module_foreign") from error
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    if missing:
        raise Refused(f"the module amdsmi is too old: it lacks {missing[0]}", fix=INSTALL, state="module_foreign")
    return cast(AmdApi, module)


def refusal(error: Exception) -> Refused:
    """What an error of amdsmi at the start means for the user."""
    code = code_of(error)
    if code == NO_PERMISSION:
        return Refused(
            "amdsmi may not talk to the driver: permission denied",
            fix="sudo usermod -aG render,video $USER, then log in again; in a container: --device /dev/kfd --device /dev/dri",
            state="permission_denied",
        )
    if code == DRIVER_NOT_LOADED:
        return Refused("the AMD GPU driver is not loaded", fix="sudo modprobe amdgpu", state="driver_not_loaded")
    return Refused(f"amdsmi failed: {_words(error)}", fix="run amd-smi; if it fails too, repair ROCm", state="failed")


def code_of(error: Exception) -> int | None:
    """The number of an amdsmi error; None where it has none."""
    code = getattr(error, "err_code", None)
    return code if isinstance(code, int) else None


def energy_of(api: AmdApi, handle: Any) -> Joules | None:
    """J of the accumulator; None where the GPU has none.

    Raises:
        AmdSmiException: the module's own, but for ``NOT_SUPPORTED``.
    """
    try:
        answer = api.amdsmi_get_energy_count(handle)
    except api.AmdSmiException as error:
        if code_of(error) == NOT_SUPPORTED:
            return None
        raise
    count, resolution = answer.get("energy_accumulator", answer.get("power")), answer.get("counter_resolution")
    if not isinstance(count, int) or not isinstance(resolution, int | float) or resolution <= 0:
        return None
    return microjoules(round(count * resolution))


def power_of(api: AmdApi, handle: Any) -> float | None:
    """W of the socket; None where the GPU does not tell.

    Raises:
        AmdSmiException: as :func:`energy_of`.
    """
    try:
        answer = api.amdsmi_get_power_info(handle)
    except api.AmdSmiException as error:
        if code_of(error) == NOT_SUPPORTED:
            return None
        raise
    figures = (answer.get(name) for name in _POWERS)
    return next((float(watts) for watts in figures if isinstance(watts, int) and 0 <= watts < _NO_FIGURE), None)


def uuids_of(api: AmdApi, handle: Any, uuid: str) -> tuple[frozenset[str], int | None, str | None]:
    """Names that ``ROCR_VISIBLE_DEVICES`` may use, HIP's index and the model; what is not told is left out."""
    names, hip, model = {uuid}, None, None
    try:
        asic = api.amdsmi_get_gpu_asic_info(handle)
        model = _text(asic.get("market_name"))
        names.add(str(asic.get("asic_serial", "")).lower().removeprefix("0x"))
    except (api.AmdSmiException, AttributeError):
        pass
    try:
        listed = api.amdsmi_get_gpu_enumeration_info(handle)
        hip = listed.get("hip_id")
        names.add(str(listed.get("hip_uuid", "")))
    except (api.AmdSmiException, AttributeError):  # amdsmi before 6.4 does not have it
        pass
    named = frozenset("gpu-" + name.lower().removeprefix("gpu-") for name in names if name and name.lower() != "n/a")
    return named, hip if isinstance(hip, int) else None, model


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value and value != "N/A" else None


def _words(error: Exception) -> str:
    return " ".join(str(getattr(error, "err_info", None) or error).split())


def _libraries(environ: Mapping[str, str], package: Path) -> list[str]:
    """Where amdsmi looks for its library, in its order."""
    rocm = environ.get("ROCM_HOME") or environ.get("ROCM_PATH")
    beside = [str(package / "libamd_smi.so"), str(Path(environ.get("ROCM_PATH") or "/opt/rocm") / "lib/libamd_smi.so")]
    return [*([str(Path(rocm) / "lib/libamd_smi.so")] if rocm else []), "libamd_smi.so", *beside]


def _loadable(path: str, loads: Callable[[str], object]) -> bool:
    try:
        loads(path)
    except OSError:
        return False
    return True
