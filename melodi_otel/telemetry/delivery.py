"""Finished requests on their way to whoever observes them, never on a request's own thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final

from melodi_otel.attribution.meter import Share
from melodi_otel.attribution.record import Observer, RequestRecord
from melodi_otel.attribution.summary import Energy
from melodi_otel.forks import in_child
from melodi_otel.telemetry.complaints import Complaints


class Delivery:
    """Runs jobs in order on a daemon thread that starts with the first one; fork-safe."""

    def __init__(self) -> None:
        self._start_over()
        in_child(self._start_over)

    def _start_over(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.RLock()

    def put(self, job: Callable[[], None]) -> None:
        """Run ``job`` soon; it must not raise."""
        self._jobs.put(job)
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="melodi-otel-records", daemon=True)
                    self._thread.start()

    def drain(self, timeout_s: float) -> bool:
        """Wait until all jobs so far have run; whether they had within ``timeout_s``."""
        if self._thread is None:
            return True
        done = threading.Event()
        self._jobs.put(done.set)
        return done.wait(timeout_s)

    def stop(self) -> None:
        """Run what is left and end the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(_stop)
            thread.join(timeout=5.0)

    def _run(self) -> None:
        jobs = self._jobs
        while True:
            job = jobs.get()
            if job is _stop:
                return
            job()


def _stop() -> None: ...


class Reports:
    """Hands finished requests to observers when their joules are known.

    Args:
        observers: who gets them.
        settle: the energy of these shares, in one figure.
    """

    def __init__(self, observers: Sequence[Observer], settle: Callable[[Sequence[Share]], Energy]) -> None:
        self._observers = tuple(observers)
        self.settle: Final = settle
        self._delivery = Delivery()
        self._complain = Complaints("requests")

    def when_known(self, shares: Future[list[Share]], make: Callable[[Sequence[Share]], RequestRecord]) -> None:
        """Observe the request that ``make`` tells of, on the thread that knows its joules, never on the request's own."""
        if shares.done():
            self._delivery.put(lambda: self._observe(shares, make))
        else:
            shares.add_done_callback(lambda done: self._observe(done, make))

    def drain(self, timeout_s: float = 5.0) -> bool:
        """Wait until every record whose joules are known has been observed; whether that was so in time."""
        return self._delivery.drain(timeout_s)

    def close(self) -> None:
        """Observe what is left and end the thread that does so; a later report starts it again."""
        self._delivery.stop()

    def _observe(self, shares: Future[list[Share]], make: Callable[[Sequence[Share]], RequestRecord]) -> None:
        try:
            record = make(shares.result())
        except Exception as error:
            self._complain("record", error)
            return
        for observer in self._observers:
            try:
                observer.finished(record)
            except Exception as error:
                self._complain(f"observer {type(observer).__name__}", error)
