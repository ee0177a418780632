"""A scheduler's output as the work of one step, in the delta form of the meter.

vLLM tells per step how many tokens each request computes (``num_scheduled_tokens``) and how many it has in its cache before
(``num_computed_tokens``). A request that computes one token behind its prompt is a member of the decode set, which is told
by who joins and who leaves, so a step in which nothing changes costs no walk over its requests::

    prefill    context before < the tokens that it had when it was admitted or last resumed, or more than 1 + drafts
    computed   behind that, with drafts to verify
    member     behind that, one token

Pure: what it is given has vLLM's attributes, and no vLLM is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

from melodi_otel.attribution.meter import Decode, Joined, Prefill

_NOBODY: Final = Decode(0, 0)
_row: Final[Callable[[type[Any], tuple[Any, ...]], Any]] = cast(Any, tuple).__new__
"""What ``Prefill(…)`` does, in half the time: with drafts there is a row per sequence in every step."""


class Work(NamedTuple):
    """What one step computes; see :meth:`melodi_otel.attribution.meter.Meter.step` for the fields."""

    decode: Decode = _NOBODY
    prefill: Sequence[Prefill] = ()
    computed: Sequence[Prefill] = ()
    joined: Sequence[Joined] = ()
    left: Sequence[str] = ()


class WorkReader:
    """Reads the outputs of one lane's scheduler, in the order in which they were scheduled.

    Args:
        length_of: tokens that a request has now, its prompt and what it has produced; None where nobody knows it.
    """

    def __init__(self, length_of: Callable[[str], int | None]) -> None:
        self._length_of = length_of
        self._members: dict[str, int] = {}  # id -> its context when it joined, less the decode steps before that
        self._steps = 0
        self._sum = 0  # contexts of all members before the next step
        self._known: dict[str, int] = {}  # id -> tokens when it was admitted or last resumed
        self._gone: list[str] = []  # finished members, told as such with the next step
        self._last: dict[str, int] = {}  # id -> context before its newest row

    def read(self, output: Any) -> Work | None:
        """The work of ``output`` (a ``SchedulerOutput``), or None where nothing is computed.

        Raises:
            Exception: it does not look like one; nothing that this reader knows holds any more.
        """
        scheduled: Mapping[str, int] = output.num_scheduled_tokens
        finished = output.finished_req_ids
        if finished:
            for gone in finished:
                if gone in self._members:
                    self._leave(gone)
                    self._gone.append(gone)
                self._known.pop(gone, None)
                self._last.pop(gone, None)
        number = len(scheduled)
        if number == 0:
            return None
        cached = output.scheduled_cached_reqs
        contexts: Sequence[int] = cached.num_computed_tokens
        if (
            output.total_num_scheduled_tokens == number == len(self._members) == len(contexts)
            and not self._gone
            and scheduled.keys() == self._members.keys()
            and sum(contexts) == self._sum
        ):
            work = Work(Decode(number, self._sum))
            self._count(number)
            return work
        return self._changed(output, scheduled, cached, contexts)

    def held(self) -> int:
        """Requests of which something is remembered beside the decode set."""
        return len(self._known.keys() | self._last.keys())

    def forget(self) -> None:
        """A step was lost: whoever is in the decode set joins anew."""
        self._gone.clear()
        for name in list(self._members):
            self._leave(name)

    def _changed(self, output: Any, scheduled: Mapping[str, int], cached: Any, contexts: Sequence[int]) -> Work:
        before: dict[str, int] = dict(zip(cached.req_ids, contexts, strict=True))
        for new in output.scheduled_new_reqs:
            before[new.req_id] = new.num_computed_tokens
            self._known.pop(new.req_id, None)
            self._last.pop(new.req_id, None)
        for name in getattr(cached, "resumed_req_ids", ()):  # which older versions say in another way: see `_tokens_of`
            self._known.pop(name, None)
        drafts = output.scheduled_spec_decode_tokens
        members, steps = self._members, self._steps
        left = [name for name in members if name not in scheduled]
        for name in left:
            self._leave(name)
        left += self._gone
        self._gone = []
        prefill: list[Prefill] = []
        computed: list[Prefill] = []
        joined: list[Joined] = []
        lengths, last = self._known, self._last
        for name, tokens in scheduled.items():
            context = before[name]
            at = members.get(name)
            if at is not None:
                if tokens == 1 and context == at + steps and not (drafts and name in drafts):
                    continue
                self._leave(name)
            known = lengths.get(name)
            if known is None or context <= last.get(name, -1):
                known = lengths[name] = self._tokens_of(name, context, tokens)
            last[name] = context
            extra = len(drafts[name]) if drafts and name in drafts else 0
            if context < known or tokens > 1 + extra:
                prefill.append(_row(Prefill, (name, tokens, context)))
                if at is not None:
                    left.append(name)
            elif tokens == 1:
                joined.append(_row(Joined, (name, context)))
                members[name] = context - steps
                self._sum += context
            else:
                computed.append(_row(Prefill, (name, tokens, context)))
        work = Work(Decode(len(members), self._sum), prefill, computed, joined, left)
        self._count(len(members))
        return work

    def _tokens_of(self, name: str, context: int, tokens: int) -> int:
        """Tokens that it has when it is admitted, or resumed: a context that has not grown is how that shows."""
        length = self._length_of(name)
        return context + tokens if length is None else length

    def _leave(self, name: str) -> None:
        context = self._members.pop(name) + self._steps
        self._sum -= context
        self._last[name] = context - 1  # of the row before this step

    def _count(self, members: int) -> None:
        # With nobody in the set the meter's copy of it stands still, too.
        if members:
            self._steps += 1
            self._sum += members
