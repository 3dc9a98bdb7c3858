"""renoise in Triton: the noise is made where it is added (arXiv 2503.06674).

The first kernel writes noisy and x0 and sums, per chunk, the squares that the importance weight compares; the second
adds the chunks up.
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
    entry_or_clean,
    grid_of,
    load,
    on_device,
    place,
    row_sums,
)
from tdm_fast.kernels._philox import DRAW, draw_of, draw_words, normals
from tdm_fast.ops._rows import rows
from tdm_fast.philox import Purpose


@triton.jit(do_not_specialize=[*DRAW, "length", "chunks", "programs"])
def _renoise_kernel(
    sample,
    model_output,
    noise,
    noisy,
    x0,
    slots,
    table_a,
    table_b,
    table_c,
    table_d,
    table_alpha,
    table_sigma,
    timesteps_gen,
    timesteps_mid,
    timesteps,
    length,
    seed_tensor,
    iteration_tensor,
    seed_low,
    seed_high,
    iteration,
    stream,
    sample_offset,
    sample_stride,
    output_stride,
    noise_stride,
    per_sample,
    chunks,
    programs,
    SAMPLE_ELEMENT: tl.constexpr,
    OUTPUT_ELEMENT: tl.constexpr,
    NOISE_ELEMENT: tl.constexpr,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
    RUNS: tl.constexpr,
):
    """One chunk: x0 and eps at t_gen, along them to t_mid, from there with noise to t."""
    index, start = place(chunks, BLOCK * RUNS)
    t_gen, t_mid, t = tl.load(timesteps_gen + index), tl.load(timesteps_mid + index), tl.load(timesteps + index)
    a, b = entry(table_a, t_gen, length), entry(table_b, t_gen, length)
    c, d = entry(table_c, t_gen, length), entry(table_d, t_gen, length)
    alpha_mid = entry_or_clean(table_alpha, t_mid, length, 1.0)
    sigma_mid = entry_or_clean(table_sigma, t_mid, length, 0.0)
    alpha, sigma = entry_or_clean(table_alpha, t, length, 1.0), entry_or_clean(table_sigma, t, length, 0.0)
    # alpha_mid is 0 at zero-terminal SNR only, where t can be no other timestep and nothing is added.
    ratio = tl.where(alpha_mid == 0.0, 1.0, tl.div_rn(alpha, alpha_mid))
    kept = ratio * sigma_mid
    # Rounding takes the difference below 0 at t = t_mid. A comparison and no maximum, so that NaN stays.
    variance = sigma * sigma - kept * kept
    beta = tl.sqrt_rn(tl.where(variance < 0.0, 0.0, variance))
    if noise is None:
        k0, k1, count = draw_of(seed_tensor, iteration_tensor, seed_low, seed_high, iteration)
    noise_squares, mixed_squares = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    # Not unrolled: Philox is ten rounds of straight code as it is.
    for run in range(RUNS):
        first = start + run * BLOCK
        within = first + tl.arange(0, BLOCK)
        mask = within < per_sample
        x = load(sample, index, sample_stride, within, mask, SAMPLE_ELEMENT)
        out = load(model_output, index, output_stride, within, mask, OUTPUT_ELEMENT)
        if noise is None:
            n = normals(first, sample_offset + index, k0, k1, count, stream, PURPOSE, BLOCK)
        else:
            n = load(noise, index, noise_stride, within, mask, NOISE_ELEMENT)
        clean, eps = a * x + b * out, c * x + d * out
        fresh = beta * n
        moved = ratio * (alpha_mid * clean + sigma_mid * eps) + fresh
        mixed = kept * eps + fresh
        tl.store(noisy + index * per_sample + within, moved.to(noisy.dtype.element_ty), mask=mask)
        tl.store(x0 + index * per_sample + within, clean.to(x0.dtype.element_ty), mask=mask)
        noise_squares += tl.where(mask, n * n, 0.0)
        mixed_squares += tl.where(mask, mixed * mixed, 0.0)
    tl.store(slots + tl.program_id(0), tl.sum(noise_squares.to(tl.float64)))
    tl.store(slots + programs + tl.program_id(0), tl.sum(mixed_squares.to(tl.float64)))


@triton.jit(do_not_specialize=["length", "batch", "per_sample", "chunks", "programs"])
def _log_weight_kernel(
    slots,
    log_weight,
    table_sigma,
    timesteps,
    length,
    batch,
    per_sample,
    chunks,
    programs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """log_weight = (mean n^2 - mean m^2) / 2; the slots hold the squares of n and of sigma m."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    mask = row < batch
    t = tl.load(timesteps + row, mask=mask, other=0)
    sigma = entry_or_clean(table_sigma, t, length, 0.0).to(tl.float64)
    of_noise = row_sums(slots, row, mask, chunks, ROWS, COLUMNS)
    of_mixed = row_sums(slots + programs, row, mask, chunks, ROWS, COLUMNS)
    value = (of_noise / per_sample - of_mixed / per_sample / (sigma * sigma)) * 0.5
    tl.store(log_weight + row, value.to(tl.float32), mask=mask)


def renoise(
    sample: Tensor,
    model_output: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    t_gen: Tensor,
    t_mid: Tensor,
    t: Tensor,
    seed_tensor: Tensor | None,
    iteration_tensor: Tensor | None,
    seed: int,
    iteration: int,
    stream: int,
    sample_offset: int,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(noisy, x0, log_weight)`: latents `[B, ...]` in sample's dtype, contiguous, and float32 `[B]`.

    Latents `[B, ...]`, contiguous float32 tables `[N]`, int64 timesteps `[B]`; `seed_tensor` and `iteration_tensor`,
    0-d int64, stand in place of the ints where given; `noise` None makes Philox's of purpose RENOISE.
    """
    noisy, x0 = (torch.empty(sample.shape, dtype=sample.dtype, device=sample.device) for _ in range(2))
    log_weight = torch.empty(sample.shape[:1], dtype=torch.float32, device=sample.device)
    if sample.numel() == 0:
        return noisy, x0, log_weight.fill_(float("nan"))
    batch = sample.shape[0]
    per_sample, chunks, grid = grid_of(sample, BLOCK * RUNS)
    x, x_stride, x_element = rows(sample)
    out, out_stride, out_element = rows(model_output)
    given, noise_stride, noise_element = (None, 0, 0) if noise is None else rows(noise)
    slots = torch.empty(2, *grid, dtype=torch.float64, device=sample.device)
    t_gen, t_mid, t, length = t_gen.contiguous(), t_mid.contiguous(), t.contiguous(), a.shape[0]
    with on_device(sample):
        _renoise_kernel[grid](
            x, out, given, noisy, x0, slots, a, b, c, d, alpha, sigma,
            t_gen, t_mid, t, length,
            *draw_words(seed_tensor, iteration_tensor, seed, iteration, stream, sample_offset),
            x_stride, out_stride, noise_stride, per_sample, chunks, *grid,
            x_element, out_element, noise_element, int(Purpose.RENOISE), BLOCK, RUNS, **ROUND_AS_WRITTEN,
        )  # fmt: skip
        _log_weight_kernel[(triton.cdiv(batch, ROWS),)](
            slots, log_weight, sigma, t, length, batch, per_sample, chunks, *grid, ROWS, COLUMNS, **ROUND_AS_WRITTEN
        )
    return noisy, x0, log_weight
