"""Pseudo-Huber loss, sqrt(d^2 + c^2) - c, with a weight per sample."""

from __future__ import annotations

import importlib
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tdm_fast.ops import _dispatch, _residual
from tdm_fast.ops._checks import (
    finite_positive,
    float_vector,
    one_per_sample,
    same_latents,
    sample_mean,
    wants_gradient,
)
from tdm_fast.ops._rows import as_rows
from tdm_fast.schedule import compute_dtype, per_sample

Reduction = Literal["mean", "sum", "none", "per_sample"]


def pseudo_huber(
    input: Tensor,
    target: Tensor,
    *,
    c: float = 1e-3,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    backend: str | None = None,
) -> Tensor:
    """weight * (sqrt((input - target)^2 + c^2) - c), reduced; gradients to input and target.

    `input` and `target` are `[B, ...]`, strided or not, float32, bfloat16 or float16, also mixed (float64 runs the
    definition), `weight` `[B]` multiplies its sample. "mean" divides by the number of elements, "per_sample" `[B]` is
    the mean within a sample, "none" keeps the shape. The result is float32 (float64 if an input is), the gradients in
    their inputs' dtypes; differentiable once. `backend` forces one of "cpp", "cuda", "triton", "torch". Raises
    ValueError for shapes, dtypes or devices that differ, `c` not above 0, an unknown `reduction` and a backend that
    cannot run here.
    """
    same_latents("target", target, input=input)
    finite_positive("c", c)
    if weight is not None:
        one_per_sample("weight", weight, input)
        weight = weight.detach()
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean', 'sum', 'none' or 'per_sample'")
    gradient = wants_gradient(input, target)
    inputs = (input, target, c, weight, reduction, gradient, _dispatch.check_backend(backend))
    return _residual.loss_of_difference(_pseudo_huber, _run_pseudo_huber, gradient, *inputs)


def _stored(input: Tensor, target: Tensor) -> torch.dtype:
    """The residual's dtype: both may get a gradient, so it serves either."""
    if torch.float64 in (input.dtype, target.dtype):
        return torch.float64
    return input.dtype if input.dtype == target.dtype else torch.float32


def _definition(
    input: Tensor, target: Tensor, c: float, weight: Tensor | None, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(input, target)
    error = input.to(dtype) - target.to(dtype)
    root = (error**2 + c**2).sqrt()
    values, scale = root - c, error.new_ones(len(input))
    if weight is not None:
        scale = weight.to(dtype)
        values = values * per_sample(scale, input.ndim)
    residual = _residual.kept(error / root, _stored(input, target), with_gradient)
    if reduction == "none":
        return values.contiguous(), residual, scale.clone()
    if reduction == "per_sample":
        return sample_mean(values).clone(), residual, scale / max(input[:1].numel(), 1)
    if reduction == "sum":
        return values.sum(), residual, scale.clone()
    return values.mean(), residual, scale / max(input.numel(), 1)


def _rows_and_floats(input: Tensor, target: Tensor, c: float, weight: Tensor | None, *options: Any) -> tuple[Any, ...]:
    return as_rows(input), as_rows(target), c, None if weight is None else float_vector(weight), *options


def _cpp(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.tdm_fast_cpu.pseudo_huber(*_rows_and_floats(*arguments))


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.tdm_fast_cuda.pseudo_huber(*_rows_and_floats(*arguments))


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    kernel = importlib.import_module("tdm_fast.kernels.pseudo_huber").pseudo_huber
    return kernel(*_rows_and_floats(*arguments))


_dispatch.register("pseudo_huber", {"torch": _definition, "cpp": _cpp, "cuda": _cuda, "triton": _triton})


def _run_pseudo_huber(
    input: Tensor, target: Tensor, c: float, weight: Tensor | None, reduction: str, with_gradient: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    run = _dispatch.select("pseudo_huber", backend, input, target)
    return run(input, target, c, weight, reduction, with_gradient)


_pseudo_huber = torch.library.custom_op("tdm_fast::pseudo_huber", _run_pseudo_huber, mutates_args=())


@_pseudo_huber.register_fake
def _(
    input: Tensor, target: Tensor, c: float, weight: Tensor | None, reduction: str, with_gradient: bool, backend: str
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(input, target)
    _, residual, scale = _residual.fake_outputs(input, dtype, _stored(input, target), with_gradient)
    shape = {"none": input.shape, "per_sample": input.shape[:1]}.get(reduction, ())
    return input.new_empty(shape, dtype=dtype), residual, scale


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: _residual.LossOutputs) -> None:
    _residual.save_for_backward(ctx, inputs, output)
    ctx.target_dtype = inputs[1].dtype


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    residual, scale = ctx.saved_tensors
    to_input = to_target = None
    if grad is not None and ctx.needs_input_grad[0]:
        to_input = _residual.scale_gradient(residual, scale, grad, ctx.dtype, ctx.backend)
    if grad is not None and ctx.needs_input_grad[1]:
        to_target = _residual.scale_gradient(residual, -scale, grad, ctx.target_dtype, ctx.backend)
    return to_input, to_target, *[None] * 5


_pseudo_huber.register_autograd(_backward, setup_context=_save_for_backward)
