"""Who may read the scrape endpoint, as ``MELODI_METRICS_TLS_*`` and ``MELODI_METRICS_USERS`` say."""

from __future__ import annotations

from dataclasses import dataclass

from melodi_otel.config import Config
from melodi_otel.errors import ConfigError
from melodi_otel.telemetry import tls as names
from melodi_otel.telemetry.passwords import Passwords
from melodi_otel.telemetry.tls import Tls


@dataclass(frozen=True, slots=True)
class Guard:
    """What stands before the pages; None: nothing of that kind."""

    tls: Tls | None = None
    passwords: Passwords | None = None

    def reload(self) -> bool:
        """Read certificates and users again, e.g. on SIGHUP; False: something cannot be used, and a warning said what."""
        parts = [part.reload() for part in (self.tls, self.passwords) if part is not None]
        return all(parts)

    def forked(self) -> None:
        """In a child."""
        for part in (self.tls, self.passwords):
            if part is not None:
                part.forked()


def guard_of(config: Config) -> Guard:
    """The guard that ``config`` asks for.

    Raises:
        ConfigError: a file cannot be used, or a variable is set without the one that it needs.
        MissingDependency: users are named, and the package that checks their passwords is not installed.
    """
    tls = None
    if config.metrics_tls_cert is not None:
        tls = Tls(config.metrics_tls_cert, config.metrics_tls_key, config.metrics_tls_client_ca)
    else:
        for name, value in ((names.KEY, config.metrics_tls_key), (names.CLIENT_CA, config.metrics_tls_client_ca)):
            if value is not None:
                raise ConfigError(
                    f"{name}={value!r} cannot be used without {names.CERT}: set that to a PEM file as well"
                )
    passwords = None if config.metrics_users is None else Passwords(config.metrics_users)
    return Guard(tls, passwords)
