"""A fake module ``amdsmi`` over GPUs that draw what they are told.

::

    smi = FakeAmdSmi(FakeAmdGpu("uuid-1", watts=300.0))
    source = open_amd(settings, api=smi)
    smi.advance(10.0)                        # 3000 J later
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

RESOLUTION_UJ: Final = 15.300000190734863
"""What amdsmi tells: 15.3 as a 32-bit float."""


class FakeAmdSmiError(Exception):
    """As ``AmdSmiLibraryException``."""

    def __init__(self, err_code: int) -> None:
        super().__init__(f"Error code:\n\t{err_code}")
        self.err_code = err_code


@dataclass(eq=False)
class FakeAmdGpu:
    """One GPU.

    Attributes:
        uuid: amdsmi's UUID.
        watts: what it draws.
        name: market name.
        gain: by how much its counter counts too much; 0: it stands still.
        energy, power: False: not supported.
        power_key: which of the power figures it tells; the others are ``N/A``.
        count_key: the counter's key, ``power`` before ROCm 6.1.
        hip_id: HIP's index; None: not told.
        serial: serial number in hexadecimal, as ROCR names it.
        joules: what it has drawn.
        fails: error codes of its next reads, one each.
    """

    uuid: str
    watts: float = 100.0
    name: str = "AMD Instinct MI300X"
    gain: float = 1.0
    energy: bool = True
    power: bool = True
    power_key: str = "current_socket_power"
    count_key: str = "energy_accumulator"
    hip_id: int | None = None
    serial: str = "0x0123456789ABCDEF"
    joules: float = 1000.0
    fails: list[int] = field(default_factory=list[int])


class FakeAmdSmi:
    """The module's functions.

    Args:
        gpus: what it lists.

    Attributes:
        gpus: as above.
        refuses: error code of ``amdsmi_init``; None: it works.
        users: how many have started and not shut down.
    """

    AmdSmiException: type[Exception] = FakeAmdSmiError

    def __init__(self, *gpus: FakeAmdGpu) -> None:
        self.gpus = list(gpus)
        self.refuses: int | None = None
        self.users = 0
        self._counted = {id(gpu): gpu.joules for gpu in gpus}

    def advance(self, seconds: float) -> None:
        """Let every GPU draw its watts for so long."""
        for gpu in self.gpus:
            gpu.joules += gpu.watts * seconds
            self._counted[id(gpu)] += gpu.watts * seconds * gpu.gain

    def amdsmi_init(self) -> None:
        """Start."""
        if self.refuses is not None:
            raise FakeAmdSmiError(self.refuses)
        self.users += 1

    def amdsmi_shut_down(self) -> None:
        """Stop."""
        self.users -= 1

    def amdsmi_get_processor_handles(self) -> Sequence[FakeAmdGpu]:
        """The GPUs; a handle is the GPU itself."""
        return list(self.gpus)

    def amdsmi_get_gpu_device_uuid(self, handle: FakeAmdGpu) -> str:
        """As amdsmi's."""
        return handle.uuid

    def amdsmi_get_gpu_device_bdf(self, handle: FakeAmdGpu) -> str:
        """As amdsmi's."""
        return f"0000:{self.gpus.index(handle):02x}:00.0"

    def amdsmi_get_gpu_asic_info(self, handle: FakeAmdGpu) -> Mapping[str, Any]:
        """As amdsmi's."""
        return {"market_name": handle.name, "asic_serial": handle.serial}

    def amdsmi_get_gpu_enumeration_info(self, handle: FakeAmdGpu) -> Mapping[str, Any]:
        """As amdsmi's."""
        if handle.hip_id is None:
            raise FakeAmdSmiError(2)
        return {"hip_id": handle.hip_id, "hip_uuid": f"GPU-{handle.serial[2:].lower()}"}

    def amdsmi_get_gpu_driver_info(self, handle: FakeAmdGpu) -> Mapping[str, Any]:
        """As amdsmi's."""
        return {"driver_name": "amdgpu", "driver_version": "6.12.12"}

    def amdsmi_get_energy_count(self, handle: FakeAmdGpu) -> Mapping[str, Any]:
        """As amdsmi's."""
        if handle.fails:
            raise FakeAmdSmiError(handle.fails.pop(0))
        if not handle.energy:
            raise FakeAmdSmiError(2)
        count = round(self._counted[id(handle)] * 1e6 / RESOLUTION_UJ)
        return {handle.count_key: count, "counter_resolution": RESOLUTION_UJ, "timestamp": 1}

    def amdsmi_get_power_info(self, handle: FakeAmdGpu) -> Mapping[str, Any]:
        """As amdsmi's."""
        told = {"current_socket_power": "N/A", "average_socket_power": "N/A", "socket_power": "N/A"}
        return {**told, handle.power_key: round(handle.watts)} if handle.power else told

    def amdsmi_get_gpu_activity(self, handle: FakeAmdGpu) -> Mapping[str, Any]:
        """As amdsmi's."""
        return {"gfx_activity": 42 if handle.power else "N/A", "umc_activity": 7}

    def amdsmi_get_gpu_vram_usage(self, handle: FakeAmdGpu) -> Mapping[str, Any]:
        """As amdsmi's."""
        return {"vram_total": 196_592, "vram_used": 1024}
