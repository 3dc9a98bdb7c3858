"""Noise a student's prediction up again: along its own trajectory to t_mid, with fresh noise from there to t."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_fast.ops._checks import one_per_sample, same_shape, sample_mean
from tdm_fast.philox import Purpose, randn
from tdm_fast.schedule import Schedule, compute_dtype


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
) -> tuple[Tensor, Tensor, Tensor]:
    """`(noisy, x0, log_weight)` from the student's raw output at `t_gen` (arXiv 2503.06674).

        x0, eps = the prediction at t_gen             x_mid = alpha_mid * x0 + sigma_mid * eps
        noisy = r * x_mid + beta * n                  r = alpha_t / alpha_mid, n ~ N(0, I)
        beta^2 = max(sigma_t^2 - (r * sigma_mid)^2, 0)
        log_weight = (mean n^2 - mean m^2) / 2        m = (r * sigma_mid * eps + beta * n) / sigma_t

    `sample` and `model_output` are latents `[B, ...]`; `t_gen`, `t_mid <= t` int64 `[B]`. `noisy` and `x0` come back in
    sample's dtype, `log_weight` `[B]` in float32 (float64 for float64 input). x0 is differentiable in model_output; the
    other two are detached. The noise is Philox's (purpose RENOISE; `seed`, `iteration`: ints or 0-d int64 tensors;
    `sample_offset`: global index of the first sample) unless `noise` is given. Raises ValueError if shapes differ.
    """
    same_shape("model_output", model_output, "sample", sample)
    for name, timesteps in (("t_gen", t_gen), ("t_mid", t_mid), ("t", t)):
        one_per_sample(name, timesteps, sample, integer=True)
    if noise is not None:
        same_shape("noise", noise, "sample", sample)
    dtype = compute_dtype(sample, model_output)
    x0, eps = schedule.predict(sample.detach(), model_output, t_gen)
    with torch.no_grad():
        if noise is None:
            noise = randn(
                sample.shape[0],
                sample.shape[1:],
                seed=seed,
                iteration=iteration,
                stream=stream,
                purpose=Purpose.RENOISE,
                sample_offset=sample_offset,
                device=sample.device,
                dtype=dtype,
            )
        noise = noise.to(dtype)
        alpha_mid, sigma_mid = (value.to(dtype) for value in schedule.alpha_sigma(t_mid, sample.ndim))
        alpha, sigma = (value.to(dtype) for value in schedule.alpha_sigma(t, sample.ndim))
        # alpha_mid is 0 at zero-terminal SNR only, where t can be no other timestep and nothing is added.
        ratio = torch.where(alpha_mid > 0, alpha / alpha_mid, 1.0)
        kept = ratio * sigma_mid
        # Rounding takes the difference below 0 at t = t_mid.
        beta = (sigma**2 - kept**2).clamp(min=0).sqrt()
        fresh = beta * noise
        noisy = ratio * (alpha_mid * x0 + sigma_mid * eps) + fresh
        mixed = (kept * eps + fresh) / sigma
        log_weight = (sample_mean(noise**2) - sample_mean(mixed**2)) / 2
    return noisy.to(sample.dtype), x0.to(sample.dtype), log_weight
