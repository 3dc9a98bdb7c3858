"""Trajectory Distribution Matching (arXiv 2503.06674): rollout, fake-score updates, student update.

Per sample and iteration, with F one forward of the network and a backward counted as two:

    draw          every update's step k and timesteps, before anything runs
    rollout       the student's steps that these draws need, and no others          2.75 F on average for K = 4
    fake update   the fake score denoises the student's own sample; the student's
                  prediction is the rollout's, the teacher is not asked             3 F, backward included
    student       student with gradient; teacher with and without the prompt in
                  one call; fake score                                              3 + 2 + 1 F

That is 11.75 F. With `share_index` all updates of an iteration have one k, the rollout stops before it, and the
student's forward with gradient serves the fake updates too: 10.5 F. With `cfg` 1 the teacher is not asked without the
prompt: 1 F less. `tdm_fast.cost` has these figures for every configuration. `tdm_fast.reference` does the same from the
same draws the way the public demo does (15 F). Nothing here waits for the device: the steps k, which decide what the
rollout runs, are drawn on the host from counters.

One iteration, for a trainer (`config` is `TDMConfig.at(iteration)`, `backward` and optimisers are its own):

    draws = draw(config, len(latents), iteration, sample_offset, device, global_batch_size=...)
    rolled, output = rollout(roles.student, latents, conditioning, schedule, config, draws), None
    if config.share_index:
        output = student_forward(roles, rolled, conditioning, config, draws)
        rolled = rolled.sharing(output)
    for update in range(config.fake_updates):
        fake_loss(roles, rolled, conditioning, config, draws, iteration, sample_offset, update=update)
    student_loss(roles, rolled, conditioning, unconditional, config, draws, iteration, sample_offset, output=output)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tdm_fast.models.denoiser import Conditioning, Denoiser, Roles
from tdm_fast.ops.fake_score_loss import fake_score_loss_from_outputs
from tdm_fast.ops.ode_step import ode_step
from tdm_fast.ops.renoise import renoise
from tdm_fast.ops.sample_intervals import check_intervals, intervals_at, sample_intervals
from tdm_fast.ops.tdm_loss import tdm_loss_from_outputs
from tdm_fast.philox import Purpose, bounded, random_integers
from tdm_fast.schedule import Schedule

IndexPer = Literal["sample", "iteration"]

STUDENT_STREAM = 1
NUM_STEPS_STREAM = 0xFFFF
"""The stream, of purpose INTERVALS, that an iteration's K is drawn from."""


def fake_stream(update: int) -> int:
    """The stream of the iteration's fake update number `update`: 0, then 2, 3, ...; 1 is the student's."""
    return update + 1 if update else 0


