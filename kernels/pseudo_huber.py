"""pseudo_huber in Triton: value and gradient in one pass.

The first kernel reads both inputs once, writes the gradient up to a factor per sample (the residual) and either the
values themselves or their sums per chunk; the second adds the chunks up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdm_fast.kernels._latents import (
    BLOCK,
    COLUMNS,
    ROUND_AS_WRITTEN,
    ROWS,
    RUNS,
    grid_of,
    load,
    loss_outputs,
    on_device,
    place,
    row_sums,
)
from tdm_fast.ops._rows import rows


@triton.jit(do_not_specialize=["chunks"])
def _value_kernel(
    input,
    target,
    residual,
    values,
    slots,
    weight,
    c,
    c_squared,
    input_stride,
    target_stride,
    per_sample,
    chunks,
    INPUT_ELEMENT: tl.constexpr,
    TARGET_ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    RUNS: tl.constexpr,
):
    """One chunk: weight * (sqrt(d^2 + c^2) - c) into `values` or summed into `slots`, d / sqrt(d^2 + c^2) beside it."""
    index, start = place(chunks, BLOCK * RUNS)
    total = tl.zeros((BLOCK,), tl.float32)
    if weight is not None:
        factor = tl.load(weight + index)
    for run in range(RUNS):
        within = start + run * BLOCK + tl.arange(0, BLOCK)
        mask = within < per_sample
        x = load(input, index, input_stride, within, mask, INPUT_ELEMENT)
        error = x - load(target, index, target_stride, within, mask, TARGET_ELEMENT)
        root = tl.sqrt_rn(error * error + c_squared)
        value = root - c
        if weight is not None:
            value *= factor
        if values is not None:
            tl.store(values + index * per_sample + within, value, mask=mask)
        else:
            total += tl.where(mask, value, 0.0)
        if residual is not None:
            gradient = tl.div_rn(error, root).to(residual.dtype.element_ty)
            tl.store(residual + index * per_sample + within, gradient, mask=mask)
    if slots is not None:
        tl.store(slots + tl.program_id(0), tl.sum(total.to(tl.float64)))


@triton.jit(do_not_specialize=["batch", "per_sample", "chunks"])
def _finish_kernel(
    slots,
    value,
    scale,
    weight,
    batch,
    per_sample,
    chunks,
    REDUCTION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The reduced value, and scale = weight over the number that the reduction divides by."""
    divisor = tl.full((), 1.0, tl.float64)
    if REDUCTION == "mean":
        divisor = batch.to(tl.float64) * per_sample
    if REDUCTION == "per_sample":
        divisor = per_sample.to(tl.float64)
    total = tl.zeros((ROWS,), tl.float64)
    first = 0
    while first < batch:
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = row < batch
        factor = tl.full((ROWS,), 1.0, tl.float64)
        if weight is not None:
            factor = tl.load(weight + row, mask=mask, other=0.0).to(tl.float64)
        tl.store(scale + row, (factor / divisor).to(tl.float32), mask=mask)
        if REDUCTION != "none":
            sums = row_sums(slots, row, mask, chunks, ROWS, COLUMNS)
            if REDUCTION == "per_sample":
                tl.store(value + row, (sums / divisor).to(tl.float32), mask=mask)
            else:
                total += sums
        first += ROWS
    if (REDUCTION == "mean") or (REDUCTION == "sum"):
        tl.store(value, (tl.sum(total) / divisor).to(tl.float32))


def pseudo_huber(
    input: Tensor, target: Tensor, c: float, weight: Tensor | None, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`(value, residual, scale)` from `[B, ...]` inputs; `weight` float32 `[B]` or None; `reduction` as in the op.

    `value` is float32, a scalar, `[B]` ("per_sample") or `[B, ...]` ("none"). Its gradient to input, minus that to
    target, is residual * scale: `residual` `[B, ...]` (empty without `with_gradient`), `scale` float32 `[B]`.
    """
    # Both inputs may get a gradient: the residual's dtype serves either.
    dtype = input.dtype if input.dtype == target.dtype else torch.float32
    value, residual, scale = loss_outputs(input, dtype, with_gradient)
    if reduction in ("none", "per_sample"):
        shape = input.shape if reduction == "none" else input.shape[:1]
        value = torch.empty(shape, dtype=torch.float32, device=input.device)
    if input.numel() == 0:
        return value.fill_(0.0 if reduction == "sum" else float("nan")), residual, scale.fill_(float("nan"))
    per_sample, chunks, grid = grid_of(input, BLOCK * RUNS)
    x, x_stride, x_element = rows(input)
    y, y_stride, y_element = rows(target)
    weight = None if weight is None else weight.contiguous()
    slots = None if reduction == "none" else torch.empty(grid, dtype=torch.float64, device=input.device)
    with on_device(input):
        _value_kernel[grid](
            x, y, residual if with_gradient else None, value if reduction == "none" else None, slots, weight,
            c, c**2, x_stride, y_stride, per_sample, chunks, x_element, y_element, BLOCK, RUNS, **ROUND_AS_WRITTEN,
        )  # fmt: skip
        _finish_kernel[(1,)](
            slots, value, scale, weight, input.shape[0], per_sample, chunks, reduction, ROWS, COLUMNS,
            **ROUND_AS_WRITTEN,
        )  # fmt: skip
    return value, residual, scale
