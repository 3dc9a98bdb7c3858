"""One iteration of one rank: what it needs, what it does, and what decides the next one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tdm_fast import attention
from tdm_fast.checkpoint import Checkpoint, Groups
from tdm_fast.config import OptimiserConfig, TrainConfig
from tdm_fast.data import draw_prompts, draw_size
from tdm_fast.distill import Draws, Intervals, TDMConfig, draw, fake_loss, rollout, student_forward, student_loss
from tdm_fast.guards import Guard, Update, average_
from tdm_fast.models.denoiser import Conditioning, Denoiser
from tdm_fast.models.loading import Weights
from tdm_fast.models.roles import Networks, make_networks, tell
from tdm_fast.optimizer_state import make_optimizer_state, optimizer_tensors
from tdm_fast.parallel import Compilations, apply_checkpointing, compile_blocks, compile_bound, warm_up
from tdm_fast.philox import randn
from tdm_fast.ranks import Ranks
from tdm_fast.sharding import accumulate, after_forwards, fill_, mean_gradients_, shard_, whole
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
    ranks: Ranks = field(default_factory=Ranks)
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
        self.guard.restore(self.guard.tensors())
        self.iteration, self.seconds = int(found.meta["step"]), float(found.meta["seconds"])
        self.peak_memory = int(found.meta["peak_memory_bytes"])


def resolve_device(name: str) -> torch.device:
    """The device that `--device` names; `auto` heeds `accelerate launch --cpu`. Raises ValueError when not there."""
    if name == "auto":
        wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        return torch.device("cuda" if torch.cuda.is_available() and not wants_cpu else "cpu")
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


def check_context(context_parallel: int, model: nn.Module) -> None:
    """Raise ValueError for a network that cannot split a sample's tokens over ranks and is to."""
    if context_parallel > 1 and not hasattr(model, "set_context_group"):
        raise ValueError(
            f"--context_parallel {context_parallel}: a {type(model).__name__} cannot split a sample's tokens over"
            " ranks; 1 would do"
        )


def choose_attention(config: TrainConfig, model: nn.Module, device: torch.device) -> attention.Choice:
    """What computes the networks' attention. Raises ValueError for a wish that cannot be."""
    dtype = torch.bfloat16 if uses_bf16(config, device) else torch.float32
    return attention.choose(config.networks.attention, model, device, dtype)


def make_state(
    teacher: Denoiser, config: TrainConfig, ranks: Ranks | None = None, weights: Weights | None = None
) -> State:
    """Networks, optimisers and average at iteration 0, on the device that `teacher` is on, or sharded over `ranks`.

    Student and fake score start as the teacher, which is taken over: frozen, and under bf16 kept in it. A teacher on
    the meta device gets its weights, and so do the other two, from where `weights` says; without that they get memory
    and no values, which is all that an estimate needs.
    """
    ranks = ranks or Ranks(device=next(teacher.parameters()).device)
    device = ranks.device
    n, o = config.networks, config.optimiser
    networks = make_networks(
        teacher,
        kind=n.roles,
        lora_rank=n.lora_rank,
        lora_alpha=n.lora_alpha,
        teacher_dtype=torch.bfloat16 if uses_bf16(config, device) else None,
        unify=config.tdm.unify,
        seed=config.tdm.seed,
        device=device,
    )
    if ranks.context_group is not None:
        for model in networks.models():
            check_context(ranks.context, model)
            model.set_context_group(ranks.context_group)  # type: ignore[operator]
    chosen = choose_attention(config, networks.roles.teacher.model, device)
    for model in networks.models():
        attention.set_attention(model, chosen.backend)
        apply_checkpointing(model, n.activation_checkpointing)
    compilations = None
    if n.compile == "on" or (n.compile == "auto" and device.type == "cuda"):
        compilations = Compilations(compile_bound(networks.roles, video_sizes=max(1, len(config.run.video_sizes))))
        for model in networks.models():
            compile_blocks(model, compilations)
    shard_(networks, ranks, bf16=uses_bf16(config, device), reshard_after_forward=n.reshard_after_forward)
    if weights is not None:
        fill_(networks.models(), weights, device)
    elif next(networks.roles.teacher.model.parameters()).is_meta:
        for model in networks.models():
            model.to_empty(device=device)
    student = networks.trainable("student")
    rate = o.student_learning_rate or o.learning_rate / 5
    return State(
        networks=networks,
        ema={name: p.detach().clone() for name, p in student.items()} if o.use_ema else {},
        student_optimizer=make_optimizer(list(student.values()), rate, o),
        fake_optimizer=make_optimizer(list(networks.trainable("fake").values()), o.learning_rate, o),
        student_rate=rate_schedule(rate, o),
        guard=Guard(device=device, ranks=ranks),
        device=device,
        compilations=compilations,
        ranks=ranks,
    )


