"""Trajectory Distribution Matching (arXiv 2503.06674): rollout, fake-score update, student update.

Per sample and iteration, with F one forward of the network:

    draw          both updates' steps k and timesteps, before anything runs
    rollout       the student's steps that these two draws need, and no others      2.75 F on average for K = 4
    fake update   the fake score denoises the student's own sample; the student's
                  prediction is the rollout's, the teacher is not asked             3 F, backward included
    student       student with gradient; teacher with and without the prompt in
                  one call; fake score                                              3 + 2 + 1 F

`tdm_fast.reference` does the same from the same draws the way the public demo does (15 F). Nothing here waits for the
device: the step indices, which decide what the rollout runs, are drawn on the host from counters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tdm_fast.models.denoiser import Conditioning, Denoiser
from tdm_fast.ops.fake_score_loss import fake_score_loss_from_outputs
from tdm_fast.ops.ode_step import ode_step
from tdm_fast.ops.renoise import renoise
from tdm_fast.ops.sample_intervals import check_intervals, sample_intervals
from tdm_fast.ops.tdm_loss import tdm_loss_from_outputs
from tdm_fast.schedule import Schedule

FAKE_STREAM, STUDENT_STREAM = 0, 1


@dataclass(frozen=True)
class TDMConfig:
    """The method's own settings; the symbols of arXiv 2503.06674 in brackets.

    Raises ValueError for values that cannot work, a (`total_steps`, `num_steps`) without room for an interval included.
    """

    num_steps: int = 4
    """Steps of the student [K]."""
    total_steps: int = 900
    """One more than the first timestep of the trajectory [T]; num_steps must divide it."""
    nodes: tuple[int, ...] | None = None
    """Explicit timesteps of the student's steps, descending, the first of them total_steps - 1."""
    cfg: float = 4.5
    """Guidance of the teacher; 1 is none."""
    use_huber: bool = True
    """Pseudo-Huber loss for the student; otherwise squared."""
    huber_c: float = 1e-3
    """Where the pseudo-Huber loss turns from quadratic to linear [c]."""
    use_separate: bool = True
    """Compare scores within the step's own interval; otherwise up to the noisiest timestep."""
    use_randmid: bool = False
    """Draw the lower end of the interval as well."""
    snr_gamma: float = 5.0
    """Cap of the fake loss's signal-to-noise weight."""
    importance_weight: bool = True
    """Weigh the fake loss by how likely its noise is under the marginal."""
    min_timestep: int = 20
    """Least timestep at which scores are compared."""
    margin: int = 10
    """How far below the interval's upper end the timestep stays."""
    mid_gap: int = 20
    """How far below the step's timestep a drawn t_mid stays."""
    seed: int = 0
    """Key of every random number."""

    def __post_init__(self) -> None:
        self.check()
        if not math.isfinite(self.cfg):
            raise ValueError(f"cfg is {self.cfg}; it must be a finite number (4.5 is the demo's)")
        for name in ("huber_c", "snr_gamma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")

    def check(self, schedule: Schedule | None = None) -> list[int]:
        """Check the intervals, against `schedule` too if given; returns the trajectory's timesteps, descending."""
        return check_intervals(
            self.num_steps,
            self.total_steps,
            separate=self.use_separate,
            randmid=self.use_randmid,
            nodes=self.nodes,
            min_timestep=self.min_timestep,
            margin=self.margin,
            mid_gap=self.mid_gap,
            schedule=schedule,
        )


class Roles(NamedTuple):
    """Three networks on one schedule. The student's and the fake score's parameters train, the teacher's do not."""

    student: Denoiser
    teacher: Denoiser
    fake: Denoiser


class Intervals(NamedTuple):
    """One update's draw: int64 `[B]` on the device, and the step indices on the host."""

    k: Tensor
    t_gen: Tensor
    t_mid: Tensor
    t: Tensor
    steps: tuple[int, ...]


class Draws(NamedTuple):
    """The draws of one iteration's two updates."""

    intervals_fake: Intervals
    intervals_student: Intervals


class Rollout(NamedTuple):
    """What the updates need of the student's trajectories, each `[B, ...]` and detached."""

    student_sample: Tensor
    """x at the student update's t_gen."""
    fake_sample: Tensor
    """x at the fake update's t_gen."""
    fake_output: Tensor
    """The student's raw output for `fake_sample`."""


def draw(
    config: TDMConfig,
    batch_size: int,
    iteration: int,
    sample_offset: int = 0,
    device: torch.device | str = "cpu",
) -> Draws:
    """Steps, intervals and timesteps of both updates, a function of (seed, iteration, global sample index) alone.

    Computed on the host and copied to `device`: the rollout must know k without asking the device for it.
    """

    def intervals(stream: int) -> Intervals:
        drawn = torch.stack(
            sample_intervals(
                batch_size,
                num_steps=config.num_steps,
                total_steps=config.total_steps,
                seed=config.seed,
                iteration=iteration,
                stream=stream,
                sample_offset=sample_offset,
                separate=config.use_separate,
                randmid=config.use_randmid,
                nodes=config.nodes,
                min_timestep=config.min_timestep,
                margin=config.margin,
                mid_gap=config.mid_gap,
                device="cpu",
            )
        )
        k, t_gen, t_mid, t = drawn.to(device, non_blocking=True).unbind()
        return Intervals(k, t_gen, t_mid, t, tuple(drawn[0].tolist()))

    return Draws(intervals(FAKE_STREAM), intervals(STUDENT_STREAM))


