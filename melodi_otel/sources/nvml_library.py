"""The NVML library and its Python binding: found, loaded, started, or refused with the reason and the fix.

The one file that imports ``pynvml`` (the module of the distribution nvidia-ml-py). Its error codes and field numbers are
part of NVML's binary interface and stand here as numbers, because older bindings lack the names.
"""
# ruff: noqa: N802, N815 - the names are NVML's

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import struct
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol, cast

from melodi_otel.errors import Refused

__all__ = ["INSTALL", "NvmlApi", "code_of", "load_api", "open_library", "refusal"]

INSTALL: Final = 'pip install "melodi-otel[nvidia]"'
WSL_LIBRARY: Final = "/usr/lib/wsl/lib/libnvidia-ml.so.1"
"""Where Windows' driver shows itself to Linux. On Windows the binding finds nvml.dll by itself."""

UNINITIALIZED: Final = 1
NOT_SUPPORTED: Final = 3
NO_PERMISSION: Final = 4
NOT_FOUND: Final = 6
INSUFFICIENT_SIZE: Final = 7
DRIVER_NOT_LOADED: Final = 9
LIBRARY_NOT_FOUND: Final = 12
FUNCTION_NOT_FOUND: Final = 13
GPU_IS_LOST: Final = 15
RESET_REQUIRED: Final = 16
VERSION_MISMATCH: Final = 18
GPU_NOT_FOUND: Final = 28

TOTAL_ENERGY: Final = 83
POWER_AVERAGE: Final = 185
POWER_INSTANT: Final = 186
SCOPE_GPU: Final = 0
SCOPE_MODULE: Final = 1

MEMORY_V2: Final = 0x02000028
CLOCK_SM: Final = 1


class FieldValue(Protocol):
    """One answer of ``nvmlDeviceGetFieldValues``."""

    nvmlReturn: int
    valueType: int
    value: Any


class NvmlApi(Protocol):
    """The functions of ``pynvml`` that melodi_otel calls. A handle is opaque."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> str: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> object: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object: ...
    def nvmlDeviceGetUUID(self, handle: object) -> str: ...
    def nvmlDeviceGetName(self, handle: object) -> str: ...
    def nvmlDeviceGetPciInfo(self, handle: object) -> Any: ...
    def nvmlDeviceGetMinorNumber(self, handle: object) -> int: ...
    def nvmlDeviceGetArchitecture(self, handle: object) -> int: ...
    def nvmlDeviceGetCudaComputeCapability(self, handle: object) -> tuple[int, int]: ...
    def nvmlDeviceGetNumGpuCores(self, handle: object) -> int: ...
    def nvmlDeviceGetMaxClockInfo(self, handle: object, kind: int) -> int: ...
    def nvmlDeviceGetFieldValues(self, handle: object, fields: Sequence[tuple[int, int]]) -> Sequence[FieldValue]: ...
    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> int: ...
    def nvmlDeviceGetPowerUsage(self, handle: object) -> int: ...
    def nvmlDeviceGetUtilizationRates(self, handle: object) -> Any: ...
    def nvmlDeviceGetMemoryInfo(self, handle: object, version: int | None = None) -> Any: ...
    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> Sequence[Any]: ...
    def nvmlDeviceGetMigMode(self, handle: object) -> Sequence[int]: ...
    def nvmlDeviceGetMaxMigDeviceCount(self, handle: object) -> int: ...
    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: object, index: int) -> object: ...
    def nvmlDeviceGetGpuInstanceId(self, handle: object) -> int: ...
    def nvmlDeviceGetComputeInstanceId(self, handle: object) -> int: ...
    def nvmlDeviceGetAttributes(self, handle: object) -> Any: ...


_VALUE_MEMBER: Final = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


class _Field(ctypes.Structure):
    """NVML's ``nvmlFieldValue_t`` with its value as 64 raw bits."""

    _fields_ = [
        ("fieldId", ctypes.c_uint),
        ("scopeId", ctypes.c_uint),
        ("timestamp", ctypes.c_longlong),
        ("latencyUsec", ctypes.c_longlong),
        ("valueType", ctypes.c_uint),
        ("nvmlReturn", ctypes.c_uint),
        ("value", ctypes.c_ulonglong),
    ]


