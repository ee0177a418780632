"""A scheduler like vLLM's, as far as its outputs go: objects with the same attributes, and the truth beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from melodi_otel.attribution.engines import Work


@dataclass
class Sequence:
    """A request as the scheduler knows it."""

    name: str
    prompt: int
    produced: int = 0
    computed: int = 0
    known: int = 0
    """Tokens that it had when it was admitted or resumed."""
    scheduled_before: bool = False
    resumed: bool = False

    @property
    def num_tokens(self) -> int:
        return self.prompt + self.produced


@dataclass
class FakeScheduler:
    """Schedules what it is told to, and says so in vLLM's words."""

    requests: dict[str, Sequence] = field(default_factory=dict[str, Sequence])
    finished: set[str] = field(default_factory=set[str])
    given: list[Any] = field(default_factory=list[Any])

    def admit(self, name: str, prompt: int, cached: int = 0) -> None:
        self.requests[name] = Sequence(name, prompt, computed=cached, known=prompt)

    def preempt(self, name: str, cached: int = 0) -> None:
        """Its cache is gone; it begins anew with what it has produced, and perhaps finds some in the prefix cache."""
        one = self.requests[name]
        if cached < one.computed:  # else nothing is lost
            one.computed = cached
            one.known = one.num_tokens
            one.resumed = one.scheduled_before

    def finish(self, name: str) -> None:
        del self.requests[name]
        self.finished.add(name)

    def plan(self, rows: dict[str, tuple[int, int]]) -> tuple[Any, list[Work]]:
        """An output for ``rows`` (name -> tokens, drafts among them), and what it computes in truth."""
        new: list[Any] = []
        ids: list[str] = []
        contexts: list[int] = []
        resumed: set[str] = set()
        truth: list[Work] = []
        for name, (tokens, drafts) in rows.items():
            one = self.requests[name]
            if one.scheduled_before:
                ids.append(name)
                contexts.append(one.computed)
                if one.resumed:
                    resumed.add(name)
            else:
                new.append(SimpleNamespace(req_id=name, num_computed_tokens=one.computed))
            behind = one.computed >= one.known and tokens == 1 + drafts
            truth.append(Work(name, 0 if behind else tokens, tokens if behind else 0, one.computed))
            one.scheduled_before, one.resumed = True, False
        output = SimpleNamespace(
            num_scheduled_tokens={name: tokens for name, (tokens, _) in rows.items()},
            total_num_scheduled_tokens=sum(tokens for tokens, _ in rows.values()),
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(req_ids=ids, num_computed_tokens=contexts, resumed_req_ids=resumed),
            scheduled_spec_decode_tokens={name: [0] * drafts for name, (_, drafts) in rows.items() if drafts},
            finished_req_ids=self.finished,
        )
        self.finished = set()
        return output, truth

    def computed(self, rows: dict[str, tuple[int, int]], accepted: dict[str, int]) -> None:
        """The step is over: tokens are in the cache, less the drafts that were rejected."""
        for name, (tokens, drafts) in rows.items():
            one = self.requests.get(name)
            if one is None:
                continue
            kept = min(accepted.get(name, 0), drafts)
            one.computed += tokens - (drafts - kept)
            if one.computed >= one.num_tokens:
                one.produced += 1 + (kept if one.computed >= one.known else 0)
                one.produced = max(one.produced, one.computed + 1 - one.prompt)

    # --- the two methods that vLLM's engine core calls ---

    def schedule(self, throttle_prefills: bool = False) -> Any:
        return self.given.pop(0)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        return {0: (scheduler_output, model_runner_output)}
