"""What ranks run for test_adamw_8bit.py, one rank or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tdm_fast.checkpoint import Checkpoints
from tdm_fast.config import OptimiserConfig
from tdm_fast.optimizer_state import make_optimizer_state, optimizer_tensors
from tdm_fast.ranks import joined
from tdm_fast.step import make_optimizer

SHAPES = {"rows": (65, 512), "narrow": (67, 96), "odd": (300, 20), "bias": (8192,), "few": (6, 4096)}


def gradient(name: str, step: int) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(10 * step + len(name)))


def adamw(folder: Path, first: int, last: int) -> Any:
    """Steps `first` to `last` of an 8-bit AdamW, from a checkpoint of the step before, saved after the next to last."""
    torch.compiler.set_stance("force_eager")  # torchao's step takes a minute to compile, and computes the same
    with joined(torch.device("cpu")) as ranks, Checkpoints(folder, ranks) as store:
        network = nn.Module()
        for name in SHAPES:
            network.register_parameter(name, nn.Parameter(gradient(name, 0)))
        if ranks.weights is not None:
            fully_shard(network, mesh=ranks.weights)
        parameters = dict(network.named_parameters())
        optimizer = make_optimizer(list(parameters.values()), 0.1, OptimiserConfig(use_8bit_adam=True, adam_beta1=0.5))
        if first > 1:
            found = store.read(folder / f"checkpoint-{first - 1}")
            make_optimizer_state(optimizer, found.groups["optimizer"])
            store.load(found, {"network": parameters, "optimizer": optimizer_tensors(optimizer)})
        for step in range(first, last + 1):
            for name, parameter in parameters.items():
                grad = gradient(name, step)
                parameter.grad = (
                    distribute_tensor(grad, parameter.device_mesh, parameter.placements)
                    if isinstance(parameter, DTensor)
                    else grad
                )
            optimizer.step()
            if step == last - 1:
                store.save(step, {"network": parameters, "optimizer": optimizer_tensors(optimizer)}, {})
        found_weights = {n: p.detach() for n, p in parameters.items()}
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in found_weights.items()}
        return whole, sorted(optimizer_tensors(optimizer))