_DOUBLE: Final = 0
_BITS: Final = (64, 32, 64, 64, 64, 32, 16)
_SIGNED: Final = (4, 5)
"""Width of a value, and which are signed, by NVML's ``valueType``."""


def _figure(kind: int, raw: int) -> int | None:
    if kind >= len(_BITS):
        return None
    if kind == _DOUBLE:
        return int(struct.unpack("=d", raw.to_bytes(8, sys.byteorder))[0])
    bits = _BITS[kind]
    figure = raw & ((1 << bits) - 1)
    return figure - (1 << bits) if kind in _SIGNED and figure >> (bits - 1) else figure


class FieldCall:
    """``nvmlDeviceGetFieldValues`` for the same fields again and again.

    The binding builds and converts its structures in every call, some tens of µs; here they are built once. That is most of the
    cost of a round where the driver answers from memory (gauges). It is little beside an H200's counter, for which the driver
    itself takes 3 ms (docs/accuracy.md). Where the binding does not hand out its function, its own call is used.

    Args:
        api: the binding.
        fields: (field, scope) pairs.
    """

    def __init__(self, api: NvmlApi, fields: Sequence[tuple[int, int]]) -> None:
        self._api = api
        self._fields = tuple(fields)
        self._values = (_Field * len(self._fields))()
        for value, (field, scope) in zip(self._values, self._fields, strict=True):
            value.fieldId, value.scopeId = field, scope
        self._function: Any = None
        self._check: Any = getattr(api, "_nvmlCheckReturn", None)
        with contextlib.suppress(Exception):
            self._function = cast(Any, api)._nvmlGetFunctionPointer("nvmlDeviceGetFieldValues")

    def __call__(self, handle: object) -> dict[int, int | None]:
        """Figures by field, None where a field was not answered.

        Raises:
            NVMLError: the binding's own, where the whole call failed.
        """
        if self._function is None or self._check is None:
            answers = self._api.nvmlDeviceGetFieldValues(handle, self._fields)
            return {field: number_of(answer) for (field, _), answer in zip(self._fields, answers, strict=True)}
        code = self._function(handle, ctypes.c_int(len(self._fields)), ctypes.byref(self._values))
        if code:
            self._check(code)
        return {
            field: _figure(value.valueType, value.value) if value.nvmlReturn == 0 else None
            for (field, _), value in zip(self._fields, self._values, strict=True)
        }


def number_of(answer: FieldValue) -> int | None:
    """The figure of one answer, None where there is none."""
    if answer.nvmlReturn != 0 or not 0 <= answer.valueType < len(_VALUE_MEMBER):
        return None
    return int(getattr(answer.value, _VALUE_MEMBER[answer.valueType]))


_NEEDED: Final = ("NVMLError", *(name for name in vars(NvmlApi) if name.startswith("nvml")))
_loading = threading.Lock()


def load_api(library: str | None) -> NvmlApi:
    """The binding, bound to ``library`` if one is named.

    With a library of our own choice the binding is a private copy of the module, so that the host program's ``pynvml``
    keeps the driver's library. Without one it is the shared module.

    Raises:
        Refused: no binding, a foreign one, or ``library`` cannot be loaded.
    """
    if library is None:
        try:
            module = importlib.import_module("pynvml")
        except ImportError as error:
            raise _no_binding() from error
        except Exception as error:
            raise _foreign(f"the module pynvml cannot be imported ({error})") from error
        return _checked(module)
    module = _checked(_private_copy())
    if not Path(library).is_file():
        raise Refused(
            f"the NVML library {library} does not exist",
            fix="set MELODI_NVML_LIBRARY to the path of libnvidia-ml.so.1, or unset it to use the driver's",
            state="library_missing",
        )
    try:
        cast(Any, module).nvmlLib = ctypes.CDLL(library)
    except OSError as error:
        raise Refused(
            f"the NVML library {library} cannot be loaded ({error})",
            fix="set MELODI_NVML_LIBRARY to the libnvidia-ml.so.1 of this machine's driver, or unset it",
            state="library_unusable",
        ) from error
    return module


def open_library(library: str | None) -> NvmlApi:
    """Load the binding and start NVML; the caller owes one ``nvmlShutdown``.

    Raises:
        Refused: with reason, fix and state.
    """
    api = load_api(library)
    try:
        api.nvmlInit()
    except api.NVMLError as error:
        if library is None and code_of(error) == LIBRARY_NOT_FOUND and Path(WSL_LIBRARY).is_file():
            # The loader knows that directory only where WSL's own entry in /etc/ld.so.conf.d has been kept.
            return open_library(WSL_LIBRARY)
        raise refusal(code_of(error), error) from error
    return api


