"""Attributes replaced in somebody else's classes, and how to put them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

_ABSENT: Final = object()


class Patches:
    """The undo list of one instrumentation.

    An attribute is put back only while ours still stands there: if someone wrapped it after us, removing ours would
    remove theirs too. What we leave behind then must pass calls through, which is the patched function's own duty.
    """

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any, Any]] = []

    def replace(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        """Set ``owner.name`` to ``wrap(owner.name)``; the same attribute a second time changes nothing.

        Raises:
            AttributeError: ``owner`` has no such attribute.
        """
        if any(done_owner is owner and done_name == name for done_owner, done_name, _, _ in self._done):
            return
        before = _own(owner, name)
        ours = wrap(getattr(owner, name) if before is _ABSENT else before)
        setattr(owner, name, ours)
        self._done.append((owner, name, before, ours))

    def undo(self) -> None:
        """Put everything back, last first."""
        while self._done:
            owner, name, before, ours = self._done.pop()
            if _own(owner, name) is not ours:
                continue
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def _own(owner: Any, name: str) -> Any:
    """The attribute as it stands in the class itself: inherited ones and bindings left aside."""
    return owner.__dict__.get(name, _ABSENT)