@dataclass(frozen=True)
class TDMConfig:
    """The method's own settings; the symbols of arXiv 2503.06674 in brackets.

    Raises ValueError for values that cannot work, a (`total_steps`, `num_steps`) without room for an interval included.
    """

    num_steps: int = 4
    """Steps of the student [K]."""
    total_steps: int = 900
    """One more than the first timestep of the trajectory [T]; num_steps must divide it."""
    timesteps: tuple[int, ...] | None = None
    """Explicit timesteps of the student's steps, descending, such as 999 856 665 399; num_steps and total_steps follow
    from them."""
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
    index_per: IndexPer = "sample"
    """Draw the step k per sample, or once per iteration for all samples and ranks: the same marginals, but sharded
    networks then make as few calls as the draw allows."""
    share_index: bool = False
    """One k for all updates of an iteration: the student's forward with gradient also feeds the fake updates."""
    fake_updates: int = 1
    """Fake-score updates per student update, each with draws of its own."""
    unify: tuple[int, ...] | None = None
    """TDM-unify: numbers of steps, one of which each iteration draws and tells student and fake score. `num_steps`,
    one of them, is what is sampled with."""
    seed: int = 0
    """Key of every random number."""

    def __post_init__(self) -> None:
        if self.index_per not in get_args(IndexPer):
            raise ValueError(f"index_per is {self.index_per!r}; it must be one of {', '.join(get_args(IndexPer))}")
        if not 1 <= self.fake_updates < NUM_STEPS_STREAM:
            raise ValueError(f"fake_updates is {self.fake_updates}; it must be at least 1 and below {NUM_STEPS_STREAM}")
        if self.unify is not None:
            self._check_unify(self.unify)
        if self.timesteps is not None:
            self._follow(self.timesteps)
        self.check()
        if not math.isfinite(self.cfg):
            raise ValueError(f"cfg is {self.cfg}; it must be a finite number (4.5 is the demo's)")
        for name in ("huber_c", "snr_gamma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")

    def _follow(self, timesteps: tuple[int, ...]) -> None:
        """Take number and start of the steps from explicit timesteps, unless other ones than the defaults are given."""
        if not timesteps or timesteps[-1] < 0 or any(high <= low for high, low in pairwise(timesteps)):
            raise ValueError(
                f"timesteps are {' '.join(map(str, timesteps))}; they must descend strictly and not go below 0, such as"
                " 999 856 665 399"
            )
        for name, value in (("num_steps", len(timesteps)), ("total_steps", timesteps[0] + 1)):
            if getattr(self, name) not in (value, getattr(type(self), name)):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but by timesteps {' '.join(map(str, timesteps))} it is {value};"
                    f" leave {name} out"
                )
            object.__setattr__(self, name, value)

    def _check_unify(self, unify: tuple[int, ...]) -> None:
        if self.timesteps is not None:
            raise ValueError(
                f"unify is {unify}, but timesteps {self.timesteps} fix the trajectory; leave one of the two out"
            )
        if not unify or len(set(unify)) < len(unify):
            raise ValueError(f"unify is {unify}; it must hold different numbers of steps, such as 1 2 4")
        if self.num_steps not in unify:
            raise ValueError(
                f"num_steps is {self.num_steps}, which unify {unify} does not train; it must be one of"
                f" {', '.join(map(str, unify))}"
            )

    def at(self, iteration: int) -> TDMConfig:
        """The settings of one iteration: with `unify` those whose num_steps is the K drawn for it, else these.

        K is a function of (seed, iteration) alone, so that all ranks have the same.
        """
        if self.unify is None:
            return self
        word = random_integers(
            (), 1, seed=self.seed, iteration=iteration, stream=NUM_STEPS_STREAM, purpose=Purpose.INTERVALS
        )
        return replace(self, num_steps=self.unify[int(bounded(word, len(self.unify)))])

    def check(self, schedule: Schedule | None = None) -> list[int]:
        """Check the intervals, against `schedule` too if given; returns the trajectory's timesteps, descending.

        With `unify` every one of its trajectories is checked; returned is that of `num_steps`.
        """
        for num_steps in self.unify or ():
            self._check(num_steps, schedule)
        return self._check(self.num_steps, schedule)

    def _check(self, num_steps: int, schedule: Schedule | None) -> list[int]:
        return check_intervals(
            num_steps,
            self.total_steps,
            separate=self.use_separate,
            randmid=self.use_randmid,
            nodes=self.timesteps,
            min_timestep=self.min_timestep,
            margin=self.margin,
            mid_gap=self.mid_gap,
            schedule=schedule,
        )


class Intervals(NamedTuple):
    """One update's draw: int64 `[B]` on the device, and the step indices on the host."""

    k: Tensor
    t_gen: Tensor
    t_mid: Tensor
    t: Tensor
    steps: tuple[int, ...]


class Draws(NamedTuple):
    """The draws of one iteration's updates."""

    fake: tuple[Intervals, ...]
    """One for each fake update."""
    student: Intervals
    needed: tuple[int, ...] = ()
    """The rollout's steps that some sample of the global batch needs; a rank with no such sample still makes a call."""


class Rollout(NamedTuple):
    """What the updates need of the student's trajectories, each `[B, ...]` and detached."""

    student_sample: Tensor
    """x at the student update's t_gen."""
    fake_samples: tuple[Tensor, ...]
    """x at each fake update's t_gen."""
    fake_outputs: tuple[Tensor, ...]
    """The student's raw output for each of `fake_samples`; with `share_index` there is none before `sharing`."""

    def sharing(self, output: Tensor) -> Rollout:
        """With `share_index`: this rollout with `output`, what `student_forward` returned, for all fake updates."""
        return self._replace(fake_outputs=(output.detach(),) * len(self.fake_samples))


