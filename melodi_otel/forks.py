"""After a fork: locks may be held by threads that do not exist here, so whoever owns a thread starts over."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable


def weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Call ``method`` while its object lives: hooks of the interpreter must not keep it alive."""
    weak = weakref.WeakMethod(method)

    def call() -> None:
        if (strong := weak()) is not None:
            strong()

    return call


def in_child(method: Callable[[], None]) -> None:
    """Call ``method`` in every forked child; such a hook can never be taken back, so it holds its object weakly."""
    if hasattr(os, "register_at_fork"):  # absent on Windows, where nothing forks
        os.register_at_fork(after_in_child=weakly(method))
