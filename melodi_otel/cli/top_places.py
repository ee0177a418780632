"""Where a meter of this machine may be asked for its status, and how to ask it by HTTP."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit

from melodi_otel.errors import MelodiError
from melodi_otel.hub.asking import read_status
from melodi_otel.hub.places import AGENT_SOCKET, NoPlace, runtime_directory, shared_socket
from melodi_otel.hub.sockets import ConnectRefused
from melodi_otel.hub.wire import WireError

TIMEOUT_S: Final = 3.0
DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORTS: Final = range(9464, 9474)
_LARGEST: Final = 16 * 1024 * 1024
_ANY: Final = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104 - where to ask who listens everywhere


class NoStatus(MelodiError):
    """A place was asked and gave no status; ``absent``: nothing is there at all."""

    def __init__(self, message: str, *, absent: bool = False) -> None:
        super().__init__(message)
        self.absent = absent


@dataclass(frozen=True, slots=True)
class Place:
    """Where a status may be had: what a person calls it, and how to read it (raises :class:`NoStatus` or OSError)."""

    name: str
    read: Callable[[], Mapping[str, Any]]


Finder = Callable[[Mapping[str, str]], Iterable[Place]]
"""Places to try, by the environment, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Access:
    """How to be let in: user and password; ``cafile``: CAs to trust instead of the system's; ``cert``: our own, with its key."""

    user: str | None = None
    password: str | None = None
    cafile: str | None = None
    cert: str | None = None

    def context(self) -> ssl.SSLContext:
        """For https.

        Raises:
            NoStatus: a file cannot be used.
        """
        try:
            context = ssl.create_default_context(cafile=self.cafile)
        except OSError as error:
            raise NoStatus(f"--cafile {self.cafile} cannot be used: {error}") from None
        if self.cert is not None:
            try:
                context.load_cert_chain(self.cert)
            except OSError as error:
                raise NoStatus(
                    f"--cert {self.cert} cannot be used: {error}; it must hold certificate and key"
                ) from None
        return context

    def headers(self) -> dict[str, str]:
        """For every request."""
        found = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self.user is not None:
            both = base64.b64encode(f"{self.user}:{self.password or ''}".encode()).decode()
            found["Authorization"] = f"Basic {both}"
        return found


def by_http(url: str, access: Access | None = None) -> Place:
    """The endpoint at ``url``: its root, or any page of it.

    Raises:
        NoStatus: it is no http or https URL.
    """
    access = access or Access()
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port
    except ValueError:
        port = None
    else:
        port = port or (443 if parts.scheme == "https" else DEFAULT_PORTS[0])
    if parts.scheme not in ("http", "https") or not parts.hostname or port is None:
        raise NoStatus(f"{url!r} is no URL of a meter: it looks like http://127.0.0.1:9464 or https://HOST:PORT")
    if parts.username is not None:
        raise NoStatus(
            "a user in a URL is seen by everybody who lists processes: use --user NAME, which asks for the password"
        )
    host, secure = parts.hostname, parts.scheme == "https"
    folder = parts.path.rpartition("/")[0]  # behind a proxy the pages may stand below a path
    name = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}{folder}"
    return Place(name, lambda: _read(host, port, f"{folder}/status.json", access, secure=secure))


def hub_places(environ: Mapping[str, str]) -> list[Place]:
    """The sockets of the hubs that a program with this environment may use, the likeliest first."""
    setting = environ.get("MELODI_HUB", "").strip() or "auto"
    if setting == "local" or not hasattr(socket, "AF_UNIX"):
        return []
    if setting.startswith("/"):
        return [_hub_place(Path(setting))]
    found = [_hub_place(AGENT_SOCKET)] if setting == "auto" else []
    try:
        return [*found, _hub_place(shared_socket(runtime_directory(environ)))]
    except NoPlace:
        return found


