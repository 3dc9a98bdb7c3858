"""torchao's AdamW with moments of 8 bits, the same moments on any number of ranks that all have rows of a matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit as _AdamW8bit

LEAST = 4096
"""Numbers that a parameter has at least for its moments to have 8 bits, as in torchao and bitsandbytes."""
LEAST_ROWS = 64
"""Rows that it has at least: on some number of ranks a table of a few rows has none for all of them."""
SMALLEST_BLOCK = 32
"""Numbers that share a scale at least: fewer would take more than an eighth of a byte each for it."""


class AdamW8bit(_AdamW8bit):
    """torchao's, but which moments have 8 bits is decided by a whole parameter's shape, and not by a rank's shard.

    torchao looks at the shard: on other ranks, or where rows do not divide evenly, other moments have 8 bits, or one
    rank's have and another's have not, and no checkpoint fits both. Here the numbers that share a scale are of one row,
    which no shard cuts: 256 of them, as in torchao, or the greatest power of two that divides the row. Biases,
    tables of few rows, odd rows, and what some rank has no row of, because torchao's states cannot be empty, stay in 32
    bits. A checkpoint of 8 bits therefore does not go on where so many ranks are that some have no rows of a matrix:
    2304 rows, the width of a model of 2.8 B, leave some of 512 ranks without.
    """

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        local = p.to_local() if isinstance(p, DTensor) else p
        block = block_size(p, self.block_size)
        state = torch.zeros_like(local) if block is None else self._subclass_zeros(local, signed, block)
        if isinstance(p, DTensor):
            of_whole: dict[str, Any] = {"shape": p.shape, "stride": p.stride()}
            return DTensor.from_local(state, p.device_mesh, p.placements, run_check=False, **of_whole)
        return state


def block_size(parameter: Tensor, most: int = 256) -> int | None:
    """How many numbers of a parameter's moments share a scale, the same on all ranks; None where they keep 32 bits.

    The parameter is plain or sharded by rows.
    """
    if parameter.ndim < 2 or len(parameter) < LEAST_ROWS or parameter.numel() < LEAST:
        return None
    rows = len(parameter)
    block = math.gcd(most, parameter.numel() // rows)
    shards = 1
    if isinstance(parameter, DTensor):
        sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
        shards = math.prod(size for placement, size in sizes if placement.is_shard())
    all_have_rows = (shards - 1) * math.ceil(rows / shards) < rows
    return block if block >= SMALLEST_BLOCK and all_have_rows else None
