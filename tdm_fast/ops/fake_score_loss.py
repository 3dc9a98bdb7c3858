"""The fake score's denoising loss on the student's samples, Min-SNR and importance weighted (arXiv 2503.06674)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from tdm_fast.ops import _dispatch, _residual
from tdm_fast.ops._checks import (
    at_timesteps,
    detached,
    float_vector,
    in_tables,
    one_per_sample,
    positive,
    same_latents,
    sample_mean,
    schedule_on,
    wants_gradient,
)
from tdm_fast.ops._residual import LossOutputs
from tdm_fast.ops._rows import as_rows
from tdm_fast.schedule import Schedule, compute_dtype


def fake_score_loss(
    x0_fake: Tensor,
    x0: Tensor,
    *,
    snr: Tensor,
    log_weight: Tensor | None = None,
    snr_gamma: float = 5.0,
    backend: str | None = None,
) -> Tensor:
    """mean_b( min(snr, snr_gamma) * exp(log_weight) * mean_i (x0_fake - x0)^2 ), a scalar with gradient to x0_fake.

    `x0_fake` and `x0` are latents `[B, ...]`, strided or not, float32, bfloat16 or float16, also mixed (float64 runs
    the definition), `snr` and `log_weight` `[B]` (None: no importance weight). Computed in float32, a float32 scalar
    (float64 if a latent is); the gradient is in x0_fake's dtype. Loss and gradient are one pass over the inputs;
    differentiable once. `backend` forces one of "cpp", "cuda", "triton", "torch". Raises ValueError for shapes, dtypes
    or devices that differ, an `snr_gamma` that is not above 0 (infinity turns the cap off) and a backend that cannot
    run here.
    """
    same_latents("x0", x0, x0_fake=x0_fake)
    one_per_sample("snr", snr, x0)
    log_weight = _checked_options(x0, log_weight, snr_gamma)
    gradient = wants_gradient(x0_fake)
    options = (snr.detach(), log_weight, snr_gamma, gradient, _dispatch.check_backend(backend))
    return _residual.loss(_fake_score_loss, _run_fake_score_loss, gradient, x0_fake, detached(x0), *options)


def fake_score_loss_from_outputs(
    model_output: Tensor,
    noisy: Tensor,
    x0: Tensor,
    *,
    schedule: Schedule,
    t: Tensor,
    log_weight: Tensor | None = None,
    snr_gamma: float = 5.0,
    backend: str | None = None,
) -> Tensor:
    """`fake_score_loss` from the fake score's raw output at `noisy`, timestep `t` (int64 `[B]`): a scalar.

    The gradient reaches `model_output` alone. Raises ValueError as `fake_score_loss` does and, on the CPU, for
    timesteps outside the schedule. On a GPU, where looking at them would stall it, those give NaN (in "torch" a device
    assertion).
    """
    same_latents("noisy", noisy, model_output=model_output, x0=x0)
    one_per_sample("t", t, noisy, integer=True)
    log_weight = _checked_options(noisy, log_weight, snr_gamma)
    here = schedule_on(schedule, noisy)
    gradient = wants_gradient(model_output)
    options = (log_weight, snr_gamma, gradient, _dispatch.check_backend(backend))
    inputs = (model_output, detached(noisy), detached(x0), here.a, here.b, here.snr, t, *options)
    return _residual.loss(_fake_score_loss_from_outputs, _run_fake_score_loss_from_outputs, gradient, *inputs)


def _checked_options(latents: Tensor, log_weight: Tensor | None, snr_gamma: float) -> Tensor | None:
    positive("snr_gamma", snr_gamma)
    if log_weight is None:
        return None
    one_per_sample("log_weight", log_weight, latents)
    return detached(log_weight)


def _weighted(
    error: Tensor, snr: Tensor, log_weight: Tensor | None, snr_gamma: float, slope: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The loss and the scale; `slope` is the derivative of x0_fake by what the gradient goes to."""
    weight = snr.to(error.dtype).clamp(max=snr_gamma)
    if log_weight is not None:
        weight = weight * log_weight.to(error.dtype).exp()
    return (weight * sample_mean(error**2)).mean(), slope * weight * (2 / max(error.numel(), 1))


def _definition(
    x0_fake: Tensor, x0: Tensor, snr: Tensor, log_weight: Tensor | None, snr_gamma: float, with_gradient: bool
) -> LossOutputs:
    dtype = compute_dtype(x0_fake, x0)
    error = x0_fake.to(dtype) - x0.to(dtype)
    loss, scale = _weighted(error, snr, log_weight, snr_gamma, 1.0)
    stored = _residual.residual_dtype(dtype, x0_fake.dtype, bounded=False)
    return loss, _residual.kept(error, stored, with_gradient), scale


