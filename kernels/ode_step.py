"""ode_step in Triton: one program per chunk of one sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdm_fast.kernels._latents import BLOCK, ROUND_AS_WRITTEN, entry, grid_of, load, on_device, place
from tdm_fast.ops._rows import rows


@triton.jit(do_not_specialize=["length", "chunks"])
def _ode_step_kernel(
    sample,
    model_output,
    result,
    table_a,
    table_b,
    table_c,
    table_d,
    table_alpha,
    table_sigma,
    timesteps,
    next_timesteps,
    length,
    sample_stride,
    output_stride,
    per_sample,
    chunks,
    SAMPLE_ELEMENT: tl.constexpr,
    OUTPUT_ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """result = (alpha a + sigma c) sample + (alpha b + sigma d) model_output, or x0 if t_next is -1."""
    index, start = place(chunks, BLOCK)
    t = tl.load(timesteps + index)
    t_next = tl.load(next_timesteps + index)
    a, b = entry(table_a, t, length), entry(table_b, t, length)
    c, d = entry(table_c, t, length), entry(table_d, t, length)
    alpha, sigma = entry(table_alpha, t_next, length), entry(table_sigma, t_next, length)
    sample_scale = tl.where(t_next == -1, a, alpha * a + sigma * c)
    output_scale = tl.where(t_next == -1, b, alpha * b + sigma * d)

    within = start + tl.arange(0, BLOCK)
    mask = within < per_sample
    x = load(sample, index, sample_stride, within, mask, SAMPLE_ELEMENT)
    out = load(model_output, index, output_stride, within, mask, OUTPUT_ELEMENT)
    value = x * sample_scale + out * output_scale
    tl.store(result + index * per_sample + within, value.to(result.dtype.element_ty), mask=mask)


def ode_step(
    sample: Tensor,
    model_output: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    t: Tensor,
    t_next: Tensor,
) -> Tensor:
    """Launch the kernel: latents `[B, ...]`, contiguous float32 tables `[N]`, int64 timesteps `[B]`."""
    result = torch.empty_like(sample, memory_format=torch.contiguous_format)
    if sample.numel() == 0:
        return result
    per_sample, chunks, grid = grid_of(sample, BLOCK)
    x, x_stride, x_element = rows(sample)
    out, out_stride, out_element = rows(model_output)
    with on_device(sample):
        _ode_step_kernel[grid](
            x, out, result, a, b, c, d, alpha, sigma, t.contiguous(), t_next.contiguous(), a.shape[0],
            x_stride, out_stride, per_sample, chunks, x_element, out_element, BLOCK, **ROUND_AS_WRITTEN,
        )  # fmt: skip
    return result