def draw(
    config: TDMConfig,
    batch_size: int,
    iteration: int,
    sample_offset: int = 0,
    device: torch.device | str = "cpu",
    *,
    global_batch_size: int | None = None,
) -> Draws:
    """Steps, intervals and timesteps of all updates, a function of (seed, iteration, global sample index) alone.

    Computed on the host and copied to `device`: the rollout must know k without asking the device for it. This process
    has the samples from `sample_offset` on of the `global_batch_size` samples, counted from 0, that all ranks have
    together; if that is None, its batch stands alone. Raises ValueError for a batch that does not lie in the global
    one, and for a `config` that is not `config.at(iteration)`.
    """
    if (drawn_steps := config.at(iteration).num_steps) != config.num_steps:
        raise ValueError(
            f"num_steps is {config.num_steps}, but iteration {iteration} of unify {config.unify} has {drawn_steps};"
            f" pass config.at({iteration})"
        )
    first, size = (sample_offset, batch_size) if global_batch_size is None else (0, global_batch_size)
    mine = slice(sample_offset - first, sample_offset - first + batch_size)
    if batch_size < 1 or mine.start < 0 or mine.stop > size:
        raise ValueError(
            f"batch_size is {batch_size}, sample_offset {sample_offset} and global_batch_size {global_batch_size}; a"
            " batch has at least one sample and lies within the global one"
        )
    options: dict[str, Any] = {
        "num_steps": config.num_steps,
        "total_steps": config.total_steps,
        "seed": config.seed,
        "iteration": iteration,
        "separate": config.use_separate,
        "randmid": config.use_randmid,
        "nodes": config.timesteps,
        "min_timestep": config.min_timestep,
        "margin": config.margin,
        "mid_gap": config.mid_gap,
    }

    def intervals(stream: int) -> Tensor:
        """(k, t_gen, t_mid, t) of the whole global batch, `[4, size]`."""
        if config.index_per == "sample" and not config.share_index:
            return torch.stack(sample_intervals(size, stream=stream, sample_offset=first, **options))
        index_stream = STUDENT_STREAM if config.share_index else stream
        # One index per iteration is that of sample 0, which every rank can compute.
        count, origin = (size, first) if config.index_per == "sample" else (1, 0)
        k = sample_intervals(count, stream=index_stream, sample_offset=origin, **options)[0].expand(size)
        return torch.stack((k, *intervals_at(k, stream=stream, sample_offset=first, **options)))

    drawn = [intervals(stream) for stream in (*map(fake_stream, range(config.fake_updates)), STUDENT_STREAM)]
    *least_fake, least_student = (int(values[0].min()) for values in drawn)
    needed = range(config.num_steps, _last_step(config, least_student, least_fake) - 1, -1)
    *fake, student = (_intervals(values[:, mine], device) for values in drawn)
    return Draws(tuple(fake), student, tuple(needed))


def _intervals(drawn: Tensor, device: torch.device | str) -> Intervals:
    k, t_gen, t_mid, t = drawn.to(device, non_blocking=True).unbind()
    return Intervals(k, t_gen, t_mid, t, tuple(drawn[0].tolist()))


def _last_step(config: TDMConfig, k_student: int, k_fake: Iterable[int]) -> int:
    """The lowest step that the rollout makes for a sample whose updates drew these steps; K + 1 if it makes none."""
    return k_student + 1 if config.share_index else min(k_student + 1, *k_fake)


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
    k, so the steps above it; a fake update needs x and the prediction at its own k, so that step as well, unless it
    shares the index. The number of calls therefore depends on the draws; it is the same for all ranks whose draws are
    of one global batch: a step that only other ranks' samples need is made on one sample and its result discarded.
    """
    k_student, k_fakes = draws.student.steps, [intervals.steps for intervals in draws.fake]
    if not len(latents) == len(conditioning) == len(k_student) > 0 or any(len(k) != len(latents) for k in k_fakes):
        raise ValueError(
            f"latents have {len(latents)} samples, conditioning {len(conditioning)}, draws {len(k_student)};"
            " all must describe one batch of at least one sample"
        )
    if config.share_index and any(k != k_student for k in k_fakes):
        raise ValueError(
            f"share_index is set, but the draws' steps are {k_fakes} and {k_student}; all must be the same"
        )
    trajectory = config.check()
    conditioning = _told(conditioning, config)
    batch = range(len(latents))
    last = [_last_step(config, k, k_fake) for k, *k_fake in zip(k_student, *k_fakes, strict=True)]
    x = list(latents.unbind())
    student_sample, fake_samples, fake_outputs = list(x), [list(x) for _ in k_fakes], [list(x) for _ in k_fakes]
    for step, node, next_node in zip(range(config.num_steps, 0, -1), trajectory, [*trajectory[1:], -1], strict=True):
        rows = [b for b in batch if step >= last[b]]
        if not rows and step not in draws.needed:
            break
        called = rows or [0]
        sample = torch.stack([x[b] for b in called])
        t, t_next = (latents.new_full((len(called),), value, dtype=torch.int64) for value in (node, next_node))
        output = student(sample, t, _rows(conditioning, called, latents.device))
        moved = ode_step(sample, output, schedule=schedule, t=t, t_next=t_next)
        for row, b in enumerate(rows):
            for k_fake, samples, outputs in zip(k_fakes, fake_samples, fake_outputs, strict=True):
                if step == k_fake[b]:
                    samples[b], outputs[b] = x[b], output[row]
            x[b] = moved[row]
            if step > k_student[b]:
                student_sample[b] = x[b]
    at_student = torch.stack(student_sample)
    if config.share_index:
        return Rollout(at_student, (at_student,) * len(k_fakes), ())
    return Rollout(at_student, tuple(map(torch.stack, fake_samples)), tuple(map(torch.stack, fake_outputs)))


def _rows(conditioning: Conditioning, rows: list[int], device: torch.device) -> Conditioning:
    if len(rows) == len(conditioning):
        return conditioning
    return conditioning[torch.tensor(rows).to(device, non_blocking=True)]


def _told(conditioning: Conditioning, config: TDMConfig) -> Conditioning:
    """What student and fake score are given: with `unify` the trajectory's number of steps as well."""
    if config.unify is None:
        return conditioning
    like = next(iter(conditioning.tensors.values()))
    num_steps = torch.full((len(conditioning),), config.num_steps, dtype=torch.int64, device=like.device)
    return Conditioning(conditioning.tensors | {"num_steps": num_steps})


