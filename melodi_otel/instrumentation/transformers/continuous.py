"""Continuous batching: what is patched in transformers' manager and its loop, and what the patched functions do.

``add_request`` is the begin of a request: the state that it makes of it says all that was asked for, before the loop's thread
can see it. In the loop, ``prepare_next_batch`` says what is computed next and ``update_batch`` that it has been; requests end
where results are delivered or failed, where a cancelled one has disappeared, and at the latest with the loop. All that exists
in 4.57 and 5.x, but for the delivery, which has a class of its own only in 5.x. If a part is missing nothing is patched.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Final, TypeVar

import wrapt

from melodi_otel.instrumentation.patches import Patches
from melodi_otel.instrumentation.seam import Calls
from melodi_otel.instrumentation.transformers.call import Complaints
from melodi_otel.instrumentation.transformers.continuous_loops import BatchLoops, shared
from melodi_otel.instrumentation.transformers.continuous_requests import BatchedRequest, BatchLoop
from melodi_otel.instrumentation.transformers.engines import Engines

log = logging.getLogger("melodi_otel")

CONTINUOUS: Final = "transformers.generation.continuous_batching.continuous_api"
T = TypeVar("T")


class _Adding:
    """A call of ``add_request`` under way."""

    __slots__ = ("loop", "manager", "request")

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.loop: BatchLoop | None = None
        self.request: BatchedRequest | None = None


class _Local(threading.local):
    """What the loop of this thread is doing."""

    looking: BatchLoop | None = None


class ContinuousBatching:
    """Reports every request of every manager to ``calls``.

    Args:
        calls: where requests and steps are reported.
        complaints: where our own failures go.
        engines: the engines of the models.
        operation: ``gen_ai.operation.name`` of what the caller does.
    """

    def __init__(self, calls: Calls, complaints: Complaints, engines: Engines, operation: ContextVar[str]) -> None:
        self._calls = calls
        self._complaints = complaints
        self._engines = engines
        self._operation = operation
        self._on = False
        self._hooked = False
        self._ready = False
        self._entry = Patches()
        self._loop = Patches()
        self._loops = BatchLoops(calls, self._request_ended)
        self._local = _Local()
        self._adding: ContextVar[_Adding | None] = ContextVar("melodi_otel_adding", default=None)
        self._paged: ContextVar[list[tuple[BatchLoop, BatchedRequest]] | None] = ContextVar(
            "melodi_otel_paged", default=None
        )

    def instrument(self) -> None:
        """Patch the module if it is loaded, else when it will be."""
        self._on = True
        module = sys.modules.get(CONTINUOUS)
        if module is not None:
            self._patch(module)
        elif not self._hooked:
            wrapt.register_post_import_hook(self._patch, CONTINUOUS)
            self._hooked = True

    def uninstrument(self) -> None:
        """Put everything back; of the loops, when the last request in flight has ended."""
        self._on = self._ready = False
        self._entry.undo()
        self._attempt("ending lost requests", self._loops.collect)
        self._request_ended()

    def takes(self, kwargs: Any) -> bool:
        """Whether a ``generate()`` with these arguments is served by a loop, so that its requests are the calls."""
        return (
            self._ready
            and kwargs.get("cache_implementation") == "paged"
            and not isinstance(kwargs.get("custom_generate"), str)
        )

    def generate(self, run: Callable[[], T], refused: Callable[[BaseException], None]) -> T:
        """``run`` such a call; ``refused`` is told what it raised where it came to no request at all."""
        requests: list[tuple[BatchLoop, BatchedRequest]] = []
        token = self._paged.set(requests)
        try:
            return run()
        except BaseException as error:
            for loop, request in requests:
                self._attempt("ending", functools.partial(loop.refused, request, error, self._now_ns()))
            if not requests:
                refused(error)
            raise
        finally:
            self._paged.reset(token)

    # --- patches ----------------------------------------------------------------------------------------------------

    def _patch(self, module: ModuleType) -> None:
        if not self._on:
            return
        try:
            manager, processor = module.ContinuousBatchingManager, module.ContinuousBatchProcessor
            router: Any = getattr(module, "OutputRouter", None)
            loop = self._loop.replace
            loop(processor, "prepare_next_batch", self._wrap_look)
            loop(processor, "update_batch", self._wrap_update)
            if router is not None:
                loop(router, "deliver", self._wrap_deliver)
                loop(router, "deliver_batch", self._wrap_deliver_batch)
                loop(router, "fail_and_deliver", self._wrap_fail)
            else:
                loop(processor, "_maybe_send_output", self._wrap_send)
                loop(processor, "_handle_request_error", self._wrap_request_error)
            loop(manager, "cancel_request", self._wrap_cancel)
            loop(manager, "_handle_critical_error", self._wrap_critical_error)
            loop(manager, "_run_generation_loop", self._wrap_run)
            status: Any = getattr(module, "BackgroundThreadStatus", None)
            if hasattr(status, "pause_and_wait"):
                loop(status, "pause_and_wait", self._wrap_pause)
            self._entry.replace(module.RequestState, "__init__", self._wrap_state)
            self._entry.replace(manager, "add_request", self._wrap_add)
            self._ready = True
        except Exception:
            self._entry.undo()
            self._loop.undo()
            log.warning("continuous batching of this transformers cannot be instrumented", exc_info=True)

    def _wrap_add(self, original: Any) -> Any:
        @functools.wraps(original)
        def add_request(manager: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return original(manager, *args, **kwargs)
            adding = _Adding(manager)
            token = self._adding.set(adding)
            error: BaseException | None = None
            try:
                return original(manager, *args, **kwargs)
            except BaseException as raised:
                error = raised
                raise
            finally:
                self._adding.reset(token)
                loop, request = adding.loop, adding.request
                if loop is not None and request is not None and (error is not None or loop.over):
                    self._attempt("ending", lambda: loop.refused(request, error or loop.error, self._now_ns()))

        return add_request

    def _wrap_state(self, original: Any) -> Any:
        @functools.wraps(original)
        def init(state: Any, *args: Any, **kwargs: Any) -> None:
            original(state, *args, **kwargs)
            adding = self._adding.get()
            if adding is not None and adding.request is None:
                self._attempt("beginning", lambda: self._begin(adding, state))

        return init

    def _begin(self, adding: _Adding, state: Any) -> None:
        manager = adding.manager
        engine = self._attempt("finding the model", lambda: self._engines.of(manager.model))
        adding.loop = loop = self._loops.of(manager)
        adding.request = request = loop.add(self._calls, self._operation.get(), engine, manager, state)
        paged = self._paged.get()
        if paged is not None:
            paged.append((loop, request))

    def _wrap_cancel(self, original: Any) -> Any:
        @functools.wraps(original)
        def cancel_request(manager: Any, request_id: Any, *args: Any, **kwargs: Any) -> Any:
            loop = self._loops.find(shared(manager))
            if loop is not None:
                self._attempt("noting a cancellation", lambda: loop.cancel(request_id))
            return original(manager, request_id, *args, **kwargs)

        return cancel_request

    def _wrap_run(self, original: Any) -> Any:
        @functools.wraps(original)
        def run_generation_loop(manager: Any, *args: Any, **kwargs: Any) -> Any:
            loop = self._attempt("following the loop", lambda: self._loops.of(manager))
            if loop is not None:
                loop.over, loop.error = False, None
            error: BaseException | None = None
            try:
                return original(manager, *args, **kwargs)
            except BaseException as raised:
                error = raised
                raise
            finally:
                if loop is not None:
                    self._attempt("ending with the loop", lambda: self._loops.end(loop, error))

        return run_generation_loop

    def _wrap_critical_error(self, original: Any) -> Any:
        @functools.wraps(original)
        def handle_critical_error(manager: Any, error: Any, *args: Any, **kwargs: Any) -> Any:
            loop = self._loops.find(shared(manager))
            if loop is not None:
                loop.error = error
            return original(manager, error, *args, **kwargs)

        return handle_critical_error

    # --- the loop's thread ------------------------------------------------------------------------------------------

    def _wrap_look(self, original: Any) -> Any:
        local, now_ns, complaints = self._local, self._calls.now_ns, self._complaints

        @functools.wraps(original)
        def prepare_next_batch(processor: Any, *args: Any, **kwargs: Any) -> Any:
            local.looking = loop = self._loops.find(shared(processor))
            try:
                if loop is not None:
                    self._look(loop)
            except Exception:
                complaints.about("following the loop")
            try:
                found = original(processor, *args, **kwargs)
            finally:
                local.looking = None
            try:
                if loop is None or loop.lane is None:  # the first request may have come just now
                    loop = self._loops.find(shared(processor))
                    if loop is not None:
                        self._look(loop)
                if loop is not None:
                    loop.looked(processor, bool(found), now_ns())
            except Exception:
                complaints.about("reading a batch")
                _lose(loop)
            return found

        return prepare_next_batch

    def _look(self, loop: BatchLoop) -> None:
        engine = loop.engine
        if engine is None or not (self._on or loop.requests):
            return
        lane = loop.lane
        if lane is None:
            loop.lane = lane = self._loops.lane(engine)
        lane.report_to(self._calls.meter, engine.id, engine.devices)
        lane.begin(self._calls.now_ns())

    def _wrap_update(self, original: Any) -> Any:
        now_ns, complaints = self._calls.now_ns, self._complaints

        @functools.wraps(original)
        def update_batch(processor: Any, *args: Any, **kwargs: Any) -> Any:
            loop = self._loops.find(shared(processor))
            lane = None if loop is None else loop.lane
            if lane is not None:
                try:
                    _wait_for_device(processor)
                    lane.land(now_ns())
                except Exception:
                    complaints.about("handing over a step")
                    _lose(loop)
            return original(processor, *args, **kwargs)

        return update_batch

    def _wrap_pause(self, original: Any) -> Any:
        @functools.wraps(original)
        def pause_and_wait(status: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(status, *args, **kwargs)
            finally:
                loop = self._local.looking
                lane = None if loop is None else loop.lane
                if lane is not None:
                    self._attempt("following a pause", lambda: lane.resume(self._now_ns()))

        return pause_and_wait

    def _wrap_deliver(self, original: Any) -> Any:
        @functools.wraps(original)
        def deliver(router: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
            self._delivered(router, (output,))
            return original(router, output, *args, **kwargs)

        return deliver

    def _wrap_deliver_batch(self, original: Any) -> Any:
        @functools.wraps(original)
        def deliver_batch(router: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._delivered(router, outputs)
            return original(router, outputs, *args, **kwargs)

        return deliver_batch

    def _delivered(self, router: Any, outputs: Any) -> None:
        loop = self._loops.find(router)
        if loop is not None:
            for output in outputs:
                try:
                    if output.is_finished():
                        loop.delivered(output.request_id, output.generated_tokens, self._now_ns())
                except Exception:
                    self._complaints.about("ending")

    def _wrap_fail(self, original: Any) -> Any:
        @functools.wraps(original)
        def fail_and_deliver(router: Any, state: Any, error: Any, *args: Any, **kwargs: Any) -> Any:
            loop = self._loops.find(router)
            if loop is not None:
                self._attempt("ending", lambda: loop.failed(state, error, self._now_ns()))
            return original(router, state, error, *args, **kwargs)

        return fail_and_deliver

    def _wrap_send(self, original: Any) -> Any:
        @functools.wraps(original)
        def maybe_send_output(processor: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
            if state.status.name == "FINISHED" and (loop := self._loops.find(shared(processor))) is not None:
                tokens = state.static_outputs
                self._attempt("ending", lambda: loop.delivered(state.request_id, tokens, self._now_ns()))
            return original(processor, state, *args, **kwargs)

        return maybe_send_output

    def _wrap_request_error(self, original: Any) -> Any:
        @functools.wraps(original)
        def handle_request_error(processor: Any, error: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
            loop = self._loops.find(shared(processor))
            if loop is not None:
                self._attempt("ending", lambda: loop.failed(state, error, self._now_ns()))
            return original(processor, error, state, *args, **kwargs)

        return handle_request_error

    def _request_ended(self) -> None:
        if not self._on and not any(loop.requests for loop in self._loops):
            self._attempt("taking patches back", self._loop.undo)
            for loop in self._loops:
                self._loops.leave(loop)  # nobody follows it from now on

    def _now_ns(self) -> int:
        return self._calls.now_ns()

    def _attempt(self, what: str, act: Callable[[], T]) -> T | None:
        try:
            return act()
        except Exception:
            self._complaints.about(what)
            return None


def _lose(loop: BatchLoop | None) -> None:
    if loop is not None and loop.lane is not None:
        loop.lane.lost()


def _wait_for_device(processor: Any) -> None:
    """With two batches in flight, wait until the older one has been computed: the update does nothing else first."""
    ios = getattr(processor, "inputs_and_outputs", None)
    pairs = getattr(ios, "io_pairs", None)
    if ios is not None and pairs is not None:
        pairs[ios.current_pair].d2h_over.synchronize()
