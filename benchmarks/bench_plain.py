"""The baselines: each op as tdm_fast/reference.py has it, on plain tensors, the way a trainer writes it.

Nothing is made slower than there: where a function needs x0 only, eps is not computed, and the noise is torch's own.
`normaliser` is float64 in reference.py, as in the public code; benchmarks also run it in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_fast.schedule import Schedule


def _x0(schedule: Schedule, sample: Tensor, model_output: Tensor, t: Tensor) -> Tensor:
    a, b, _, _ = schedule.coefficients(t, sample.ndim)
    return a * sample.float() + b * model_output.float()


def ode_step(sample: Tensor, model_output: Tensor, schedule: Schedule, t: Tensor, t_next: Tensor) -> Tensor:
    x0, eps = schedule.predict(sample, model_output, t)
    alpha, sigma = schedule.alpha_sigma(t_next, sample.ndim)
    return (alpha * x0 + sigma * eps).to(sample.dtype)


def renoise(
    sample: Tensor, model_output: Tensor, schedule: Schedule, t_gen: Tensor, t_mid: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x0, eps = schedule.predict(sample, model_output, t_gen)
    with torch.no_grad():
        noise = torch.randn_like(x0)
        alpha_mid, sigma_mid = schedule.alpha_sigma(t_mid, x0.ndim)
        alpha, sigma = schedule.alpha_sigma(t, x0.ndim)
        x_mid = alpha_mid * x0 + sigma_mid * eps
        beta = torch.sqrt(torch.clamp(sigma**2 - (alpha / alpha_mid * sigma_mid) ** 2, min=0))
        noisy = alpha / alpha_mid * x_mid + beta * noise
        mixed = (alpha / alpha_mid * sigma_mid * eps + beta * noise) / sigma
        log_weight = ((noise**2).flatten(1).mean(1) - (mixed**2).flatten(1).mean(1)) / 2
    return noisy.to(sample.dtype), x0.to(sample.dtype), log_weight


def fake_score_loss(x0_fake: Tensor, x0: Tensor, snr: Tensor, log_weight: Tensor, snr_gamma: float) -> Tensor:
    weight = snr.clamp(max=snr_gamma) * log_weight.exp()
    return (((x0_fake.float() - x0.float()) ** 2).flatten(1).mean(1) * weight).mean()


def fake_score_loss_from_outputs(
    model_output: Tensor,
    noisy: Tensor,
    x0: Tensor,
    schedule: Schedule,
    t: Tensor,
    log_weight: Tensor,
    snr_gamma: float,
) -> Tensor:
    x0_fake = _x0(schedule, noisy, model_output, t)
    return fake_score_loss(x0_fake, x0, schedule.snr[t], log_weight, snr_gamma)


def tdm_loss(
    x0: Tensor,
    x0_teacher: Tensor,
    x0_uncond: Tensor,
    x0_fake: Tensor,
    cfg: float,
    huber_c: float,
    normaliser: torch.dtype,
) -> Tensor:
    x0 = x0.float()
    with torch.no_grad():
        teacher, uncond, fake = x0_teacher.float(), x0_uncond.float(), x0_fake.float()
        target = x0 + (teacher - fake) + (cfg - 1) * (teacher - uncond)
        guided = teacher + (cfg - 1) * (teacher - uncond)
        weight = (x0.to(normaliser) - guided.to(normaliser)).abs().flatten(1).mean(1).clamp(min=1e-8).float()
        weight = weight.reshape(-1, *[1] * (x0.ndim - 1))
    return ((torch.sqrt((x0 - target) ** 2 + huber_c**2) - huber_c) / weight).mean()


def tdm_loss_from_outputs(
    model_output: Tensor,
    sample: Tensor,
    noisy: Tensor,
    out_teacher: Tensor,
    out_uncond: Tensor,
    out_fake: Tensor,
    schedule: Schedule,
    t_gen: Tensor,
    t: Tensor,
    cfg: float,
    huber_c: float,
    normaliser: torch.dtype,
) -> Tensor:
    x0 = _x0(schedule, sample, model_output, t_gen)
    with torch.no_grad():
        teacher, uncond, fake = (_x0(schedule, noisy, out, t) for out in (out_teacher, out_uncond, out_fake))
    return tdm_loss(x0, teacher, uncond, fake, cfg, huber_c, normaliser)


def pseudo_huber(input: Tensor, target: Tensor, c: float) -> Tensor:
    return (torch.sqrt((input.float() - target.float()) ** 2 + c**2) - c).mean()


def sample_intervals(batch_size: int, num_steps: int, total_steps: int, device: str) -> tuple[Tensor, ...]:
    """The public per-sample loop: a step and a timestep drawn, and looked at on the host, sample by sample."""
    rows = []
    for _ in range(batch_size):
        k = int(torch.randint(1, num_steps + 1, (1,), device=device).item())
        t_gen = k * total_steps // num_steps - 1
        t_mid = t_gen - total_steps // num_steps + 1
        t = int(torch.randint(max(20, t_mid), t_gen - 10, (1,), device=device).item())
        rows.append((k, t_gen, t_mid, t))
    return torch.tensor(rows, device=device).unbind(1)
