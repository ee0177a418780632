"""The status page, its JSON, liveness and readiness of the scrape endpoint, and what slow clients can do to it."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from melodi_otel.telemetry import http as server_module
from melodi_otel.telemetry import pages
from melodi_otel.telemetry.http import Endpoint, serve
from melodi_otel.telemetry.pages import status_page

Serve = Callable[..., Endpoint]


@pytest.fixture
def serving() -> Iterator[Serve]:
    made: list[Endpoint] = []

    def start(**options: Any) -> Endpoint:
        made.append(serve("127.0.0.1:0", CollectorRegistry(), **options))
        return made[-1]

    yield start
    for endpoint in made:
        endpoint.close()


def ask(endpoint: Endpoint, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.port or 0, timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_the_status_page_runs_what_is_in_it_and_nothing_else(serving: Serve) -> None:
    """With a status / is the page; its policy allows exactly its own style and script, by their hashes."""
    status, headers, body = ask(serving(status=dict), "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), body, re.DOTALL)
        assert policy[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"


def test_the_page_asks_nobody_else() -> None:
    """No address but our own stands in the page, no style in an attribute and no handler, which the policy would stop."""
    html = status_page().html.decode()
    assert set(re.findall(r"https?://[^\s\"')]+", html)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"<[a-z]+[^>]*\s(?:style|on[a-z]+)=", html)
    assert "innerHTML" not in html


def test_status_json(serving: Serve) -> None:
    """What the callable gives at that moment is the JSON, never kept by a cache."""
    numbers = iter([1, 2])
    endpoint = serving(status=lambda: {"n": next(numbers), "watts": None})
    answers = [ask(endpoint, "/status.json") for _ in range(2)]
    assert [json.loads(body) for _, _, body in answers] == [{"n": 1, "watts": None}, {"n": 2, "watts": None}]
    assert answers[0][1]["Content-Type"] == "application/json"
    assert answers[0][1]["Cache-Control"] == "no-store"


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_a_status_that_is_no_json(serving: Serve, value: object) -> None:
    """What cannot be told is a 500 without a word of its inside; the endpoint goes on."""
    endpoint = serving(status=lambda: {"n": value})
    assert ask(endpoint, "/status.json")[::2] == (500, b"the status cannot be told\n")
    assert ask(endpoint, "/livez")[0] == 200


def test_without_a_status(serving: Serve) -> None:
    """Without one / is the small index, and there is no JSON."""
    endpoint = serving()
    assert b"<a href=/metrics>" in ask(endpoint, "/")[2]
    status, _, body = ask(endpoint, "/status.json")
    assert (status, body) == (404, b"there is no '/status.json' here, only / /metrics /livez /readyz\n")


def test_ready(serving: Serve) -> None:
    """/readyz is 503 with the reason while there is one, and 200 from then on; /livez is 200 throughout."""
    reasons: list[str | None] = ["no reading yet from rapl", None]
    endpoint = serving(ready=lambda: reasons.pop(0))
    assert ask(endpoint, "/livez")[::2] == (200, b"ok\n")
    assert ask(endpoint, "/readyz")[::2] == (503, b"no reading yet from rapl\n")
    assert ask(endpoint, "/readyz")[::2] == (200, b"ok\n")


def test_readiness_that_fails(serving: Serve) -> None:
    """Who cannot tell whether it is ready is not."""

    def broken() -> str | None:
        raise RuntimeError("secret")

    assert ask(serving(ready=broken), "/readyz")[::2] == (503, b"readiness cannot be told\n")


def test_who_serves_is_ready(serving: Serve) -> None:
    """Without a callable for it, an endpoint that answers is ready."""
    assert ask(serving(), "/readyz")[0] == 200


def test_only_so_many_connections(serving: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection more than allowed is closed at once; when another one ends there is room again."""
    monkeypatch.setattr(server_module, "CONNECTIONS", 2)
    endpoint = serving()
    held = [http.client.HTTPConnection("127.0.0.1", endpoint.port or 0, timeout=10) for _ in range(2)]
    for connection in held:
        connection.request("GET", "/livez")
        assert connection.getresponse().read() == b"ok\n"
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        ask(endpoint, "/livez")
    for connection in held:
        connection.close()
    deadline = time.monotonic() + 10
    while True:  # a thread of the server has to see the end first
        try:
            assert ask(endpoint, "/livez")[0] == 200
            break
        except (http.client.RemoteDisconnected, ConnectionError):
            assert time.monotonic() < deadline


def test_a_request_that_never_ends_is_cut(serving: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sends a part of a request and no more is cut when its time is over, long before a single read would be."""
    monkeypatch.setattr(pages, "REQUEST_S", 0.05)
    endpoint = serving()
    with socket.create_connection(("127.0.0.1", endpoint.port or 0), timeout=30) as slow:
        slow.sendall(b"GET /livez HT")
        assert slow.recv(100) == b""


def test_joules_of_an_answer(serving: Serve) -> None:
    """The final figure of an answer is 200 and JSON that no cache keeps."""
    known = {"id": "a", "joules": 3.5, "final": True}
    status, headers, body = ask(serving(answer={"a": known}.get), "/melodi/requests/a")
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "application/json", "no-store")
    assert json.loads(body) == known


def test_joules_that_are_not_final(serving: Serve) -> None:
    """What is not final yet is 202, and says when to come again."""
    known = {"id": "a", "final": False}
    status, headers, body = ask(serving(answer={"a": known}.get), "/melodi/requests/a")
    assert (status, headers["Retry-After"], json.loads(body)) == (202, "1", known)


def test_an_answer_that_nobody_knows(serving: Serve) -> None:
    """An unknown id is 404 and says why it may be one; without answers there are no such pages."""
    status, _, body = ask(serving(answer={}.get), "/melodi/requests/b")
    assert status == 404
    assert b"no answer is known by this id" in body
    assert ask(serving(), "/melodi/requests/b")[0] == 404
