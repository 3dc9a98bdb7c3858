"""scale_gradient in Triton: the backward of every loss, whose forward has left the gradient up to a factor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdm_fast.kernels._latents import BLOCK, ROUND_AS_WRITTEN, grid_of, load, on_device, place
from tdm_fast.ops._rows import rows


@triton.jit(do_not_specialize=["chunks"])
def _scale_gradient_kernel(
    residual,
    scale,
    grad_output,
    gradient,
    residual_stride,
    grad_stride,
    per_sample,
    chunks,
    RESIDUAL_ELEMENT: tl.constexpr,
    GRAD_ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gradient = residual * (scale * grad_output)."""
    index, start = place(chunks, BLOCK)
    factor = tl.load(scale + index)
    within = start + tl.arange(0, BLOCK)
    mask = within < per_sample
    upstream = load(grad_output, index, grad_stride, within, mask, GRAD_ELEMENT)
    value = load(residual, index, residual_stride, within, mask, RESIDUAL_ELEMENT) * (factor * upstream)
    tl.store(gradient + index * per_sample + within, value.to(gradient.dtype.element_ty), mask=mask)


def scale_gradient(residual: Tensor, scale: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient `[B, ...]` in `dtype`, contiguous.

    `residual` is `[B, ...]`, `scale` float32 `[B]`, `grad_output` float32, a scalar, `[B]` or `[B, ...]`.
    """
    gradient = torch.empty(residual.shape, dtype=dtype, device=residual.device)
    if residual.numel() == 0:
        return gradient
    per_sample, chunks, grid = grid_of(residual, BLOCK)
    source, source_stride, source_element = rows(residual)
    # One number for all, or one per sample, is a latent that repeats it.
    if grad_output.ndim == 0:
        upstream, grad_stride, grad_element = grad_output, 0, 0
    elif grad_output.ndim == 1:
        upstream, grad_stride, grad_element = grad_output, grad_output.stride(0), 0
    else:
        upstream, grad_stride, grad_element = rows(grad_output)
    with on_device(residual):
        _scale_gradient_kernel[grid](
            source, scale.contiguous(), upstream, gradient, source_stride, grad_stride, per_sample, chunks,
            source_element, grad_element, BLOCK, **ROUND_AS_WRITTEN,
        )  # fmt: skip
    return gradient
