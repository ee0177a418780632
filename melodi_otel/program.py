"""The program's own runtime: one per process, and the functions by which users speak to it.

:func:`instrument` starts it at once. :func:`prepare` (zero-code) wraps providers and waits for work, see
:mod:`melodi_otel.standby`; the heavy rooms are loaded by whichever of the two comes to need them.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import logging
import os
import sys
import threading
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from melodi_otel.config import GROUP_VARIABLE, Config, new_group
from melodi_otel.standby import ENGINES, Standby

if TYPE_CHECKING:
    from melodi_otel.results.measure import Measurement
    from melodi_otel.results.table import Results
    from melodi_otel.runtime import Runtime

log = logging.getLogger("melodi_otel")

_FIND_WAIT_S = 10.0
_LEAVE_WAIT_S = 2.0

_lock = threading.RLock()
_current: Runtime | None = None
_standby: Standby | None = None
_console = False
_group_is_ours = False
_following = False


def instrument(
    *,
    config: Config | None = None,
    console: bool | None = None,
    tracer_provider: object = None,
    meter_provider: object = None,
) -> Runtime | None:
    """Meter this program: every ``generate()`` gets a span with tokens and joules, metrics and a result.

    Uses the application's tracer and meter provider where there is one, also if it is set later. Twice is once: the running
    runtime is returned and later arguments change nothing.

    Args:
        config: what to do; None: from ``MELODI_*``.
        console: print a summary when the program ends; None: as ``MELODI_CONSOLE`` says.
        tracer_provider, meter_provider: use these instead of the global ones.

    Returns:
        The runtime, or None where ``MELODI_DISABLED=1`` turned everything off.

    Raises:
        ConfigError: a ``MELODI_*`` value cannot be used.
    """
    global _console
    if _current is not None and _standby is None:
        return _current
    settings = config or (_standby.config if _standby is not None else Config.from_env(os.environ))
    if settings.disabled:
        log.info("melodi_otel is off: MELODI_DISABLED=1")
        return None
    runtime = _start(settings, tracer_provider, meter_provider, later=False)
    runtime.wait_found(_FIND_WAIT_S)  # zero-code may be looking for the meters just now
    runtime.instrument_libraries()
    _console = settings.console if console is None else console
    return runtime


def uninstrument() -> None:
    """Stop metering, leave everything as it was; nothing happens where it does not run."""
    global _current, _standby, _group_is_ours
    with _lock:
        runtime, _current = _current, None
        standby, _standby = _standby, None
        atexit.unregister(_at_exit)
    if standby is not None:
        standby.end()
    if runtime is not None:
        runtime.shutdown()
    if _group_is_ours:
        _group_is_ours = False
        os.environ.pop(GROUP_VARIABLE, None)


def running() -> Runtime | None:
    """The program's runtime, or None."""
    return _current


def prepare(
    config: Config | None = None, *, tracer_provider: object = None, meter_provider: object = None
) -> Standby | None:
    """Wrap the providers of this program and wait until it runs a model; where a runtime is there, nothing happens.

    Args:
        config: what to do; None: from ``MELODI_*``.
        tracer_provider, meter_provider: use these instead of the global ones.

    Returns:
        What waits; None where ``MELODI_DISABLED=1`` turned everything off, or where a runtime was started by code.

    Raises:
        ConfigError: a ``MELODI_*`` value cannot be used.
    """
    global _standby, _group_is_ours
    with _lock:
        if _standby is not None or _current is not None:
            return _standby
        settings = config or Config.from_env(os.environ)
        if settings.disabled:
            return None
        # Processes that are started from here on are one group, also those that were started before any had work.
        if GROUP_VARIABLE not in os.environ:
            os.environ[GROUP_VARIABLE] = new_group()
            _group_is_ours = True
        made = Standby(settings, wake, tracer_provider, meter_provider)
        made.begin()
        _standby = made
        atexit.register(_at_exit)
        _follow_forks()
        return made


def wake() -> Runtime | None:
    """Start the runtime of a program that was only prepared; meters are looked for on its settle thread.

    Returns:
        The runtime; None where nothing was prepared.

    Raises:
        ConfigError: a ``MELODI_*`` value cannot be used.
    """
    standby = _standby
    if _current is not None or standby is None:
        return _current
    runtime = _start(standby.config, None, standby.meter_provider, later=True)
    runtime.instrument_libraries(standby.libraries - ENGINES.keys())
    return runtime


