"""The training step, one improvement after the other: what runs, and how it is measured.

Every rung makes the same iterations from the same draws: of K = 4 steps there are 16 pairs of (k of the student update,
k of the fake update), whose rollouts take 2.75 steps on average. Measured are four of them, whose k of the student
update are 1 to 4 and whose rollouts take 2.75 steps on average as well, so that no average is a matter of luck; with a
shared index it is each k once. Rungs take turns, iteration by iteration, because a machine's speed drifts. The
reference is tdm_fast/reference.py with torch's own AdamW and eager blocks; no improvement of ours is in it, and nothing
in it is slower than it has to be: its attention, dtype, threads and layers are the same.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tdm_fast import distill, reference
from tdm_fast.config import NetworksConfig, OptimiserConfig, TrainConfig
from tdm_fast.distill import TDMConfig
from tdm_fast.memory import KINDS, Estimate, TensorMemory, estimate, fill
from tdm_fast.models import OpenSoraT2V_v1_3
from tdm_fast.models.denoiser import Denoiser
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser
from tdm_fast.schedule import Schedule
from tdm_fast.step import Batch, State, make_batch, make_state, update, uses_bf16
from tdm_fast.text import PromptCache

PROMPTS = 16
SCHEDULE = Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True)


@dataclass(frozen=True)
class Model:
    """A network of random weights to step, its latents `(C, T, H, W)`, its prompts' length and the batch."""

    name: str
    network: dict[str, Any]
    latents: tuple[int, ...]
    tokens: int
    batch: int
    networks: dict[str, Any] = field(default_factory=dict)
    optimiser: dict[str, Any] = field(default_factory=dict)
    """Flags of all its rungs, the reference's too, which a rung's own override."""
    alone: bool = False
    """So large that rungs are measured one after the other, not in turns: a device holds the networks of one."""


def _network(layers: int, heads: int, head_dim: int, caption: int) -> dict[str, Any]:
    return {
        "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim, "caption_channels": caption, "in_channels": 8, "out_channels": 8,
        "patch_size": 2, "patch_size_t": 1, "activation_fn": "gelu-approximate", "sparse1d": True, "sparse_n": 4,
    }  # fmt: skip


# What lets three networks of 2.8 B, two of them trained, into 80 GB.
LARGE: Any = {
    "networks": {"activation_checkpointing": "block"},
    "optimiser": {"use_8bit_adam": True, "use_ema": False},
    "alone": True,
}
MODELS = {
    "dry": Model("dry", {**_network(3, 2, 12, 8), "sparse_n": 2}, (8, 2, 4, 4), 3, 2),  # a look at the script itself
    # The sizes of the bundled teacher.
    "tiny": Model("tiny", {**_network(6, 4, 24, 64), "sparse_n": 2}, (8, 5, 8, 8), 7, 24),
    "50m": Model("50m", _network(13, 10, 48, 1024), (8, 5, 16, 16), 64, 2),
    "2b": Model("2b", _network(32, 24, 96, 4096), (8, 8, 60, 80), 512, 1, **LARGE),
    "2b-93x640x640": Model("2b-93x640x640", _network(32, 24, 96, 4096), (8, 24, 80, 80), 512, 1, **LARGE),
}


@dataclass(frozen=True)
class Rung:
    """One state of affairs. `ours` is tdm_fast's step, else the reference's."""

    name: str
    ours: bool = True
    backend: str = ""
    """TDM_FAST_BACKEND; empty for the fastest there is."""
    fused_adam: bool = True
    tdm: dict[str, Any] = field(default_factory=dict)
    networks: dict[str, Any] = field(default_factory=dict)
    optimiser: dict[str, Any] = field(default_factory=dict)