def code_of(error: BaseException) -> int:
    """The NVML error number of a binding's exception; 999 (unknown) where it has none."""
    value = getattr(error, "value", None)
    return value if isinstance(value, int) else 999


def refusal(code: int, error: BaseException, platform: str = sys.platform) -> Refused:
    """What an NVML error at the start means for the user."""
    if code == LIBRARY_NOT_FOUND and platform == "darwin":
        return Refused("there is no NVIDIA driver for macOS", state="absent")
    if code == LIBRARY_NOT_FOUND and platform == "win32":
        return Refused(
            "no NVML library (nvml.dll) is installed here",
            fix="install the NVIDIA driver; elsewhere name the library with MELODI_NVML_LIBRARY",
            state="library_missing",
        )
    if code == LIBRARY_NOT_FOUND and Path(WSL_LIBRARY).parent.is_dir():
        return Refused(
            "no NVML library (libnvidia-ml.so.1) is installed here",
            fix=f"in WSL install the NVIDIA driver on Windows, not here: it brings {WSL_LIBRARY}",
            state="library_missing",
        )
    if code == LIBRARY_NOT_FOUND:
        return Refused(
            "no NVML library (libnvidia-ml.so.1) is installed here",
            fix="install the NVIDIA driver; in a container start it with the NVIDIA runtime and "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility; elsewhere name the library with MELODI_NVML_LIBRARY",
            state="library_missing",
        )
    if code == FUNCTION_NOT_FOUND:
        return Refused(
            "the NVML library is too old: it lacks functions that every current driver has",
            fix="update the NVIDIA driver",
            state="library_too_old",
        )
    if code == DRIVER_NOT_LOADED:
        return Refused(
            "the NVIDIA driver is not loaded",
            fix="load it (sudo modprobe nvidia), or reboot after an update of the driver",
            state="driver_not_loaded",
        )
    if code == NO_PERMISSION:
        return Refused(
            "NVML may not talk to the driver: permission denied",
            fix="allow this user to read and write /dev/nvidiactl and /dev/nvidia* (often: the group video or render)",
            state="permission_denied",
        )
    if code == VERSION_MISMATCH:
        return Refused(
            "the NVML library and the loaded NVIDIA driver are of different versions",
            fix="reboot, or reload the driver; in a container restart the container",
            state="driver_mismatch",
        )
    return Refused(f"NVML failed: {error}", fix="run nvidia-smi; if it fails too, repair the driver", state="failed")


def _private_copy() -> object:
    with _loading:
        try:
            spec = importlib.util.find_spec("pynvml")
        except (ImportError, ValueError) as error:
            raise _no_binding() from error
        if spec is None or spec.loader is None:
            raise _no_binding()
        if spec.submodule_search_locations is not None:
            raise _foreign(f"the module pynvml ({spec.origin}) is not that of nvidia-ml-py")
        spec = importlib.util.spec_from_file_location("_melodi_otel_pynvml", spec.origin or "")
        if spec is None or spec.loader is None:
            raise _no_binding()
        module = importlib.util.module_from_spec(spec)
        # The binding looks itself up in sys.modules while it runs, and only then.
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise _foreign(f"the module pynvml cannot be imported ({error})") from error
        finally:
            with contextlib.suppress(KeyError):
                del sys.modules[spec.name]
        return module


def _checked(module: object) -> NvmlApi:
    where = getattr(module, "__file__", None)
    if hasattr(module, "__path__"):
        # The package `pynvml` before 13 was another wrapper of the same name; nvidia-ml-py is a single file.
        raise _foreign(f"the module pynvml ({where}) is not that of nvidia-ml-py")
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    if missing:
        raise _foreign(f"the module pynvml ({where}) is too old: it lacks {missing[0]}")
    return cast(NvmlApi, module)


def _no_binding() -> Refused:
    return Refused("the Python module pynvml is not installed", fix=INSTALL, state="module_missing")


def _foreign(reason: str) -> Refused:
    return Refused(reason, fix=f"pip uninstall -y pynvml && {INSTALL} --force-reinstall", state="module_foreign")
