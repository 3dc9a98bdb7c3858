"""Noise a student's prediction up again: along its own trajectory to t_mid, with fresh noise from there to t."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from tdm_fast.ops import _dispatch
from tdm_fast.ops._checks import (
    at_timesteps,
    counter,
    detached,
    in_tables,
    one_per_sample,
    same_latents,
    sample_mean,
    schedule_on,
)
from tdm_fast.ops._rows import as_rows
from tdm_fast.philox import Purpose, check_stream, randn
from tdm_fast.schedule import Schedule, compute_dtype, per_sample


def renoise(
    sample: Tensor,
    model_output: Tensor,
    *,
    schedule: Schedule,
    t_gen: Tensor,
    t_mid: Tensor,
    t: Tensor,
    seed: int | Tensor,
    iteration: int | Tensor,
    stream: int = 0,
    sample_offset: int = 0,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(noisy, x0, log_weight)` from the student's raw output at `t_gen` (arXiv 2503.06674).

        x0, eps = the prediction at t_gen             x_mid = alpha_mid * x0 + sigma_mid * eps
        noisy = r * x_mid + beta * n                  r = alpha_t / alpha_mid, n ~ N(0, I)
        beta^2 = max(sigma_t^2 - (r * sigma_mid)^2, 0)
        log_weight = (mean n^2 - mean m^2) / 2        m = (r * sigma_mid * eps + beta * n) / sigma_t

    `sample` and `model_output` are latents `[B, ...]`, strided or not, float32, bfloat16 or float16, also mixed
    (float64 runs the definition); `t_gen`, `t_mid <= t` int64 `[B]`. `noisy` and `x0` come back in sample's dtype,
    `log_weight` `[B]` in float32 (float64 for float64 input). x0 is differentiable in model_output; the other two are
    detached. The noise is Philox's (purpose RENOISE; `seed`, `iteration`: ints or 0-d int64 tensors on the latents'
    device; `sample_offset`: global index of the first sample), made in the kernel, unless `noise` is given. `backend`
    forces one of "cpp", "cuda", "triton", "torch". Raises ValueError for shapes, dtypes or devices that differ, a
    backend that cannot run here and, on the CPU, timesteps outside the schedule. On a GPU, where looking at them would
    stall it, those give NaN (in "torch" a device assertion).
    """
    same_latents("sample", sample, model_output=model_output, **({} if noise is None else {"noise": noise}))
    for name, timesteps in (("t_gen", t_gen), ("t_mid", t_mid), ("t", t)):
        one_per_sample(name, timesteps, sample, integer=True)
    check_stream(stream)
    seed_tensor, seed = counter("seed", seed, sample.device)
    iteration_tensor, iteration = counter("iteration", iteration, sample.device)
    here = schedule_on(schedule, sample)
    tables = (here.a, here.b, here.c, here.d, here.alpha, here.sigma)
    draw = (seed_tensor, iteration_tensor, seed, iteration, stream, sample_offset)
    noise = None if noise is None else detached(noise)
    backend = _dispatch.check_backend(backend)
    return _renoise(detached(sample), model_output, *tables, t_gen, t_mid, t, *draw, noise, backend)


