"""ode_step in Triton: one program per chunk of one sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
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
    per_sample,
    chunks,
    BLOCK: tl.constexpr,
):
    """result = (alpha a + sigma c) sample + (alpha b + sigma d) model_output, or x0 if t_next is -1."""
    program = tl.program_id(0)
    index = program // chunks
    t = tl.load(timesteps + index)
    t_next = tl.load(next_timesteps + index)
    valid = (t >= 0) & (t < length) & (t_next >= -1) & (t_next < length)
    # Outside the tables nothing may be read: the result is NaN there.
    nan = float("nan")
    a = tl.load(table_a + t, mask=valid, other=nan)
    b = tl.load(table_b + t, mask=valid, other=nan)
    c = tl.load(table_c + t, mask=valid, other=nan)
    d = tl.load(table_d + t, mask=valid, other=nan)
    has_next = valid & (t_next >= 0)
    alpha = tl.load(table_alpha + t_next, mask=has_next, other=nan)
    sigma = tl.load(table_sigma + t_next, mask=has_next, other=nan)
    sample_scale = tl.where(has_next, alpha * a + sigma * c, a)
    output_scale = tl.where(has_next, alpha * b + sigma * d, b)

    # 64-bit, since a batch of video latents can have more than 2^31 elements.
    within = (program % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offsets = index.to(tl.int64) * per_sample + within
    mask = within < per_sample
    x = tl.load(sample + offsets, mask=mask).to(tl.float32)
    out = tl.load(model_output + offsets, mask=mask).to(tl.float32)
    value = x * sample_scale + out * output_scale
    tl.store(result + offsets, value.to(result.dtype.element_ty), mask=mask)


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
    """Launch the kernel on contiguous tensors: latents `[B, ...]`, float32 tables `[N]`, int64 timesteps `[B]`."""
    result = torch.empty_like(sample)
    if sample.numel() == 0:
        return result
    per_sample = sample.numel() // sample.shape[0]
    chunks = triton.cdiv(per_sample, _BLOCK)
    grid = (sample.shape[0] * chunks,)
    tables = (a, b, c, d, alpha, sigma)
    _ode_step_kernel[grid](
        sample, model_output, result, *tables, t, t_next, a.shape[0], per_sample, chunks, BLOCK=_BLOCK
    )
    return result