def make_optimizer(parameters: Sequence[Tensor], rate: float, config: OptimiserConfig) -> torch.optim.Optimizer:
    """AdamW in one fused kernel, or with moments of 8 bits. Raises ValueError where the latter is not installed."""
    options: dict[str, Any] = {
        "lr": rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    # One kernel takes sharded parameters or whole ones.
    sharded = [isinstance(p, DTensor) for p in parameters]
    kinds = [
        [p for p, is_sharded in zip(parameters, sharded, strict=True) if is_sharded == kind] for kind in (True, False)
    ]
    groups: list[Any] = [{"params": kind} for kind in kinds if kind]
    if not config.use_8bit_adam:
        return torch.optim.AdamW(groups, fused=True, **options)
    try:
        from tdm_fast.adamw_8bit import AdamW8bit
    except ImportError as error:
        raise ValueError("--use_8bit_adam needs torchao: pip install 'tdm-fast[8bit]'") from error
    return AdamW8bit(groups, **options)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give an optimiser its learning rate, in the form that it keeps it in."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's, so that a new rate compiles nothing
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


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
    """What an iteration works on: its settings, this rank's samples and their draws."""

    tdm: TDMConfig
    prompts: list[int]
    conditioning: Conditioning
    unconditional: Conditioning
    latents: Tensor
    draws: Draws
    sample_offset: int = 0
    """The first sample's place among those of all ranks."""
    all_prompts: Sequence[int] = ()
    """The prompts of all ranks."""

    def parts(self, count: int) -> list[Batch]:
        """The batch in `count` equal parts."""
        size = len(self.latents) // count
        return (
            [self] if count == 1 else [self._part(slice(start, start + size)) for start in range(0, count * size, size)]
        )

    def _part(self, rows: slice) -> Batch:
        def of(intervals: Intervals) -> Intervals:
            k, t_gen, t_mid, t, steps = intervals
            return Intervals(k[rows], t_gen[rows], t_mid[rows], t[rows], steps[rows])

        return self._replace(
            prompts=self.prompts[rows],
            conditioning=self.conditioning[rows],
            latents=self.latents[rows],
            draws=Draws(tuple(map(of, self.draws.fake)), of(self.draws.student), self.draws.needed),
            sample_offset=self.sample_offset + rows.start,
        )


def make_batch(
    iteration: int,
    cache: PromptCache,
    config: TrainConfig,
    latent_shapes: Sequence[tuple[int, ...]],
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
) -> Batch:
    """An iteration's batch, a function of (seed, iteration); of one of `latent_shapes` `(C, T, H, W)`.

    With `ranks` it is this rank's slice of it.
    """
    everyone, ranks = config.optimiser.train_batch_size, ranks or Ranks()
    assert isinstance(everyone, int), "`auto` has been resolved before"
    batch = everyone // ranks.data_ranks
    first = ranks.data_rank * batch
    tdm = config.tdm.at(iteration)
    all_prompts = draw_prompts(len(cache), everyone, seed=tdm.seed, iteration=iteration)
    prompts = all_prompts[first : first + batch]
    shape = latent_shapes[draw_size(len(latent_shapes), seed=tdm.seed, iteration=iteration)]
    return Batch(
        tdm=tdm,
        prompts=prompts,
        conditioning=cache.batch(prompts).to(device),
        unconditional=cache.negatives(1).to(device),
        latents=randn(batch, shape, seed=tdm.seed, iteration=iteration, sample_offset=first, device=device),
        draws=draw(tdm, batch, iteration, first, device, global_batch_size=everyone),
        sample_offset=first,
        all_prompts=all_prompts,
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

    Returns what it says of itself, scalars on the device and the same on all ranks. Its parts run inside
    `phase("rollout")` and the like. With gradients accumulated the parts of the batch take turns in every phase, so
    that weights are gathered once for all; with `share_index` what the student's backward needs is kept of them all.
    """
    iteration, o, roles, device, ranks = (
        state.iteration,
        config.optimiser,
        state.networks.roles,
        state.device,
        state.ranks,
    )
    student, teacher, fake = (role.model for role in roles)
    shared = state.networks.adapters is not None  # one network for all roles: what is gathered once serves all calls
    steps = o.gradient_accumulation_steps
    reshard = config.networks.reshard_after_forward
    keep = steps > 1 or not reshard
    tdm, parts = batch.tdm, batch.parts(steps)
    # The rollout's weights stay gathered, so every rank makes the calls that its own samples need, and no others.
    draws = [part.draws._replace(needed=()) for part in parts]

    def computing() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config, device))

    def gathered(*models: Any, when: bool) -> AbstractContextManager[None]:
        return whole(*models, when=when, reshard_after_forward=reshard)

    def backward(loss: Tensor, model: Any, number: int) -> None:
        accumulate(model, last=number == steps - 1)
        # Ranks of one context have parts of the gradient, whose mean is taken with the others'.
        (loss * (ranks.context / steps) if ranks.context > 1 or steps > 1 else loss).backward()

    def step(
        role: str, optimizer: torch.optim.Optimizer, losses: list[Tensor], max_norm: float | None = None
    ) -> Update:
        if ranks.world > 1:
            with phase("communication"):
                mean_gradients_([p for group in optimizer.param_groups for p in group["params"]], ranks)
        loss = losses[0].detach() if steps == 1 else torch.stack([loss.detach() for loss in losses]).mean()
        done = state.guard.step(role, optimizer, loss, max_norm=max_norm)
        optimizer.zero_grad()  # at once: the next update needs the memory
        return done

    outputs: list[Tensor | None] = [None] * steps
    with phase("rollout"), gathered(student, when=bool(batch.draws.needed) or tdm.share_index):
        with computing():
            rolled = [
                rollout(roles.student, part.latents, part.conditioning, roles.student.schedule, tdm, drawn)
                for part, drawn in zip(parts, draws, strict=True)
            ]
        if tdm.share_index:
            with phase("student"), computing():
                for number, part in enumerate(parts):
                    output = student_forward(roles, rolled[number], part.conditioning, tdm, draws[number])
                    rolled[number], outputs[number] = rolled[number].sharing(output), output

    losses_fake = []
    for update in range(tdm.fake_updates):
        losses = []
        with phase("fake"), gathered(fake, when=keep):
            for number, part in enumerate(parts):
                with computing():
                    loss = fake_loss(
                        roles, rolled[number], part.conditioning, tdm, draws[number], iteration, part.sample_offset,
                        update=update,
                    )  # fmt: skip
                backward(loss, fake, number)
                losses.append(loss)
        with phase("optimiser"):
            done_fake = step("fake", state.fake_optimizer, losses)
        losses_fake.append(done_fake.loss)

    losses = []
    with (
        phase("student"),
        gathered(student, when=keep or shared),
        gathered(teacher, fake, when=steps > 1 and not shared),
    ):
        for number, part in enumerate(parts):
            with computing():
                loss = student_loss(
                    roles, rolled[number], part.conditioning, part.unconditional, tdm, draws[number], iteration,
                    part.sample_offset, output=outputs[number],
                )  # fmt: skip
            backward(loss, student, number)
            losses.append(loss)
            outputs[number] = None
    for model in {teacher, fake}:
        after_forwards(model)
    with phase("optimiser"):
        set_rate(state.student_optimizer, state.student_rate(iteration))
        done = step("student", state.student_optimizer, losses, o.max_grad_norm)
        if state.ema:
            # A short run must not remember its start: the average is over as many iterations as there have been.
            decay = min(o.ema_decay, (1 + iteration) / (10 + iteration))
            weights = list(state.networks.trainable("student").values())
            average_(list(state.ema.values()), weights, 1 - decay, done.applied)
    state.iteration += 1
    return {
        "loss_fake": torch.stack(losses_fake).mean(),
        "loss_student": done.loss,
        "grad_norm": done.norm,
        "grad_norm_fake": done_fake.norm,
        **state.guard.row(),
    }
