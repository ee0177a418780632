"""What a served request says about whose it is reaches the code that serves it, and nothing else changes."""

from __future__ import annotations

import asyncio
import contextvars
import json
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fastapi
import httpx
import pytest
import starlette.applications
import starlette.responses
import starlette.routing
from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.trace import TracerProvider

from melodi_otel.config import Config
from melodi_otel.instrumentation.asgi import BODY_LIMIT, AsgiInstrumentor, Door, LabelMiddleware
from melodi_otel.instrumentation.seam import INCOMING, Incoming, incoming
from melodi_otel.telemetry.whose import Whose

LABELS = "tenant=header:x-tenant-id,user=user"


def labels(config: str = LABELS) -> dict[str, str]:
    """Labels of a request that would begin here."""
    finder = Whose(Config(labels=config)).finder({})
    assert finder is not None
    return dict(finder({}))


def scope_of(headers: Iterable[tuple[bytes, bytes]] = (), kind: str = "http") -> dict[str, Any]:
    return {"type": kind, "method": "POST", "path": "/", "headers": list(headers)}


class Server:
    """Serves one scope with the messages given, and keeps what was sent and what the application found."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.messages = list(messages)
        self.sent: list[dict[str, Any]] = []
        self.found: dict[str, str] | None = None
        self.received: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        return self.messages.pop(0)

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        while self.messages:
            self.received.append(await receive())
        self.found = labels()
        await send({"type": "http.response.start", "status": 200})


def serve(headers: Iterable[tuple[bytes, bytes]], *messages: dict[str, Any], **more: Any) -> Server:
    server = Server(*messages)
    app = LabelMiddleware(server.app, ["X-Tenant-Id"], user=more.pop("user", False))
    asyncio.run(app(scope_of(headers, **more), server.receive, server.send))
    return server


def part(body: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


JSON = (b"content-type", b"application/json; charset=utf-8")


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_header_is_there_while_it_is_served(kind: str) -> None:
    """Requests and connections carry the header they came with, and the context is as before afterwards."""
    assert serve([(b"x-tenant-id", b"acme")], kind=kind).found == {"tenant": "acme"}
    assert context.get_value(INCOMING) is None
    assert incoming.get() is None


def test_only_named_headers_are_kept() -> None:
    """What rides in the context holds the named headers and nothing of the others."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(context.get_value(INCOMING))

    raw = [(b"authorization", b"Bearer secret"), (b"X-Tenant-ID", b"acme"), (b"cookie", b"a=b")]
    asyncio.run(LabelMiddleware(app, ["x-tenant-id", "x-team"])(scope_of(raw), None, None))  # type: ignore[arg-type]
    assert isinstance(seen[0], Incoming)
    assert seen[0].headers == {"x-tenant-id": "acme"}
    assert seen[0].user is None


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ([b"acme"], "acme"),
        ([b"acme", b"evil"], "acme, evil"),
        ([b"", b" acme "], "acme"),
        ([b""], None),
        (["Zoë".encode()], "Zoë"),
        (["Zoë".encode("latin-1")], "Zoë"),
        ([b"a\x00b\x1b\xff"], "a_b_ÿ"),
        ([b"a\xc2\x85b"], "a_b"),
        ([b"x" * 5000], "x" * 256),
    ],
)
def test_values_as_rfc_9110_reads_them(values: list[bytes], label: str | None) -> None:
    """Repeated headers are one list; UTF-8 else ISO-8859-1; empty is absent; controls and length are tamed."""
    found = serve([(b"x-tenant-id", value) for value in values]).found
    assert found == ({} if label is None else {"tenant": label})


def test_messages_are_not_touched() -> None:
    """The application gets and sends the very messages, with and without a look for the user."""
    for user in (False, True):
        messages = [part(b'{"user":', more=True), part(b'"jane"}'), {"type": "http.disconnect"}]
        server = serve([JSON], *messages, user=user)
        assert [id(message) for message in server.received] == [id(message) for message in messages]
        assert server.sent == [{"type": "http.response.start", "status": 200}]


