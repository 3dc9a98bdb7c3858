"""Bytes that a step communicates: counted as torch issues its collectives, and computed from what it needs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdm_fast.config import TrainConfig
from tdm_fast.models.blocks import blocks_of
from tdm_fast.models.denoiser import Roles

PAYLOADS = {
    "_allgather_base_": ("gather", 0),
    "_reduce_scatter_base_": ("reduce", 1),
    "allreduce_": ("all-reduce", 0),
    "alltoall_base_": ("all-to-all", 1),
}
"""Collectives, and which argument holds all that is communicated."""
TOKENS = {"all_to_all": "all-to-all", "all_gather": "all-gather"}
"""The ops of tdm_fast.models.context."""

Key = tuple[str, str, str]
"""Phase, role, collective."""


class Traffic(TorchDispatchMode):
    """Counts, inside the `with` block, the bytes of collectives by (phase, role, collective).

    A gather counts what it gives, a reduction (reduce-scatter) what it takes, an all-reduce its tensor: each the size
    of the whole tensor. Of n ranks each one sends and receives (n - 1) / n of it, and for an all-reduce twice that.
    The ranks of a context exchange tokens: an all-to-all counts what it takes, an all-gather what it gives.
    Groups of one rank count nothing. The role is the network being called, or, in a backward, the one that trains.
    """

    def __init__(self, roles: Roles) -> None:
        super().__init__()
        self.bytes: Counter[Key] = Counter()
        self._phase = self._role = "other"
        self._hooks = []
        for name, denoiser in zip(Roles._fields, roles, strict=True):
            self._hooks.append(denoiser.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            self._hooks.append(denoiser.register_forward_hook(lambda *_: self._enter(None)))

    def _enter(self, role: str | None) -> None:
        self._role = role or {"rollout": "student"}.get(self._phase, self._phase)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's bytes to a phase of the step."""
        outer = self._phase, self._role
        self._phase = name
        self._enter(None)
        try:
            yield
        finally:
            self._phase, self._role = outer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # What is not known here counts by its own name, so that no sum leaves it out.
            name = func._schema.name.split("::")[1]
            collective, position = PAYLOADS.get(name, (name, 0))
            group = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in a._type().name())  # type: ignore[attr-defined]
            if torch.distributed.ProcessGroup.unbox(group).size() > 1:
                tensors = [leaf for leaf in tree_leaves(args[position]) if isinstance(leaf, Tensor)]
                self.bytes[self._phase, self._role, collective] += sum(tensor.nbytes for tensor in tensors)
        result = func(*args, **(kwargs or {}))
        if func.namespace == "tdm_fast" and func._opname in TOKENS:  # their collectives are issued out of sight
            self.bytes[self._phase, self._role, TOKENS[func._opname]] += result.nbytes
        return result

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)


class Sizes(NamedTuple):
    """Numbers in a network of one role, with the padding that makes shards equal."""

    network: int
    """In all of it, adapters apart."""
    blocks: int
    """Of these, in blocks."""
    whole: int = 0
    """That train but are whole on every rank: an adapter, an embedding of K."""


def sizes_of(model: nn.Module, shards: int, whole: int = 0) -> Sizes:
    """Of a network without adapters, on any device: FSDP2 pads the first dimension to a multiple of `shards`."""

    def padded(parameter: Tensor) -> int:
        rows = parameter.shape[0]
        return -(-rows // shards) * shards * (parameter.numel() // rows)

    blocks = sum(padded(p) for block in blocks_of(model) for p in block.parameters())
    return Sizes(sum(padded(p) for p in model.parameters()), blocks, whole)


class Tokens(NamedTuple):
    """What one sample has in a network whose tokens `context` ranks share."""

    rows: int
    """Of each rank: tokens, padding included (`Context.rows`)."""
    dim: int
    blocks: int
    patch_features: int
    """Of a token in the network's output."""


def least_bytes(
    config: TrainConfig,
    sizes: Sizes,
    mesh: tuple[int, int, int],
    *,
    bf16: bool,
    samples: int,
    rolled: float,
    tokens: Tokens | None = None,
) -> dict[Key, float]:
    """What one rank's iteration has to communicate, in bytes, as `Traffic` counts it: tdm_fast.sharding says why.

    `mesh` is replicate x shard x context. `samples` are this rank's, or its context's; `rolled` are those that its
    rollout's steps are made on, all steps together, at least one (`tdm_fast.distill.rolled_samples`). `tokens` are
    needed for a context of more than one rank. With accumulated gradients the counter cannot tell whose weights
    are gathered before the student's update: all of them are the student's there.
    """
    replicate, shard, context = mesh
    n, tdm, parts = config.networks, config.tdm, config.optimiser.gradient_accumulation_steps
    if n.sharding == "none":
        replicate, shard = replicate * shard * context, 1
    else:
        shard *= context
    lora = n.roles == "lora"
    keep = parts > 1 or not n.reshard_after_forward
    dtype, trained = 2 if bf16 else 4, ("fake",) * tdm.fake_updates + ("student",)
    teacher_calls = 1 if tdm.cfg == 1 else 2
    found: defaultdict[Key, float] = defaultdict(float)

    def gather(phase: str, role: str, numbers: int) -> None:
        if shard > 1:
            found[phase, role, "gather"] += dtype * numbers

    both = sizes.network + (0 if keep else sizes.blocks)  # for a forward and its backward
    gather("rollout", "student", sizes.network)
    for _ in range(tdm.fake_updates):
        gather("fake", "fake", both)
    gather("student", "student", sizes.network if lora or tdm.share_index else both)
    if not lora:
        for role in ("teacher", "fake"):
            gather("student", "student" if parts > 1 else role, sizes.network)
    for role in trained:
        if not lora and shard > 1:
            found[role, role, "reduce"] += 4 * sizes.network
        if not lora and replicate > 1:
            found[role, role, "all-reduce"] += 4 * sizes.network // shard
        if sizes.whole:
            found["communication", "communication", "all-reduce"] += 4 * sizes.whole
        found["optimiser", "optimiser", "all-reduce"] += 2 * 4
    if context > 1:
        assert tokens is not None
        # Forwards whose result is used, and runs through the blocks: backwards and recomputations are more of these.
        again = 1 + (n.activation_checkpointing == "block")
        runs = {
            ("rollout", "student"): (rolled, 0),
            ("fake", "fake"): (tdm.fake_updates * samples, again * tdm.fake_updates * samples),
            ("student", "student"): (samples, again * samples),
            ("student", "teacher"): (teacher_calls * samples, 0),
            ("student", "fake"): (samples, 0),
        }
        for (phase, role), (forwards, more) in runs.items():
            block = 4 * tokens.rows * tokens.dim * dtype
            found[phase, role, "all-to-all"] += block * tokens.blocks * (forwards + more)
            found[phase, role, "all-gather"] += context * tokens.rows * tokens.patch_features * dtype * forwards
    return {key: size for key, size in found.items() if size}
