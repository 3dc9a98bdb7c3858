"""The student's loss: the guided teacher's score against the fake one's at one noisy sample (arXiv 2503.06674)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from tdm_fast.ops import _dispatch, _residual
from tdm_fast.ops._checks import (
    at_timesteps,
    detached,
    finite_positive,
    float_vector,
    guidance,
    in_tables,
    one_per_sample,
    same_latents,
    sample_mean,
    schedule_on,
    wants_gradient,
)
from tdm_fast.ops._residual import LossOutputs
from tdm_fast.ops._rows import as_rows
from tdm_fast.schedule import Schedule, compute_dtype, per_sample

WEIGHT_FLOOR = 1e-8
"""Least value of the loss's normaliser, so that a batch in which everything agrees has a loss of 0 and not of NaN."""


def tdm_loss(
    x0: Tensor,
    x0_teacher: Tensor,
    x0_uncond: Tensor,
    x0_fake: Tensor,
    *,
    cfg: float | Tensor,
    huber_c: float | None = 1e-3,
    backend: str | None = None,
) -> Tensor:
    """Scalar loss of the student's prediction `x0`, with gradient to x0 only.

        d = (x0_teacher - x0_fake) + (cfg - 1) * (x0_teacher - x0_uncond)             target = stopgrad(x0 + d)
        w = max(mean_i |x0 - (x0_teacher + (cfg - 1) * (x0_teacher - x0_uncond))|, 1e-8)   per sample, no gradient
        loss = mean( (sqrt((x0 - target)^2 + c^2) - c) / w ),   or mean( (x0 - target)^2 / w ) for `huber_c` None

    All four are latents `[B, ...]`, strided or not, float32, bfloat16 or float16, also mixed (float64 runs the
    definition); `cfg` is a float or a tensor `[B]`. Computed in float32, a float32 scalar (float64 if a latent is);
    the gradient is in x0's dtype. Loss and gradient are one pass over the inputs; differentiable once. `backend` forces
    one of "cpp", "cuda", "triton", "torch". Raises ValueError for shapes, dtypes or devices that differ, a `huber_c`
    that is not above 0 or not finite and a backend that cannot run here.
    """
    same_latents("x0", x0, x0_teacher=x0_teacher, x0_uncond=x0_uncond, x0_fake=x0_fake)
    if huber_c is not None:
        finite_positive("huber_c", huber_c)
    scores = detached(x0_teacher), detached(x0_uncond), detached(x0_fake)
    gradient = wants_gradient(x0)
    inputs = (x0, *scores, *guidance(cfg, x0), huber_c, gradient, _dispatch.check_backend(backend))
    return _residual.loss(_tdm_loss, _run_tdm_loss, gradient, *inputs)


def tdm_loss_from_outputs(
    model_output: Tensor,
    sample: Tensor,
    noisy: Tensor,
    out_teacher: Tensor,
    out_uncond: Tensor,
    out_fake: Tensor,
    *,
    schedule: Schedule,
    t_gen: Tensor,
    t: Tensor,
    cfg: float | Tensor,
    huber_c: float | None = 1e-3,
    backend: str | None = None,
) -> Tensor:
    """`tdm_loss` from raw outputs, with gradient to `model_output` (the student's, for `sample` at `t_gen`) only.

    `out_teacher`, `out_uncond` and `out_fake` are the scores' outputs for `noisy` at `t`; since all of them saw
    the same latents, d = b_t * [(out_teacher - out_fake) + (cfg - 1) * (out_teacher - out_uncond)]. Latents `[B, ...]`,
    timesteps int64 `[B]`; nothing in x0 space is stored. Raises ValueError as `tdm_loss` does and, on the CPU, for
    timesteps outside the schedule. On a GPU, where looking at them would stall it, those give NaN (in "torch" a device
    assertion).
    """
    others = {"noisy": noisy, "out_teacher": out_teacher, "out_uncond": out_uncond, "out_fake": out_fake}
    same_latents("sample", sample, model_output=model_output, **others)
    for name, timesteps in (("t_gen", t_gen), ("t", t)):
        one_per_sample(name, timesteps, sample, integer=True)
    if huber_c is not None:
        finite_positive("huber_c", huber_c)
    here = schedule_on(schedule, sample)
    latents = (model_output, *(detached(other) for other in (sample, *others.values())))
    gradient = wants_gradient(model_output)
    options = (*guidance(cfg, sample), huber_c, gradient, _dispatch.check_backend(backend))
    inputs = (*latents, here.a, here.b, t_gen, t, *options)
    return _residual.loss(_tdm_loss_from_outputs, _run_tdm_loss_from_outputs, gradient, *inputs)