def _definition_from_outputs(
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
) -> LossOutputs:
    # As schedule.predict and then fake_score_loss: float64 in x0 alone leaves x0_fake to float32.
    predicted, dtype = compute_dtype(noisy, model_output), compute_dtype(noisy, model_output, x0)
    a_t, b_t = at_timesteps((a, b), t, noisy.ndim, predicted)
    x0_fake = a_t * noisy.to(predicted) + b_t * model_output.to(predicted)
    error = x0_fake.to(dtype) - x0.to(dtype)
    loss, scale = _weighted(error, snr[t], log_weight, snr_gamma, b_t.reshape(-1).to(dtype))
    stored = _residual.residual_dtype(dtype, model_output.dtype, bounded=False)
    return loss, _residual.kept(error, stored, with_gradient), scale


def _rows_and_floats(
    x0_fake: Tensor, x0: Tensor, snr: Tensor, log_weight: Tensor | None, snr_gamma: float, with_gradient: bool
) -> tuple[Any, ...]:
    weight = None if log_weight is None else float_vector(log_weight)
    return as_rows(x0_fake), as_rows(x0), float_vector(snr), weight, snr_gamma, with_gradient


def _cpp(*arguments: Any) -> LossOutputs:
    return torch.ops.tdm_fast_cpu.fake_score_loss(*_rows_and_floats(*arguments))


def _cuda(*arguments: Any) -> LossOutputs:
    return torch.ops.tdm_fast_cuda.fake_score_loss(*_rows_and_floats(*arguments))


def _triton(*arguments: Any) -> LossOutputs:
    kernel = importlib.import_module("tdm_fast.kernels.fake_score_loss").fake_score_loss
    return kernel(*_rows_and_floats(*arguments))


def _rows_and_floats_from_outputs(
    model_output: Tensor, noisy: Tensor, x0: Tensor, a: Tensor, b: Tensor, snr: Tensor, t: Tensor, *options: Any
) -> tuple[Any, ...]:
    latents = (as_rows(latent) for latent in (model_output, noisy, x0))
    log_weight, *others = options
    weight = None if log_weight is None else float_vector(log_weight)
    return *latents, a, b, snr, t.contiguous(), weight, *others


def _cpp_from_outputs(*arguments: Any) -> LossOutputs:
    return torch.ops.tdm_fast_cpu.fake_score_loss_from_outputs(*_rows_and_floats_from_outputs(*arguments))


def _cuda_from_outputs(*arguments: Any) -> LossOutputs:
    return torch.ops.tdm_fast_cuda.fake_score_loss_from_outputs(*_rows_and_floats_from_outputs(*arguments))


def _triton_from_outputs(*arguments: Any) -> LossOutputs:
    kernel = importlib.import_module("tdm_fast.kernels.fake_score_loss").fake_score_loss_from_outputs
    return kernel(*_rows_and_floats_from_outputs(*arguments))


_dispatch.register("fake_score_loss", {"torch": _definition, "cpp": _cpp, "cuda": _cuda, "triton": _triton})
_dispatch.register(
    "fake_score_loss_from_outputs",
    {
        "torch": _definition_from_outputs,
        "cpp": _cpp_from_outputs,
        "cuda": _cuda_from_outputs,
        "triton": _triton_from_outputs,
    },
)


def _run_fake_score_loss(
    x0_fake: Tensor,
    x0: Tensor,
    snr: Tensor,
    log_weight: Tensor | None,
    snr_gamma: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = _dispatch.select("fake_score_loss", backend, x0_fake, x0)
    return run(x0_fake, x0, snr, log_weight, snr_gamma, with_gradient)


_fake_score_loss = torch.library.custom_op("tdm_fast::fake_score_loss", _run_fake_score_loss, mutates_args=())


@_fake_score_loss.register_fake
def _(
    x0_fake: Tensor,
    x0: Tensor,
    snr: Tensor,
    log_weight: Tensor | None,
    snr_gamma: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(x0_fake, x0)
    stored = _residual.residual_dtype(dtype, x0_fake.dtype, bounded=False)
    return _residual.fake_outputs(x0_fake, dtype, stored, with_gradient)


def _run_fake_score_loss_from_outputs(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    in_tables(a.shape[0], t=t)
    run = _dispatch.select("fake_score_loss_from_outputs", backend, model_output, noisy, x0)
    return run(model_output, noisy, x0, a, b, snr, t, log_weight, snr_gamma, with_gradient)


_fake_score_loss_from_outputs = torch.library.custom_op(
    "tdm_fast::fake_score_loss_from_outputs", _run_fake_score_loss_from_outputs, mutates_args=()
)


@_fake_score_loss_from_outputs.register_fake
def _(
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
    backend: str,
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(model_output, noisy, x0)
    stored = _residual.residual_dtype(dtype, model_output.dtype, bounded=False)
    return _residual.fake_outputs(model_output, dtype, stored, with_gradient)


for _op in (_fake_score_loss, _fake_score_loss_from_outputs):
    _op.register_autograd(_residual.backward, setup_context=_residual.save_for_backward)
