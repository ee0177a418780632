"""What a server of vLLM adds to its answers: joules known so far in ``usage``, requests on its own ``/metrics``."""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final

from melodi_otel.instrumentation.seam import Calls, Incoming, incoming
from melodi_otel.instrumentation.vllm.complaints import Complaints
from melodi_otel.instrumentation.vllm.served import Served

ENERGY: Final = "energy"
"""The field of ``usage``; like every field that a client does not know it is passed over by those who do not look for it."""
_MANY_PROCESSES: Final = "PROMETHEUS_MULTIPROC_DIR"
"""Set where several processes write what one page shows, of which none could show its own requests."""


class Answers:
    """Adds to answers what is known of their requests.

    Args:
        calls: where requests are reported.
        complaints: where our own failures go.
        energy: whether ``usage`` is to carry joules.
        show_on: shows finished requests on a registry of prometheus_client; False: they are shown already. None: nowhere.
    """

    def __init__(
        self, calls: Calls, complaints: Complaints, *, energy: bool, show_on: Callable[[Any], bool] | None
    ) -> None:
        self._calls = calls
        self._complaints = complaints
        self._energy = energy
        self._show_on = show_on

    def belongs(self, served: Served) -> str | None:
        """A request begins: the id under which the answer that it is for promises its joules, or None."""
        asked = incoming.get()
        if asked is None or not self._energy:
            return None
        asked.calls.append(served)
        return _id_of(asked)

    def usage(self, original: Callable[..., None]) -> Callable[..., None]:
        """``UsageInfo.__init__``: the tokens of an answer that is about to leave."""

        @functools.wraps(original)
        def __init__(usage: Any, **fields: Any) -> None:  # noqa: N807 - its name
            original(usage, **fields)
            if self._energy:
                try:
                    self._add(usage)
                except Exception:
                    self._complaints.about("an answer's energy cannot be told")

        return __init__

    def _add(self, usage: Any) -> None:
        asked = incoming.get()
        if asked is None:
            return
        calls: Sequence[Served] = [one for one in asked.calls if isinstance(one, Served)]
        keys = [served.call.key for served in calls if served.call is not None]
        # Every chunk may have a usage of its own: only the last says what the whole answer used.
        if keys and all(served.ended for served in calls):
            setattr(usage, ENERGY, dict(self._calls.so_far(_id_of(asked), keys)))

    def page(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``attach_router`` of the server's own ``/metrics``."""

        @functools.wraps(original)
        def attach_router(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            if self._show_on is not None and _MANY_PROCESSES not in os.environ:
                try:
                    self._show_on(original.__globals__["get_prometheus_registry"]())  # type: ignore[attr-defined]
                except Exception:
                    self._complaints.about("requests cannot be shown on vLLM's own /metrics")
            return found

        return attach_router


def _id_of(asked: Incoming) -> str:
    """Random: whoever can name it was told it."""
    if not asked.answer:
        asked.answer.append(secrets.token_urlsafe(24))
    return asked.answer[0]
