"""What the kernels share: how a program finds and reads its part of a latent, and how sums are made.

A latent `[B, ...]` is B rows of `per_sample` elements, each row contiguous (ELEMENT 1) or one repeated element
(ELEMENT 0), the rows a `batch_stride` apart. One program works on one chunk of one row. Sums go into float64 slots,
one per program, which a second kernel adds up in a fixed order; the grid depends on the shape alone.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements that a program works on at a time."""
RUNS = 4
"""Blocks of a program that sums: float32 adds up as many numbers, float64 the rest."""
ROWS, COLUMNS = 8, 256
"""Tile of slots that the second kernel reads at a time."""
ROUND_AS_WRITTEN = {"enable_fp_fusion": False}
"""Launch option: no contraction to fused multiply-add, so that every element rounds as in the torch definition."""


def grid_of(latents: Tensor, chunk: int) -> tuple[int, int, tuple[int]]:
    """`(per_sample, chunks, grid)` of latents that are not empty: a program per sample and `chunk` elements."""
    per_sample = latents.numel() // latents.shape[0]
    chunks = triton.cdiv(per_sample, chunk)
    return per_sample, chunks, (latents.shape[0] * chunks,)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def residual_dtype(differentiated: torch.dtype, bounded: bool) -> torch.dtype:
    """The dtype of a loss's residual: its input's, or float32 where it is not `bounded` and could overflow float16."""
    return torch.float32 if differentiated == torch.float16 and not bounded else differentiated


def loss_outputs(latents: Tensor, dtype: torch.dtype, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised `(loss, residual, scale)` of a loss of latents `[B, ...]`: a scalar, `[B, ...]` and `[B]`.

    The residual has `dtype`; without `with_gradient` it is empty and float32.
    """
    loss = torch.empty((), dtype=torch.float32, device=latents.device)
    scale = torch.empty(latents.shape[:1], dtype=torch.float32, device=latents.device)
    if not with_gradient:
        return loss, torch.empty(0, dtype=torch.float32, device=latents.device), scale
    return loss, torch.empty(latents.shape, dtype=dtype, device=latents.device), scale


@triton.jit
def place(chunks, CHUNK: tl.constexpr):
    """(sample, first element within it) of this program, int64: a batch of videos can have more than 2^31 elements."""
    program = tl.program_id(0)
    return (program // chunks).to(tl.int64), (program % chunks).to(tl.int64) * CHUNK


@triton.jit
def load(latents, index, batch_stride, within, mask, ELEMENT: tl.constexpr):
    """Elements `within` of sample `index` as float32; what lies outside the mask is to be ignored."""
    if ELEMENT == 0:
        return tl.broadcast_to(tl.load(latents + index * batch_stride).to(tl.float32), mask.shape)
    else:
        return tl.load(latents + index * batch_stride + within, mask=mask, other=0).to(tl.float32)


@triton.jit
def entry(table, t, length):
    """The table's float32 value at a timestep, NaN outside it: nothing may be read there."""
    return tl.load(table + t, mask=(t >= 0) & (t < length), other=float("nan"))


@triton.jit
def entry_or_clean(table, t, length, clean):
    """As above, with `clean` at t = -1, which stands for data without noise."""
    return tl.where(t == -1, clean, entry(table, t, length))


@triton.jit
def row_sums(slots, row, row_mask, chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """float64 `[ROWS]`: the sums over all chunks of the rows `row`, in an order that the shape alone decides."""
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    # No range: the interpreter of Triton 3.6 cannot take one up to a tensor from numpy 2.4 on.
    start = 0
    while start < chunks:
        column = start + tl.arange(0, COLUMNS)
        mask = row_mask[:, None] & (column < chunks)[None, :]
        total += tl.load(slots + row[:, None] * chunks + column[None, :], mask=mask, other=0.0)
        start += COLUMNS
    return tl.sum(total, axis=1)
