"""``transformers serve``: the request's context reaches the thread that generates, and a client that leaves is no error.

The server hands every call to one long-lived thread per model, which knows nothing of the HTTP request. Each piece of work
is therefore run in a copy of the context it was handed over in, and what it sets there is gone when it ends. When a client
of a stream disconnects, the server makes its streamer raise inside ``generate()``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, Final

MODULE: Final = "transformers.cli.serving.utils"
OWNER: Final = "InferenceThread"
METHODS: Final = ("submit", "async_submit")

_CANCELLED: Final = "_GenerationCancelled"


def wrap_submit(original: Any) -> Any:
    """A ``submit`` whose work runs in a copy of the submitter's context."""

    @functools.wraps(original)
    def submit(thread: Any, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return original(thread, functools.partial(copy_context().run, fn), *args, **kwargs)

    return submit


def is_cancellation(error: BaseException) -> bool:
    """Whether ``error`` is how the server stops a call whose client has left."""
    kind = type(error)
    return kind.__name__ == _CANCELLED and kind.__module__ == MODULE
