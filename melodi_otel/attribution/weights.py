"""How much work a row of a step was, relative to the others.

Weights give only *shares*; the joules are always the measured ones. :class:`Roofline` needs no measurement: it counts the
bytes and the arithmetic that a row makes the device move, in bytes-equivalents (1 byte = ``flops_per_byte`` FLOP). A fitted
model takes its place through the same :class:`CostModel` protocol, per engine and device.

Source of the form: per step, fixed + decode sequences + computed prefill tokens + cache read + attention products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

ASSUMED_PARAMETERS: Final = 8e9
ASSUMED_KV_BYTES: Final = 131_072.0
ASSUMED_FLOPS_PER_BYTE: Final = 250.0
BYTES_PER_PARAMETER: Final = 2.0
"""Half precision, the commonest format of weights; only ratios of weights matter."""


class Theta(NamedTuple):
    """Coefficients of a step's cost, in any one unit.

    ``fixed`` per decode-only step, ``fixed_prefill`` per step that contains prefill, ``decode`` per decode token,
    ``prefill`` per computed prompt token, ``cache`` per token of context read, ``attention`` per query-context product.
    """

    fixed: float
    decode: float
    prefill: float
    cache: float
    attention: float
    fixed_prefill: float


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the weights may know of an engine; None = unknown, then 8e9 parameters, 131,072 cache bytes per token and 250
    FLOP per byte are assumed (the trace format's defaults).
    """

    parameters: float | None = None
    active_parameters: float | None = None
    kv_bytes_per_token: float | None = None
    layers: int | None = None
    hidden: int | None = None
    experts: int | None = None
    experts_per_token: int | None = None
    flops_per_byte: float | None = None


class CostModel(Protocol):
    """Where the coefficients come from."""

    def theta(self, facts: EngineFacts) -> Theta:
        """Coefficients for steps of an engine."""
        ...


class Roofline:
    """Weights without a fit, from the size of the model and the balance of the device."""

    def theta(self, facts: EngineFacts) -> Theta:
        """Bytes-equivalents of each part of a step."""
        active = facts.active_parameters or facts.parameters or ASSUMED_PARAMETERS
        balance = facts.flops_per_byte or ASSUMED_FLOPS_PER_BYTE
        weight_bytes = BYTES_PER_PARAMETER * active
        per_token = 2.0 * active / balance
        attention = 4.0 * facts.layers * facts.hidden / balance if facts.layers and facts.hidden else 0.0
        cache = facts.kv_bytes_per_token or ASSUMED_KV_BYTES
        return Theta(weight_bytes, per_token, per_token, cache, attention, weight_bytes)


def prefill_weight(theta: Theta, tokens: float, context: float) -> float:
    """Own cost of ``tokens`` prompt tokens on top of ``context`` cached ones (the step's fixed cost is shared apart)."""
    return theta.prefill * tokens + theta.cache * context + theta.attention * tokens * (context + tokens / 2.0)


def decode_weight(theta: Theta, tokens: float, context: float) -> float:
    """Own cost of one decode row of ``tokens`` (1 + drafts) that reads ``context`` cached tokens."""
    return theta.decode * tokens + theta.cache * context
