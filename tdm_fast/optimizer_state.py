"""An optimiser's state as named tensors, plain or sharded, that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

TABLES = {"qmap"}
"""Parts of torchao's states that are the same on all ranks and for all parameters."""


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as flat tensors, `<parameter index>.<name>`; rates follow from the step and stay out.

    A state that is a tensor of tensors (torchao's of 8 bits) becomes its parts, `<parameter index>.<name>.<part>`, with
    as many rows as it has: a row is whole blocks of numbers that share a scale.
    """
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}{suffix}": tensor
        for index, slots in state.items()
        for name, value in slots.items()
        for suffix, tensor in _parts(value).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, for an optimiser over the same parameters in the same order."""
    make_optimizer_state(optimizer, tensors)
    mine = optimizer_tensors(optimizer)
    if odd := sorted(mine.keys() ^ tensors.keys()):
        raise ValueError(f"the states are of another optimiser: {len(odd)} names differ, {odd[0]} first")
    for name, tensor in mine.items():
        tensor.copy_(tensors[name])


@torch.no_grad()
def make_optimizer_state(optimizer: torch.optim.Optimizer, names: Collection[str]) -> None:
    """Give a new optimiser the states that `names`, as of `optimizer_tensors`, tell: tensors to load into.

    It makes them itself, in a step of zero gradients at a rate of zero: of its own types, sharded as its parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rates = [_rate_zero(group) for group in optimizer.param_groups]
    for index in {int(name.split(".", 1)[0]) for name in names}:
        if index < len(parameters) and not optimizer.state.get(parameters[index]):
            parameters[index].grad = torch.zeros_like(parameters[index])
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(rate)
        else:
            group["lr"] = rate


def _rate_zero(group: dict[str, Any]) -> Any:
    """Set a group's rate to 0 and return what it was; torchao's is a tensor that must stay the same one."""
    rate = group["lr"]
    if isinstance(rate, Tensor):
        was = rate.clone()
        rate.zero_()
        return was
    group["lr"] = 0.0
    return rate


def _parts(value: Tensor) -> dict[str, Tensor]:
    """A tensor by its suffix `""`, or the parts of one made of others, sharded as it is."""
    local = value.to_local() if isinstance(value, DTensor) else value
    if not hasattr(local, "__tensor_flatten__"):
        return {"": value}
    parts: dict[str, Tensor] = {}
    for part in local.__tensor_flatten__()[0]:
        inner = getattr(local, part)
        if part not in TABLES:
            inner = inner.view(len(local), -1)
            if isinstance(value, DTensor):
                shape = torch.Size((len(value), inner.shape[1]))
                inner = DTensor.from_local(
                    inner, value.device_mesh, value.placements, run_check=False, shape=shape, stride=(shape[1], 1)
                )
        parts[f".{part}"] = inner
    return parts
