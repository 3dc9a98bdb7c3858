"""What an iteration costs, in F per sample: forwards of the network, a backward counted as `BACKWARD` of them.

With K steps, N fake updates and k drawn from 1..K, one sample's rollout makes K - m steps, where m is
min(k_g, k_f - 1) over its updates, or k where all share one. Of independent indices P(m >= j) = (K - j + 1) / K *
((K - j) / K)^N, of a shared one (K - j + 1) / K; the sum over j = 1..K is the mean of m, and the sum of the G-th powers
that of the least m in a global batch of G, which decides how many calls every rank makes. For K = 4 that is 11.75 F, or
10.5 F with a shared index, against the public demo's 15 F (the method is arXiv 2503.06674's).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

from tdm_fast.distill import TDMConfig

RoleKind = Literal["full", "lora"]

BACKWARD = {"full": 2.0, "lora": 1.0}
"""Forwards that a backward counts for. Where every weight trains, each product of the forward has two in the backward,
one for either factor; a frozen weight needs none, which leaves the one for the layer's input."""


class Cost(NamedTuple):
    """Averages over the draws, of one iteration."""

    rollout: float
    """F per sample of the rollout."""
    fake_updates: float
    """F per sample of all fake-score updates, backward included."""
    student_update: float
    """F per sample of the student update, backward included."""
    rollout_calls: float
    """Steps of the rollout that a rank makes, on however few samples: all that the global batch needs."""
    calls: float
    """Forward calls that follow one another on a rank, the rollout's among them."""

    @property
    def total(self) -> float:
        """F per sample of the whole iteration: what a busy device's time follows."""
        return self.rollout + self.fake_updates + self.student_update

    @property
    def critical_path(self) -> float:
        """F of the calls that follow one another, backward included, a call on part of the batch as long as one on all.

        What the time follows where a call costs the same for few samples as for many: of one sample per rank (which
        waits for the rank that needs the most steps), or of weights that are gathered for every call.
        """
        return self.rollout_calls + self.fake_updates + self.student_update


def expected_forwards(
    config: TDMConfig, global_batch_size: int, roles: RoleKind = "full", *, attention_share: float = 0.0
) -> Cost:
    """The average cost of an iteration of `tdm_fast.distill`, over all draws (and, with `unify`, its numbers of steps).

    `attention_share` is the part of a forward's FLOPs that goes into attention's products of two activations: their
    backward is twice their forward in `lora` roles too. Not counted: the adapters' own products, the first layer's
    input gradient, which nobody needs, recomputation under activation checkpointing, and the single samples on which
    ranks make calls that only others need. Raises ValueError for sizes that cannot be.
    """
    backward = _backward(global_batch_size, roles, attention_share)
    if config.unify is not None:
        each = [replace(config, num_steps=num_steps, unify=None) for num_steps in config.unify]
        costs = [expected_forwards(one, global_batch_size, roles, attention_share=attention_share) for one in each]
        return Cost(*(sum(values) / len(costs) for values in zip(*costs, strict=True)))
    steps, updates, teacher = config.num_steps, config.fake_updates, 1 if config.cfg == 1 else 2
    not_below = [
        (steps - least + 1) / steps * (1 if config.share_index else ((steps - least) / steps) ** updates)
        for least in range(1, steps + 1)
    ]
    independent = global_batch_size if config.index_per == "sample" else 1
    rollout_calls = steps - sum(share**independent for share in not_below)
    return Cost(
        rollout=steps - sum(not_below),
        fake_updates=updates * (1 + backward),
        student_update=1 + backward + teacher + 1,
        rollout_calls=rollout_calls,
        calls=rollout_calls + updates + 3,
    )


def reference_forwards(config: TDMConfig, roles: RoleKind = "full", *, attention_share: float = 0.0) -> Cost:
    """The same of `tdm_fast.reference`, whose work depends on nothing but the numbers of steps and of fake updates."""
    backward = _backward(1, roles, attention_share)
    steps, updates = sum(config.unify) / len(config.unify) if config.unify else config.num_steps, config.fake_updates
    return Cost(
        rollout=steps,
        fake_updates=updates * (2 + 1 + backward),
        student_update=1 + backward + 2 + 1,
        rollout_calls=steps,
        calls=steps + 3 * updates + 4,
    )


def _backward(global_batch_size: int, roles: RoleKind, attention_share: float) -> float:
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size is {global_batch_size}; it must be at least 1")
    if roles not in BACKWARD:
        raise ValueError(f"roles is {roles!r}; it must be one of {', '.join(BACKWARD)}")
    if not 0 <= attention_share <= 1:
        raise ValueError(f"attention_share is {attention_share}; it must be from 0 to 1")
    return BACKWARD[roles] + (2 - BACKWARD[roles]) * attention_share
