"""tdm_loss and tdm_loss_from_outputs in Triton: loss and gradient in one pass (arXiv 2503.06674).

The first kernel reads every latent once, writes the gradient up to a factor per sample (the residual) and sums the
normaliser |x0 - guided| and the loss's numerators per chunk. The second adds the chunks up and makes the factors.
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

WEIGHT_FLOOR = 1e-8
"""Least value of the normaliser, as in `tdm_fast.ops.tdm_loss`."""


@triton.jit
def _guidance(cfg, guidance, index):
    """cfg - 1 of this sample: from the tensor `[B]`, or the same number for all."""
    if cfg is not None:
        return tl.load(cfg + index) - 1.0
    else:
        return guidance


@triton.jit
def _element(x0, guided, difference, c, c_squared):
    """(normaliser's term, loss's numerator, residual): pseudo-Huber, or squared for `c` None."""
    # x0 - x0 is 0, or NaN where x0 is no number, as in the definition.
    error = (x0 - x0) - difference
    if c is None:
        value, residual = error * error, error
    else:
        root = tl.sqrt_rn(error * error + c_squared)
        value, residual = root - c, tl.div_rn(error, root)
    return tl.abs(x0 - guided), value, residual


@triton.jit(do_not_specialize=["chunks", "programs"])
def _x0_kernel(
    x0,
    teacher,
    uncond,
    fake,
    residual,
    slots,
    cfg,
    guidance,
    c,
    c_squared,
    x0_stride,
    teacher_stride,
    uncond_stride,
    fake_stride,
    per_sample,
    chunks,
    programs,
    X0_ELEMENT: tl.constexpr,
    TEACHER_ELEMENT: tl.constexpr,
    UNCOND_ELEMENT: tl.constexpr,
    FAKE_ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    RUNS: tl.constexpr,
):
    """One chunk from predictions in x0 space."""
    index, start = place(chunks, BLOCK * RUNS)
    strength = _guidance(cfg, guidance, index)
    distances, values = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for run in range(RUNS):
        within = start + run * BLOCK + tl.arange(0, BLOCK)
        mask = within < per_sample
        x = load(x0, index, x0_stride, within, mask, X0_ELEMENT)
        with_prompt = load(teacher, index, teacher_stride, within, mask, TEACHER_ELEMENT)
        without = load(uncond, index, uncond_stride, within, mask, UNCOND_ELEMENT)
        faked = load(fake, index, fake_stride, within, mask, FAKE_ELEMENT)
        guided = with_prompt + strength * (with_prompt - without)
        distance, value, gradient = _element(x, guided, guided - faked, c, c_squared)
        distances += tl.where(mask, distance, 0.0)
        values += tl.where(mask, value, 0.0)
        if residual is not None:
            to = residual + index * per_sample + within
            tl.store(to, gradient.to(residual.dtype.element_ty), mask=mask)
    tl.store(slots + tl.program_id(0), tl.sum(distances.to(tl.float64)))
    tl.store(slots + programs + tl.program_id(0), tl.sum(values.to(tl.float64)))


@triton.jit(do_not_specialize=["length", "chunks", "programs"])
def _outputs_kernel(
    model_output,
    sample,
    noisy,
    teacher,
    uncond,
    fake,
    residual,
    slots,
    table_a,
    table_b,
    timesteps_gen,
    timesteps,
    length,
    cfg,
    guidance,
    c,
    c_squared,
    output_stride,
    sample_stride,
    noisy_stride,
    teacher_stride,
    uncond_stride,
    fake_stride,
    per_sample,
    chunks,
    programs,
    OUTPUT_ELEMENT: tl.constexpr,
    SAMPLE_ELEMENT: tl.constexpr,
    NOISY_ELEMENT: tl.constexpr,
    TEACHER_ELEMENT: tl.constexpr,
    UNCOND_ELEMENT: tl.constexpr,
    FAKE_ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    RUNS: tl.constexpr,
):
    """One chunk from raw outputs: the scores' x0 = a noisy + b out at t, the student's from `sample` at t_gen."""
    index, start = place(chunks, BLOCK * RUNS)
    t_gen, t = tl.load(timesteps_gen + index), tl.load(timesteps + index)
    a_gen, b_gen = entry(table_a, t_gen, length), entry(table_b, t_gen, length)
    a, b = entry(table_a, t, length), entry(table_b, t, length)
    strength = _guidance(cfg, guidance, index)
    distances, values = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for run in range(RUNS):
        within = start + run * BLOCK + tl.arange(0, BLOCK)
        mask = within < per_sample
        out = load(model_output, index, output_stride, within, mask, OUTPUT_ELEMENT)
        x = load(sample, index, sample_stride, within, mask, SAMPLE_ELEMENT)
        x_t = load(noisy, index, noisy_stride, within, mask, NOISY_ELEMENT)
        with_prompt = load(teacher, index, teacher_stride, within, mask, TEACHER_ELEMENT)
        without = load(uncond, index, uncond_stride, within, mask, UNCOND_ELEMENT)
        faked = load(fake, index, fake_stride, within, mask, FAKE_ELEMENT)
        x0 = a_gen * x + b_gen * out
        out_guided = with_prompt + strength * (with_prompt - without)
        guided = a * x_t + b * out_guided
        distance, value, gradient = _element(x0, guided, b * (out_guided - faked), c, c_squared)
        distances += tl.where(mask, distance, 0.0)
        values += tl.where(mask, value, 0.0)
        if residual is not None:
            to = residual + index * per_sample + within
            tl.store(to, gradient.to(residual.dtype.element_ty), mask=mask)
    tl.store(slots + tl.program_id(0), tl.sum(distances.to(tl.float64)))
    tl.store(slots + programs + tl.program_id(0), tl.sum(values.to(tl.float64)))


@triton.jit(do_not_specialize=["batch", "per_sample", "chunks", "programs", "length"])
def _finish_kernel(
    slots,
    loss,
    scale,
    table_b,
    timesteps_gen,
    length,
    batch,
    per_sample,
    chunks,
    programs,
    SQUARED: tl.constexpr,
    FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """loss = mean_b(mean_i(value) / w), scale = b_gen / (w B N), twice that if SQUARED.

    w = mean_i(distance), at least FLOOR; b_gen is 1 without a table.
    """
    elements = batch.to(tl.float64) * per_sample
    total = tl.zeros((ROWS,), tl.float64)
    first = 0
    while first < batch:
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = row < batch
        w = row_sums(slots, row, mask, chunks, ROWS, COLUMNS) / per_sample
        # A comparison and no maximum, so that NaN stays.
        w = tl.where(w < FLOOR, FLOOR, w)
        total += tl.where(mask, row_sums(slots + programs, row, mask, chunks, ROWS, COLUMNS) / w, 0.0)
        factor = tl.full((ROWS,), 2.0 if SQUARED else 1.0, tl.float64) / (w * elements)
        if table_b is not None:
            t_gen = tl.load(timesteps_gen + row, mask=mask, other=0)
            factor *= entry(table_b, t_gen, length).to(tl.float64)
        tl.store(scale + row, factor.to(tl.float32), mask=mask)
        first += ROWS
    tl.store(loss, (tl.sum(total) / elements).to(tl.float32))


def tdm_loss(
    x0: Tensor,
    x0_teacher: Tensor,
    x0_uncond: Tensor,
    x0_fake: Tensor,
    cfg: Tensor | None,
    cfg_value: float,
    huber_c: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(loss, residual, scale)` from latents `[B, ...]`; `cfg` float32 `[B]`, or None for `cfg_value`.

    The gradient of the float32 scalar `loss` to x0 is residual * scale: `residual` `[B, ...]` (empty without
    `with_gradient`), `scale` float32 `[B]`.
    """
    loss, residual, scale = loss_outputs(x0, residual_dtype(x0.dtype, huber_c is not None), with_gradient)
    if x0.numel() == 0:
        return loss.fill_(float("nan")), residual, scale.fill_(float("nan"))
    per_sample, chunks, grid = grid_of(x0, BLOCK * RUNS)
    latents, strides, elements = zip(*map(rows, (x0, x0_teacher, x0_uncond, x0_fake)), strict=True)
    slots = torch.empty(2, *grid, dtype=torch.float64, device=x0.device)
    with on_device(x0):
        _x0_kernel[grid](
            *latents, residual if with_gradient else None, slots, *_settings(cfg, cfg_value, huber_c),
            *strides, per_sample, chunks, *grid, *elements, BLOCK, RUNS, **ROUND_AS_WRITTEN,
        )  # fmt: skip
        _finish(slots, loss, scale, (None, None, 0), x0.shape[0], per_sample, chunks, huber_c)
    return loss, residual, scale


