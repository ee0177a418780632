"""Who may read the endpoint: TLS, client certificates, users; files that change and files that are wrong."""

from __future__ import annotations

import base64
import http.client
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from melodi_otel.config import Config
from melodi_otel.errors import ConfigError, MissingDependency
from melodi_otel.telemetry import passwords
from melodi_otel.telemetry.guard import Guard, guard_of
from melodi_otel.telemetry.http import Endpoint, serve
from melodi_otel.telemetry.passwords import Passwords, _Users
from melodi_otel.telemetry.tls import Tls

trustme = pytest.importorskip("trustme")
security = pytest.importorskip("werkzeug.security")

Serve = Callable[[Guard], Endpoint]


@pytest.fixture
def serving() -> Iterator[Serve]:
    made: list[Endpoint] = []

    def start(guard: Guard) -> Endpoint:
        made.append(serve("127.0.0.1:0", CollectorRegistry(), guard=guard))
        return made[-1]

    yield start
    for endpoint in made:
        endpoint.close()


class Pki:
    """A CA of its own and files with what it issued."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        self.cafile = str(folder / "ca.pem")
        self.ca.cert_pem.write_to_path(self.cafile)
        self.cert, self.key = str(folder / "tls.crt"), str(folder / "tls.key")
        self.renew()

    def renew(self) -> None:
        issued = self.ca.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(self.key)
        Path(self.cert).write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))

    def trusting(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.cafile)

    def client(self) -> ssl.SSLContext:
        context = self.trusting()
        self.ca.issue_cert("scraper@example").configure_cert(context)
        return context


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@pytest.fixture
def users(tmp_path: Path) -> Path:
    file = tmp_path / "users"
    file.write_text(f"# who scrapes\n\nann:{hashed('right')}\n", encoding="utf-8")
    return file


def hashed(password: str) -> str:
    return str(security.generate_password_hash(password, method="pbkdf2:sha256:1"))


def ask(endpoint: Endpoint, context: ssl.SSLContext | None, path: str = "/metrics", **headers: str) -> Any:
    """Status, headers, the certificate that was shown."""
    if context is None:
        connection = http.client.HTTPConnection("127.0.0.1", endpoint.port or 0, timeout=10)
    else:
        connection = http.client.HTTPSConnection("127.0.0.1", endpoint.port or 0, timeout=10, context=context)
    try:
        connection.request("GET", path, headers=headers)
        shown = None if context is None else connection.sock.getpeercert(binary_form=True)
        answer = connection.getresponse()
        answer.read()
        return answer.status, dict(answer.getheaders()), shown
    finally:
        connection.close()


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


# --- TLS -------------------------------------------------------------------------------------------------------------


def test_https(serving: Serve, pki: Pki) -> None:
    """With a certificate the endpoint speaks https, says so in its URL, and is trusted by who trusts its CA."""
    endpoint = serving(Guard(Tls(pki.cert, pki.key)))
    assert endpoint.url == f"https://127.0.0.1:{endpoint.port}/metrics"
    assert ask(endpoint, pki.trusting())[0] == 200
    with pytest.raises(ssl.SSLCertVerificationError):
        ask(endpoint, ssl.create_default_context())


def test_one_file_may_hold_both(serving: Serve, pki: Pki) -> None:
    """Without a key of its own the key is looked for in the certificate's file."""
    both = pki.folder / "both.pem"
    both.write_text(Path(pki.key).read_text() + Path(pki.cert).read_text())
    assert ask(serving(Guard(Tls(str(both)))), pki.trusting())[0] == 200


def test_old_tls_is_not_spoken(pki: Pki) -> None:
    """1.2 is the oldest version that is spoken, whatever the system's defaults are."""
    assert Tls(pki.cert, pki.key).context().minimum_version == ssl.TLSVersion.TLSv1_2


