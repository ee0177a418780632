"""What the scrape endpoint answers: ``/metrics``, the status page and its JSON, joules of single answers, its health."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from typing import Any, Final, NamedTuple, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from melodi_otel.telemetry.guard import Guard

REQUEST_S: Final = 60.0
"""Seconds from one answer to the end of the next one."""

ANSWERS: Final = "/melodi/requests/"
"""Below this path is the energy of each answer that promised it."""

_INDEX: Final = (
    b"<!doctype html><title>melodi_otel</title><h1>melodi_otel</h1>"
    b"<p>Energy of LLM requests: <a href=/metrics>metrics</a></p>\n"
)
_TEXT: Final = "text/plain; charset=utf-8"
_OPEN_TO_ALL: Final = ("/livez", "/readyz")
_CHALLENGE: Final = ("WWW-Authenticate", 'Basic realm="melodi_otel", charset="UTF-8"')
_ALWAYS: Final = (("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"))


@dataclass(frozen=True, slots=True)
class Site:
    """What there is to show.

    Attributes:
        registry: of ``/metrics``.
        complain: is told what failed, and where.
        status: what ``/status.json`` holds; None: there is no status page.
        ready: why the meter is not ready, in one line, or None; without it, who serves is ready.
        guard: who may read.
        answer: what is known of the energy of an answer, by its id; None: nothing, or there are no such pages.
    """

    registry: CollectorRegistry
    complain: Callable[[str, BaseException], None]
    status: Callable[[], Mapping[str, Any]] | None = None
    ready: Callable[[], str | None] | None = None
    guard: Guard = field(default_factory=Guard)
    answer: Callable[[str], Mapping[str, Any] | None] | None = None


class Page(NamedTuple):
    """The status page and the policy that lets a browser run what is in it, and nothing else."""

    html: bytes
    policy: str


@cache
def status_page() -> Page:
    """The page of this package."""
    html = (files("melodi_otel.telemetry") / "status.html").read_text(encoding="utf-8")
    style, script = (_hashes(tag, html) for tag in ("style", "script"))
    return Page(
        html.encode(),
        f"default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    )


def _hashes(tag: str, html: str) -> str:
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)


class Clocked(Protocol):
    """The server: gives a connection so many seconds for what comes next."""

    site: Site

    def allow(self, connection: Any, seconds: float) -> None: ...


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server_version = "melodi_otel"
    sys_version = ""
    timeout = REQUEST_S
    server: Clocked  # pyright: ignore[reportIncompatibleVariableOverride]

    def handle_one_request(self) -> None:
        """From the first byte of a request to the last of its answer there is a time, however slowly bytes come."""
        self.server.allow(self.connection, REQUEST_S)
        super().handle_one_request()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path not in _OPEN_TO_ALL and not self._may_read():
            return
        if path == "/metrics":
            self._metrics()
        elif path == "/":
            self._front()
        elif path == "/livez":
            self._answer(HTTPStatus.OK, _TEXT, b"ok\n")
        elif path == "/readyz":
            self._ready()
        elif path == "/status.json" and self.server.site.status is not None:
            self._status(self.server.site.status)
        elif path.startswith(ANSWERS) and self.server.site.answer is not None:
            self._energy_of(self.server.site.answer, path.removeprefix(ANSWERS))
        else:
            also = " /status.json" if self.server.site.status is not None else ""
            body = f"there is no {path[:100]!a} here, only / /metrics{also} /livez /readyz\n"
            self._answer(HTTPStatus.NOT_FOUND, _TEXT, body.encode())

    do_HEAD = do_GET  # noqa: N815 - the names that http.server calls

    def _refuse(self) -> None:
        # A body may follow that nobody reads: the connection cannot be used again.
        self.close_connection = True
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"only GET and HEAD\n", ("Allow", "GET, HEAD"))

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse  # noqa: N815

    def _may_read(self) -> bool:
        """Whether the sender may read; where not, it has been told so."""
        guard = self.server.site.guard
        if guard.tls is not None and guard.tls.mutual and not self.connection.getpeercert():
            self._answer(HTTPStatus.FORBIDDEN, _TEXT, b"a client certificate is needed here\n")
            return False
        if guard.passwords is None:
            return True
        try:
            answer = guard.passwords(self.headers.get("Authorization"))
        except Exception as error:
            self.server.site.complain("checking a password", error)
            answer = "no"
        if answer == "yes":
            return True
        if answer == "later":
            body = b"too many wrong passwords came just now; try again in a moment\n"
            self._answer(HTTPStatus.TOO_MANY_REQUESTS, _TEXT, body, ("Retry-After", "2"))
        else:
            self._answer(HTTPStatus.UNAUTHORIZED, _TEXT, b"a user and a password are needed here\n", _CHALLENGE)
        return False

    def _front(self) -> None:
        kind = "text/html; charset=utf-8"
        if self.server.site.status is None:
            self._answer(HTTPStatus.OK, kind, _INDEX)
            return
        page = status_page()
        headers = (("Content-Security-Policy", page.policy), ("Cache-Control", "no-cache"))
        self._compressed(kind, page.html, *headers)

    def _ready(self) -> None:
        ready = self.server.site.ready
        try:
            why = None if ready is None else ready()
        except Exception as error:
            self.server.site.complain("readiness", error)
            why = "readiness cannot be told"
        if why is None:
            self._answer(HTTPStatus.OK, _TEXT, b"ok\n")
        else:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"{why}\n".encode())

    def _status(self, status: Callable[[], Mapping[str, Any]]) -> None:
        try:
            body = json.dumps(status(), allow_nan=False).encode()
        except Exception as error:
            self.server.site.complain("the status", error)
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, _TEXT, b"the status cannot be told\n")
            return
        self._compressed("application/json", body, ("Cache-Control", "no-store"))

    def _energy_of(self, answer: Callable[[str], Mapping[str, Any] | None], name: str) -> None:
        known = answer(name)
        if known is None:
            body = b"no answer is known by this id: it is none, or so many came after it that it is forgotten\n"
            self._answer(HTTPStatus.NOT_FOUND, _TEXT, body)
            return
        # Not final yet: 202 says so to whoever looks at the status only.
        status = HTTPStatus.OK if known.get("final") else HTTPStatus.ACCEPTED
        later = () if known.get("final") else (("Retry-After", "1"),)
        body = json.dumps(known, allow_nan=False).encode()
        self._answer(status, "application/json", body, ("Cache-Control", "no-store"), *later)

    def _metrics(self) -> None:
        try:
            encode, kind = choose_encoder(self.headers.get("Accept", ""))
            body = encode(self.server.site.registry)
        except Exception as error:
            self.server.site.complain("collecting", error)
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, _TEXT, b"collecting failed\n")
            return
        self._compressed(kind, body, vary="Accept, Accept-Encoding")

    def _compressed(self, kind: str, body: bytes, *headers: tuple[str, str], vary: str = "Accept-Encoding") -> None:
        more = [("Vary", vary), *headers]
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, compresslevel=1)
            more.append(("Content-Encoding", "gzip"))
        self._answer(HTTPStatus.OK, kind, body, *more)

    def _answer(self, status: HTTPStatus, kind: str, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (*_ALWAYS, *headers):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's own name
        """Access logs are the host program's business."""
