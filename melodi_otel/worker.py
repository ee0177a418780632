"""A background thread of ours: a daemon that waits on one event, started when it is needed, and anew in a forked child."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from melodi_otel.forks import in_child


class Worker:
    """Starts and ends a thread.

    Args:
        name: of the thread.
        run: its work; it looks at :attr:`stopping` and waits on :attr:`event`.

    Attributes:
        event: what the thread waits on; set to wake it.
        stopping: the thread shall end.
    """

    def __init__(self, name: str, run: Callable[[], None]) -> None:
        self._name: Final = name
        self._run = run
        self._following = False
        self._forked()

    @property
    def running(self) -> bool:
        """Whether the thread of this process is alive."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread; a second call does nothing. Works again after :meth:`stop` and in a forked child."""
        with self._lock:
            if self.running:
                return
            if not self._following:
                self._following = True
                in_child(self._forked)
            self.stopping = False
            self.event.clear()
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread; waits at most ``timeout`` seconds, not at all on the thread itself."""
        thread = self._thread
        self.stopping = True
        self.event.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _forked(self) -> None:
        # The child has no such thread, and its copies of lock and event may be held by one that is not there.
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.event = threading.Event()
        self.stopping = False
