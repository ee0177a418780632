"""Budgets out of what was: J per 1,000 output tokens of each model in the last week, as a Prometheus knows it."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from melodi_otel.deploy import promql as q
from melodi_otel.errors import DeployError

MARGIN: Final = 1.1
"""A budget that last week's dearest hours just keep would be left by every chance: so much above them."""
SHARE: Final = 0.95
"""Of the hours that a budget is to hold."""
_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Proposal:
    """A budget for one model.

    Attributes:
        model: its name, as requests have it.
        usual: J per 1,000 output tokens, the median of the hours.
        dear: the same, of the hour that 95 % of them do not exceed.
        hours: how many hours had requests.
    """

    model: str
    usual: float
    dear: float
    hours: int

    @property
    def budget(self) -> float:
        """J per 1,000 output tokens: :data:`MARGIN` above ``dear``, to two significant digits, upward."""
        target = MARGIN * self.dear
        unit = 10.0 ** (math.floor(math.log10(target)) - 1)
        return round(math.ceil(target / unit - 1e-9) * unit, 12)


def proposals(url: str, past: str = "7d", step: str = "1h") -> list[Proposal]:
    """What a Prometheus at ``url`` has seen in the ``past``, cut into pieces of ``step``; models by name.

    Raises:
        DeployError: it cannot be reached, refuses, or knows no request with joules and tokens.
    """
    hourly = q.per_ktok(step, q.MODEL)
    found = {
        name: _ask(url, f"{function}({more}({hourly})[{past}:{step}])")
        for name, function, more in (
            ("usual", "quantile_over_time", "0.5, "),
            ("dear", "quantile_over_time", f"{SHARE}, "),
            ("hours", "count_over_time", ""),
        )
    }
    made = [
        Proposal(model, usual, found["dear"][model], round(found["hours"].get(model, 0)))
        for model, usual in sorted(found["usual"].items())
        if found["dear"].get(model, 0.0) > 0.0
    ]
    if not made:
        raise DeployError(
            f"{url} knows no request with joules and tokens in the last {past}: is it the Prometheus that scrapes the meters?"
        )
    return made


def variable(made: Sequence[Proposal]) -> str:
    """``MELODI_ENERGY_BUDGET=…``, as the meters want it."""
    return "MELODI_ENERGY_BUDGET=" + ",".join(f"{one.model}={one.budget:.12g}" for one in made)


def _ask(url: str, expression: str) -> Mapping[str, float]:
    address = f"{url.rstrip('/')}/api/v1/query"
    if not address.startswith(("http://", "https://")):
        raise DeployError(f"--budgets-from {url}: allowed is the address of a Prometheus, http://HOST:9090")
    body = urllib.parse.urlencode({"query": expression}).encode()
    try:
        with urllib.request.urlopen(address, body, timeout=_TIMEOUT_S) as answer:  # noqa: S310  # http(s), see above
            said = json.load(answer)
    except urllib.error.HTTPError as error:
        raise DeployError(f"{address} refuses: {error.code} {error.read(300).decode(errors='replace')}") from error
    except (OSError, ValueError) as error:
        raise DeployError(f"{address} cannot be asked: {error}") from error
    try:
        results: list[dict[str, Any]] = said["data"]["result"]
        values = {str(one["metric"].get(q.MODEL, "")): float(one["value"][1]) for one in results}
    except (KeyError, TypeError, ValueError) as error:
        raise DeployError(f"{address} answers what no Prometheus does: {str(said)[:200]}") from error
    return {model: value for model, value in values.items() if model and math.isfinite(value)}
