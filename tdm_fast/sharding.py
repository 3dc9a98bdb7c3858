"""Weights sharded over ranks: FSDP2 on every block and at the root, gathered as seldom as the method allows.

What one iteration communicates, the least that it can without keeping a network's weights from one of its phases to
the next, or from a forward to its backward, per network of P weights in the dtype of computation, B of them in blocks:

    full    student   gather P for the rollout, all calls of it; P for its forward, B for its backward; reduce P in fp32
            fake      gather P + B and reduce P in fp32, for each update; gather P for its forward without gradient
            teacher   gather P
    lora    base      gather P for the rollout, P + B for each fake update, P for all of the student's update
            adapters  all-reduce them in fp32 for each update

An iteration whose draws need no rollout gathers nothing for it. With `share_index` the student's forward takes the
rollout's weights, and its backward gathers P. Weights that are kept from a forward to its backward
(`reshard_after_forward` off), or over the parts of an accumulated gradient, are gathered once, P, for both; the parts'
gradients add up whole, in fp32, on every rank, until the last of them reduces them. Every update adds one sum of two
numbers, its norm and its loss. Where every rank has all weights (`--sharding none`) nothing is gathered, and all
gradients are all-reduced. With copies (`hybrid`) a reduced shard is all-reduced across them.
`tdm_fast.traffic.least_bytes` is this as a function.

Under bf16 weights are gathered in it, and so what is computed has it from the patch embedding on, the residual stream
as well: fp32 is for what adds up over iterations and ranks, master weights, moments and reductions. One process
computes alike: autocast casts the weights of linears, and the network itself the fp32 tables of its modulation. The
networks of diffusers do not: in one process those tables, and what is multiplied by them, stay in fp32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tdm_fast.files import weight_files
from tdm_fast.guards import local
from tdm_fast.models.blocks import blocks_of
from tdm_fast.models.loading import Weights
from tdm_fast.models.roles import Networks
from tdm_fast.ranks import Ranks


def shard_(networks: Networks, ranks: Ranks, *, bf16: bool = False, reshard_after_forward: bool = True) -> None:
    """Shard the networks of all roles over `ranks`, in place; does nothing for one process.

    After activation checkpointing and compile, before the optimisers are made. What is frozen keeps its dtype, what
    trains is kept in fp32, computes in bf16 if `bf16` says so, and has its gradients reduced in fp32. Adapters and the
    embedding of K are small and stay whole on every rank: see `mean_gradients_`.
    """
    if ranks.weights is None:
        return
    # Nothing changes an output in place, which is what this warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for model in networks.models():
        adapters = {p for p in model.parameters() if p.requires_grad} if networks.adapters else set()
        trains = any(p.requires_grad for p in model.parameters() if p not in adapters)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 and trains else None,
            reduce_dtype=torch.float32 if trains else None,
            cast_forward_inputs=False,  # the networks cast by themselves, and not the tables of rotary angles
        )
        options: dict[str, Any] = {"mesh": ranks.weights, "mp_policy": policy, "ignored_params": adapters}
        for block in blocks_of(model):
            fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
        fully_shard(model, reshard_after_forward=False, **options)


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The root, then the blocks in order: the order in which a forward gathers them."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def whole(*models: nn.Module, when: bool = True, reshard_after_forward: bool = True) -> Iterator[None]:
    """Gather all weights of networks at once, keep them for whatever is called in the block, drop them at its end.

    All ranks must enter it; inside, they may call as often as they like, each for itself. A backward in the block drops
    the weights as it goes. `reshard_after_forward` is what holds afterwards. Does nothing unless `when`.
    """
    roots = [model for model in models if when and isinstance(model, FSDPModule)]
    handles = []
    for root in roots:
        root.set_reshard_after_forward(False)
        handles += [module.unshard(async_op=True) for module in _sharded_modules(root)]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:  # of what was not used; others have waited
            if handle is not None:
                handle.wait()
        for root in roots:
            for module in _sharded_modules(root):  # type: ignore[arg-type]
                module.reshard()
            root.set_reshard_after_forward(reshard_after_forward)
            root.set_reshard_after_forward(False, recurse=False)


def accumulate(model: nn.Module, *, last: bool) -> None:
    """Before a backward: whether it is the last of those whose gradients are added up. Only that one communicates."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(last)


