"""A model object as an engine of the meter: where its parameters lie, how big it is, what a token costs in bytes."""

from __future__ import annotations

import itertools
import logging
import sys
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

from melodi_otel.attribution.meter import EngineId, Meter
from melodi_otel.instrumentation.seam import Calls
from melodi_otel.instrumentation.sizes import known_name, size
from melodi_otel.instrumentation.transformers.adapters import Adapter
from melodi_otel.instrumentation.transformers.parallel import spread

log = logging.getLogger("melodi_otel")


class Engine:
    """A declared engine.

    Attributes:
        adapter: called: the name of the adapter that is active now, or None.
        id: its identity in the meter.
        model: what people call the model.
        devices: accelerators by ``hw.id``; ``()``: all parameters are on the CPU; None: not known.
        lanes: numbers that no call has had yet: concurrent calls step beside each other, so each has a lane of its own.
    """

    __slots__ = ("_first", "_meter", "_place", "adapter", "devices", "id", "lanes", "model")

    def __init__(self, engine: EngineId, model: Any, meter: Meter) -> None:
        self.id = engine
        self.model = model_name(model)
        self.adapter = Adapter(model)
        self.devices = devices_of(model)
        self._meter = meter
        self._first, self._place = _place(model)
        self.lanes = itertools.count()

    def stands(self, meter: Meter) -> bool:
        """Whether this declaration still holds: same meter (a forked child gets a new one), same place."""
        first = self._first()
        return self._meter is meter and first is not None and first.device == self._place


class Engines:
    """The engines of one instrumentation, one per model object, declared at its first call.

    No lock is held, so that a fork in the middle leaves nothing locked: every step is one atomic operation of a
    container.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._numbers = itertools.count()
        self._ids: WeakKeyDictionary[Any, EngineId] = WeakKeyDictionary()
        self._engines: WeakKeyDictionary[Any, Engine] = WeakKeyDictionary()
        self._gone: deque[EngineId] = deque()
        self._watch: dict[EngineId, ref[Any]] = {}

    def of(self, model: Any) -> Engine:
        """The engine of ``model``; declared if it is new, has moved to another device, or the meter is another one."""
        meter = self._calls.meter
        while self._gone:
            self._retire(meter, self._gone.popleft())
        engine = self._engines.get(model)
        if engine is not None and engine.stands(meter):
            return engine
        name = EngineId(self._calls.group, next(self._numbers))
        chosen = self._ids.setdefault(model, name)
        if chosen is name:
            # the callback runs wherever memory is collected, so it only takes a note
            gone = self._gone
            self._watch[name] = ref(model, lambda _, engine=name: gone.append(engine))
        if engine is None:
            fresh = Engine(chosen, model, meter)
            engine = self._engines.setdefault(model, fresh)
            if engine is not fresh:
                return engine
        else:
            lanes = engine.lanes  # calls in flight keep theirs
            engine = self._engines[model] = Engine(chosen, model, meter)
            engine.lanes = lanes
        try:
            facts = size_of(model)
            if (world := spread(model)) is not None:
                facts["world"] = world
            meter.engine(engine.id, self._calls.now_ns(), "ready", model=engine.model, devices=engine.devices, **facts)
        except Exception:
            self._engines.pop(model, None)  # not declared: the next call tries again
            raise
        return engine

    def _retire(self, meter: Meter, engine: EngineId) -> None:
        self._watch.pop(engine, None)
        meter.engine(engine, self._calls.now_ns(), state="gone")


def _place(model: Any) -> tuple[Callable[[], Any], object]:
    """The first parameter, weakly, and where it lies: that changes when the model is moved, and costs little to ask."""
    first = next(iter(model.parameters()), None)
    return (lambda: None, None) if first is None else (ref(first), first.device)


def model_name(model: Any) -> str:
    """``name_or_path`` as people know it, else the class."""
    config = getattr(model, "config", None)
    name = str(getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None) or "")
    return known_name(name) or type(model).__name__


def devices_of(model: Any) -> tuple[str, ...] | None:
    """``hw.id`` of the accelerators that hold parameters; see :class:`Engine`."""
    try:
        places: dict[Any, None] = {parameter.device: None for parameter in model.parameters()}
        kinds = {place.type for place in places} - {"meta"}  # meta: offloaded, computed elsewhere
        if not kinds:
            return None
        if kinds == {"cpu"}:
            return ()
        if kinds - {"cpu", "cuda"}:
            return None
        cuda: Any = sys.modules["torch"].cuda
        indices = [place.index for place in places if place.type == "cuda"]
        found = [_uuid(cuda, cuda.current_device() if index is None else index) for index in indices]
        return tuple(dict.fromkeys(found))
    except Exception:
        log.debug("the devices of %s are not known", type(model).__name__, exc_info=True)
        return None


def _uuid(cuda: Any, index: int) -> str:
    uuid = str(cuda.get_device_properties(index).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def size_of(model: Any) -> dict[str, Any]:
    """What ``Meter.engine`` may be told about a model's size; unknown parts are left out."""
    itemsize = getattr(getattr(model, "dtype", None), "itemsize", None)
    return size(getattr(model, "config", None), itemsize, *_parameters(model))


def _parameters(model: Any) -> tuple[int, int]:
    """All parameters, and those of routed experts."""
    total = expert = 0
    try:
        for name, parameter in model.named_parameters():
            # four-bit weights lie packed in bytes of whatever type stores them
            packed = 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else 1
            count = int(parameter.numel()) * packed
            total += count
            expert += count if ".experts." in name else 0
    except Exception:
        log.debug("the parameters of %s cannot be counted", type(model).__name__, exc_info=True)
        return 0, 0
    return total, expert
