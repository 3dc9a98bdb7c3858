"""Before a run: what it will hold in memory, what its networks cost, and the batch size that fits."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from tdm_fast.config import TrainConfig
from tdm_fast.distill import rolled_samples
from tdm_fast.memory import (
    Estimate,
    device_memory,
    estimate,
    fake_tensors,
    fill,
    fits_by_estimate,
    fits_by_trial,
    largest_batch,
    refuse_if_too_large,
)
from tdm_fast.metering import Cost, count_operations
from tdm_fast.models.denoiser import Denoiser
from tdm_fast.models.roles import make_networks, tell
from tdm_fast.philox import randn
from tdm_fast.ranks import Ranks, check_batch
from tdm_fast.step import Batch, make_batch, make_state, update
from tdm_fast.text import PromptCache

Shapes = Sequence[tuple[int, ...]]


class Costs(NamedTuple):
    """Operations of one sample in each role's network."""

    student: Cost
    teacher: Cost
    fake: Cost


def measure_costs(
    config: TrainConfig, teacher: Denoiser, cache: PromptCache, shapes: Shapes, ranks: Ranks | None = None
) -> list[Costs]:
    """Of each size of latents `(C, T, H, W)`, with the longest prompt; counted on fake networks, not computed."""
    lengths = cache.lengths
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    device = ranks.device if ranks else next(teacher.parameters()).device
    conditioning, t = cache.batch([longest]).to(device), torch.zeros(1, dtype=torch.int64, device=device)
    costs = []
    for shape in shapes:
        latents = randn(1, shape, seed=0, device=device)
        with fake_tensors():
            roles = make_networks(
                on_device(copy.deepcopy(teacher), device),
                kind=config.networks.roles,
                lora_rank=config.networks.lora_rank,
                teacher_dtype=None,
                unify=config.tdm.unify,
            ).roles
            told = tell(conditioning, config.tdm.num_steps) if config.tdm.unify else conditioning
            student = count_operations(roles.student, latents, t, told)  # the fake score is the same network
            costs.append(Costs(student, count_operations(roles.teacher, latents, t, conditioning), student))
    return costs


def iteration_flops(costs: Costs, batch: Batch) -> int:
    """Model FLOPs of one iteration for `batch`, a rank's: what the method needs, without what is computed twice."""
    tdm, size = batch.tdm, len(batch.prompts)
    teacher_calls = 1 if tdm.cfg == 1 else 2
    updates = tdm.fake_updates * costs.fake.trained + costs.fake.forward
    judged = costs.student.trained + teacher_calls * costs.teacher.forward
    return rolled_samples(tdm, batch.draws) * costs.student.forward + size * (updates + judged)


def with_flags(config: TrainConfig, **flags: Any) -> TrainConfig:
    """The same configuration with other values of some flags."""
    groups = {}
    for group in (field.name for field in dataclasses.fields(config)):
        values = getattr(config, group)
        mine = {f.name: flags[f.name] for f in dataclasses.fields(values) if f.name in flags}
        groups[group] = dataclasses.replace(values, **mine)
    return TrainConfig(**groups)


def largest_example(
    cache: PromptCache,
    config: TrainConfig,
    shapes: Shapes,
    device: torch.device,
    iteration: int = 0,
    ranks: Ranks | None = None,
) -> Batch:
    """A batch as large as any of the run's: the largest latents, the longest prompt, and a shorter one to be padded.

    With `ranks` it is this rank's slice of one.
    """
    largest = max(shapes, key=lambda shape: torch.Size(shape).numel())
    batch = make_batch(iteration, cache, config, [largest], device, ranks)
    lengths = cache.lengths
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    prompts = [by_length[-1]] * len(batch.prompts)
    prompts[1:2] = by_length[:1] if len(prompts) > 1 else []
    return batch._replace(prompts=prompts, conditioning=cache.batch(prompts).to(device))


def estimate_run(
    config: TrainConfig, teacher: Denoiser, cache: PromptCache, shapes: Shapes, ranks: Ranks | None = None
) -> Estimate:
    """What a run will hold on the device that `teacher` is on, the teacher included, without running it.

    With `ranks`, whose teacher may be on the meta device: on this one's device. The trainer's own code runs on fake
    tensors, sharded as the run will be: what is gathered, reduced and exchanged is as large as it will be, but nothing
    is sent, so that one rank may ask alone. The first has the largest shards.
    """
    ranks = ranks or Ranks(device=next(teacher.parameters()).device)
    device = ranks.device
    eager = with_flags(config, compile="off")  # what a compiler fuses away is left to the safe side
    batch = largest_example(cache, eager, shapes, device, ranks=ranks)

    def build() -> Any:
        state = make_state(copy.deepcopy(teacher), eager, ranks)
        fill(state.student_optimizer)
        fill(state.fake_optimizer)
        return state

    def step(state: Any, phase: Callable[[str], Any]) -> None:
        update(state, batch, eager, phase)

    return estimate(build, step, device=device, iterations=1)


