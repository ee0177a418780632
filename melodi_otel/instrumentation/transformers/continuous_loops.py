"""The loops of continuous batching: which one a manager has, which lane its steps are on, and what becomes of lost ones.

No lock is held here, for the reason given in ``engines``.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

from melodi_otel.attribution.meter import EngineId
from melodi_otel.instrumentation.seam import Calls
from melodi_otel.instrumentation.transformers.continuous_requests import BatchLoop
from melodi_otel.instrumentation.transformers.continuous_steps import Lane
from melodi_otel.instrumentation.transformers.engines import Engine


class BatchLoops:
    """One loop per manager, known by what the manager shares with its processor.

    Args:
        calls: whose clock is used.
        ended: called after each end of a request.
    """

    def __init__(self, calls: Calls, ended: Callable[[], None]) -> None:
        self._calls = calls
        self._ended = ended
        self._names = itertools.count()
        # by identity: weak keys would cost a reference object per step
        self._loops: dict[int, tuple[ref[Any], BatchLoop]] = {}
        self._gone: deque[int] = deque()
        self._lanes: dict[EngineId, list[Lane]] = {}

    def __iter__(self) -> Iterator[BatchLoop]:
        return iter([loop for _, loop in list(self._loops.values())])

    def find(self, key: Any) -> BatchLoop | None:
        """The loop of what :func:`shared` gives, if it is known."""
        found = self._loops.get(id(key))
        return found[1] if found is not None and found[0]() is key else None

    def of(self, manager: Any) -> BatchLoop:
        """The loop of ``manager``, new if need be."""
        self.collect()
        key = shared(manager)
        found = self.find(key)
        if found is not None:
            return found
        at, gone = id(key), self._gone
        loop = BatchLoop(f"batch{next(self._names)}", self._ended)
        # the callback runs wherever memory is collected, so it only takes a note
        watch = ref(key, lambda _: gone.append(at))
        return self._loops.setdefault(at, (watch, loop))[1]

    def collect(self) -> None:
        """End what stands open in managers that are gone."""
        while self._gone:
            at = self._gone.popleft()
            found = self._loops.get(at)
            if found is not None and found[0]() is None:
                del self._loops[at]
                self.end(found[1])

    def end(self, loop: BatchLoop, error: BaseException | None = None) -> None:
        """``loop`` is over, with what it raised."""
        self.leave(loop)
        loop.end(self._calls.now_ns(), error)

    def leave(self, loop: BatchLoop) -> None:
        """Another loop of the model may go on with its lane: a program may make a manager per batch."""
        lane = loop.leave()
        if lane is not None and loop.engine is not None:
            self._lanes.setdefault(loop.engine.id, []).append(lane)

    def lane(self, engine: Engine) -> Lane:
        """A lane of ``engine`` that no loop is on."""
        try:
            return self._lanes[engine.id].pop()
        except LookupError:
            return Lane(next(engine.lanes))


def shared(owner: Any) -> Any:
    """What a manager and its processor both have: where results go."""
    router = getattr(owner, "output_router", None)
    return router if router is not None else getattr(owner, "output_queue", owner)
