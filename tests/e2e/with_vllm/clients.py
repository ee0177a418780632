"""Clients of an OpenAI-compatible server: many at once, of mixed lengths, streaming or not, and some that leave early."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.e2e.with_vllm.rig import NAME

WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "one",
    "joule",
    "is",
    "a",
    "watt",
    "second",
)

LEFT = 300
"""Tokens that those ask for who will not stay: so many that a fast server is not done with them when it sees them go."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Attributes:
        prompt: a text, or several for the completions endpoint.
        max_tokens: length of every answer exactly: the end-of-sequence token is ignored.
        chat: ask the chat endpoint.
        stream: by server-sent events, with the usage in the last one.
        n: answers per prompt.
        leave_after: go away after so many events of a stream; None: stay.
        leave_after_s: go away after so many seconds; None: stay.
        headers: of HTTP.
        more: further fields of the body.
    """

    prompt: str | Sequence[str]
    max_tokens: int = 16
    chat: bool = False
    stream: bool = False
    n: int = 1
    leave_after: int | None = None
    leave_after_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> bool:
        """Whether it is meant not to stay for the whole answer."""
        return self.leave_after is not None or self.leave_after_s is not None

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def body(self) -> dict[str, Any]:
        asked: dict[str, Any] = {"model": NAME, "max_tokens": self.max_tokens, "n": self.n, "ignore_eos": True}
        if self.chat:
            asked["messages"] = [{"role": "user", "content": self.prompt}]
        else:
            asked["prompt"] = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        if self.stream:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
        return asked | self.more


@dataclass(slots=True)
class Answer:
    """What a client got.

    Attributes:
        ask: for what.
        status: of HTTP; 0: it left before there was one.
        id: the server's name of the request, e.g. ``cmpl-…``; empty: not told yet.
        usage: the server's own count, as soon as it was told; None: it was not.
        events: of a stream.
        left: it went away before the end.
        last: the body, or the last event that was read.
        first_s: seconds to the first event or the body; None: it came to none.
        seconds: until it had everything or left.
    """

    ask: Ask
    status: int = 0
    id: str = ""
    usage: dict[str, Any] | None = None
    events: int = 0
    left: bool = False
    last: dict[str, Any] = field(default_factory=dict)
    first_s: float | None = None
    seconds: float = 0.0

    def tokens(self, kind: str) -> int:
        """``prompt`` or ``completion`` tokens by the server's usage; 0 where it told none."""
        return int((self.usage or {}).get(f"{kind}_tokens", 0))


def mixed(number: int, *, leave_every: int = 0, longest: int = 64) -> list[Ask]:
    """Requests of many lengths, the same at every call: every second streams, every third chats.

    Args:
        number: how many.
        leave_every: every so manieth goes away after its second event; 0: none does.
        longest: answers have 4 to this many tokens; those that nobody waits for would have 300.
    """
    asks: list[Ask] = []
    for index in range(number):
        leaves = bool(leave_every) and index % leave_every == leave_every - 1
        length = 2 + (index * 7) % 41  # words; their beginnings differ, so that no cached prefix serves two of them
        prompt = " ".join([str(index), *(WORDS[(index + step) % len(WORDS)] for step in range(length))])
        asks.append(
            Ask(
                prompt,
                max_tokens=LEFT if leaves else 4 + (index * 13) % (longest - 3),
                chat=index % 3 == 2,
                stream=leaves or index % 2 == 1,
                leave_after=2 if leaves else None,
            )
        )
    return asks


def warm_up(url: str, number: int = 16) -> list[Answer]:
    """Short requests before those that are looked at: an engine's first steps take seconds, and whoever is there pays them."""
    return fire(url, [Ask(f"warm {index}", max_tokens=4) for index in range(number)])


def fire(url: str, asks: Iterable[Ask], *, at_once: int = 64) -> list[Answer]:
    """Send all requests, at most ``at_once`` of them under way; the answers in the same order.

    Raises:
        HTTPError: the server could not be reached or broke off. A refusal is an answer with its status.
    """

    async def everything() -> list[Answer]:
        gate = asyncio.Semaphore(at_once)
        limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, timeout=180, limits=limits, trust_env=False) as client:

            async def one(ask: Ask) -> Answer:
                async with gate:
                    return await _send(client, ask)

            return await asyncio.gather(*(one(ask) for ask in asks))

    return asyncio.run(everything())


async def _send(client: httpx.AsyncClient, ask: Ask) -> Answer:
    answer = Answer(ask)
    began = time.monotonic()
    try:
        async with asyncio.timeout(ask.leave_after_s):
            # Leaving the block closes the connection: that is how a client of HTTP/1.1 goes away.
            async with client.stream("POST", ask.path, json=ask.body, headers=dict(ask.headers)) as response:
                answer.status = response.status_code
                if ask.stream and response.status_code == 200:
                    await _read_events(response, answer, began)
                else:
                    _note(answer, json.loads(await response.aread()), began)
    except TimeoutError:
        answer.left = True
    answer.seconds = time.monotonic() - began
    return answer


async def _read_events(response: httpx.Response, answer: Answer, began: float) -> None:
    async for line in response.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        answer.events += 1
        _note(answer, json.loads(line.removeprefix("data: ")), began)
        if answer.events == answer.ask.leave_after:
            answer.left = True
            return


def _note(answer: Answer, body: dict[str, Any], began: float) -> None:
    if answer.first_s is None:
        answer.first_s = time.monotonic() - began
    answer.last = body
    answer.id = body.get("id") or answer.id
    answer.usage = body.get("usage") or answer.usage
