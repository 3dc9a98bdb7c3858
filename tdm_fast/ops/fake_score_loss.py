"""The fake score's denoising loss on the student's samples, Min-SNR and importance weighted (arXiv 2503.06674)."""

from __future__ import annotations

from torch import Tensor

from tdm_fast.ops._checks import one_per_sample, positive, same_shape, sample_mean
from tdm_fast.schedule import Schedule, compute_dtype


def fake_score_loss(
    x0_fake: Tensor,
    x0: Tensor,
    *,
    snr: Tensor,
    log_weight: Tensor | None = None,
    snr_gamma: float = 5.0,
) -> Tensor:
    """mean_b( min(snr, snr_gamma) * exp(log_weight) * mean_i (x0_fake - x0)^2 ), a scalar with gradient to x0_fake.

    `x0_fake` and `x0` are latents `[B, ...]` of any floating dtype, `snr` and `log_weight` `[B]` (None: no importance
    weight). The scalar is float32 (float64 if an input latent is). Raises ValueError for shapes that differ or an
    `snr_gamma` that is not above 0 (infinity turns the cap off).
    """
    same_shape("x0_fake", x0_fake, "x0", x0)
    one_per_sample("snr", snr, x0)
    positive("snr_gamma", snr_gamma)
    dtype = compute_dtype(x0_fake, x0)
    weight = snr.detach().to(dtype).clamp(max=snr_gamma)
    if log_weight is not None:
        one_per_sample("log_weight", log_weight, x0)
        weight = weight * log_weight.detach().to(dtype).exp()
    error = x0_fake.to(dtype) - x0.detach().to(dtype)
    return (weight * sample_mean(error**2)).mean()


def fake_score_loss_from_outputs(
    model_output: Tensor,
    noisy: Tensor,
    x0: Tensor,
    *,
    schedule: Schedule,
    t: Tensor,
    log_weight: Tensor | None = None,
    snr_gamma: float = 5.0,
) -> Tensor:
    """`fake_score_loss` from the fake score's raw output at `noisy`, timestep `t` (int64 `[B]`): a scalar.

    The gradient reaches `model_output` alone. Raises ValueError for shapes that differ.
    """
    same_shape("model_output", model_output, "noisy", noisy)
    one_per_sample("t", t, noisy, integer=True)
    x0_fake, _ = schedule.predict(noisy.detach(), model_output, t)
    snr = schedule.to(t.device).snr[t]
    return fake_score_loss(x0_fake, x0, snr=snr, log_weight=log_weight, snr_gamma=snr_gamma)