def _guided(teacher: Tensor, uncond: Tensor, cfg: Tensor | None, cfg_value: float, dtype: torch.dtype) -> Tensor:
    scale = cfg_value - 1.0 if cfg is None else per_sample(cfg.to(dtype) - 1, teacher.ndim)
    return teacher + scale * (teacher - uncond)


def _normalised(
    x0: Tensor, guided: Tensor, difference: Tensor, slope: Tensor | float, huber_c: float | None
) -> LossOutputs:
    """The loss, the residual and the scale; `slope` is the derivative of x0 by what the gradient goes to."""
    weight = sample_mean((x0.detach() - guided).abs()).clamp(min=WEIGHT_FLOOR)
    # x0 - stopgrad(x0 + d) is -d with the gradient of x0; written so that adding and taking x0 away costs no digits.
    error = (x0 - x0.detach()) - difference
    if huber_c is None:
        values, residual = error**2, error
        slope = 2 * slope
    else:
        root = (error**2 + huber_c**2).sqrt()
        values, residual = root - huber_c, error / root
    loss = (values / per_sample(weight, x0.ndim)).mean()
    return loss, residual, slope / (weight * x0.numel())


def _definition(
    x0: Tensor,
    x0_teacher: Tensor,
    x0_uncond: Tensor,
    x0_fake: Tensor,
    cfg: Tensor | None,
    cfg_value: float,
    huber_c: float | None,
    with_gradient: bool,
) -> LossOutputs:
    dtype = compute_dtype(x0, x0_teacher, x0_uncond, x0_fake)
    teacher, uncond, fake = (other.to(dtype) for other in (x0_teacher, x0_uncond, x0_fake))
    guided = _guided(teacher, uncond, cfg, cfg_value, dtype)
    loss, residual, scale = _normalised(x0.to(dtype), guided, guided - fake, 1.0, huber_c)
    stored = _residual.residual_dtype(dtype, x0.dtype, bounded=huber_c is not None)
    return loss, _residual.kept(residual, stored, with_gradient), scale


def _definition_from_outputs(
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
) -> LossOutputs:
    dtype = compute_dtype(model_output, sample, noisy, out_teacher, out_uncond, out_fake)
    ndim = sample.ndim
    a_gen, b_gen = at_timesteps((a, b), t_gen, ndim, dtype)
    a_t, b_t = at_timesteps((a, b), t, ndim, dtype)
    x0 = a_gen * sample.to(dtype) + b_gen * model_output.to(dtype)
    teacher, uncond, fake = (other.to(dtype) for other in (out_teacher, out_uncond, out_fake))
    out_guided = _guided(teacher, uncond, cfg, cfg_value, dtype)
    guided, difference = a_t * noisy.to(dtype) + b_t * out_guided, b_t * (out_guided - fake)
    loss, residual, scale = _normalised(x0, guided, difference, b_gen.reshape(-1), huber_c)
    stored = _residual.residual_dtype(dtype, model_output.dtype, bounded=huber_c is not None)
    return loss, _residual.kept(residual, stored, with_gradient), scale


def _cpp(*arguments: Any) -> LossOutputs:
    return torch.ops.tdm_fast_cpu.tdm_loss(*_native_arguments(arguments, 4, 4))


def _cuda(*arguments: Any) -> LossOutputs:
    return torch.ops.tdm_fast_cuda.tdm_loss(*_native_arguments(arguments, 4, 4))