def test_http_on_the_port_of_https(serving: Serve, pki: Pki) -> None:
    """Who speaks http there is told so."""
    endpoint = serving(Guard(Tls(pki.cert, pki.key)))
    with socket.create_connection(("127.0.0.1", endpoint.port or 0), timeout=10) as plain:
        plain.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert plain.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_a_handshake_that_does_not_come_keeps_nobody_waiting(serving: Serve, pki: Pki) -> None:
    """Clients that connect and say nothing, or only begin, do not keep the next one from its answer."""
    endpoint = serving(Guard(Tls(pki.cert, pki.key)))
    silent = [socket.create_connection(("127.0.0.1", endpoint.port or 0), timeout=10) for _ in range(5)]
    for begun in silent[:2]:
        begun.sendall(b"\x16\x03\x01")
    assert ask(endpoint, pki.trusting())[0] == 200
    for connection in silent:
        connection.close()


def test_a_renewed_certificate_is_shown(serving: Serve, pki: Pki) -> None:
    """The handshake after a change of the files shows the new certificate."""
    endpoint = serving(Guard(Tls(pki.cert, pki.key)))
    before = ask(endpoint, pki.trusting())[2]
    pki.renew()
    after = ask(endpoint, pki.trusting())[2]
    assert before != after
    assert after == ssl.PEM_cert_to_DER_cert(Path(pki.cert).read_text())


def test_a_bad_certificate_keeps_the_old_one(serving: Serve, pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    """A file that cannot be used is warned about once, and the old certificate stays; reload() says that it failed."""
    endpoint = serving(Guard(Tls(pki.cert, pki.key)))
    before = ask(endpoint, pki.trusting())[2]
    Path(pki.cert).write_text("nonsense")
    with caplog.at_level(logging.WARNING, "melodi_otel"):
        assert [ask(endpoint, pki.trusting())[2] for _ in range(2)] == [before, before]
    assert len(caplog.records) == 1
    assert f"MELODI_METRICS_TLS_CERT={pki.cert!r}" in caplog.text
    assert endpoint.reload() is False
    pki.renew()
    assert endpoint.reload() is True
    assert ask(endpoint, pki.trusting())[2] != before


def test_mutual_tls(serving: Serve, pki: Pki) -> None:
    """With a client CA only who has a certificate of it may read; whether the process lives is told to everybody."""
    endpoint = serving(Guard(Tls(pki.cert, pki.key, pki.cafile)))
    assert ask(endpoint, pki.client())[0] == 200
    assert ask(endpoint, pki.trusting())[0] == 403
    assert ask(endpoint, pki.trusting(), "/livez")[0] == 200
    assert ask(endpoint, pki.trusting(), "/readyz")[0] == 200


def test_a_certificate_of_another_ca(serving: Serve, pki: Pki, tmp_path: Path) -> None:
    """A certificate that somebody else signed does not get through the handshake."""
    endpoint = serving(Guard(Tls(pki.cert, pki.key, pki.cafile)))
    stranger = pki.trusting()
    trustme.CA().issue_cert("scraper@example").configure_cert(stranger)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        ask(endpoint, stranger)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"cert": "absent"}, "MELODI_METRICS_TLS_CERT='{}/absent' cannot be used: No such file or directory"),
        ({"key": "absent"}, "MELODI_METRICS_TLS_KEY='{}/absent' cannot be used: No such file or directory"),
        ({"key": "ca.pem"}, "MELODI_METRICS_TLS_KEY='{}/ca.pem' cannot be used: there is no private key in it"),
        ({"key": None}, "MELODI_METRICS_TLS_CERT='{}/tls.crt' cannot be used: there is no private key in it"),
        ({"key": "locked"}, "MELODI_METRICS_TLS_KEY='{}/locked' cannot be used: the key has a passphrase"),
        ({"key": "other"}, "cannot be used: the key is not the certificate's"),
        ({"client_ca": "tls.key"}, "MELODI_METRICS_TLS_CLIENT_CA='{}/tls.key' cannot be used: there is no certificate"),
        ({"client_ca": "absent"}, "MELODI_METRICS_TLS_CLIENT_CA='{}/absent' cannot be used: No such file"),
    ],
)
def test_bad_files(pki: Pki, broken: dict[str, str | None], message: str) -> None:
    """A file that cannot be used is an error with the variable, the file and what is wrong; nobody is asked for a passphrase."""
    (pki.folder / "locked").write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    trustme.CA().issue_cert("x").private_key_pem.write_to_path(str(pki.folder / "other"))
    files = {
        "cert": pki.cert,
        "key": pki.key,
        **{name: file and str(pki.folder / file) for name, file in broken.items()},
    }
    with pytest.raises(ConfigError) as caught:
        Tls(**files)
    assert message.format(pki.folder) in str(caught.value)


