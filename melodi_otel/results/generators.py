"""Generators that are measured: nested in their activity only while their own code runs.

A generator is suspended between two items and its consumer works then; were the activity current at that time, the
consumer's model calls would count as the generator's. So it is made current for each step and given back after it.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

from melodi_otel.attribution.meter import current
from melodi_otel.results.run import Run


def measured_generator(begin: Callable[[], Run], function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` (a generator function) with a passage around each of its generators."""

    @functools.wraps(function)
    def measured(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        inner: Generator[Any, Any, Any] = function(*args, **kwargs)
        run, error = begin(), None
        step: Callable[[Any], Any] = inner.send
        value: Any = None
        try:
            while True:
                token = current.set(run.key)
                try:
                    item = step(value)
                except StopIteration as stop:
                    return stop.value
                finally:
                    current.reset(token)
                try:
                    value = yield item
                    step = inner.send
                except GeneratorExit:
                    inner.close()
                    raise
                except BaseException as thrown:
                    step, value = inner.throw, thrown
        except BaseException as raised:
            error = raised
            raise
        finally:
            run.finish(error)

    return measured


def measured_async_generator(begin: Callable[[], Run], function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` (an asynchronous generator function) with a passage around each of its generators."""

    @functools.wraps(function)
    async def measured(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        inner: AsyncGenerator[Any, Any] = function(*args, **kwargs)
        run, error = begin(), None
        step: Callable[[Any], Any] = inner.asend
        value: Any = None
        try:
            while True:
                token = current.set(run.key)
                try:
                    item = await step(value)
                except StopAsyncIteration:
                    return
                finally:
                    current.reset(token)
                try:
                    value = yield item
                    step = inner.asend
                except GeneratorExit:
                    await inner.aclose()
                    raise
                except BaseException as thrown:
                    step, value = inner.athrow, thrown
        except BaseException as raised:
            error = raised
            raise
        finally:
            run.finish(error)

    return measured
