"""The settings of a hub that lives for months: a file of variables, and which of them may change while it runs.

The environment of a process never changes, so what a reload shall see stands in a file. Its lines are those of a systemd
``EnvironmentFile``: ``NAME=value``, value in quotes if it likes, ``#`` before a comment. The file wins over the environment; a
line that is taken out gives the environment its word again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from melodi_otel.config import VARIABLES, Config
from melodi_otel.errors import ConfigError

RELOADABLE: Final = frozenset(
    {
        "idle_watts",
        "carbon_intensity",
        "carbon_regions",
        "carbon_region",
        "pue",
        "energy_price",
        "energy_budget",
        "label_limit",
    }
)
"""Fields of :class:`~melodi_otel.config.Config` that a running hub takes over."""

_LINE: Final = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*?)\s*")


@dataclass(frozen=True, slots=True)
class Change:
    """What another reading of the settings means for a running hub.

    Attributes:
        config: the configuration in force from now on: the old one with the new values of what may change.
        now: names of the variables that change now.
        restart: names of the variables that need a restart; values are not told, one may be a secret.
    """

    config: Config
    now: tuple[str, ...]
    restart: tuple[str, ...]


def read_variables(path: Path) -> dict[str, str]:
    """The variables of a file.

    Raises:
        ConfigError: it cannot be read, or a line is no ``NAME=value``; the message names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--env-file {path} cannot be read: {why}") from None
    found: dict[str, str] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line[0] in "#;":
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ConfigError(f"{path}, line {number} cannot be used: allowed is NAME=value, a # comment or nothing")
        name, value = match.groups()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        found[name] = value
    return found


def compare(old: Config, new: Config, before: Mapping[str, str], after: Mapping[str, str]) -> Change:
    """What becomes of new settings.

    Args:
        old: in force.
        new: as read now.
        before, after: the environments they were read from; ``OTEL_*`` variables in them are the exporters', who read
            them once.
    """
    changed = {
        variable.field: name
        for name, variable in VARIABLES.items()
        if getattr(old, variable.field) != getattr(new, variable.field)
    }
    now = {field: name for field, name in changed.items() if field in RELOADABLE}
    restart = {name for field, name in changed.items() if field not in RELOADABLE}
    restart |= {
        name
        for name in before.keys() | after.keys()
        if name.startswith("OTEL_") and before.get(name) != after.get(name)
    }
    values: dict[str, Any] = {field: getattr(new, field) for field in now}
    return Change(replace(old, **values), tuple(sorted(now.values())), tuple(sorted(restart)))
