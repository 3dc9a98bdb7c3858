"""Pseudo-Huber loss, sqrt(d^2 + c^2) - c, with a weight per sample."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tdm_fast.ops._checks import one_per_sample, positive, same_shape, sample_mean
from tdm_fast.schedule import compute_dtype, per_sample

Reduction = Literal["mean", "sum", "none", "per_sample"]


def pseudo_huber(
    input: Tensor,
    target: Tensor,
    *,
    c: float = 1e-3,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """weight * (sqrt((input - target)^2 + c^2) - c), reduced; gradients to input and target.

    `input` and `target` are `[B, ...]` of any floating dtype, `weight` `[B]` multiplies its sample. "mean" divides by
    the number of elements, "per_sample" `[B]` is the mean within a sample, "none" keeps the shape. The result is
    float32 (float64 if an input is). Raises ValueError for shapes that differ, `c` not above 0 or an unknown
    `reduction`.
    """
    same_shape("input", input, "target", target)
    positive("c", c)
    dtype = compute_dtype(input, target)
    values = ((input.to(dtype) - target.to(dtype)) ** 2 + c**2).sqrt() - c
    if weight is not None:
        one_per_sample("weight", weight, input)
        values = values * per_sample(weight.detach().to(dtype), input.ndim)
    if reduction == "none":
        return values
    if reduction == "per_sample":
        return sample_mean(values)
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        return values.mean()
    raise ValueError(f"reduction is {reduction!r}; it must be 'mean', 'sum', 'none' or 'per_sample'")