@pytest.mark.parametrize(
    ("parts", "user"),
    [
        ([b'{"user": "jane"}'], "jane"),
        ([b'{"messages": [{"role": "user"}], "us', b'er": "jane"}'], "jane"),
        ([b'{"user": "jane", "safety_identifier": "s1"}'], "s1"),
        ([b'{"messages": [{"role": "user"}]}'], None),
        ([b'{"user": {"name": "jane"}}'], None),
        ([b'["user"]'], None),
        ([b'{"user": "jane"'], None),
        ([b"[" * 100_000 + b'{"user": "x"}'], None),
        ([b'{"user": "jane", "x": "' + b"x" * BODY_LIMIT + b'"}'], None),
    ],
)
def test_user_of_a_body(parts: list[bytes], user: str | None) -> None:
    """OpenAI's fields name the user of a JSON body that is all there and not too long; anything else names nobody."""
    messages = [part(body, more=number < len(parts)) for number, body in enumerate(parts, 1)]
    assert serve([JSON], *messages, user=True).found == ({} if user is None else {"user": user})


def test_user_only_where_asked_for() -> None:
    """Without a rule for the user, or without JSON, bodies are not looked at."""
    assert serve([JSON], part(b'{"user": "jane"}')).found == {}
    assert serve([(b"content-type", b"text/plain")], part(b'{"user": "jane"}'), user=True).found == {}
    server = serve([JSON], part(b'{"user": "jane"}', more=True), part(b"", more=True), user=True)
    assert server.found == {}


def test_other_scopes_pass() -> None:
    """Lifespan and kinds that are not known yet go by with their own receive."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send, context.get_value(INCOMING)))

    scope, receive, send = {"type": "lifespan"}, object(), object()
    asyncio.run(LabelMiddleware(app, ["x"], user=True)(scope, receive, send))  # type: ignore[arg-type]
    assert seen == [({"type": "lifespan"}, receive, send, None)]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), asyncio.CancelledError()])
def test_exceptions_pass(error: BaseException) -> None:
    """What the application raises comes out as it is, and the context is as before."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    async def caller() -> None:
        with pytest.raises(type(error)) as caught:
            await LabelMiddleware(app, ["x-tenant-id"])(scope_of([(b"x-tenant-id", b"a")]), None, None)  # type: ignore[arg-type]
        assert caught.value is error
        assert context.get_value(INCOMING) is None

    asyncio.run(caller())


def test_a_scope_that_makes_no_sense(caplog: pytest.LogCaptureFixture) -> None:
    """Headers of a kind that ASGI does not know cost the labels, never the request."""
    server = Server()
    scope = {"type": "http", "headers": [("text", 5), None]}
    asyncio.run(LabelMiddleware(server.app, ["x"])(scope, server.receive, server.send))  # type: ignore[arg-type]
    assert server.found == {}
    assert len(server.sent) == 1


def test_closed_in_another_context(caplog: pytest.LogCaptureFixture) -> None:
    """A request that is closed from elsewhere, as at the end of a loop, leaves no error in the log."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(3600)

    async def never() -> None:
        raise AssertionError

    task = LabelMiddleware(app, ["x-tenant-id"])(scope_of([(b"x-tenant-id", b"a")]), never, never)  # type: ignore[arg-type]

    async def outside() -> None:
        contextvars.copy_context().run(task.send, None)
        task.close()

    asyncio.run(outside())
    assert caplog.records == []


def test_threads_that_carry_the_context() -> None:
    """A thread pool fed by to_thread has the labels, and so has whatever attaches OpenTelemetry's context alone."""
    found: list[dict[str, str]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append(await asyncio.to_thread(labels))
        here = context.get_current()

        def bare() -> dict[str, str]:
            token = context.attach(here)
            try:
                return labels()
            finally:
                context.detach(token)

        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(bare).result())
            found.append(pool.submit(labels).result())

    asyncio.run(LabelMiddleware(app, ["x-tenant-id"])(scope_of([(b"x-tenant-id", b"a")]), None, None))  # type: ignore[arg-type]
    assert found == [{"tenant": "a"}, {"tenant": "a"}, {}]


