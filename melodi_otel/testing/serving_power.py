"""What a step of a simulated engine takes and draws, and who is answerable for it: not the form that is fitted to it.

A step's time is a smooth roofline of bytes and operations plus host time; its energy has a part per byte, per operation and
per second, and a power limit that trades time for power. Members of a step share its joules by their Shapley value in that
energy, which is sampled over orders of arrival where there are too many subsets to try them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

EXACT = 8
"""Members of a step up to which every subset is tried."""

_TURNS = 8
_BASES = 4


@dataclass(frozen=True, slots=True)
class Model:
    """A language model.

    Attributes:
        parameters, active_parameters: all of them, and those that one token passes through.
        kv_bytes_per_token: bytes of keys and values of one token of context.
        layers, hidden: its form.
        experts, experts_per_token: of a mixture; None: dense.
        shared_parameters: of a mixture, those outside the experts.
    """

    name: str
    parameters: float
    active_parameters: float
    kv_bytes_per_token: float
    layers: int
    hidden: int
    experts: int | None = None
    experts_per_token: int | None = None
    shared_parameters: float = 0.0

    def weight_bytes(self, tokens: Floats) -> Floats:
        """Bytes of weights that a step with so many tokens reads, two per parameter."""
        if self.experts is None or self.experts_per_token is None:
            return np.full_like(tokens, 2.0 * self.parameters)
        # Tokens of one text choose alike: they touch fewer experts than as many independent draws would.
        untouched = (1.0 - self.experts_per_token / self.experts) ** (tokens**0.94)
        return 2.0 * (self.shared_parameters + (self.parameters - self.shared_parameters) * (1.0 - untouched))


LLAMA_8B = Model("llama-8b", 8.03e9, 8.03e9, 131_072.0, 32, 4096)
LLAMA_3B = Model("llama-3b", 3.21e9, 3.21e9, 114_688.0, 28, 3072)
QWEN_30B_A3B = Model("qwen-30b-a3b", 30.5e9, 3.35e9, 98_304.0, 48, 2048, 128, 8, 1.6e9)


@dataclass(frozen=True, slots=True)
class Chip:
    """A GPU, about an H100: what it reaches, not what its data sheet says.

    Attributes:
        bytes_per_s, flops: memory bandwidth in byte/s, FLOP/s.
        joules_per_byte, joules_per_flop, active_watts: dynamic energy of a step.
        step_s, sequence_s: host time per step and per sequence in it.
        limit_watts: dynamic power it may draw.
        link_s: seconds per layer that devices which share a model spend on each other.
    """

    bytes_per_s: float = 2.7e12
    flops: float = 6.1e14
    joules_per_byte: float = 1.22e-10
    joules_per_flop: float = 6.6e-13
    active_watts: float = 82.0
    step_s: float = 1.05e-3
    sequence_s: float = 3.0e-5
    limit_watts: float = 570.0
    link_s: float = 2.2e-5

    def cost(self, model: Model, sums: Floats, split: int) -> tuple[Floats, Floats]:
        """Seconds and dynamic J (of one device of ``split``) of steps with these sums.

        Args:
            model: what is computed.
            sums: shape (4, ...): sequences, tokens computed, tokens of context read, and tokens times context.
            split: devices that share each step evenly.
        """
        sequences, tokens, context, products = sums
        read = (model.weight_bytes(tokens) + model.kv_bytes_per_token * (context + tokens)) / split
        flops = (2.0 * model.active_parameters * tokens + 4.0 * model.layers * model.hidden * products) / split
        memory, compute = (read / self.bytes_per_s) ** 2, (flops / self.flops) ** 2
        took = np.sqrt(np.sqrt(memory * memory + compute * compute))
        took = took + self.step_s + self.sequence_s * sequences + (model.layers * self.link_s if split > 1 else 0.0)
        joules = self.joules_per_byte * read + self.joules_per_flop * flops + self.active_watts * took
        # Above the limit the clock falls: power goes with the clock's square, so each pays with its root.
        above = joules / took / self.limit_watts
        above *= above
        above *= above
        above *= above
        root = np.sqrt(np.sqrt(np.sqrt(np.sqrt(1.0 + above))))
        return took * root, joules / root


def shapley(value: Callable[[Floats], Floats], rows: Floats, rng: np.random.Generator) -> Floats:
    """Every member's Shapley value in the game ``value``; they sum to the value of all members.

    Args:
        value: J of sets of members, given the sums of their rows, shape (k, ...); nobody costs nothing, whatever it says.
        rows: one column per member, shape (k, members).
        rng: for the orders, from :data:`EXACT` members on.
    """
    members = rows.shape[1]
    if members == 1:
        return value(rows)
    if members <= EXACT:
        masks, weights = _subsets(members)
        worth = value(rows @ masks)
        worth[0] = 0.0
        return weights @ worth
    # What is due as soon as anybody is there is exactly everybody's equal part; only the rest has to be sampled.
    fixed = float(value(np.zeros((rows.shape[0], 1)))[0])
    orders = _orders(members)
    names = rng.permutation(members)
    worth = value(np.cumsum(rows[:, names][:, orders], axis=-1))
    worth[:, 1:] -= worth[:, :-1].copy()
    worth[:, 0] -= fixed
    mean = np.bincount(orders.ravel(), worth.ravel(), members) / orders.shape[0]
    found = np.empty(members)
    found[names] = mean + fixed / members
    return found


@lru_cache
def _subsets(members: int) -> tuple[Floats, Floats]:
    """Who is in each subset, shape (members, 2^members), and each subset's weight for each member."""
    masks = (np.arange(1 << members)[None, :] >> np.arange(members)[:, None]) & 1
    others = masks.sum(axis=0)[None, :] - masks
    chance = np.array([1.0 / (members * comb(members - 1, size)) for size in range(members)])
    return masks.astype(np.float64), np.asarray(chance[others] * (2.0 * masks - 1.0), dtype=np.float64)


@lru_cache(maxsize=512)
def _orders(members: int) -> Ints:
    """64 orders in which every member stands about equally often in every part: turned, and read both ways."""
    rng = np.random.default_rng(members)
    bases = [rng.permutation(members) for _ in range(_BASES)]
    turned = [np.roll(base, turn * members // _TURNS) for base in bases for turn in range(_TURNS)]
    return np.array(turned + [order[::-1] for order in turned], dtype=np.int64)