def tdm_loss_from_outputs(
    model_output: Tensor,
    sample: Tensor,
    noisy: Tensor,
    out_teacher: Tensor,
    out_uncond: Tensor,
    out_fake: Tensor,
    a: Tensor,
    b: Tensor,
    t_gen: Tensor,
    t: Tensor,
    cfg: Tensor | None,
    cfg_value: float,
    huber_c: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`tdm_loss` from raw outputs `[B, ...]`, with float32 tables `a`, `b` `[N]` and int64 timesteps `[B]`."""
    dtype = residual_dtype(model_output.dtype, huber_c is not None)
    loss, residual, scale = loss_outputs(model_output, dtype, with_gradient)
    if model_output.numel() == 0:
        return loss.fill_(float("nan")), residual, scale.fill_(float("nan"))
    per_sample, chunks, grid = grid_of(model_output, BLOCK * RUNS)
    given = (model_output, sample, noisy, out_teacher, out_uncond, out_fake)
    latents, strides, elements = zip(*map(rows, given), strict=True)
    slots = torch.empty(2, *grid, dtype=torch.float64, device=model_output.device)
    t_gen, t, length = t_gen.contiguous(), t.contiguous(), a.shape[0]
    with on_device(model_output):
        _outputs_kernel[grid](
            *latents, residual if with_gradient else None, slots, a, b, t_gen, t, length,
            *_settings(cfg, cfg_value, huber_c), *strides, per_sample, chunks, *grid, *elements,
            BLOCK, RUNS, **ROUND_AS_WRITTEN,
        )  # fmt: skip
        _finish(slots, loss, scale, (b, t_gen, length), model_output.shape[0], per_sample, chunks, huber_c)
    return loss, residual, scale


def _settings(cfg: Tensor | None, cfg_value: float, huber_c: float | None) -> tuple[object, ...]:
    """The kernels' arguments cfg, guidance, c and c_squared; None is a constant of the compiled kernel."""
    c_squared = None if huber_c is None else huber_c**2
    return None if cfg is None else cfg.contiguous(), float(cfg_value) - 1.0, huber_c, c_squared


def _finish(
    slots: Tensor,
    loss: Tensor,
    scale: Tensor,
    table: tuple[Tensor | None, Tensor | None, int],
    batch: int,
    per_sample: int,
    chunks: int,
    huber_c: float | None,
) -> None:
    _finish_kernel[(1,)](
        slots, loss, scale, *table, batch, per_sample, chunks, batch * chunks,
        huber_c is None, WEIGHT_FLOOR, ROWS, COLUMNS, **ROUND_AS_WRITTEN,
    )  # fmt: skip
