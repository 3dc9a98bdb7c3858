"""fake_score_loss and fake_score_loss_from_outputs in Triton: loss and gradient in one pass (arXiv 2503.06674).

The first kernel reads every latent once, writes the error and sums its squares per chunk; the second adds the chunks
up, weighs the samples and makes the factors that turn errors into gradients.
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
    entry,
    grid_of,
    load,
    loss_outputs,
    on_device,
    place,
    residual_dtype,
    row_sums,
)
from tdm_fast.ops._rows import rows


@triton.jit(do_not_specialize=["length", "chunks"])
def _error_kernel(
    prediction,
    noisy,
    x0,
    residual,
    slots,
    table_a,
    table_b,
    timesteps,
    length,
    prediction_stride,
    noisy_stride,
    x0_stride,
    per_sample,
    chunks,
    PREDICTION_ELEMENT: tl.constexpr,
    NOISY_ELEMENT: tl.constexpr,
    X0_ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    RUNS: tl.constexpr,
):
    """One chunk: error = prediction - x0, where a raw output becomes a * noisy + b * output first (`noisy` given)."""
    index, start = place(chunks, BLOCK * RUNS)
    squares = tl.zeros((BLOCK,), tl.float32)
    if noisy is not None:
        t = tl.load(timesteps + index)
        a, b = entry(table_a, t, length), entry(table_b, t, length)
    for run in range(RUNS):
        within = start + run * BLOCK + tl.arange(0, BLOCK)
        mask = within < per_sample
        x0_fake = load(prediction, index, prediction_stride, within, mask, PREDICTION_ELEMENT)
        if noisy is not None:
            x0_fake = a * load(noisy, index, noisy_stride, within, mask, NOISY_ELEMENT) + b * x0_fake
        error = x0_fake - load(x0, index, x0_stride, within, mask, X0_ELEMENT)
        squares += tl.where(mask, error * error, 0.0)
        if residual is not None:
            tl.store(residual + index * per_sample + within, error.to(residual.dtype.element_ty), mask=mask)
    tl.store(slots + tl.program_id(0), tl.sum(squares.to(tl.float64)))


@triton.jit(do_not_specialize=["length", "batch", "per_sample", "chunks"])
def _finish_kernel(
    slots,
    loss,
    scale,
    snr,
    log_weight,
    snr_gamma,
    table_b,
    timesteps,
    length,
    batch,
    per_sample,
    chunks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """loss = mean_b(W mean_i(error^2)), scale = 2 W [b_t] / (B N), W = min(snr, snr_gamma) exp(log_weight).

    `snr` is `[B]`, or the schedule's table where `timesteps` are given.
    """
    elements = batch.to(tl.float64) * per_sample
    total = tl.zeros((ROWS,), tl.float64)
    first = 0
    while first < batch:
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = row < batch
        if timesteps is not None:
            t = tl.load(timesteps + row, mask=mask, other=0)
            weight = entry(snr, t, length)
        else:
            weight = tl.load(snr + row, mask=mask, other=0.0)
        # A comparison and no minimum, so that NaN stays.
        weight = tl.where(weight > snr_gamma, snr_gamma, weight)
        if log_weight is not None:
            # exp through float64: Triton's own for float32 is a fast one.
            exponent = tl.load(log_weight + row, mask=mask, other=0.0).to(tl.float64)
            weight = weight * tl.exp(exponent).to(tl.float32)
        weight = weight.to(tl.float64)
        total += tl.where(mask, weight * (row_sums(slots, row, mask, chunks, ROWS, COLUMNS) / per_sample), 0.0)
        factor = 2.0 * weight / elements
        if timesteps is not None:
            factor *= entry(table_b, t, length).to(tl.float64)
        tl.store(scale + row, factor.to(tl.float32), mask=mask)
        first += ROWS
    tl.store(loss, (tl.sum(total) / batch).to(tl.float32))


def fake_score_loss(
    x0_fake: Tensor,
    x0: Tensor,
    snr: Tensor,
    log_weight: Tensor | None,
    snr_gamma: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, residual, scale)` from latents `[B, ...]`, float32 `snr` and `log_weight` `[B]` (or None).

    The gradient of the float32 scalar `loss` to x0_fake is residual * scale: `residual` `[B, ...]` (empty without
    `with_gradient`), `scale` float32 `[B]`.
    """
    return _loss(x0_fake, None, x0, (None, None, None, 0), snr.contiguous(), log_weight, snr_gamma, with_gradient)


def fake_score_loss_from_outputs(
    model_output: Tensor,
    noisy: Tensor,
    x0: Tensor,
    a: Tensor,
    b: Tensor,
    snr: Tensor,
    t: Tensor,
    log_weight: Tensor | None,
    snr_gamma: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fake_score_loss` from the raw output at `noisy`: float32 tables `a`, `b`, `snr` `[N]`, int64 `t` `[B]`."""
    tables = (a, b, t.contiguous(), a.shape[0])
    return _loss(model_output, noisy, x0, tables, snr, log_weight, snr_gamma, with_gradient)


def _loss(
    prediction: Tensor,
    noisy: Tensor | None,
    x0: Tensor,
    tables: tuple[Tensor | None, Tensor | None, Tensor | None, int],
    snr: Tensor,
    log_weight: Tensor | None,
    snr_gamma: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, residual, scale = loss_outputs(prediction, residual_dtype(prediction.dtype, False), with_gradient)
    if prediction.numel() == 0:
        return loss.fill_(float("nan")), residual, scale.fill_(float("nan"))
    per_sample, chunks, grid = grid_of(prediction, BLOCK * RUNS)
    source, source_stride, source_element = rows(prediction)
    middle, middle_stride, middle_element = (None, 0, 0) if noisy is None else rows(noisy)
    target, target_stride, target_element = rows(x0)
    slots = torch.empty(grid, dtype=torch.float64, device=prediction.device)
    with on_device(prediction):
        _error_kernel[grid](
            source, middle, target, residual if with_gradient else None, slots, *tables,
            source_stride, middle_stride, target_stride, per_sample, chunks,
            source_element, middle_element, target_element, BLOCK, RUNS, **ROUND_AS_WRITTEN,
        )  # fmt: skip
        _finish_kernel[(1,)](
            slots, loss, scale, snr, None if log_weight is None else log_weight.contiguous(), float(snr_gamma),
            *tables[1:], prediction.shape[0], per_sample, chunks, ROWS, COLUMNS, **ROUND_AS_WRITTEN,
        )  # fmt: skip
    return loss, residual, scale