@pytest.mark.parametrize("name", ["key", "client_ca"])
def test_a_part_without_the_certificate(name: str) -> None:
    """A key or a client CA alone would protect nothing: that is an error, not a plain endpoint."""
    with pytest.raises(ConfigError, match=f"MELODI_METRICS_TLS_{name.upper()}='x' cannot be used without"):
        guard_of(Config(**{f"metrics_tls_{name}": "x"}))


def test_the_guard_of_a_configuration(pki: Pki, users: Path) -> None:
    """Nothing set guards nothing; everything set is https, client certificates and users."""
    assert guard_of(Config()) == Guard(None, None)
    config = Config.from_env(
        {
            "MELODI_METRICS_TLS_CERT": pki.cert,
            "MELODI_METRICS_TLS_KEY": pki.key,
            "MELODI_METRICS_TLS_CLIENT_CA": pki.cafile,
            "MELODI_METRICS_USERS": str(users),
        }
    )
    guard = guard_of(config)
    assert guard.tls is not None
    assert guard.tls.mutual
    assert guard.passwords is not None


# --- users -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (basic("ann", "right"), 200),
        (basic("ann", "wrong"), 401),
        (basic("bob", "right"), 401),
        (basic("ann", "right" * 1000), 401),
        ({}, 401),
        ({"Authorization": "Bearer right"}, 401),
        ({"Authorization": "Basic !!!"}, 401),
    ],
)
def test_users(serving: Serve, users: Path, headers: dict[str, str], status: int) -> None:
    """Only a user of the file with the right password reads; everybody else is told how to say who they are."""
    endpoint = serving(Guard(None, Passwords(str(users))))
    got, answered, _ = ask(endpoint, None, "/", **headers)
    assert got == status
    assert answered.get("WWW-Authenticate") == (None if status == 200 else 'Basic realm="melodi_otel", charset="UTF-8"')


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_passwords_in_the_clear(users: Path, caplog: pytest.LogCaptureFixture, host: str, warned: bool) -> None:
    """Passwords without https are warned about where they leave this machine."""
    with caplog.at_level(logging.WARNING, "melodi_otel"):
        serve(f"{host}:0", CollectorRegistry(), guard=Guard(None, Passwords(str(users)))).close()
    assert ("they travel in the clear" in caplog.text) is warned


def test_no_password_for_probes(serving: Serve, users: Path) -> None:
    """Whether it lives and is ready needs no password."""
    endpoint = serving(Guard(None, Passwords(str(users))))
    assert [ask(endpoint, None, path)[0] for path in ("/livez", "/readyz", "/nothing")] == [200, 200, 401]


@pytest.mark.parametrize("method", ["scrypt", "pbkdf2:sha256:1000"])
def test_hashes_that_werkzeug_makes(tmp_path: Path, method: str) -> None:
    """What the documented command makes is a line that is understood."""
    file = tmp_path / "users"
    file.write_text("ann:" + security.generate_password_hash("right", method=method))
    check = Passwords(str(file))
    assert [check(basic("ann", word)["Authorization"]) for word in ("right", "wrong")] == ["yes", "no"]


