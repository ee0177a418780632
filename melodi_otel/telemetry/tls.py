"""HTTPS for the scrape endpoint: the standard library's TLS, 1.2 or newer, with certificates that may be renewed at any time."""

from __future__ import annotations

import ssl
from pathlib import Path

from melodi_otel.errors import ConfigError
from melodi_otel.telemetry.reloading import Reloading

CERT = "MELODI_METRICS_TLS_CERT"
KEY = "MELODI_METRICS_TLS_KEY"
CLIENT_CA = "MELODI_METRICS_TLS_CLIENT_CA"


class Tls:
    """The server's side of TLS.

    Args:
        cert: a PEM file with the certificate and, after it, those that lead to the CA.
        key: a PEM file with its private key; None: it is in ``cert``.
        client_ca: a PEM file of CAs; whose certificate it signed may read, see :attr:`mutual`. None: everybody may.

    Raises:
        ConfigError: a file cannot be used; the message names variable, file, what is wrong and what is allowed.
    """

    def __init__(self, cert: str, key: str | None = None, client_ca: str | None = None) -> None:
        self.mutual = client_ca is not None
        # The host program may change its directory; the files are read again later.
        cert = str(Path(cert).absolute())
        key, client_ca = (None if file is None else str(Path(file).absolute()) for file in (key, client_ca))
        files = [file for file in (cert, key, client_ca) if file is not None]
        self._contexts = Reloading(files, lambda: _context(cert, key, client_ca))

    def context(self) -> ssl.SSLContext:
        """The context for the next handshake."""
        return self._contexts.current()

    def reload(self) -> bool:
        """Read the files now; False: they cannot be used, a warning says why, the old ones stay."""
        return self._contexts.reload()

    def forked(self) -> None:
        """In a child."""
        self._contexts.forked()


def _context(cert: str, key: str | None, client_ca: str | None) -> ssl.SSLContext:
    _text(CERT, cert, "a PEM file that begins with a certificate")
    text = _text(KEY if key else CERT, key or cert, "a PEM file with a private key")
    where = f"{KEY}={key!r}" if key else f"{CERT}={cert!r}"
    if "ENCRYPTED" in text:  # OpenSSL would ask for the passphrase on the terminal of the host program
        raise ConfigError(f"{where} cannot be used: the key has a passphrase; allowed is a key without one")
    if "PRIVATE KEY-----" not in text:
        raise ConfigError(
            f"{where} cannot be used: there is no private key in it; allowed is a PEM file with a private key"
            + ("" if key else f", here or in a file of its own that {KEY} names")
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key)
    except ssl.SSLError as error:
        why = "the key is not the certificate's" if error.reason == "KEY_VALUES_MISMATCH" else _reason(error)
        raise ConfigError(
            f"{CERT}={cert!r}{f' with {KEY}={key!r}' if key else ''} cannot be used: {why}; allowed are PEM files with a "
            "certificate and its private key"
        ) from None
    except OSError as error:
        raise ConfigError(f"{CERT}={cert!r} cannot be used: {error.strerror or error}") from None
    if client_ca is not None:
        _text(CLIENT_CA, client_ca, "a PEM file of CA certificates")
        try:
            context.load_verify_locations(client_ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"{CLIENT_CA}={client_ca!r} cannot be used: {_reason(error)}; allowed is a PEM file of CA certificates"
            ) from None
        # Optional in the handshake, asked for by path: a probe of /livez has no certificate.
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _text(variable: str, file: str, allowed: str) -> str:
    try:
        return Path(file).read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise ConfigError(
            f"{variable}={file!r} cannot be used: {error.strerror or error}; allowed is {allowed}"
        ) from None


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    words = {"NO_CERTIFICATE_OR_CRL_FOUND": "there is no certificate in it", None: str(error)}
    return words.get(reason, f"OpenSSL says {str(reason).replace('_', ' ').lower()}")
