"""ASGI: what a served request says about whose it is, for the labels of the model calls made while it is served.

:class:`LabelMiddleware` goes around any ASGI application; :class:`AsgiInstrumentor` does the same to applications of
Starlette and FastAPI without code. Both look at the headers they are told to look at and at no others, and leave what they
found in OpenTelemetry's context, which thread pools, ``asyncio.to_thread`` and the instrumentations of threads carry along.

Messages pass as they are. A header that came several times is one value, joined by ``", "`` in the order of arrival, as
RFC 9110 section 5.3 says; so whoever adds a second one to a proxy's becomes a third party and not the first one.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextvars import Token
from types import ModuleType
from typing import Any, Final

import wrapt
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context

from melodi_otel.instrumentation.patches import Patches
from melodi_otel.instrumentation.seam import INCOMING, Incoming, Origin, incoming

log = logging.getLogger("melodi_otel")

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ROUTING: Final = "starlette.routing"
BODY_LIMIT: Final = 1 << 20
"""Bytes of a body that are kept to look for the user in; a longer one has none."""

_SEEN: Final = "melodi_otel.incoming"
_USER_FIELDS: Final = ("safety_identifier", "user")
_MAY_NAME_A_USER: Final = re.compile(rb'"(?:safety_identifier|user)"\s*:')


class LabelMiddleware:
    """Around an ASGI application: ``app = LabelMiddleware(app, headers=["x-tenant-id"])``.

    Put it inside whatever makes the server's span, as ``add_middleware`` of Starlette does for what is added first.
    Applications of Starlette and FastAPI need none of it where ``melodi_otel.instrument()`` was called.

    Args:
        app: the application.
        headers: names of the headers that a ``header:`` rule of ``MELODI_LABELS`` asks for, in any case.
        user: whether to look for ``safety_identifier`` or ``user`` in JSON bodies, for a ``user`` rule.
    """

    def __init__(self, app: App, headers: Iterable[str] = (), *, user: bool = False) -> None:
        self.app: Final = app
        self._door = Door(headers, user=user)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._door.serve(self.app, scope, receive, send)


class AsgiInstrumentor:
    """Does the work of :class:`LabelMiddleware` in every Starlette and FastAPI application of the program.

    The router is what is patched, so it is inside every middleware, and applications that were made before have it too.
    Nothing is imported: Starlette is patched where it is loaded, now or later.

    Args:
        headers, user: as for :class:`LabelMiddleware`.
        origin: what the headers of a request say about its trace and its baggage; None: nobody asks for that.
        active: False: nobody asks for anything that a request says, and nothing is patched; asked at each ``instrument()``.
    """

    def __init__(
        self,
        headers: Iterable[str] = (),
        *,
        user: bool = False,
        origin: Callable[[Mapping[str, str]], Origin | None] | None = None,
        active: Callable[[], bool] = lambda: True,
    ) -> None:
        self._door = Door(headers, user=user, origin=origin)
        self._active = active
        self._patches = Patches()
        self._on = False
        self._hooked = False

    def instrument(self) -> None:
        """Patch what is loaded and what will be; a second time changes nothing."""
        if not self._active():
            return
        self._on = True
        module = sys.modules.get(ROUTING)
        if module is not None:
            self._patch(module)
        elif not self._hooked:
            self._hooked = True
            wrapt.register_post_import_hook(self._patch, ROUTING)

    def uninstrument(self) -> None:
        """Put everything back; requests being served go on."""
        self._on = False
        self._patches.undo()

    def _patch(self, module: ModuleType) -> None:
        if not self._on:
            return
        try:
            self._patches.replace(module.Router, "__call__", self._wrap)
        except Exception:
            log.warning("%s.Router cannot be instrumented", module.__name__, exc_info=True)

    def _wrap(self, original: Any) -> Any:
        @functools.wraps(original)
        async def __call__(router: Any, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: N807 - its name
            if not self._on:
                await original(router, scope, receive, send)
                return
            await self._door.serve(functools.partial(original, router), scope, receive, send)

        return __call__


class Door:
    """Where requests come in: notes of each whose it is, for as long as it is served.

    Args:
        headers: names of the headers to look at.
        user: whether to look for the user in JSON bodies.
        origin: what all the headers say about trace and baggage, where no span is current; None: that is not asked.
    """

    def __init__(
        self,
        headers: Iterable[str],
        *,
        user: bool,
        origin: Callable[[Mapping[str, str]], Origin | None] | None = None,
    ) -> None:
        self._origin = origin
        self._names = {name.lower().encode("latin-1", "replace"): name.lower() for name in headers}
        self._user = user

    async def serve(self, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (or connection, or lifespan) with ``app``; its exceptions pass untouched."""
        tokens = None
        if scope.get("type") in ("http", "websocket"):
            try:
                tokens, receive = self._enter(scope, receive)
            except Exception:
                log.debug("a request's labels cannot be read", exc_info=True)
        try:
            await app(scope, receive, send)
        except GeneratorExit:
            tokens = None  # thrown in from another context, in which these mean nothing
            raise
        finally:
            if tokens is not None:
                _leave(*tokens)

    def _enter(self, scope: Scope, receive: Receive) -> tuple[_Tokens | None, Receive]:
        before: tuple[Door, Incoming] | None = scope.get(_SEEN)
        if before is not None and before[0] is self:
            return None, receive  # a router inside a router: the same request
        headers, is_json = self._read(scope.get("headers") or ())
        user = None
        span = trace.get_current_span()
        origin = None
        if self._origin is not None and not span.get_span_context().is_valid:
            origin = self._origin(_by_name(scope.get("headers") or ()))
        if before is not None:
            # The program has put a middleware there itself: what both have found holds.
            headers, user, span = {**before[1].headers, **headers}, before[1].user, before[1].span or span
        if user is None and self._user and is_json and scope["type"] == "http":
            body = Body(receive)
            user, receive = body.user, body.receive
        found = Incoming(headers, user, span, origin)
        scope[_SEEN] = (self, found)
        token = otel_context.attach(otel_context.set_value(INCOMING, found))
        return (token, incoming.set(found)), receive

    def _read(self, raw: Iterable[tuple[bytes, bytes]]) -> tuple[dict[str, str], bool]:
        """The headers asked for, and whether the body is JSON."""
        names, found, is_json = self._names, dict[str, str](), False
        for header, value in raw:
            lower = header.lower()
            if (name := names.get(lower)) is not None:
                text = _decoded(value).strip()
                if text:
                    found[name] = f"{found[name]}, {text}" if name in found else text
            if lower == b"content-type":
                is_json = value.split(b";", 1)[0].strip().lower().endswith((b"/json", b"+json"))
        return found, is_json