def _triton(*arguments: Any) -> LossOutputs:
    kernel = importlib.import_module("tdm_fast.kernels.tdm_loss").tdm_loss
    return kernel(*_native_arguments(arguments, 4, 4))


def _cpp_from_outputs(*arguments: Any) -> LossOutputs:
    return torch.ops.tdm_fast_cpu.tdm_loss_from_outputs(*_native_arguments(arguments, 6, 10))


def _cuda_from_outputs(*arguments: Any) -> LossOutputs:
    return torch.ops.tdm_fast_cuda.tdm_loss_from_outputs(*_native_arguments(arguments, 6, 10))


def _triton_from_outputs(*arguments: Any) -> LossOutputs:
    kernel = importlib.import_module("tdm_fast.kernels.tdm_loss").tdm_loss_from_outputs
    return kernel(*_native_arguments(arguments, 6, 10))


def _native_arguments(arguments: tuple[Any, ...], latents: int, cfg: int) -> list[Any]:
    """The arguments with their first `latents` as rows, what lies between contiguous, and number `cfg` as float32."""
    changed: list[Any] = [as_rows(tensor) for tensor in arguments[:latents]]
    changed += [tensor.contiguous() for tensor in arguments[latents:cfg]]
    changed.append(None if arguments[cfg] is None else float_vector(arguments[cfg]))
    return [*changed, *arguments[cfg + 1 :]]


_dispatch.register("tdm_loss", {"torch": _definition, "cpp": _cpp, "cuda": _cuda, "triton": _triton})
_dispatch.register(
    "tdm_loss_from_outputs",
    {
        "torch": _definition_from_outputs,
        "cpp": _cpp_from_outputs,
        "cuda": _cuda_from_outputs,
        "triton": _triton_from_outputs,
    },
)


def _run_tdm_loss(
    x0: Tensor,
    x0_teacher: Tensor,
    x0_uncond: Tensor,
    x0_fake: Tensor,
    cfg: Tensor | None,
    cfg_value: float,
    huber_c: float | None,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = _dispatch.select("tdm_loss", backend, x0, x0_teacher, x0_uncond, x0_fake)
    return run(x0, x0_teacher, x0_uncond, x0_fake, cfg, cfg_value, huber_c, with_gradient)


_tdm_loss = torch.library.custom_op("tdm_fast::tdm_loss", _run_tdm_loss, mutates_args=())


@_tdm_loss.register_fake
def _(
    x0: Tensor,
    x0_teacher: Tensor,
    x0_uncond: Tensor,
    x0_fake: Tensor,
    cfg: Tensor | None,
    cfg_value: float,
    huber_c: float | None,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(x0, x0_teacher, x0_uncond, x0_fake)
    stored = _residual.residual_dtype(dtype, x0.dtype, bounded=huber_c is not None)
    return _residual.fake_outputs(x0, dtype, stored, with_gradient)


def _run_tdm_loss_from_outputs(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    in_tables(a.shape[0], t_gen=t_gen, t=t)
    latents = (model_output, sample, noisy, out_teacher, out_uncond, out_fake)
    run = _dispatch.select("tdm_loss_from_outputs", backend, *latents)
    return run(*latents, a, b, t_gen, t, cfg, cfg_value, huber_c, with_gradient)


_tdm_loss_from_outputs = torch.library.custom_op(
    "tdm_fast::tdm_loss_from_outputs", _run_tdm_loss_from_outputs, mutates_args=()
)


@_tdm_loss_from_outputs.register_fake
def _(
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
    backend: str,
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(model_output, sample, noisy, out_teacher, out_uncond, out_fake)
    stored = _residual.residual_dtype(dtype, model_output.dtype, bounded=huber_c is not None)
    return _residual.fake_outputs(model_output, dtype, stored, with_gradient)


for _op in (_tdm_loss, _tdm_loss_from_outputs):
    _op.register_autograd(_residual.backward, setup_context=_residual.save_for_backward)
