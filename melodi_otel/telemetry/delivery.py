"""A thread for records whose joules were known at once, so that the request's own thread need not observe them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from melodi_otel.telemetry.forks import in_child


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
