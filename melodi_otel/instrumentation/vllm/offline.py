"""Requests of a script: ``LLM`` and what is behind it, ``LLMEngine``, which adds requests and steps until all are done."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from melodi_otel.instrumentation.vllm.front import FrontEnd, argument
from melodi_otel.instrumentation.vllm.served import Served


class Offline:
    """Reports the requests of scripts through ``front``."""

    def __init__(self, front: FrontEnd) -> None:
        self._front = front
        self._running: WeakKeyDictionary[Any, dict[str, Served]] = WeakKeyDictionary()

    def add(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``LLMEngine.add_request``."""

        @functools.wraps(original)
        def add_request(engine: Any, *args: Any, **kwargs: Any) -> Any:
            served = self._begin_script(engine, args, kwargs)
            if served is None:
                return original(engine, *args, **kwargs)
            token = self._front.adding.set(served)
            try:
                return original(engine, *args, **kwargs)
            except BaseException as error:
                self._over(engine, [str(argument(args, kwargs, 0, "request_id"))], error)
                raise
            finally:
                self._front.adding.reset(token)

        return add_request

    def _begin_script(self, engine: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Served | None:
        try:
            if self._front.outer.get() is not None or self._front.adding.get() is not None:
                return None
            request = str(argument(args, kwargs, 0, "request_id"))
            served = self._front.begin(
                engine,
                argument(args, kwargs, 2, "params"),
                request,
                lora=argument(args, kwargs, 4, "lora_request"),
                headers=argument(args, kwargs, 6, "trace_headers"),
            )
            self._running.setdefault(engine, {})[request] = served
            return served
        except Exception:
            self._front.complaints.about("a request cannot be metered")
            return None

    def step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``LLMEngine.step``: its answers end the requests that are finished."""

        @functools.wraps(original)
        def step(engine: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                answers = original(engine, *args, **kwargs)
            except BaseException as error:
                self._over(engine, None, error)
                raise
            running = self._running.get(engine)
            if running:
                try:
                    for answer in answers:
                        served = running.get(answer.request_id)
                        if served is not None:
                            served.saw(answer)
                            if answer.finished:
                                del running[answer.request_id]
                except Exception:
                    self._front.complaints.about("an answer cannot be read")
            return answers

        return step

    def abort(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``LLMEngine.abort_request``."""

        @functools.wraps(original)
        def abort_request(engine: Any, *args: Any, **kwargs: Any) -> Any:
            gone = self._aborted(engine, argument(args, kwargs, 0, "request_ids"))
            try:
                return original(engine, *args, **kwargs)
            finally:
                self._over(engine, gone, GeneratorExit())

        return abort_request

    def _aborted(self, engine: Any, ids: Iterable[str]) -> list[str]:
        """Requests of these ids, which may be the callers' or the engine's own."""
        try:
            asked = set(ids)
            return [
                request
                for request, served in self._running.get(engine, {}).items()
                if request in asked or any(state.request_id in asked for state in served.states)
            ]
        except Exception:
            self._front.complaints.about("an abort cannot be read")
            return []

    def _over(self, engine: Any, requests: Iterable[str] | None, error: BaseException) -> None:
        running = self._running.get(engine)
        if running is None:
            return
        for request in list(running) if requests is None else requests:
            served = running.pop(request, None)
            if served is not None:
                self._front.end(served, error)

    def chat(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``LLM.chat`` and ``enqueue_chat``: what they add are chats."""

        @functools.wraps(original)
        def chat(*args: Any, **kwargs: Any) -> Any:
            token = self._front.operation.set("chat")
            try:
                return original(*args, **kwargs)
            finally:
                self._front.operation.reset(token)

        return chat

    def beam_search(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``LLM.beam_search``: one request for all prompts of the call, whose beams run in the same steps."""

        @functools.wraps(original)
        def beam_search(script: Any, *args: Any, **kwargs: Any) -> Any:
            served = None
            try:
                served = self._front.begin(script.llm_engine, argument(args, kwargs, 1, "params"), None, whole=True)
            except Exception:
                self._front.complaints.about("a beam search cannot be metered")
            token = self._front.outer.set(served or self._front.outer.get())
            try:
                found = original(script, *args, **kwargs)
            except BaseException as error:
                if served is not None:
                    self._front.end(served, error)
                raise
            finally:
                self._front.outer.reset(token)
            if served is not None:
                served.produced(_of_beams(found), {0: "stop"})
                self._front.end(served, None)
            return found

        return beam_search


def _of_beams(found: Any) -> int | None:
    """Tokens in the beams that a search returned, without their prompts."""
    try:
        return sum(
            len(beam.tokens) - len(beam.orig_prompt["prompt_token_ids"])
            for output in found
            for beam in output.sequences
        )
    except Exception:
        return None
