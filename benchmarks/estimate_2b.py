"""Peak memory of one iteration of the 2B Open-Sora Plan v1.3 configuration, from fake tensors: no GPU, no weights.

    python benchmarks/estimate_2b.py [--run lora] [--video 29x480x640] [--checkpointing block] [--json FILE]

The code that runs is the iteration's own: rollout, fake update, student update, optimisers. Compute is bf16: weights
are cast block by block, so without checkpointing the casts of all blocks stay for the backward. Attention is modelled
as a flash kernel: see `tdm_fast.memory.estimate`. The video "none" is one token: what is left is what a run takes
before activations.

Runs: `full` with fp32 AdamW and both networks' gradients kept (`plain`), the same with each network's gradients dropped
after its update (`dropped`), with an 8-bit AdamW in its place (`8bit`); `lora`, rank 32 on one frozen bf16 base.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tdm_fast import distill
from tdm_fast.distill import Roles, TDMConfig
from tdm_fast.memory import KINDS, Estimate, estimate, fill, gigabytes
from tdm_fast.models import OpenSoraT2V_v1_3
from tdm_fast.models.denoiser import Conditioning
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser
from tdm_fast.philox import randn
from tdm_fast.schedule import Schedule

TWO_BILLION = {
    "num_layers": 32, "num_attention_heads": 24, "attention_head_dim": 96, "cross_attention_dim": 2304,
    "caption_channels": 4096, "in_channels": 8, "out_channels": 8, "patch_size": 2, "patch_size_t": 1,
    "activation_fn": "gelu-approximate", "sparse1d": True, "sparse_n": 4,
}  # fmt: skip
VIDEOS = {"29x480x640": (8, 8, 60, 80), "93x640x640": (8, 24, 80, 80)}
ONE_TOKEN = (8, 1, 2, 2)
TEXT_LENGTH = 512
LORA_RANK = 32
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
RUNS = ("plain", "dropped", "8bit", "lora")
# One step of rollout takes as much memory as four.
CONFIG = TDMConfig(num_steps=1)
KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]

SCHEDULE = Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True)
# Drawn here, from real numbers, because the host looks at them.
DRAWS = {batch_size: distill.draw(CONFIG, batch_size, 0) for batch_size in (1, 2)}

Phase = Callable[[str], AbstractContextManager[None]]


class EightBit(torch.optim.Optimizer):
    """What an 8-bit AdamW holds: two bytes per parameter, a float32 scale per 256 of either, float32 while it steps."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            for name in ("first", "second"):
                if name not in state:
                    state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
                    state[f"{name}_scale"] = parameter.new_zeros(-(-parameter.numel() // 256))
            first, second = state["first"].float(), state["second"].float()
            parameter.sub_(first.div_(second))


class CastBlock(nn.Module):
    """A block that computes with copies of its weights in a narrower type."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.block, self.dtype = block, dtype

    def forward(self, *inputs: Any) -> Tensor:
        weights = {name: p.to(self.dtype) for name, p in self.block.named_parameters()}
        return torch.func.functional_call(self.block, weights, inputs)


class CastDenoiser(OpenSoraDenoiser):
    """Open-Sora with fp32 weights and bf16 compute."""

    def call_model(self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        weights = {n: p.bfloat16() for n, p in self.model.named_parameters() if "transformer_blocks" not in n}
        text = conditioning.tensors["encoder_hidden_states"].unsqueeze(1)
        inputs = (x_t, timestep, text)
        return torch.func.functional_call(self.model, weights, inputs, {"return_dict": False})[0].float()


class Adapted(CastDenoiser):
    """One of several denoisers on one base: with the named adapter, or with none."""

    def __init__(self, model: nn.Module, schedule: Schedule, adapter: str | None) -> None:
        super().__init__(model, schedule)
        self.adapter = adapter
        self.checkpoint = model._gradient_checkpointing_func

    def call_model(self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        self.switch()
        # A block is recomputed after other roles have run, and with its own adapter all the same.
        self.model._gradient_checkpointing_func = functools.partial(self.checkpoint, self.run)
        return super().call_model(x_t, timestep, conditioning)

    def run(self, block: nn.Module, *inputs: Any) -> Tensor:
        self.switch()
        return block(*inputs)

    def switch(self) -> None:
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                module._disable_adapters, module._active_adapter = self.adapter is None, [self.adapter]


class State(NamedTuple):
    """Three roles; each trained one's parameters and optimiser."""

    roles: Roles
    fake: torch.optim.Optimizer
    student: torch.optim.Optimizer


def apply_checkpointing(model: OpenSoraT2V_v1_3, kind: str) -> None:
    keywords: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        keywords["context_fn"] = functools.partial(create_selective_checkpoint_contexts, KEPT)
    model.gradient_checkpointing = kind != "none"
    model._gradient_checkpointing_func = functools.partial(checkpoint, **keywords)


def build(run: str, kind: str, sizes: dict[str, Any] = TWO_BILLION) -> State:
    """Networks of random weights and optimisers."""

    def network(trained: bool) -> OpenSoraT2V_v1_3:
        torch.set_default_dtype(torch.float32 if trained else torch.bfloat16)
        try:
            model = OpenSoraT2V_v1_3(**sizes).requires_grad_(trained)
        finally:
            torch.set_default_dtype(torch.float32)
        apply_checkpointing(model, kind)
        return model

    def cast(model: OpenSoraT2V_v1_3) -> OpenSoraT2V_v1_3:
        blocks = (CastBlock(block, torch.bfloat16) for block in model.transformer_blocks)
        model.transformer_blocks = nn.ModuleList(blocks)
        return model

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return EightBit(parameters) if run == "8bit" else torch.optim.AdamW(parameters, fused=True)

    if run == "lora":
        base = network(False)
        lora = peft.LoraConfig(r=LORA_RANK, target_modules=list(LORA_TARGETS))
        for role in ("student", "fake"):
            peft.inject_adapter_in_model(lora, base, adapter_name=role)
        for module in base.modules():
            if isinstance(module, BaseTunerLayer):
                module.lora_A.float().requires_grad_(True)
                module.lora_B.float().requires_grad_(True)
        weights = dict(cast(base).named_parameters())
        fake, student = ([p for name, p in weights.items() if f".{role}." in name] for role in ("fake", "student"))
        roles = Roles(*(Adapted(base, SCHEDULE, adapter) for adapter in ("student", None, "fake")))
    else:
        roles = Roles(
            CastDenoiser(cast(network(True)), SCHEDULE),
            CastDenoiser(network(False), SCHEDULE),
            CastDenoiser(cast(network(True)), SCHEDULE),
        )
        fake, student = (list(role.parameters()) for role in (roles.fake, roles.student))
    state = State(roles, optimizer(fake), optimizer(student))
    fill(state.fake)
    fill(state.student)
    return state


def iterate(
    state: State, phase: Phase, shape: tuple[int, ...], *, drop_gradients: bool = True, batch_size: int = 1
) -> None:
    """One iteration on latents of `shape`; a network's gradients are dropped after its update, or before its next."""
    roles = state.roles
    with phase("data"):
        latents, draws = randn(batch_size, shape, seed=0), DRAWS[batch_size]
        width = roles.teacher.model.config.caption_channels
        texts = torch.zeros(batch_size + 1, TEXT_LENGTH, width, dtype=torch.bfloat16)
        prompts, nothing = (Conditioning({"encoder_hidden_states": part}) for part in (texts[1:], texts[:1]))
    with phase("rollout"):
        rolled = distill.rollout(roles.student, latents, prompts, SCHEDULE, CONFIG, draws)

    def update(role: str, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
        with phase(role):
            if not drop_gradients:
                optimizer.zero_grad()
            loss().backward()
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        with phase("optimiser"):
            optimizer.step()
            if drop_gradients:
                optimizer.zero_grad()

    update("fake", state.fake, lambda: distill.fake_loss(roles, rolled, prompts, CONFIG, draws, 0))
    update("student", state.student, lambda: distill.student_loss(roles, rolled, prompts, nothing, CONFIG, draws, 0))


def measure(run: str, kind: str, shape: tuple[int, ...], sizes: dict[str, Any] = TWO_BILLION) -> Estimate:
    """Peak of one sample's iteration."""
    return estimate(
        lambda: build(run, kind, sizes),
        lambda state, phase: iterate(state, phase, shape, drop_gradients=run != "plain"),
    )


def main() -> None:
    """Print a row a run; `--json` keeps them as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", choices=RUNS, nargs="+", default=list(RUNS))
    parser.add_argument("--video", choices=["none", *VIDEOS], nargs="+", default=["none", *VIDEOS])
    parser.add_argument("--checkpointing", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| run | video | checkpointing | state | peak | in phase |\n|---|---|---|---|---|---|")
    for run, video in product(wanted.run, wanted.video):
        for kind in wanted.checkpointing if video in VIDEOS else ["none"]:
            found = measure(run, kind, VIDEOS.get(video, ONE_TOKEN))
            numbers = gigabytes(found.state), gigabytes(found.peak), found.phase
            print("|", " | ".join((run, video, kind if video in VIDEOS else "", *numbers)), "|", flush=True)
            rows.append({"run": run, "video": video, "checkpointing": kind, **dataclasses.asdict(found)})
            if wanted.json:
                wanted.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