def test_a_new_opentelemetry_context_inside() -> None:
    """A middleware of others that begins its own context, as OpenTelemetry's does, loses nothing."""
    found: list[dict[str, str]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        token = context.attach(Context())
        found.append(labels())
        context.detach(token)

    asyncio.run(LabelMiddleware(app, ["x-tenant-id"])(scope_of([(b"x-tenant-id", b"a")]), None, None))  # type: ignore[arg-type]
    assert found == [{"tenant": "a"}]


def test_concurrent_requests_stay_apart() -> None:
    """A hundred requests at a time each have their own tenant, before and after they wait."""
    found: list[tuple[str, dict[str, str], dict[str, str]]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        before = labels()
        await asyncio.sleep(0)
        found.append((scope["path"], before, labels()))

    middleware = LabelMiddleware(app, ["x-tenant-id"])

    async def all_of_them() -> None:
        scopes = [{**scope_of([(b"x-tenant-id", b"%d" % n)]), "path": str(n)} for n in range(100)]
        await asyncio.gather(*(middleware(scope, None, None) for scope in scopes))  # type: ignore[arg-type]

    asyncio.run(all_of_them())
    assert len(found) == 100
    assert all(before == after == {"tenant": path} for path, before, after in found)


# --- applications of Starlette and FastAPI ----------------------------------------------------------------------------


@pytest.fixture
def instrumentor() -> Iterator[AsgiInstrumentor]:
    made = AsgiInstrumentor(["x-tenant-id"], user=True)
    yield made
    made.uninstrument()


def get(app: Any, path: str = "/", **headers: str) -> Any:
    async def ask() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            return (await client.get(path, headers={name.replace("_", "-"): v for name, v in headers.items()})).json()

    return asyncio.run(ask())


async def show(request: Any) -> Any:
    return starlette.responses.JSONResponse(labels())


def starlette_app() -> Any:
    return starlette.applications.Starlette(routes=[starlette.routing.Route("/", show)])


def test_applications_made_before_and_after(instrumentor: AsgiInstrumentor) -> None:
    """Both carry the header from instrument() on and not after uninstrument(), also once they have served."""
    before = starlette_app()
    assert get(before, x_tenant_id="a") == {}
    instrumentor.instrument()
    instrumentor.instrument()
    after = starlette_app()
    assert get(before, x_tenant_id="a") == get(after, x_tenant_id="a") == {"tenant": "a"}
    instrumentor.uninstrument()
    assert get(before, x_tenant_id="a") == get(after, x_tenant_id="a") == {}


def test_nothing_is_patched_without_need() -> None:
    """Where no rule asks for anything that a request says, the router is as it was."""
    before = starlette.routing.Router.__dict__["__call__"]
    AsgiInstrumentor(active=lambda: False).instrument()
    assert starlette.routing.Router.__dict__["__call__"] is before


@pytest.mark.parametrize(
    ("rules", "served", "headers", "body"),
    [
        ("t=header:X-Tenant|header:x-other,u=user", True, ("x-tenant", "x-other"), True),
        ("t=span:a", True, (), False),
        ("t=baggage:a,m=resource:b,a=adapter", False, (), False),
        ("", False, (), False),
    ],
)
def test_what_rules_ask_for(rules: str, served: bool, headers: tuple[str, ...], body: bool) -> None:
    """The rules say which headers are looked at, whether bodies are, and whether anything is."""
    whose = Whose(Config(labels=rules))
    assert (whose.served, whose.headers, whose.body) == (served, headers, body)


def test_fastapi_in_its_thread_pool_and_on_its_loop(instrumentor: AsgiInstrumentor) -> None:
    """Functions that FastAPI runs in a thread and coroutines on the loop have the labels; mounted applications too."""
    app, inner = fastapi.FastAPI(), fastapi.FastAPI()
    threads: list[int] = []

    @app.get("/thread")
    def in_a_thread() -> dict[str, str]:
        threads.append(threading.get_ident())
        return labels()

    @app.get("/loop")
    async def on_the_loop() -> dict[str, str]:
        return {**labels(), **await asyncio.to_thread(labels)}

    @inner.get("/thread")
    def inside() -> dict[str, str]:
        return labels()

    app.mount("/inner", inner)
    instrumentor.instrument()
    for path in ("/thread", "/loop", "/inner/thread"):
        assert get(app, path, x_tenant_id="a") == {"tenant": "a"}
    assert threads != [threading.get_ident()]


LATER = """
import sys
from melodi_otel.instrumentation.asgi import AsgiInstrumentor
first, second = AsgiInstrumentor(["x-tenant-id"]), AsgiInstrumentor(["x-tenant-id"])
first.instrument()
second.instrument()
second.uninstrument()
assert not [name for name in sys.modules if name.startswith("starlette")]
import starlette.applications
from starlette.routing import Router
assert Router.__call__.__module__ == "starlette.routing"
ours = Router.__dict__["__call__"]
first.uninstrument()
assert Router.__dict__["__call__"] is not ours
first.instrument()
assert Router.__dict__["__call__"] is not ours.__wrapped__
first.uninstrument()
assert Router.__dict__["__call__"] is ours.__wrapped__
"""


def test_starlette_loaded_later() -> None:
    """Nothing of Starlette is imported; when the program does so, whoever is still on patches it, and takes it back."""
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_inside_opentelemetrys_middleware(instrumentor: AsgiInstrumentor) -> None:
    """OpenTelemetry's own middleware begins a new context; the labels are there inside it, its span's attributes too."""
    provider = TracerProvider(shutdown_on_exit=False)
    rules = "tenant=header:x-tenant-id,method=span:http.method|span:http.request.method"

    async def inner_span(request: Any) -> Any:
        with provider.get_tracer("t").start_as_current_span("between"):
            return starlette.responses.JSONResponse(labels(rules))

    plain = starlette.applications.Starlette(routes=[starlette.routing.Route("/", inner_span)])
    plain.add_middleware(OpenTelemetryMiddleware, tracer_provider=provider)
    instrumentor.instrument()
    assert get(plain, x_tenant_id="a") == {"tenant": "a", "method": "GET"}
    assert trace.get_current_span() is trace.INVALID_SPAN
    provider.shutdown()


def test_a_middleware_of_the_programs_own_beside_it(instrumentor: AsgiInstrumentor) -> None:
    """A program that has put LabelMiddleware there itself gets what both have found."""

    async def both(request: Any) -> Any:
        found = context.get_value(INCOMING)
        assert isinstance(found, Incoming)
        return starlette.responses.JSONResponse(dict(found.headers))

    app = starlette.applications.Starlette(routes=[starlette.routing.Route("/", both)])
    app.add_middleware(LabelMiddleware, headers=["x-team"])
    instrumentor.instrument()
    assert get(app, x_tenant_id="a", x_team="b") == {"x-tenant-id": "a", "x-team": "b"}


def test_a_body_read_by_fastapi(instrumentor: AsgiInstrumentor) -> None:
    """FastAPI parses the body as ever, and the user it names is a label."""
    app = fastapi.FastAPI()

    @app.post("/v1/chat/completions")
    def chat(body: dict[str, Any]) -> dict[str, Any]:
        return {"body": body, "labels": labels()}

    instrumentor.instrument()
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "user": "jane"}

    async def ask() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            return (await client.post("/v1/chat/completions", json=body)).json()

    assert asyncio.run(ask()) == {"body": json.loads(json.dumps(body)), "labels": {"user": "jane"}}


class Trace:
    """Notes of which headers it is asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []

    def __call__(self, headers: Mapping[str, str]) -> object:
        self.asked.append(dict(headers))
        return "an origin"


def entered(trace_of: Trace | None, headers: Iterable[tuple[bytes, bytes]]) -> Incoming | None:
    """What the application finds of a request with these headers."""
    found: list[Incoming | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append(incoming.get())

    asyncio.run(Door((), user=False, origin=trace_of).serve(app, scope_of(headers), None, None))  # type: ignore[arg-type]
    return found[0]


def test_where_a_request_came_from() -> None:
    """Where no span is current, the headers are asked for the trace and the baggage; a header that came twice is a list."""
    trace_of = Trace()
    found = entered(trace_of, [(b"Traceparent", b"00-a"), (b"baggage", b"a=1"), (b"baggage", b"b=2")])
    assert found is not None
    assert found.origin == "an origin"
    assert trace_of.asked == [{"traceparent": "00-a", "baggage": "a=1,b=2"}]


def test_a_current_span_knows_better() -> None:
    """Where the server has a span of its own, no header is asked."""
    trace_of = Trace()
    with trace.use_span(TracerProvider().get_tracer("t").start_span("server")):
        found = entered(trace_of, [(b"traceparent", b"00-a")])
    assert found is not None
    assert found.origin is None
    assert trace_of.asked == []
