"""Three networks small enough to run an iteration in milliseconds, their conditioning, and draws made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tdm_fast.distill import Draws, Intervals, Roles, TDMConfig
from tdm_fast.models.denoiser import Conditioning, Denoiser
from tdm_fast.schedule import Schedule

SCHEDULES = {
    "epsilon": Schedule.ddpm(prediction_type="epsilon"),
    "v_prediction": Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "flow": Schedule.flow(shift=3.0),
}
SHAPE = (2, 3, 3)


class TinyNetwork(nn.Module):
    """Two layers on the latents, the time, the mean of the kept tokens and, if told, the number of steps."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        size = math.prod(SHAPE)
        self.inner, self.outer = nn.Linear(size + 2 + 3, 16), nn.Linear(16, size)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)

    def forward(
        self,
        x_t: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        num_steps: Tensor | None = None,
    ) -> Tensor:
        if encoder_attention_mask is None:
            encoder_attention_mask = torch.ones_like(encoder_hidden_states[..., 0])
        kept = encoder_attention_mask.to(x_t.dtype)[..., None]
        text = (kept * encoder_hidden_states).sum(1) / kept.sum(1)
        phase = timestep.to(x_t.dtype)[:, None] / 150
        hidden = self.inner(torch.cat((x_t.flatten(1), phase.sin(), phase.cos(), text), dim=1))
        if num_steps is not None:
            hidden = hidden + num_steps.to(x_t.dtype)[:, None] / 8
        return self.outer(torch.tanh(hidden)).view_as(x_t)


def make_roles(schedule: Schedule, dtype: torch.dtype) -> Roles:
    """Three networks near each other, as in training; float64 ones hold the float32 ones' weights."""
    networks = [TinyNetwork(seed=0) for _ in range(3)]
    for seed, network in enumerate(networks):
        for parameter, other in zip(network.parameters(), TinyNetwork(seed + 1).parameters(), strict=True):
            parameter.data += 0.2 * other.data
    student, teacher, fake = (Denoiser(network.to(dtype), schedule) for network in networks)
    teacher.requires_grad_(False)
    return Roles(student, teacher, fake)


def make_conditions(batch_size: int, dtype: torch.dtype) -> tuple[Conditioning, Conditioning]:
    """Prompts of 5 tokens without a mask, and one empty prompt of 2 tokens for all."""
    generator = torch.Generator().manual_seed(9)
    prompts = torch.randn(batch_size, 5, 3, generator=generator).to(dtype)
    return Conditioning({"encoder_hidden_states": prompts}), Conditioning({"encoder_hidden_states": -prompts[:1, :2]})


def draws_of(config: TDMConfig, k_student: Sequence[int], *k_fakes: Sequence[int]) -> Draws:
    """Draws of one batch with the given steps, one per sample and update, and timesteps near the interval's top."""

    def intervals(steps: Sequence[int], place: int) -> Intervals:
        k, length = torch.tensor(steps), config.total_steps // config.num_steps
        t_gen = k * length - 1
        return Intervals(k, t_gen, t_gen - length + 1, t_gen - 50 - place, tuple(steps))

    return Draws(tuple(intervals(steps, place) for place, steps in enumerate(k_fakes, 1)), intervals(k_student, 0))
