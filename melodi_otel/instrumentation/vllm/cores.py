"""Engine cores of this process: loading, ready, gone; and the steps of their schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

from melodi_otel.attribution.meter import EngineId
from melodi_otel.instrumentation.seam import Calls
from melodi_otel.instrumentation.vllm.complaints import Complaints
from melodi_otel.instrumentation.vllm.facts import devices_of, model_of, nth_engine, number_of, shape_of, size_of
from melodi_otel.instrumentation.vllm.scheduler import METHODS, WatchedScheduler


class Cores:
    """Declares engine cores and watches their schedulers.

    Args:
        calls: whose meter is told.
        complaints: where our own failures go.
        devices: accelerators of all cores of this host, where the user names them.
    """

    def __init__(self, calls: Calls, complaints: Complaints, devices: Sequence[str] = ()) -> None:
        self._calls = calls
        self._devices = devices
        self._complaints = complaints
        self._watched: WeakKeyDictionary[Any, tuple[EngineId, WatchedScheduler | None]] = WeakKeyDictionary()

    def loading(self, config: Any) -> None:
        """A core begins: weights are read, graphs captured, kernels compiled, until it is :meth:`ready`."""
        self._declare(self._engine(config), config, "loading")

    def ready(self, core: Any) -> None:
        """It can serve from now on; a second time changes nothing."""
        if core in self._watched:
            return
        config = core.vllm_config
        engine = self._engine(config)
        self._watched[core] = engine, None
        self._declare(engine, config, "ready", **size_of(config, core.scheduler))
        try:
            watched = WatchedScheduler(
                core.scheduler,
                engine,
                lambda: self._calls.meter,
                lanes=shape_of(config).stages,
                now_ns=self._calls.now_ns,
                complaints=self._complaints,
            )
        except Exception:
            self._complaints.about("this scheduler's steps cannot be watched; requests are told apart by their tokens")
        else:
            self._watched[core] = engine, watched

    def ended(self, core: Any) -> None:
        """This core is shut down."""
        known = self._watched.pop(core, None)
        if known is not None:
            engine, watched = known
            if watched is not None:
                watched.stop()
            self._calls.meter.engine(engine, self._calls.now_ns(), "gone")

    def stop(self) -> None:
        """Watch no core any more."""
        for core in list(self._watched):
            engine, watched = self._watched[core]
            if watched is not None:
                watched.stop()
                self._watched[core] = engine, None

    def _engine(self, config: Any) -> EngineId:
        return EngineId(self._calls.group, number_of(nth_engine(), shape_of(config).rank))

    def _declare(self, engine: EngineId, config: Any, state: Any, **facts: Any) -> None:
        shape = shape_of(config)
        devices = devices_of(shape, self._devices)
        # One that is spread over more than it has here is `partial`; a core on the CPU is not spread over devices.
        world: Final = shape.world if devices and shape.world > 1 else None
        self._calls.meter.engine(
            engine, self._calls.now_ns(), state, model=model_of(config), devices=devices, world=world, **facts
        )


def can_be_watched(scheduler: Any) -> bool:
    """Whether a scheduler of this class has what is watched."""
    return all(callable(getattr(scheduler, name, None)) for name in METHODS)
