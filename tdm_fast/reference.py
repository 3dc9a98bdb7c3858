"""The public algorithm (arXiv 2503.06674 and its demo) written plainly, with the work it wastes: 15 F per iteration.

    rollout       all K steps for every sample                                        4 F for K = 4
    fake update   student once more, teacher (result unused), fake score              1 + 1 + 3 F
    student       student; teacher with the prompt, then without; fake score          3 + 2 + 1 F

Every further fake update costs its 5 F again. Options that save `distill` work (a shared index, one index per
iteration, no guidance) change the draws and the losses here, never the work.

Its formulas are its own: of this package it uses the schedule and the random words, but no op. It loops over samples
where the demo does. It is the oracle of the tests and the baseline of the benchmarks; signatures are `distill`'s, whose
`student_forward` has no counterpart: here every loss asks the student itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdm_fast.distill import STUDENT_STREAM, Draws, Intervals, Roles, TDMConfig, fake_stream
from tdm_fast.models.denoiser import Conditioning, Denoiser
from tdm_fast.philox import Purpose, randn, random_integers
from tdm_fast.schedule import Schedule, compute_dtype


class ReferenceRollout(NamedTuple):
    """x at every step's timestep, the noisiest first: `trajectory[K - k]` is x at t_k, `[B, ...]`."""

    trajectory: list[Tensor]


def draw(
    config: TDMConfig,
    batch_size: int,
    iteration: int,
    sample_offset: int = 0,
    device: torch.device | str = "cpu",
) -> Draws:
    """All updates' draws, one sample after the other; the same values as `tdm_fast.distill.draw`.

    They say nothing of a global batch: every rank makes all K steps.
    """
    updates = []
    for stream in (*[fake_stream(update) for update in range(config.fake_updates)], STUDENT_STREAM):
        rows = []
        for index in range(sample_offset, sample_offset + batch_size):
            words = _words(config, iteration, stream, index)
            source = (
                STUDENT_STREAM if config.share_index else stream,
                0 if config.index_per == "iteration" else index,
            )
            if source != (stream, index):
                words[0] = _words(config, iteration, *source)[0]
            rows.append(_draw_one(config, words))
        k, t_gen, t_mid, t = torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, 4).unbind(1)
        updates.append(Intervals(k, t_gen, t_mid, t, tuple(row[0] for row in rows)))
    return Draws(fake=tuple(updates[:-1]), student=updates[-1])


def _words(config: TDMConfig, iteration: int, stream: int, sample: int) -> list[int]:
    words = random_integers(
        (3,),
        1,
        seed=config.seed,
        iteration=iteration,
        stream=stream,
        purpose=Purpose.INTERVALS,
        sample_offset=sample,
    )
    return [int(word) for word in words[0]]


def _draw_one(config: TDMConfig, words: list[int]) -> tuple[int, int, int, int]:
    def below(word: int, bound: int) -> int:
        return word * bound >> 32

    big_k, big_t = config.num_steps, config.total_steps
    k = 1 + below(words[0], big_k)
    if config.timesteps is None:
        t_gen = k * big_t // big_k - 1
        t_mid = t_gen - big_t // big_k + 1
    else:
        t_gen = config.timesteps[big_k - k]
        t_mid = config.timesteps[big_k - k + 1] + 1 if k > 1 else 0
    if config.use_randmid:
        t_mid += below(words[1], t_gen - config.mid_gap - t_mid)
    low = max(config.min_timestep, t_mid)
    high = t_gen - config.margin if config.use_separate else big_t - config.margin
    return k, t_gen, t_mid, low + below(words[2], high - low)


@torch.no_grad()
def rollout(
    student: Denoiser,
    latents: Tensor,
    conditioning: Conditioning,
    schedule: Schedule,
    config: TDMConfig,
    draws: Draws,
) -> ReferenceRollout:
    """All K steps of the student from noise `latents` `[B, ...]`; the draws make no difference."""
    nodes = config.check()
    conditioning = _told(conditioning, config)
    x, trajectory = latents, []
    for index, node in enumerate(nodes):
        trajectory.append(x)
        t = torch.full((len(x),), node, dtype=torch.int64, device=x.device)
        x0, eps = schedule.predict(x, student(x, t, conditioning), t)
        if index + 1 < len(nodes):
            alpha, sigma = _alpha_sigma(schedule, torch.full_like(t, nodes[index + 1]), x0)
            x = (alpha * x0 + sigma * eps).to(latents.dtype)
    return ReferenceRollout(trajectory)


