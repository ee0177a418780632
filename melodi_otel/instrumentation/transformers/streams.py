"""Where a streamer was made: the request that its thread forgets.

A handler makes a ``TextIteratorStreamer``, starts ``Thread(target=model.generate, kwargs={…, "streamer": streamer})`` and reads
from it. A plain thread begins without the context of who started it, but the streamer was made in that context, so it tells.
"""

from __future__ import annotations

import functools
from typing import Any, Final
from weakref import WeakKeyDictionary

from melodi_otel.instrumentation.seam import Calls, Origin
from melodi_otel.instrumentation.transformers.complaints import Complaints

MODULE: Final = "transformers.generation.streamers"
OWNER: Final = "TextStreamer"
"""The base of all text streamers; each of them calls its ``__init__``."""


class Streams:
    """Remembers, as long as a streamer lives, where it was made.

    Args:
        calls: knows what "where" means.
        complaints: where our own failures go.
    """

    def __init__(self, calls: Calls, complaints: Complaints) -> None:
        self._calls = calls
        self._complaints = complaints
        # beside the streamer, not in it: it stays as its author made it, and can still be copied or pickled
        self._origins: WeakKeyDictionary[Any, Origin] = WeakKeyDictionary()

    def wrap_init(self, original: Any) -> Any:
        """The ``__init__`` of streamers that takes a note."""

        @functools.wraps(original)
        def init(streamer: Any, *args: Any, **kwargs: Any) -> None:
            original(streamer, *args, **kwargs)
            try:
                origin = self._calls.origin()
                if origin is not None:
                    self._origins[streamer] = origin
            except Exception:
                self._complaints.about("noting where a streamer was made")

        return init

    def origin(self, streamer: Any) -> Origin | None:
        """Where ``streamer`` was made, or None."""
        if streamer is None:
            return None
        try:
            return self._origins.get(streamer)
        except Exception:  # not every object can be looked up
            return None