def _definition(
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
    dtype, ndim = compute_dtype(sample, model_output), sample.ndim
    if noise is None:
        noise = randn(
            sample.shape[0],
            sample.shape[1:],
            seed=seed if seed_tensor is None else seed_tensor,
            iteration=iteration if iteration_tensor is None else iteration_tensor,
            stream=stream,
            purpose=Purpose.RENOISE,
            sample_offset=sample_offset,
            device=sample.device,
            dtype=dtype,
        )
    noise = noise.to(dtype)
    a, b, c, d = at_timesteps((a, b, c, d), t_gen, ndim, dtype)
    x_t, output = sample.to(dtype), model_output.to(dtype)
    x0, eps = a * x_t + b * output, c * x_t + d * output
    alpha_mid, sigma_mid = _alpha_sigma(alpha, sigma, t_mid, ndim, dtype)
    alpha, sigma = _alpha_sigma(alpha, sigma, t, ndim, dtype)
    # alpha_mid is 0 at zero-terminal SNR only, where t can be no other timestep and nothing is added.
    ratio = torch.where(alpha_mid == 0, 1.0, alpha / alpha_mid)
    kept = ratio * sigma_mid
    # Rounding takes the difference below 0 at t = t_mid.
    beta = (sigma**2 - kept**2).clamp(min=0).sqrt()
    fresh = beta * noise
    noisy = ratio * (alpha_mid * x0 + sigma_mid * eps) + fresh
    mixed = (kept * eps + fresh) / sigma
    log_weight = (sample_mean(noise**2) - sample_mean(mixed**2)) / 2
    return noisy.to(sample.dtype).contiguous(), x0.to(sample.dtype).contiguous(), log_weight


def _alpha_sigma(alpha: Tensor, sigma: Tensor, t: Tensor, ndim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) at `t`, `[B, 1, ...]`; t = -1 stands for clean data, (1, 0)."""
    alpha_t, sigma_t = at_timesteps((alpha, sigma), t.clamp(min=0), ndim, dtype)
    clean = per_sample(t < 0, ndim)
    return torch.where(clean, 1.0, alpha_t), torch.where(clean, 0.0, sigma_t)


def _rows(sample: Tensor, model_output: Tensor, *tables_timesteps_and_draw: Any) -> tuple[Any, ...]:
    tables, timesteps, draw = (tables_timesteps_and_draw[part] for part in (slice(6), slice(6, 9), slice(9, 15)))
    noise = tables_timesteps_and_draw[15]
    return (
        as_rows(sample),
        as_rows(model_output),
        *tables,
        *(values.contiguous() for values in timesteps),
        *draw,
        None if noise is None else as_rows(noise),
    )


def _cpp(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.tdm_fast_cpu.renoise(*_rows(*arguments))


def _cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.tdm_fast_cuda.renoise(*_rows(*arguments))


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return importlib.import_module("tdm_fast.kernels.renoise").renoise(*_rows(*arguments))


_dispatch.register("renoise", {"torch": _definition, "cpp": _cpp, "cuda": _cuda, "triton": _triton})


@torch.library.custom_op("tdm_fast::renoise", mutates_args=())
def _renoise(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    in_tables(a.shape[0], t_gen=t_gen)
    in_tables(a.shape[0], -1, t_mid=t_mid, t=t)
    run = _dispatch.select("renoise", backend, sample, model_output, *([] if noise is None else [noise]))
    draw = (seed_tensor, iteration_tensor, seed, iteration, stream, sample_offset)
    return run(sample, model_output, a, b, c, d, alpha, sigma, t_gen, t_mid, t, *draw, noise)


@_renoise.register_fake
def _(sample: Tensor, model_output: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    noisy, x0 = sample.new_empty(sample.shape), sample.new_empty(sample.shape)
    return noisy, x0, sample.new_empty(sample.shape[:1], dtype=compute_dtype(sample, model_output))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    noisy, _, log_weight = output
    ctx.mark_non_differentiable(noisy, log_weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[3], inputs[8])
    ctx.dtype, ctx.compute = inputs[1].dtype, compute_dtype(*inputs[:2])


def _backward(ctx: Any, _noisy: None, grad_x0: Tensor | None, _log_weight: None) -> tuple[Tensor | None, ...]:
    if grad_x0 is None:
        return (*[None] * 19,)
    b, t_gen = ctx.saved_tensors
    (scale,) = at_timesteps((b,), t_gen, grad_x0.ndim, ctx.compute)
    return None, (scale * grad_x0).to(ctx.dtype), *[None] * 17


_renoise.register_autograd(_backward, setup_context=_save_for_backward)