def _hub_place(path: Path) -> Place:
    def read() -> Mapping[str, Any]:
        try:
            return read_status(path, TIMEOUT_S)
        except ConnectRefused as error:
            absent = error.refusal.state in ("absent", "stale")
            raise NoStatus(str(error), absent=absent) from None
        except WireError as error:
            raise NoStatus(str(error)) from None

    return Place(str(path), read)


def http_places(environ: Mapping[str, str], access: Access | None = None) -> list[Place]:
    """Where this environment says that metrics are served, else the default ports of this machine."""
    scheme = "https" if environ.get("MELODI_METRICS_TLS_CERT", "").strip() else "http"
    address = environ.get("MELODI_METRICS_ADDR", "").strip()
    if address.lower() == "off":
        return []
    if address:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        host = _ANY.get(host, host)
        return [by_http(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/", access)]
    return [by_http(f"{scheme}://{DEFAULT_HOST}:{port}/", access) for port in DEFAULT_PORTS]


def first(places: Sequence[Place]) -> tuple[Place, Mapping[str, Any]]:
    """The first place that gives a status, and that status.

    Raises:
        NoStatus: none does; the message says where was looked, what each said, and what to start.
    """
    silent: list[str] = []
    said: list[str] = []
    for place in places:
        try:
            return place, place.read()
        except NoStatus as error:
            silent += [place.name] if error.absent else []
            said += [] if error.absent else [f"{place.name}: {error}"]
        except OSError as error:
            said.append(f"{place.name}: {error.strerror or error}")
    lines = ["no meter tells its status here."]
    lines += [f"  {line}" for line in said]
    if silent:
        lines.append(f"  nothing answers at {_span(silent)}")
    if not places:
        lines.append("  there is no place to ask: MELODI_METRICS_ADDR=off")
    lines.append("Start one: MELODI_METRICS_ADDR=127.0.0.1:9464 melodi-otel run -- python your_program.py")
    lines.append("or name it: melodi-otel top --url http://HOST:PORT")
    raise NoStatus("\n".join(lines))


def _span(names: Sequence[str]) -> str:
    paths, pages = [n for n in names if n.startswith("/")], [n for n in names if not n.startswith("/")]
    if len(pages) > 1:
        pages = [f"{pages[0]} … {pages[-1].rpartition(':')[2]} ({len(pages)} places)"]
    return ", ".join([*paths, *pages])


def _read(host: str, port: int, path: str, access: Access, *, secure: bool) -> Mapping[str, Any]:
    if secure:
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=access.context())
    else:
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path, headers=access.headers())
        answer = connection.getresponse()
        body = answer.read(_LARGEST)
    except ssl.SSLCertVerificationError as error:
        raise NoStatus(f"its certificate is not trusted ({error.verify_message}); --cafile FILE names its CA") from None
    except ssl.SSLError as error:
        raise NoStatus(f"TLS failed ({str(error.reason or error).replace('_', ' ').lower()})") from None
    except ConnectionRefusedError:
        raise NoStatus("nothing answers", absent=True) from None
    except (OSError, http.client.HTTPException) as error:
        raise NoStatus(f"it does not answer ({str(error) or type(error).__name__})") from None
    finally:
        connection.close()
    return _status(answer.status, body)


_REFUSALS: Final = {
    401: "it asks for a user and a password: --user NAME",
    403: "it asks for a client certificate: --cert FILE",
    404: "it has no status.json: it is no meter, or one without a status page",
    429: "it has just seen too many wrong passwords; try again in a moment",
}


def _status(code: int, body: bytes) -> Mapping[str, Any]:
    if code != 200:
        line = body.decode("utf-8", "replace").strip().partition("\n")[0][:200]
        raise NoStatus(_REFUSALS.get(code) or f"it answers {code}: {line}")
    try:
        found: Any = json.loads(body)
    except ValueError:
        raise NoStatus("what it answers is no JSON") from None
    if not isinstance(found, dict) or "schema" not in found:
        raise NoStatus("what it answers is no status of a meter")
    return cast("dict[str, Any]", found)