def checkpoint_bytes(config: TrainConfig, teacher: Denoiser, device: torch.device) -> int:
    """Bytes of the tensors that a checkpoint of a run holds, the state being made of fake ones."""
    eager = with_flags(config, compile="off")
    with torch.compiler.set_stance("force_eager"), fake_tensors():
        state = make_state(on_device(copy.deepcopy(teacher), device), eager)
        fill(state.student_optimizer)
        fill(state.fake_optimizer)
        return sum(tensor.nbytes for tensors in state.groups().values() for tensor in tensors.values())


def on_device(network: Denoiser, device: torch.device) -> Denoiser:
    """Give a fake network that is on the meta device memory, as fake, on another."""
    return network.to_empty(device=device) if any(p.is_meta for p in network.parameters()) else network


def refuse_what_cannot_fit(
    config: TrainConfig, teacher: Denoiser, cache: PromptCache, shapes: Shapes, ranks: Ranks | None = None
) -> Estimate:
    """The estimate of a run. Raises ValueError, with what would fit, for one that the device has no memory for."""
    ranks = ranks or Ranks(device=next(teacher.parameters()).device)
    expected = estimate_run(config, teacher, cache, shapes, ranks)
    size = config.optimiser.train_batch_size
    assert isinstance(size, int)
    wishes: list[dict[str, Any]] = [{"activation_checkpointing": "block"}]
    unit = ranks.data_ranks * config.optimiser.gradient_accumulation_steps
    wishes += [
        {"activation_checkpointing": "block", "train_batch_size": size // part}
        for part in (2, 4)
        if size // part >= unit and size // part % unit == 0
    ]
    wishes[:0] = [{"activation_checkpointing": "selective"}]
    lean: dict[str, Any] = {"use_ema": False}
    wishes += [lean, lean | {"activation_checkpointing": "block"}]
    if importlib.util.find_spec("torchao"):
        wishes += [lean | {"use_8bit_adam": True, "activation_checkpointing": "block"}]
    wishes += [{"roles": "lora"}, {"roles": "lora", "activation_checkpointing": "block", "train_batch_size": unit}]
    present = config.flat()
    wishes = [wish for wish in wishes if any(present[name] != value for name, value in wish.items())]

    def flag(name: str, value: Any) -> str:
        return f"--{name} {value}" if not isinstance(value, bool) else f"--{name}" if value else f"--no-{name}"

    def alternative(flags: Mapping[str, Any]) -> tuple[str, Callable[[], Estimate]]:
        text = " ".join(flag(name, value) for name, value in flags.items() if present[name] != value)
        return text, lambda: estimate_run(with_flags(config, **flags), teacher, cache, shapes, ranks)

    refuse_if_too_large(expected, available_memory(teacher, ranks), [alternative(flags) for flags in wishes])
    return expected


def available_memory(teacher: Denoiser, ranks: Ranks) -> int:
    """Bytes that a rank can have on its device, with the teacher's weights, which an estimate counts, there already.

    The ranks of one machine share its memory where they compute on CPUs.
    """
    there = sum(p.nbytes for p in teacher.parameters() if not p.is_meta)
    left = device_memory(ranks.device)
    return there + (left // ranks.local_world if ranks.device.type == "cpu" else left)


def with_batch_size(
    config: TrainConfig,
    teacher: Denoiser,
    cache: PromptCache,
    shapes: Shapes,
    saved: Mapping[str, Any] | None,
    ranks: Ranks | None = None,
) -> TrainConfig:
    """`config` with `--train_batch_size auto` replaced by a number, and the checkpointing that goes with it.

    Ranks, which all must call it, ask alike, each for what a part of its samples may be, and take what fits them all.
    Only a single process tries on its GPU: of several, one that ran out of memory would leave the others waiting in a
    collective, so those estimate, as on CPUs. A run that goes on from a checkpoint keeps what was found when it began
    (`saved` is the checkpoint's configuration). Raises ValueError where it does not divide by other ranks.
    """
    if config.optimiser.train_batch_size != "auto":
        return config
    names = ("train_batch_size", "activation_checkpointing")
    ranks = ranks or Ranks(device=next(teacher.parameters()).device)
    device, parts = ranks.device, config.optimiser.gradient_accumulation_steps
    if saved is not None:
        check_batch(saved["train_batch_size"], parts, ranks.data_ranks)
        return with_flags(config, **{name: saved[name] for name in names})

    def candidate(size: int, checkpointing: str) -> TrainConfig:
        samples = size * parts * ranks.data_ranks
        return with_flags(config, train_batch_size=samples, activation_checkpointing=checkpointing)

    def estimated(size: int, checkpointing: str) -> Estimate:
        return estimate_run(candidate(size, checkpointing), teacher, cache, shapes, ranks)

    def trial(size: int, checkpointing: str) -> None:
        tried = with_flags(candidate(size, checkpointing), compile="off")
        state = make_state(copy.deepcopy(teacher), tried)
        for iteration in range(2):
            update(state, largest_example(cache, tried, shapes, device, iteration), tried, nullcontext)

    if device.type == "cuda" and ranks.world == 1:
        fits = fits_by_trial(trial, device)
    else:
        fits = fits_by_estimate(estimated, available_memory(teacher, ranks))
    choice = largest_batch(lambda size, checkpointing: not ranks.any(not fits(size, checkpointing)))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the run's peak is not its trials'
    return candidate(choice.batch_size, choice.checkpointing)