LADDER = (
    Rung("reference", ours=False, backend="torch", fused_adam=False),
    Rung("no wasted forwards", backend="torch", fused_adam=False),
    Rung("fused ops", fused_adam=False),
    Rung("fused AdamW"),
    Rung("torch.compile", networks={"compile": "on"}),
    Rung("shared index", networks={"compile": "on"}, tdm={"share_index": True}),
)
LORA = Rung(
    "lora roles, rank 32",
    networks={"compile": "on", "roles": "lora"},
    tdm={"share_index": True},
    optimiser={"use_8bit_adam": False},
)
"""Another method, hence no rung for networks that can be trained in full on the device."""
MEMORY = tuple(
    Rung(
        f"{roles}, {kind}",
        networks={"roles": roles, "activation_checkpointing": kind},
        optimiser={"use_8bit_adam": False},
    )
    for roles, kind in itertools.product(("full", "lora"), KINDS)
)
EIGHT_BIT = tuple(
    replace(rung, name=rung.name.replace("full", "full, 8-bit AdamW"), optimiser={"use_8bit_adam": True})
    for rung in MEMORY
    if rung.networks["roles"] == "full"
)
"""What a GPU's memory table has besides."""


def ladder_of(model: Model) -> tuple[Rung, ...]:
    """The rungs that a model can stand on."""
    if not model.alone:
        return LADDER
    return (*(rung for rung in LADDER if rung.name != "fused AdamW"), LORA)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the ops' implementation inside the block."""
    before = os.environ.get("TDM_FAST_BACKEND")
    os.environ["TDM_FAST_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("TDM_FAST_BACKEND") if before is None else os.environ.update(TDM_FAST_BACKEND=before)


def make_teacher(model: Model, device: str) -> Denoiser:
    """The network with weights that let every part of it matter (a new one's last layers are zero)."""
    torch.manual_seed(0)
    _, frames, height, width = model.latents
    sizes = {"sample_size_t": frames, "sample_size_h": height, "sample_size_w": width}
    network = OpenSoraT2V_v1_3(**model.network, **sizes)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return OpenSoraDenoiser(network.to(device), SCHEDULE)


def make_prompts(model: Model) -> PromptCache:
    """Prompts of random embeddings, all of one length."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(PROMPTS + 1, model.tokens, model.network["caption_channels"], generator=generator).unbind()
    return PromptCache(tuple(f"prompt {index}" for index in range(PROMPTS)), tuple(rows[:-1]), rows[-1])


def make_config(rung: Rung, model: Model, *, per: str = "iteration", ema: bool = True) -> TrainConfig:
    networks = {"compile": "off", "mixed_precision": "auto"} | model.networks | rung.networks
    optimiser = {"train_batch_size": model.batch, "use_ema": ema, "lr_warmup_steps": 0}
    return TrainConfig(
        tdm=TDMConfig(index_per=per, seed=5, **rung.tdm),  # type: ignore[arg-type]
        networks=NetworksConfig(**networks),
        optimiser=OptimiserConfig(**(optimiser | model.optimiser | rung.optimiser)),  # type: ignore[arg-type]
    )


def estimate_peak(rung: Rung, model: Model, *, before_activations: bool = False) -> Estimate:
    """What an iteration in bfloat16 will hold on a device, without an average, found on fake tensors.

    The trainer's own code runs. Its rollout is of one step, which takes as much memory as four do. `before_activations`
    makes the video one token: what is left is what the networks take.
    """
    on_device = replace(rung, networks=rung.networks | {"mixed_precision": "bf16"}, tdm=rung.tdm | {"num_steps": 1})
    if before_activations:
        model = replace(model, latents=(model.latents[0], 1, 2, 2), tokens=1)
    config = make_config(on_device, model, ema=False)
    batch = make_batch(0, make_prompts(model), config, [model.latents])

    def build() -> State:
        state = make_state(make_teacher(model, "cpu"), config)
        fill(state.fake_optimizer)
        fill(state.student_optimizer)
        return state

    return estimate(build, lambda state, phase: update(state, batch, config, phase), iterations=1)


PAIRS = ((1, 1), (2, 3), (3, 4), (4, 1))
"""(k of the student update, k of the fake update): rollouts of 4, 2, 1 and 4 steps."""


def chosen_iterations(config: TDMConfig) -> list[int]:
    """The first iterations whose draws are `PAIRS`, in that order; with a shared index those of k = 1, 2, 3, 4."""
    wanted = [(k, k) for k, _ in PAIRS] if config.share_index else list(PAIRS)
    found: dict[tuple[int, int], int] = {}
    for iteration in itertools.count():
        draws = distill.draw(config, 1, iteration)
        found.setdefault((draws.student.steps[0], draws.fake[0].steps[0]), iteration)
        if all(pair in found for pair in wanted):
            return [found[pair] for pair in wanted]
    raise AssertionError


class Runner:
    """A rung with networks and optimisers of its own."""

    def __init__(self, rung: Rung, model: Model, device: str, *, per: str = "iteration", ema: bool = True) -> None:
        self.rung, self.device, self.cache = rung, torch.device(device), make_prompts(model)
        self.config, self.shapes = make_config(rung, model, per=per, ema=ema), [model.latents]
        self.state: State = make_state(make_teacher(model, device), self.config)
        if not (rung.fused_adam or self.config.optimiser.use_8bit_adam):
            for name in ("student_optimizer", "fake_optimizer"):
                ours = getattr(self.state, name)
                options = {key: ours.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
                setattr(self.state, name, torch.optim.AdamW(ours.param_groups[0]["params"], **options))
        self.batches: dict[int, Batch] = {}

    def batch(self, iteration: int) -> Batch:
        if iteration not in self.batches:
            self.batches[iteration] = make_batch(iteration, self.cache, self.config, self.shapes, self.device)
        return self.batches[iteration]

    def iterate(self, iteration: int, phase: Callable[[str], Any] = nullcontext) -> None:
        """One whole iteration, optimisers and average included; the draws are those of `iteration`."""
        self.state.iteration = iteration
        with backend(self.rung.backend):
            if self.rung.ours:
                update(self.state, self.batch(iteration), self.config, phase)
            else:
                reference_update(self.state, self.batch(iteration), self.config, phase)

    def seconds(self, iteration: int) -> float:
        self.batch(iteration)
        synchronize(self.device)
        began = time.perf_counter()
        self.iterate(iteration)
        synchronize(self.device)
        return time.perf_counter() - began

    def flops(self, iterations: list[int]) -> float:
        """Operations of an iteration, on average over these."""
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            for iteration in iterations:
                self.iterate(iteration)
        return counter.get_total_flops() / len(iterations)

    def peak_bytes(self, iterations: list[int]) -> int:
        """The most that tensors held during these iterations: networks, optimisers, gradients, activations."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            for iteration in iterations:
                self.iterate(iteration)
            return torch.cuda.max_memory_allocated(self.device)
        with torch.compiler.set_stance("force_eager"), TensorMemory() as memory:
            memory.add(*self.state.networks.models(), *self.state.ema.values())
            memory.add(self.state.student_optimizer, self.state.fake_optimizer)
            for iteration in iterations:
                self.iterate(iteration, memory.phase)
        return memory.peak


def reference_update(state: State, batch: Batch, config: TrainConfig, phase: Callable[[str], Any]) -> None:
    """An iteration as the public demo's trainer makes it: gradients are cleared before the backward, not after."""
    tdm, _, conditioning, unconditional, latents, *_ = batch
    iteration, roles, optimiser = state.iteration, state.networks.roles, config.optimiser
    draws = reference.draw(tdm, len(latents), iteration, device=state.device)

    def computing() -> AbstractContextManager[Any]:
        return torch.autocast(state.device.type, torch.bfloat16, enabled=uses_bf16(config, state.device))

    with phase("rollout"), computing():
        rolled = reference.rollout(roles.student, latents, conditioning, roles.student.schedule, tdm, draws)
    with phase("fake"):
        with computing():
            loss = reference.fake_loss(roles, rolled, conditioning, tdm, draws, iteration)
        state.fake_optimizer.zero_grad()
        loss.backward()
    with phase("optimiser"):
        state.fake_optimizer.step()
    with phase("student"):
        with computing():
            loss = reference.student_loss(roles, rolled, conditioning, unconditional, tdm, draws, iteration)
        state.student_optimizer.zero_grad()
        loss.backward()
    with phase("optimiser"), torch.no_grad():
        parameters = state.networks.trainable("student")
        nn.utils.clip_grad_norm_(list(parameters.values()), optimiser.max_grad_norm)
        state.student_optimizer.step()
        for name, average in state.ema.items():
            average.lerp_(parameters[name], 1 - optimiser.ema_decay)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