_Tokens = tuple[Token[Context], Token[Incoming | None]]


class Body:
    """A request's body as it passes, kept until somebody asks who the user is.

    Args:
        receive: where messages come from.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._parts: list[bytes] | None = []
        self._size = 0
        self._whole = False
        self._found: str | None = None

    async def receive(self) -> Message:
        """The next message, as it is."""
        message = await self._receive()
        try:
            self._note(message)
        except Exception:
            self._parts = None
        return message

    def user(self) -> str | None:
        """OpenAI's ``safety_identifier``, else ``user``; None where the body names nobody, is not all there, or too long."""
        if self._whole and self._parts is not None:
            parts, self._parts = self._parts, None
            self._found = _user_in(b"".join(parts))
        return self._found

    def _note(self, message: Message) -> None:
        if message["type"] != "http.request" or self._parts is None or self._whole:
            return
        part = message.get("body", b"")
        self._size += len(part)
        if self._size > BODY_LIMIT:
            self._parts = None
            return
        self._parts.append(bytes(part))
        self._whole = not message.get("more_body", False)


def _by_name(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for header, value in raw:
        name, text = header.decode("latin-1").lower(), _decoded(value)
        found[name] = f"{found[name]},{text}" if name in found else text
    return found


def _leave(token: Token[Context], own: Token[Incoming | None]) -> None:
    try:
        incoming.reset(own)
    except ValueError:
        return  # another task ends it than began it: its context is not ours to change
    otel_context.detach(token)


def _decoded(value: bytes) -> str:
    # RFC 9110 knows ISO-8859-1 and opaque bytes; who sends other letters today sends UTF-8.
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _user_in(body: bytes) -> str | None:
    if _MAY_NAME_A_USER.search(body) is None:
        return None
    try:
        found: Any = json.loads(body)
        return next((found[name] for name in _USER_FIELDS if isinstance(found.get(name), str) and found[name]), None)
    except Exception:
        return None
