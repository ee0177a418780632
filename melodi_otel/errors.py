"""What can go wrong, by what the caller can do about it.

::

    MelodiError
     ├─ ConfigError          a MELODI_* value cannot be used: correct it
     ├─ MissingDependency    an optional part is not installed: the message is the pip line
     ├─ SourceError          a meter
     │   ├─ Refused          it will not work here: reason + the fix (permissions, missing library, no device)
     │   ├─ Transient        this reading failed, the next may work: the round is not committed
     │   └─ Gone             the device or its driver left: stop asking
     ├─ HubError             a hub's socket or privileges: reason + the fix
     │   └─ HubBusy          another process is the hub there
     ├─ TraceError           a trace file cannot be used: file, line, what was expected
     ├─ DeployError          files of a deployment could not be written, or a Prometheus could not be asked
     └─ DataSetError         a file of a data set cannot be used: file, line, column

None of these reaches the instrumented application from a telemetry path: they are raised at start-up, on the command
line and inside our own threads, where they become a log line, a named refusal or a reason on a span.
"""

from __future__ import annotations


class MelodiError(Exception):
    """Base of everything that melodi_otel raises on purpose."""


class ConfigError(MelodiError):
    """A configuration value is unusable; the message names variable, value and what is allowed."""


class MissingDependency(MelodiError, ImportError):
    """An optional package is absent; the message holds the pip line that installs it."""


class DeployError(MelodiError):
    """Files of a deployment could not be written, or a Prometheus could not be asked for budgets."""


class DataSetError(MelodiError):
    """A file of a data set cannot be used; the message names file, line and column."""


class SourceError(MelodiError):
    """A meter could not be used."""


class Refused(SourceError):
    """A meter will not work here.

    Args:
        reason: what is wrong, in one sentence.
        fix: what the user can do about it, with the exact command or variable; empty where nothing helps.
        state: a closed name for programs, e.g. ``permission_denied``, ``no_device``, ``library_missing``,
            ``library_too_old``, ``not_asked``, ``absent`` (this machine is not of the kind that has it: nothing to repair).
    """

    def __init__(self, reason: str, *, fix: str = "", state: str = "refused") -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix
        self.state = state


class Transient(SourceError):
    """A reading failed once; nothing of its round may be used, the next round covers the time."""


class Gone(SourceError):
    """A device or driver is lost for good; ``device`` names it, None means the whole source."""

    def __init__(self, message: str, device: str | None = None) -> None:
        super().__init__(message)
        self.device = device


class HubError(MelodiError):
    """A hub cannot be what it was asked to be, or cannot be reached.

    Args:
        reason: what is wrong and where, in one sentence.
        fix: what to do about it, with the exact command; empty where nothing helps.
        state: a closed name for programs, e.g. ``permission_denied``, ``foreign_owner``, ``bad_path``, ``threads``.
    """

    def __init__(self, reason: str, *, fix: str = "", state: str = "refused") -> None:
        super().__init__(f"{reason}; to repair: {fix}" if fix else reason)
        self.reason = reason
        self.fix = fix
        self.state = state


class HubBusy(HubError):
    """Another process is the hub there; ``pid`` is None where it cannot be seen."""

    def __init__(self, reason: str, *, fix: str = "", pid: int | None = None) -> None:
        super().__init__(reason, fix=fix, state="busy")
        self.pid = pid


class TraceError(MelodiError):
    """A trace file is unusable as a whole (a single broken line is counted and skipped instead)."""
