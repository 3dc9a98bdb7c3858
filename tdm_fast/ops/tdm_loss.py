"""The student's loss: the guided teacher's score against the fake one's at one noisy sample (arXiv 2503.06674)."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_fast.ops._checks import guidance, one_per_sample, positive, same_shape, sample_mean
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
) -> Tensor:
    """Scalar loss of the student's prediction `x0`, with gradient to x0 only.

        d = (x0_teacher - x0_fake) + (cfg - 1) * (x0_teacher - x0_uncond)             target = stopgrad(x0 + d)
        w = max(mean_i |x0 - (x0_teacher + (cfg - 1) * (x0_teacher - x0_uncond))|, 1e-8)   per sample, no gradient
        loss = mean( (sqrt((x0 - target)^2 + c^2) - c) / w ),   or mean( (x0 - target)^2 / w ) for `huber_c` None

    All four are latents `[B, ...]` of any floating dtype; `cfg` is a float or a tensor `[B]`. The scalar is float32
    (float64 if a latent is). Raises ValueError for shapes that differ or a `huber_c` that is not above 0.
    """
    others = {"x0_teacher": x0_teacher, "x0_uncond": x0_uncond, "x0_fake": x0_fake}
    for name, other in others.items():
        same_shape(name, other, "x0", x0)
    dtype = compute_dtype(x0, *others.values())
    teacher, uncond, fake = (other.detach().to(dtype) for other in others.values())
    guided = teacher + guidance(cfg, x0, dtype) * (teacher - uncond)
    return _normalised(x0.to(dtype), guided, guided - fake, huber_c)


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
) -> Tensor:
    """`tdm_loss` from raw outputs, with gradient to `model_output` (the student's, for `sample` at `t_gen`) only.

    `out_teacher`, `out_uncond` and `out_fake` are the scores' outputs for `noisy` at `t`; since all of them saw
    the same latents, d = b_t * [(out_teacher - out_fake) + (cfg - 1) * (out_teacher - out_uncond)]. Latents `[B, ...]`,
    timesteps int64 `[B]`. Raises ValueError as `tdm_loss` does.
    """
    others = {"noisy": noisy, "out_teacher": out_teacher, "out_uncond": out_uncond, "out_fake": out_fake}
    for name, other in {"model_output": model_output, **others}.items():
        same_shape(name, other, "sample", sample)
    for name, timesteps in (("t_gen", t_gen), ("t", t)):
        one_per_sample(name, timesteps, sample, integer=True)
    dtype = compute_dtype(model_output, sample, *others.values())
    x0, _ = schedule.predict(sample.detach(), model_output, t_gen)
    with torch.no_grad():
        x_t, teacher, uncond, fake = (other.to(dtype) for other in others.values())
        a, b, _, _ = (value.to(dtype) for value in schedule.coefficients(t, sample.ndim))
        out_guided = teacher + guidance(cfg, sample, dtype) * (teacher - uncond)
        guided, difference = a * x_t + b * out_guided, b * (out_guided - fake)
    return _normalised(x0.to(dtype), guided, difference, huber_c)


def _normalised(x0: Tensor, guided: Tensor, difference: Tensor, huber_c: float | None) -> Tensor:
    weight = sample_mean((x0.detach() - guided).abs()).clamp(min=WEIGHT_FLOOR)
    # x0 - stopgrad(x0 + d) is -d with the gradient of x0; written so that adding and taking x0 away costs no digits.
    error = (x0 - x0.detach()) - difference
    if huber_c is None:
        values = error**2
    else:
        positive("huber_c", huber_c)
        values = (error**2 + huber_c**2).sqrt() - huber_c
    return (values / per_sample(weight, x0.ndim)).mean()
