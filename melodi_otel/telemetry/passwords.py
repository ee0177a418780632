"""Who may read the endpoint: a file of ``USER:HASH`` lines.

Hashes and the header are werkzeug's (``[web]``). A hash is slow on purpose, a scraper comes every second: what was checked once
is remembered by a keyed digest, good or bad, until the file changes. Checks that are not remembered are made one at a time
and rationed, so that guessing costs this machine less than a core.
"""

from __future__ import annotations

import hmac
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal

from melodi_otel.errors import ConfigError, MissingDependency
from melodi_otel.telemetry.reloading import Reloading

USERS = "MELODI_METRICS_USERS"
PIP: Final = 'pip install "melodi-otel[web]"'
MAKE: Final = (
    "python -c 'import getpass, werkzeug.security as w; print(\"NAME:\" + w.generate_password_hash(getpass.getpass()))'"
)
"""The command that makes a line of the file."""

Answer = Literal["yes", "no", "later"]

_HASH: Final = re.compile(r"(scrypt(:\d+){3}|pbkdf2:(sha1|sha256|sha512)(:\d+)?)\$[^$\s]+\$[0-9a-f]+")
_REMEMBERED: Final = 1000
_BURST: Final = 10.0
_PER_S: Final = 1.0
_HEADER_LIMIT: Final = 1024
"""Bytes of an Authorization header that are looked at: a long password is work for the hash."""


class Passwords:
    """Users and their passwords.

    Args:
        file: the file.
        monotonic_s: a clock in seconds, for the ration of checks.

    Raises:
        MissingDependency: werkzeug is not installed; the message is the pip line.
        ConfigError: the file cannot be used; the message names it, the line, what is wrong and what is allowed.
    """

    def __init__(self, file: str, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        try:
            parse: Any = import_module("werkzeug.datastructures").Authorization.from_header
            verify: Any = import_module("werkzeug.security").check_password_hash
        except ImportError:
            raise MissingDependency(f"{USERS} needs werkzeug: {PIP}") from None
        self._parse = parse
        file = str(Path(file).absolute())  # the host program may change its directory; the file is read again later
        self._users = Reloading([file], lambda: _Users(_read(file), verify, monotonic_s))

    def __call__(self, header: str | None) -> Answer:
        """Whether the sender of an ``Authorization`` header may read; ``later``: too many wrong ones came just now."""
        if header is None or len(header) > _HEADER_LIMIT:
            return "no"
        sent = self._parse(header)
        if sent is None or sent.type != "basic" or sent.username is None or sent.password is None:
            return "no"
        return self._users.current().check(str(sent.username), str(sent.password))

    def reload(self) -> bool:
        """Read the file now; False: it cannot be used, a warning says why, the old users stay."""
        return self._users.reload()

    def forked(self) -> None:
        """In a child: a thread that is not there may hold a lock."""
        self._users.forked()
        self._users.value.forked()


class _Users:
    """The users of one state of the file, and what is remembered of them."""

    def __init__(
        self, hashes: dict[str, str], verify: Callable[[str, str], bool], monotonic_s: Callable[[], float]
    ) -> None:
        self._hashes = hashes
        self._verify = verify
        self._monotonic_s = monotonic_s
        self._key = secrets.token_bytes(32)
        # A name that is not there costs what a wrong password costs.
        self._nobody = next(iter(hashes.values()))
        self._known: OrderedDict[bytes, bool] = OrderedDict()
        self._checking = threading.Lock()
        self._ration, self._since = _BURST, monotonic_s()

    def forked(self) -> None:
        self._checking = threading.Lock()

    def check(self, user: str, password: str) -> Answer:
        """Whether this is a user and that user's password."""
        digest = hmac.digest(self._key, f"{user}\0{password}".encode("utf-8", "replace"), "sha256")
        # The digest is not the sender's to choose, so that looking it up tells nothing about what is in the table.
        known = self._known.get(digest)
        if known is None:
            with self._checking:
                known = self._known.get(digest)
                if known is None:
                    if not self._may():
                        return "later"
                    known = self._verify(self._hashes.get(user, self._nobody), password) and user in self._hashes
                    self._remember(digest, known)
        return "yes" if known else "no"

    def _may(self) -> bool:
        now = self._monotonic_s()
        self._ration = min(_BURST, self._ration + (now - self._since) * _PER_S)
        self._since = now
        if self._ration < 1.0:
            return False
        self._ration -= 1.0
        return True

    def _remember(self, digest: bytes, good: bool) -> None:
        self._known[digest] = good
        if good:
            self._ration = min(_BURST, self._ration + 1.0)
        while len(self._known) > _REMEMBERED:
            # Wrong ones go first: guessing does not make a scraper's password slow again.
            wrong = next((key for key, known in self._known.items() if not known), None)
            self._known.pop(wrong) if wrong is not None else self._known.popitem(last=False)


def _read(file: str) -> dict[str, str]:
    allowed = f"allowed are lines USER:HASH, made by: {MAKE}"
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigError(f"{USERS}={file!r} cannot be used: {why}; {allowed}") from None
    found: dict[str, str] = {}
    for number, raw in enumerate(lines, 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        # The line itself is not shown: somebody may have written a password there.
        user, colon, hashed = line.partition(":")
        where = f"{USERS}={file!r} cannot be used: line {number}"
        if not colon or not user:
            raise ConfigError(f"{where} is no USER:HASH; {allowed}")
        if not _HASH.fullmatch(hashed):
            raise ConfigError(f"{where}: what follows {user}: is no scrypt or pbkdf2 hash of werkzeug; {allowed}")
        if user in found:
            raise ConfigError(f"{where} names {user} a second time; {allowed}")
        found[user] = hashed
    if not found:
        raise ConfigError(f"{USERS}={file!r} cannot be used: nobody is in it; {allowed}")
    return found