class Slow:
    """A hash that counts how often it is computed; time by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.checked: list[tuple[str, str]] = []
        self.users = _Users({"ann": "h-ann"}, self, lambda: self.now)

    def __call__(self, hashed: str, password: str) -> bool:
        self.checked.append((hashed, password))
        return hashed == "h-ann" and password == "right"


def test_a_password_is_hashed_once() -> None:
    """A scraper costs one hash, whether its password is right or wrong."""
    slow = Slow()
    assert [slow.users.check("ann", "right") for _ in range(100)] == ["yes"] * 100
    assert [slow.users.check("ann", "wrong") for _ in range(100)] == ["no"] * 100
    assert len(slow.checked) == 2


def test_a_name_that_is_not_there_costs_a_hash_too() -> None:
    """How long an answer takes does not tell whether the name exists; the right password of another opens nothing."""
    slow = Slow()
    assert slow.users.check("bob", "right") == "no"
    assert slow.checked == [("h-ann", "right")]


def test_guessing_is_rationed() -> None:
    """Ten wrong passwords at once, then one a second; who is known already is let in throughout."""
    slow = Slow()
    slow.users.check("ann", "right")
    answers = [slow.users.check("ann", f"guess {n}") for n in range(12)]
    assert answers == ["no"] * 10 + ["later"] * 2
    assert slow.users.check("ann", "right") == "yes"
    slow.now += 1.0
    assert [slow.users.check("ann", f"more {n}") for n in range(2)] == ["no", "later"]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong passwords are forgotten before a right one is."""
    monkeypatch.setattr(passwords, "_REMEMBERED", 3)
    slow = Slow()
    slow.users.check("ann", "right")
    for n in range(8):
        slow.users.check("ann", f"guess {n}")
    assert len(slow.users._known) == 3
    slow.checked.clear()
    assert slow.users.check("ann", "right") == "yes"
    assert slow.checked == []


def test_nothing_kept_is_a_password() -> None:
    """What is remembered is no password, nor its plain hash."""
    slow = Slow()
    slow.users.check("ann", "right")
    assert all(len(digest) == 32 and b"right" not in digest for digest in slow.users._known)
    assert set(slow.users._known) != set(Slow().users._known)


def test_changed_users(serving: Serve, users: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A changed file is in force at the next request, also for who was let in before; a bad one leaves the old."""
    endpoint = serving(Guard(None, Passwords(str(users))))
    assert ask(endpoint, None, **basic("ann", "right"))[0] == 200
    users.write_text(f"ann:{hashed('new')}\n")
    assert ask(endpoint, None, **basic("ann", "right"))[0] == 401
    assert ask(endpoint, None, **basic("ann", "new"))[0] == 200
    users.write_text("ann:new\n")
    with caplog.at_level(logging.WARNING, "melodi_otel"):
        assert ask(endpoint, None, **basic("ann", "new"))[0] == 200
    assert "line 1" in caplog.text
    users.unlink()
    assert ask(endpoint, None, **basic("ann", "new"))[0] == 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ann\n", "line 1 is no USER:HASH"),
        ("# x\n:hash\n", "line 2 is no USER:HASH"),
        ("ann:hunter2\n", "line 1: what follows ann: is no scrypt or pbkdf2 hash"),
        ("ann:$2y$10$abcdefghijklmnopqrstuv\n", "line 1: what follows ann: is no scrypt or pbkdf2 hash"),
        ("ann:pbkdf2:sha256:1$s$ab\nann:pbkdf2:sha256:1$s$ab\n", "line 2 names ann a second time"),
        ("\n# nobody\n", "nobody is in it"),
        ("ann:\xff\n", "it is no UTF-8 text"),
    ],
    ids=["no hash", "no user", "a password", "another hash", "twice", "nobody", "no text"],
)
def test_bad_users(tmp_path: Path, text: str, message: str) -> None:
    """A bad file is an error with file, line, what is wrong and how to make a line; what stands there is not shown."""
    file = tmp_path / "users"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        Passwords(str(file))
    said = str(caught.value)
    assert said.startswith(f"MELODI_METRICS_USERS={str(file)!r} cannot be used: {message}")
    assert "werkzeug.security" in said
    assert "hunter2" not in said


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """A missing file of users is an error, not an open door."""
    with pytest.raises(ConfigError, match="No such file or directory"):
        Passwords(str(tmp_path / "users"))


def test_without_the_package(users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without werkzeug the error is the pip line."""

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(passwords, "import_module", absent)
    with pytest.raises(MissingDependency, match=r'pip install "melodi-otel\[web\]"'):
        Passwords(str(users))


def test_a_program_that_goes_elsewhere(pki: Pki, users: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names stay those of the start, so that a renewed file is found after the program changed its directory."""
    monkeypatch.chdir(pki.folder)
    guard = Guard(Tls("tls.crt", "tls.key", "ca.pem"), Passwords("users"))
    monkeypatch.chdir("/")
    assert guard.reload() is True