def fake_loss(
    roles: Roles,
    rolled: ReferenceRollout,
    conditioning: Conditioning,
    config: TDMConfig,
    draws: Draws,
    iteration: int | Tensor,
    sample_offset: int = 0,
    *,
    update: int = 0,
) -> Tensor:
    """Scalar loss of a fake-score update; runs the student a second time and the teacher for nothing."""
    schedule, (_, t_gen, t_mid, t, _) = roles.fake.schedule, draws.fake[update]
    told = _told(conditioning, config)
    with torch.no_grad():
        sample = _pick(rolled, draws.fake[update])
        x0, eps = schedule.predict(sample, roles.student(sample, t_gen, told), t_gen)
        noise = _noise(sample, x0.dtype, config, iteration, fake_stream(update), sample_offset)
        noisy = _noise_up(schedule, x0, eps, noise, t_mid, t).to(sample.dtype)
        mixed = _mixed_noise(schedule, eps, noise, t_mid, t)
        roles.teacher(noisy, t, conditioning)
    x0_fake, _ = schedule.predict(noisy, roles.fake(noisy, t, told), t)
    weight = schedule.to(t.device).snr[t].to(x0.dtype).clamp(max=config.snr_gamma)
    if config.importance_weight:
        of_mixed, of_noise = ((value**2).flatten(1).mean(1) for value in (mixed, noise))
        weight = weight * (torch.exp(-0.5 * of_mixed) / torch.exp(-0.5 * of_noise))
    return (((x0_fake - x0) ** 2).flatten(1).mean(1) * weight).mean()


def student_loss(
    roles: Roles,
    rolled: ReferenceRollout,
    conditioning: Conditioning,
    unconditional: Conditioning,
    config: TDMConfig,
    draws: Draws,
    iteration: int | Tensor,
    sample_offset: int = 0,
) -> Tensor:
    """Scalar loss of the student; the teacher is called once with and once without the prompt."""
    schedule, (_, t_gen, t_mid, t, _) = roles.student.schedule, draws.student
    told = _told(conditioning, config)
    sample = _pick(rolled, draws.student)
    x0, eps = schedule.predict(sample, roles.student(sample, t_gen, told), t_gen)
    with torch.no_grad():
        noise = _noise(sample, x0.dtype, config, iteration, STUDENT_STREAM, sample_offset)
        noisy = _noise_up(schedule, x0, eps, noise, t_mid, t).to(sample.dtype)
        teacher, _ = schedule.predict(noisy, roles.teacher(noisy, t, conditioning), t)
        uncond, _ = schedule.predict(noisy, roles.teacher(noisy, t, unconditional.expand(len(noisy))), t)
        fake, _ = schedule.predict(noisy, roles.fake(noisy, t, told), t)
        target = x0 + (teacher - fake) + (config.cfg - 1) * (teacher - uncond)
        guided = teacher + (config.cfg - 1) * (teacher - uncond)
        weight = (x0.double() - guided.double()).abs().flatten(1).mean(1).clamp(min=1e-8).to(x0.dtype)
        weight = weight.reshape(-1, *[1] * (x0.ndim - 1))
    if config.use_huber:
        return ((torch.sqrt((x0 - target) ** 2 + config.huber_c**2) - config.huber_c) / weight).mean()
    return ((x0 - target) ** 2 / weight).mean()


def _told(conditioning: Conditioning, config: TDMConfig) -> Conditioning:
    """The student's and the fake score's conditioning: with `unify` they are told the number of steps."""
    if config.unify is None:
        return conditioning
    device = next(iter(conditioning.tensors.values())).device
    num_steps = torch.tensor([config.num_steps] * len(conditioning), device=device)
    return Conditioning({**conditioning.tensors, "num_steps": num_steps})


def _pick(rolled: ReferenceRollout, intervals: Intervals) -> Tensor:
    """x at each sample's own step, copied sample by sample."""
    picked = torch.empty_like(rolled.trajectory[0])
    for index in range(len(picked)):
        picked[index] = rolled.trajectory[len(rolled.trajectory) - int(intervals.k[index])][index]
    return picked


def _noise(
    sample: Tensor, dtype: torch.dtype, config: TDMConfig, iteration: int | Tensor, stream: int, sample_offset: int
) -> Tensor:
    return randn(
        len(sample),
        sample.shape[1:],
        seed=config.seed,
        iteration=iteration,
        stream=stream,
        purpose=Purpose.RENOISE,
        sample_offset=sample_offset,
        device=sample.device,
        dtype=dtype,
    )


def _alpha_sigma(schedule: Schedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = schedule.alpha_sigma(t, like.ndim)
    return alpha.to(compute_dtype(like)), sigma.to(compute_dtype(like))


def _noise_up(schedule: Schedule, x0: Tensor, eps: Tensor, noise: Tensor, t_mid: Tensor, t: Tensor) -> Tensor:
    """x at t: the prediction taken to t_mid, fresh noise from there."""
    alpha_mid, sigma_mid = _alpha_sigma(schedule, t_mid, x0)
    alpha, sigma = _alpha_sigma(schedule, t, x0)
    x_mid = alpha_mid * x0 + sigma_mid * eps
    beta = torch.sqrt(torch.clamp(sigma**2 - (alpha / alpha_mid * sigma_mid) ** 2, min=0))
    return x_mid / alpha_mid * alpha + beta * noise


def _mixed_noise(schedule: Schedule, eps: Tensor, noise: Tensor, t_mid: Tensor, t: Tensor) -> Tensor:
    """m: all the noise that x at t carries, in units of sigma."""
    alpha_mid, sigma_mid = _alpha_sigma(schedule, t_mid, eps)
    alpha, sigma = _alpha_sigma(schedule, t, eps)
    beta = torch.sqrt(torch.clamp(sigma**2 - (alpha / alpha_mid * sigma_mid) ** 2, min=0))
    return (alpha / alpha_mid * sigma_mid * eps + beta * noise) / sigma
