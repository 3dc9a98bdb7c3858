"""One iteration on one device: what it needs, what it does, and what decides the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from tdm_fast.checkpoint import Checkpoint, Groups, make_optimizer_state, optimizer_tensors
from tdm_fast.config import OptimiserConfig, TrainConfig
from tdm_fast.data import draw_prompts, draw_size
from tdm_fast.distill import Draws, TDMConfig, draw, fake_loss, rollout, student_forward, student_loss
from tdm_fast.guards import Guard, average_
from tdm_fast.models.denoiser import Conditioning, Denoiser
from tdm_fast.models.roles import Networks, make_networks, tell
from tdm_fast.parallel import Compilations, apply_checkpointing, compile_blocks, compile_bound, warm_up
from tdm_fast.philox import randn
from tdm_fast.text import PromptCache


@dataclass
class State:
    """Everything that decides a run's future: the networks, the student's average, two optimisers, the iteration.

    And what the run has cost so far, earlier processes included.
    """

    networks: Networks
    ema: dict[str, Tensor]
    """The student's moving average, by the names of `networks.trainable("student")`; empty without one."""
    student_optimizer: torch.optim.Optimizer
    fake_optimizer: torch.optim.Optimizer
    student_rate: Callable[[int], float]
    guard: Guard
    device: torch.device
    compilations: Compilations | None = None
    """What torch.compile makes of the networks' blocks; None where they run as they are."""
    iteration: int = 0
    seconds: float = 0.0
    peak_memory: int = 0

    @property
    def student_weights(self) -> dict[str, Tensor]:
        """What the run is for: the average, or without one the student as it is."""
        return self.ema or {name: p.detach() for name, p in self.networks.trainable("student").items()}

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint."""
        groups: dict[str, dict[str, Tensor]] = {
            "student": dict(self.networks.trainable("student")),
            "fake": dict(self.networks.trainable("fake")),
            "student_optimizer": optimizer_tensors(self.student_optimizer),
            "fake_optimizer": optimizer_tensors(self.fake_optimizer),
            "guard": self.guard.tensors(),
        }
        return groups | ({"ema": self.ema} if self.ema else {})

    def restore(self, found: Checkpoint, load: Callable[[Checkpoint, Groups], None]) -> None:
        """Go on from a checkpoint, with whose tensors `load` fills those that it is given."""
        make_optimizer_state(self.student_optimizer, found.groups["student_optimizer"])
        make_optimizer_state(self.fake_optimizer, found.groups["fake_optimizer"])
        load(found, self.groups())
        self.iteration, self.seconds = int(found.meta["step"]), float(found.meta["seconds"])
        self.peak_memory = int(found.meta["peak_memory_bytes"])


def resolve_device(name: str) -> torch.device:
    """The device that `--device` names. Raises ValueError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: it takes auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; cpu would do")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device {name}: it takes auto, cpu, cuda or cuda:N")
    return device


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether the networks compute in bfloat16."""
    wish = config.networks.mixed_precision
    return wish == "bf16" or (wish == "auto" and device.type == "cuda")


def make_state(teacher: Denoiser, config: TrainConfig) -> State:
    """Networks, optimisers and average at iteration 0, on the device that `teacher` is on.

    Student and fake score start as the teacher, which is taken over: frozen, and under bf16 kept in it.
    """
    device = next(teacher.parameters()).device
    n, o = config.networks, config.optimiser
    networks = make_networks(
        teacher,
        kind=n.roles,
        lora_rank=n.lora_rank,
        lora_alpha=n.lora_alpha,
        teacher_dtype=torch.bfloat16 if uses_bf16(config, device) else None,
        unify=config.tdm.unify,
        seed=config.tdm.seed,
    )
    for model in networks.models():
        apply_checkpointing(model, n.activation_checkpointing)
    compilations = None
    if n.compile == "on" or (n.compile == "auto" and device.type == "cuda"):
        compilations = Compilations(compile_bound(networks.roles, video_sizes=max(1, len(config.run.video_sizes))))
        for model in networks.models():
            compile_blocks(model, compilations)
    student = networks.trainable("student")
    rate = o.student_learning_rate or o.learning_rate / 5
    return State(
        networks=networks,
        ema={name: p.detach().clone() for name, p in student.items()} if o.use_ema else {},
        student_optimizer=make_optimizer(list(student.values()), rate, o),
        fake_optimizer=make_optimizer(list(networks.trainable("fake").values()), o.learning_rate, o),
        student_rate=rate_schedule(rate, o),
        guard=Guard(device=device),
        device=device,
        compilations=compilations,
    )


def make_optimizer(parameters: Sequence[Tensor], rate: float, config: OptimiserConfig) -> torch.optim.Optimizer:
    """AdamW in one fused kernel, or with moments of 8 bits. Raises ValueError where the latter is not installed."""
    options: dict[str, Any] = {
        "lr": rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=True, **options)
    try:
        from torchao.optim import AdamW8bit  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ValueError("--use_8bit_adam needs torchao: pip install torchao") from error
    return AdamW8bit(parameters, **options)


def rate_schedule(rate: float, config: OptimiserConfig) -> Callable[[int], float]:
    """The student's learning rate as a function of the iteration, which needs no state to resume."""
    scheduler = get_scheduler(
        config.lr_scheduler,
        torch.optim.SGD([torch.zeros(1)], lr=rate),  # only the schedule's formula is wanted
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    factor = scheduler.lr_lambdas[0]
    return lambda iteration: rate * float(factor(iteration))


class Batch(NamedTuple):
    """What an iteration works on: its settings, its samples and its draws."""

    tdm: TDMConfig
    prompts: list[int]
    conditioning: Conditioning
    unconditional: Conditioning
    latents: Tensor
    draws: Draws


def make_batch(
    iteration: int,
    cache: PromptCache,
    config: TrainConfig,
    latent_shapes: Sequence[tuple[int, ...]],
    device: torch.device | str = "cpu",
) -> Batch:
    """An iteration's batch, a function of (seed, iteration); of one of `latent_shapes` `(C, T, H, W)`."""
    batch = config.optimiser.train_batch_size
    assert isinstance(batch, int), "`auto` has been resolved before"
    tdm = config.tdm.at(iteration)
    prompts = draw_prompts(len(cache), batch, seed=tdm.seed, iteration=iteration)
    shape = latent_shapes[draw_size(len(latent_shapes), seed=tdm.seed, iteration=iteration)]
    return Batch(
        tdm=tdm,
        prompts=prompts,
        conditioning=cache.batch(prompts).to(device),
        unconditional=cache.negatives(1).to(device),
        latents=randn(batch, shape, seed=tdm.seed, iteration=iteration, device=device),
        draws=draw(tdm, batch, iteration, device=device),
    )


def compile_now(
    state: State, cache: PromptCache, config: TrainConfig, latent_shapes: Sequence[tuple[int, ...]]
) -> None:
    """Have all that `update` will call compiled before the first iteration, which then is as fast as the last."""
    if state.compilations is None:
        return
    conditioning = cache.batch([0]).to(state.device)
    if config.tdm.unify:
        conditioning = tell(conditioning, config.tdm.num_steps)
    for shape in latent_shapes:
        latents = torch.zeros(1, *shape, device=state.device)
        with torch.autocast(state.device.type, torch.bfloat16, enabled=uses_bf16(config, state.device)):
            warm_up(state.compilations, state.networks.roles, latents, conditioning, batch=1 + torch.get_num_threads())


Phase = Callable[[str], AbstractContextManager[Any]]


def update(state: State, batch: Batch, config: TrainConfig, phase: Phase) -> dict[str, Tensor]:
    """One iteration: the fake-score updates, the student update, the average. Waits for the device nowhere.

    Returns what it says of itself, scalars on the device. Its parts run inside `phase("rollout")` and the like.
    """
    iteration, optimiser, roles, device = state.iteration, config.optimiser, state.networks.roles, state.device
    tdm, _, conditioning, unconditional, latents, draws = batch

    def computing() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config, device))

    with phase("rollout"), computing():
        rolled, output = rollout(roles.student, latents, conditioning, roles.student.schedule, tdm, draws), None
    if tdm.share_index:
        with phase("student"), computing():
            output = student_forward(roles, rolled, conditioning, tdm, draws)
            rolled = rolled.sharing(output)

    losses_fake = []
    for number in range(tdm.fake_updates):
        with phase("fake"):
            with computing():
                loss_fake = fake_loss(roles, rolled, conditioning, tdm, draws, iteration, update=number)
            loss_fake.backward()
        with phase("optimiser"):
            fake = state.guard.step("fake", state.fake_optimizer, loss_fake)
            state.fake_optimizer.zero_grad()  # at once: the student's update needs the memory
        losses_fake.append(loss_fake.detach())

    with phase("student"):
        with computing():
            loss_student = student_loss(
                roles, rolled, conditioning, unconditional, tdm, draws, iteration, output=output
            )
        loss_student.backward()
    with phase("optimiser"):
        for group in state.student_optimizer.param_groups:
            group["lr"] = state.student_rate(iteration)
        limit = optimiser.max_grad_norm
        student = state.guard.step("student", state.student_optimizer, loss_student, max_norm=limit)
        state.student_optimizer.zero_grad()
        if state.ema:
            # A short run must not remember its start: the average is over as many iterations as there have been.
            decay = min(optimiser.ema_decay, (1 + iteration) / (10 + iteration))
            weights = list(state.networks.trainable("student").values())
            average_(list(state.ema.values()), weights, 1 - decay, student.applied)
    state.iteration += 1
    return {
        "loss_fake": torch.stack(losses_fake).mean(),
        "loss_student": loss_student.detach(),
        "grad_norm": student.norm,
        "grad_norm_fake": fake.norm,
        **state.guard.row(),
    }