def instrument_libraries(names: Collection[str]) -> None:
    """Instrument these libraries: at once where a runtime was started by code, else when the program loads them."""
    if _standby is not None:
        _standby.await_libraries(names)
    elif _current is not None:
        _current.instrument_libraries(names)


def uninstrument_libraries(names: Collection[str]) -> None:
    """Leave these libraries as they were."""
    if _standby is not None:
        _standby.forget_libraries(names)
    if _current is not None:
        _current.uninstrument_libraries(names)


def measure(name: str) -> Measurement:
    """Joules of a block: ``with melodi_otel.measure("x") as m: …``, then ``m.joules``; starts metering if need be.

    Also a decorator, and ``async with``. With ``MELODI_DISABLED=1`` every figure is None.
    """
    from melodi_otel.results.measure import Measurement

    runtime = _current or (instrument() if _standby is None else _woken())
    if runtime is not None:
        return runtime.measure(name)
    from melodi_otel.clock import SystemClock

    return Measurement(name, meter=None, clock=SystemClock(), devices=dict, group="disabled")


def last() -> Results:
    """The request (or measured block) that became final last, as a table of one row; empty where there is none."""
    return recent(1)


def recent(n: int | None = None) -> Results:
    """The last ``n`` finished requests and blocks (None: all that are kept), oldest first."""
    from melodi_otel.results.table import Results
    from melodi_otel.runtime import EXIT_WAIT_S

    runtime = _current
    if runtime is None:
        return Results([])
    runtime.wait_settled(EXIT_WAIT_S)
    return runtime.store.recent(n)


def load_ipython_extension(ipython: Any) -> None:
    """``%load_ext melodi_otel``."""
    from melodi_otel.results.notebook import load_ipython_extension as load_magic

    load_magic(ipython, measure)


def _woken() -> Runtime | None:
    # A block is covered from its first instant: the meters are there before it begins.
    runtime = wake()
    if runtime is not None:
        runtime.wait_found(_FIND_WAIT_S)
    return runtime


def _start(config: Config, tracer_provider: object, meter_provider: object, *, later: bool) -> Runtime:
    global _current
    # Outside the lock: another thread may be importing something of this, and wait for the lock in it.
    root = importlib.import_module("melodi_otel.runtime")
    with _lock:
        if _current is not None:
            return _current
        standby = _standby
        if standby is not None and tracer_provider is not None:
            standby.tracers.given = tracer_provider
        runtime: Runtime = root.Runtime(
            config,
            tracer_provider=tracer_provider,
            meter_provider=meter_provider,
            tracers=None if standby is None else standby.tracers,
            later=later,
        )
        runtime.start()
        if standby is not None:
            standby.runtime = runtime
        else:
            _follow_forks()
        # What was registered last runs first: before the providers that were made just now end by themselves.
        atexit.unregister(_at_exit)
        atexit.register(_at_exit)
        _current = runtime
        return runtime


def _follow_forks() -> None:
    global _following
    if not _following and hasattr(os, "register_at_fork"):
        _following = True
        os.register_at_fork(after_in_child=_forked)


def _forked() -> None:
    global _lock
    _lock = threading.RLock()  # a thread that is not here may hold it
    if _standby is not None:
        _standby.forked()
    # A child of multiprocessing ends by os._exit, which runs no exit handler but these finalizers; they are made after the
    # others have been cleared there.
    finalizers: Any = sys.modules.get("multiprocessing.util")
    if finalizers is not None and (_current is not None or _standby is not None):
        finalizers.register_after_fork(_leave, functools.partial(finalizers.Finalize, None, exitpriority=100))


def _leave() -> None:
    runtime = _current
    if runtime is None or not runtime.working:
        return
    # Bounded, whatever the exporter does: the child shall not end later than it would because of us.
    sending = threading.Thread(target=runtime.force_flush, args=(_LEAVE_WAIT_S,), name="melodi-otel-leave", daemon=True)
    sending.start()
    sending.join(2 * _LEAVE_WAIT_S)


def _at_exit() -> None:
    runtime = _current
    if runtime is None:
        return
    uninstrument()
    # A helper process that ran no model has nothing to say.
    if _console and runtime.store.total:
        from melodi_otel.results.terminal import print_summary

        print_summary(runtime.store.recent(), runtime.snapshot(), runtime.devices())