@torch.no_grad()
def rollout(
    student: Denoiser,
    latents: Tensor,
    conditioning: Conditioning,
    schedule: Schedule,
    config: TDMConfig,
    draws: Draws,
) -> Rollout:
    """Run the student from noise `latents` `[B, ...]` as far as the draws need it, on ever fewer samples.

    Step j predicts (x0, eps) at t_j and moves to x = alpha x0 + sigma eps at t_{j-1}. The student update needs x at its
    k, so the steps above it; the fake update needs x and the prediction at its own k, so that step as well. The number
    of calls therefore depends on the draws, and processes that share a sharded student must share them.
    """
    k_student, k_fake = draws.intervals_student.steps, draws.intervals_fake.steps
    if not len(latents) == len(conditioning) == len(k_student) == len(k_fake) > 0:
        raise ValueError(
            f"latents have {len(latents)} samples, conditioning {len(conditioning)}, draws {len(k_fake)};"
            " all must describe one batch of at least one sample"
        )
    trajectory = config.check()
    batch = range(len(latents))
    x = list(latents.unbind())
    student_sample, fake_sample, fake_output = list(x), list(x), list(x)
    for step, node, next_node in zip(range(config.num_steps, 0, -1), trajectory, [*trajectory[1:], -1], strict=True):
        needed = [b for b in batch if step > k_student[b] or step >= k_fake[b]]
        if needed:
            sample = torch.stack([x[b] for b in needed])
            t, t_next = (latents.new_full((len(needed),), value, dtype=torch.int64) for value in (node, next_node))
            output = student(sample, t, _rows(conditioning, needed, latents.device))
            moved = ode_step(sample, output, schedule=schedule, t=t, t_next=t_next)
        for row, b in enumerate(needed):
            if step == k_fake[b]:
                fake_sample[b], fake_output[b] = x[b], output[row]
            x[b] = moved[row]
            if step > k_student[b]:
                student_sample[b] = x[b]
    return Rollout(torch.stack(student_sample), torch.stack(fake_sample), torch.stack(fake_output))


def _rows(conditioning: Conditioning, rows: list[int], device: torch.device) -> Conditioning:
    if len(rows) == len(conditioning):
        return conditioning
    return conditioning[torch.tensor(rows).to(device, non_blocking=True)]


def fake_loss(
    roles: Roles,
    rolled: Rollout,
    conditioning: Conditioning,
    config: TDMConfig,
    draws: Draws,
    iteration: int | Tensor,
    sample_offset: int = 0,
) -> Tensor:
    """Scalar loss of the fake score: denoise the student's own predictions, noised to t. Backward is the caller's."""
    intervals = draws.intervals_fake
    noisy, x0, log_weight = renoise(
        rolled.fake_sample,
        rolled.fake_output,
        schedule=roles.student.schedule,
        t_gen=intervals.t_gen,
        t_mid=intervals.t_mid,
        t=intervals.t,
        seed=config.seed,
        iteration=iteration,
        stream=FAKE_STREAM,
        sample_offset=sample_offset,
    )
    return fake_score_loss_from_outputs(
        roles.fake(noisy, intervals.t, conditioning),
        noisy,
        x0,
        schedule=roles.fake.schedule,
        t=intervals.t,
        log_weight=log_weight if config.importance_weight else None,
        snr_gamma=config.snr_gamma,
    )


def student_loss(
    roles: Roles,
    rolled: Rollout,
    conditioning: Conditioning,
    unconditional: Conditioning,
    config: TDMConfig,
    draws: Draws,
    iteration: int | Tensor,
    sample_offset: int = 0,
) -> Tensor:
    """Scalar loss of the student, through its prediction at t_gen alone. Backward is the caller's.

    `unconditional` holds one sample (the empty prompt) or one per sample of the batch.
    """
    intervals = draws.intervals_student
    t_gen, t = intervals.t_gen, intervals.t
    output = roles.student(rolled.student_sample, t_gen, conditioning)
    noisy, _, _ = renoise(
        rolled.student_sample,
        output,
        schedule=roles.student.schedule,
        t_gen=t_gen,
        t_mid=intervals.t_mid,
        t=t,
        seed=config.seed,
        iteration=iteration,
        stream=STUDENT_STREAM,
        sample_offset=sample_offset,
    )
    with torch.no_grad():
        both = Conditioning.cat([conditioning, unconditional.expand(len(noisy))])
        out_teacher, out_uncond = roles.teacher(noisy.repeat(2, *[1] * (noisy.ndim - 1)), t.repeat(2), both).chunk(2)
        out_fake = roles.fake(noisy, t, conditioning)
    return tdm_loss_from_outputs(
        output,
        rolled.student_sample,
        noisy,
        out_teacher,
        out_uncond,
        out_fake,
        schedule=roles.teacher.schedule,
        t_gen=t_gen,
        t=t,
        cfg=config.cfg,
        huber_c=config.huber_c if config.use_huber else None,
    )