def student_forward(
    roles: Roles, rolled: Rollout, conditioning: Conditioning, config: TDMConfig, draws: Draws
) -> Tensor:
    """The student's raw output at its own t_gen, `[B, ...]`, with gradient.

    `student_loss` makes this call itself unless it is given the result. With `share_index` it comes before the fake
    updates, which take the same prediction; what the student's backward needs then lives through them.
    """
    return roles.student(rolled.student_sample, draws.student.t_gen, _told(conditioning, config))


def fake_loss(
    roles: Roles,
    rolled: Rollout,
    conditioning: Conditioning,
    config: TDMConfig,
    draws: Draws,
    iteration: int | Tensor,
    sample_offset: int = 0,
    *,
    update: int = 0,
) -> Tensor:
    """Scalar loss of the fake score's update number `update`: denoise the student's own predictions, noised to t.

    Backward is the caller's. Raises ValueError for an update that the draws or the rollout do not have.
    """
    if not 0 <= update < len(draws.fake):
        raise ValueError(f"update is {update}; the draws have {len(draws.fake)} fake updates, counted from 0")
    if len(rolled.fake_outputs) != len(draws.fake):
        raise ValueError(
            f"the rollout has {len(rolled.fake_outputs)} of {len(draws.fake)} fake_outputs; with share_index it is"
            " completed by rolled.sharing(student_forward(...))"
        )
    intervals = draws.fake[update]
    noisy, x0, log_weight = renoise(
        rolled.fake_samples[update],
        rolled.fake_outputs[update],
        schedule=roles.student.schedule,
        t_gen=intervals.t_gen,
        t_mid=intervals.t_mid,
        t=intervals.t,
        seed=config.seed,
        iteration=iteration,
        stream=fake_stream(update),
        sample_offset=sample_offset,
    )
    return fake_score_loss_from_outputs(
        roles.fake(noisy, intervals.t, _told(conditioning, config)),
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
    *,
    output: Tensor | None = None,
) -> Tensor:
    """Scalar loss of the student, through its prediction at t_gen alone. Backward is the caller's.

    `unconditional` holds one sample (the empty prompt) or one per sample of the batch; with `cfg` 1 it has no weight
    and is not looked at. `output` is what `student_forward` returned, if that was called before.
    """
    t_gen, t = draws.student.t_gen, draws.student.t
    if output is None:
        output = student_forward(roles, rolled, conditioning, config, draws)
    noisy, _, _ = renoise(
        rolled.student_sample,
        output,
        schedule=roles.student.schedule,
        t_gen=t_gen,
        t_mid=draws.student.t_mid,
        t=t,
        seed=config.seed,
        iteration=iteration,
        stream=STUDENT_STREAM,
        sample_offset=sample_offset,
    )
    with torch.no_grad():
        if config.cfg == 1:
            # The loss reads cfg - 1 times their difference: 0 either way, and not a number if the teacher is not one.
            out_teacher = out_uncond = roles.teacher(noisy, t, conditioning)
        else:
            both = Conditioning.cat([conditioning, unconditional.expand(len(noisy))])
            noisy_twice = noisy.repeat(2, *[1] * (noisy.ndim - 1))
            out_teacher, out_uncond = roles.teacher(noisy_twice, t.repeat(2), both).chunk(2)
        out_fake = roles.fake(noisy, t, _told(conditioning, config))
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


def rolled_samples(config: TDMConfig, draws: Draws) -> int:
    """Samples in all calls of the rollout that these draws need, without those of calls that other ranks need."""
    steps = zip(draws.student.steps, *(intervals.steps for intervals in draws.fake), strict=True)
    return sum(config.num_steps + 1 - _last_step(config, k, k_fake) for k, *k_fake in steps)
