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


class Features(NamedTuple):
    """What a step, or some of its rows, did: the quantities that :class:`Theta` prices, in the same order.

    Attributes:
        fixed: steps without prefill (or parts of one).
        decode: decode tokens.
        prefill: computed prompt tokens.
        cache: tokens of context read.
        attention: query-context products of prompts.
        fixed_prefill: steps with prefill.
        coverage: part of the experts of a mixture that the steps touched, summed over steps.
    """

    fixed: float = 0.0
    decode: float = 0.0
    prefill: float = 0.0
    cache: float = 0.0
    attention: float = 0.0
    fixed_prefill: float = 0.0
    coverage: float = 0.0


class Theta(NamedTuple):
    """Coefficients of a step's cost, in any one unit, in the order of :class:`Features`.

    ``fixed`` per decode-only step, ``fixed_prefill`` per step that contains prefill, ``decode`` per decode token,
    ``prefill`` per computed prompt token, ``cache`` per token of context read, ``attention`` per query-context product,
    ``coverage`` for reading all experts of a mixture once.
    """

    fixed: float
    decode: float
    prefill: float
    cache: float
    attention: float
    fixed_prefill: float
    coverage: float = 0.0


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

    @property
    def routed(self) -> tuple[float, float] | None:
        """Of a mixture of experts: (the part of the experts that one token goes to, the part of all parameters that experts
        are); None: it is none, or its numbers are not known.
        """
        if not self.experts or not self.experts_per_token or self.experts_per_token >= self.experts:
            return None
        part = self.experts_per_token / self.experts
        if not self.parameters or not self.active_parameters or self.active_parameters >= self.parameters:
            return part, 1.0
        # active = dense + part x experts' parameters, and all = dense + experts' parameters
        return part, min(1.0, (1.0 - self.active_parameters / self.parameters) / (1.0 - part))

    @property
    def experts_unknown(self) -> bool:
        """Whether it is a mixture of experts of which it is not known how many there are and how many a token takes."""
        few = self.parameters and self.active_parameters and self.active_parameters < 0.9 * self.parameters
        return bool(few) and self.routed is None


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
        per_token = 2.0 * active / balance
        attention = 4.0 * facts.layers * facts.hidden / balance if facts.layers and facts.hidden else 0.0
        cache = facts.kv_bytes_per_token or ASSUMED_KV_BYTES
        routed = facts.routed
        # Of a mixture every step reads what is not an expert, and of the experts those that its tokens touch.
        dense = max(0.0, active - (facts.parameters or 0.0) * routed[1] * routed[0]) if routed else active
        experts = BYTES_PER_PARAMETER * (facts.parameters or 0.0) * routed[1] if routed else 0.0
        weight_bytes = BYTES_PER_PARAMETER * dense
        return Theta(weight_bytes, per_token, per_token, cache, attention, weight_bytes, experts)


def touched(part: float, tokens: float) -> float:
    """Part of the experts that ``tokens`` touch when each goes to ``part`` of them by itself: ``1 - (1 - part)^tokens``."""
    return 1.0 - (1.0 - part) ** tokens