def after_forwards(model: nn.Module) -> None:
    """After forwards without a backward: drop what those leave to it, the root's weights and notes of every call.

    Weights that stayed would also take the place of the shards among the network's parameters.
    """
    if isinstance(model, FSDPModule):
        for module in _sharded_modules(model):
            module.reshard()
        # Torch notes forwards until a backward is done, which a frozen network never has. A torch without this method
        # keeps the notes, two numbers for each block and call.
        if hasattr(model, "reset_iter_state"):
            model.reset_iter_state()


@torch.no_grad()
def mean_gradients_(parameters: Sequence[Tensor], ranks: Ranks) -> None:
    """Average, over all ranks, the gradients of parameters that are whole on each: one all-reduce for all of them.

    Gradients of the ranks of one context are parts of a sum: they are averaged, too, as FSDP2 does with sharded ones,
    and the loss is multiplied by the context's size before its backward.
    """
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if ranks.world == 1 or not gradients:
        return
    flat = ranks.mean_(torch.cat([gradient.flatten() for gradient in gradients]))
    pieces = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])


@torch.no_grad()
def fill_(models: Sequence[nn.Module], weights: Weights, device: torch.device) -> None:
    """Give sharded networks on the meta device, all of one architecture, their weights from safetensors.

    Every rank reads its own rows alone, once for all networks, so that no tensor is ever whole, but for buffers, which
    are small. Raises ValueError for files that are not of this architecture.
    """
    homes, tables = [_homes(model) for model in models], [_tables(model) for model in models]
    for module in (module for model in models for module in model.modules()):
        for leaf, buffer in module.named_buffers(recurse=False):
            setattr(module, leaf, buffer.to(device))
    wanted, seen = {name for places in (*homes, *tables) for name in places}, set()
    for file in weight_files(weights.folder):
        with safe_open(file, framework="pt") as tensors:
            for name in list(tensors.keys()):
                seen.add(name)
                for module, leaf in (table[name] for table in tables if name in table):
                    getattr(module, leaf).copy_(tensors.get_tensor(name))
                rows: Tensor | None = None
                for home in homes:
                    if name not in home:
                        continue
                    module, leaf = home[name]
                    old = getattr(module, leaf)
                    piece = tensors.get_slice(name)
                    if tuple(piece.get_shape()) != tuple(old.shape):
                        raise ValueError(
                            f"{file}: {name} is {piece.get_shape()}; the config makes it {list(old.shape)}"
                        )
                    if rows is None:
                        shape, offset = compute_local_shape_and_global_offset(
                            old.shape, old.device_mesh, old.placements
                        )
                        rows = piece[offset[0] : offset[0] + shape[0]] if shape[0] else torch.empty(shape)
                        rows = weights.rows(name, rows, offset[0])
                    mine = rows.to(device, old.dtype, copy=True).contiguous()
                    sharded = DTensor.from_local(
                        mine, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
                    )
                    setattr(module, leaf, nn.Parameter(sharded, requires_grad=old.requires_grad))
    if odd := sorted(wanted ^ seen):
        raise ValueError(f"{weights.folder}: {len(odd)} weights are missing or too many, {odd[0]} first")


def _homes(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where parameters on the meta device live, by their names without adapters."""
    return {
        f"{path}.{leaf}".removeprefix(".").replace(".base_layer.", "."): (module, leaf)
        for path, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta or local(parameter).is_meta
    }


def _tables(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where the buffers live that are in a network's file, such as positions."""
    return {
        f"{path}.{leaf}".removeprefix("."): (module, leaf)
        for path, module in model.named_modules()
        for leaf, _ in module.named_buffers(recurse=False)
        if leaf not in module._non_persistent_buffers_set
    }


class Collected(NamedTuple):
    """A student's weights as plain tensors on one device."""

    weights: dict[str, Tensor]
    base: dict[str, Tensor] | None
    """The frozen network that adapters belong to."""


@torch.no_grad()
def collect(
    networks: Networks,
    weights: Mapping[str, Tensor],
    ranks: Ranks,
    device: torch.device | str = "cpu",
) -> Collected | None:
    """The student's `weights`, and its base, on rank 0 and `device`; None on the others. To be called by all ranks.

    They are gathered one tensor at a time; rank 0 alone keeps them. One process shares memory with what it has.
    """
    if ranks.world == 1:
        return Collected(dict(weights), None)

    def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            one = tensor.detach()
            one = one.full_tensor() if isinstance(one, DTensor) else one
            if ranks.is_main:
                found[name] = one.to(device)
        return found

    own = gathered(weights)
    base = gathered(networks.adapters.base_state()) if networks.adapters else None
    return Collected(own, base) if ranks.is_main else None
